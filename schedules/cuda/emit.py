"""Pieces that CUDA schedules are composed of: plain functions that emit TensorIR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import KernelConfig
from tdc_tvm.schedules.shape import Epilogue

WARP = 32
MAX_THREADS = 1024
# Steps of a reduction whose loads are in flight together.
UNROLL = 8

# An L1 or shared-memory load instruction takes as long as this many multiply-adds.
_LOAD_COST = 4
_L2_LATENCY_US = 0.2

# A value from a pixel's or a column's number.
Load = Callable[[ir.Expr], ir.Expr]


@dataclass(frozen=True)
class ThreadTile:
    """How the threads of a block share a product of ``pixels x depth`` by ``depth x columns`` matrices.

    ``lanes`` neighbouring threads take neighbouring columns, so that weights are read coalesced.
    A thread accumulates ``pixels`` neighbouring pixels by ``columns`` columns, ``lanes`` apart, in
    registers.
    """

    threads: int
    lanes: int
    pixels: int
    columns: int

    @property
    def groups(self) -> int:
        """Sets of lanes in a block."""
        return self.threads // self.lanes

    @property
    def width(self) -> int:
        """Columns that a set of lanes covers."""
        return self.lanes * self.columns

    def rounds(self, pixels: int, columns: int) -> int:
        """How often a thread must work to cover a product."""
        return ceil_div(ceil_div(pixels, self.pixels) * ceil_div(columns, self.width), self.groups)


def thread_tile(pixels: int, columns: int, threads: int) -> ThreadTile:
    """Divide a product so that all threads work, and each holds as much as that allows."""
    lanes = min(WARP, 1 << (columns - 1).bit_length())
    per_thread = 2 if columns > WARP else 1
    width_count = ceil_div(columns, lanes * per_thread)
    wanted = ceil_div(pixels * width_count * lanes, threads)
    return ThreadTile(threads, lanes, min(8, 1 << (wanted - 1).bit_length()), per_thread)


def step_us(tile: ThreadTile, device: DeviceSpec) -> tuple[float, float]:
    """Time of one step of a block's reduction: the throughput it takes, and how long it waits for weights."""
    work = max(tile.pixels * tile.columns, _LOAD_COST * (tile.pixels + tile.columns))
    fma_per_us = device.fp32_flops_per_s / 2 / device.core_count * 1e-6
    return tile.threads * work / fma_per_us, _L2_LATENCY_US / UNROLL


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The least multiple of ``b`` that is not below ``a``."""
    return ceil_div(a, b) * b


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


def accumulate(acc: tirx.Buffer, tile: ThreadTile, load_a: Load, load_b: Load) -> None:
    """Add one step of the reduction: ``acc[p, c] += a[p] * b[c]``.

    Parameters
    ----------
    acc : Buffer
        Registers, ``(tile.pixels, tile.columns)``.
    load_a, load_b : callable
        The operands of this thread's pixel ``p`` and column ``c``.
    """
    a = T.sblock_alloc_buffer((tile.pixels,), "float32", scope="local")
    b = T.sblock_alloc_buffer((tile.columns,), "float32", scope="local")
    with T.serial(tile.pixels, unroll=True) as p:
        T.buffer_store(a, load_a(p), [p])
    with T.serial(tile.columns, unroll=True) as c:
        T.buffer_store(b, load_b(c), [c])
    with T.serial(tile.pixels, unroll=True) as p, T.serial(tile.columns, unroll=True) as c:
        T.buffer_store(acc, acc[p, c] + a[p] * b[c], [p, c])


def product(
    tile: ThreadTile,
    thread: ir.Expr,
    pixels: int,
    columns: int,
    start: Callable[[ir.Expr, ir.Expr], ir.Expr],
    reduce: Callable[[tirx.Buffer, Load, Load], None],
    store: Callable[[ir.Expr, ir.Expr, ir.Expr, ir.Expr | None], None],
) -> None:
    """A whole block computes ``pixels x columns`` results, in rounds.

    Control flow is the same for all threads, as barriers inside demand: a thread without work
    repeats the last item's and does not store it.

    Parameters
    ----------
    start : callable
        The value that result ``(pixel, column)`` starts from.
    reduce : callable
        Emits the reduction, given the registers and what maps a thread's own numbers to its pixel
        and column.  Pixels are always below ``pixels``; columns below ``columns`` rounded up to
        ``tile.width``.
    store : callable
        Stores ``(pixel, column, value)`` under a condition (None: always).
    """
    pixel_blocks = ceil_div(pixels, tile.pixels)
    items, rounds = pixel_blocks * ceil_div(columns, tile.width), tile.rounds(pixels, columns)
    acc = T.sblock_alloc_buffer((tile.pixels, tile.columns), "float32", scope="local")
    with T.serial(rounds) as i:
        item = T.Bind(i * tile.groups + thread // tile.lanes)
        mine = T.Bind(tirx.min(item, items - 1))
        pixel_0 = T.Bind(mine % pixel_blocks * tile.pixels)
        column_0 = T.Bind(mine // pixel_blocks * tile.width + thread % tile.lanes)

        def pixel(p: ir.Expr) -> ir.Expr:
            return tirx.min(pixel_0 + p, pixels - 1)

        def column(c: ir.Expr) -> ir.Expr:
            return column_0 + c * tile.lanes

        def store_one(p: ir.Expr, c: ir.Expr) -> None:
            busy = item < items if items % tile.groups else None
            tail = pixel_0 + p < pixels if pixels % tile.pixels else None
            store(pixel(p), column(c), acc[p, c], all_of(busy, tail))

        each_result(tile, lambda p, c: T.buffer_store(acc, start(pixel(p), column(c)), [p, c]))
        reduce(acc, pixel, column)
        each_result(tile, store_one)


def each_result(tile: ThreadTile, emit: Callable[[ir.Expr, ir.Expr], None]) -> None:
    """Emit something for each of a thread's accumulators.

    The loops are unrolled here and not by the CUDA compiler, because TVM may put a barrier before
    them: between an unroll pragma and its loop, which would then keep its registers in memory.
    """
    with T.unroll(tile.pixels) as p, T.unroll(tile.columns) as c:
        emit(p, c)


def barrier() -> None:
    """Wait for all threads of the block."""
    T.evaluate(ir.Call("tirx.tvm_storage_sync", [ir.StringImm("shared.dyn")], ret_ty="void"))


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
    if epilogue.clip_min is not None:
        value = tirx.max(value, tirx.const(epilogue.clip_min, "float32"))
    if epilogue.clip_max is not None:
        value = tirx.min(value, tirx.const(epilogue.clip_max, "float32"))
    return value
