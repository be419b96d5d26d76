"""Convolutions on NVIDIA GPUs, FP32, NHWC: the strategies behind one interface."""

from __future__ import annotations

from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.cuda import direct, tile
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, Estimate, Kernel, KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, ConvShape, Epilogue


def candidates(shape: ConvShape, device: DeviceSpec) -> list[KernelConfig]:
    """Every configuration that the model chooses from.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        The convolution; a Tucker convolution becomes one kernel.
    device : DeviceSpec
        The GPU.

    Returns
    -------
    list[KernelConfig]
        None of them is rejected.
    """
    if isinstance(shape, Conv2dShape):
        return direct.candidates(shape, device)
    return tile.candidates(shape, device)


def reject_reason(shape: ConvShape, config: KernelConfig, device: DeviceSpec) -> str:
    """Why a configuration cannot run on a device, with numbers; empty if it can."""
    expected = direct.STRATEGY if isinstance(shape, Conv2dShape) else tile.STRATEGY
    if config.strategy != expected:
        return f"strategy {config.strategy!r} is not for {shape}; expected {expected!r}"
    if isinstance(shape, Conv2dShape):
        return direct.reject_reason(shape, config, device)
    return tile.reject_reason(shape, config, device)


def estimate(shape: ConvShape, config: KernelConfig, device: DeviceSpec) -> Estimate:
    """Predict the latency of a configuration that can run."""
    if isinstance(shape, Conv2dShape):
        return direct.estimate(shape, config, device)
    return tile.estimate(shape, config, device)


def choose(shape: ConvShape, device: DeviceSpec) -> tuple[KernelConfig, Estimate]:
    """The configuration with the lowest predicted latency; of equals the first in order.

    Raises
    ------
    TdcError
        If no configuration can run.
    """
    estimates = [(config, estimate(shape, config, device)) for config in candidates(shape, device)]
    if not estimates:
        raise TdcError(
            f"no CUDA schedule for {shape}: even one pixel needs more shared memory than the "
            f"{device.smem_per_block_optin_bytes // 1024} KB of {device.name}; lower the ranks"
        )
    return min(estimates, key=lambda pair: (pair[1].latency_us, pair[0]))


def make_kernel(
    shape: ConvShape,
    epilogue: Epilogue,
    weights: tuple[ConvWeights, ...],
    config: KernelConfig,
    device: DeviceSpec,
    name: str,
) -> Kernel:
    """Build a kernel and pack its weights.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        The convolution.
    epilogue : Epilogue
        What follows it.
    weights : tuple[ConvWeights, ...]
        One stage, or the three of a Tucker convolution; each can have a bias.
    config : KernelConfig
        How to compute it.
    device : DeviceSpec
        The GPU to compile for.
    name : str
        What the kernel's block is called.

    Returns
    -------
    Kernel
        Its function has no ``global_symbol``.

    Raises
    ------
    TdcError
        If the configuration cannot run on the device.
    """
    reason = reject_reason(shape, config, device)
    if reason:
        raise TdcError(f"cannot run {config} for {shape}: {reason}")
    if isinstance(shape, Conv2dShape):
        return direct.make_kernel(shape, epilogue, weights, config, name)
    return tile.make_kernel(shape, epilogue, weights, config, device, name)
