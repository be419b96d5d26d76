"""Contenders of `compare_tuners` that have a compiler of their own: MetaSchedule, TVM's default schedules, cuDNN.

The first two compile the same graph operators, a function for each stage: convolution, and for the last stage of a
Tucker layer bias and ReLU, fused into it.  They sum in FP32.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_layers
import build_layers
import gpu_layers
import numpy as np

from tdc_tvm.errors import TdcError

if TYPE_CHECKING:
    from tvm import tirx
    from tvm.target import Target

    from tdc_tvm.measure import LocalMeasurer
    from tdc_tvm.metaschedule import MetaSchedule, Trial
    from tdc_tvm.schedules.device import DeviceSpec
    from tdc_tvm.schedules.shape import Conv2dShape, ConvShape

# By layout: the order of the activations' axes and of the kernel's, of which ours are NHWC and OIHW.
LAYOUTS = {"NHWC": ("HWIO", (0, 1, 2, 3), (2, 3, 1, 0)), "NCHW": ("OIHW", (0, 3, 1, 2), (0, 1, 2, 3))}
# What ONNX has, and so what TVM's default pipeline gets.
DEFAULT_LAYOUT = "NCHW"
# Of timing a whole layer, about, and after which it has failed.
SECONDS, TIMEOUT_S = 0.3, 120.0
# Schedules that MetaSchedule may present, one after the other, until the layer's result is right.
FINALISTS = 3


def check_shape(shape: ConvShape) -> None:
    """Refuse what these contenders do not compute.

    Raises
    ------
    TdcError
        If the layer has a prologue, maxima, a bias of its first stage, or asymmetric padding, or is in BF16.
    """
    from tdc_tvm.schedules.shape import stages_of

    first, last = stages_of(shape)[0], stages_of(shape)[-1]
    is_plain = not (first.prologue or last.pool or getattr(shape, "reduce_bias", False))
    if not is_plain or first.precision == "bf16" or any(one.padding[:2] != one.padding[2:] for one in stages_of(shape)):
        raise TdcError(
            f"MetaSchedule, TVM and cuDNN are compared on convolutions and Tucker layers with symmetric padding in"
            f" fp32, tf32 or fp16; found {shape}: leave it out, or these contenders"
        )


def check_cudnn() -> None:
    """Refuse to go on where cuDNN cannot run.

    Raises
    ------
    TdcError
        If PyTorch finds no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise TdcError("cuDNN runs on GPUs, and PyTorch finds none here; leave out the contender cudnn")


def stage_function(stage: Conv2dShape, layout: str, has_end: bool, default: Target | None = None) -> tirx.PrimFunc:
    """A stage as TVM's graph compiler lowers and fuses it.

    Parameters
    ----------
    stage : Conv2dShape
        The convolution.
    layout : str
        One of `LAYOUTS`.
    has_end : bool
        Whether a bias and a ReLU come behind it.
    default : tvm.target.Target, optional
        Schedule it as TVM's default pipeline for this target does, which on CPUs is not at all.

    Returns
    -------
    tvm.tirx.PrimFunc
        Of ``(x, kernel, [bias], out)``; the bias is FP32.
    """
    import tvm
    from tvm import relax

    kernel_layout, order, kernel_order = LAYOUTS[layout]
    x_extents = (stage.batch, stage.height, stage.width, stage.in_channels)
    kernel_extents = (stage.out_channels, stage.in_channels // stage.groups, *stage.kernel)
    bias_extents = tuple(stage.out_channels if axis == 3 else 1 for axis in order)
    x = relax.Var("x", relax.TensorType([x_extents[axis] for axis in order], stage.dtype))
    kernel = relax.Var("kernel", relax.TensorType([kernel_extents[axis] for axis in kernel_order], stage.dtype))
    bias = [relax.Var("bias", relax.TensorType(bias_extents, "float32"))] if has_end else []
    builder = relax.BlockBuilder()
    with builder.function("main", [x, kernel, *bias]):
        with builder.dataflow():
            value = builder.emit(
                relax.op.nn.conv2d(
                    x, kernel, stage.stride, stage.padding, stage.dilation, stage.groups, layout, kernel_layout,
                    out_dtype="float32",
                )
            )  # fmt: skip
            if has_end:
                value = builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(value, bias[0]))))
            if stage.dtype != "float32":
                value = builder.emit(relax.op.astype(value, stage.dtype))
            out = builder.emit_output(value)
        builder.emit_func_output(out)
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    if default is not None and default.kind.name == "cuda":
        from tvm.relax.backend.cuda import pipeline

        passes = pipeline.legalize_passes(default)
    with default or tvm.target.Target({"kind": "llvm"}):
        mod = tvm.transform.Sequential(passes)(builder.get())
    (function,) = (one for one in mod.functions.values() if isinstance(one, tvm.tirx.PrimFunc))
    return function


def stage_functions(shape: ConvShape, layout: str, default: Target | None = None) -> dict[str, tirx.PrimFunc]:
    """Of all stages, by name, in order."""
    from tdc_tvm.schedules.shape import stages_of

    stages = stages_of(shape)
    ends = [len(stages) > 1 and stage is stages[-1] for stage in stages]
    return {
        f"stage{number}": stage_function(stage, layout, has_end, default)
        for number, (stage, has_end) in enumerate(zip(stages, ends, strict=True))
    }


def time_layer(library: str, shape: ConvShape, layout: str, device: DeviceSpec, seconds: float) -> list[float]:
    """Check a layer's stages, launched behind each other, then time them by the clock that ours are timed by.

    Returns
    -------
    list of float
        Times of a launch of all in us, within a CUDA graph of several.

    Raises
    ------
    ArithmeticError
        If the result is wrong.
    """
    import tvm

    from tdc_tvm.cuda_toolchain import load_cuda_runtime
    from tdc_tvm.measure import Case, make_clock
    from tdc_tvm.schedules.device import use_cpu_threads
    from tdc_tvm.schedules.shape import stages_of

    if device.kind == "cuda":
        load_cuda_runtime()
    use_cpu_threads()
    place = tvm.cuda(0) if device.kind == "cuda" else tvm.cpu(0)
    module, case = tvm.runtime.load_module(library), Case.of(shape)
    _, order, kernel_order = LAYOUTS[layout]

    def tensor(array: np.ndarray, axes: tuple[int, ...], dtype: str) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array.transpose(axes)).astype(dtype), place)

    value = tensor(case.x, order, stages_of(shape)[0].dtype)
    calls = []
    for number, (stage, weights) in enumerate(zip(stages_of(shape), case.weights, strict=True)):
        arguments = [value, tensor(weights.kernel, kernel_order, stage.dtype)]
        if weights.bias is not None:
            arguments.append(tensor(weights.bias.reshape(1, 1, 1, -1), order, "float32"))
        # What a kernel leaves out stays NaN.
        value = tensor(np.full(stage.stored_extents, math.nan), order, stage.dtype)
        calls.append((module[f"stage{number}"], [*arguments, value]))

    def launch() -> None:
        for function, arguments in calls:
            function(*arguments)

    launch()
    case.check(value.numpy().transpose(np.argsort(order)))
    return make_clock(device, seconds)(launch)


def build_and_time(
    functions: Mapping[str, Any],
    target: Target,
    shape: ConvShape,
    layout: str,
    device: DeviceSpec,
    config: Mapping[str, Any],
) -> float:
    """The median time of a layer of scheduled stages in us, in a process that a bad kernel can take down.

    Returns
    -------
    float
        Infinite if it failed, which is warned of.
    """
    import tvm

    from tdc_tvm.metaschedule import build_library

    named = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        path = Path(folder, "layer.so")
        try:
            build_library(tvm.IRModule(named), target, path, config)
            samples = pool.submit(time_layer, str(path), shape, layout, device, SECONDS).result(TIMEOUT_S)
        except (RuntimeError, ArithmeticError, TimeoutError, BrokenProcessPool) as error:
            for process in (pool._processes or {}).values():
                process.kill()
            warnings.warn(f"{shape}: {type(error).__name__}: {str(error)[:500]}", stacklevel=2)
            return math.inf
    return float(np.median(samples))


@functools.cache
def _tuner(target: str) -> MetaSchedule:
    """Its processes stay from layer to layer."""
    from tdc_tvm.metaschedule import MetaSchedule
    from tdc_tvm.targets import resolve_target

    return MetaSchedule(resolve_target(target))


def metaschedule(
    shape: ConvShape, measurer: LocalMeasurer, trials: int, seed: int, layout: str = "NHWC"
) -> tuple[list[Trial], float]:
    """MetaSchedule's search: its trials, and the time of its best as a whole in us.

    Stages are searched together; a trial's time is that of the layer if the other stages are the best so far.  In NHWC
    a 1x1 is a matrix product as it stands, and threads load channels as vectors; tensor cores fit both layouts.
    """
    from tdc_tvm.metaschedule import BUILD_CONFIG, open_database

    tuner, begin = _tuner(measurer.target), time.monotonic()
    functions = stage_functions(shape, layout)
    best = dict.fromkeys(functions, math.inf)
    found: list[Trial] = []

    def observe(trial: Trial) -> None:
        best[trial.function] = min(best[trial.function], trial.us)
        others_us = sum(us for name, us in best.items() if name != trial.function)
        found.append(replace(trial, us=trial.us + others_us, seconds=round(time.monotonic() - begin, 3)))

    with tempfile.TemporaryDirectory() as folder:
        database = open_database(Path(folder))
        tuner.tune(functions, trials, database, seed=seed, observe=observe)
        # MetaSchedule does not look at results: where the fastest are wrong, the next ones count.
        for rank in range(FINALISTS):
            scheduled = {name: tuner.best(function, database, rank) for name, function in functions.items()}
            if None in scheduled.values():
                break
            final_us = build_and_time(scheduled, tuner.target, shape, layout, measurer.device, BUILD_CONFIG)
            if math.isfinite(final_us):
                return found, final_us
    return found, math.inf


def tvm_default(shape: ConvShape, measurer: LocalMeasurer) -> float:
    """The time in us of what TVM's default pipeline gives."""
    from tdc_tvm.metaschedule import limited
    from tdc_tvm.targets import resolve_target

    target = limited(resolve_target(measurer.target))
    functions = stage_functions(shape, DEFAULT_LAYOUT, target)
    return build_and_time(functions, target, shape, DEFAULT_LAYOUT, measurer.device, {})


def cudnn(shape: ConvShape) -> float:
    """The time in us of the best way that PyTorch with cuDNN has, of those of `bench_layers`."""
    import torch

    check_cudnn()
    layer = build_layers.describe(shape, ())
    with torch.inference_mode():
        gpu = gpu_layers.Gpu(Path(), {"layers": {"layer": layer}, "precision": layer["precision"]})
        ways = {one.name: one for one in bench_layers.cudnn(gpu, layer, "stages", "cudnn")}
        times = gpu_layers.alternate(gpu, list(ways.values()), bench_layers.LAUNCHES, SECONDS / 2, most=10)
        best = min(times, key=lambda name: times[name]["median_us"])
        final = gpu_layers.alternate(gpu, [ways[best]], bench_layers.LAUNCHES, SECONDS)
    return float(final[best]["median_us"])
