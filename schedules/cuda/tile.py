"""Strategy "tile": a whole Tucker convolution as one kernel.

A block computes a spatial tile of one image.  The first 1x1 is evaluated over the tile and its halo
into shared memory, the core from there into shared memory, and the last 1x1 from there into the
output.  Neighbouring blocks compute the halo again.  Where the first rank does not fit into shared
memory, it goes through it in chunks, over which the core accumulates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda import emit
from tdc_tvm.schedules.cuda.emit import Load, ThreadTile, ceil_div, round_up, thread_tile
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, Estimate, Kernel, KernelConfig
from tdc_tvm.schedules.shape import Epilogue, TuckerConvShape

STRATEGY = "tile"
_EXTENTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class _Plan:
    """Everything that follows from a shape and a configuration."""

    shape: TuckerConvShape
    config: KernelConfig
    device: DeviceSpec

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of output that a block computes."""
        return self.config["tile_h"], self.config["tile_w"]

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of an image, down and across."""
        dense = self.shape.dense
        return ceil_div(dense.out_height, self.tile[0]), ceil_div(dense.out_width, self.tile[1])

    @property
    def blocks(self) -> int:
        """Blocks of the launch."""
        return self.shape.dense.batch * self.tiles[0] * self.tiles[1]

    @property
    def halo(self) -> tuple[int, int]:
        """Rows and columns of input that a tile depends on."""
        dense = self.shape.dense
        rows, columns = (
            (tile - 1) * stride + (kernel - 1) * dilation + 1
            for tile, stride, kernel, dilation in zip(
                self.tile, dense.stride, dense.kernel, dense.dilation, strict=True
            )
        )
        return rows, columns

    @property
    def chunk(self) -> int:
        """Channels of the first rank that are in shared memory together."""
        return self.config["chunk"]

    @property
    def chunks(self) -> int:
        """How many there are."""
        return ceil_div(self.shape.rank_in, self.chunk)

    @property
    def in_pixels(self) -> int:
        """Positions of the halo."""
        return self.halo[0] * self.halo[1]

    @property
    def out_pixels(self) -> int:
        """Positions of the tile."""
        return self.tile[0] * self.tile[1]

    @property
    def taps(self) -> int:
        """Positions of the core's window."""
        return self.shape.dense.kernel[0] * self.shape.dense.kernel[1]

    @property
    def reduce(self) -> ThreadTile:
        """The first 1x1's division among threads."""
        depth = self.shape.dense.in_channels
        return thread_tile(self.in_pixels, self.chunk, depth, depth, self.config["threads"], self.device)

    @property
    def core(self) -> ThreadTile:
        """The core's."""
        depth = self.taps * self.chunk
        return thread_tile(self.out_pixels, self.shape.rank_out, depth, self.chunk, self.config["threads"], self.device)

    @property
    def expand(self) -> ThreadTile:
        """The last 1x1's."""
        columns, depth = self.shape.dense.out_channels, self.shape.rank_out
        return thread_tile(self.out_pixels, columns, depth, depth, self.config["threads"], self.device)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of the three products, rounded up to whole thread tiles and vectors."""
        return (
            round_up(self.chunk, max(4, self.reduce.width)),
            round_up(self.shape.rank_out, max(4, self.core.width)),
            round_up(self.shape.dense.out_channels, self.expand.width),
        )

    @property
    def scratch(self) -> int:
        """Numbers exchanged where threads split a depth."""
        return round_up(max(tile.scratch for tile in (self.reduce, self.core, self.expand)), 4)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a block."""
        return 4 * (self.scratch + self.in_pixels * self.widths[0] + self.out_pixels * self.widths[1])


def candidates(shape: TuckerConvShape, device: DeviceSpec) -> list[KernelConfig]:
    """All configurations worth estimating, none of which is rejected; empty if none can run."""
    configs = []
    for tile_h in (extent for extent in _EXTENTS if extent < 2 * shape.dense.out_height):
        for tile_w in (extent for extent in _EXTENTS if extent < 2 * shape.dense.out_width):
            for threads in (128, 256, 512):
                chunk = shape.rank_in
                while chunk:
                    values = (("tile_h", tile_h), ("tile_w", tile_w), ("threads", threads), ("chunk", chunk))
                    config = KernelConfig(STRATEGY, values)
                    if not reject_reason(shape, config, device):
                        configs.append(config)
                        break
                    chunk //= 2
    return configs


def reject_reason(shape: TuckerConvShape, config: KernelConfig, device: DeviceSpec) -> str:
    """Why a configuration cannot run; empty if it can."""
    threads, chunk = config["threads"], config["chunk"]
    if not emit.WARP <= threads <= emit.MAX_THREADS or threads % emit.WARP:
        return f"needs {threads} threads in a block, {device.name} has warps of {emit.WARP} up to {emit.MAX_THREADS}"
    if not 1 <= chunk <= shape.rank_in:
        return f"needs chunks of {chunk} channels, the first rank is {shape.rank_in}"
    plan = _Plan(shape, config, device)
    if min(plan.tile) < 1:
        return f"needs tiles of {plan.tile[0]}x{plan.tile[1]} pixels, the least is 1x1"
    if plan.smem_bytes > device.smem_per_block_optin_bytes:
        has = device.smem_per_block_optin_bytes / 1024
        return f"needs {plan.smem_bytes / 1024:.0f} KB of shared memory, {device.name} has {has:.0f} KB"
    return ""


def estimate(shape: TuckerConvShape, config: KernelConfig, device: DeviceSpec) -> Estimate:
    """Predict the latency: per stage the slower of throughput and latency, halo and waves counted."""
    plan = _Plan(shape, config, device)
    per_core = ceil_div(plan.blocks, device.core_count)
    products = {
        "reduce": (plan.reduce, plan.in_pixels, plan.chunk, shape.dense.in_channels, plan.chunks),
        "core": (plan.core, plan.out_pixels, shape.rank_out, plan.taps * plan.chunk, plan.chunks),
        "expand": (plan.expand, plan.out_pixels, shape.dense.out_channels, shape.rank_out, 1),
    }
    parts = {"launch": device.launch_us}
    for name, (tile, pixels, columns, depth, repeats) in products.items():
        resident = max(1, min(tile.resident, device.smem_per_block_optin_bytes // plan.smem_bytes))
        busy_us, wait_us = tile.times_us(pixels, columns, depth, device)
        parts[name] = repeats * max(per_core * busy_us, ceil_div(per_core, resident) * wait_us)
    dense = shape.dense
    outer = dense.batch * dense.height * dense.width * dense.in_channels + dense.out_pixels * dense.out_channels
    parts["memory"] = 4 * (shape.weight_count + outer) / device.dram_bytes_per_s * 1e6
    return Estimate(parts)


def make_kernel(
    shape: TuckerConvShape,
    epilogue: Epilogue,
    weights: tuple[ConvWeights, ...],
    config: KernelConfig,
    device: DeviceSpec,
    name: str,
) -> Kernel:
    """Build the kernel: parameters ``(x, reduce, core, expand, [biases], [residual], out)``."""
    plan, dense = _Plan(shape, config, device), shape.dense
    constants = _pack(plan, weights)
    out_shape = (dense.batch, dense.out_height, dense.out_width, dense.out_channels)
    params = [("x", (dense.batch, dense.height, dense.width, dense.in_channels))]
    params += [(key, array.shape) for key, array in constants.items()]
    params += [("residual", out_shape)] if epilogue.residual else []
    params += [("out", out_shape)]

    def body(buffers: dict[str, tirx.Buffer], block: ir.Expr, thread: ir.Expr) -> None:
        _emit(plan, epilogue, buffers, block, thread)

    func = emit.make_func(name, config, params, plan.blocks, config["threads"], body)
    return Kernel(func, tuple(constants.values()))


def _pack(plan: _Plan, weights: tuple[ConvWeights, ...]) -> dict[str, np.ndarray]:
    """Order the weights as the kernel reads them, neighbouring output channels beside each other.

    ``reduce`` is (chunk, in, rank_in), ``core`` (chunk, row, column, rank_in, rank_out) and
    ``expand`` (rank_out, out); a chunk that is not full is filled up with zeros.
    """
    reduce, core, expand = weights
    widths, full = plan.widths, plan.chunks * plan.chunk

    def chunked(array: np.ndarray) -> np.ndarray:
        """Split the last axis, the first rank, into chunks that become the first axis."""
        split = emit.pad_last(array, full).reshape(*array.shape[:-1], plan.chunks, plan.chunk)
        return np.moveaxis(split, -2, 0)

    constants = {
        "reduce": emit.pad_last(chunked(reduce.kernel[:, :, 0, 0].T), widths[0]),
        "core": emit.pad_last(np.moveaxis(chunked(core.kernel.transpose(2, 3, 0, 1)), -1, -2), widths[1]),
        "expand": emit.pad_last(expand.kernel[:, :, 0, 0].T, widths[2]),
    }
    if reduce.bias is not None:
        constants["reduce_bias"] = emit.pad_last(chunked(reduce.bias), widths[0])
    if core.bias is not None:
        constants["core_bias"] = emit.pad_last(core.bias, widths[1])
    if expand.bias is not None:
        constants["expand_bias"] = emit.pad_last(expand.bias, widths[2])
    return constants


def _emit(plan: _Plan, epilogue: Epilogue, buffers: dict[str, tirx.Buffer], block: ir.Expr, thread: ir.Expr) -> None:
    dense = plan.shape.dense
    tile_w, halo_w = plan.tile[1], plan.halo[1]
    image = T.Bind(block // (plan.tiles[0] * plan.tiles[1]))
    out_y0 = T.Bind(block // plan.tiles[1] % plan.tiles[0] * plan.tile[0])
    out_x0 = T.Bind(block % plan.tiles[1] * tile_w)
    # One buffer for both results: TVM 0.27 overlaps shared buffers by liveness, and fails on some pairs.
    shared = T.sblock_alloc_buffer((plan.smem_bytes // 4,), "float32", scope="shared.dyn")

    def reduced(pixel: ir.Expr, column: ir.Expr) -> ir.Expr:
        return plan.scratch + pixel * plan.widths[0] + column

    def cored(pixel: ir.Expr, column: ir.Expr) -> ir.Expr:
        return plan.scratch + plan.in_pixels * plan.widths[0] + pixel * plan.widths[1] + column

    def bias(name: str, *at: ir.Expr) -> ir.Expr:
        return buffers[name][at] if name in buffers else emit.zeros(1)

    def in_position(pixel: ir.Expr) -> tuple[ir.Expr, ir.Expr]:
        y = out_y0 * dense.stride[0] - dense.padding[0] + pixel // halo_w
        x = out_x0 * dense.stride[1] - dense.padding[1] + pixel % halo_w
        return y, x

    def reduce_chunk(chunk: ir.Expr) -> None:
        def multiply(acc: tirx.Buffer, split: ir.Expr, pixel: Load, column: Load) -> None:
            def load_x(p: ir.Expr) -> ir.Expr:
                # Pixels outside of the image take any value within it; the store makes them zero.
                y, x = in_position(pixel(p))
                y = tirx.max(tirx.min(y, dense.height - 1), 0)
                x = tirx.max(tirx.min(x, dense.width - 1), 0)
                return buffers["x"][image, y, x, emit.lanes_from(k, plan.reduce.vector)]

            with emit.steps(plan.reduce, split, dense.in_channels) as k:
                emit.accumulate(acc, plan.reduce, load_x, lambda j, c: buffers["reduce"][chunk, k + j, column(c)])

        def store(pixel: ir.Expr, column: ir.Expr, value: ir.Expr, condition: ir.Expr | None) -> None:
            # The core's padding is zero: it has neither input nor the first stage's bias.
            y, x = in_position(pixel)
            inside = tirx.all(y >= 0, y < dense.height, x >= 0, x < dense.width)
            value = value + bias("reduce_bias", chunk, column)
            emit.store_if(condition, shared, tirx.Select(inside, value, emit.zeros(1)), [reduced(pixel, column)])

        emit.product(plan.reduce, thread, shared, plan.in_pixels, plan.chunk, multiply, store)

    def core_chunk(chunk: ir.Expr) -> None:
        def multiply(acc: tirx.Buffer, split: ir.Expr, pixel: Load, column: Load) -> None:
            def load_reduced(p: ir.Expr) -> ir.Expr:
                y = pixel(p) // tile_w * dense.stride[0] + r * dense.dilation[0]
                x = pixel(p) % tile_w * dense.stride[1] + s * dense.dilation[1]
                return shared[emit.lanes_from(reduced(y * halo_w + x, k), plan.core.vector)]

            with (
                T.serial(dense.kernel[0]) as r,
                T.serial(dense.kernel[1]) as s,
                emit.steps(plan.core, split, plan.chunk) as k,
            ):
                emit.accumulate(
                    acc, plan.core, load_reduced, lambda j, c: buffers["core"][chunk, r, s, k + j, column(c)]
                )

        def store(pixel: ir.Expr, column: ir.Expr, value: ir.Expr, condition: ir.Expr | None) -> None:
            before = bias("core_bias", column)
            if plan.chunks > 1:
                before = T.if_then_else(chunk == 0, before, shared[cored(pixel, column)])
            emit.store_if(condition, shared, value + before, [cored(pixel, column)])

        emit.product(plan.core, thread, shared, plan.out_pixels, plan.shape.rank_out, multiply, store)

    def expand() -> None:
        def multiply(acc: tirx.Buffer, split: ir.Expr, pixel: Load, column: Load) -> None:
            def load_cored(p: ir.Expr) -> ir.Expr:
                return shared[emit.lanes_from(cored(pixel(p), k), plan.expand.vector)]

            with emit.steps(plan.expand, split, plan.shape.rank_out) as k:
                emit.accumulate(acc, plan.expand, load_cored, lambda j, c: buffers["expand"][k + j, column(c)])

        def store(pixel: ir.Expr, column: ir.Expr, value: ir.Expr, condition: ir.Expr | None) -> None:
            at = (image, out_y0 + pixel // tile_w, out_x0 + pixel % tile_w, column)
            inside = emit.all_of(
                condition,
                at[1] < dense.out_height if dense.out_height % plan.tile[0] else None,
                at[2] < dense.out_width if dense.out_width % tile_w else None,
                column < dense.out_channels if dense.out_channels % plan.expand.width else None,
            )
            value = value + bias("expand_bias", column)
            emit.store_if(inside, buffers["out"], emit.finish(value, epilogue, buffers.get("residual"), at), at)

        emit.product(plan.expand, thread, shared, plan.out_pixels, dense.out_channels, multiply, store)

    with T.serial(plan.chunks) as chunk:
        reduce_chunk(chunk)
        emit.barrier()
        core_chunk(chunk)
        emit.barrier()
    expand()
