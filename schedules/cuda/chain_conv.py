"""Strategies for dense and Tucker convolutions: which stages make up a kernel, over which tiles, by how many blocks.

``tile``: all three stages in one kernel, a tile by one block.  ``cluster``: a tile by several blocks.
``two``: two kernels, cut before (``cut`` 1) or after (``cut`` 2) the core.  ``three``: one kernel for
each stage.  ``conv``: a dense convolution.  ``dense``: a Tucker convolution as the dense one that its
stages are together, which has more products but only one stage.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.arith import Number, round_up
from tdc_tvm.schedules.cuda.block import Buffers
from tdc_tvm.schedules.cuda.chain import Chain
from tdc_tvm.schedules.cuda.pack import merge, pack_bias, pack_prologue, pack_weights, weight_scale
from tdc_tvm.schedules.cuda.plan import MAX_CREWS, MAX_PIXELS, MAX_THREADS, Part
from tdc_tvm.schedules.cuda.space import MAX_SLICES
from tdc_tvm.schedules.cuda.work import UNITS, WARP
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, Kernel, KernelConfig, Prologue, Tensors
from tdc_tvm.schedules.shape import Conv2dShape, ConvShape, Epilogue

FIELDS = ("tile_h", "tile_w", "split", "deep", "warps", "crews", "group")


def stages_of(shape: ConvShape, strategy: str) -> tuple[Conv2dShape, ...]:
    """The convolutions that are computed one after the other."""
    if isinstance(shape, Conv2dShape):
        return (shape,)
    return (shape.dense,) if strategy == "dense" else shape.stages


def cuts_of(config: KernelConfig) -> tuple[int, ...]:
    """Numbers of the stages before which a new kernel begins."""
    return {"two": lambda: (config["cut"],), "three": lambda: (1, 2)}.get(config.strategy, tuple)()


def allowed(shape: ConvShape, strategy: str) -> dict[str, Sequence[int]]:
    """The values that each parameter of a strategy can have, as far as one alone decides."""
    precision = stages_of(shape, strategy)[0].precision
    extents = range(1, MAX_PIXELS + 1)
    groups = [group for one, group in UNITS if one == precision]
    values = (
        extents,
        extents,
        range(1, MAX_SLICES + 1),
        (0, 1),
        range(1, MAX_THREADS // WARP + 1),
        range(1, MAX_CREWS + 1),
        groups,
    )
    kernels = {"two": 2, "three": 3}.get(strategy, 1)
    named: dict[str, Sequence[int]] = {
        f"{field}{number or ''}": one for number in range(kernels) for field, one in zip(FIELDS, values, strict=True)
    }
    return named | ({"cut": (1, 2)} if strategy == "two" else {})


def between_width(channels: int, stage: Conv2dShape) -> int:
    """Channels in memory of what lies between kernels: whole vectors."""
    return round_up(channels, UNITS[stage.precision, 1].vector)


# A configuration is checked, estimated and built by the same parts.
@functools.lru_cache(maxsize=16)
def parts_of(shape: ConvShape, config: KernelConfig, device: DeviceSpec) -> tuple[Part, ...]:
    """The kernels of a configuration, in order."""
    stages = stages_of(shape, config.strategy)
    bounds = (0, *cuts_of(config), len(stages))
    parts = []
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        values = tuple(config[f"{field}{number or ''}"] for field in FIELDS)
        in_width = between_width(stages[begin].in_channels, stages[0]) if begin else None
        out_width = between_width(stages[end - 1].out_channels, stages[0]) if end < len(stages) else None
        parts.append(make_part(stages[begin:end], values, device, in_width, out_width))
    return tuple(parts)


def make_part(
    stages: tuple[Conv2dShape, ...],
    values: Iterable[Number],
    device: DeviceSpec,
    in_width: int | None = None,
    out_width: int | None = None,
) -> Part:
    """One kernel from values of `FIELDS`; widths in memory are the channels, unless they are given."""
    tile_h, tile_w, split, deep, warps, crews, group = values
    return Part(
        stages,
        tile_h,
        tile_w,
        split,
        deep,
        warps,
        crews,
        group,
        device,
        in_width or stages[0].in_channels,
        out_width or stages[-1].out_channels,
    )


def make_kernel(
    shape: ConvShape,
    epilogue: Epilogue,
    weights: tuple[ConvWeights, ...],
    config: KernelConfig,
    device: DeviceSpec,
    name: str,
    prologue: Prologue | None,
    tensors: Tensors,
) -> Kernel:
    """Build the kernels: parameters ``(x, weights and biases by stage, [prologue, residual], out, between)``."""
    parts, stages = parts_of(shape, config, device), stages_of(shape, config.strategy)
    if config.strategy == "dense":
        weights = (merge(weights),)
    placed = [(part, stage) for part in parts for stage in range(len(part.stages))]
    constants = {}
    for number, ((part, stage), one) in enumerate(zip(placed, weights, strict=True)):
        constants[f"weight{number}"] = pack_weights(part, stage, one)
        if one.bias is not None:
            constants[f"bias{number}"] = pack_bias(part, stage, one.bias)
    if prologue is not None:
        constants["prologue"] = pack_prologue(parts[0], prologue)
    first, last = stages[0], stages[-1]
    out_shape = (last.batch, last.out_height, last.out_width, last.out_channels)
    between = tuple(
        (last.batch, part.stages[-1].out_height, part.stages[-1].out_width, part.out_width) for part in parts[:-1]
    )
    dtype = first.dtype
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8, "tdc.config": str(config)})
        if device.compute_capability >= 90:
            T.func_attr({"tirx.kernel_launch_params": ["tirx.use_programtic_dependent_launch"]})
        in_width, out_width = tensors.in_width or first.in_channels, tensors.out_width or last.out_channels
        columns = tensors.in_columns or first.width
        x = T.arg("x", T.buffer((first.batch, first.height, columns, in_width), dtype))
        given = {key: T.arg(key, T.buffer((array.size,), str(array.dtype))) for key, array in constants.items()}
        residual = T.arg("residual", T.buffer(out_shape, dtype)) if epilogue.residual else None
        out = T.arg("out", T.buffer((*last.stored_extents[:3], out_width), tensors.out_dtype or dtype))
        middle = [T.arg(f"between{i}", T.buffer(extents, dtype)) for i, extents in enumerate(between)]
        outputs, inputs = [*middle, out], [x, *middle]
        at = 0
        for number, part in enumerate(parts):
            stage_numbers = range(at, at + len(part.stages))
            at += len(part.stages)
            is_last = number == len(parts) - 1
            buffers = Buffers(
                inputs[number],
                outputs[number],
                [given[f"weight{i}"] for i in stage_numbers],
                [given.get(f"bias{i}") for i in stage_numbers],
                residual if is_last else None,
                given.get("prologue") if number == 0 else None,
                tensors.out_start if is_last else 0,
                is_last and tensors.out_dtype is not None,
                [weight_scale(weights[i]) for i in stage_numbers],
            )
            chain = Chain(part, epilogue if is_last else Epilogue(), buffers, prologue if number == 0 else None)
            _emit_kernel(chain, f"{name}_{number}" if len(parts) > 1 else name)
    flat = tuple(array.reshape(-1) for array in constants.values())
    return Kernel(builder.get(), flat, between)


def _emit_kernel(chain: Chain, name: str) -> None:
    part, buffers = chain.part, chain.buffers

    with ExitStack() as frames:
        block = frames.enter_context(T.thread_binding(part.blocks, thread="blockIdx.x"))
        if part.is_cluster:
            frames.enter_context(T.thread_binding(part.split, thread="clusterCtaIdx.x"))
        thread = frames.enter_context(T.thread_binding(part.block_threads, thread="threadIdx.x"))
        # Else ptxas stops at 128 registers where more would fit.
        frames.enter_context(T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", min(2, part.resident)))
        frames.enter_context(T.sblock(name))
        others = (*buffers.biases, buffers.prologue, buffers.residual)
        read = [buffers.x, *buffers.weights, *(buffer for buffer in others if buffer is not None)]
        T.reads(*(_whole(buffer) for buffer in read))
        T.writes(_whole(buffers.out))
        # The blocks of a cluster are neighbours.
        chain.emit(T.Bind(block // part.split), T.Bind(block % part.split), thread)


def _whole(buffer: tirx.Buffer):
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]
