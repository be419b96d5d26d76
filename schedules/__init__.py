"""Devices, convolution shapes, kernel configurations, the analytical model and the TensorIR schedules."""

from __future__ import annotations

from types import ModuleType

from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.device import DeviceSpec


def backend(device: DeviceSpec) -> ModuleType:
    """The module of convolution schedules for a device.

    It has ``candidates``, ``reject_reason``, ``estimate``, ``choose`` and ``make_kernel``.

    Raises
    ------
    TdcError
        If it is not a device.
    """
    if not isinstance(device, DeviceSpec):
        raise TdcError(f"found the device {device!r}; expected a DeviceSpec of kind 'cpu' or 'cuda'")
    if device.kind == "cuda":
        from tdc_tvm.schedules.cuda import conv
    else:
        from tdc_tvm.schedules.cpu import conv  # type: ignore[no-redef]
    return conv
