"""Rewrites of ONNX graphs ahead of the import: operands, padding and batch normalisation."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tdc_tvm.onnx_model import array, constants, conv_nodes, conv_shape, set_nodes, use_counts, value_names

# Elementwise operators with broadcasting, and whether their operands may change places.
_ELEMENTWISE = {"Add": True, "Mul": True, "Max": True, "Min": True, "Sub": False, "Div": False}


def simplify(model: onnx.ModelProto) -> None:
    """Bring a model into the form that the graph passes match, in place; its function stays the same.

    ``auto_pad`` of convolutions becomes explicit padding, where shapes are inferred; constant
    operands of elementwise operators stand last and have full rank; a ``BatchNormalization`` after a
    convolution is folded into it, any other becomes a multiplication and an addition.  Statistics
    that are not constant leave the node as it is.
    """
    _spell_out_padding(model)
    _arrange_constants(model)
    _fold_batch_norms(model)
    drop_unused_weights(model)


def drop_unused_weights(model: onnx.ModelProto) -> None:
    """Remove initializers that nothing reads."""
    used = use_counts(model)
    kept = [tensor for tensor in model.graph.initializer if used[tensor.name]]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def set_weight(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    """Store an initializer under ``name``, or a like name that is free, and return the name used."""
    unique = free_name(model, name)
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), unique))
    return unique


def free_name(model: onnx.ModelProto, name: str) -> str:
    """``name``, or a like one where a value of the model is called so already."""
    taken = value_names(model)
    unique, count = name, 1
    while unique in taken:
        unique, count = f"{name}_{count}", count + 1
    return unique


def _spell_out_padding(model: onnx.ModelProto) -> None:
    tensors = constants(model)
    for node in conv_nodes(model):
        mode = next((a for a in node.attribute if a.name == "auto_pad"), None)
        shape = conv_shape(model, node, tuple(tensors[node.input[1]].dims)) if node.input[1] in tensors else None
        if mode is None or shape is None:
            continue
        kept = [a for a in node.attribute if a.name not in ("auto_pad", "pads")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("pads", shape.padding)])


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name: len(value.type.tensor_type.shape.dim) for value in values}


def _arrange_constants(model: onnx.ModelProto) -> None:
    """Put constant operands behind the others and give them full rank.

    TVM's layout conversion stops at a bias that stands in front, or has the shape (C, 1, 1).
    """
    ranks, tensors = _ranks(model), constants(model)
    for node in model.graph.node:
        if node.op_type not in _ELEMENTWISE or node.attribute:  # attributes broadcast in the manner of old opsets
            continue
        names = sorted(node.input, key=tensors.__contains__) if _ELEMENTWISE[node.op_type] else list(node.input)
        rank = max(ranks.get(name, 0) for name in names)
        for i, name in enumerate(names):
            if name in tensors and 0 < len(tensors[name].dims) < rank:
                shape = (1,) * (rank - len(tensors[name].dims)) + tuple(tensors[name].dims)
                names[i] = set_weight(model, f"{name}.{rank}d", array(tensors[name]).reshape(shape))
        node.input[:] = names


def _fold_batch_norms(model: onnx.ModelProto) -> None:
    used = use_counts(model)
    ranks = _ranks(model)
    producers: dict[str, onnx.NodeProto] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        affine = _batch_norm_affine(model, node)
        conv = producers.get(node.input[0]) if affine else None
        if affine is None:
            nodes.append(node)
        elif conv is not None and used[node.input[0]] == 1 and _scale_conv(model, conv, *affine):
            conv.name = conv.name or conv.output[0]  # what the layer is called does not change
            conv.output[0] = node.output[0]
            producers[node.output[0]] = conv
            continue
        elif rank := ranks.get(node.input[0], 0):
            nodes += _scale_and_shift(model, node, *affine, rank)
        else:
            nodes.append(node)
        if node.op_type == "Conv":
            producers[node.output[0]] = node
    set_nodes(model, nodes)


def _batch_norm_affine(model: onnx.ModelProto, node: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray] | None:
    """The per-channel (scale, shift) in float64 that an inference-time batch normalisation applies."""
    if node.op_type != "BatchNormalization" or len([name for name in node.output if name]) != 1:
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    tensors = constants(model)
    if attributes.get("training_mode", 0) or any(name not in tensors for name in node.input[1:5]):
        return None
    gamma, beta, mean, variance = (array(tensors[name]).astype(np.float64) for name in node.input[1:5])
    if gamma.ndim != 1:  # an old opset's statistics per pixel
        return None
    scale = gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    return scale, beta - mean * scale


def _scale_conv(model: onnx.ModelProto, conv: onnx.NodeProto, scale: np.ndarray, shift: np.ndarray) -> bool:
    """Multiply a convolution's output channels into its constants; False if they are not constant."""
    tensors = constants(model)
    if len(conv.input) == 3 and not conv.input[2]:
        del conv.input[2]
    if any(name not in tensors for name in conv.input[1:]):
        return False
    kernel = array(tensors[conv.input[1]])
    bias = array(tensors[conv.input[2]]).astype(np.float64) if len(conv.input) > 2 else 0.0
    folded = kernel.astype(np.float64) * scale.reshape(-1, *[1] * (kernel.ndim - 1))
    values = (folded, bias * scale + shift)
    used = use_counts(model)
    for name in conv.input[1:]:
        if used[name] == 1:  # nobody else reads the old value, so the new one may have its name
            model.graph.initializer.remove(tensors[name])
    wanted = (*conv.input[1:], conv.input[1] + "_bias")
    names = [set_weight(model, name, value.astype(kernel.dtype)) for name, value in zip(wanted, values, strict=False)]
    del conv.input[1:]
    conv.input.extend(names)
    return True


def _scale_and_shift(
    model: onnx.ModelProto, node: onnx.NodeProto, scale: np.ndarray, shift: np.ndarray, rank: int
) -> list[onnx.NodeProto]:
    dtype = array(constants(model)[node.input[1]]).dtype
    along_channels = (1, -1, *[1] * (rank - 2))  # full rank, so that the layout conversion can follow it
    name = node.name or node.output[0]
    scale_name = set_weight(model, f"{name}.scale", scale.astype(dtype).reshape(along_channels))
    shift_name = set_weight(model, f"{name}.shift", shift.astype(dtype).reshape(along_channels))
    scaled = free_name(model, f"{node.output[0]}.scaled")
    return [
        helper.make_node("Mul", [node.input[0], scale_name], [scaled], name=f"{name}.scale"),
        helper.make_node("Add", [scaled, shift_name], [node.output[0]], name=f"{name}.shift"),
    ]
