"""Tucker decomposition of an ONNX model's convolutions, without PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from tdc_tvm.errors import TdcError
from tdc_tvm.onnx_model import array, constants, conv_nodes, layer_name, metadata
from tdc_tvm.onnx_rewrite import drop_unused_weights, set_nodes, set_weight
from tdc_tvm.plan import ConvLayer, DecompositionReport, RankSpec, decompose_layers
from tdc_tvm.schedules.shape import Conv2dShape
from tdc_tvm.tucker import TuckerFactors

# NodeProto has metadata properties since this version of the ONNX intermediate representation.
_METADATA_IR_VERSION = 10


def decompose_onnx(model: onnx.ModelProto, ranks: RankSpec) -> DecompositionReport:
    """Replace dense convolutions by three ``Conv`` nodes each (1x1, core, 1x1), in place.

    Parameters
    ----------
    model : onnx.ModelProto
        A checked model; where its shapes are inferred and static, the report has MACs.
    ranks : RankSpec
        A pair for all layers, an energy, a plan or its path, or a preset's name.

    Returns
    -------
    DecompositionReport
        Every two-dimensional convolution with its ranks, or the reason why it is kept.

    Raises
    ------
    TdcError
        If the plan names absent layers or impossible ranks.
    """
    nodes = conv_nodes(model)
    layers = [_layer(model, node) for node in nodes]
    result = decompose_layers(layers, ranks, model=model.graph.name or None)
    replaced = {
        node.output[0]: result.factors[layer.name]
        for node, layer in zip(nodes, layers, strict=True)
        if layer.name in result.factors
    }
    out: list[onnx.NodeProto] = []
    for node in model.graph.node:
        factors = replaced.get(node.output[0]) if node.op_type == "Conv" else None
        out += [node] if factors is None else _stages(model, node, factors)
    set_nodes(model, out)
    drop_unused_weights(model)
    if replaced:
        model.ir_version = max(model.ir_version, _METADATA_IR_VERSION)
    return result.report


def _layer(model: onnx.ModelProto, node: onnx.NodeProto) -> ConvLayer:
    tensors = constants(model)
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    name = layer_name(node)
    if node.input[1] not in tensors:
        dims = _shape(model, node.input[1])
        kernel = np.zeros(dims, "float32")
        return ConvLayer(name, kernel, groups, keep_reason="its weights are not constant")
    kernel = array(tensors[node.input[1]])
    reason = None
    if "tdc.layer" in metadata(node) and "tdc.stage" in metadata(node):
        reason = f"already part of the Tucker layer {metadata(node)['tdc.layer']}"
    shape = conv_shape(model, node, kernel.shape)
    pixels = None if shape is None else (shape.batch * shape.height * shape.width, shape.out_pixels)
    return ConvLayer(name, kernel, groups, pixels, reason)


def conv_shape(model: onnx.ModelProto, node: onnx.NodeProto, kernel_shape: tuple[int, ...]) -> Conv2dShape | None:
    """The shape of a ``Conv`` node; None where its input's extents are unknown."""
    dims = _shape(model, node.input[0])
    if len(dims) != 4 or min(dims) < 1:
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    stride = tuple(attributes.get("strides", (1, 1)))
    dilation = tuple(attributes.get("dilations", (1, 1)))
    padding = tuple(attributes.get("pads", (0, 0, 0, 0)))
    mode = attributes.get("auto_pad", b"NOTSET")
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        before, after = [], []
        for extent, window, step, gap in zip(dims[2:], kernel_shape[2:], stride, dilation, strict=True):
            total = max((-(-extent // step) - 1) * step + gap * (window - 1) + 1 - extent, 0)
            small, large = total // 2, total - total // 2
            before.append(small if mode == b"SAME_UPPER" else large)
            after.append(large if mode == b"SAME_UPPER" else small)
        padding = (*before, *after)
    try:
        return Conv2dShape(
            dims[0], dims[2], dims[3], dims[1], kernel_shape[0], tuple(kernel_shape[2:]),
            stride, padding, dilation, attributes.get("group", 1),
        )  # fmt: skip
    except TdcError as error:
        raise TdcError(f"layer {layer_name(node)}: {error}") from None


def _shape(model: onnx.ModelProto, name: str) -> list[int]:
    for value in (*model.graph.value_info, *model.graph.input):
        if value.name == name:
            return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return []


def _stages(model: onnx.ModelProto, node: onnx.NodeProto, factors: TuckerFactors) -> list[onnx.NodeProto]:
    """The three nodes that stand for ``node``; the core keeps its attributes, the last 1x1 its bias."""
    layer = layer_name(node)
    dtype = array(constants(model)[node.input[1]]).dtype
    kernels = {"reduce": factors.u_in, "core": factors.core, "expand": factors.u_out}
    ranks = {"rank_in": factors.u_in.shape[0], "rank_out": factors.u_out.shape[1]}
    values = [node.input[0], f"{layer}.reduce.out", f"{layer}.core.out", node.output[0]]
    stages = []
    for (stage, kernel), source, target in zip(kernels.items(), values, values[1:], strict=False):
        weight = set_weight(model, f"{layer}.{stage}.weight", kernel.astype(dtype))
        attributes = [a for a in node.attribute if stage == "core" and a.name != "kernel_shape"]
        bias = list(node.input[2:]) if stage == "expand" else []
        new = helper.make_node("Conv", [source, weight, *bias], [target], name=f"{node.name or layer}.{stage}")
        new.attribute.extend(attributes)
        new.attribute.append(helper.make_attribute("kernel_shape", kernel.shape[2:]))
        for key, value in {"layer": layer, "stage": stage, **ranks}.items():
            new.metadata_props.add(key=f"tdc.{key}", value=str(value))
        stages.append(new)
    return stages


def tucker_layer_names(model: onnx.ModelProto) -> dict[str, str]:
    """The Tucker layers that a model's metadata names: core convolution's name to layer's name."""
    properties = [(layer_name(node), metadata(node)) for node in conv_nodes(model)]
    return {
        name: props["tdc.layer"]
        for name, props in properties
        if props.get("tdc.stage") == "core" and "tdc.layer" in props
    }
