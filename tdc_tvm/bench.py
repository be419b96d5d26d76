"""Measuring models side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import tvm
from tvm.target import Target

from tdc_tvm.compiled_model import CompiledModel, random_inputs
from tdc_tvm.compiler import compiling
from tdc_tvm.cuda_toolchain import cuda_compiler
from tdc_tvm.onnx_model import ModelSource, freeze_shapes, load_onnx
from tdc_tvm.schedules.device import cpu_threads
from tdc_tvm.targets import resolve_target
from tdc_tvm.verify import reference_session


@dataclass(frozen=True)
class Contender:
    """Something to measure: a name and a call that runs it to its end."""

    name: str
    call: Callable[[], object]

    @staticmethod
    def of(name: str, compiled: CompiledModel, seed: int = 0, batch: int | None = None) -> Contender:
        """A compiled model on random input that lies on its device."""
        return Contender(name, compiled.prepared_call(random_inputs(compiled.entry(batch).inputs, seed)))


def onnxruntime_contender(
    name: str, model: ModelSource, compiled: CompiledModel, seed: int = 0, batch: int | None = None
) -> Contender:
    """ONNX Runtime on the input of ``compiled``, which lies on the device that computes.

    That is the model's GPU if ONNX Runtime was built for one (the package onnxruntime-gpu), else the CPU, with as many
    threads as TVM uses, and the name says so.
    """
    import onnxruntime

    is_gpu = compiled.metadata.kind == "cuda"
    device = "cuda" if is_gpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"
    proto = load_onnx(model)
    inputs = compiled.entry(batch).inputs
    freeze_shapes(proto, {info.name: info.shape for info in inputs})
    session = reference_session(proto, cpu_threads(), device)
    binding = session.io_binding()
    for info, value in zip(inputs, random_inputs(inputs, seed), strict=True):
        binding.bind_ortvalue_input(info.name, onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device)

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return Contender(f"{name} (CPU)" if is_gpu and device == "cpu" else name, call)


def tvm_contender(
    name: str, model: ModelSource, compiled: CompiledModel, seed: int = 0, batch: int | None = None
) -> Contender:
    """TVM's default pipeline on the device and the input of ``compiled``, in FP32, without its tuning.

    Raises
    ------
    TdcError
        If TVM cannot compile the model.
    """
    proto, inputs = load_onnx(model), compiled.entry(batch).inputs
    freeze_shapes(proto, {info.name: info.shape for info in inputs})
    executable, _ = build_default(proto, resolve_target(compiled.metadata.kind))
    machine = tvm.runtime.vm.VirtualMachine(executable, compiled.device)
    tensors = [tvm.runtime.tensor(value, compiled.device) for value in random_inputs(inputs, seed)]

    def call() -> None:
        machine["main"](*tensors)
        compiled.device.sync()

    return Contender(name, call)


def build_default(proto: onnx.ModelProto, target: Target) -> tuple[Any, tvm.IRModule]:
    """Compile a model of static shapes by TVM's default pipeline, on GPUs with dlight's schedules.

    Returns
    -------
    tuple
        The executable, and the lowered module.

    Raises
    ------
    TdcError
        If TVM cannot compile the model.
    """
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    context = cuda_compiler(target) if target.kind.name == "cuda" else nullcontext()
    with context, compiling(), target, tvm.transform.PassContext(opt_level=3):
        mod = relax.get_default_pipeline(target)(from_onnx(proto))
        return relax.build(mod, target, relax_pipeline=None), mod


@dataclass(frozen=True)
class Latency:
    """Latencies of one contender in milliseconds, in the order they were taken."""

    name: str
    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The middle one."""
        return float(np.median(self.samples_ms))

    @property
    def p99_ms(self) -> float:
        """The 99th percentile."""
        return float(np.percentile(self.samples_ms, 99))

    @property
    def min_ms(self) -> float:
        """The shortest."""
        return float(np.min(self.samples_ms))

    def to_dict(self) -> dict:
        """Everything as plain data."""
        return {
            "name": self.name,
            "median_ms": self.median_ms,
            "p99_ms": self.p99_ms,
            "min_ms": self.min_ms,
            "samples_ms": list(self.samples_ms),
        }


def measure(
    contenders: Sequence[Contender], *, warmup: int = 5, repeat: int = 50, advance: Callable[[], object] = lambda: None
) -> list[Latency]:
    """Time single calls; the contenders take turns, so that noise of the machine meets all of them.

    Each turn is two calls, of which the second is timed: the first finds the caches filled, and the
    cores kept busy by waiting threads, of the contender before.

    Parameters
    ----------
    contenders : sequence of Contender
        What to measure.
    warmup, repeat : int
        Rounds before and during the measurement.
    advance : callable
        Called after each round, for a progress bar.
    """
    samples: list[list[float]] = [[] for _ in contenders]
    for turn in range(warmup + repeat):
        for contender, times in zip(contenders, samples, strict=True):
            contender.call()
            start = time.perf_counter()
            contender.call()
            if turn >= warmup:
                times.append((time.perf_counter() - start) * 1e3)
        advance()
    return [Latency(contender.name, tuple(times)) for contender, times in zip(contenders, samples, strict=True)]
