"""Hardware as values: every number that a schedule or the model may know about a machine."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import tvm
from tvm.target import Target

from tdc_tvm.errors import TdcError


@dataclass(frozen=True)
class Probe:
    """What microbenchmarks (`tdc_tvm.probe`) find of a GPU that datasheets omit.

    Parameters
    ----------
    launch_us, dependent_launch_us : float
        A kernel inside a CUDA graph; the same where it was launched before the one before had ended.
    barrier_us, cluster_barrier_us, grid_barrier_us : float
        A barrier of a block, of a cluster of 8 blocks, and of a grid that fills the GPU.
    l2_latency_us : float
        A load that depends on the one before.
    dram_bytes_per_s, l2_bytes_per_s, l2_bytes_per_s_per_core : float
        Read from memory by all processors, from the L2 cache by all, and by one alone.
    shared_bytes_per_s_per_core : float
        Read from one processor's shared memory.
    fma_flops_per_s : float
        FP32 on CUDA cores, a fused multiply-add counted as two.
    mma_flops_per_s : dict of str to float
        Tensor cores by ``mma.sync`` with FP32 sums, by precision.
    clusters : tuple of tuple of int
        How many clusters of 1 to 16 blocks run at once: first of blocks that have a processor each, then of those of
        which two share one, then three; none before sm_90.  Fewer than processors would allow, as a cluster stays in
        one of the chip's groups of them (GPC), which are not alike.
    """

    launch_us: float
    dependent_launch_us: float
    barrier_us: float
    cluster_barrier_us: float
    grid_barrier_us: float
    l2_latency_us: float
    dram_bytes_per_s: float
    l2_bytes_per_s: float
    l2_bytes_per_s_per_core: float
    shared_bytes_per_s_per_core: float
    fma_flops_per_s: float
    mma_flops_per_s: Mapping[str, float] = field(hash=False)
    clusters: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class DeviceSpec:
    """One CPU or GPU.

    Parameters
    ----------
    name : str
        What people call it.
    kind : str
        ``"cpu"`` or ``"cuda"``.
    arch : str
        ``"sm_90"`` for a GPU, LLVM's processor name for a CPU.
    core_count : int
        Streaming multiprocessors, or CPU cores.
    clock_hz : float
        Boost clock of the processors.
    fp32_flops_per_s : float
        Peak FP32 rate of the whole device without tensor cores, a fused multiply-add counted as two.
    tensor_flops_per_s : dict of str to float
        Peak dense rate of the tensor cores with FP32 sums, by precision; what is missing they cannot do.
    dram_bytes_per_s : float
        Peak memory bandwidth.
    l2_bytes : int
        L2 cache: of the chip (GPU), of one core (CPU).
    smem_per_block_bytes, smem_per_block_optin_bytes : int
        Shared memory of a block without and with the opt-in attribute; 0 on a CPU.
    vector_bytes : int
        Width of a SIMD register; 0 on a GPU.
    launch_us : float
        Cost of starting one kernel (GPU) or one parallel region (CPU).
    source : str
        Where the numbers come from.
    probe : Probe or None
        Of a GPU: measured, or scaled by datasheets from one that was; None of a CPU.

    Raises
    ------
    TdcError
        If the kind is another, or a GPU has no probe.
    """

    name: str
    kind: str
    arch: str
    core_count: int
    clock_hz: float
    fp32_flops_per_s: float
    tensor_flops_per_s: Mapping[str, float] = field(hash=False)
    dram_bytes_per_s: float
    l2_bytes: int
    smem_per_block_bytes: int
    smem_per_block_optin_bytes: int
    vector_bytes: int
    launch_us: float
    source: str
    probe: Probe | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cpu", "cuda"):
            raise TdcError(f"unknown kind of device {self.kind!r}; use 'cpu' or 'cuda'")
        if self.kind == "cuda" and self.probe is None:
            raise TdcError(f"the GPU {self.name} has no probe, which the model predicts from; copy that of one in GPUS")

    @property
    def compute_capability(self) -> int:
        """90 for ``"sm_90a"``; 0 for a CPU."""
        return int(self.arch.removeprefix("sm_").rstrip("a")) if self.kind == "cuda" else 0

    @staticmethod
    def from_target(target: Target) -> DeviceSpec:
        """The device that a TVM target stands for.

        Parameters
        ----------
        target : tvm.target.Target
            An ``llvm`` or ``cuda`` target.  A bare GPU architecture such as ``sm_90`` stands for
            the datacentre GPU that has it.

        Raises
        ------
        TdcError
            If the kind or the GPU architecture is not in the table.
        """
        kind = target.kind.name
        if kind == "llvm":
            return cpu_spec(str(target.attrs.get("mcpu", "generic")), cpu_threads())
        if kind == "cuda":
            arch = str(target.attrs["arch"])
            specs: dict[str, DeviceSpec] = {}
            for spec in GPUS.values():
                # What is in "sm_90a" alone began with it: there is no "sm_80a".
                for name in (spec.arch, *([f"{spec.arch}a"] if spec.compute_capability >= 90 else [])):
                    specs.setdefault(name, replace(spec, arch=name))
            if arch in specs:
                return specs[arch]
            known = ", ".join(sorted(specs))
            raise TdcError(f"no device data for GPU architecture {arch}; known: {known}")
        raise TdcError(f"target kind {kind!r} is not supported; use 'llvm' or 'cuda'")


def cpu_threads() -> int:
    """Threads that a CPU model runs with: ``TVM_NUM_THREADS``, or else the physical cores this process may use."""
    given = os.environ.get("TVM_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    allowed = os.sched_getaffinity(0)
    try:
        return len({Path(siblings.format(cpu)).read_text() for cpu in allowed})
    except OSError:
        return len(allowed)


def use_cpu_threads() -> None:
    """Tell TVM's thread pool, which would take half of the cores on x86, whether or not they are hyperthreads."""
    os.environ.setdefault("TVM_NUM_THREADS", str(cpu_threads()))


def _gpu(
    name: str,
    arch: str,
    sms: int,
    mhz: float,
    tflops: float,
    tensor_tflops: tuple[float, float],
    gbs: float,
    l2_mb: float,
    optin_kb: int,
    source: str,
) -> DeviceSpec:
    """One GPU from datasheet figures, and microbenchmarks of an H100.

    ``tensor_tflops`` are dense TF32 and FP16 with FP32 sums; BF16 runs like FP16 where there is TF32.
    """
    tf32, fp16 = (1e12 * rate for rate in tensor_tflops)
    tensor = {"tf32": tf32, "bf16": fp16, "fp16": fp16} if tf32 else {"fp16": fp16}
    probe = _scaled_probe(sms * mhz, mhz, tflops * 1e12, tensor, gbs * 1e9)
    if arch == "sm_90":
        probe = replace(probe, clusters=tuple(map(tuple, _MEASURED["clusters"])))
    optin = optin_kb * 1024
    return DeviceSpec(
        name, "cuda", arch, sms, mhz * 1e6, tflops * 1e12, tensor, gbs * 1e9, int(l2_mb * 2**20), 48 * 1024, optin, 0,
        probe.launch_us, source, probe,
    )  # fmt: skip


# The H100 that was measured: its processors times clock, clock, and peaks as in the table below.
_MEASURED = json.loads(Path(__file__).with_name("h100_probe.json").read_text())["measured"]
_MEASURED_CORES_MHZ, _MEASURED_MHZ, _MEASURED_FP32, _MEASURED_DRAM = 132 * 1980, 1980, 66.9e12, 3350e9
_MEASURED_TENSOR = {"tf32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12}
_MMA_NAMES = {"tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _scaled_probe(cores_mhz: float, mhz: float, fp32: float, tensor: Mapping[str, float], dram: float) -> Probe:
    """The H100's measurements, scaled: times by the clock, rates by what the datasheets promise."""
    clock, chip = mhz / _MEASURED_MHZ, cores_mhz / _MEASURED_CORES_MHZ
    times = {name: value / clock for name, value in _MEASURED.items() if name.endswith("_us")}
    return Probe(
        **times,
        dram_bytes_per_s=_MEASURED["dram_bytes_per_s"] * dram / _MEASURED_DRAM,
        l2_bytes_per_s=_MEASURED["l2_bytes_per_s"] * chip,
        l2_bytes_per_s_per_core=_MEASURED["l2_bytes_per_s_per_core"] * clock,
        shared_bytes_per_s_per_core=_MEASURED["shared_bytes_per_s_per_core"] * clock,
        fma_flops_per_s=_MEASURED["fma_flops_per_s"] * fp32 / _MEASURED_FP32,
        mma_flops_per_s={
            precision: _MEASURED[f"mma_{_MMA_NAMES[precision]}_flops_per_s"] * rate / _MEASURED_TENSOR[precision]
            for precision, rate in tensor.items()
        },
    )


# Opt-in shared memory per block: CUDA C++ Programming Guide, table of technical specifications.
# The order matters: the first entry of an architecture stands for it when only the architecture is known.
GPUS = {
    spec.name: spec
    for spec in (
        _gpu("H100", "sm_90", 132, 1980, 66.9, (494.7, 989.4), 3350, 50, 227, "NVIDIA H100 SXM 80GB datasheet"),
        _gpu("H200", "sm_90", 132, 1980, 66.9, (494.7, 989.4), 4800, 50, 227, "NVIDIA H200 SXM 141GB datasheet"),
        _gpu("A100", "sm_80", 108, 1410, 19.5, (156, 312), 2039, 40, 163, "NVIDIA A100 SXM 80GB datasheet"),
        _gpu("RTX 3090", "sm_86", 82, 1695, 35.6, (35.6, 71), 936, 6, 99, "NVIDIA Ampere GA102 whitepaper"),
        _gpu(
            "RTX 4090", "sm_89", 128, 2520, 82.6, (82.6, 165.2), 1008, 72, 99, "NVIDIA Ada GPU architecture whitepaper"
        ),
        _gpu("L4", "sm_89", 58, 2040, 30.3, (60, 121), 300, 48, 99, "NVIDIA L4 datasheet"),
        _gpu("RTX 2080 Ti", "sm_75", 68, 1545, 13.4, (0, 53.8), 616, 5.5, 64, "NVIDIA Turing TU102 whitepaper"),
    )
}


@functools.cache
def cpu_spec(mcpu: str, threads: int) -> DeviceSpec:
    """A CPU: vector width from LLVM's feature list; the rest typical of a server core at 2.5 GHz."""
    features = set(tvm.target.codegen.llvm_get_cpu_features(Target({"kind": "llvm", "mcpu": mcpu})))
    vector_bytes = 64 if "avx512f" in features else 32 if "avx2" in features else 16
    fma_units = 2
    flops = threads * 2.5e9 * fma_units * 2 * vector_bytes / 4
    return DeviceSpec(
        f"{mcpu} x {threads}",
        "cpu",
        mcpu,
        threads,
        2.5e9,
        flops,
        {},
        10e9 * threads,
        2**20,
        0,
        0,
        vector_bytes,
        3.0,
        "vector width from LLVM's feature list; clock, bandwidth and cache typical, not measured",
    )
