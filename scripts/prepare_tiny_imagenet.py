"""Turn packed Tiny-ImageNet files into the public folder layout, or into decoded arrays.

The packed files are train-*.npz and val.npz, each with ``jpeg`` (uint8, all JPEG files end to end), ``offset``
(int64, count + 1: where each begins and the last ends) and ``label`` (int16, an index into wnids.txt), beside
wnids.txt.  Folders take the name that tdc_tvm's data set ``tiny-imagenet`` and other software read; arrays
(train.npz, val.npz: ``--arrays``) are read by the data set ``arrays`` and need no decoding any more.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise, repeat
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tdc_tvm.errors import TdcError
from tdc_tvm.training.data import Arrays, save_arrays

SIZE = 64
# Files that a process decodes at a time.
CHUNK = 1000


def read_packed(path: Path, classes: int) -> tuple[list[bytes], np.ndarray]:
    """The JPEG files of a packed file, and their labels (int64)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data, offset, label = file["jpeg"], file["offset"], file["label"].astype(np.int64)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TdcError(f"cannot read {path}: {error}; expected jpeg, offset and label") from None
    if len(offset) != len(label) + 1 or offset[0] != 0 or offset[-1] != len(data) or (np.diff(offset) <= 0).any():
        raise TdcError(f"{path} is not consistent: {len(label)} labels, {len(offset)} offsets up to {offset[-1]}")
    if len(label) and not 0 <= label.min() <= label.max() < classes:
        raise TdcError(f"{path} has labels from {label.min()} to {label.max()}; wnids.txt names {classes} classes")
    return [data[a:b].tobytes() for a, b in pairwise(offset)], label


def write_folders(files: list[bytes], labels: np.ndarray, classes: list[str], root: Path, part: str) -> None:
    """Write train/WNID/images/WNID_n.JPEG, or val/images/val_n.JPEG and val/val_annotations.txt."""
    names = []
    counts = [0] * len(classes)
    for number, label in enumerate(labels):
        if part == "train":
            names.append(f"train/{classes[label]}/images/{classes[label]}_{counts[label]}.JPEG")
            counts[label] += 1
        else:
            names.append(f"val/images/val_{number}.JPEG")
    for folder in {os.path.dirname(name) for name in names}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name, data: (root / name).write_bytes(data), names, files))
    if part == "val":
        lines = [f"{Path(name).name}\t{classes[label]}\n" for name, label in zip(names, labels, strict=True)]
        (root / "val" / "val_annotations.txt").write_text("".join(lines))


def decode(files: list[bytes], labels: np.ndarray, part: str) -> Arrays:
    """Decode JPEG files of 64 x 64 pixels, by processes, as threads wait for each other (16: 3,200 images a second)."""
    firsts = range(0, len(files), CHUNK)
    with ProcessPoolExecutor() as pool:
        chunks = pool.map(decode_chunk, (files[first : first + CHUNK] for first in firsts), firsts, repeat(part))
        return Arrays(np.concatenate(list(chunks)), labels)


def decode_chunk(files: list[bytes], first: int, part: str) -> np.ndarray:
    """Images (count, 64, 64, 3) of some files, the first of which has the number ``first`` of its part."""
    from PIL import Image

    images = np.empty((len(files), SIZE, SIZE, 3), np.uint8)
    for index, data in enumerate(files):
        try:
            with Image.open(io.BytesIO(data)) as image:
                picture = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise TdcError(f"image {first + index} of {part} cannot be read: {error}") from None
        if picture.shape != (SIZE, SIZE, 3):
            size = f"{picture.shape[1]} x {picture.shape[0]}"
            raise TdcError(f"image {first + index} of {part} has {size} pixels, not 64 x 64")
        images[index] = picture
    return images


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of train-*.npz, val.npz and wnids.txt")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--arrays", action="store_true", help="write decoded arrays and no folders")
    parser.add_argument("--limit", type=int, help="only so many images of each file, for trials")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"argument --limit: found {args.limit}; expected 1 or more")
    try:
        run(args)
    except TdcError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:  # of one of the many files to write
        raise SystemExit(f"error: cannot write {error.filename or args.output}: {error.strerror}") from None


def run(args: argparse.Namespace) -> None:
    if not (args.source / "wnids.txt").is_file():
        raise TdcError(f"there is no {args.source / 'wnids.txt'}; expected the packed files beside it")
    classes = (args.source / "wnids.txt").read_text().split()
    parts = {"train": sorted(args.source.glob("train-*.npz")), "val": [args.source / "val.npz"]}
    if not parts["train"]:
        raise TdcError(f"there is no train-*.npz in {args.source}")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "wnids.txt").write_text("\n".join(classes) + "\n")
    for part, paths in parts.items():
        files: list[bytes] = []
        labels = []
        for path in paths:
            more, numbers = read_packed(path, len(classes))
            files += more[: args.limit]
            labels.append(numbers[: args.limit])
        if args.arrays:
            save_arrays(args.output / f"{part}.npz", decode(files, np.concatenate(labels), part), classes)
        else:
            write_folders(files, np.concatenate(labels), classes, args.output, part)
        print(f"{part}: {len(files)} images in {args.output}")


if __name__ == "__main__":
    main()
