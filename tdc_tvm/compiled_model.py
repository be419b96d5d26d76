"""A compiled model: run, verify, measure, export, load."""

from __future__ import annotations

import functools
import math
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm.runtime.vm
import tvm_ffi

from tdc_tvm.artifact import (
    Entry,
    Metadata,
    ObjectFiles,
    check_library_path,
    check_runs_here,
    load_module,
    read_metadata,
)
from tdc_tvm.cuda_graph import CannotRecord, CudaGraph, with_storage
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
    entries : tuple[Entry, ...]
        The batch sizes that were built, each with its inputs and outputs.
    inputs, outputs : tuple[TensorInfo, ...]
        Names, shapes and dtypes, in the model's order; shapes are those of the first entry.
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
        self._points: dict[str, _EntryPoint] = {}
        self._filled_up: set[int] = set()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What was built, in the order that it was asked for."""
        return self.metadata.entries

    def entry(self, batch: int | None = None) -> Entry:
        """The entry of a batch size that was built; by default the first.

        Raises
        ------
        TdcError
            If there is none.
        """
        for entry in self.entries:
            if batch is None or entry.batch == batch:
                return entry
        raise TdcError(f"found batch={batch}; {self._built()}; leave batch (--batch) out for what was built first")

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Inputs in the model's order."""
        return self.entries[0].inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Outputs in the model's order."""
        return self.entries[0].outputs

    def __repr__(self) -> str:
        inputs = ", ".join(f"{t.name}{list(t.shape)}" for entry in self.entries for t in entry.inputs)
        return f"CompiledModel({inputs} on {self.metadata.arch}, {len(self.report.fused)} fused Tucker layers)"

    def run(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the model.  Calls from several threads take turns.

        A batch between the sizes that were built is filled up to the next larger one with zeros, and a warning says so
        once for each size; so no image's result may depend on another's, and images must keep their order.  A library
        of one size takes that one alone.

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
            If a name, shape or dtype does not fit, an input is missing or superfluous, the batch is larger than the
            largest that was built, or the model was built for another machine.
        """
        values = self._bind(args, kwargs)
        wants_torch = any(_is_torch(value) for value in values)
        _ = self.machine  # first: it says what is wrong where there is no such device
        with self._lock, self._stream(wants_torch):  # one call at a time
            arrays = [_read(value, info) for value, info in zip(values, self.inputs, strict=True)]
            entry, rows = self._choose(arrays)
            point = self._point(entry)
            tensors = [point.place(array, number) for number, array in enumerate(arrays)]
            if wants_torch and point.graph is not None:
                results = point.run_to_torch(point.graph, tensors)
            else:
                results = tuple(map(_to_torch if wants_torch else _to_numpy, point.run(tensors)))
        if rows is not None:
            results = tuple(result[:rows] for result in results)
        return results if len(results) > 1 else results[0]

    def _choose(self, arrays: Sequence[np.ndarray | tvm.runtime.Tensor]) -> tuple[Entry, int | None]:
        """The entry that ``arrays`` go to, and how many images they are if they do not fill it."""
        # Arrays that are wrong in other ways do not count; they are refused below.
        sizes = {
            info.name: int(array.shape[0])
            for info, array, is_batched in zip(self.inputs, arrays, self._batched_inputs, strict=True)
            if is_batched and tuple(array.shape[1:]) == info.shape[1:]
        }
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise TdcError(f"the inputs' batches differ ({found}); pass as many images in each")
        rows = next(iter(sizes.values()), 0)
        entry = self._next_larger(rows) if sizes else self.entries[0]
        for number, (info, array) in enumerate(zip(entry.inputs, arrays, strict=True)):
            shape, dtype = tuple(array.shape), array.dtype.name if isinstance(array, np.ndarray) else str(array.dtype)
            if shape != ((rows, *info.shape[1:]) if info.name in sizes else info.shape):
                shapes = " or ".join(dict.fromkeys(str(other.inputs[number].shape) for other in self.entries))
                raise TdcError(f"input {info.name!r} has shape {shape}; the model was built for {shapes}")
            if dtype != info.dtype:
                raise TdcError(f"input {info.name!r} has dtype {dtype}; expected {info.dtype} (convert it first)")
        if not sizes or rows == entry.batch:
            return entry, None
        if len(self.entries) == 1:
            # What else is as long as the batch by chance cannot be told from one size.
            raise TdcError(
                f"found a batch of {rows}; {self._built()}. Pass {entry.batch} images, or build the model for several"
                f" sizes, such as batch=[{rows}, {entry.batch}]: what lies between them is filled up"
            )
        self._say_filled_up(rows, entry)
        return entry, rows

    @functools.cached_property
    def _batched_inputs(self) -> list[bool]:
        return [_is_batched([(entry, entry.inputs[i]) for entry in self.entries]) for i in range(len(self.inputs))]

    def _is_batched_output(self, number: int) -> bool:
        return _is_batched([(entry, entry.outputs[number]) for entry in self.entries])

    def _next_larger(self, rows: int) -> Entry:
        fitting = [entry for entry in self.entries if entry.batch is not None and entry.batch >= rows > 0]
        if not fitting:
            raise TdcError(
                f"found a batch of {rows}; {self._built()}: pass at least one image and at most as many as the largest,"
                " or build the model for more"
            )
        return min(fitting, key=lambda entry: entry.batch or 0)

    def _say_filled_up(self, rows: int, entry: Entry) -> None:
        for number, info in enumerate(entry.outputs):
            if not self._is_batched_output(number):
                raise TdcError(
                    f"found a batch of {rows}; {self._built()}. It cannot be filled up to {entry.batch}, as the leading"
                    f" extent of output {info.name!r} {info.shape} is not the batch: pass one of these sizes, or build"
                    f" the model with batch={rows} too"
                )
        if rows not in self._filled_up:
            self._filled_up.add(rows)
            warnings.warn(
                f"a batch of {rows} runs as one of {entry.batch}, filled up with zeros; {self._built()}. That is right"
                " as long as each image's result depends on it alone and images keep their order. Build it with"
                f" batch={rows} too if that size is frequent",
                stacklevel=4,
            )

    def _built(self) -> str:
        sizes = sorted(entry.batch for entry in self.entries if entry.batch is not None)
        return (
            f"the model was built for batches of {', '.join(map(str, sizes))}"
            if sizes
            else "the model's shapes are fixed"
        )

    def filled_up(self) -> Entry | None:
        """A batch that lies between those that were built, as an entry of its size; None if nothing is filled up."""
        batches = {entry.batch for entry in self.entries}
        for entry in reversed(self.entries):
            rows = (entry.batch or 1) - 1
            if (
                len(self.entries) > 1
                and rows
                and rows not in batches
                and any(self._batched_inputs)
                and all(map(self._is_batched_output, range(len(entry.outputs))))
            ):
                inputs = (
                    replace(info, shape=(rows, *info.shape[1:])) if is_batched else info
                    for info, is_batched in zip(entry.inputs, self._batched_inputs, strict=True)
                )
                outputs = (replace(info, shape=(rows, *info.shape[1:])) for info in entry.outputs)
                return replace(entry, batch=rows, inputs=tuple(inputs), outputs=tuple(outputs))
        return None

    def _point(self, entry: Entry) -> _EntryPoint:
        with self._lock:
            if entry.function not in self._points:
                self._points[entry.function] = _EntryPoint(entry, self.machine, self.device)
            return self._points[entry.function]

    def _stream(self, wants_torch: bool) -> AbstractContextManager:
        """Where PyTorch's tensors go in and out, its stream is the one that calls are ordered on."""
        return tvm_ffi.use_torch_stream() if wants_torch and self.metadata.kind == "cuda" else nullcontext()

    def benchmark(self, *, batch: int | None = None, warmup: int = 5, repeat: int = 50, seed: int = 0) -> np.ndarray:
        """Latencies of single calls on random input already on the device, in milliseconds, in order.

        Parameters
        ----------
        batch : int, optional
            A size that was built; by default the first.
        warmup, repeat : int
            Calls before and during the measurement.
        seed : int
            Of the random input.
        """
        call = self.prepared_call(random_inputs(self.entry(batch).inputs, seed))
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
        device = self.device
        entry, _ = self._choose(values)
        point = self._point(entry)
        tensors = [_fill(buffer, value) for buffer, value in zip(point.new_buffers(), values, strict=True)]

        def call() -> None:
            with self._lock:
                point.run(tensors)
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


class _EntryPoint:
    """An entry of a model at work; buffers and the recorded call are made at their first use."""

    def __init__(self, entry: Entry, machine: tvm.runtime.vm.VirtualMachine, device: tvm.runtime.Device) -> None:
        self.entry = entry
        self.machine = machine
        self.device = device

    def run(self, tensors: Sequence[tvm.runtime.Tensor]) -> tuple[tvm.runtime.Tensor, ...]:
        """Results that the next call overwrites, where there is a graph."""
        if self.graph is None:
            result = self.machine[self.entry.function](*tensors)
            return (result,) if isinstance(result, tvm.runtime.Tensor) else tuple(result)
        self.graph.launch([*tensors, *self.graph.outputs], tvm_ffi.get_raw_stream(self.device))
        return self.graph.outputs

    def run_to_torch(self, graph: CudaGraph, tensors: Sequence[tvm.runtime.Tensor]) -> tuple[Any, ...]:
        """Results in memory of PyTorch's."""
        torch = sys.modules["torch"]
        results = tuple(
            torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="cuda:0") for info in self.entry.outputs
        )
        graph.launch([*tensors, *results], tvm_ffi.get_raw_stream(self.device))
        return results

    @functools.cached_property
    def graph(self) -> CudaGraph | None:
        """On a GPU the call, recorded at its first use; none where it cannot be, and a warning says why."""
        if self.device.dlpack_device_type() == _DLPACK_CPU:
            return None
        try:
            return CudaGraph(self.machine[with_storage(self.entry.function)], self.buffers)
        except (CannotRecord, ImportError, RuntimeError) as error:
            hint = "; pip install 'tdc-tvm[cuda]' brings what is missing" if isinstance(error, ImportError) else ""
            warnings.warn(
                f"calls are not recorded as a CUDA graph ({error}): kernels are launched one by one, which takes"
                f" longer{hint}",
                stacklevel=4,
            )
            return None

    @functools.cached_property
    def buffers(self) -> list[tvm.runtime.Tensor]:
        """Inputs on the device, for what lies elsewhere."""
        return self.new_buffers()

    def new_buffers(self) -> list[tvm.runtime.Tensor]:
        """Room for the inputs on the device."""
        return [tvm.runtime.empty(info.shape, info.dtype, self.device) for info in self.entry.inputs]

    def place(self, array: np.ndarray | tvm.runtime.Tensor, number: int) -> tvm.runtime.Tensor:
        """An input on the device, filled up to its extent there."""
        here = isinstance(array, tvm.runtime.Tensor) and array.device == self.device
        if here and tuple(array.shape) == self.entry.inputs[number].shape:
            return array
        return _fill(self.buffers[number], array)


def _is_batched(tensors: list[tuple[Entry, TensorInfo]]) -> bool:
    """Whether the leading extent of an input or output is the batch in each entry."""
    return all(entry.batch is not None and info.shape[:1] == (entry.batch,) for entry, info in tensors)


def _fill(buffer: tvm.runtime.Tensor, array: np.ndarray | tvm.runtime.Tensor) -> tvm.runtime.Tensor:
    """Copy ``array`` to ``buffer``, and zeros to what it leaves of it."""
    if isinstance(array, np.ndarray):
        array = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    if tuple(array.shape) == tuple(buffer.shape):
        return buffer.copyfrom(array)
    rows, (batch, *extents) = array.shape[0], buffer.shape
    rest = np.zeros((batch - rows, *extents), str(buffer.dtype))
    buffer._create_view(array.shape).copyfrom(array)
    offset = rows * math.prod(extents) * rest.itemsize
    buffer._create_view(rest.shape, relative_byte_offset=offset).copyfrom(rest)
    return buffer


def _read(value: Any, info: TensorInfo) -> np.ndarray | tvm.runtime.Tensor:
    """A NumPy array as it is, any other tensor as one of TVM's."""
    if isinstance(value, np.ndarray):
        return value
    if not hasattr(value, "__dlpack__"):
        raise TdcError(f"input {info.name!r} is a {type(value).__name__}; expected a NumPy array or a DLPack tensor")
    try:
        return _from_dlpack(value)
    except Exception as error:  # each library has its own for what it cannot hand over
        raise TdcError(
            f"input {info.name!r}, a {type(value).__name__}, cannot be read by DLPack"
            f" ({str(error).strip().splitlines()[0]}); pass a dense, contiguous tensor"
        ) from None


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
