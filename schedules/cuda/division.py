"""How the blocks and warps of a kernel divide its work: what follows from a shape and a configuration, no code yet.

A *part* is one kernel: one to three consecutive stages of a Tucker convolution, or a whole dense
one.  A block computes all its stages over a spatial tile.  What one stage hands to the next stays in
shared memory.  ``split`` blocks can share a tile.  With one stage, each computes a slice of its
channels, unless they divide its depth (``deep``).  With several they do, and form a cluster: each
computes a slice of the channels that the core reads, and from them its part of the core's sums.
The parts meet in shared memory, where each block adds up those of a group of pixels, and sends the
results to all others; each then computes a slice of the channels of the stage after the core.

A stage is a product of weights (channels x depth) and pixels (depth x pixels), the depth being the
window's taps times the input channels.  All operands are loaded as vectors of 16 bytes along the
input channels, in units: one unit of depth is what a warp multiplies between two loads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tdc_tvm.schedules.cuda.arith import Number, ceil_div, larger, round_up
from tdc_tvm.schedules.cuda.work import UNITS, WARP, Unit, Work, choose_work, rows_kept
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.shape import Conv2dShape

# Channels of a slice are a multiple of this: vectors of results do not cross slices.
SLICE = 16
# Words of shared memory that are read or written at once.
BANKS = 32


def of_stage(method: Callable[[Any, int], Number]) -> Callable[[Any, int], Number]:
    """Compute a property of a part's stage only once."""
    name = f"_{method.__name__}"

    @functools.wraps(method)
    def cached(self: Any, stage: int) -> Number:
        known = self.__dict__.setdefault(name, {})
        if stage not in known:
            known[stage] = method(self, stage)
        return known[stage]

    return cached


@dataclass(frozen=True)
class Division:
    """One kernel; or many of the same stages at once, if the numbers that divide them are arrays.

    Parameters
    ----------
    stages : tuple[Conv2dShape, ...]
        Consecutive convolutions, at most one of which has a window.
    tile_h, tile_w : int or array
        Rows and columns of output that a block computes.
    split : int or array
        Blocks that share a tile.
    deep : int or array
        1 if they divide the depth of a single stage, 0 if its channels.
    warps : int or array
        Warps that compute a tile.
    crews : int or array
        So many times that many are a block: each has a tile, shared memory for it and barriers of its own, and
        while some wait others multiply.  Weights in shared memory serve all.
    group : int
        Which of the units of the precision multiplies: see `UNITS`.
    device : DeviceSpec
        The GPU.
    in_width, out_width : int
        Channels of the input and output in memory, at least those of the stages.
    """

    stages: tuple[Conv2dShape, ...]
    tile_h: Number
    tile_w: Number
    split: Number
    deep: Number
    warps: Number
    crews: Number
    group: int
    device: DeviceSpec
    in_width: int
    out_width: int

    @property
    def precision(self) -> str:
        """Arithmetic and storage."""
        return self.stages[0].precision

    @property
    def unit(self) -> Unit:
        """What multiplies."""
        return UNITS[self.precision, self.group]

    @property
    def last(self) -> int:
        """The number of the last stage."""
        return len(self.stages) - 1

    @property
    def threads(self) -> Number:
        """Threads that compute a tile."""
        return WARP * self.warps

    @property
    def block_threads(self) -> Number:
        """Threads of a block."""
        return self.threads * self.crews

    @functools.cached_property
    def core_index(self) -> int:
        """The stage whose output the tile is measured in: the one with a window, else the first."""
        return next((i for i, stage in enumerate(self.stages) if not stage.is_pointwise), 0)

    @property
    def core(self) -> Conv2dShape:
        """That stage."""
        return self.stages[self.core_index]

    @functools.cached_property
    def halo(self) -> tuple[Number, Number]:
        """Rows and columns of the core's input that a tile depends on."""
        core = self.core
        return (
            (self.tile_h - 1) * core.stride[0] + (core.kernel[0] - 1) * core.dilation[0] + 1,
            (self.tile_w - 1) * core.stride[1] + (core.kernel[1] - 1) * core.dilation[1] + 1,
        )

    @property
    def is_phased(self) -> bool:
        """Whether pixels of the core's input that are multiplied side by side lie so: by phases of the stride."""
        return self.unit.name == "wgmma" and self.core.stride[1] > 1

    @property
    def row_pixels(self) -> Number:
        """Places of a row of the core's input."""
        return round_up(self.halo[1], self.core.stride[1]) if self.is_phased else self.halo[1]

    @functools.cached_property
    def tiles(self) -> tuple[Number, Number]:
        """Tiles of an image, down and across."""
        return ceil_div(self.core.out_height, self.tile_h), ceil_div(self.core.out_width, self.tile_w)

    @property
    def tile_count(self) -> Number:
        """Tiles of the batch."""
        return self.core.batch * self.tiles[0] * self.tiles[1]

    @property
    def divides_depth(self) -> Number:
        """Whether the blocks that share a tile have parts of the core's depth each."""
        return self.deep == 1 if len(self.stages) == 1 else True

    @property
    def is_cluster(self) -> Number:
        """Whether blocks depend on each other."""
        return (self.split > 1) & self.divides_depth

    @property
    def gathers(self) -> Number:
        """Whether the blocks of a cluster send each other what the core hands on."""
        return self.is_cluster & (self.core_index < self.last)

    @functools.cached_property
    def is_staged(self) -> Number:
        """Whether the input is first copied into shared memory, halo and padding included.

        All its loads are then under way together.  An input that takes more than half of the shared
        memory, or three quarters if it is read several times, is read from global memory instead.
        """
        words = self.held_words(0)
        quarters = 3 if self.is_windowed else 2
        return 4 * words <= self.device.smem_per_block_optin_bytes * quarters // 4

    @property
    def is_windowed(self) -> bool:
        """Whether the first stage reads each input several times, or padding."""
        return self.core_index == 0 and (self.core.kernel != (1, 1) or any(self.core.padding))

    @property
    def has_rows_of_eight(self) -> Number:
        """Whether the core's pixels lie as `wgmma` reads them: eight side by side, further rows all as far apart."""
        return self.core.is_pointwise | (self.tile_w == 8)

    @property
    def tile_pixels(self) -> Number:
        """Positions of the core's output in a tile."""
        return self.tile_h * self.tile_w

    @property
    def pools(self) -> bool:
        """Whether the maximum of each 2x2 results is all that is stored."""
        return self.stages[-1].pool

    @property
    def has_whole_windows(self) -> Number:
        """Whether no 2x2 results of which the maximum is stored are of several tiles."""
        return (self.tile_h % 2 == 0) & (self.tile_w % 2 == 0) if self.pools else True

    @property
    def row_pixels_of_tile(self) -> Number:
        """Positions of a row that follow each other; then come those below."""
        kept = self.rows_kept(self.core_index) > 1
        return self.tile_w + kept * (self.unit.pixels - self.tile_w)

    @property
    def group_pixels(self) -> Number:
        """Those that one block of a cluster finishes; where it stores maxima of them, whole pairs of rows."""
        pixels = ceil_div(self.tile_pixels, self.split)
        return round_up(pixels, 2 * self.row_pixels_of_tile) if self.core.pool else pixels

    @of_stage
    def pixels(self, stage: int) -> Number:
        """Positions of a stage's output that a block computes."""
        return self.halo[0] * self.halo[1] if stage < self.core_index else self.tile_pixels

    def in_pixels(self, stage: int) -> Number:
        """Positions of a stage's input that a block needs."""
        if stage < self.core_index:
            return self.halo[0] * self.halo[1]
        return self.halo[0] * self.row_pixels if stage == self.core_index else self.pixels(stage)

    def has_own_channels(self, stage: int) -> Number:
        """Whether each of the blocks that share a tile computes channels of its own; of a cluster's core, sums."""
        return self.divides_depth ^ True if stage == self.core_index else True

    @of_stage
    def in_channels(self, stage: int) -> Number:
        """Input channels of a stage that a block reads, filled up to whole units of depth."""
        channels = self.stages[stage].in_channels
        if stage != self.core_index:
            return round_up(channels, self.unit.depth)
        parts = 1 + (self.split - 1) * self.divides_depth
        return round_up(ceil_div(channels, parts), larger(self.unit.depth, SLICE * (parts > 1)))

    @of_stage
    def depth_units(self, stage: int) -> int:
        """Units of depth of a stage, all taps."""
        taps = self.stages[stage].kernel[0] * self.stages[stage].kernel[1]
        return taps * self.in_channels(stage) // self.unit.depth

    @of_stage
    def slice_channels(self, stage: int) -> Number:
        """Output channels that a block computes; those behind the last channel are zero."""
        needed = self.in_channels(stage + 1) if stage < self.last else self.out_width
        return slice_channels(
            needed, 1 + (self.split - 1) * (self.has_own_channels(stage) if stage == self.last else 0)
        )

    @of_stage
    def plane_words(self, stage: int) -> Number:
        """Words of a stage's input for a unit of depth: all pixels one after the other, as warps load them.

        Neighbouring planes begin on different banks, unless all are read alike.
        """
        words = self.unit.pixel_words
        return words * (round_up(self.in_pixels(stage) - 1, BANKS // words) + 1)

    @of_stage
    def held_words(self, stage: int) -> Number:
        """Words of a stage's input in shared memory, whole rows of banks."""
        channels = self.slice_channels(stage - 1) if stage else self.in_channels(0)
        return round_up(channels // self.unit.depth * self.plane_words(stage), BANKS)

    @property
    def teams(self) -> Number:
        """Warps, or groups of them that multiply together."""
        return self.warps // self.unit.warps

    @functools.cached_property
    def works(self) -> tuple[Work, ...]:
        """How the warps share each stage."""
        return tuple(
            choose_work(
                self.pixels(i),
                self.slice_channels(i),
                self.depth_units(i),
                self.warps,
                self.crews,
                self.unit,
                self.window_rows(i),
                self.tile_h,
            )
            for i in range(len(self.stages))
        )

    @of_stage
    def window_rows(self, stage: int) -> Number:
        """Rows of a stage's window that a lane can keep in registers while it passes over them; 1 if none.

        Pixels that a warp loads side by side must lie in a row of the tile, and the next row of the window a row
        further down.
        """
        core = self.core
        if self.unit.name == "wgmma" or stage != self.core_index or (core.stride[0], core.dilation[0]) != (1, 1):
            return 1
        kept = (self.tile_w % self.unit.pixels == 0) & (self.is_staged if stage == 0 else True)
        return 1 + (core.kernel[0] - 1) * kept

    @of_stage
    def rows_kept(self, stage: int) -> Number:
        """Rows of the window that lanes do keep; 1 if none."""
        return rows_kept(self.works[stage], self.window_rows(stage), self.tile_h)

    def pixel_loads(self, stage: int) -> Number:
        """Vectors of the input that a lane loads for a unit of depth, on average."""
        kept = self.rows_kept(stage)
        return (self.works[stage].columns + kept - 1) / kept

    @of_stage
    def tiles_of_work(self, stage: int) -> tuple[Number, Number]:
        """Warp tiles of a stage: along the channels and along the pixels."""
        work = self.works[stage]
        return (
            ceil_div(self.slice_channels(stage), self.unit.row_lanes * work.rows),
            ceil_div(self.pixels(stage), self.unit.pixels * work.columns),
        )

    @of_stage
    def share(self, stage: int) -> Number:
        """Units of depth of one part of the depth."""
        return round_up(ceil_div(self.depth_units(stage), self.works[stage].splits), self.rows_kept(stage))

    @of_stage
    def turns_of_work(self, stage: int) -> Number:
        """Warp tiles that a warp computes one after the other."""
        channel_tiles, pixel_tiles = self.tiles_of_work(stage)
        return ceil_div(channel_tiles * pixel_tiles, self.teams // self.works[stage].splits)

    @of_stage
    def unit_vectors(self, stage: int) -> Number:
        """Vectors of a unit of depth, of each part of it, of all channels of a slice."""
        work = self.works[stage]
        return self.tiles_of_work(stage)[0] * work.splits * self.row_vectors(stage) * self.unit.weight_lanes

    def row_vectors(self, stage: int) -> Number:
        """Vectors of a lane's weights of a unit of depth; in halves, two of its rows are one."""
        return self.works[stage].rows // (1 + self.unit.halves)


def slice_channels(channels: int, split: Number) -> Number:
    """Channels of each of ``split`` slices."""
    return round_up(ceil_div(channels, split), SLICE)
