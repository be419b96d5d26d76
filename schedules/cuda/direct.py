"""Strategy "direct": one convolution, dense, grouped or depthwise, without shared memory.

A thread accumulates a few neighbouring pixels by a few output channels; operands come through the
caches.  Neighbouring threads take neighbouring channels, so that weights and outputs (and for a
depthwise convolution also inputs) are accessed coalesced.
"""

from __future__ import annotations

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda import emit
from tdc_tvm.schedules.cuda.emit import ThreadTile, ceil_div, round_up
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, Estimate, Kernel, KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, Epilogue

STRATEGY = "direct"


def candidates(shape: Conv2dShape, device: DeviceSpec) -> list[KernelConfig]:
    """All configurations worth estimating, none of which is rejected."""
    lanes = min(emit.WARP, 1 << (shape.out_channels - 1).bit_length())
    configs = [
        KernelConfig(STRATEGY, (("threads", threads), ("lanes", lanes), ("pixels", pixels), ("columns", columns)))
        for threads in (64, 128, 256)
        for pixels in (1, 2, 4, 8)
        for columns in (1, 2, 4)
        if columns * lanes < 2 * shape.out_channels
    ]
    return [config for config in configs if not reject_reason(shape, config, device)]


def reject_reason(shape: Conv2dShape, config: KernelConfig, device: DeviceSpec) -> str:
    """Why a configuration cannot run; empty if it can."""
    tile = _tile(config)
    if not 1 <= tile.threads <= emit.MAX_THREADS:
        return f"needs {tile.threads} threads in a block, {device.name} has 1 to {emit.MAX_THREADS}"
    if min(tile.lanes, tile.pixels, tile.columns) < 1 or tile.threads % tile.lanes:
        return f"{tile.threads} threads do not divide into sets of {tile.lanes} lanes"
    return ""


def estimate(shape: Conv2dShape, config: KernelConfig, device: DeviceSpec) -> Estimate:
    """Predict the latency: the slowest of arithmetic, loads and latency, waves counted."""
    tile = _tile(config)
    depth = shape.in_channels // shape.groups * shape.kernel[0] * shape.kernel[1]
    busy_us, wait_us = emit.step_us(tile, device)
    blocks_per_core = ceil_div(_blocks(shape, tile), device.core_count)
    resident = max(1, 2 * emit.MAX_THREADS // tile.threads)
    compute = depth * max(blocks_per_core * busy_us, ceil_div(blocks_per_core, resident) * wait_us)
    traffic = 4 * (
        shape.weight_count
        + shape.out_pixels * shape.out_channels
        + shape.batch * shape.height * shape.width * shape.in_channels
    )
    return Estimate(
        {
            "launch": device.launch_us,
            "compute": compute,
            "memory": traffic / device.dram_bytes_per_s * 1e6,
        }
    )


def make_kernel(
    shape: Conv2dShape,
    epilogue: Epilogue,
    weights: tuple[ConvWeights, ...],
    config: KernelConfig,
    name: str,
) -> Kernel:
    """Build the kernel: parameters ``(x, kernel, [bias], [residual], out)``."""
    (stage,) = weights
    tile = _tile(config)
    width = round_up(shape.out_channels, tile.width)
    # OIHW -> HWIO: a tap's weights of neighbouring output channels are neighbours.
    constants = {"kernel": emit.pad_last(stage.kernel.transpose(2, 3, 1, 0), width)}
    if stage.bias is not None:
        constants["bias"] = emit.pad_last(stage.bias, width)
    out_shape = (shape.batch, shape.out_height, shape.out_width, shape.out_channels)
    params = [("x", (shape.batch, shape.height, shape.width, shape.in_channels))]
    params += [(key, array.shape) for key, array in constants.items()]
    params += [("residual", out_shape)] if epilogue.residual else []
    params += [("out", out_shape)]

    def body(buffers: dict[str, tirx.Buffer], block: ir.Expr, thread: ir.Expr) -> None:
        _emit(shape, epilogue, tile, buffers, block, thread)

    func = emit.make_func(name, config, params, _blocks(shape, tile), tile.threads, body)
    return Kernel(func, tuple(constants.values()))


def _tile(config: KernelConfig) -> ThreadTile:
    return ThreadTile(config["threads"], config["lanes"], config["pixels"], config["columns"])


def _blocks(shape: Conv2dShape, tile: ThreadTile) -> int:
    return ceil_div(shape.out_pixels, tile.groups * tile.pixels) * ceil_div(shape.out_channels, tile.width)


def _emit(
    shape: Conv2dShape,
    epilogue: Epilogue,
    tile: ThreadTile,
    buffers: dict[str, tirx.Buffer],
    block: ir.Expr,
    thread: ir.Expr,
) -> None:
    group_in, group_out = shape.in_channels // shape.groups, shape.out_channels // shape.groups
    column_blocks = ceil_div(shape.out_channels, tile.width)
    pixel_0 = T.Bind((block // column_blocks * tile.groups + thread // tile.lanes) * tile.pixels)
    column_0 = T.Bind(block % column_blocks * tile.width + thread % tile.lanes)
    x, kernel, out = buffers["x"], buffers["kernel"], buffers["out"]

    def column(c: ir.Expr) -> ir.Expr:
        return column_0 + c * tile.lanes

    def position(p: ir.Expr) -> tuple[ir.Expr, ir.Expr, ir.Expr]:
        pixel = tirx.min(pixel_0 + p, shape.out_pixels - 1)
        row = pixel // shape.out_width
        return row // shape.out_height, row % shape.out_height, pixel % shape.out_width

    def load_x(p: ir.Expr, r: ir.Expr, s: ir.Expr, channel: ir.Expr) -> ir.Expr:
        image, out_y, out_x = position(p)
        y = out_y * shape.stride[0] + r * shape.dilation[0] - shape.padding[0]
        z = out_x * shape.stride[1] + s * shape.dilation[1] - shape.padding[1]
        if not any(shape.padding):
            return x[image, y, z, channel]
        inside = tirx.all(y >= 0, y < shape.height, z >= 0, z < shape.width)
        return T.if_then_else(inside, x[image, y, z, channel], tirx.const(0, "float32"))

    acc = T.sblock_alloc_buffer((tile.pixels, tile.columns), "float32", scope="local")

    def start(p: ir.Expr, c: ir.Expr) -> None:
        T.buffer_store(acc, buffers["bias"][column(c)] if "bias" in buffers else tirx.const(0, "float32"), [p, c])

    def step(r: ir.Expr, s: ir.Expr, k: ir.Expr) -> None:
        if shape.groups == 1:
            emit.accumulate(acc, tile, lambda p: load_x(p, r, s, k), lambda c: kernel[r, s, k, column(c)])
            return
        # Columns of one thread can lie in different groups, and then want different inputs.
        with T.serial(tile.columns, unroll=True) as c:
            group = tirx.min(column(c), shape.out_channels - 1) // group_out
            with T.serial(tile.pixels, unroll=True) as p:
                value = load_x(p, r, s, group * group_in + k) * kernel[r, s, k, column(c)]
                T.buffer_store(acc, acc[p, c] + value, [p, c])

    def finish(p: ir.Expr, c: ir.Expr) -> None:
        at = (*position(p), column(c))
        tail = pixel_0 + p < shape.out_pixels if shape.out_pixels % (tile.groups * tile.pixels) else None
        edge = column(c) < shape.out_channels if shape.out_channels % tile.width else None
        inside = emit.all_of(tail, edge)
        emit.store_if(inside, out, emit.finish(acc[p, c], epilogue, buffers.get("residual"), at), at)

    emit.each_result(tile, start)
    with (
        T.serial(shape.kernel[0]) as r,
        T.serial(shape.kernel[1]) as s,
        T.serial(group_in, unroll=min(emit.UNROLL, group_in)) as k,
    ):
        step(r, s, k)
    emit.each_result(tile, finish)
