"""One convolution on the CPU: strategies "direct", "grouped" and "depthwise"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cpu import emit, plan
from tdc_tvm.schedules.cpu.emit import Blocks, Sink, Source, Tile
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, Estimate, KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, Epilogue

_PARAMETERS = ("strip", "chunks", "lanes", "vectors")
PARAMETERS = {"direct": _PARAMETERS, "grouped": _PARAMETERS, "depthwise": ("strip", "lanes", "cols")}


@dataclass(frozen=True)
class Operands:
    """Flat buffers of one stage: input, packed kernel, bias, output, and the residual if there is one."""

    x: Any
    weights: Any
    bias: Any
    out: Any
    residual: Any
    epilogue: Epilogue

    def sink(self, base: Any) -> Sink:
        """The output from ``base`` on."""
        return Sink(self.out, base, self.epilogue, self.residual)


def strategy_of(shape: Conv2dShape) -> str:
    """The only strategy that fits a convolution."""
    if plan.is_depthwise(shape):
        return "depthwise"
    return "direct" if shape.groups == 1 else "grouped"


def candidates(shape: Conv2dShape, device: DeviceSpec, lanes: int | None = None) -> list[KernelConfig]:
    """Strip heights, chunks of channels and register tiles; ``lanes`` fixes the vector width."""
    view = plan.as_pixels(shape)
    channels = view.out_channels // view.groups
    if plan.is_depthwise(view):
        lanes = plan.lanes_for(view.out_channels, device)
        lanes = lanes if lanes <= view.out_channels else lanes // 2
        cols = min(view.out_width, plan.register_count(device) // 2 - 2)
        heights = plan.strip_heights(view.out_height, 1, device)
        return [plan.make_config("depthwise", strip=rows, lanes=lanes, cols=cols) for rows in heights]
    lanes = lanes or plan.lanes_for(channels, device)
    found = []
    for vectors in plan.vector_counts(channels, lanes):
        tile = plan.make_tile(view.out_height, view.out_width, vectors, lanes, device)
        units = view.groups if view.groups > 1 else Blocks(channels, tile).count
        for rows in plan.strip_heights(view.out_height, tile.rows, device):
            for chunks in sorted({min(units, n) for n in (1, device.core_count, 2 * device.core_count)}):
                parameters = {"strip": rows, "chunks": chunks, "lanes": lanes, "vectors": vectors}
                found.append(plan.make_config(strategy_of(shape), **parameters))
    return found


def estimate(shape: Conv2dShape, config: KernelConfig, device: DeviceSpec) -> Estimate:
    """Predicted latency; see `tdc_tvm.schedules.cpu.conv.estimate`."""
    view = plan.as_pixels(shape)
    rows = min(config["strip"], view.out_height)
    strips = -(-view.out_height // rows)
    chunks, share = 1, 1.0
    if config.strategy == "depthwise":
        vectors = -(-view.out_channels // config["lanes"])
        # Loads outnumber multiply-adds: hence a half more.
        slots = 1.5 * view.out_width * rows * vectors * view.kernel[0] * view.kernel[1]
    else:
        blocks = blocks_of(view, config, device)
        units = view.groups if view.groups > 1 else blocks.count
        chunks = -(-units // -(-units // config["chunks"]))
        share = -(-units // chunks) / units
        reduction = view.weight_count // view.out_channels
        slots = view.groups * share * plan.dense_slots(reduction, blocks, rows, view.out_width)
    tasks = view.batch * strips * chunks
    turns = -(-tasks // device.core_count)
    weight_bytes = 4 * view.weight_count
    copies = plan.needs_copy(view)
    scratch = 4 * plan.pad_elements(view, rows) if copies else 4 * view.in_channels * view.width * rows
    traffic: float = 4 * (
        view.batch * view.height * view.width * view.in_channels + view.out_pixels * view.out_channels
    )
    traffic += turns * share * weight_bytes if share * weight_bytes > device.l2_bytes / 2 else weight_bytes
    traffic += turns * scratch if scratch > device.l2_bytes / 2 else 0
    return plan.price(device, turns * slots, turns * scratch if copies else 0, traffic, tasks)


def reject_reason(shape: Conv2dShape, config: KernelConfig, device: DeviceSpec) -> str:
    """Why a configuration, whose parameters are in range, cannot run; empty if it can."""
    if config.strategy == "depthwise":
        return ""
    rows = blocks_of(plan.as_pixels(shape), config, device).tile.rows
    strip = config["strip"]
    return f"has strips of {strip} rows, which are not whole tiles of {rows}" if strip % rows else ""


def blocks_of(view: Conv2dShape, config: KernelConfig, device: DeviceSpec) -> Blocks:
    """The output channels of one group, cut up for a configuration's register tile."""
    tile = plan.make_tile(view.out_height, view.out_width, config["vectors"], config["lanes"], device)
    return Blocks(view.out_channels // view.groups, tile)


def pack(weights: ConvWeights, blocks: Blocks, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay weights out in the order in which the register tiles read them.

    Parameters
    ----------
    weights : ConvWeights
        OIHW.
    blocks : Blocks
        How the output channels of one group are cut up.
    groups : int
        Channel groups.

    Returns
    -------
    tuple[numpy.ndarray, numpy.ndarray]
        Kernel and bias, flat.  Per group and block the kernel is ``[R][S][C][width]``; the last block is padded with
        zeros to whole vectors, and so is the bias.
    """
    kernel = np.asarray(weights.kernel, "float32")
    out_channels, channels, height, width = kernel.shape
    per_group, reduction = out_channels // groups, channels * height * width
    rows = kernel.reshape(groups, per_group, channels, height, width).transpose(0, 3, 4, 2, 1)
    padded = np.zeros((groups, reduction, blocks.padded), "float32")
    padded[:, :, :per_group] = rows.reshape(groups, reduction, per_group)
    cut = blocks.full * blocks.width
    full = padded[:, :, :cut].reshape(groups, reduction, blocks.full, blocks.width).transpose(0, 2, 1, 3)
    packed = np.concatenate([full.reshape(groups, -1), padded[:, :, cut:].reshape(groups, -1)], axis=1)
    bias = np.zeros((groups, blocks.padded), "float32")
    if weights.bias is not None:
        bias[:, :per_group] = weights.bias.reshape(groups, per_group)
    return packed.ravel(), bias.ravel()


def pack_depthwise(weights: ConvWeights) -> tuple[np.ndarray, np.ndarray]:
    """Kernel ``[R][S][C]`` and bias, flat."""
    kernel = np.asarray(weights.kernel, "float32")[:, 0].transpose(1, 2, 0)
    bias = np.zeros(kernel.shape[2]) if weights.bias is None else weights.bias
    return np.ascontiguousarray(kernel).ravel(), np.ascontiguousarray(bias, "float32")


def body(shape: Conv2dShape, config: KernelConfig, device: DeviceSpec, operands: Operands) -> None:
    """Write the loops of one convolution."""
    view = plan.as_pixels(shape)
    if config.strategy == "depthwise":
        _depthwise_body(view, config, device, operands)
    else:
        _dense_body(view, config, device, operands)


@contextmanager
def tasks(extents: tuple[int, ...]) -> Iterator[list[Any]]:
    """The parallel loop over several indices, the last the fastest; nothing is launched for a single task."""
    count = int(np.prod(extents))
    if count == 1:
        yield [0] * len(extents)
        return
    with T.parallel(0, count) as task:
        indices = []
        for extent in reversed(extents):
            indices.append(0 if extent == 1 else T.bind(tirx.floormod(task, extent)))
            task = task if extent == 1 else tirx.floordiv(task, extent)
        yield indices[::-1]


def strip_rows(height: int, strip: int, index: Any) -> Any:
    """Rows of one strip: a number where all strips are alike."""
    if height % strip == 0 or strip >= height:
        return min(strip, height)
    return T.bind(tirx.min(strip, height - index * strip))


@contextmanager
def _source(
    shape: Conv2dShape, strip: int, image: Any, first_row: Any, rows: Any, x: Any, lanes: int
) -> Iterator[Source]:
    """Where a strip's convolution reads: the input itself, or a padded copy."""
    pixel, row = shape.in_channels, shape.width * shape.in_channels
    if not plan.needs_copy(shape):
        yield Source(x, T.bind((image * shape.height + first_row * shape.stride[0]) * row))
        return
    top, left = shape.padding[:2]
    pitch = plan.pad_width(shape)
    lead = min(left, pitch)
    data = max(0, min(shape.width, pitch - lead))
    needed = (rows - 1) * shape.stride[0] + shape.dilation[0] * (shape.kernel[0] - 1) + 1
    with emit.workspace(plan.pad_elements(shape, strip)) as padded:
        with emit.loop(needed) as i:
            source = T.bind(first_row * shape.stride[0] + i - top)
            target = T.bind(i * (pitch * pixel))
            with T.If(tirx.all(source >= 0, source < shape.height)):
                with T.Then():
                    emit.copy(padded, target, None, 0, lead * pixel, lanes)
                    begin = (image * shape.height + source) * row
                    emit.copy(padded, target + lead * pixel, x, begin, data * pixel, lanes)
                    emit.copy(padded, target + (lead + data) * pixel, None, 0, (pitch - lead - data) * pixel, lanes)
                with T.Else():
                    emit.copy(padded, target, None, 0, pitch * pixel, lanes)
        yield Source(padded)


def _dense_body(view: Conv2dShape, config: KernelConfig, device: DeviceSpec, operands: Operands) -> None:
    blocks = blocks_of(view, config, device)
    nest = plan.strip_nest(view)
    strip = config["strip"]
    units = view.groups if view.groups > 1 else blocks.count
    per_chunk = -(-units // config["chunks"])
    chunks = -(-units // per_chunk)
    lanes, cols = plan.full_lanes(device), view.out_width
    weights, bias = Source(operands.weights), Source(operands.bias)
    with tasks((chunks, view.batch, -(-view.out_height // strip))) as (chunk, image, index):
        first_row = index * strip
        rows = strip_rows(view.out_height, strip, index)
        rest = view.out_height % strip % blocks.tile.rows
        base = T.bind((image * view.out_height + first_row) * nest.dst_step[0])
        begin = chunk * per_chunk
        end = T.bind(tirx.min(begin + per_chunk, units)) if chunks > 1 else units
        with _source(view, strip, image, first_row, rows, operands.x, lanes) as src:
            if view.groups == 1:
                part = (begin, end) if chunks > 1 else None
                emit.dense(nest, blocks, src, operands.sink(base), weights, bias, rows, cols, rest, part)
            else:
                with emit.loop(end - begin) as i:
                    group = T.bind(begin + i)
                    emit.dense(
                        nest,
                        blocks,
                        Source(src.buffer, src.base + group * nest.channels),
                        operands.sink(base + group * blocks.channels),
                        Source(operands.weights, group * (nest.reduction * blocks.padded)),
                        Source(operands.bias, group * blocks.padded),
                        rows,
                        cols,
                        rest,
                    )


def _depthwise_body(shape: Conv2dShape, config: KernelConfig, device: DeviceSpec, operands: Operands) -> None:
    nest = plan.strip_nest(shape)
    strip = config["strip"]
    tile = Tile(1, config["cols"], 1, config["lanes"])
    weights, bias = Source(operands.weights), Source(operands.bias)
    lanes = plan.full_lanes(device)
    with tasks((shape.batch, -(-shape.out_height // strip))) as (image, index):
        first_row = index * strip
        rows = strip_rows(shape.out_height, strip, index)
        sink = operands.sink(T.bind((image * shape.out_height + first_row) * nest.dst_step[0]))
        with _source(shape, strip, image, first_row, rows, operands.x, lanes) as src:
            emit.depthwise(nest, tile, src, sink, weights, bias, shape.out_channels, rows, shape.out_width)
