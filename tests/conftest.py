"""Fixtures shared by all tests: tiny models, compiled once per session."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def pytest_collection_modifyitems(items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import tvm

    if not tvm.cuda(0).exist:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU and its driver")
        for item in on_gpu:
            item.add_marker(skip)


def make_tucker_model(scale: float = 1.0, batch: int | str = 1) -> onnx.ModelProto:
    """One Tucker layer, 1x8x6x6 to 1x8x6x6, and ReLU; ``scale`` multiplies the output."""
    rng = np.random.default_rng(0)
    shapes = {"w_first": (4, 8, 1, 1), "w_core": (4, 4, 3, 3), "w_last": (8, 4, 1, 1)}
    weights = {
        name: (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }
    weights["w_last"] *= np.float32(scale)
    nodes = [
        helper.make_node("Conv", ["x", "w_first"], ["a"], name="first"),
        helper.make_node("Conv", ["a", "w_core"], ["b"], name="core", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["b", "w_last"], ["c"], name="last"),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    return _model(nodes, {"x": [batch, 8, 6, 6]}, {"y": [batch, 8, 6, 6]}, weights)


def make_two_input_model() -> onnx.ModelProto:
    """Inputs whose names are no identifiers, one of them 0-d, and an output named like a parameter of numpy.savez."""
    nodes = [helper.make_node("Mul", ["in/put.1", "self"], ["file"]), helper.make_node("Relu", ["file"], ["out:0"])]
    return _model(nodes, {"in/put.1": [2, 3], "self": []}, {"file": [2, 3], "out:0": [2, 3]}, {})


def _model(nodes, inputs, outputs, weights) -> onnx.ModelProto:
    def infos(shapes):
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "tiny", infos(inputs), infos(outputs), tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="session")
def tucker_model():
    """`make_tucker_model`, to build variants."""
    return make_tucker_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """The tiny Tucker model as a file."""
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    onnx.save(make_tucker_model(), path)
    return path


@pytest.fixture(scope="session")
def compiled(model_path):
    """The tiny Tucker model, built for this CPU and verified."""
    import tdc_tvm

    return tdc_tvm.build(model_path, "llvm")


@pytest.fixture(scope="session")
def library(compiled, tmp_path_factory):
    """`compiled`, exported."""
    path = tmp_path_factory.mktemp("library") / "tiny.so"
    compiled.export_library(path)
    return path


@pytest.fixture(scope="session")
def two_inputs():
    """`make_two_input_model`, built for this CPU and verified."""
    import tdc_tvm

    return tdc_tvm.build(make_two_input_model(), "llvm")


@pytest.fixture(scope="session")
def x():
    """A seeded input of the tiny Tucker model."""
    return np.random.default_rng(1).standard_normal((1, 8, 6, 6)).astype(np.float32)


@pytest.fixture(scope="session")
def y(x):
    """ONNX Runtime's output for ``x``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(make_tucker_model().SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]
