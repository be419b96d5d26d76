"""Which tiles, and which numbers of blocks to share one, are worth trying."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

from tdc_tvm.schedules.cuda.arith import ceil_div, round_up
from tdc_tvm.schedules.cuda.division import SLICE, slice_channels
from tdc_tvm.schedules.cuda.plan import MAX_CLUSTER
from tdc_tvm.schedules.cuda.work import UNITS
from tdc_tvm.schedules.shape import Conv2dShape

# Slices of the channels of one stage, at most: fully connected layers have thousands of channels and few pixels.
MAX_SLICES = 256


def splits(stages: tuple[Conv2dShape, ...], core: Conv2dShape) -> list[tuple[int, int]]:
    """Numbers of blocks to share a tile with, and whether they divide the depth of a single stage.

    Each that leaves a block fewer channels than all lower ones: of what it computes, or of what the core reads.
    """
    unit = UNITS[core.precision, 1].depth
    found = [(1, 0)]

    def add(most: int, deep: int, much: float, channels_of: Callable[[int], int]) -> None:
        least = channels_of(1)
        for split in range(2, most + 1):
            if channels_of(split) < much * least:
                found.append((split, deep))
                least = channels_of(split)

    is_one = len(stages) == 1
    if is_one:
        add(
            min(MAX_SLICES, ceil_div(core.out_channels, SLICE)),
            0,
            0.85,
            lambda split: slice_channels(core.out_channels, split),
        )
    add(MAX_CLUSTER, int(is_one), 1.0, lambda split: round_up(ceil_div(core.in_channels, split), max(unit, SLICE)))
    return found


def extents(limit: int, step: int = 1) -> list[int]:
    """Tile extents worth trying for an image extent: divisors and powers of two, of these multiples of ``step``."""
    divisors = {d for d in range(1, min(limit, 32) + 1) if limit % d == 0}
    powers = {1 << i for i in range(6) if 1 << i < 2 * limit}
    return [extent for extent in sorted(divisors | powers) if extent % step == 0]


# Asked for by each kernel that computes the core.
@functools.lru_cache(maxsize=64)
def tiles(core: Conv2dShape, least: int, most: int, step: int = 1) -> list[tuple[int, int]]:
    """Tiles of between ``least`` and ``most`` pixels (fewer if the image is smaller), not too long, nor too high.

    Height and width are multiples of ``step``.
    """
    least = min(least, core.out_height * core.out_width)
    found = []
    for rows in extents(core.out_height, step):
        for columns in extents(core.out_width, step):
            is_shape = rows <= 2 * columns and (columns <= 8 * rows or core.out_height == 1)
            if least <= rows * columns <= most and is_shape:
                found.append((rows, columns))
    return _distinct(core, found) or [(step, max(step, min(least, core.out_width) // step * step))]


@functools.lru_cache(maxsize=64)
def tiles_of_eights(core: Conv2dShape, most: int, step: int = 1) -> list[tuple[int, int]]:
    """Tiles for products of 64 pixels, of which at least half are of the tile."""
    widths = extents(core.out_width, step) if core.is_pointwise else [8]
    # Of eight rows one can be idle, where that divides an image that powers of two do not.
    heights = [height for height in sorted({*extents(core.out_height), 7, 14}) if height % step == 0]
    found = []
    for rows, columns in itertools.product(heights, widths):
        pixels = rows * columns
        if rows < 2 * core.out_height and pixels <= most and 2 * pixels >= round_up(pixels, 64):
            found.append((rows, columns))
    return _distinct(core, found)


def _distinct(core: Conv2dShape, found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without a window, only how many pixels a tile has makes a difference: those that fill the image best, widest."""
    if not core.is_pointwise:
        return found
    best: dict[int, tuple[int, int]] = {}

    def order(tile: tuple[int, int]) -> tuple[int, int]:
        rows, columns = tile
        return ceil_div(core.out_height, rows) * ceil_div(core.out_width, columns), rows

    for rows, columns in sorted(found, key=order):
        best.setdefault(rows * columns, (rows, columns))
    return list(best.values())
