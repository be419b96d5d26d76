"""Tucker decomposition of an ONNX model's convolutions, without PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from tdc_tvm.onnx_model import (
    array,
    constants,
    conv_nodes,
    conv_shape,
    layer_names,
    metadata,
    set_nodes,
    value_shape,
)
from tdc_tvm.onnx_rewrite import drop_unused_weights, free_name, set_weight
from tdc_tvm.plan import ConvLayer, DecompositionReport, RankSpec, decompose_layers
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
    layers = [_layer(model, node, name) for node, name in zip(nodes, layer_names(model), strict=True)]
    result = decompose_layers(layers, ranks, model=model.graph.name or None)
    replaced = {
        node.output[0]: (layer.name, result.factors[layer.name])
        for node, layer in zip(nodes, layers, strict=True)
        if layer.name in result.factors
    }
    out: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.output[0] in replaced:
            out += _stages(model, node, *replaced[node.output[0]])
        else:
            out.append(node)
    set_nodes(model, out)
    drop_unused_weights(model)
    if replaced:
        model.ir_version = max(model.ir_version, _METADATA_IR_VERSION)
    return result.report


def _layer(model: onnx.ModelProto, node: onnx.NodeProto, name: str) -> ConvLayer:
    tensors = constants(model)
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    if node.input[1] not in tensors:
        dims = value_shape(model, node.input[1])
        kernel = np.zeros(dims, "float32")
        return ConvLayer(name, kernel, groups, keep_reason=f"its weights are {_origin(model, node.input[1])}")
    kernel = array(tensors[node.input[1]])
    reason = None
    if "tdc.layer" in metadata(node) and "tdc.stage" in metadata(node):
        reason = f"already part of the Tucker layer {metadata(node)['tdc.layer']}"
    shape = conv_shape(model, node, kernel.shape)
    pixels = None if shape is None else (shape.batch * shape.height * shape.width, shape.out_pixels)
    return ConvLayer(name, kernel, groups, pixels, reason)


def _origin(model: onnx.ModelProto, value: str) -> str:
    """Where a value that is no constant comes from."""
    for node in model.graph.node:
        if value in node.output:
            return f"computed by {node.op_type} {node.name or value}, not constant"
    return "an input of the model, not constant"


def _stages(model: onnx.ModelProto, node: onnx.NodeProto, layer: str, factors: TuckerFactors) -> list[onnx.NodeProto]:
    """The three nodes that stand for ``node``; the core keeps its attributes, the last 1x1 its bias."""
    dtype = array(constants(model)[node.input[1]]).dtype
    kernels = {"reduce": factors.u_in, "core": factors.core, "expand": factors.u_out}
    ranks = {"rank_in": factors.u_in.shape[0], "rank_out": factors.u_out.shape[1]}
    inner = [free_name(model, f"{layer}.{stage}.out") for stage in ("reduce", "core")]
    values = [node.input[0], *inner, node.output[0]]
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
    properties = zip(layer_names(model), map(metadata, conv_nodes(model)), strict=True)
    return {
        name: props["tdc.layer"]
        for name, props in properties
        if props.get("tdc.stage") == "core" and "tdc.layer" in props
    }
