"""A network recorded as one CUDA graph: a call launches it, and no host work lies between its kernels."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm.runtime import Tensor

from tdc_tvm.errors import TdcError

_POINTER_BYTES = 8


def with_storage(name: str) -> str:
    """What the function is called that does what ``name`` does, and gives all memory that it wrote to besides."""
    return f"{name}_with_storage"


class CannotRecord(TdcError):
    """A network does not run as one graph, for the reason given."""


@dataclass(frozen=True)
class _Use:
    """A kernel of the graph, its parameters, and which of them is the address of an input or output."""

    node: Any
    params: Any
    # What ``params`` points to; changed in place.
    values: ctypes.Array
    pointers: ctypes.Array
    position: int


class CudaGraph:
    """A recorded call.

    It reads and writes where each launch says: kernels that have the address of an input or of an output
    get a new one.

    Parameters
    ----------
    entry : callable
        One that `with_storage` names: what it gives is kept as long as the graph.
    inputs : sequence of tvm.runtime.Tensor
        On the device.

    Raises
    ------
    CannotRecord
        If a part of the network runs on the host, or leaves no kernel that writes an output.
    """

    def __init__(self, entry: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        from cuda.bindings import driver

        self._driver = driver
        # While a call is recorded nothing can be loaded or allocated that is not there yet.  TVM's virtual machine
        # holds what the last call gave; so the memory of the call before is what is free.
        for _ in range(2):
            entry(*inputs)
        stream = self._ok(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        try:
            self._record(entry, inputs, stream)
        finally:
            self._ok(driver.cuStreamDestroy(stream))
            # That of the last.
            tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")()
        results, self._storages = self._recorded
        self.outputs: tuple[Tensor, ...] = (results,) if isinstance(results, Tensor) else tuple(results)
        uses = self._uses()
        self._places = [tensor.data_ptr() for tensor in (*inputs, *self.outputs)]
        self._uses_of = [uses[place] for place in self._places]
        if not all(self._uses_of[len(inputs) :]) or len(set(self._places)) < len(self._places):
            raise CannotRecord("an output is no kernel's own")
        for tensor in (*inputs, *self.outputs):
            begin = tensor.data_ptr()
            if any(begin < address < begin + tensor.numel() * tensor.dtype.itemsize for address in uses):
                raise CannotRecord("a kernel has the address of a part of an input or output")

    def _record(self, entry: Callable[..., Any], inputs: Sequence[Tensor], stream: Any) -> None:
        driver = self._driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._ok(driver.cuStreamBeginCapture(stream, mode))
        try:
            with tvm_ffi.use_raw_stream(inputs[0].device, int(stream)):
                self._recorded = entry(*inputs)
        except Exception as error:
            driver.cuStreamEndCapture(stream)
            raise CannotRecord(str(error).strip().splitlines()[-1]) from error
        self._graph = self._ok(driver.cuStreamEndCapture(stream))
        self._executable = self._ok(driver.cuGraphInstantiate(self._graph, 0))

    def _uses(self) -> dict[int, list[_Use]]:
        """The kernels by the addresses that they have."""
        driver, found = self._driver, defaultdict(list)
        _, count = self._ok(driver.cuGraphGetNodes(self._graph))
        nodes, _ = self._ok(driver.cuGraphGetNodes(self._graph, count))
        for node in nodes:
            if self._ok(driver.cuGraphNodeGetType(node)) != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
                raise CannotRecord("not all that it does is kernels")
            params = self._ok(driver.cuGraphKernelNodeGetParams(node))
            given = ctypes.cast(int(params.kernelParams), ctypes.POINTER(ctypes.c_void_p))
            values: list[int] = []
            while True:
                error, _, size = driver.cuFuncGetParamInfo(params.func, len(values))
                if error != driver.CUresult.CUDA_SUCCESS:
                    break
                # TVM's kernels of static shapes have addresses only.
                if size != _POINTER_BYTES:
                    raise CannotRecord("a kernel has parameters that are no addresses")
                values.append(ctypes.c_uint64.from_address(given[len(values)]).value)
            owned = (ctypes.c_uint64 * len(values))(*values)
            address = ctypes.addressof(owned)
            pointers = (ctypes.c_void_p * len(values))(*(address + 8 * i for i in range(len(values))))
            params.kernelParams = ctypes.addressof(pointers)
            for position, value in enumerate(values):
                found[value].append(_Use(node, params, owned, pointers, position))
        return found

    def launch(self, tensors: Sequence[Any], stream: int) -> None:
        """Begin a call.

        Parameters
        ----------
        tensors : sequence of tvm.runtime.Tensor or torch.Tensor
            The inputs, then where outputs go; their shapes and dtypes are those of the recorded call.
        stream : int
            What the call is ordered on.
        """
        driver = self._driver
        for i, tensor in enumerate(tensors):
            address = tensor.data_ptr()
            if address == self._places[i]:
                continue
            for use in self._uses_of[i]:
                use.values[use.position] = address
                self._ok(driver.cuGraphExecKernelNodeSetParams(self._executable, use.node, use.params))
            self._places[i] = address
        self._ok(driver.cuGraphLaunch(self._executable, stream))

    def __del__(self) -> None:
        for destroy, name in (("cuGraphExecDestroy", "_executable"), ("cuGraphDestroy", "_graph")):
            if hasattr(self, name):
                getattr(self._driver, destroy)(getattr(self, name))

    def _ok(self, result: tuple) -> Any:
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            name = self._driver.cuGetErrorName(error)[1].decode()
            raise CannotRecord(f"the GPU's driver says {name}")
        return values[0] if len(values) == 1 else values
