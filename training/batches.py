"""Batches, always the same ones for a seed, an epoch and a step, whatever the number of processes.

Nothing here keeps a state that a checkpoint would have to hold: order and augmentation are functions of
(seed, epoch, step or image).  ``epoch(number, start)`` therefore continues anywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from tdc_tvm.errors import TdcError
from tdc_tvm.training.config import DataConfig
from tdc_tvm.training.data import Arrays, Dataset, ImageFiles, Split, corrupt_message, open_image, read_image

Batch = tuple[torch.Tensor, torch.Tensor]


class Batches(Protocol):
    """What the trainer reads: images (batch, channels, height, width) and labels (batch,) on the device."""

    classes: int | None
    skipped: dict[str, str]

    def __len__(self) -> int:
        """Steps of an epoch."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from the step ``start`` on."""


def mixed_seed(*parts: int) -> int:
    """One seed from several numbers, such as (seed, epoch, step)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def make_batches(
    split: Split,
    dataset: Dataset,
    config: DataConfig,
    *,
    train: bool,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """Batches of one part of a data set.

    Parameters
    ----------
    split : Split
        Of ``dataset``.
    train : bool
        Shuffled, augmented and without an incomplete last batch; otherwise in order, whole and centred.
    seed : int
    device : torch.device
        Where the batches go; decoded images stay there, too.
    rank, world : int
        This process and the number of processes; each gets its share of every batch.

    Raises
    ------
    TdcError
        If the batch size cannot be shared out, or there are fewer training images than one batch has.
    """
    size = config.batch_size if train else config.eval_batch_size
    if size < world or (train and size % world):
        raise TdcError(f"a batch of {size} images cannot be shared by {world} processes; choose a multiple")
    if train and len(split) < size:
        raise TdcError(f"there are {len(split)} training images, fewer than a batch of {size}; lower batch_size")
    kind: Any = MemoryBatches if isinstance(split, Arrays) else FileBatches
    return kind(split, dataset, config, _Order(len(split), size, train, seed, rank, world), torch.device(device))


class _Order:
    """Which images make up a batch, and this process's share of it."""

    def __init__(self, count: int, size: int, train: bool, seed: int, rank: int, world: int) -> None:
        self.count, self.size, self.train, self.seed, self.rank, self.world = count, size, train, seed, rank, world
        self.steps = count // size if train else -(-count // size)

    def indices(self, epoch: int) -> torch.Tensor:
        """All images in the epoch's order."""
        if not self.train:
            return torch.arange(self.count)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        return torch.randperm(self.count, generator=generator)

    def share(self, step: int) -> slice:
        """The part of a step's batch that this process has, as positions in the epoch's order."""
        begin, end = step * self.size, min((step + 1) * self.size, self.count)
        first = begin + (end - begin) * self.rank // self.world
        return slice(first, begin + (end - begin) * (self.rank + 1) // self.world)


class _Normalizer:
    """uint8 images to the network's input: (value / 255 - mean) / std per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        shape = (1, len(mean), 1, 1)
        self.shift = torch.tensor([255.0 * value for value in mean], device=device).view(shape)
        self.scale = torch.tensor([1.0 / (255.0 * value) for value in std], device=device).view(shape)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.shift) * self.scale


class MemoryBatches:
    """Batches of decoded images that lie on the device; see `make_batches`."""

    def __init__(
        self, split: Arrays, dataset: Dataset, config: DataConfig, order: _Order, device: torch.device
    ) -> None:
        self.classes: int | None = len(dataset.classes)
        self.skipped: dict[str, str] = {}
        self.order, self.config, self.device = order, config, device
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.normalize = _Normalizer(dataset.mean, dataset.std, device)

    def __len__(self) -> int:
        return self.order.steps

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from the step ``start`` on."""
        indices = self.order.indices(number).to(self.device)
        for step in range(start, len(self)):
            share = self.order.share(step)
            chosen = indices[share]
            if not len(chosen):  # a last batch of fewer images than processes
                continue
            images = self.images[chosen]
            if self.order.train:
                # Drawn for the whole batch, so that an image's draw does not depend on the number of processes.
                generator = torch.Generator(self.device).manual_seed(mixed_seed(self.order.seed, number, step))
                first = share.start - step * self.order.size
                images = self._augment(images, slice(first, first + len(chosen)), generator)
            else:
                images = self.normalize(images.permute(0, 3, 1, 2))
            yield images, self.labels[chosen]

    def _augment(self, images: torch.Tensor, mine: slice, generator: torch.Generator) -> torch.Tensor:
        def draws(rows: int) -> torch.Tensor:
            return torch.rand(rows, self.order.size, generator=generator, device=self.device)[:, mine]

        if self.config.augment == "resized-crop":
            images = resized_crop(self.normalize(images.permute(0, 3, 1, 2)), draws(4), self.config.crop_scale)
        else:
            if self.config.augment == "pad-crop":
                images = pad_crop(images, draws(4), self.config.padding)
            images = self.normalize(images.permute(0, 3, 1, 2))
        return random_erase(images, draws(5), self.config.erase) if self.config.erase else images


def pad_crop(images: torch.Tensor, draws: torch.Tensor, padding: int) -> torch.Tensor:
    """Pad with zeros, crop at random, mirror half of the images.

    Parameters
    ----------
    images : torch.Tensor
        (batch, height, width, channels).
    draws : torch.Tensor
        Uniform in [0, 1), shape (4, batch): row, column, mirroring, unused.
    padding : int
        Pixels on each side.
    """
    count, height, width, _ = images.shape
    device = images.device
    top, left = (draws[:2] * (2 * padding + 1)).long()
    rows = top[:, None] + torch.arange(height, device=device)
    columns = left[:, None] + torch.arange(width, device=device)
    columns = torch.where(draws[2, :, None] < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    return padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def resized_crop(images: torch.Tensor, draws: torch.Tensor, smallest: float) -> torch.Tensor:
    """Scale a random square of each image to its full size (bilinear), mirror half of them.

    Parameters
    ----------
    images : torch.Tensor
        float, (batch, channels, height, width).
    draws : torch.Tensor
        Uniform in [0, 1), shape (4, batch): row, column, mirroring, area.
    smallest : float
        Least share of the area; the share is uniform from it to 1.
    """
    side = (smallest + (1 - smallest) * draws[3]).sqrt()
    shift = (2 * draws[:2] - 1) * (1 - side)
    mirror = torch.where(draws[2] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(side)
    transform = torch.stack([side * mirror, zero, shift[1], zero, side, shift[0]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def random_erase(images: torch.Tensor, draws: torch.Tensor, share: float) -> torch.Tensor:
    """Set a random rectangle to 0 in some images, of the extents that torchvision's ``RandomErasing`` draws.

    Parameters
    ----------
    images : torch.Tensor
        float, (batch, channels, height, width).
    draws : torch.Tensor
        Uniform in [0, 1), shape (5, batch): whether, area, ratio of height to width, row, column.
    share : float
        Of the images.
    """
    area, ratio = 0.02 + 0.31 * draws[1], torch.exp((2 * draws[2] - 1) * math.log(3.3))

    def inside(size: int, extent: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        length = (size * extent).round().clamp(1, size)
        start = (draw * (size - length + 1)).floor()
        position = torch.arange(size, device=images.device) - start[:, None]
        return (position >= 0) & (position < length[:, None])

    rows = inside(images.shape[2], (area * ratio).sqrt(), draws[3]) & (draws[0] < share)[:, None]
    columns = inside(images.shape[3], (area / ratio).sqrt(), draws[4])
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


class FileBatches:
    """Batches of image files, loaded by worker processes; see `make_batches`.

    ``skipped`` collects the files that could not be read; the batch is then smaller by them.
    """

    def __init__(
        self, split: ImageFiles, dataset: Dataset, config: DataConfig, order: _Order, device: torch.device
    ) -> None:
        self.classes: int | None = len(dataset.classes)
        self.skipped: dict[str, str] = {}
        self.order, self.config, self.device = order, config, device
        self.files = _Files(split, dataset, config, order.seed, order.train)
        self.normalize = _Normalizer(dataset.mean, dataset.std, device)

    def __len__(self) -> int:
        return self.order.steps

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from the step ``start`` on.

        Raises
        ------
        TdcError
            Naming a file that cannot be read, unless ``skip_corrupt``.
        """
        indices = self.order.indices(number).tolist()
        plan = [[(number, index) for index in indices[self.order.share(s)]] for s in range(start, len(self))]
        cuda = self.device.type == "cuda"
        loader = torch.utils.data.DataLoader(
            self.files,  # type: ignore[arg-type]
            batch_sampler=plan,  # type: ignore[arg-type]
            num_workers=min(self.config.workers, os.cpu_count() or 1),
            collate_fn=_collate,
            pin_memory=cuda,
            # Its draw would otherwise come from the global generator, and change it.
            generator=torch.Generator().manual_seed(0),
        )
        for images, labels, failures in loader:
            if failures and not self.config.skip_corrupt:
                message = corrupt_message(list(failures), len(failures) + len(labels))
                raise TdcError(f"{message}, in one batch; mend them, or leave them out with skip_corrupt")
            self.skipped |= {failure: failure for failure in failures}
            if not len(labels) and self.order.train:
                raise TdcError(f"no image of a batch of {len(failures)} can be read; mend the data set")
            if len(labels):
                yield (
                    self.normalize(images.to(self.device, non_blocking=cuda)),
                    labels.to(self.device, non_blocking=cuda),
                )


class _Files(torch.utils.data.Dataset):
    """Takes (epoch, index); gives an image (3, size, size) uint8 and a label, or what is wrong with the file."""

    def __init__(self, split: ImageFiles, dataset: Dataset, config: DataConfig, seed: int, train: bool) -> None:
        from torchvision.transforms import v2

        self.split, self.seed, self.size = split, seed, dataset.image_size
        steps: list[Any] = []
        if train and config.augment == "resized-crop":
            steps = [v2.RandomResizedCrop(self.size, scale=(config.crop_scale, 1.0), antialias=True)]
        elif train and config.augment == "pad-crop":
            steps = [v2.RandomCrop(self.size, padding=config.padding)]
        if steps:
            steps.append(v2.RandomHorizontalFlip())
        if train and config.erase:
            # What the normalised image has 0 for.
            steps.append(v2.RandomErasing(config.erase, value=[round(255 * mean) for mean in dataset.mean]))
        self.augment = v2.Compose(steps) if steps else None
        self.whole_image = train and config.augment == "resized-crop"

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int] | str:
        from torchvision.transforms.v2 import functional

        epoch, index = key
        path = self.split.paths[index]
        try:
            if self.whole_image:
                image = functional.pil_to_tensor(open_image(path))
            else:
                # Evaluation on the middle 7/8 of the image, as torchvision's references do for ImageNet.
                margin = self.size if self.augment is not None or self.size < 128 else self.size * 8 // 7
                image = torch.from_numpy(read_image(path, margin).copy()).permute(2, 0, 1)
                image = functional.center_crop(image, [self.size, self.size])
        except TdcError as error:
            return str(error)
        if self.augment is not None:
            # Workers and their number do not matter: an image's draw depends on (seed, epoch, image) alone.
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(mixed_seed(self.seed, epoch, index))
                image = self.augment(image)
        return image, int(self.split.labels[index])


def _collate(items: list[tuple[torch.Tensor, int] | str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    good = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good]), [item for item in items if isinstance(item, str)]


class LoaderBatches:
    """A user's loader of (images, labels), such as a ``torch.utils.data.DataLoader``.

    Its order is its own.  It is repeatable if it draws from PyTorch's global generator, as a shuffling
    ``DataLoader`` does: that is seeded before every epoch.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device | str, seed: int = 0) -> None:
        self.classes: int | None = None
        self.skipped: dict[str, str] = {}
        self.loader, self.device, self.seed = loader, torch.device(device), seed
        try:
            self.steps = len(loader)  # type: ignore[arg-type]
        except TypeError:
            raise TdcError(
                "a loader needs a length: the number of its batches; wrap it in a class that has one"
            ) from None
        if not self.steps:
            raise TdcError("the loader has no batches")

    def __len__(self) -> int:
        return self.steps

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from the step ``start`` on; those before it are read and dropped.

        Raises
        ------
        TdcError
            If the loader gives something else than images and labels.
        """
        seed_all(self.seed, number)
        for owner in (self.loader, getattr(self.loader, "sampler", None)):
            set_epoch = getattr(owner, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(number)
        source = iter(self.loader)
        for step in range(len(self)):
            seed_all(self.seed, number, step)  # for augmentation that the loader does in this process
            try:
                batch = next(source)
            except StopIteration:
                raise TdcError(f"the loader says it has {len(self)} batches, and ended after {step}") from None
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TdcError(f"the loader gives {type(batch).__name__}; expected (images, labels) as a tuple")
            images, labels = batch
            if not isinstance(images, torch.Tensor) or not isinstance(labels, torch.Tensor):
                raise TdcError("the loader's images and labels must be tensors")
            if labels.shape != images.shape[:1] or labels.is_floating_point():
                raise TdcError(
                    f"the loader gives labels of type {labels.dtype} and shape {tuple(labels.shape)} for images of "
                    f"shape {tuple(images.shape)}; expected one whole number for each image"
                )
            if step >= start:
                yield images.to(self.device, non_blocking=True), labels.long().to(self.device, non_blocking=True)


def seed_all(*parts: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators."""
    import random

    seed = mixed_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
