"""How the warps of a block share one stage: who multiplies what, chosen by a count of cycles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from tdc_tvm.schedules.cuda.arith import Number, ceil_div, larger, round_up, smaller

WARP = 32
# Of a processor, and so of a block, the same from sm_75 on.
REGISTERS = 65536


@dataclass(frozen=True)
class Unit:
    """What multiplies: tensor cores (``mma``; ``wgmma`` for four warps together) or CUDA cores (``fma``).

    For ``fma`` a warp's lanes lie in a grid: ``row_lanes`` along the channels, ``pixels`` along the
    pixels and ``chunks`` along the depth, whose sums meet at the end.  A lane can so compute many
    results of few operands: shared memory delivers 4 bytes to a lane in a cycle, whatever other lanes
    load.  For ``mma`` they lie as PTX's ``m16n8`` fragments want them.  ``wgmma`` reads its operands
    from shared memory by itself; its lanes have results only, as in the rows of four lanes that PTX's
    ``m64`` fragments consist of.

    Parameters
    ----------
    name : str
        ``"mma"``, ``"wgmma"`` or ``"fma"``.
    dtype : str
        What is stored.
    vector : int
        Elements in 16 bytes.
    chunks : int
        Vectors of the depth of a unit, which the lanes of a warp load side by side.
    pixels : int
        Pixels that they load side by side.
    row_lanes : int
        Sets of channels that they load side by side.
    warps : int
        Warps that multiply together.
    halves : bool
        Whether weights are stored in FP16, which has as many bits as TF32 multiplies by: where memory is what bounds.
    """

    name: str
    dtype: str
    vector: int
    chunks: int
    pixels: int
    row_lanes: int
    warps: int = 1
    halves: bool = False

    @property
    def depth(self) -> int:
        """Input channels of a unit of depth."""
        return self.vector * self.chunks

    @property
    def weight_lanes(self) -> int:
        """Lanes that load different weights."""
        return self.row_lanes * self.chunks

    @property
    def element_bytes(self) -> int:
        """Size of an element."""
        return 16 // self.vector

    @property
    def weight_vector(self) -> int:
        """Weights in 16 bytes."""
        return self.vector * (1 + self.halves)

    @property
    def weight_dtype(self) -> str:
        """What weights are stored as."""
        return "float16" if self.halves else self.dtype

    @property
    def pixel_words(self) -> int:
        """Words of a pixel's channels of a unit of depth."""
        return 4 * self.chunks


# By precision and group: on tensor cores the warps that multiply together, or 2 for one warp whose weights are halves;
# on CUDA cores how many times two lanes share a sum.  More of them compute more results each of a small tile, for which
# shared memory has less to deliver.
UNITS = {
    ("fp32", 1): Unit("fma", "float32", 4, 2, 4, 4),
    ("fp32", 4): Unit("fma", "float32", 4, 8, 2, 2),
    ("tf32", 1): Unit("mma", "float32", 4, 4, 8, 8),
    ("tf32", 2): Unit("mma", "float32", 4, 4, 8, 8, halves=True),
    ("fp16", 1): Unit("mma", "float16", 8, 4, 8, 8),
    ("bf16", 1): Unit("mma", "bfloat16", 8, 4, 8, 8),
    ("tf32", 4): Unit("wgmma", "float32", 4, 4, 64, 4, 4),
    ("fp16", 4): Unit("wgmma", "float16", 8, 4, 64, 4, 4),
    ("bf16", 4): Unit("wgmma", "bfloat16", 8, 4, 64, 4, 4),
}
# Channels of a product of ``wgmma`` by lane, of which four have all.
WGMMA_ROWS = (8, 16, 24, 32, 40, 48, 64)


@dataclass(frozen=True)
class Work:
    """How the warps of a block share one stage.

    A lane holds ``rows`` channels of ``columns`` pixels (twice as many on tensor cores) in registers;
    the depth is divided into ``splits`` parts, whose sums meet in shared memory.  The channels are
    neighbours; those of ``wgmma`` by vectors.
    """

    rows: Number
    columns: Number
    splits: Number


@functools.cache
def work_options(name: str) -> tuple[np.ndarray, ...]:
    """Values of ``rows``, ``columns`` and ``splits`` to choose from, along an axis each before that of who asks."""
    if name == "wgmma":
        # One tile keeps shared memory or the tensor cores busy: parts of the depth gain nothing.
        return np.ix_(WGMMA_ROWS, (1,), (1,), (0,))[:3]
    return np.ix_((2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16), (0,))[:3]


@functools.cache
def _work_table(name: str) -> np.ndarray:
    """All of them: ``rows``, ``columns`` and ``splits``, one after the other."""
    return np.stack(np.broadcast_arrays(*work_options(name))).reshape(3, -1)


def rows_kept(work: Work, window_rows: Number, tile_h: Number) -> Number:
    """Rows of the window that lanes keep in registers: 1 or ``window_rows``, if the warps' tiles are whole columns."""
    return 1 + (window_rows - 1) * ((work.columns > 1) & (tile_h % work.columns == 0))


def choose_work(
    pixels: Number,
    channels: Number,
    units: Number,
    warps: Number,
    crews: Number,
    unit: Unit,
    window_rows: Number = 1,
    tile_h: Number = 1,
) -> Work:
    """The division of a stage that takes the least time, by a count of cycles; of equals the first.

    Parameters
    ----------
    pixels, channels, units : int or array
        Extents of the product; the depth in units.
    warps, crews : int or array
        Warps that share the stage; so many times that many are a block.
    unit : Unit
        What multiplies.
    window_rows, tile_h : int or array
        Rows of the window that lanes can keep, where the rows of the tile allow it.
    """
    rows, columns, splits = work_options(unit.name)
    limit = smaller(255, REGISTERS // (WARP * warps * crews))
    # A tile's rows matter by what divides them.
    whole = np.gcd(tile_h, columns.max()) * (window_rows > 1)
    asked = (pixels, channels, units, warps, limit, window_rows, whole)
    given = np.empty((len(asked), *np.broadcast_shapes(*map(np.shape, asked))), np.int64)
    for i, values in enumerate(asked):
        given[i] = values
    # Many tiles ask for the same.
    numbers = np.zeros(given.shape[1:], np.int64)
    for values in given:
        numbers = numbers * (values.max() + 1) + values
    _, first, places = np.unique(numbers, return_index=True, return_inverse=True)
    given = given.reshape(len(given), -1)[:, first]
    kept = rows_kept(Work(rows, columns, splits), given[5], given[6])
    # Single precision is exact enough, and twice as fast.
    work = Work(*(values.astype(np.float32) for values in (rows, columns, splits)))
    kept = kept.astype(np.float32)
    pixels_, channels_, units_, warps_, limit_ = given[:5].astype(np.float32)
    teams = warps_ / unit.warps
    groups = np.floor(teams / work.splits)
    allowed = (groups * work.splits == teams) & ((work.splits == 1) | (work.splits * kept <= units_))
    if unit.name == "wgmma":
        allowed = allowed & ((work.rows == WGMMA_ROWS[0]) | (unit.row_lanes * (work.rows - WGMMA_ROWS[0]) < channels_))
    else:
        allowed = allowed & ((work.rows == 2) | (unit.row_lanes / 2 * work.rows < channels_))
        allowed = allowed & ((work.columns == 1) | (unit.pixels / 2 * work.columns < pixels_))
        allowed = allowed & (work.rows * work.columns <= (64 if unit.name == "fma" else 32))
    allowed = allowed & (registers_of(work, unit, kept) <= limit_)
    cycles = stage_cycles(work, pixels_, channels_, units_, groups, unit, kept)
    best = np.where(allowed, cycles, np.inf).reshape(-1, len(first)).argmin(axis=0)[places.reshape(numbers.shape)]
    chosen = _work_table(unit.name)[:, best]
    return Work(*chosen) if numbers.shape else Work(*map(int, chosen))


def registers_of(work: Work, unit: Unit, kept: Number) -> Number:
    """Registers of a thread, about: two sets of operands, sums, addresses."""
    if unit.name == "wgmma":
        return 2 * work.rows + 64
    return 8 * (work.rows + work.columns + kept - 1) + work.rows * work.columns * (1 if unit.name == "fma" else 2) + 40


def stage_cycles(
    work: Work, pixels: Number, channels: Number, units: Number, groups: Number, unit: Unit, kept: Number
) -> Number:
    """Cycles until a block is done with a stage: it chooses among ways to share one, and predicts nothing else.

    Read off the clock within kernels on an H100, rounded.
    """
    rows, columns, splits = work.rows, work.columns, work.splits
    items = ceil_div(channels, unit.row_lanes * rows) * ceil_div(pixels, unit.pixels * columns)
    share = round_up(ceil_div(units, splits), kept)
    rounds = ceil_div(items, larger(1, groups))
    if unit.name == "wgmma":
        cycles = wgmma_cycles(work, unit)
        return larger(items * share * cycles, rounds * (share * (cycles + 3) + 150 + 10 * rows))
    # Shared memory delivers a vector of 16 bytes to all lanes of a warp in four cycles.
    loads = 4 * (rows + (columns + kept - 1) / kept)
    if unit.name == "mma":
        issue, latency = 6.6 * rows * columns, 70 + 5.5 * rows * columns
    else:
        issue, latency = 4.4 * rows * columns, 40 + 8.0 * rows * columns
    busy = items * splits * share * larger(loads, (issue + 45) / 4)
    results = columns * (2 if unit.name == "mma" else 1) * larger(1, rows * unit.element_bytes / 16)
    alone = rounds * (share * latency + 100 + results * 5 + 4 * sums_swapped(work, unit))
    # The parts of a depth are written, read and added up by all threads.
    merge = (splits > 1) * (150 + 4 * splits * pixels * channels / 32)
    return larger(busy, alone) + merge


def sums_swapped(work: Work, unit: Unit) -> Number:
    """Sums that a lane gets from others that have a part of the same depth, in halves, quarters and so on."""
    return work.rows * work.columns * (1 - 1 / unit.chunks) if unit.name == "fma" else 0


def wgmma_cycles(work: Work, unit: Unit) -> Number:
    """Cycles of the processor for a unit of depth of a tile of ``wgmma``.

    In each it multiplies 1,024 words of one or two elements, and reads 32 from shared memory (measured on an H100).
    """
    channels = unit.row_lanes * work.rows
    return larger(channels, (unit.pixels + channels) / 2)
