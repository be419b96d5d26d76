"""Data sets: image files by the layouts that people have, or arrays decoded once."""

from __future__ import annotations

import gzip
import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tdc_tvm.errors import TdcError
from tdc_tvm.files import write_atomic
from tdc_tvm.training.checkpoint import make_folder
from tdc_tvm.training.config import DataConfig

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Decoded images: uint8 of shape (count, height, width, channels), and int64 labels of shape (count,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> Arrays:
        """The images of these indices, in this order."""
        return Arrays(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files and their labels (int64, shape (count,))."""

    paths: Sequence[Path]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> ImageFiles:
        """The files of these indices, in this order."""
        return ImageFiles([self.paths[index] for index in indices], self.labels[indices])


Split = Arrays | ImageFiles


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in parts.

    Parameters
    ----------
    train, val : Split
        ``val`` is None if the data set has none.
    holdout : Split, optional
        Images kept out of ``train``, to choose by.
    classes : list of str
        Names; a label is an index into them.
    image_size : int
        Height and width of the network's input.
    channels : int
    mean, std : sequence of float
        Of the channels, images scaled to 0..1.
    skipped : tuple of str
        Images that were left out, with the reason.
    """

    train: Split
    val: Split | None
    holdout: Split | None
    classes: list[str]
    image_size: int
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    read: Callable[[DataConfig, Path], tuple[Split, Split | None, list[str]]]
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]


def read_dataset(config: DataConfig) -> Dataset:
    """Find a data set's images, decode them if they are to be in memory, and hold some out.

    Raises
    ------
    TdcError
        If the data set is unknown or incomplete, its parts have different classes, images are missing or cannot be
        read (unless ``skip_corrupt``), or ``holdout`` leaves nothing to train on.
    """
    if config.name not in _SOURCES:
        raise TdcError(f"no data set named {config.name!r}; there are: {', '.join(_SOURCES)}")
    source = _SOURCES[config.name]
    root = Path(config.root).expanduser()
    if not config.root or not root.is_dir():
        raise TdcError(f"the data set's folder {config.root or '(none given)'} does not exist; say where it is (root)")
    train, val, classes = source.read(config, root)
    if len(classes) < 2:
        raise TdcError(f"{root} has one class, {classes[0]!r}; expected two or more (train/CLASS/* of an image folder)")
    size = config.image_size or source.image_size
    skipped: list[str] = []
    if config.in_memory:
        train, reasons = _in_memory(train, size, config, f"{config.name}-train")
        skipped += reasons
        if val is not None:
            val, reasons = _in_memory(val, size, config, f"{config.name}-val")
            skipped += reasons
    if isinstance(train, Arrays):
        size = train.images.shape[1]
        if isinstance(val, Arrays) and val.images.shape[1:] != train.images.shape[1:]:
            shapes = " and ".join("x".join(map(str, part.images.shape[1:])) for part in (train, val))
            raise TdcError(f"train and val of {config.root} have images of {shapes}; expected the same shape")
        if config.image_size not in (None, size):
            raise TdcError(f"{config.name} has images of {size} pixels, image_size asks for {config.image_size}")
    for part, split in (("train", train), ("val", val)):
        if split is not None and len(split) and not 0 <= split.labels.min() <= split.labels.max() < len(classes):
            raise TdcError(
                f"{part} of {config.root} has labels from {split.labels.min()} to {split.labels.max()}, but there are "
                f"{len(classes)} classes"
            )
    holdout = None
    if config.holdout:
        if not 0 < config.holdout < len(train):
            raise TdcError(f"holdout is {config.holdout}, of {len(train)} training images; expected fewer")
        # Not the run's seed: all runs keep out the same images.
        order = np.random.default_rng(0).permutation(len(train))
        holdout = train.subset(np.sort(order[: config.holdout]))
        train = train.subset(np.sort(order[config.holdout :]))
    channels = train.images.shape[3] if isinstance(train, Arrays) else 3
    mean, std = config.mean or source.mean, config.std or source.std
    if len(mean) != channels or len(std) != channels:
        raise TdcError(
            f"images have {channels} channels, but mean and std {len(mean)} and {len(std)} values; give one per channel"
        )
    return Dataset(train, val, holdout, classes, size, channels, mean, std, tuple(skipped))


def save_arrays(path: str | os.PathLike, arrays: Arrays, classes: Sequence[str], fingerprint: str = "") -> None:
    """Write decoded images as an uncompressed ``.npz`` file, whole or not at all."""
    with write_atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            images=arrays.images,
            labels=arrays.labels,
            classes=np.array(list(classes)),
            fingerprint=np.array(fingerprint),
        )


def load_arrays(path: str | os.PathLike) -> tuple[Arrays, list[str], str]:
    """Read what `save_arrays` wrote: images and labels, class names, fingerprint.

    Raises
    ------
    TdcError
        If the file cannot be read or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = Arrays(file["images"], file["labels"].astype(np.int64))
            classes, fingerprint = [str(name) for name in file["classes"]], str(file["fingerprint"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TdcError(f"cannot read decoded images from {path}: {error}; make the file anew") from None
    if arrays.images.ndim != 4 or arrays.images.dtype != np.uint8 or len(arrays.images) != len(arrays):
        raise TdcError(
            f"{path} has images of shape {arrays.images.shape} ({arrays.images.dtype}) and {len(arrays)} labels; "
            "expected uint8 (count, height, width, channels) and as many labels"
        )
    return arrays, classes, fingerprint


def open_image(path: str | os.PathLike) -> Any:
    """Read a file as a PIL image in RGB.

    Raises
    ------
    TdcError
        If the file is missing or is no whole image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # of which Pillow's convert makes white whatever is above 255
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error).replace(str(path), "it")
        raise TdcError(f"{path} ({reason})") from None


def read_image(path: str | os.PathLike, size: int) -> np.ndarray:
    """Read an image as RGB, its shorter side scaled to ``size`` and the middle cut out.

    Returns
    -------
    numpy.ndarray
        uint8, shape (size, size, 3).

    Raises
    ------
    TdcError
        As `open_image`.
    """
    from PIL import Image

    picture = open_image(path)
    if picture.size != (size, size):
        scale = size / min(picture.size)
        width, height = (max(size, round(extent * scale)) for extent in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture)


def decode(files: ImageFiles, size: int, *, skip_corrupt: bool, workers: int) -> tuple[Arrays, list[str]]:
    """Decode files with several threads.

    Returns
    -------
    arrays : Arrays
        In the files' order.
    skipped : list of str
        The files that were left out, with the reason.

    Raises
    ------
    TdcError
        Naming and counting the files that cannot be read, unless ``skip_corrupt``; if none can be read.
    """
    images = np.empty((len(files), size, size, 3), np.uint8)

    def one(index: int) -> str | None:
        try:
            images[index] = read_image(files.paths[index], size)
        except TdcError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        failures = list(pool.map(one, range(len(files))))
    good = np.array([failure is None for failure in failures], bool)
    skipped = [failure for failure in failures if failure is not None]
    if skipped and not skip_corrupt:
        raise TdcError(f"{corrupt_message(skipped, len(files))}; mend them, or leave them out with skip_corrupt")
    if len(files) and not good.any():
        raise TdcError(f"{corrupt_message(skipped, len(files))}; nothing is left")
    return (Arrays(images, files.labels) if not skipped else Arrays(images[good], files.labels[good])), skipped


def corrupt_message(failures: Sequence[str], count: int) -> str:
    """Say which images cannot be read: the first few by name, all by number."""
    more = f" and {len(failures) - 5} more" if len(failures) > 5 else ""
    return f"{len(failures)} of {count} images cannot be read: {', '.join(failures[:5])}{more}"


def _in_memory(split: Split, size: int, config: DataConfig, name: str) -> tuple[Split, list[str]]:
    """Decode a part, or take it from the cache if it holds the same files, read the same way."""
    if isinstance(split, Arrays):
        return split, []
    digest = hashlib.sha256(f"{size} {config.skip_corrupt}".encode())
    for path, label in zip(split.paths, split.labels, strict=True):
        try:
            status = path.stat()
            digest.update(f"{path.resolve()} {label} {status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path} missing\n".encode())
    fingerprint = digest.hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tdc_tvm"
    folder = Path(config.cache).expanduser() if config.cache else base
    path = folder / f"{name}-{fingerprint[:16]}.npz"
    if path.is_file():
        arrays, notes, found = load_arrays(path)
        if found == fingerprint:
            return arrays, notes
    arrays, skipped = decode(split, size, skip_corrupt=config.skip_corrupt, workers=config.workers)
    make_folder(folder)
    save_arrays(path, arrays, skipped, fingerprint)
    return arrays, skipped


def _read_image_folder(config: DataConfig, root: Path) -> tuple[Split, Split | None, list[str]]:
    """ImageNet's layout: train/CLASS/*, val/CLASS/*."""
    classes = _subfolders(root / "train")
    train = _files_of_classes(root / "train", classes, "")
    if not (root / "val").is_dir():
        return train, None, classes
    found = _subfolders(root / "val")
    if set(found) != set(classes):
        lost, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
        raise TdcError(
            f"class mismatch: train of {root} has {len(classes)} classes, val {len(found)}; "
            f"only in train: {', '.join(lost[:5]) or 'none'}; only in val: {', '.join(extra[:5]) or 'none'}; "
            "give both the same folders"
        )
    return train, _files_of_classes(root / "val", classes, ""), classes


def _read_tiny_imagenet(config: DataConfig, root: Path) -> tuple[Split, Split | None, list[str]]:
    """The public layout: wnids.txt, train/WNID/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt."""
    folders = _subfolders(root / "train")
    classes = folders
    if (root / "wnids.txt").is_file():
        classes = (root / "wnids.txt").read_text(encoding="utf-8").split()
        if set(classes) != set(folders):
            raise TdcError(
                f"class count mismatch: wnids.txt of {root} names {len(classes)} classes, train has {len(folders)}; "
                f"they differ in {', '.join(sorted(set(classes) ^ set(folders))[:5])}"
            )
    train = _files_of_classes(root / "train", classes, "images")
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return train, None, classes
    index = {name: label for label, name in enumerate(classes)}
    paths, labels = [], []
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), 1):
        parts = line.split("\t")
        if len(parts) < 2:
            raise TdcError(f"line {number} of {annotations} is {line!r}; expected a file, a tab and its class")
        if parts[1] not in index:
            raise TdcError(
                f"class count mismatch: line {number} of {annotations} names the class {parts[1]!r}, which is not "
                f"among the {len(classes)} of train"
            )
        paths.append(root / "val" / "images" / parts[0])
        labels.append(index[parts[1]])
    return train, ImageFiles(paths, np.array(labels, np.int64)), classes


def _read_cifar(config: DataConfig, root: Path) -> tuple[Split, Split | None, list[str]]:
    import torchvision

    kind = torchvision.datasets.CIFAR10 if config.name == "cifar10" else torchvision.datasets.CIFAR100
    try:
        parts = [kind(root, train=train, download=config.download) for train in (True, False)]
    except RuntimeError:  # torchvision's, which names neither the set nor our setting
        raise TdcError(
            f"{config.name} is not in {root}, or damaged; expected the folder that holds {kind.base_folder}/, or let "
            "torchvision fetch it with data.download=true"
        ) from None
    train, val = (Arrays(part.data, np.array(part.targets, np.int64)) for part in parts)
    return train, val, list(parts[0].classes)


def _read_fashion_mnist(config: DataConfig, root: Path) -> tuple[Split, Split | None, list[str]]:
    import torchvision

    kind = torchvision.datasets.FashionMNIST
    folder = root if (root / "train-images-idx3-ubyte.gz").is_file() else root / "FashionMNIST" / "raw"
    if not folder.is_dir() and config.download:
        kind(root, download=True)
    parts = []
    for part in ("train", "t10k"):
        images, labels = (_read_idx(folder / f"{part}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1"))
        parts.append(Arrays(images[..., None], labels.astype(np.int64)))
    return parts[0], parts[1], list(kind.classes)


def _read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise TdcError(f"cannot read {path}: {error}; expected Fashion-MNIST's files, or data.download=true") from None
    if data[:3] != b"\0\0\x08":
        raise TdcError(f"{path} is not an IDX file of bytes; expected Fashion-MNIST's *-ubyte.gz")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4).astype(int)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy()


def _read_arrays(config: DataConfig, root: Path) -> tuple[Split, Split | None, list[str]]:
    train, classes, _ = load_arrays(root / "train.npz")
    if not (root / "val.npz").is_file():
        return train, None, classes
    val, val_classes, _ = load_arrays(root / "val.npz")
    if val_classes != classes:
        raise TdcError(
            f"class count mismatch: train.npz of {root} has {len(classes)} classes, val.npz {len(val_classes)}, "
            "or in another order"
        )
    return train, val, classes


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise TdcError(f"there is no folder {folder}; expected the data set's layout there")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise TdcError(f"{folder} has no folders; expected one for each class")
    return names


def _files_of_classes(folder: Path, classes: Sequence[str], below: str) -> ImageFiles:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        part = folder / name / below
        files = sorted(entry.name for entry in os.scandir(part)) if part.is_dir() else []
        # Names with a dot in front are others' housekeeping, such as macOS's ._cat.jpg.
        files = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")]
        if not files:
            raise TdcError(f"class {name!r} has no images: {part} is missing or empty")
        paths += [part / file for file in files]
        labels += [label] * len(files)
    return ImageFiles(paths, np.array(labels, np.int64))


_IMAGENET = _Source(_read_image_folder, 224, IMAGENET_MEAN, IMAGENET_STD)
_SOURCES = {
    "imagefolder": _IMAGENET,
    "tiny-imagenet": replace(_IMAGENET, read=_read_tiny_imagenet, image_size=64),
    "cifar10": _Source(_read_cifar, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Source(_read_cifar, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion-mnist": _Source(_read_fashion_mnist, 28, (0.2860,), (0.3530,)),
    "arrays": replace(_IMAGENET, read=_read_arrays),
}
