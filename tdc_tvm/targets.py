"""From what a user calls a target to a TVM target with everything filled in."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import tvm
from tvm.target import Target

from tdc_tvm.cuda_toolchain import load_cuda_runtime
from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.device import GPUS

_HELP = "use 'auto', 'llvm', 'cuda', 'sm_80', a TVM tag such as 'nvidia/nvidia-h100', or a tvm Target"


def resolve_target(target: str | Target) -> Target:
    """The target to build for.

    Parameters
    ----------
    target : str or tvm.target.Target
        ``"auto"`` is this machine's GPU, or its CPU where there is none; ``"llvm"`` is this
        machine's CPU with all its instructions, ``"cuda"`` its GPU; ``"sm_90"`` and the like name a
        GPU architecture; other names are TVM's tags.  A Target is taken as it is, for a lesser CPU
        for example: ``Target({"kind": "llvm", "mcpu": "haswell"})``.

    Raises
    ------
    TdcError
        If the name is unknown, or ``"cuda"`` is asked for on a machine without a GPU.
    """
    host = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}
    if isinstance(target, Target):
        if target.kind.name not in ("llvm", "cuda"):
            raise TdcError(f"target kind {target.kind.name!r} is not supported; {_HELP}")
        if target.kind.name == "cuda" and target.host is None:
            return Target(target, host=Target(host))
        cpu = target if target.kind.name == "llvm" else target.host
        processor = str(cpu.attrs.get("mcpu", "generic"))
        triple = str(cpu.attrs.get("mtriple", tvm.target.codegen.llvm_get_system_triple()))
        if processor != "generic" and not tvm.target.codegen.llvm_is_valid_cpu(processor, triple):
            raise TdcError(f"LLVM knows no processor {processor!r}; see tvm.target.codegen.llvm_get_cpu_archlist()")
        return target
    if not isinstance(target, str):
        raise TdcError(f"a target is text or a tvm Target; found {type(target).__name__}; {_HELP}")
    if target == "auto":
        target = "cuda" if local_gpu_arch() else "llvm"
    if target == "llvm":
        return Target(host)
    if target == "cuda":
        arch = local_gpu_arch()
        if arch is None:
            raise TdcError(
                "target 'cuda' is this machine's GPU, and there is none; name the architecture, such as 'sm_90'"
            )
        target = arch
    if target.startswith("sm_"):
        return Target({"kind": "cuda", "arch": target, "host": host})
    try:
        return resolve_target(Target(target))
    except (ValueError, TypeError, RuntimeError) as error:
        raise TdcError(f"unknown target {target!r} ({str(error).strip().splitlines()[-1]}); {_HELP}") from None


def local_gpu() -> tvm.runtime.Device | None:
    """The first GPU of this machine; None if there is none that TVM can use."""
    # TVM looks for CUDA's runtime library in the system's folders alone; pip installs it elsewhere.
    with suppress(OSError, TdcError):
        ctypes.CDLL("libcuda.so.1")
        load_cuda_runtime()
    device = tvm.cuda(0)
    return device if device.exist else None


def local_name(target: str | Target = "auto") -> str | None:
    """What the GPU is called that a target stands for, if that is this machine's; measurements count for no other.

    The table's name, such as ``"H100"``, or the driver's of one that the table does not have.  None of a target that
    names an architecture.
    """
    if not isinstance(target, str) or target not in ("auto", "cuda"):
        return None
    device = local_gpu()
    return None if device is None else gpu_name(device.device_name, device.multi_processor_count)


def gpu_name(name: str, cores: int) -> str:
    """The table's name of a GPU that the driver calls ``name``; one of as many processors, or else it is another."""
    known = [spec.name for spec in GPUS.values() if spec.name in name and spec.core_count == cores]
    return max(known, key=len, default=name)


def local_gpu_arch() -> str | None:
    """The architecture of this machine's first GPU, such as ``"sm_90a"``; None if there is none."""
    device = local_gpu()
    return None if device is None else gpu_arch(device)


def gpu_arch(device: tvm.runtime.Device) -> str:
    """The architecture of a GPU, on this machine or not, with all that is in no other (``a``)."""
    major, minor = str(device.compute_version).split(".")
    return f"sm_{major}{minor}" + ("a" if int(major) >= 9 else "")
