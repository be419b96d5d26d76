"""Convolutions and Tucker convolutions on the CPU: FP32, NHWC, one PrimFunc each.

A dense convolution keeps a register tile (pixels x vectors of output channels) over the whole reduction, with
weights packed so that a tile reads them as one stream.  Threads share strips of output rows, chunks of output
channels, or both.  Padding is materialised once per strip in scratch memory.
"""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.cpu import dense, emit, plan, tucker
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
        return tucker.candidates(shape, device)
    return dense.candidates(shape, device)


def reject_reason(shape: ConvShape, config: KernelConfig, device: DeviceSpec) -> str:
    """Why a configuration cannot run; empty if it can.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        What is computed.
    config : KernelConfig
        A configuration, usually one of `candidates`.
    device : DeviceSpec
        Where.
    """
    if device.kind != "cpu":
        return f"a CPU schedule on a device of kind {device.kind!r}"
    wanted = tucker.STRATEGIES if isinstance(shape, TuckerConvShape) else (dense.strategy_of(shape),)
    if config.strategy not in wanted:
        return f"strategy {config.strategy!r} does not fit; expected {' or '.join(wanted)}"
    for stage in _stages(shape):
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
        Parts ``compute`` (wasted lanes, pixels and recomputed halo included), ``copy``, ``memory`` and ``launch``,
        in microseconds.
    """
    if isinstance(shape, TuckerConvShape):
        return tucker.estimate(shape, config, device)
    return dense.estimate(shape, config, device)


def choose(shape: ConvShape, device: DeviceSpec) -> tuple[KernelConfig, Estimate]:
    """The configuration with the lowest estimate; ties go to the smaller configuration.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        What is computed.
    device : DeviceSpec
        A CPU.

    Raises
    ------
    TdcError
        If no candidate can run.
    """
    found = candidates(shape, device)
    rated = [(estimate(shape, config, device), config) for config in found if not reject_reason(shape, config, device)]
    if not rated:
        reason = reject_reason(shape, found[0], device)
        raise TdcError(f"no CPU schedule for {shape} on {device.name}: {reason}; use smaller extents or another device")
    best, config = min(rated, key=lambda item: (item[0].latency_us, item[1]))
    return config, best


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
        The core's padding is zero after the reducing stage's bias.
    config : KernelConfig
        One of `candidates`.
    device : DeviceSpec
        A CPU.
    name : str
        The PrimFunc's name in reports and printed IR.

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
    stages = _stages(shape)
    _check_weights(stages, weights)
    if isinstance(shape, TuckerConvShape):
        blocks = tucker.blocks_of(shape, config, device)
        constants = [array for w, b in zip(weights, blocks, strict=True) for array in dense.pack(w, b, 1)]
    elif config.strategy == "depthwise":
        constants = list(dense.pack_depthwise(weights[0]))
    else:
        blocks_of_group = dense.blocks_of(plan.as_pixels(shape), config, device)
        constants = list(dense.pack(weights[0], blocks_of_group, shape.groups))
    first, last = stages[0], stages[-1]
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name(name)
        T.func_attr(
            {
                "tirx.is_scheduled": True,
                "tirx.noalias": True,
                "op_pattern": 8,
                "tdc.config": f"{config.strategy} {config}",
            }
        )
        x = T.arg("x", T.buffer((first.batch, first.height, first.width, first.in_channels), "float32"))
        packed = [T.arg(f"constant{i}", T.buffer(array.shape, "float32")) for i, array in enumerate(constants)]
        extents = (last.batch, last.out_height, last.out_width, last.out_channels)
        residual = T.arg("residual", T.buffer(extents, "float32")) if epilogue.residual else None
        out = T.arg("out", T.buffer(extents, "float32"))
        flat_residual = None if residual is None else emit.flat(residual)
        operands = dense.Operands(emit.flat(x), packed[0], packed[1], emit.flat(out), flat_residual, epilogue)
        if isinstance(shape, TuckerConvShape):
            tucker.body(shape, config, device, packed, operands)
        else:
            dense.body(shape, config, device, operands)
    return Kernel(builder.get(), tuple(constants))


def _stages(shape: ConvShape) -> tuple[Conv2dShape, ...]:
    return shape.stages if isinstance(shape, TuckerConvShape) else (shape,)


def _check_weights(stages: tuple[Conv2dShape, ...], weights: tuple[ConvWeights, ...]) -> None:
    if len(stages) != len(weights):
        raise TdcError(f"found weights for {len(weights)} stages, expected {len(stages)}")
    for stage, w in zip(stages, weights, strict=True):
        expected = (stage.out_channels, stage.in_channels // stage.groups, *stage.kernel)
        if w.kernel.shape != expected:
            raise TdcError(f"found a kernel of shape {w.kernel.shape} for {stage}, expected {expected}")
        if w.bias is not None and w.bias.shape != (stage.out_channels,):
            raise TdcError(f"found a bias of shape {w.bias.shape} for {stage}, expected {(stage.out_channels,)}")
