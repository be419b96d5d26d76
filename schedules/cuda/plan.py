"""Where the operands of a kernel lie, and how many of its blocks run at once.

Weights are copied to shared memory ahead of their use, in *chunks* of some units of depth of all
channels.  Those of a stage that do not fit go through a ring of *slots*: a chunk takes the place of
one that all warps are done with.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from tdc_tvm.schedules.cuda.arith import Number, ceil_div, larger, round_up, smaller
from tdc_tvm.schedules.cuda.division import BANKS, Division, of_stage
from tdc_tvm.schedules.cuda.work import REGISTERS, registers_of
from tdc_tvm.schedules.shape import MAX_ELEMENTS

MAX_THREADS = 1024
# Crews of a block: what is tried and tested.
MAX_CREWS = 4
# Pixels of a tile, of those that are tried and tested.
MAX_PIXELS = 256
# Blocks of a cluster; more than 8 are not portable, but H100 allows them (CUDA C++ Programming Guide, clusters).
MAX_CLUSTER = 16
# Bytes of a chunk of weights that has a place of its own: each is waited for by itself.
_PIECE_BYTES = 32 * 1024
# Bytes of one that goes through the ring, and most units of depth; bytes under way, which hide the L2 cache's latency;
# and slots.  All warps meet before each chunk, which costs about as much as multiplying a unit.
_CHUNK_BYTES, _CHUNK_UNITS, _RING_BYTES, _LEAST_SLOTS, _MOST_SLOTS = 16 * 1024, 8, 32 * 1024, 4, 8
# Slots of a ring that are not under way: that of the chunk that is multiplied, and that of the one before, of which
# loads may still wait when all warps meet; bulk copies do not wait behind them (wrong results seen on an H100).
SLOTS_IN_USE = 2

# Chunks of a tap that products of `wgmma` are unrolled for, of equal size.
_PARTS_OF_TAP = np.array((1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32))


@dataclass(frozen=True)
class Placement:
    """Where the weights of each stage lie.

    Parameters
    ----------
    resident : tuple[bool, ...]
        All of them in shared memory; their chunks lie there one after the other.
    ring : tuple[bool, ...]
        Through the ring of ``slots`` of ``slot_vectors`` vectors.
    slots, slot_vectors : int
        Of the ring; no slots if there is none.
    chunk_bytes : int
        Of a chunk that goes through it, about, at most.
    """

    resident: tuple[Number, ...]
    ring: tuple[Number, ...]
    slots: Number
    slot_vectors: Number
    chunk_bytes: Number


@dataclass(frozen=True)
class Part(Division):
    """One kernel, or many: how it is divided, and what it needs of a processor."""

    @property
    def has_bulk_copies(self) -> bool:
        """Whether one thread can copy a chunk, and all can wait for it alone: from sm_90 on."""
        return self.device.compute_capability >= 90

    def ring_units(self, stage: int, most_bytes: Number) -> Number:
        """Units of depth of a chunk that goes through the ring, in each part of it: one, or whole turns of a loop."""
        share, kept = self.share(stage), self.rows_kept(stage)
        if self.unit.name == "wgmma":
            return self.whole_taps(stage, most_bytes)
        turn = kept + (kept == 1)
        unit_bytes = 16 * self.unit_vectors(stage)
        # A turn at least, if a place of its own would have room for it: all warps meet before each chunk.
        least = 1 + (kept - 1) * (kept * unit_bytes <= _PIECE_BYTES)
        units = smaller(_CHUNK_UNITS * most_bytes // _CHUNK_BYTES, most_bytes // unit_bytes)
        most = larger(least, units // turn * turn)
        even = ceil_div(share, ceil_div(share, most))
        return smaller(larger(1, round_up(even, turn) * (most > 1)), share)

    @of_stage
    def piece_units(self, stage: int) -> Number:
        """Units of depth of a chunk that has a place of its own; all where threads copy them by themselves."""
        share, kept = self.share(stage), self.rows_kept(stage)
        if not self.has_bulk_copies:
            return share
        if self.unit.name == "wgmma":
            return self.whole_taps(stage, _PIECE_BYTES)
        count = ceil_div(share * self.unit_vectors(stage), _PIECE_BYTES // 16)
        return smaller(round_up(ceil_div(share, count), kept + (kept == 1)), share)

    def whole_taps(self, stage: int, most_bytes: Number) -> Number:
        """Units of depth of a chunk of at most so many bytes, about: some taps, or an even part of one; all alike."""
        per_tap, kernel = self.in_channels(stage) // self.unit.depth, self.stages[stage].kernel
        most = most_bytes // (16 * self.unit_vectors(stage))
        parts = _PARTS_OF_TAP.reshape(-1, *(1,) * max(np.ndim(per_tap), np.ndim(most)))
        is_even = (per_tap % parts == 0) & (per_tap // parts <= most)
        units = np.where(is_even, per_tap // parts, 1).max(axis=0)
        units = units if units.shape else int(units)
        for count in range(2, kernel[0] * kernel[1] + 1):
            if kernel[0] * kernel[1] % count == 0:
                units = larger(units, (count * per_tap <= most) * count * per_tap)
        return units

    @of_stage
    def chunk_units(self, stage: int) -> Number:
        """Units of depth of a chunk."""
        place = self.placement
        in_pieces = self.share(stage) - place.resident[stage] * (self.share(stage) - self.piece_units(stage))
        return in_pieces - place.ring[stage] * (in_pieces - self.ring_units(stage, place.chunk_bytes))

    @of_stage
    def chunks(self, stage: int) -> Number:
        """Chunks of a stage's weights."""
        return ceil_div(self.share(stage), self.chunk_units(stage))

    @of_stage
    def chunk_vectors(self, stage: int) -> Number:
        """Vectors of a chunk."""
        return self.chunk_units(stage) * self.unit_vectors(stage)

    def weight_vectors(self, stage: int) -> Number:
        """Vectors of one slice's packed weights."""
        return self.chunks(stage) * self.chunk_vectors(stage)

    @of_stage
    def input_words(self, stage: int) -> Number:
        """Shared memory of a stage's input; 0 where it is read from global memory."""
        copies = self.buffers * self.is_staged if stage == 0 else 1
        return self.held_words(stage) * copies

    @functools.cached_property
    def buffers(self) -> Number:
        """Copies of the input in shared memory.

        Two if all of a block's work reads it, the block computes several tiles, alone on its processor, and there is
        room: the input of one tile arrives while the one before is computed.
        """
        if self.core_index:
            return 1
        input_words = self.held_words(0)
        smem_bytes = 4 * (self.other_words + input_words) + 16 * sum(
            map(self.resident_vectors, range(len(self.stages)))
        )
        smem_bytes = smem_bytes + (self.crews - 1) * self.crew_bytes(input_words)
        has_several = self.tile_count * self.split > self.crews * self.device.core_count
        is_alone = (self._resident_of(smem_bytes) == 1) & self.is_staged
        fits = smem_bytes + 4 * self.crews * input_words <= self.device.smem_per_block_optin_bytes
        return 1 + (has_several & is_alone & fits)

    @property
    def fetches_ahead(self) -> Number:
        """Whether the input of the next tile is copied while a tile is computed: when it has been read, or at once."""
        return self.is_staged & (self.rounds > 1) & (self.core_index > 0 or self.buffers > 1)

    def scratch_pitch(self, stage: int) -> Number:
        """Words from one pixel of the exchanged sums to the next."""
        return self.slice_channels(stage) + 4

    @functools.cached_property
    def scratch_words(self) -> Number:
        """Shared memory in which the parts of a depth are added up."""
        words: Number = 0
        for i, work in enumerate(self.works):
            words = larger(words, (work.splits > 1) * work.splits * self.pixels(i) * self.scratch_pitch(i))
            # Whole products of ``wgmma`` read behind the last plane's last pixels.
            if self.unit.name == "wgmma":
                words = larger(words, self.overrun_words(i))
        return words

    @property
    def pooled_pixels(self) -> Number:
        """Results of a block that it takes maxima of: of a cluster's last sums, only those that it finishes."""
        return self.tile_pixels + self.is_cluster * self.core.pool * (self.group_pixels - self.tile_pixels)

    @property
    def pooled_pitch(self) -> Number:
        """Words from one pixel of them to the next."""
        return self.slice_channels(self.last) * self.unit.element_bytes // 4 + 4

    @property
    def pooled_words(self) -> Number:
        """Shared memory of them."""
        return self.pools * self.pooled_pixels * self.pooled_pitch

    def overrun_words(self, stage: int) -> Number:
        """Words behind the end of a stage's input that its products read, and whose results are not used."""
        if stage != self.core_index or self.core.is_pointwise:
            pixels = round_up(self.pixels(stage), self.unit.pixels) - self.pixels(stage)
        else:
            rows = round_up(self.tile_h, self.unit.pixels // 8) - self.tile_h
            pixels = rows * self.core.stride[0] * self.row_pixels
        return self.unit.pixel_words * pixels

    @of_stage
    def resident_vectors(self, stage: int) -> Number:
        """Shared memory of all of a stage's chunks; bulk copies need a mailbox for each."""
        units = self.piece_units(stage)
        return ceil_div(self.share(stage), units) * (units * self.unit_vectors(stage) + self.has_bulk_copies)

    @functools.cached_property
    def placement(self) -> Placement:
        """Where weights lie: in shared memory as far as there is room, else in a ring, else in global memory.

        A block that computes but one tile reads its weights once in any case, and leaves room for a block of the
        next launch if it can.  The core comes first.
        """
        count = range(len(self.stages))
        sizes = [self.resident_vectors(i) for i in count]
        # Warps that compute several tiles of a stage read its weights several times, and not through a ring.
        once = [self.turns_of_work(i) == 1 for i in count]
        others = sum((1 - one) * size for one, size in zip(once, sizes, strict=True))

        def ring_of(most_bytes: int) -> tuple[Number, Number, Number]:
            """Slots, vectors of one, and of all of them."""
            slot: Number = 1
            for i in count:
                slot = larger(slot, once[i] * self.ring_units(i, most_bytes) * self.unit_vectors(i))
            slots = larger(_LEAST_SLOTS, smaller(_MOST_SLOTS, ceil_div(_RING_BYTES // 16, slot) + SLOTS_IN_USE))
            return slots, slot, slots * (slot + self.has_bulk_copies)

        ring = ring_of(_CHUNK_BYTES)
        fixed_bytes = 4 * self.fixed_words + (self.crews - 1) * self.crew_bytes(self.input_words(0))
        room = (self.device.smem_per_block_optin_bytes - fixed_bytes) // 16
        half = room - (self.device.smem_per_block_optin_bytes + 1024) // 32
        is_short = (self.tile_count * self.split <= self.device.core_count) & (self.most_resident > 1)
        halved = is_short & (smaller(sum(sizes), ring[-1] + others) <= half)
        room = halved * half + (1 - halved) * room
        whole = sum(sizes) <= room

        def resident_beside(ring_vectors: Number) -> tuple[Number, list[Number]]:
            """Whether there is a ring, and which stages have all their weights beside it."""
            has_ring = (whole == 0) & (sum(once) > 0) & (ring_vectors <= room)
            left, resident = room - has_ring * ring_vectors, [False] * len(sizes)
            for i in sorted(count, key=lambda i: (i != self.core_index, i)):
                resident[i] = whole | (sizes[i] <= left)
                left = left - resident[i] * sizes[i]
            return has_ring, resident

        has_ring, resident = resident_beside(ring[-1])
        # Warps meet less often before larger chunks, where these take nothing else's place.
        is_large: Number = False
        if np.any(has_ring):
            larger_ring = ring_of(2 * _CHUNK_BYTES)
            has_larger, beside_larger = resident_beside(larger_ring[-1])
            is_large = has_larger & (halved == 0)
            for one, other in zip(resident, beside_larger, strict=True):
                is_large = is_large & (one == other)
            ring = tuple(a + is_large * (b - a) for a, b in zip(ring, larger_ring, strict=True))
        slots, slot, _ = ring
        in_ring = [has_ring & one & (own == 0) for one, own in zip(once, resident, strict=True)]
        return Placement(
            tuple(resident), tuple(in_ring), (sum(in_ring) > 0) * slots, slot, _CHUNK_BYTES * (1 + is_large)
        )

    def is_held(self, stage: int) -> Number:
        """Whether a stage's weights go through shared memory."""
        return self.placement.resident[stage] | self.placement.ring[stage]

    @property
    def mailbox_words(self) -> Number:
        """Shared memory that counts what the blocks of a cluster have sent, sums and results: two words each."""
        return self.is_cluster * 4

    @property
    def group_words(self) -> Number:
        """Shared memory of the core's sums for the pixels that one block of a cluster finishes."""
        # Bulk copies want both ends at the same place of a row of banks.
        return round_up(self.group_pixels * self.scratch_pitch(self.core_index), BANKS)

    @property
    def exchange_words(self) -> Number:
        """Shared memory of sums that are sent and received."""
        return self.is_cluster * 2 * self.split * self.group_words

    @functools.cached_property
    def other_words(self) -> Number:
        """Shared memory without weights and the kernel's input."""
        handed_on = sum(self.input_words(i) for i in range(1, len(self.stages)))
        biases = sum(map(self.slice_channels, range(len(self.stages))))
        results = self.scratch_words + self.exchange_words + self.pooled_words
        return self.mailbox_words + biases + results + handed_on + BANKS

    @functools.cached_property
    def fixed_words(self) -> Number:
        """Shared memory without weights."""
        return self.other_words + self.input_words(0)

    @functools.cached_property
    def smem_bytes(self) -> Number:
        """Shared memory of a block."""
        place = self.placement
        weights = sum(self.resident_vectors(i) * resident for i, resident in enumerate(place.resident))
        of_crews = 4 * self.fixed_words + (self.crews - 1) * self.crew_bytes(self.input_words(0))
        return of_crews + 16 * (weights + place.slots * (place.slot_vectors + self.has_bulk_copies))

    def crew_bytes(self, input_words: Number) -> Number:
        """Shared memory of each crew but the first, given what the kernel's input takes."""
        return 4 * round_up(self.other_words + input_words, BANKS)

    @property
    def overlaps(self) -> Number:
        """Whether the next kernel's blocks find room beside this one's, and can copy their weights meanwhile."""
        return self.resident > 1

    @functools.cached_property
    def resident(self) -> Number:
        """Blocks that a processor holds at the same time, as far as shared memory, registers and threads allow."""
        return larger(1, self._resident_of(self.smem_bytes))

    def _resident_of(self, smem_bytes: Number) -> Number:
        # Each block takes 1 KB besides (CUDA C++ Programming Guide, shared memory of compute capability 8.x and 9.0).
        return smaller((self.device.smem_per_block_optin_bytes + 1024) // (smem_bytes + 1024), self.most_resident)

    @functools.cached_property
    def most_resident(self) -> Number:
        """The same, as far as registers and threads allow."""
        registers: Number = 0
        for i, work in enumerate(self.works):
            registers = larger(registers, registers_of(work, self.unit, self.rows_kept(i)))
        threads = self.block_threads
        return larger(1, smaller(REGISTERS // (registers * threads), 2 * MAX_THREADS // threads))

    @functools.cached_property
    def blocks(self) -> Number:
        """Blocks of the launch: all that can be resident at most, each of which then computes several tiles.

        Not more than that needs, if a processor has one; of several on each, some compute a tile less.
        """
        resident = self.resident
        clusters = larger(1, resident * self.device.core_count // self.split)
        assert self.device.probe is not None
        if self.device.probe.clusters and np.any(self.is_cluster):
            table = np.array(self.device.probe.clusters)
            most = table[smaller(resident, len(table)) - 1, smaller(self.split, MAX_CLUSTER) - 1]
            most = smaller(clusters, most if most.shape else int(most))
            clusters = clusters - self.is_cluster * (clusters - most)
        tiles = ceil_div(self.tile_count, self.crews)
        fewest = ceil_div(tiles, ceil_div(tiles, clusters))
        return self.split * (fewest + (resident > 1) * (smaller(tiles, clusters) - fewest))

    @property
    def rounds(self) -> Number:
        """Tiles that a crew computes one after the other."""
        return ceil_div(self.tile_count, self.tiles_at_once)

    @property
    def tiles_at_once(self) -> Number:
        """Tiles that all blocks compute at the same time."""
        return self.blocks // self.split * self.crews

    @property
    def has_crews(self) -> Number:
        """Whether several crews can be: no ring of weights, at which all warps meet, and no cluster."""
        one = (self.is_cluster == 0) & self.has_bulk_copies
        for i in range(len(self.stages)):
            one = one & (self.placement.ring[i] == 0)
        return one

    @property
    def fits(self) -> Number:
        """Whether the kernel, or each of them, can run."""
        device = self.device
        least = smaller(smaller(self.tile_h, self.tile_w), smaller(self.split, self.warps))
        fits = (
            (least >= 1) & (self.block_threads <= MAX_THREADS) & (self.smem_bytes <= device.smem_per_block_optin_bytes)
        )
        most = MAX_CLUSTER if device.compute_capability >= 90 else 1
        fits = fits & ((self.split <= most) | (self.is_cluster == 0)) & ((self.crews == 1) | self.has_crews)
        fits = fits & self.has_whole_windows
        if self.unit.name == "wgmma":
            fits = fits & self.has_rows_of_eight & self.is_staged
            for i in range(len(self.stages)):
                fits = fits & self.is_held(i)
            fits = fits & (self.warps % self.unit.warps == 0) & (device.compute_capability == 90)
        if self.unit.halves and not self.is_memory_bound:
            fits = fits & False
        return fits & (self.most_elements <= MAX_ELEMENTS)

    @property
    def is_memory_bound(self) -> bool:
        """Whether all it does is read weights that the L2 cache has no room for, as in a fully connected layer."""
        core = self.core
        return len(self.stages) == 1 and core.is_pointwise and 4 * core.weight_count > self.device.l2_bytes

    @property
    def is_streamed(self) -> Number:
        """Whether such weights go through shared memory: those that blocks read at a time then lie together.

        Each block's in one piece, so that all read far apart, took 3 % longer (VGG-16's on an H100, TF32).
        """
        return self.is_memory_bound & self.is_held(0)

    @property
    def most_elements(self) -> Number:
        """Of the largest tensor that the kernel reads or writes, filled up as it lies in memory."""
        first, last = self.stages[0], self.stages[-1]
        weights = (self.split * self.weight_vectors(i) * self.unit.weight_vector for i in range(len(self.stages)))
        tensors = max(first.batch * first.height * first.width * self.in_width, last.out_pixels * self.out_width)
        return functools.reduce(larger, weights, tensors)

    def reject_reason(self) -> str:
        """Why the kernel, whose numbers are in range, cannot run on the device; empty if it can."""
        name, compute = self.device.name, self.device.compute_capability
        if self.tile_pixels > MAX_PIXELS:
            return f"needs tiles of {self.tile_h}x{self.tile_w} = {self.tile_pixels} pixels; at most {MAX_PIXELS}"
        if not self.has_whole_windows:
            return f"needs tiles of even height and width for maxima of 2x2; has tiles of {self.tile_h}x{self.tile_w}"
        if self.deep and len(self.stages) > 1:
            return f"divides the depth of a single stage (deep=1), and has {len(self.stages)} stages"
        if self.is_cluster and compute < 90:
            return f"needs clusters of {self.split} blocks; {name} is sm_{compute}, clusters begin with sm_90"
        if self.is_cluster and self.split > MAX_CLUSTER:
            return f"needs clusters of {self.split} blocks, {name} has at most {MAX_CLUSTER}"
        together = self.unit.warps
        if together > 1 and compute != 90:
            return f"needs groups of {together} warps (group={together}), which sm_90 has; {name} is sm_{compute}"
        if self.unit.halves and not self.is_memory_bound:
            size, room = 4 * self.core.weight_count / 2**20, self.device.l2_bytes / 2**20
            return (
                f"stores weights in FP16 (group={self.group}): for one 1x1 convolution with more of them than the L2"
                f" cache of {name} has room for, {room:.0f} MB; has {len(self.stages)} stage(s), {size:.0f} MB"
            )
        if self.warps % together:
            return f"needs a multiple of {together} warps for groups of {together}; has {self.warps}"
        if together > 1 and not self.has_rows_of_eight:
            return f"needs tiles 8 wide for groups of {together} warps; has tiles {self.tile_w} wide"
        if together > 1 and not (self.is_staged and all(map(self.is_held, range(len(self.stages))))):
            return "needs more shared memory than there is: groups of warps read input and weights from nowhere else"
        if self.block_threads > MAX_THREADS:
            return (
                f"needs {self.crews} crews of {self.warps} warps, {self.block_threads} threads; at most {MAX_THREADS}"
            )
        if self.crews > 1 and not self.has_crews:
            return f"has {self.crews} crews, which share neither a cluster nor a ring of weights, and begin with sm_90"
        if self.smem_bytes > self.device.smem_per_block_optin_bytes:
            has = self.device.smem_per_block_optin_bytes / 1024
            return f"needs {self.smem_bytes / 1024:.0f} KB of shared memory, {name} has {has:.0f} KB"
        if self.most_elements > MAX_ELEMENTS:
            return f"needs a tensor of {self.most_elements:,} elements, 32-bit indices reach {MAX_ELEMENTS:,}"
        return ""
