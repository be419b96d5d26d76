"""Convolutions and Tucker convolutions on the CPU: FP32, NHWC, one PrimFunc each.

A dense convolution keeps a register tile (pixels x vectors of output channels) over the whole reduction, with
weights packed so that a tile reads them as one stream.  Threads share strips of output rows, chunks of output
channels, or both.  Padding is materialised once per strip in scratch memory.  A Tucker convolution runs its three
stages strip by strip in scratch memory that stays in the second-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.cpu import emit
from tdc_tvm.schedules.cpu.emit import Blocks, Nest, Sink, Source, Tile
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, Estimate, Kernel, KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, ConvShape, Epilogue, TuckerConvShape

_MAX_ELEMENTS = 2**31 - 1


def candidates(shape: ConvShape, device: DeviceSpec) -> list[KernelConfig]:
    """Every configuration worth considering, in a fixed order.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        What is computed.
    device : DeviceSpec
        A CPU.
    """
    if isinstance(shape, TuckerConvShape):
        return _tucker_candidates(shape, device)
    view = _view(shape)
    if _is_depthwise(view):
        lanes = _lanes(view.out_channels, device)
        lanes = lanes if lanes <= view.out_channels else lanes // 2
        cols = _depthwise_cols(view, device)
        return [
            _config("depthwise", strip=rows, lanes=lanes, cols=cols) for rows in _strips(view.out_height, 1, device)
        ]
    found = []
    channels = view.out_channels // view.groups
    lanes = _lanes(channels, device)
    for vectors in range(1, min(4, -(-channels // lanes)) + 1):
        tile = _tile(view.out_height, view.out_width, vectors, lanes, device)
        units = view.groups if view.groups > 1 else Blocks(channels, tile).count
        chunk_counts = sorted({min(units, n) for n in (1, device.core_count, 2 * device.core_count)})
        for rows in _strips(view.out_height, tile.rows, device):
            for count in chunk_counts:
                strategy = "direct" if view.groups == 1 else "grouped"
                found.append(_config(strategy, strip=rows, chunks=count, lanes=lanes, vectors=vectors))
    return found


def reject_reason(shape: ConvShape, config: KernelConfig, device: DeviceSpec) -> str:
    """Why a configuration cannot run; empty if it can."""
    if device.kind != "cpu":
        return f"a CPU schedule on a device of kind {device.kind!r}"
    stages = shape.stages if isinstance(shape, TuckerConvShape) else (shape,)
    wanted = (
        "fused_tile"
        if isinstance(shape, TuckerConvShape)
        else "depthwise"
        if _is_depthwise(shape)
        else "grouped"
        if shape.groups > 1
        else "direct"
    )
    if config.strategy != wanted:
        return f"strategy {config.strategy!r} does not fit; expected {wanted!r}"
    for stage in stages:
        top, left, bottom, right = stage.padding
        inputs = stage.batch * (stage.height + top + bottom) * (stage.width + left + right) * stage.in_channels
        if max(inputs, stage.out_pixels * stage.out_channels, stage.weight_count) > _MAX_ELEMENTS:
            return f"{stage} needs indices beyond 32 bits"
    return ""


def estimate(shape: ConvShape, config: KernelConfig, device: DeviceSpec) -> Estimate:
    """Predicted latency: arithmetic of the busiest thread, copies, memory and the parallel region.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        What is computed.
    config : KernelConfig
        One of `candidates`.
    device : DeviceSpec
        A CPU.

    Returns
    -------
    Estimate
        Parts ``compute``, ``copy``, ``memory`` and ``launch``, in microseconds.
    """
    if isinstance(shape, TuckerConvShape):
        return _tucker_estimate(shape, config, device)
    view = _view(shape)
    rows = config["strip"]
    strips = -(-view.out_height // rows)
    if config.strategy == "depthwise":
        chunks, share = 1, 1.0
        pixels = view.out_width * min(rows, view.out_height)
        vectors = -(-view.out_channels // config["lanes"]) * view.kernel[0] * view.kernel[1]
        slots = 1.5 * pixels * vectors
    else:
        nest = _strip_nest(view)
        blocks = _blocks(view, config, device)
        units = view.groups if view.groups > 1 else blocks.count
        chunks = -(-units // -(-units // config["chunks"]))
        share = -(-units // chunks) / units
        slots = view.groups * share * _dense_slots(nest, blocks, min(rows, view.out_height), view.out_width)
    tasks = view.batch * strips * chunks
    turns = -(-tasks // device.core_count)
    weight_bytes = 4 * view.weight_count
    scratch = 4 * _pad_elements(view, rows) if _needs_copy(view) else 4 * view.in_channels * view.width * rows
    reads = turns * share * weight_bytes if share * weight_bytes > device.l2_bytes / 2 else weight_bytes
    traffic = 4 * view.batch * (view.height * view.width * view.in_channels) + 4 * view.out_pixels * view.out_channels
    copied = turns * scratch if _needs_copy(view) else 0
    spilled = turns * scratch if scratch > device.l2_bytes / 2 else 0
    return _parts(device, turns * slots, copied, reads + traffic + spilled, tasks)


def choose(shape: ConvShape, device: DeviceSpec) -> tuple[KernelConfig, Estimate]:
    """The configuration with the lowest estimate; ties go to the smaller configuration.

    Raises
    ------
    TdcError
        If no candidate can run.
    """
    found = candidates(shape, device)
    runnable = [config for config in found if not reject_reason(shape, config, device)]
    if not runnable:
        reason = reject_reason(shape, found[0], device) if found else "there is no candidate"
        raise TdcError(f"no CPU schedule for {shape} on {device.name}: {reason}; use smaller extents")
    rated = [(estimate(shape, config, device), config) for config in runnable]
    best = min(rated, key=lambda item: (item[0].latency_us, item[1]))
    return best[1], best[0]


def make_kernel(
    shape: ConvShape,
    epilogue: Epilogue,
    weights: tuple[ConvWeights, ...],
    config: KernelConfig,
    device: DeviceSpec,
    name: str,
) -> Kernel:
    """Write the operator for one configuration.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        What is computed.
    epilogue : Epilogue
        What is done to the output before it is stored.
    weights : tuple[ConvWeights, ...]
        One entry for a convolution, three (reduce, core, expand) for a Tucker convolution; any may have a bias.
        A bias of the reducing stage is added before the core's zero padding.
    config : KernelConfig
        One of `candidates`.
    device : DeviceSpec
        A CPU.
    name : str
        The PrimFunc's name hint.

    Returns
    -------
    Kernel
        Its constants are a packed kernel and a bias (zeros where there is none), both flat, per stage.

    Raises
    ------
    TdcError
        If the configuration cannot run or the weights do not fit the shape.
    """
    reason = reject_reason(shape, config, device)
    if reason:
        raise TdcError(f"cannot schedule {shape} with {config.strategy} ({config}): {reason}")
    stages = shape.stages if isinstance(shape, TuckerConvShape) else (shape,)
    _check_weights(stages, weights)
    if isinstance(shape, TuckerConvShape):
        plan = _tucker_plan(shape, config, device)
        constants = [a for w, b in zip(weights, plan.blocks, strict=True) for a in pack(w, b, 1)]
    elif config.strategy == "depthwise":
        w = weights[0]
        bias = np.zeros(shape.out_channels, "float32") if w.bias is None else w.bias
        flat = np.transpose(w.kernel[:, 0], (1, 2, 0)).ravel()
        constants = [np.ascontiguousarray(flat, "float32"), np.ascontiguousarray(bias, "float32")]
    else:
        constants = list(pack(weights[0], _blocks(_view(shape), config, device), shape.groups))
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8, "tdc.config": f"{config.strategy} {config}"})
        first, last = stages[0], stages[-1]
        x = T.arg("x", T.buffer((first.batch, first.height, first.width, first.in_channels), "float32"))
        packed = [T.arg(f"constant{i}", T.buffer(array.shape, "float32")) for i, array in enumerate(constants)]
        extents = (last.batch, last.out_height, last.out_width, last.out_channels)
        residual = T.arg("residual", T.buffer(extents, "float32")) if epilogue.residual else None
        out = T.arg("out", T.buffer(extents, "float32"))
        io = _Io(emit.flat(x), packed, emit.flat(out), emit.flat(residual) if residual is not None else None, epilogue)
        if isinstance(shape, TuckerConvShape):
            _tucker_body(shape, plan, config, device, io)
        elif config.strategy == "depthwise":
            _depthwise_body(_view(shape), config, device, io)
        else:
            _dense_body(_view(shape), config, device, io)
    return Kernel(builder.get(), tuple(constants))


def pack(weights: ConvWeights, blocks: Blocks, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay weights out in the order in which the register tiles read them.

    Parameters
    ----------
    weights : ConvWeights
        OIHW.
    blocks : Blocks
        How the output channels of one group are cut up.

    Returns
    -------
    tuple[numpy.ndarray, numpy.ndarray]
        Kernel and bias, flat.  Per group and block the kernel is ``[R][S][C][width]``; the last block is padded with
        zeros to whole vectors, and so is the bias.
    """
    kernel = np.asarray(weights.kernel, "float32")
    out_channels, channels, height, width = kernel.shape
    per_group = out_channels // groups
    reduction = channels * height * width
    rows = kernel.reshape(groups, per_group, channels, height, width).transpose(0, 3, 4, 2, 1)
    padded = np.zeros((groups, reduction, blocks.padded), "float32")
    padded[:, :, :per_group] = rows.reshape(groups, reduction, per_group)
    cut = blocks.full * blocks.width
    full = padded[:, :, :cut].reshape(groups, reduction, blocks.full, blocks.width).transpose(0, 2, 1, 3)
    parts = [full.reshape(groups, -1), padded[:, :, cut:].reshape(groups, -1)]
    bias = np.zeros((groups, blocks.padded), "float32")
    if weights.bias is not None:
        bias[:, :per_group] = np.asarray(weights.bias, "float32").reshape(groups, per_group)
    return np.concatenate(parts, axis=1).ravel(), bias.ravel()


@dataclass(frozen=True)
class _Io:
    """Flat views of a kernel's parameters."""

    x: Any
    constants: list[Any]
    out: Any
    residual: Any
    epilogue: Epilogue

    def sink(self, base: Any) -> Sink:
        return Sink(self.out, base, self.epilogue, self.residual)


@dataclass(frozen=True)
class _TuckerPlan:
    """Channel blocks (each with its register tile) of the three stages."""

    blocks: tuple[Blocks, Blocks, Blocks]


def _config(strategy: str, **parameters: int) -> KernelConfig:
    return KernelConfig(strategy, tuple(parameters.items()))


def _view(shape: Conv2dShape) -> Conv2dShape:
    """A plain 1x1 as one column of pixels, so that register tiles may cross rows and images."""
    if not shape.is_pointwise:
        return shape
    return Conv2dShape(1, shape.out_pixels, 1, shape.in_channels, shape.out_channels)


def _is_depthwise(shape: Conv2dShape) -> bool:
    return shape.groups > 1 and shape.groups == shape.in_channels == shape.out_channels


def _needs_copy(shape: Conv2dShape) -> bool:
    return any(shape.padding)


def _lanes(channels: int, device: DeviceSpec) -> int:
    """The SIMD width, or less where there are fewer channels."""
    widest = max(device.vector_bytes, 16) // 4
    lanes = 1
    while lanes < min(channels, widest):
        lanes *= 2
    return lanes


def _registers(device: DeviceSpec) -> int:
    return 32 if device.vector_bytes >= 64 else 16


def _tile(rows: int, cols: int, vectors: int, lanes: int, device: DeviceSpec) -> Tile:
    """The largest register tile with this many vectors, evened out over the extents."""
    pixels = (_registers(device) - 1 - vectors) // vectors
    if cols > pixels:
        return Tile(1, -(-cols // -(-cols // pixels)), vectors, lanes)
    height = min(rows, pixels // cols)
    return Tile(-(-rows // -(-rows // height)), cols, vectors, lanes)


def _depthwise_cols(shape: Conv2dShape, device: DeviceSpec) -> int:
    return min(shape.out_width, 14 if _registers(device) == 32 else 6)


def _strips(height: int, step: int, device: DeviceSpec) -> list[int]:
    """Strip heights: whole tiles, from everything in one strip down to many strips per thread."""
    groups = -(-height // step)
    counts = [1, *(device.core_count * 2**i for i in range(8))]
    return sorted({-(-groups // min(groups, n)) * step for n in counts}, reverse=True)


def _blocks(view: Conv2dShape, config: KernelConfig, device: DeviceSpec) -> Blocks:
    tile = _tile(view.out_height, view.out_width, config["vectors"], config["lanes"], device)
    return Blocks(view.out_channels // view.groups, tile)


def _pad_width(shape: Conv2dShape) -> int:
    """Columns of the input that the outputs reach, padding included."""
    return (shape.out_width - 1) * shape.stride[1] + shape.dilation[1] * (shape.kernel[1] - 1) + 1


def _pad_height(shape: Conv2dShape, rows: int) -> int:
    """Rows of the input that ``rows`` rows of the output reach, padding included."""
    return (rows - 1) * shape.stride[0] + shape.dilation[0] * (shape.kernel[0] - 1) + 1


def _pad_elements(shape: Conv2dShape, rows: int) -> int:
    return _pad_height(shape, rows) * _pad_width(shape) * shape.in_channels


def _strip_nest(shape: Conv2dShape) -> Nest:
    """Distances of a convolution that reads the input itself, or a padded strip of it in scratch memory."""
    pixel = shape.in_channels
    row = (_pad_width(shape) if _needs_copy(shape) else shape.width) * pixel
    return Nest(
        shape.kernel,
        shape.in_channels // shape.groups,
        (shape.dilation[0] * row, shape.dilation[1] * pixel),
        (shape.stride[0] * row, shape.stride[1] * pixel),
        (shape.out_width * shape.out_channels, shape.out_channels),
    )


def _dense_slots(nest: Nest, blocks: Blocks, rows: int, cols: int) -> float:
    """Issue slots of fused multiply-adds for ``rows x cols`` pixels, one group, all channel blocks.

    A tile's step takes as many slots as it has accumulators, but never fewer than its loads or the eight that
    cover the latency of two pipelines; two more go to the loop.
    """
    tile = blocks.tile

    def step(pixels: int, vectors: int) -> int:
        return max(pixels * vectors, pixels + vectors, 8) + 2

    def area(vectors: int) -> int:
        slots = 0
        for height, times in ((tile.rows, rows // tile.rows), (rows % tile.rows, 1)):
            if height and times:
                slots += times * (cols // tile.cols) * step(height * tile.cols, vectors)
                slots += times * (step(height * (cols % tile.cols), vectors) if cols % tile.cols else 0)
        return slots

    per_term = blocks.full * area(tile.vectors) + (area(blocks.rest_vectors) if blocks.rest else 0)
    return per_term * nest.reduction


def _parts(device: DeviceSpec, slots: float, copied_bytes: float, traffic_bytes: float, tasks: int) -> Estimate:
    """Latency from the busiest thread's issue slots and copied bytes and the whole machine's traffic."""
    vector_bytes = max(device.vector_bytes, 16)
    slots_per_us = device.fp32_flops_per_s / device.core_count / (2 * vector_bytes / 4) / 1e6
    return Estimate(
        {
            "compute": slots / slots_per_us,
            "copy": copied_bytes / (vector_bytes / 8) / slots_per_us,
            "memory": traffic_bytes / device.dram_bytes_per_s * 1e6 / 4,
            "launch": device.launch_us if tasks > 1 else 0.0,
        }
    )


def _check_weights(stages: tuple[Conv2dShape, ...], weights: tuple[ConvWeights, ...]) -> None:
    if len(stages) != len(weights):
        raise TdcError(f"found weights for {len(weights)} stages, expected {len(stages)}")
    for stage, w in zip(stages, weights, strict=True):
        expected = (stage.out_channels, stage.in_channels // stage.groups, *stage.kernel)
        if w.kernel.shape != expected:
            raise TdcError(f"found a kernel of shape {w.kernel.shape} for {stage}, expected {expected}")
        if w.bias is not None and w.bias.shape != (stage.out_channels,):
            raise TdcError(f"found a bias of shape {w.bias.shape} for {stage}, expected {(stage.out_channels,)}")


@contextmanager
def _tasks(count: int) -> Iterator[Any]:
    """The parallel loop; nothing is launched for a single task."""
    if count == 1:
        yield 0
    else:
        with T.parallel(0, count) as task:
            yield task


def _strip_rows(height: int, strip: int, index: Any) -> Any:
    """Rows of one strip: a number where all strips are alike."""
    if height % strip == 0 or strip >= height:
        return min(strip, height)
    return T.bind(tirx.min(strip, height - index * strip))


def _split(task: Any, extents: tuple[int, ...]) -> list[Any]:
    """A task's number as indices, the first the slowest."""
    indices = []
    for extent in reversed(extents):
        indices.append(0 if extent == 1 else T.bind(tirx.floormod(task, extent)) if task is not None else 0)
        task = task if extent == 1 else tirx.floordiv(task, extent)
    return indices[::-1]


def _pad_strip(shape: Conv2dShape, strip: int, image: Any, first_row: Any, rows: Any, x: Any, lanes: int) -> Any:
    """A padded copy of the input rows that a strip of the output needs."""
    top, left = shape.padding[:2]
    pixel, row = shape.in_channels, shape.width * shape.in_channels
    pitch = _pad_width(shape)
    lead = min(left, pitch)
    data = max(0, min(shape.width, pitch - lead))
    padded = emit.scratch(_pad_elements(shape, strip))
    needed = (rows - 1) * shape.stride[0] + shape.dilation[0] * (shape.kernel[0] - 1) + 1
    with emit.loop(needed) as i:
        source = T.bind(first_row * shape.stride[0] + i - top)
        target = T.bind(i * (pitch * pixel))
        with T.If(tirx.all(source >= 0, source < shape.height)):
            with T.Then():
                emit.copy(padded, target, None, 0, lead * pixel, lanes)
                emit.copy(padded, target + lead * pixel, x, (image * shape.height + source) * row, data * pixel, lanes)
                emit.copy(padded, target + (lead + data) * pixel, None, 0, (pitch - lead - data) * pixel, lanes)
            with T.Else():
                emit.copy(padded, target, None, 0, pitch * pixel, lanes)
    return padded


def _strip_source(shape: Conv2dShape, strip: int, image: Any, first_row: Any, rows: Any, x: Any, lanes: int) -> Source:
    """Where a strip's convolution reads: the input itself, or a padded copy."""
    if _needs_copy(shape):
        return Source(_pad_strip(shape, strip, image, first_row, rows, x, lanes))
    row = shape.width * shape.in_channels
    return Source(x, T.bind((image * shape.height + first_row * shape.stride[0]) * row))


def _dense_body(view: Conv2dShape, config: KernelConfig, device: DeviceSpec, io: _Io) -> None:
    """Strategies "direct" and "grouped"."""
    blocks = _blocks(view, config, device)
    nest = _strip_nest(view)
    strip = min(config["strip"], -(-view.out_height // blocks.tile.rows) * blocks.tile.rows)
    strips = -(-view.out_height // strip)
    units = view.groups if view.groups > 1 else blocks.count
    per_chunk = -(-units // config["chunks"])
    chunks = -(-units // per_chunk)
    weights, bias = io.constants
    group_weights, per_group = nest.reduction * blocks.padded, view.out_channels // view.groups
    with _tasks(chunks * view.batch * strips) as task:
        chunk, image, index = _split(task, (chunks, view.batch, strips))
        first_row = index * strip
        rows = _strip_rows(view.out_height, strip, index)
        rest = view.out_height % strip % blocks.tile.rows
        src = _strip_source(view, strip, image, first_row, rows, io.x, max(device.vector_bytes, 16) // 4)
        base = T.bind((image * view.out_height + first_row) * nest.dst_step[0])
        begin = chunk * per_chunk
        end = T.bind(tirx.min(begin + per_chunk, units)) if chunks > 1 else units
        if view.groups == 1:
            part = (begin, end) if chunks > 1 else None
            emit.dense(
                nest, blocks, src, io.sink(base), Source(weights), Source(bias), rows, view.out_width, rest, part
            )
        else:
            with emit.loop(end - begin if chunks > 1 else units) as i:
                group = T.bind(begin + i)
                emit.dense(
                    nest,
                    blocks,
                    Source(src.buffer, src.base + group * nest.channels),
                    io.sink(base + group * per_group),
                    Source(weights, group * group_weights),
                    Source(bias, group * blocks.padded),
                    rows,
                    view.out_width,
                    rest,
                )


def _depthwise_body(shape: Conv2dShape, config: KernelConfig, device: DeviceSpec, io: _Io) -> None:
    nest = _strip_nest(shape)
    strip = min(config["strip"], shape.out_height)
    strips = -(-shape.out_height // strip)
    tile = Tile(1, config["cols"], 1, config["lanes"])
    weights, bias = io.constants
    with _tasks(shape.batch * strips) as task:
        image, index = _split(task, (shape.batch, strips))
        first_row = index * strip
        rows = _strip_rows(shape.out_height, strip, index)
        src = _strip_source(shape, strip, image, first_row, rows, io.x, max(device.vector_bytes, 16) // 4)
        base = T.bind((image * shape.out_height + first_row) * nest.dst_step[0])
        channels = shape.out_channels
        emit.depthwise(nest, tile, src, io.sink(base), Source(weights), Source(bias), channels, rows, shape.out_width)


def _tucker_plan(shape: TuckerConvShape, config: KernelConfig, device: DeviceSpec) -> _TuckerPlan:
    reduce, core, expand = shape.stages
    lanes = _tucker_lanes(shape, device)
    rows = min(config["strip"], core.out_height)
    heights = (min(_pad_height(core, rows), reduce.height), rows, rows)
    widths = (reduce.width, core.out_width, core.out_width)
    found = []
    for stage, height, width, part in zip(
        (reduce, core, expand), heights, widths, ("reduce", "core", "expand"), strict=True
    ):
        found.append(Blocks(stage.out_channels, _tile(height, width, config[part], lanes, device)))
    return _TuckerPlan((found[0], found[1], found[2]))


def _tucker_lanes(shape: TuckerConvShape, device: DeviceSpec) -> int:
    return _lanes(max(shape.rank_in, shape.rank_out, shape.dense.out_channels), device)


def _best_vectors(stage: Conv2dShape, lanes: int, rows: int, cols: int, device: DeviceSpec) -> int:
    """Vectors per register tile with the fewest issue slots."""
    options = range(1, min(4, -(-stage.out_channels // lanes)) + 1)
    nest = _strip_nest(stage)

    def slots(vectors: int) -> float:
        return _dense_slots(nest, Blocks(stage.out_channels, _tile(rows, cols, vectors, lanes, device)), rows, cols)

    return min(options, key=lambda vectors: (slots(vectors), -vectors))


def _tucker_candidates(shape: TuckerConvShape, device: DeviceSpec) -> list[KernelConfig]:
    reduce, core, expand = shape.stages
    lanes = _tucker_lanes(shape, device)
    found = []
    for rows in _strips(core.out_height, 1, device):
        found.append(
            _config(
                "fused_tile",
                strip=rows,
                reduce=_best_vectors(reduce, lanes, min(_pad_height(core, rows), reduce.height), reduce.width, device),
                core=_best_vectors(core, lanes, rows, core.out_width, device),
                expand=_best_vectors(expand, lanes, rows, core.out_width, device),
            )
        )
    return found


def _tucker_estimate(shape: TuckerConvShape, config: KernelConfig, device: DeviceSpec) -> Estimate:
    reduce, core, expand = shape.stages
    plan = _tucker_plan(shape, config, device)
    strip = min(config["strip"], core.out_height)
    tasks = core.batch * -(-core.out_height // strip)
    turns = -(-tasks // device.core_count)
    halo = min(_pad_height(core, strip), reduce.height)
    sizes = ((halo, reduce.width), (strip, core.out_width), (strip, core.out_width))
    slots = sum(
        _dense_slots(_strip_nest(stage), blocks, *size)
        for stage, blocks, size in zip((reduce, core, expand), plan.blocks, sizes, strict=True)
    )
    scratch = 4 * (_pad_elements(core, strip) + strip * core.out_width * core.out_channels)
    weight_bytes = 4 * shape.weight_count
    reads = turns * weight_bytes if weight_bytes > device.l2_bytes / 2 else weight_bytes
    traffic = (
        4 * reduce.batch * halo * reduce.width * reduce.in_channels * tasks
        + 4 * expand.out_pixels * expand.out_channels
    )
    spilled = turns * scratch if scratch > device.l2_bytes / 2 else 0
    return _parts(device, turns * slots, turns * scratch / 4, reads + traffic + spilled, tasks)


def _tucker_body(shape: TuckerConvShape, plan: _TuckerPlan, config: KernelConfig, device: DeviceSpec, io: _Io) -> None:
    """Strategy "fused_tile": the three stages of a strip in one task."""
    reduce, core, expand = shape.stages
    strip = min(config["strip"], core.out_height)
    strips = -(-core.out_height // strip)
    top, left = core.padding[:2]
    pitch = _pad_width(core)
    lanes = max(device.vector_bytes, 16) // 4
    weights = [Source(buffer) for buffer in io.constants]
    rank_in, rank_out = shape.rank_in, shape.rank_out
    lead = min(left, pitch)
    data = max(0, min(core.width, pitch - lead))
    row, out_row = pitch * rank_in, core.out_width * rank_out
    reduce_nest = Nest(
        (1, 1),
        reduce.in_channels,
        (0, reduce.in_channels),
        (reduce.width * reduce.in_channels, reduce.in_channels),
        (row, rank_in),
    )
    core_nest = Nest(
        core.kernel,
        rank_in,
        (core.dilation[0] * row, core.dilation[1] * rank_in),
        (core.stride[0] * row, core.stride[1] * rank_in),
        (out_row, rank_out),
    )
    expand_nest = Nest(
        (1, 1),
        rank_out,
        (0, rank_out),
        (out_row, rank_out),
        (core.out_width * expand.out_channels, expand.out_channels),
    )
    with _tasks(core.batch * strips) as task:
        image, index = _split(task, (core.batch, strips))
        first_row = index * strip
        rows = _strip_rows(core.out_height, strip, index)
        reduced = emit.scratch(_pad_height(core, strip) * row)
        cored = emit.scratch(strip * out_row)
        origin = T.bind(first_row * core.stride[0] - top)
        needed = (rows - 1) * core.stride[0] + core.dilation[0] * (core.kernel[0] - 1) + 1
        # The padding is zero after the reducing stage's bias, so it is written here and not computed.
        begin = T.bind(tirx.max(0, tirx.min(-origin, needed)))
        end = T.bind(tirx.max(begin, tirx.min(needed, reduce.height - origin)))
        if any(core.padding):
            with T.serial(0, begin) as i:
                emit.copy(reduced, i * row, None, 0, row, lanes)
            with T.serial(0, needed - end) as i:
                emit.copy(reduced, (end + i) * row, None, 0, row, lanes)
            with T.serial(0, end - begin) as i:
                emit.copy(reduced, (begin + i) * row, None, 0, lead * rank_in, lanes)
                tail = lead + data
                emit.copy(reduced, (begin + i) * row + tail * rank_in, None, 0, (pitch - tail) * rank_in, lanes)
        if data:
            emit.dense(
                reduce_nest,
                plan.blocks[0],
                Source(io.x, T.bind((image * reduce.height + origin + begin) * reduce_nest.src_step[0])),
                Sink(reduced, T.bind(begin * row + lead * rank_in)),
                weights[0],
                weights[1],
                end - begin,
                data,
            )
        emit.dense(
            core_nest, plan.blocks[1], Source(reduced), Sink(cored), weights[2], weights[3], rows, core.out_width
        )
        base = T.bind((image * core.out_height + first_row) * expand_nest.dst_step[0])
        emit.dense(
            expand_nest, plan.blocks[2], Source(cored), io.sink(base), weights[4], weights[5], rows, core.out_width
        )
