"""What a warp multiplies: a stage's weights and pixels on their way from memory to registers, along the depth.

Where the next operands lie follows from where the last ones lay: to divide the number of a unit of depth into taps,
chunks and slots each time takes more instructions than its products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.block import all_of, local, ramp, unrolled, when
from tdc_tvm.schedules.cuda.intrinsics import address, run
from tdc_tvm.schedules.cuda.stream import Cursor
from tdc_tvm.schedules.cuda.work import WARP

if TYPE_CHECKING:
    from tdc_tvm.schedules.cuda.chain import Chain


class Weights:
    """Weights of one warp tile, over one part of the depth.

    Parameters
    ----------
    chain : Chain
        The kernel.
    stage : int
        Of its stages.
    channel_tile, split : Expr
        Which of the warps' tiles of channels, and which part of the depth.
    """

    def __init__(self, chain: Chain, stage: int, channel_tile: ir.Expr, split: ir.Expr):
        self.chain, self.stage, part = chain, stage, chain.part
        unit, work = part.unit, part.works[stage]
        self.rows, self.lanes, self.share = part.row_vectors(stage), unit.weight_lanes, part.share(stage)
        self.unit_vectors, self.chunk_units = self.rows * self.lanes, part.chunk_units(stage)
        lane = chain.lane if self.lanes == WARP else chain.lane % self.lanes
        # Within a chunk, in vectors.
        self.first = T.Bind((channel_tile * work.splits + split) * (self.chunk_units * self.unit_vectors) + lane)
        self.in_ring = part.placement.ring[stage]
        has_cursor = self.in_ring or chain.stream.has_mailboxes(stage)
        self.cursor = Cursor(chain.stream, stage) if has_cursor else None
        # Of the vector that this lane loads next.
        self.at = local(1, "int32")

    def begin(self, registers: tirx.Buffer) -> None:
        """Load the first unit."""
        start: ir.Expr | int
        if self.cursor is not None:
            self.cursor.begin()
            start = self.cursor.chunk_at() // 4
        elif self.chain.part.is_held(self.stage):
            start = self.chain.stream.chunk_at(self.stage, 0) // 4
        else:
            start = self.chain.stream.own_weights(self.stage)
        T.buffer_store(self.at, start + self.first, [0])
        self.load(registers)

    def load(self, registers: tirx.Buffer) -> None:
        """Load a unit from where it lies."""
        at, unit = T.Bind(self.at[0]), self.chain.unit
        words = local(4) if unit.halves else registers
        with unrolled(self.rows) as row:
            vector, to = at + row * self.lanes, 0 if unit.halves else row * 4
            if self.chain.part.is_held(self.stage):
                T.buffer_store(words, self.chain.shared[ramp(vector * 4, 4)], [ramp(to, 4)])
            else:
                from_ = address(self.chain.buffers.weights[self.stage], vector * unit.weight_vector)
                run("tdc_load", address(words, to), from_, tirx.const(True, "bool"))
            if unit.halves:
                self.widen(words, registers, row * 8)

    def widen(self, words: tirx.Buffer, registers: tirx.Buffer, first: ir.Expr) -> None:
        """Eight weights from FP16."""
        for pair in range(4):
            run("tdc_unpack_float16", address(registers, first + pair * 2), address(words, pair))
        scale = self.chain.buffers.weight_scales[self.stage]
        with unrolled(8) as i:
            T.buffer_store(registers, registers[first + i] / scale, [first + i])

    def follow(self, registers: tirx.Buffer, number: ir.Expr | int, meets: bool) -> None:
        """Load the unit ``number``, the one after the last; behind the end the last one again.

        Parameters
        ----------
        registers : Buffer
            Where to.
        number : Expr or int
            Which unit this is.
        meets : bool
            Whether a chunk can begin with it.
        """
        more = number < self.share
        T.buffer_store(self.at, self.at[0] + tirx.Select(more, self.unit_vectors, 0), [0])
        if self.chunk_units < self.share and meets:
            when(all_of(more, number % self.chunk_units == 0 if self.chunk_units > 1 else True), self.enter)
        self.load(registers)

    def enter(self) -> None:
        """Go on to the next chunk."""
        if self.cursor is not None:
            self.cursor.follow()
        if self.in_ring:
            assert self.cursor is not None
            T.buffer_store(self.at, self.cursor.chunk_at() // 4 + self.first, [0])
        else:
            rest = self.chain.part.chunk_vectors(self.stage) - self.chunk_units * self.unit_vectors
            T.buffer_store(self.at, self.at[0] + rest, [0])


class Pixels:
    """Pixels of one warp tile, over one part of the depth; a step is a unit, or as many as rows are kept.

    Parameters
    ----------
    chain : Chain
        The kernel.
    stage : int
        Of its stages.
    places : sequence of Buffer
        Where this lane's pixels begin, and their rows and columns.
    split : Expr
        Which part of the depth.
    """

    def __init__(self, chain: Chain, stage: int, places: Sequence[tirx.Buffer], split: ir.Expr):
        self.chain, self.stage, self.part = chain, stage, chain.part
        self.starts, self.rows, self.columns = places
        part, work = chain.part, chain.part.works[stage]
        self.conv, self.kept = part.stages[stage], part.rows_kept(stage)
        self.count = work.columns + self.kept - 1
        steps, units = part.share(stage) // self.kept, part.depth_units(stage) // self.kept
        self.per_tap = part.in_channels(stage) // part.unit.depth
        self.first: ir.Expr | int = 0
        self.last: ir.Expr | int = steps - 1
        if work.splits > 1:
            self.first = T.Bind(tirx.min(split * steps, units - 1) if steps * work.splits > units else split * steps)
        if steps * work.splits > units:
            # Behind the end the weights are zero, and the pixels those of the last step.
            self.last = T.Bind(tirx.min(steps, units - self.first) - 1)
        # Vectors from a unit of depth to the next.
        self.plane = part.plane_words(stage) // 4
        # In vectors from where a pixel begins; steps left in a tap, and the tap's column.
        self.at, self.left, self.column = (local(1, "int32") for _ in range(3))

    def begin(self, registers: tirx.Buffer) -> None:
        """Load the first step."""
        if self.part.input_words(self.stage):
            tap = self.first // self.per_tap
            y, x = self.offset(tap)
            at = self.first % self.per_tap * self.plane + self.chain.chunk_lane()
            T.buffer_store(self.at, at + (y * self.part.halo[1] + x) * self.part.unit.chunks, [0])
            T.buffer_store(self.left, self.per_tap - self.first % self.per_tap, [0])
            T.buffer_store(self.column, tap % self.conv.kernel[1], [0])
        self.load(registers, 0)

    def offset(self, tap: ir.Expr | int) -> tuple[ir.Expr | int, ir.Expr | int]:
        """Rows and columns from a pixel to a tap."""
        width = self.conv.kernel[1]
        y = tap // width * self.conv.dilation[0] if self.kept == 1 else 0
        return y, tap % width * self.conv.dilation[1]

    def follow(self, registers: tirx.Buffer, number: ir.Expr | int) -> None:
        """Load the step ``number``, the one after the last; behind the end the last one again."""
        if not self.part.input_words(self.stage):
            self.load(registers, tirx.min(number, self.last))
            return
        part, conv = self.part, self.conv
        pixel = part.unit.chunks
        delta: ir.Expr | int = self.plane
        if conv.kernel != (1, 1):
            left, column = T.Bind(self.left[0] - 1), T.Bind(self.column[0] + 1)
            ends = T.Bind(left == 0)
            row = part.halo[1] * conv.dilation[0] - conv.kernel[1] * conv.dilation[1] if self.kept == 1 else 0
            is_row = tirx.all(ends, column == conv.kernel[1])
            T.buffer_store(self.left, tirx.Select(ends, self.per_tap, left), [0])
            T.buffer_store(self.column, tirx.Select(is_row, 0, tirx.Select(ends, column, column - 1)), [0])
            delta = tirx.Select(ends, conv.dilation[1] * pixel - (self.per_tap - 1) * self.plane, delta)
            delta = delta + tirx.Select(is_row, row * pixel, 0)
        T.buffer_store(self.at, self.at[0] + tirx.Select(number <= self.last, delta, 0), [0])
        self.load(registers, number)

    def load(self, registers: tirx.Buffer, number: ir.Expr | int) -> None:
        """Load a step from where it lies."""
        part, conv, chain = self.part, self.conv, self.chain
        if part.input_words(self.stage):
            at, row = T.Bind(self.at[0]), part.halo[1] * part.unit.chunks
            with unrolled(self.count) as j:
                start = self.starts[j] if self.kept == 1 else self.starts[0] + j * row
                T.buffer_store(registers, chain.shared[ramp((start + at) * 4, 4)], [ramp(j * 4, 4)])
            return
        step = T.Bind(self.first + number)
        y, x = self.offset(step // self.per_tap)
        with unrolled(self.count) as j:
            if chain.reads_padding(self.stage):
                row, column = self.rows[j] + y, self.columns[j] + x
                inside = tirx.all(row >= 0, row < conv.height, column >= 0, column < conv.width)
                start = self.starts[j] + y * chain.buffers.in_row + x * chain.buffers.in_pitch
                chain.load_input(registers, j, start, step % self.per_tap * part.unit.depth, inside)
            else:
                chain.load_input(registers, j, self.starts[j], step * part.unit.depth, tirx.const(True, "bool"))
