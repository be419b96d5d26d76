"""A Tucker convolution as one PrimFunc on the CPU: strategies "fused_tile" and "staged".

"fused_tile" runs the three stages strip by strip in scratch memory that stays in the second-level cache; it computes
the rows between strips twice.  "staged" runs them one after the other, each with its own division among the threads:
for small images, where strips would be uneven.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cpu import dense, emit, plan
from tdc_tvm.schedules.cpu.dense import Operands
from tdc_tvm.schedules.cpu.emit import Blocks, Nest, Sink, Source
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import Estimate, KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, Epilogue, TuckerConvShape

_STAGES = ("reduce", "core", "expand")
_STAGE_PARAMETERS = ("strip", "chunks", "vectors")
PARAMETERS = {
    "fused_tile": ("strip", "lanes", *_STAGES),
    "staged": ("lanes", *(f"{name}_{parameter}" for name in _STAGES for parameter in _STAGE_PARAMETERS)),
}


def candidates(shape: TuckerConvShape, device: DeviceSpec) -> list[KernelConfig]:
    """One fused candidate per strip height, and one staged candidate of each stage's best."""
    lanes = _lanes(shape, device)
    found = []
    for rows in plan.strip_heights(shape.stages[1].out_height, 1, device):
        sizes = _strip_sizes(shape, rows)
        vectors = {
            name: _best_vectors(stage, lanes, size, device)
            for name, stage, size in zip(_STAGES, shape.stages, sizes, strict=True)
        }
        found.append(plan.make_config("fused_tile", strip=rows, lanes=lanes, **vectors))
    parameters = {"lanes": lanes}
    for name, stage in zip(_STAGES, shape.stages, strict=True):
        best = _best_config(stage, lanes, device)
        parameters |= {f"{name}_{parameter}": best[parameter] for parameter in _STAGE_PARAMETERS}
    found.append(plan.make_config("staged", **parameters))
    return found


def estimate(shape: TuckerConvShape, config: KernelConfig, device: DeviceSpec) -> Estimate:
    """Predicted latency; see `tdc_tvm.schedules.cpu.conv.estimate`."""
    if config.strategy == "staged":
        parts: dict[str, float] = {}
        for stage, stage_config in zip(shape.stages, _stage_configs(config), strict=True):
            for name, value in dense.estimate(stage, stage_config, device).parts_us.items():
                parts[name] = parts.get(name, 0.0) + value
        return Estimate(parts)
    reduce, core, expand = shape.stages
    strip = min(config["strip"], core.out_height)
    tasks = core.batch * -(-core.out_height // strip)
    turns = -(-tasks // device.core_count)
    sizes = _strip_sizes(shape, strip)
    slots = sum(
        plan.dense_slots(stage.weight_count // stage.out_channels, blocks, *size)
        for stage, blocks, size in zip(shape.stages, blocks_of(shape, config, device), sizes, strict=True)
    )
    scratch = 4 * (plan.pad_elements(core, strip) + strip * core.out_width * core.out_channels)
    weight_bytes = 4 * shape.weight_count
    traffic = 4 * tasks * sizes[0][0] * reduce.width * reduce.in_channels + 4 * expand.out_pixels * expand.out_channels
    traffic += turns * weight_bytes if weight_bytes > device.l2_bytes / 2 else weight_bytes
    traffic += turns * scratch if scratch > device.l2_bytes / 2 else 0
    return plan.price(device, turns * slots, turns * scratch / 4, traffic, tasks)


def reject_reason(shape: TuckerConvShape, config: KernelConfig, device: DeviceSpec) -> str:
    """Why a configuration, whose parameters are in range, cannot run; empty if it can."""
    if config.strategy != "staged":
        return ""
    stages = zip(shape.stages, _stage_configs(config), strict=True)
    return next((reason for stage, one in stages if (reason := dense.reject_reason(stage, one, device))), "")


def blocks_of(shape: TuckerConvShape, config: KernelConfig, device: DeviceSpec) -> tuple[Blocks, Blocks, Blocks]:
    """Channel blocks, each with its register tile, of the three stages."""
    if config.strategy == "staged":
        a, b, c = (
            dense.blocks_of(plan.as_pixels(stage), stage_config, device)
            for stage, stage_config in zip(shape.stages, _stage_configs(config), strict=True)
        )
        return a, b, c
    a, b, c = (
        Blocks(stage.out_channels, plan.make_tile(*size, config[name], config["lanes"], device))
        for name, stage, size in zip(_STAGES, shape.stages, _strip_sizes(shape, config["strip"]), strict=True)
    )
    return a, b, c


def body(
    shape: TuckerConvShape, config: KernelConfig, device: DeviceSpec, constants: list[Any], operands: Operands
) -> None:
    """Write the loops; ``constants`` are kernel and bias of the three stages in turn."""
    if config.strategy == "staged":
        _staged_body(shape, config, device, constants, operands)
    else:
        _fused_body(shape, config, device, constants, operands)


def _stage_configs(config: KernelConfig) -> list[KernelConfig]:
    """The configurations of a staged candidate's three convolutions."""
    return [
        plan.make_config("direct", lanes=config["lanes"], **{p: config[f"{name}_{p}"] for p in _STAGE_PARAMETERS})
        for name in _STAGES
    ]


def _lanes(shape: TuckerConvShape, device: DeviceSpec) -> int:
    """One width for all three stages: a function may not mix accumulators of several."""
    return plan.lanes_for(max(shape.rank_in, shape.rank_out, shape.dense.out_channels), device)


def _strip_sizes(shape: TuckerConvShape, strip: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of pixels of each stage in a strip."""
    reduce, core, _ = shape.stages
    rows = min(strip, core.out_height)
    halo = min(plan.pad_height(core, rows), reduce.height)
    return (halo, reduce.width), (rows, core.out_width), (rows, core.out_width)


def _best_config(stage: Conv2dShape, lanes: int, device: DeviceSpec) -> KernelConfig:
    """The cheapest way to run one stage by itself."""

    def cost(config: KernelConfig) -> tuple[float, KernelConfig]:
        return dense.estimate(stage, config, device).latency_us, config

    return min(dense.candidates(stage, device, lanes), key=cost)


def _best_vectors(stage: Conv2dShape, lanes: int, size: tuple[int, int], device: DeviceSpec) -> int:
    """Vectors per register tile with the fewest issue slots."""

    def slots(vectors: int) -> float:
        blocks = Blocks(stage.out_channels, plan.make_tile(*size, vectors, lanes, device))
        return plan.dense_slots(stage.weight_count // stage.out_channels, blocks, *size)

    return min(plan.vector_counts(stage.out_channels, lanes), key=lambda vectors: (slots(vectors), -vectors))


def _staged_body(
    shape: TuckerConvShape, config: KernelConfig, device: DeviceSpec, constants: list[Any], operands: Operands
) -> None:
    reduce, core, _ = shape.stages
    plain = Epilogue()
    sizes = (reduce.out_pixels * reduce.out_channels, core.out_pixels * core.out_channels)
    with emit.workspace(sizes[0]) as reduced, emit.workspace(sizes[1]) as cored:
        parts = (
            Operands(operands.x, constants[0], constants[1], reduced, None, plain),
            Operands(reduced, constants[2], constants[3], cored, None, plain),
            Operands(cored, constants[4], constants[5], operands.out, operands.residual, operands.epilogue),
        )
        for stage, stage_config, part in zip(shape.stages, _stage_configs(config), parts, strict=True):
            dense.body(stage, stage_config, device, part)


def _fused_body(
    shape: TuckerConvShape, config: KernelConfig, device: DeviceSpec, constants: list[Any], operands: Operands
) -> None:
    reduce, core, expand = shape.stages
    blocks = blocks_of(shape, config, device)
    lanes = config["lanes"]
    strip = min(config["strip"], core.out_height)
    rank_in, rank_out, cols = shape.rank_in, shape.rank_out, core.out_width
    top, left = core.padding[:2]
    pitch = plan.pad_width(core)
    lead = min(left, pitch)
    data = max(0, min(core.width, pitch - lead))
    row, out_row = pitch * rank_in, cols * rank_out
    weights = [Source(buffer) for buffer in constants]
    x_step = (reduce.width * reduce.in_channels, reduce.in_channels)
    taps = (core.dilation[0] * row, core.dilation[1] * rank_in)
    core_step = (core.stride[0] * row, core.stride[1] * rank_in)
    out_step = (cols * expand.out_channels, expand.out_channels)
    reduce_nest = Nest((1, 1), reduce.in_channels, (0, reduce.in_channels), x_step, (row, rank_in))
    core_nest = Nest(core.kernel, rank_in, taps, core_step, (out_row, rank_out))
    expand_nest = Nest((1, 1), rank_out, (0, rank_out), (out_row, rank_out), out_step)
    with dense.tasks((core.batch, -(-core.out_height // strip))) as (image, index):
        first_row = index * strip
        rows = dense.strip_rows(core.out_height, strip, index)
        origin = T.bind(first_row * core.stride[0] - top)
        needed = (rows - 1) * core.stride[0] + core.dilation[0] * (core.kernel[0] - 1) + 1
        begin = T.bind(tirx.max(0, tirx.min(-origin, needed)))
        end = T.bind(tirx.max(begin, tirx.min(needed, reduce.height - origin)))
        sizes = (plan.pad_height(core, strip) * row, strip * out_row)
        with emit.workspace(sizes[0]) as reduced, emit.workspace(sizes[1]) as cored:
            if any(core.padding):
                # The padding is zero after the reducing stage's bias: written here, not computed.
                with T.serial(0, begin) as i:
                    emit.copy(reduced, i * row, None, 0, row, lanes)
                with T.serial(0, needed - end) as i:
                    emit.copy(reduced, (end + i) * row, None, 0, row, lanes)
                with T.serial(0, end - begin) as i:
                    after = lead + data
                    emit.copy(reduced, (begin + i) * row, None, 0, lead * rank_in, lanes)
                    emit.copy(reduced, (begin + i) * row + after * rank_in, None, 0, (pitch - after) * rank_in, lanes)
            if data:
                src = Source(operands.x, T.bind((image * reduce.height + origin + begin) * x_step[0]))
                sink = Sink(reduced, T.bind(begin * row + lead * rank_in))
                emit.dense(reduce_nest, blocks[0], src, sink, weights[0], weights[1], end - begin, data)
            emit.dense(core_nest, blocks[1], Source(reduced), Sink(cored), weights[2], weights[3], rows, cols)
            sink = operands.sink(T.bind((image * core.out_height + first_row) * out_step[0]))
            emit.dense(expand_nest, blocks[2], Source(cored), sink, weights[4], weights[5], rows, cols)
