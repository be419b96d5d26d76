"""Recorded calls, with a driver that only notes what it is told."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import tvm

from tdc_tvm.cuda_graph import CannotRecord, CudaGraph

driver_module = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")


class Driver:
    """Kernels of addresses; ``kernels`` is what the recorded call launches."""

    CUresult, CUstream_flags = driver_module.CUresult, driver_module.CUstream_flags
    CUstreamCaptureMode, CUgraphNodeType = driver_module.CUstreamCaptureMode, driver_module.CUgraphNodeType

    def __init__(self):
        self.kernels, self.launched, self.sizes, self.types = [], [], {}, {}
        self.ok = self.CUresult.CUDA_SUCCESS

    def record(self, *addresses):
        values = (ctypes.c_uint64 * len(addresses))(*addresses)
        pointers = (ctypes.c_void_p * len(addresses))(
            *(ctypes.addressof(values) + 8 * i for i in range(len(addresses)))
        )
        self.kernels.append((values, pointers))

    def addresses(self, params, count):
        pointers = ctypes.cast(params.kernelParams, ctypes.POINTER(ctypes.c_void_p))
        return [ctypes.c_uint64.from_address(pointers[i]).value for i in range(count)]

    def cuGraphGetNodes(self, graph, count=0):
        return self.ok, list(range(count)), len(self.kernels)

    def cuGraphNodeGetType(self, node):
        return self.ok, self.types.get(node, self.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL)

    def cuGraphKernelNodeGetParams(self, node):
        return self.ok, SimpleNamespace(func=node, kernelParams=ctypes.addressof(self.kernels[node][1]))

    def cuFuncGetParamInfo(self, func, index):
        if index >= len(self.kernels[func][0]):
            return self.CUresult.CUDA_ERROR_INVALID_VALUE, 0, 0
        return self.ok, 8 * index, self.sizes.get((func, index), 8)

    def cuGraphExecKernelNodeSetParams(self, executable, node, params):
        count = len(self.kernels[node][0])
        self.kernels[node] = (self.addresses(params, count), None)
        return (self.ok,)

    def cuGraphLaunch(self, executable, stream):
        self.launched.append((stream, [list(values) for values, _ in self.kernels]))
        return (self.ok,)

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: (self.ok, 7)


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    for name in ("cuStreamDestroy", "cuStreamBeginCapture", "cuGraphExecDestroy", "cuGraphDestroy"):
        monkeypatch.setattr(Driver, name, lambda self, *arguments: (self.ok,), raising=False)
    monkeypatch.setattr("cuda.bindings.driver", made)
    return made


def tensor(count=16):
    return tvm.runtime.tensor(np.zeros(count, np.float32))


def recorded(driver, *kernels):
    """A call whose kernels have the addresses of ``x``, of what lies between (``t``) and of ``y``."""
    x, t, y = tensor(), tensor(), tensor()
    at = {"x": x.data_ptr(), "t": t.data_ptr(), "y": y.data_ptr(), "inside": x.data_ptr() + 8}
    for kernel in kernels:
        driver.record(*(at[name] for name in kernel))
    return CudaGraph(lambda *inputs: (y, (t,)), [x]), x, t, y


def test_a_launch_reads_and_writes_where_it_says(driver):
    graph, x, t, y = recorded(driver, ("x", "t"), ("t", "x", "y"))
    other, out = tensor(), tensor()
    graph.launch([x, y], 3)
    graph.launch([other, out], 4)
    graph.launch([other, y], 5)
    a, b, c, d, e = (value.data_ptr() for value in (x, t, y, other, out))
    assert driver.launched == [
        (3, [[a, b], [b, a, c]]),
        (4, [[d, b], [b, d, e]]),
        (5, [[d, b], [b, d, c]]),
    ]


@pytest.mark.parametrize(
    ("kernels", "message"),
    [((("x", "t"),), "an output is no kernel's own"), ((("inside", "y"),), "the address of a part of an input")],
)
def test_what_cannot_be_recorded(driver, kernels, message):
    with pytest.raises(CannotRecord, match=message):
        recorded(driver, *kernels)


def test_other_nodes_than_kernels_of_addresses_are_refused(driver):
    driver.types[1] = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY
    with pytest.raises(CannotRecord, match="not all that it does is kernels"):
        recorded(driver, ("x", "t"), ("t", "y"))
    driver.types, driver.kernels, driver.sizes = {}, [], {(0, 1): 4}
    with pytest.raises(CannotRecord, match="parameters that are no addresses"):
        recorded(driver, ("x", "t"), ("t", "y"))


def test_an_error_of_the_driver_is_named(driver, monkeypatch):
    failed = driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    graph, x, _, y = recorded(driver, ("x", "y"))
    monkeypatch.setattr(driver, "cuGraphLaunch", lambda *arguments: (failed,), raising=False)
    monkeypatch.setattr(
        driver, "cuGetErrorName", lambda error: (driver.ok, b"CUDA_ERROR_ILLEGAL_ADDRESS"), raising=False
    )
    with pytest.raises(CannotRecord, match="the GPU's driver says CUDA_ERROR_ILLEGAL_ADDRESS"):
        graph.launch([x, y], 0)
