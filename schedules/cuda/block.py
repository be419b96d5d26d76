"""What every part of a kernel needs: its parameters, its shared memory, who is who, and loops over the threads.

Shared memory is one buffer of 32-bit words: a word is a float, or two halves.  Registers that hold
operands are words too; only the product looks at what they mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.arith import ceil_div
from tdc_tvm.schedules.cuda.intrinsics import address, barrier, call, run
from tdc_tvm.schedules.cuda.plan import Part
from tdc_tvm.schedules.cuda.work import WARP


@dataclass
class Buffers:
    """Parameters of one kernel.

    Parameters
    ----------
    x, out : Buffer
        NHWC; the first ``in_width`` channels, and ``out_width`` from ``out_start`` on.
    weights : sequence of Buffer
        A flat one for each stage.
    biases : sequence of Buffer or None
        FP32, filled up to whole slices.
    residual : Buffer, optional
        Of the shape of what the convolution gives.
    prologue : Buffer, optional
        FP32: a scale and then a shift for each channel of the input, filled up to what all blocks read.
    out_start : int
        See above.
    weight_scales : sequence of float
        What the weights of each stage were multiplied by, where they are stored in FP16.
    """

    x: tirx.Buffer
    out: tirx.Buffer
    weights: Sequence[tirx.Buffer]
    biases: Sequence[tirx.Buffer | None]
    residual: tirx.Buffer | None
    prologue: tirx.Buffer | None = None
    out_start: int = 0
    is_result: bool = False
    weight_scales: Sequence[float] = ()

    @property
    def in_pitch(self) -> int:
        """Elements from a pixel of the input to the next."""
        return int(self.x.shape[-1])

    @property
    def in_row(self) -> int:
        """Elements from a row of the input to the next."""
        return int(self.x.shape[-2]) * self.in_pitch


def local(count: int, dtype: str = "float32") -> tirx.Buffer:
    """Registers."""
    return T.sblock_alloc_buffer((count,), dtype, scope="local")


def ramp(start: ir.Expr | int, count: int) -> ir.Expr | int:
    """The indices of ``count`` neighbouring elements."""
    return start if count == 1 else T.ramp(start, 1, count)


def unrolled(count: int):
    """A loop that the CUDA compiler unrolls."""
    return T.serial(count, unroll=True)


def all_of(*conditions: ir.Expr | bool) -> ir.Expr | None:
    """The conjunction of what is not known to hold; None if all holds."""
    unknown = [condition for condition in conditions if condition is not True]
    return tirx.all(*unknown) if unknown else None


def when(condition: ir.Expr | None, body: Callable[[], None]) -> None:
    """Emit under a condition; None always holds."""
    if condition is None:
        body()
        return
    with T.If(condition), T.Then():
        body()


class Block:
    """A block of a kernel's launch, as its code sees it.

    Parameters
    ----------
    part : Part
        The kernel.
    buffers : Buffers
        Its parameters.
    """

    def __init__(self, part: Part, buffers: Buffers):
        self.part, self.buffers, self.unit = part, buffers, part.unit
        # Which of its tiles the block computes.
        self.turn: ir.Expr | int = 0

    def begin(self, rank: ir.Expr, thread: ir.Expr) -> None:
        """Emit what comes first.

        Parameters
        ----------
        rank, thread : Expr
            Which block of those that share a tile this is, and which thread of the block.
        """
        self.crew: ir.Expr | int = 0
        if self.part.crews > 1:
            self.crew = T.Bind(call("tdc_uniform", thread // self.part.threads, returns="int32"))
            thread = T.Bind(thread % self.part.threads)
        # At least one word: a buffer cannot be empty.
        self.shared = T.sblock_alloc_buffer((max(1, self.part.smem_bytes // 4),), "float32", scope="shared.dyn")
        self.base = T.Bind(call("tdc_base", address(self.shared, 0), returns="int32"))
        self.rank, self.thread = rank, thread
        self.warp, self.lane = T.Bind(thread // WARP), T.Bind(thread % WARP)

    @property
    def is_first_crew(self) -> ir.Expr | None:
        """Whether the thread is of the first crew; None if there is but one."""
        return self.crew == 0 if self.part.crews > 1 else None

    def meet(self) -> None:
        """Wait for all threads of the crew."""
        if self.part.crews > 1:
            run("tdc_meet", self.crew + 1, self.part.threads)
        else:
            barrier()

    def place(self, word: ir.Expr) -> ir.Expr:
        """The address of a word of shared memory, for moves between it and registers."""
        return address(self.shared, word)

    def at(self, word: ir.Expr | int) -> ir.Expr:
        """The same as PTX counts it: in bytes, from where shared memory begins."""
        return self.base + word * 4

    def each(self, count: int, body: Callable[[ir.Expr], None]) -> None:
        """Divide items among the threads of the crew."""
        threads = self.part.threads
        trips = ceil_div(count, threads)
        with T.serial(trips, unroll=min(8, trips)) as trip:
            item = T.Bind(trip * threads + self.thread)
            when(all_of(item < count if count % threads else True), lambda: body(item))

    def each_warp(self, count: int, body: Callable[[ir.Expr], None]) -> None:
        """The same, but neighbouring items go to different warps: for what a warp's threads do one after the other."""
        place = T.Bind(self.lane * self.part.warps + self.warp)
        for begin in range(0, count, self.part.threads):
            item = T.Bind(begin + place)
            when(item < count, functools.partial(body, item))
