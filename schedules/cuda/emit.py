"""Pieces of the schedule "direct": how threads share a product, and what emits it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.arith import ceil_div
from tdc_tvm.schedules.cuda.intrinsics import barrier, clip
from tdc_tvm.schedules.cuda.plan import MAX_THREADS
from tdc_tvm.schedules.cuda.work import REGISTERS, WARP
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import KernelConfig
from tdc_tvm.schedules.shape import Epilogue

# Steps of a reduction whose loads are in flight together.
UNROLL = 8
# An L1 or shared-memory load instruction takes as long as this many multiply-adds.
_LOAD_COST = 4
_L2_LATENCY_US = 0.2
_BARRIER_US = 0.05

# A value from the number of a pixel, or of a step and a column.
Load = Callable[[ir.Expr], ir.Expr]
Load2 = Callable[[ir.Expr, ir.Expr], ir.Expr]


@dataclass(frozen=True)
class ThreadTile:
    """How the threads of a block share a product of ``pixels x depth`` by ``depth x columns`` matrices.

    ``lanes`` neighbouring threads take neighbouring columns, so that weights are read coalesced.
    A thread accumulates ``pixels`` neighbouring pixels by ``columns`` columns, ``lanes`` apart, in
    registers, over one of ``splits`` parts of the depth, in steps of ``vector``.
    """

    threads: int
    lanes: int
    pixels: int
    columns: int
    splits: int
    vector: int

    @property
    def groups(self) -> int:
        """Sets of lanes that have a result of their own."""
        return self.threads // (self.lanes * self.splits)

    @property
    def width(self) -> int:
        """Columns that a set of lanes covers."""
        return self.lanes * self.columns

    @property
    def scratch(self) -> int:
        """Numbers that a block exchanges to add up the parts of the depth."""
        return (self.splits - 1) * self.lanes * self.groups * self.pixels * self.columns

    @property
    def registers(self) -> int:
        """Registers of a thread, about: accumulators, operands in flight, and addresses."""
        return self.pixels * self.columns + UNROLL * (self.pixels + self.columns) + 40

    @property
    def fits_registers(self) -> bool:
        """Whether the registers of a block are there without spilling."""
        return self.registers <= min(255, REGISTERS // self.threads)

    @property
    def resident(self) -> int:
        """Blocks that a processor can hold, as far as threads and registers are concerned."""
        return max(1, min(2 * MAX_THREADS // self.threads, REGISTERS // (self.registers * self.threads)))

    def rounds(self, pixels: int, columns: int) -> int:
        """How often a thread must work to cover a product."""
        return ceil_div(ceil_div(pixels, self.pixels) * ceil_div(columns, self.width), self.groups)

    def times_us(self, pixels: int, columns: int, depth: int, device: DeviceSpec) -> tuple[float, float]:
        """What a product costs a block: the processor's time it takes, and the time it waits for loads."""
        work = max(self.pixels * self.columns, _LOAD_COST * (self.pixels / self.vector + self.columns))
        fma_per_us = device.fp32_flops_per_s / 2 / device.core_count * 1e-6
        rounds = self.rounds(pixels, columns)
        merge = _LOAD_COST * 2 * self.scratch / fma_per_us
        wait = depth / self.splits / UNROLL * _L2_LATENCY_US + (2 * _BARRIER_US if self.splits > 1 else 0)
        return rounds * (self.threads * work * depth / self.splits / fma_per_us + merge), rounds * wait


def lanes_for(columns: int) -> int:
    """Neighbouring threads on neighbouring columns: a warp, fewer for few columns."""
    return min(WARP, 1 << (columns - 1).bit_length())


def vector_for(depth: int, splits: int) -> int:
    """Steps whose left operand is loaded at once."""
    return 4 if depth % (4 * splits) == 0 else 1


def pad_last(array: np.ndarray, width: int) -> np.ndarray:
    """Zeros after the last axis up to ``width``, as contiguous FP32."""
    padding = [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])]
    return np.ascontiguousarray(np.pad(array, padding), dtype=np.float32)


def make_func(
    name: str,
    config: KernelConfig,
    params: Sequence[tuple[str, Sequence[int]]],
    blocks: int,
    threads: int,
    body: Callable[[dict[str, tirx.Buffer], ir.Expr, ir.Expr], None],
) -> tirx.PrimFunc:
    """A scheduled function of one kernel.

    Parameters
    ----------
    name : str
        The name of its block.
    config : KernelConfig
        Recorded as the attribute ``tdc.config``.
    params : sequence of (name, shape)
        FP32 tensors; the last is the output.
    blocks, threads : int
        The launch.
    body : callable
        Emits the kernel from the parameters by name, the block's and the thread's index.
    """
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8, "tdc.config": str(config)})
        buffers = {key: T.arg(key, T.buffer(tuple(shape), "float32")) for key, shape in params}
        with (
            T.thread_binding(blocks, thread="blockIdx.x") as block,
            T.thread_binding(threads, thread="threadIdx.x") as thread,
            T.sblock(name),
        ):
            whole = [buffer[tuple(slice(0, extent) for extent in buffer.shape)] for buffer in buffers.values()]
            T.reads(*whole[:-1])
            T.writes(whole[-1])
            body(buffers, block, thread)
    return builder.get()


def accumulate(acc: tirx.Buffer, tile: ThreadTile, load_a: Load, load_b: Load2) -> None:
    """Add ``tile.vector`` steps of the reduction: ``acc[p, c] += a[p, j] * b[j, c]``.

    Parameters
    ----------
    acc : Buffer
        Registers, ``(tile.pixels, tile.columns)``.
    load_a : callable
        The steps of this thread's pixel ``p`` as a vector (a scalar if there is one step).
    load_b : callable
        The weight of step ``j`` and this thread's column ``c``.
    """
    vector = tile.vector
    a = T.sblock_alloc_buffer((tile.pixels * vector,), "float32", scope="local")
    b = T.sblock_alloc_buffer((vector, tile.columns), "float32", scope="local")
    with T.serial(tile.pixels, unroll=True) as p:
        T.buffer_store(a, load_a(p), [lanes_from(p * vector, vector)])
    with T.serial(vector, unroll=True) as j, T.serial(tile.columns, unroll=True) as c:
        T.buffer_store(b, load_b(j, c), [j, c])
    with (
        T.serial(vector, unroll=True) as j,
        T.serial(tile.pixels, unroll=True) as p,
        T.serial(tile.columns, unroll=True) as c,
    ):
        T.buffer_store(acc, acc[p, c] + a[p * vector + j] * b[j, c], [p, c])


def lanes_from(first: ir.Expr, count: int) -> ir.Expr:
    """An index of ``count`` neighbouring elements."""
    return first if count == 1 else T.ramp(first, 1, count)


def zeros(count: int) -> ir.Expr:
    """A vector of zeros, or a scalar if ``count`` is 1."""
    zero = tirx.const(0, "float32")
    return zero if count == 1 else T.broadcast(zero, count)


@contextlib.contextmanager
def steps(tile: ThreadTile, split: ir.Expr, depth: int) -> Iterator[ir.Expr]:
    """Loop over a thread's part of the depth; yields the first of ``tile.vector`` steps."""
    share = depth // tile.splits
    trips = share // tile.vector
    with T.serial(trips, unroll=max(1, min(UNROLL // tile.vector, trips))) as i:
        yield split * share + i * tile.vector


def product(
    tile: ThreadTile,
    thread: ir.Expr,
    shared: tirx.Buffer | None,
    pixels: int,
    columns: int,
    reduce: Callable[[tirx.Buffer, ir.Expr, Load, Load], None],
    store: Callable[[ir.Expr, ir.Expr, ir.Expr, ir.Expr | None], None],
) -> None:
    """A whole block computes ``pixels x columns`` results, in rounds.

    Control flow is the same for all threads, as barriers inside demand: a thread without work
    repeats the last item's and does not store it.

    Parameters
    ----------
    shared : Buffer, optional
        Shared memory whose first ``tile.scratch`` elements are free; None if nothing is shared.
    reduce : callable
        Emits the reduction, given the registers, the thread's part of the depth, and what maps its
        own numbers to its pixel and column.  Pixels are always below ``pixels``; columns below
        ``columns`` rounded up to ``tile.width``.
    store : callable
        Stores ``(pixel, column, value)`` under a condition (None: always).
    """
    pixel_blocks = ceil_div(pixels, tile.pixels)
    items, rounds = pixel_blocks * ceil_div(columns, tile.width), tile.rounds(pixels, columns)
    owners = tile.lanes * tile.groups
    split = thread // owners
    acc = T.sblock_alloc_buffer((tile.pixels, tile.columns), "float32", scope="local")
    with T.serial(rounds) as i:
        item = T.Bind(i * tile.groups + thread % owners // tile.lanes)
        mine = T.Bind(tirx.min(item, items - 1))
        pixel_0 = T.Bind(mine % pixel_blocks * tile.pixels)
        column_0 = T.Bind(mine // pixel_blocks * tile.width + thread % tile.lanes)

        def pixel(p: ir.Expr) -> ir.Expr:
            return tirx.min(pixel_0 + p, pixels - 1)

        def column(c: ir.Expr) -> ir.Expr:
            return column_0 + c * tile.lanes

        def store_one(p: ir.Expr, c: ir.Expr) -> None:
            owner = split == 0 if tile.splits > 1 else None
            busy = item < items if items % tile.groups else None
            tail = pixel_0 + p < pixels if pixels % tile.pixels else None
            store(pixel(p), column(c), acc[p, c], all_of(owner, busy, tail))

        each_result(tile, lambda p, c: T.buffer_store(acc, zeros(1), [p, c]))
        reduce(acc, split, pixel, column)
        if shared is not None:
            barrier()
            if tile.splits > 1:
                _merge(tile, thread, split, shared, acc)
        each_result(tile, store_one)
        if rounds > 1:
            barrier()


def _merge(tile: ThreadTile, thread: ir.Expr, split: ir.Expr, shared: tirx.Buffer, acc: tirx.Buffer) -> None:
    """Add the parts of the depth, always in the same order, in the threads of the first."""
    owners = tile.lanes * tile.groups

    def at(part: ir.Expr, p: ir.Expr, c: ir.Expr) -> ir.Expr:
        return ((part * tile.pixels + p) * tile.columns + c) * owners + thread % owners

    with T.If(split > 0), T.Then():
        each_result(tile, lambda p, c: T.buffer_store(shared, acc[p, c], [at(split - 1, p, c)]))
    barrier()
    for part in range(tile.splits - 1):
        with T.serial(tile.pixels, unroll=True) as p, T.serial(tile.columns, unroll=True) as c:
            T.buffer_store(acc, acc[p, c] + shared[at(part, p, c)], [p, c])
    barrier()


def each_result(tile: ThreadTile, emit: Callable[[ir.Expr, ir.Expr], None]) -> None:
    """Emit something for each of a thread's accumulators."""
    with T.serial(tile.pixels, unroll=True) as p, T.serial(tile.columns, unroll=True) as c:
        emit(p, c)


def store_if(condition: ir.Expr | None, buffer: tirx.Buffer, value: ir.Expr, indices: Sequence[ir.Expr]) -> None:
    """Store where the condition holds; None always holds."""
    if condition is None:
        T.buffer_store(buffer, value, list(indices))
        return
    with T.If(condition), T.Then():
        T.buffer_store(buffer, value, list(indices))


def all_of(*conditions: ir.Expr | None) -> ir.Expr | None:
    """The conjunction of the conditions that are there."""
    present = [condition for condition in conditions if condition is not None]
    return tirx.all(*present) if present else None


def finish(value: ir.Expr, epilogue: Epilogue, residual: tirx.Buffer | None, at: Sequence[ir.Expr]) -> ir.Expr:
    """Apply the epilogue to one output."""
    if residual is not None:
        value = value + residual[tuple(at)]
    return clip(value, epilogue)
