"""Measuring configurations: on this machine, or from what was measured before; on others by `measure_rpc`.

`LocalMeasurer` times as ``scripts/oracle.py`` does: launches within a CUDA graph, which repeat on the same data.
"""

from __future__ import annotations

import math
import multiprocessing
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, KernelConfig, Prologue
from tdc_tvm.schedules.shape import Conv2dShape, ConvShape, Epilogue, TuckerConvShape, stages_of
from tdc_tvm.search import Measurement

# Takes times of one launch in microseconds, many of them.
Clock = Callable[[Callable[[], None]], list[float]]
# Launches of a graph; replays of one at most.
_LAUNCHES, _REPLAYS = 20, 200
# Of a sample of kernels on the CPU, at least.
_SAMPLE_SECONDS = 1e-3
# The relative error that rounding explains, by the number of products behind a result; as in scripts/gpu_layers.py.
_TOLERANCES: dict[str, Callable[[int], float]] = {
    "fp32": lambda depth: 1e-6 * math.sqrt(depth),
    "tf32": lambda depth: 1e-3,
    "fp16": lambda depth: 2e-3,
    "bf16": lambda depth: 1e-2,
}


class ReplayMeasurer:
    """Answers with what was measured before, so that a search can be tried on any machine.

    Parameters
    ----------
    stored : mapping of shape to mapping of KernelConfig to Measurement
        What was measured.
    """

    def __init__(self, stored: Mapping[ConvShape, Mapping[KernelConfig, Measurement]]) -> None:
        self.stored = stored

    def measure(self, shape: ConvShape, configs: Sequence[KernelConfig]) -> Iterator[Measurement]:
        """One after the other.

        Raises
        ------
        TdcError
            If one was not measured.
        """
        known = self.stored.get(shape, {})
        for config in configs:
            if config not in known:
                raise TdcError(f"{config.strategy} {config} of {shape} was not measured; there is nothing to replay")
            yield known[config]


class LocalMeasurer:
    """Builds, checks and times kernels on this machine, in a process that a bad one can take down.

    A Tucker convolution has a bias at its end and a ReLU, a plain one neither.  A kernel whose result is wrong has
    failed.

    Parameters
    ----------
    target : str
        ``"sm_90a"`` and the like, or ``"llvm"``.
    device : DeviceSpec
        What the kernels are built for.
    seconds : float
        Of timing for a configuration, about.
    timeout_s : float
        After which a kernel that does not answer has failed; so long may the build of a batch take, too.
    """

    def __init__(self, target: str, device: DeviceSpec, seconds: float = 0.05, timeout_s: float = 120.0) -> None:
        self.target, self.device, self.seconds, self.timeout_s = target, device, seconds, timeout_s
        self._worker: Worker | None = None

    def measure(self, shape: ConvShape, configs: Sequence[KernelConfig]) -> Iterator[Measurement]:
        """One after the other, as they come; what ends the process or hangs it is an error of its own."""
        left = list(configs)
        try:
            while left:
                begin = time.monotonic()
                answer = self._ask(shape, left)
                if answer and len(left) > 1:
                    self.close()
                    # Which of them is to blame shows where each is built by itself.
                    for config in left:
                        yield from self.measure(shape, [config])
                    return
                while left and self._worker is not None:
                    answer = answer or self._wait()
                    config = left.pop(0)
                    result = answer if isinstance(answer, Measurement) else Measurement(config, error=str(answer))
                    # Such an error can be of the GPU, which then answers that process no more.
                    if result.error and not result.error.startswith(_OWN_ERRORS):
                        self.close()
                    yield replace(result, seconds=time.monotonic() - begin)
                    begin, answer = time.monotonic(), ""
        finally:
            # Who stops in the midst of a batch leaves results that nobody asked for.
            if left:
                self.close()

    def close(self) -> None:
        """End the process; the next measurement begins a new one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> LocalMeasurer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, shape: ConvShape, configs: Sequence[KernelConfig]) -> str:
        """Have kernels built; why that failed, if it did."""
        if self._worker is None:
            self._worker = Worker(_work, self.target, self.device, self.seconds)
        return self._worker.ask((shape, list(configs))) or str(self._wait())

    def _wait(self) -> Any:
        assert self._worker is not None
        return self._worker.wait(self.timeout_s)


# What says nothing about the GPU's state.
NOT_BUILT, _WRONG = "was not built: ", "wrong result: "
_OWN_ERRORS = (NOT_BUILT, _WRONG)


class Worker:
    """A process that does what it is asked, until its end of the connection closes.

    Parameters
    ----------
    work : callable
        Of a module, to be found by name in a new process; is given the connection, and then ``arguments``.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, job: Any) -> str:
        """Give it a job; why that failed, if it did."""
        try:
            self.connection.send(job)
        except OSError:
            return self._status()
        return ""

    def wait(self, timeout_s: float) -> Any:
        """What it sends, or text that says why nothing comes."""
        if not self.connection.poll(timeout_s):
            return f"no result in {timeout_s:g} s"
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return self._status()

    def close(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _status(self) -> str:
        self.process.join()
        return f"the process ended with status {self.process.exitcode}"


def _work(connection: Connection, target: str, device: DeviceSpec, seconds: float) -> None:
    """Build each batch, say so by an empty message, and send a measurement of each."""
    clock: Clock | None = None
    # The process that asks may be gone.
    with suppress(EOFError, OSError):
        while True:
            shape, configs = connection.recv()
            case = Case.of(shape)
            built = build_kernels(case, target, device, configs)
            connection.send("")
            clock = clock or make_clock(device, seconds)
            for config, kernel in zip(configs, built, strict=True):
                try:
                    result = Measurement(config, tuple(_run(case, kernel, device, clock)), kernel.error)
                except ArithmeticError as error:
                    result = Measurement(config, error=str(error))
                except Exception as error:
                    result = Measurement(config, error=f"{type(error).__name__}: {error}"[:2000])
                connection.send(result)


@dataclass(frozen=True)
class Case:
    """A convolution on random data, the same on every machine, and what should come of it.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        The convolution.
    weights : tuple of ConvWeights
        Of its stages.
    x, expected : numpy.ndarray
        Input, in the type that is stored, and output in float64; NHWC.
    epilogue, prologue
        What comes behind and before.
    """

    shape: ConvShape
    weights: tuple[ConvWeights, ...]
    x: np.ndarray
    expected: np.ndarray
    epilogue: Epilogue
    prologue: Prologue | None

    @staticmethod
    def of(shape: ConvShape) -> Case:
        """Seeded by the shape."""
        from tdc_tvm.schedules.cuda.pack import round_to

        rng = np.random.default_rng(zlib.crc32(str(shape).encode()))
        is_tucker, stages = isinstance(shape, TuckerConvShape), stages_of(shape)
        first, last = stages[0], stages[-1]
        weights = []
        for stage in stages:
            extents = (stage.out_channels, stage.in_channels // stage.groups, *stage.kernel)
            kernel = round_to(stage.precision, rng.standard_normal(extents) / math.sqrt(math.prod(extents[1:])))
            has_bias = is_tucker and (stage is last or (stage is first and getattr(shape, "reduce_bias", False)))
            bias = rng.standard_normal(stage.out_channels).astype(np.float32) if has_bias else None
            weights.append(ConvWeights(kernel.astype(np.float32), bias))
        x = round_to(first.precision, rng.standard_normal((first.batch, first.height, first.width, first.in_channels)))
        prologue = None
        value = x.astype(np.float64)
        if first.prologue:
            scale, shift = (rng.standard_normal(first.in_channels).astype(np.float32) for _ in range(2))
            prologue = Prologue(scale, shift, clip_min=0.0)
            value = round_to(first.precision, np.maximum(value * scale + shift, 0)).astype(np.float64)
        for stage, one in zip(stages, weights, strict=True):
            value = _convolve(stage, value, one)
        epilogue = Epilogue(clip_min=0.0 if is_tucker else None)
        value = np.maximum(value, 0) if is_tucker else value
        return Case(shape, tuple(weights), x, _maxima(value) if last.pool else value, epilogue, prologue)

    def check(self, out: np.ndarray) -> None:
        """Raise ArithmeticError if rounding does not explain the error of an output."""
        stages = stages_of(self.shape)
        limit = _TOLERANCES[stages[0].precision](sum(stage.weight_count // stage.out_channels for stage in stages))
        error = np.linalg.norm(out.astype(np.float64) - self.expected) / np.linalg.norm(self.expected)
        if not error <= limit:
            raise ArithmeticError(f"{_WRONG}relative error {error:.2e}, at most {limit:.2e} expected")


def _convolve(shape: Conv2dShape, x: np.ndarray, weights: ConvWeights) -> np.ndarray:
    """One convolution in float64, tap by tap."""
    (top, left, bottom, right), groups = shape.padding, shape.groups
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    kernel = weights.kernel.astype(np.float64).reshape(groups, shape.out_channels // groups, -1, *shape.kernel)
    out = np.zeros((shape.batch, shape.out_height, shape.out_width, groups, kernel.shape[1]))
    for row in range(shape.kernel[0]):
        for column in range(shape.kernel[1]):
            top, left = row * shape.dilation[0], column * shape.dilation[1]
            bottom, right = (
                begin + step * (extent - 1) + 1
                for begin, step, extent in zip(
                    (top, left), shape.stride, (shape.out_height, shape.out_width), strict=True
                )
            )
            taken = padded[:, top : bottom : shape.stride[0], left : right : shape.stride[1]]
            for group in range(groups):
                depth = kernel.shape[2]
                channels = taken[..., group * depth : (group + 1) * depth]
                out[..., group, :] += channels @ kernel[group, :, :, row, column].T
    flat = out.reshape(*out.shape[:3], shape.out_channels)
    return flat if weights.bias is None else flat + weights.bias


def _maxima(value: np.ndarray) -> np.ndarray:
    """Of each whole 2x2."""
    rows, columns = value.shape[1] // 2, value.shape[2] // 2
    whole = value[:, : 2 * rows, : 2 * columns]
    return whole.reshape(value.shape[0], rows, 2, columns, 2, -1).max(axis=(2, 4))


@dataclass(frozen=True)
class BuiltKernel:
    """A function of a compiled library, or why there is none.

    Parameters
    ----------
    library, name
        The library, and what it calls the function.
    constants : sequence of numpy.ndarray
        What it takes after its input.
    between : sequence of tuple of int
        Extents of what it takes after its output, to write to.
    error : str
        Why there is none.
    """

    library: Any
    name: str
    constants: Sequence[np.ndarray]
    between: Sequence[tuple[int, ...]]
    error: str = ""


def build_kernels(case: Case, target: str, device: DeviceSpec, configs: Sequence[KernelConfig]) -> list[BuiltKernel]:
    """Compile the configurations as one library; if that fails, each by itself."""
    import tvm

    from tdc_tvm.cuda_toolchain import cuda_compiler
    from tdc_tvm.quiet import without_chatter
    from tdc_tvm.schedules import backend
    from tdc_tvm.schedules.cuda.lowering import TIR_PIPELINE
    from tdc_tvm.targets import resolve_target

    resolved = resolve_target(target)
    is_gpu = device.kind == "cuda"
    try:
        kernels = {}
        for number, config in enumerate(configs):
            further = {"prologue": case.prologue} if is_gpu else {}
            kernels[f"k{number}"] = backend(device).make_kernel(
                case.shape, case.epilogue, case.weights, config, device, "conv", **further
            )
        functions = {name: kernel.func.with_attr("global_symbol", name) for name, kernel in kernels.items()}
        with cuda_compiler(resolved) if is_gpu else nullcontext(), without_chatter(), resolved:
            library = tvm.tirx.build(
                tvm.IRModule(functions), target=resolved, pipeline=TIR_PIPELINE if is_gpu else "default"
            )
    except Exception as error:
        if len(configs) == 1:
            return [BuiltKernel(None, "", (), (), f"{NOT_BUILT}{type(error).__name__}: {error}"[:2000])]
        return [built for config in configs for built in build_kernels(case, target, device, [config])]
    return [BuiltKernel(library, name, kernel.constants, kernel.between) for name, kernel in kernels.items()]


def _run(case: Case, kernel: BuiltKernel, device: DeviceSpec, clock: Clock) -> list[float]:
    """Check a kernel, then time it; no times of one that was not built."""
    import tvm

    if kernel.error:
        return []
    function = kernel.library[kernel.name]
    arguments = checked_arguments(case, kernel, function, tvm.cuda(0) if device.kind == "cuda" else tvm.cpu(0))
    return clock(lambda: function(*arguments))


def checked_arguments(case: Case, kernel: BuiltKernel, function: Any, place: Any) -> list[Any]:
    """What a kernel's function takes on a device, of this machine or not, after a launch whose result was right.

    Raises
    ------
    ArithmeticError
        If it was wrong.
    """
    import tvm

    dtype = stages_of(case.shape)[0].dtype
    inputs = [tvm.runtime.tensor(array, place) for array in (case.x, *kernel.constants)]
    # What a kernel leaves out stays NaN.
    outputs = [
        tvm.runtime.tensor(np.full(extents, np.nan).astype(case.x.dtype), place)
        for extents in (case.expected.shape, *kernel.between)
    ]
    assert str(outputs[0].dtype) == dtype, "the input has the type that is stored"
    function(*inputs, *outputs)
    case.check(outputs[0].numpy())
    return [*inputs, *outputs]


def make_clock(device: DeviceSpec, seconds: float) -> Clock:
    """What takes the times of a launch."""
    if device.kind == "cuda":
        from tdc_tvm.probe import Stream

        stream = Stream()
        return lambda launch: [round(us, 3) for us in stream.samples_us(launch, _LAUNCHES, _REPLAYS, seconds)]

    def time_on_cpu(launch: Callable[[], None]) -> list[float]:
        begin = time.perf_counter()
        launch()
        count = max(1, math.ceil(_SAMPLE_SECONDS / (time.perf_counter() - begin)))
        samples: list[float] = []
        stop = time.perf_counter() + seconds
        while len(samples) < _REPLAYS and (len(samples) < 5 or time.perf_counter() < stop):
            begin = time.perf_counter()
            for _ in range(count):
                launch()
            samples.append(round((time.perf_counter() - begin) / count * 1e6, 3))
        return samples

    return time_on_cpu
