"""Small seeded ONNX models, made with onnx.helper alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


class ModelBuilder:
    """Collects nodes and weights of a graph; every method that adds a node returns its output's name.

    Names are given only where a test needs them.
    """

    def __init__(self, seed: int = 0, dtype: str = "float32") -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], dtype: str | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, elem_type(dtype or self.dtype), list(shape)))
        return name

    def output(self, name: str, dtype: str | None = None) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, elem_type(dtype or self.dtype), None))

    def weight(self, value, name: str | None = None) -> str:
        """A constant; a tuple of ints as ``shape`` draws it at random."""
        name = name or f"const{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def random(self, shape: Sequence[int], name: str | None = None) -> str:
        fan_in = max(int(np.prod(shape[1:])), 1)
        return self.weight((self.rng.standard_normal(shape) / fan_in**0.5).astype(self.dtype), name)

    def node(self, op: str, *inputs: str, out: str | None = None, name: str = "", **attributes) -> str:
        out = out or f"{op.lower()}{len(self.nodes)}.out"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=name, **attributes))
        return out

    def conv(
        self,
        x: str,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int] | int = 1,
        *,
        bias: bool = False,
        name: str | None = None,
        out: str | None = None,
        weight: str | None = None,
        **attributes,
    ) -> str:
        """A convolution; with ``name`` its weight is ``name.weight``, as PyTorch's exporters call it."""
        window = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
        groups = attributes.get("group", 1)
        shape = (out_channels, in_channels // groups, *window)
        weight = weight or self.random(shape, f"{name}.weight" if name else None)
        biases = [self.random((out_channels,), f"{name}.bias" if name else None)] if bias else []
        return self.node("Conv", x, weight, *biases, out=out, name=name or "", **attributes)

    def batch_norm(self, x: str, channels: int, **attributes) -> str:
        gamma, beta, mean = (self.weight(self.rng.standard_normal(channels).astype(self.dtype)) for _ in range(3))
        variance = self.weight(self.rng.uniform(0.5, 2.0, channels).astype(self.dtype))
        return self.node("BatchNormalization", x, gamma, beta, mean, variance, **attributes)

    def tucker(
        self,
        x: str,
        in_channels: int,
        ranks: tuple[int, int],
        out_channels: int,
        kernel: Sequence[int] | int = 3,
        *,
        biases: Sequence[bool] = (False, False, False),
        name: str | None = None,
        **core,
    ) -> str:
        """1x1 -> kxk -> 1x1 at ``ranks`` (in, out); ``core`` are the attributes of the middle one."""
        core = core or {"pads": [1, 1, 1, 1]}
        names = [f"{name}.{i}" if name else None for i in range(3)]
        x = self.conv(x, in_channels, ranks[0], bias=biases[0], name=names[0])
        x = self.conv(x, *ranks, kernel, bias=biases[1], name=names[1], **core)
        return self.conv(x, ranks[1], out_channels, bias=biases[2], name=names[2])

    def build(self, *outputs: str, opset: int = 17, ir_version: int = 8, name: str = "net") -> onnx.ModelProto:
        """The model; ``outputs`` are of the builder's type unless declared with `output`."""
        for out in outputs:
            self.output(out)
        declared = {value.name: value for value in self.inputs}
        declared |= {t.name: helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in self.weights}
        self.outputs = [declared.get(value.name, value) for value in self.outputs]
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
        model = onnx.shape_inference.infer_shapes(model)  # a graph output must declare its shape
        del model.graph.value_info[:]
        return model


def elem_type(dtype: str) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def dense_model(channels: Sequence[int] = (4, 8, 6), size: int = 8, **build) -> onnx.ModelProto:
    """Two 3x3 convolutions, ``stem`` and ``body``, with a ReLU between them."""
    b = ModelBuilder()
    x = b.input("x", (1, channels[0], size, size))
    x = b.node("Relu", b.conv(x, channels[0], channels[1], 3, bias=True, name="stem", pads=[1, 1, 1, 1]))
    x = b.conv(x, channels[1], channels[2], 3, name="body", pads=[1, 1, 1, 1], strides=[2, 2])
    return b.build(b.node("GlobalAveragePool", x))


def tucker_model(**options) -> onnx.ModelProto:
    """One Tucker layer named ``layer``; ``options`` are those of `ModelBuilder.tucker`."""
    b = ModelBuilder()
    x = b.input("x", (1, 8, 7, 6))
    return b.build(b.tucker(x, 8, (4, 5), 6, **{"name": "layer", **options}))
