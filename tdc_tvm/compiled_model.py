"""A compiled model: run, verify, measure, export, load."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm.runtime.vm
import tvm_ffi

from tdc_tvm.artifact import (
    Metadata,
    ObjectFiles,
    check_library_path,
    check_runs_here,
    load_module,
    read_metadata,
)
from tdc_tvm.cuda_graph import ENTRY, CannotRecord, CudaGraph
from tdc_tvm.errors import TdcError
from tdc_tvm.files import write_atomic
from tdc_tvm.onnx_model import TensorInfo
from tdc_tvm.report import BuildReport
from tdc_tvm.schedules.device import use_cpu_threads

# TVM's kernels load vectors and take tensors to begin at multiples of this many bytes.
_ALIGNMENT = 64
_DLPACK_CPU = 1


class CompiledModel:
    """A model that is ready to run, made by `build` or `load`.

    Attributes
    ----------
    inputs, outputs : tuple[TensorInfo, ...]
        Names, shapes and dtypes, in the model's order.
    metadata : Metadata
        What the library's description section holds.
    report : BuildReport
        What the compiler decided, layer by layer.
    """

    def __init__(self, metadata: Metadata, code: ObjectFiles | Path) -> None:
        self.metadata = metadata
        self.report = BuildReport.from_dict(metadata.report)
        self._code = code
        self._code_state = _file_state(code) if isinstance(code, Path) else None
        self._lock = threading.RLock()
        self._vm: tvm.runtime.vm.VirtualMachine | None = None
        self.why_no_graph = ""

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Inputs in the model's order."""
        return self.metadata.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Outputs in the model's order."""
        return self.metadata.outputs

    def __repr__(self) -> str:
        inputs = ", ".join(f"{t.name}{list(t.shape)}" for t in self.inputs)
        return f"CompiledModel({inputs} on {self.metadata.arch}, {len(self.report.fused)} fused Tucker layers)"

    def run(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the model.  Calls from several threads take turns.

        Parameters
        ----------
        *args, **kwargs : numpy.ndarray or any DLPack tensor
            The inputs, by position or by name (``run(**{"input.1": x})`` where a name is no
            identifier).  Arrays on another device are copied.

        Returns
        -------
        numpy.ndarray or torch.Tensor, or a tuple of them
            torch tensors if an input was one, on the model's device; a tuple if the model has
            several outputs.

        Raises
        ------
        TdcError
            If a name, shape or dtype does not fit, an input is missing or superfluous, or the
            model was built for another machine.
        """
        values = self._bind(args, kwargs)
        wants_torch = any(_is_torch(value) for value in values)
        _ = self.machine  # first: it says what is wrong where there is no such device
        with self._lock, self._stream(wants_torch):  # one call at a time
            tensors = [self._tensor(value, i) for i, value in enumerate(values)]
            if wants_torch and self.graph is not None:
                results = self._run_to_torch(self.graph, tensors)
            else:
                results = tuple(map(_to_torch if wants_torch else _to_numpy, self._run(tensors)))
        return results if len(results) > 1 else results[0]

    def _run(self, tensors: Sequence[tvm.runtime.Tensor]) -> tuple[tvm.runtime.Tensor, ...]:
        """Results that the next call overwrites, where there is a graph."""
        if self.graph is None:
            result = self.machine["main"](*tensors)
            return (result,) if isinstance(result, tvm.runtime.Tensor) else tuple(result)
        self.graph.launch([*tensors, *self.graph.outputs], tvm_ffi.get_raw_stream(self.device))
        return self.graph.outputs

    def _run_to_torch(self, graph: CudaGraph, tensors: Sequence[tvm.runtime.Tensor]) -> tuple[Any, ...]:
        """Results in memory of PyTorch's."""
        torch = sys.modules["torch"]
        results = tuple(
            torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="cuda:0") for info in self.outputs
        )
        graph.launch([*tensors, *results], tvm_ffi.get_raw_stream(self.device))
        return results

    def _stream(self, wants_torch: bool) -> AbstractContextManager:
        """Where PyTorch's tensors go in and out, its stream is the one that calls are ordered on."""
        return tvm_ffi.use_torch_stream() if wants_torch and self.metadata.kind == "cuda" else nullcontext()

    def benchmark(self, *, warmup: int = 5, repeat: int = 50, seed: int = 0) -> np.ndarray:
        """Latencies of single calls on random input already on the device, in milliseconds, in order.

        Parameters
        ----------
        warmup, repeat : int
            Calls before and during the measurement.
        seed : int
            Of the random input.
        """
        call = self.prepared_call(random_inputs(self.inputs, seed))
        for _ in range(warmup):
            call()
        samples = np.empty(repeat)
        for i in range(repeat):
            start = time.perf_counter()
            call()
            samples[i] = (time.perf_counter() - start) * 1e3
        return samples

    def prepared_call(self, values: list[np.ndarray]) -> Callable[[], None]:
        """A call that runs the model to its end on inputs that are copied to the device now."""
        _, device = self.machine, self.device
        tensors = [tvm.runtime.tensor(value, device) for value in values]

        def call() -> None:
            with self._lock:
                self._run(tensors)
            device.sync()

        return call

    def export_library(self, path: str | os.PathLike) -> None:
        """Write the model as a shared library (.so) that carries kernels, weights and this description.

        Raises
        ------
        TdcError
            If the path cannot be written; an existing file survives a failure.
        """
        if isinstance(self._code, ObjectFiles):
            self._code.link(self.metadata, path)
            return
        check_library_path(path)
        if _file_state(self._code) != self._code_state:
            raise TdcError(
                f"cannot export: {self._code}, which this model was loaded from, is gone or has changed since;"
                " load it again"
            )
        with write_atomic(path) as temporary:
            shutil.copyfile(self._code, temporary)

    @property
    def device(self) -> tvm.runtime.Device:
        """Where the model runs."""
        return tvm.cuda(0) if self.metadata.kind == "cuda" else tvm.cpu(0)

    @property
    def machine(self) -> tvm.runtime.vm.VirtualMachine:
        """TVM's virtual machine, started at first use."""
        with self._lock:
            if self._vm is None:
                check_runs_here(self.metadata, "the model")
                use_cpu_threads()
                code = self._code
                module = code.load(self.metadata) if isinstance(code, ObjectFiles) else load_module(code)
                self._vm = tvm.runtime.vm.VirtualMachine(module, self.device)
            return self._vm

    @functools.cached_property
    def graph(self) -> CudaGraph | None:
        """On a GPU the call, recorded at its first use; none where it cannot be, which `why_no_graph` then says."""
        if self.metadata.kind != "cuda":
            return None
        with self._lock:
            try:
                return CudaGraph(self.machine[ENTRY], self._buffers)
            except (CannotRecord, ImportError, RuntimeError) as error:
                self.why_no_graph = str(error)
                return None

    @functools.cached_property
    def _buffers(self) -> list[tvm.runtime.Tensor]:
        """Inputs on the device, for what lies elsewhere."""
        return [tvm.runtime.empty(info.shape, info.dtype, self.device) for info in self.inputs]

    def _bind(self, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
        names = [info.name for info in self.inputs]
        expected = ", ".join(f"{i.name}: {i.dtype}{list(i.shape)}" for i in self.inputs)
        if len(args) > len(names):
            raise TdcError(f"found {len(args)} inputs, the model takes {len(names)} ({expected})")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in names:
                raise TdcError(f"the model has no input {name!r}; its inputs are {expected}")
            if name in given:
                raise TdcError(f"input {name!r} is given twice, by position and by name")
            given[name] = value
        if missing := [name for name in names if name not in given]:
            raise TdcError(f"missing input(s) {', '.join(missing)}; the model takes {expected}")
        return [given[name] for name in names]

    def _tensor(self, value: Any, number: int) -> tvm.runtime.Tensor:
        info = self.inputs[number]
        if isinstance(value, np.ndarray):
            _check(info, value.shape, value.dtype.name)
            return self._buffers[number].copyfrom(np.asarray(value, value.dtype.newbyteorder("="), order="C"))
        if not hasattr(value, "__dlpack__"):
            raise TdcError(
                f"input {info.name!r} is a {type(value).__name__}; expected a NumPy array or a DLPack tensor"
            )
        try:
            tensor = _from_dlpack(value)
        except Exception as error:  # each library has its own for what it cannot hand over
            raise TdcError(
                f"input {info.name!r}, a {type(value).__name__}, cannot be read by DLPack"
                f" ({str(error).strip().splitlines()[0]}); pass a dense, contiguous tensor"
            ) from None
        _check(info, tuple(tensor.shape), str(tensor.dtype))
        if tensor.device != self.device:
            tensor = self._buffers[number].copyfrom(tensor)
        return tensor


def _from_dlpack(value: Any) -> tvm.runtime.Tensor:
    """Any DLPack tensor as TVM's, without a copy where TVM's kernels can read it as it lies."""
    if _is_torch(value):
        value = value.detach().resolve_conj().resolve_neg().contiguous()
        if value.data_ptr() % _ALIGNMENT:
            value = value.clone()
    elif value.__dlpack_device__()[0] == _DLPACK_CPU:
        array = np.from_dlpack(value)
        if array.ctypes.data % _ALIGNMENT or not array.flags.c_contiguous:
            return tvm.runtime.tensor(np.array(array, order="C"))
    return tvm.runtime.from_dlpack(value)


def _to_torch(tensor: tvm.runtime.Tensor) -> Any:
    return sys.modules["torch"].from_dlpack(tensor)


def _to_numpy(tensor: tvm.runtime.Tensor) -> np.ndarray:
    return tensor.numpy()


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _file_state(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _check(info: TensorInfo, shape: tuple[int, ...], dtype: str) -> None:
    if tuple(shape) != info.shape:
        raise TdcError(f"input {info.name!r} has shape {tuple(shape)}; the model was built for {info.shape}")
    if dtype != info.dtype:
        raise TdcError(f"input {info.name!r} has dtype {dtype}; expected {info.dtype} (convert it first)")


def check_seed(seed: int) -> None:
    """Refuse what is no seed of random input."""
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise TdcError(f"the seed is {seed!r}; expected a whole number from 0 on")


def random_inputs(inputs: tuple[TensorInfo, ...], seed: int) -> list[np.ndarray]:
    """Seeded random arrays for a model's inputs: standard normal, or small whole numbers for integer types."""
    check_seed(seed)
    rng = np.random.default_rng(seed)
    arrays = []
    for info in inputs:
        dtype = np.dtype(info.dtype)
        if dtype.kind == "f":
            arrays.append(rng.standard_normal(info.shape).astype(dtype))
        else:
            arrays.append(rng.integers(0, 2, info.shape).astype(dtype))
    return arrays


def load(path: str | os.PathLike) -> CompiledModel:
    """Load a library that `CompiledModel.export_library` or ``tdc build`` wrote.

    Everything is checked before any code of the file runs.

    Parameters
    ----------
    path : path
        The .so file.

    Raises
    ------
    TdcError
        If it is not such a library, is damaged, or was built for another machine or version.
    """
    metadata = read_metadata(path)
    check_runs_here(metadata, path)
    model = CompiledModel(metadata, Path(path).resolve())
    _ = model.machine  # loads the code now, so that a faulty file is found here
    return model
