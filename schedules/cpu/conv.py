"""Convolutions and Tucker convolutions on the CPU: FP32, NHWC, one PrimFunc each.

A dense convolution keeps a register tile (pixels x vectors of output channels) over the whole reduction, with
weights packed so that a tile reads them as one stream.  Threads share strips of output rows, chunks of output
channels, or both.  Padding is materialised once per strip in scratch memory.
"""

from __future__ import annotations

from types import ModuleType

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.cpu import dense, emit, plan, tucker
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, Estimate, Kernel, KernelConfig, check_weights
from tdc_tvm.schedules.shape import ConvShape, Epilogue, TuckerConvShape, oversize_reason, stages_of


def candidates(shape: ConvShape, device: DeviceSpec) -> list[KernelConfig]:
    """Every configuration worth considering, in a fixed order.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        What is computed.
    device : DeviceSpec
        A CPU.

    Raises
    ------
    TdcError
        If none can run: another precision than FP32, a tensor that 32-bit indices do not reach.
    """
    reason = _shape_reason(shape, device)
    if reason:
        raise TdcError(f"no CPU schedule for {shape}: {reason}")
    return _schedules(shape).candidates(shape, device)


def _schedules(shape: ConvShape) -> ModuleType:
    return tucker if isinstance(shape, TuckerConvShape) else dense


def _shape_reason(shape: ConvShape, device: DeviceSpec) -> str:
    """Why no configuration can compute a shape, with numbers; empty if some can."""
    stages = stages_of(shape)
    if device.kind != "cpu":
        return f"a CPU schedule on a device of kind {device.kind!r}"
    if stages[0].precision != "fp32":
        return f"needs {stages[0].precision}; CPUs compute in fp32 only"
    if stages[-1].pool:
        return "stores maxima of 2x2, which only CUDA schedules do"
    return oversize_reason(stages)


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
    reason = _shape_reason(shape, device)
    if reason:
        return reason
    wanted = tuple(tucker.PARAMETERS) if isinstance(shape, TuckerConvShape) else (dense.strategy_of(shape),)
    if config.strategy not in wanted:
        return f"strategy {config.strategy!r} does not fit; expected {' or '.join(wanted)}"
    schedules = _schedules(shape)
    reason = config.reject_reason(plan.allowed(schedules.PARAMETERS[config.strategy], device))
    return reason or schedules.reject_reason(shape, config, device)


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

    Raises
    ------
    TdcError
        If the configuration cannot run.
    """
    reason = reject_reason(shape, config, device)
    if reason:
        raise TdcError(f"cannot estimate {shape} with {config.strategy} ({config}): {reason}")
    return _schedules(shape).estimate(shape, config, device)


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
    rated = [(estimate(shape, config, device), config) for config in candidates(shape, device)]
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
    check_weights(shape, weights)
    stages = stages_of(shape)
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
