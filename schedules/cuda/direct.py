"""Strategy "direct": one grouped or depthwise convolution, FP32.

A thread accumulates a few neighbouring pixels by a few output channels; operands come through the
caches.  Neighbouring threads take neighbouring channels, so that weights and outputs (and for a
depthwise convolution also inputs) are accessed coalesced.  Where there are too few outputs to keep
the GPU busy, several threads share the reduction of one.
"""

from __future__ import annotations

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda import emit
from tdc_tvm.schedules.cuda.arith import ceil_div, round_up
from tdc_tvm.schedules.cuda.emit import Load, ThreadTile
from tdc_tvm.schedules.cuda.plan import MAX_THREADS
from tdc_tvm.schedules.cuda.work import REGISTERS, WARP
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, Estimate, Kernel, KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, Epilogue

STRATEGY = "direct"
_ALLOWED = {
    "threads": range(WARP, MAX_THREADS + 1, WARP),
    "lanes": (1, 2, 4, 8, 16, 32),
    "pixels": range(1, 9),
    "columns": range(1, 9),
    "splits": range(1, 9),
}


def candidates(shape: Conv2dShape, device: DeviceSpec) -> list[KernelConfig]:
    """All configurations worth estimating, none of which is rejected."""
    lanes = emit.lanes_for(shape.out_channels)
    configs = [
        KernelConfig(
            STRATEGY,
            (("threads", threads), ("lanes", lanes), ("pixels", pixels), ("columns", columns), ("splits", splits)),
        )
        for threads in (64, 128, 256)
        for pixels in (1, 2, 4, 8)
        for columns in (1, 2, 4)
        for splits in (1, 2, 4, 8)
        if columns == 1 or columns * lanes < 2 * shape.out_channels
    ]
    return [config for config in configs if not reject_reason(shape, config, device)]


def reject_reason(shape: Conv2dShape, config: KernelConfig, device: DeviceSpec) -> str:
    """Why a configuration cannot run; empty if it can."""
    reason = config.reject_reason(_ALLOWED)
    if reason:
        return reason
    threads, lanes, splits = config["threads"], config["lanes"], config["splits"]
    if threads % (lanes * splits):
        return f"{threads} threads do not divide into {splits} splits of sets of {lanes} lanes"
    if splits > 1 and (shape.groups > 1 or shape.in_channels % splits):
        return f"{splits} splits do not divide {shape.in_channels} input channels in {shape.groups} groups"
    tile = _tile(shape, config)
    if not tile.fits_registers:
        return f"needs {tile.registers * threads} registers in a block, {device.name} has {REGISTERS}"
    smem_bytes = 4 * tile.scratch
    if smem_bytes > device.smem_per_block_optin_bytes:
        has = device.smem_per_block_optin_bytes / 1024
        return f"needs {smem_bytes / 1024:.0f} KB of shared memory, {device.name} has {has:.0f} KB"
    return ""


def estimate(shape: Conv2dShape, config: KernelConfig, device: DeviceSpec) -> Estimate:
    """Predict the latency: the slowest of arithmetic, loads and latency, waves counted."""
    tile = _tile(shape, config)
    depth = shape.in_channels // shape.groups * shape.kernel[0] * shape.kernel[1]
    busy_us, wait_us = tile.times_us(tile.groups * tile.pixels, tile.width, depth, device)
    blocks_per_core = ceil_div(_blocks(shape, tile), device.core_count)
    compute = max(blocks_per_core * busy_us, ceil_div(blocks_per_core, tile.resident) * wait_us)
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
    tile = _tile(shape, config)
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


def _tile(shape: Conv2dShape, config: KernelConfig) -> ThreadTile:
    splits = config["splits"]
    vector = emit.vector_for(shape.in_channels, splits) if shape.groups == 1 else 1
    return ThreadTile(config["threads"], config["lanes"], config["pixels"], config["columns"], splits, vector)


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
    pixel_0 = T.Bind(block // column_blocks * (tile.groups * tile.pixels))
    column_0 = T.Bind(block % column_blocks * tile.width)
    x, kernel, out = buffers["x"], buffers["kernel"], buffers["out"]
    shared = T.sblock_alloc_buffer((tile.scratch,), "float32", scope="shared.dyn") if tile.scratch else None

    def position(pixel: ir.Expr) -> tuple[ir.Expr, ir.Expr, ir.Expr]:
        bounded = tirx.min(pixel_0 + pixel, shape.out_pixels - 1)
        row = bounded // shape.out_width
        return row // shape.out_height, row % shape.out_height, bounded % shape.out_width

    def load_x(pixel: ir.Expr, r: ir.Expr, s: ir.Expr, channel: ir.Expr) -> ir.Expr:
        image, out_y, out_x = position(pixel)
        y = out_y * shape.stride[0] + r * shape.dilation[0] - shape.padding[0]
        z = out_x * shape.stride[1] + s * shape.dilation[1] - shape.padding[1]
        value = x[image, y, z, emit.lanes_from(channel, tile.vector)]
        if not any(shape.padding):
            return value
        inside = tirx.all(y >= 0, y < shape.height, z >= 0, z < shape.width)
        return T.if_then_else(inside, value, emit.zeros(tile.vector))

    def dense(acc: tirx.Buffer, split: ir.Expr, pixel: Load, column: Load) -> None:
        with (
            T.serial(shape.kernel[0]) as r,
            T.serial(shape.kernel[1]) as s,
            emit.steps(tile, split, shape.in_channels) as k,
        ):
            emit.accumulate(
                acc,
                tile,
                lambda p: load_x(pixel(p), r, s, k),
                lambda j, c: kernel[r, s, k + j, column_0 + column(c)],
            )

    def grouped(acc: tirx.Buffer, split: ir.Expr, pixel: Load, column: Load) -> None:
        # Columns of one thread can lie in different groups, and then want different inputs.
        with (
            T.serial(shape.kernel[0]) as r,
            T.serial(shape.kernel[1]) as s,
            emit.steps(tile, split, group_in) as k,
            T.serial(tile.columns, unroll=True) as c,
            T.serial(tile.pixels, unroll=True) as p,
        ):
            group = tirx.min(column_0 + column(c), shape.out_channels - 1) // group_out
            value = load_x(pixel(p), r, s, group * group_in + k) * kernel[r, s, k, column_0 + column(c)]
            T.buffer_store(acc, acc[p, c] + value, [p, c])

    def store(pixel: ir.Expr, column: ir.Expr, value: ir.Expr, condition: ir.Expr | None) -> None:
        at = (*position(pixel), column_0 + column)
        tail = pixel_0 + pixel < shape.out_pixels if shape.out_pixels % (tile.groups * tile.pixels) else None
        edge = at[3] < shape.out_channels if shape.out_channels % tile.width else None
        inside = emit.all_of(condition, tail, edge)
        value = value + buffers["bias"][at[3]] if "bias" in buffers else value
        # TVM can compute the value before it asks whether to store it: the residual has no channels behind the last.
        channel = at[3] if edge is None else tirx.min(at[3], shape.out_channels - 1)
        value = emit.finish(value, epilogue, buffers.get("residual"), (*at[:3], channel))
        emit.store_if(inside, out, value, at)

    multiply = dense if shape.groups == 1 else grouped
    emit.product(tile, thread, shared, tile.groups * tile.pixels, tile.width, multiply, store)
