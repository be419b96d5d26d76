"""Reading ONNX models: everything that can be wrong with one is found here, before TVM sees it."""

from __future__ import annotations

import operator
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper

from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.shape import Conv2dShape

# Before this version of the intermediate representation, every initializer is declared as an input too.
_WEIGHTS_ARE_NO_INPUTS = 4
# Of a dimension: what 32 bits hold.
_MAX_EXTENT = 2**31 - 1

ModelSource = str | os.PathLike | bytes | onnx.ModelProto


def load_onnx(source: ModelSource) -> onnx.ModelProto:
    """Read and check an ONNX model.

    Parameters
    ----------
    source : path, bytes or onnx.ModelProto
        External data is read when ``source`` is a path; its files must lie in the model's folder.

    Returns
    -------
    onnx.ModelProto
        A copy of its own, local functions inlined.  Weights are included, none of them an input, and
        what ``Constant`` nodes hold is a weight like any other.

    Raises
    ------
    TdcError
        If the file is missing, empty, truncated or not ONNX; if external data is missing or lies
        outside the model's folder; if the checker rejects the model.
    """
    model = onnx.ModelProto()
    folder: Path | None = None
    if isinstance(source, onnx.ModelProto):
        label = "the given ModelProto"
        model.CopyFrom(source)
    else:
        if isinstance(source, bytes):
            label, data = "the given bytes", source
        elif isinstance(source, (str, os.PathLike)):
            path = Path(source)
            label, folder, data = str(path), path.resolve().parent, _read_file(path)
        else:
            raise TdcError(
                f"a model is a path, an onnx.ModelProto or bytes; found {type(source).__name__}"
                " (export a PyTorch module with tdc_tvm.training.export_onnx first)"
            )
        if not data:
            raise TdcError(f"{label} is empty; expected an ONNX model")
        try:
            model.ParseFromString(data)
        except DecodeError as error:
            raise TdcError(f"{label} is not an ONNX model, or it is truncated ({error}); export it again") from None
    if not model.ir_version or not model.graph.node:
        raise TdcError(f"{label} is not an ONNX model: it has no graph with operators; export it again")
    _load_external_data(model, label, folder)
    _complete_outputs(model, label)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker raises several unrelated types
        raise TdcError(f"{label} is not a valid ONNX model: {str(error).strip()}") from None
    weights = constants(model)
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, _WEIGHTS_ARE_NO_INPUTS)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _lift_constants(model)
    return model


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TdcError(f"cannot read the model {path}: {error.strerror or error}") from None


def _load_external_data(model: onnx.ModelProto, label: str, folder: Path | None) -> None:
    external = [t for t in _tensors(model.graph) if t.data_location == onnx.TensorProto.EXTERNAL]
    if not external:
        return
    if folder is None:
        raise TdcError(
            f"{label} keeps {len(external)} tensors in external files, which only a path can find;"
            " pass the model's path"
        )
    for tensor in external:
        entry = {prop.key: prop.value for prop in tensor.external_data}
        location = entry.get("location", "")
        path = (folder / location).resolve()
        if not location or not path.is_relative_to(folder):
            raise TdcError(
                f"tensor {tensor.name!r} of {label} points at external data outside the model's folder"
                f" ({location!r}); expected a file in {folder}"
            )
        if not path.is_file():
            raise TdcError(
                f"external data of {label} is missing: tensor {tensor.name!r} expects {path}; copy it beside the model"
            )
        try:
            offset, length = (int(entry.get(key, 0)) for key in ("offset", "length"))
        except ValueError:
            offset, length = -1, -1
        if min(offset, length) < 0:
            raise TdcError(
                f"tensor {tensor.name!r} of {label} has external data at offset {entry.get('offset')!r}, length"
                f" {entry.get('length')!r}; expected two whole numbers of bytes; export the model again"
            )
        end = offset + length
        if path.stat().st_size < end:
            raise TdcError(
                f"external data {path} is truncated: it has {path.stat().st_size} bytes,"
                f" tensor {tensor.name!r} ends at byte {end}"
            )
    try:
        onnx.load_external_data_for_model(model, str(folder))
    except Exception as error:  # onnx raises several unrelated types here
        raise TdcError(f"external data of {label} cannot be read: {error}") from None


def _complete_outputs(model: onnx.ModelProto, label: str) -> None:
    """Give outputs without a declared shape, which the checker refuses, the one that can be inferred."""

    def bare() -> list[onnx.ValueInfoProto]:
        outputs = (value for value in model.graph.output if value.type.HasField("tensor_type"))
        return [value for value in outputs if not value.type.tensor_type.HasField("shape")]

    if bare():
        infer_shapes(model)
    if names := ", ".join(repr(value.name) for value in bare()):
        raise TdcError(
            f"{label} declares no shape for its output {names}, and none can be inferred;"
            " declare one (dynamic extents may have names), or export the model again"
        )


def _lift_constants(model: onnx.ModelProto) -> None:
    """Turn ``Constant`` nodes, and ``Identity`` nodes that rename a weight, into initializers."""
    tensors, used = constants(model), use_counts(model)
    outputs = {value.name for value in model.graph.output}
    kept = []
    for node in model.graph.node:
        value = None
        if node.op_type == "Constant":
            value = _constant(node.attribute[0])
        elif node.op_type == "Identity" and node.output[0] not in outputs:
            value = tensors.get(node.input[0])
        if value is None:
            kept.append(node)
            continue
        if node.op_type == "Constant" or used[node.input[0]] > 1:
            model.graph.initializer.append(value)
            value = model.graph.initializer[-1]
            used.subtract(node.input)
        value.name = node.output[0]
        tensors[value.name] = value
    set_nodes(model, kept)


def _constant(attribute: onnx.AttributeProto) -> onnx.TensorProto | None:
    """The value of a ``Constant`` node by its one attribute; None for text and sparse tensors."""
    if attribute.name == "value":
        return attribute.t
    types = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}
    if attribute.name not in types:
        return None
    return numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), types[attribute.name]))


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all graphs inside it: the branches of ``If``, the bodies of loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for inner in graphs(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)


def check_operators(model: onnx.ModelProto) -> None:
    """Refuse operators that TVM's importer does not know, all at once.

    Raises
    ------
    TdcError
        Naming every unsupported operator with the layers that use it.
    """
    if model.graph.sparse_initializer:
        names = ", ".join(tensor.values.name for tensor in model.graph.sparse_initializer)
        raise TdcError(
            f"the model keeps sparse weights ({names}), which are not supported; store them as dense tensors"
        )
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    known = _get_convert_map()
    # The importer translates these itself, outside its table.
    known_anyway = {"Constant", "If", "Identity"}
    unsupported: dict[str, list[str]] = defaultdict(list)
    for node in (node for graph in graphs(model.graph) for node in graph.node):
        foreign = node.domain not in ("", "ai.onnx")
        if foreign or (node.op_type not in known and node.op_type not in known_anyway):
            kind = f"{node.domain}.{node.op_type}" if foreign else node.op_type
            unsupported[kind].append(node.name or node.output[0])
        elif node.op_type == "BatchNormalization" and _attributes(node).get("training_mode"):
            unsupported["BatchNormalization in training mode"].append(node.name or node.output[0])
    if unsupported:
        lines = [f"  {kind}: {', '.join(layers)}" for kind, layers in sorted(unsupported.items())]
        raise TdcError(
            f"the model has {len(unsupported)} unsupported operator(s), used by these layers:\n"
            + "\n".join(lines)
            + "\nReplace them in the model (or export it with another opset) and build again."
        )


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a model: its ONNX name, static shape and NumPy dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def freeze_shapes(
    model: onnx.ModelProto, input_shapes: Mapping[str, Sequence[int]] | None = None, batch: int | None = None
) -> list[TensorInfo]:
    """Give every input of ``model`` a static shape, in place.

    Parameters
    ----------
    model : onnx.ModelProto
        The model; its inputs' declared shapes are overwritten, and shapes are inferred anew.
    input_shapes : mapping of input name to shape, optional
        Needed for inputs that have dynamic dimensions beyond the leading one.
    batch : int, optional
        The size of a dynamic leading dimension, whatever ``input_shapes`` has there.

    Returns
    -------
    list[TensorInfo]
        The inputs, weights not counted, in the model's order.

    Raises
    ------
    TdcError
        If a dimension stays dynamic, or a given shape contradicts the model.
    """
    if not isinstance(input_shapes, (Mapping, type(None))):
        raise TdcError(
            f"input_shapes is {input_shapes!r}; expected names with shapes, such as {{'x': (1, 3, 224, 224)}}"
        )
    if batch is not None and not isinstance(batch, (int, np.integer)):
        raise TdcError(f"batch is {batch!r}; expected a whole number, such as 1")
    given = {name: _given_shape(name, shape) for name, shape in (input_shapes or {}).items()}
    names = [value.name for value in model.graph.input]
    if unknown := sorted(set(given) - set(names)):
        raise TdcError(f"input_shapes (--input-shape) names {unknown}, but the model's inputs are {names}")
    infos = []
    for value in model.graph.input:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
            raise TdcError(f"input {value.name!r} has no declared tensor shape; declare it in the model")
        declared: list[int | str] = [
            # Some exporters write a dynamic extent as 0 or -1.
            dim.dim_value if dim.dim_value > 0 else (dim.dim_param or "?")
            for dim in tensor.shape.dim
        ]
        shape: list[int | str] = list(declared)
        if value.name in given:
            shape = [*given[value.name]]
            fits = len(shape) == len(declared) and all(
                isinstance(want, str) or want == have for want, have in zip(declared, shape, strict=True)
            )
            if not fits:
                raise TdcError(
                    f"input {value.name!r} is declared as {_dims(declared)}; input_shapes gives {_dims(shape)}"
                )
        if declared and isinstance(declared[0], str) and batch is not None:
            shape[0] = int(batch)
        if any(isinstance(extent, str) for extent in shape):
            hint = (
                "pass batch=1 (--batch 1), or another size"
                if all(isinstance(e, int) for e in shape[1:])
                else f"pass input_shapes={{{value.name!r}: (...)}} (--input-shape {value.name}:1x3x224x224)"
            )
            raise TdcError(f"input {value.name!r} has the dynamic shape {_dims(shape)} without bounds; {hint}")
        static = tuple(int(extent) for extent in shape)
        if min(static, default=1) < 1:
            raise TdcError(f"input {value.name!r} has the shape {_dims(static)}; every extent must be at least 1")
        if max(static, default=1) > _MAX_EXTENT:
            raise TdcError(f"input {value.name!r} has the shape {_dims(static)}; an extent is {_MAX_EXTENT} at most")
        for dim, extent in zip(tensor.shape.dim, static, strict=True):
            dim.dim_value = extent
        numpy_type = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        if numpy_type.kind not in "fiub":
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
            raise TdcError(
                f"input {value.name!r} has the type {kind}; expected floating-point, integer or boolean numbers"
            )
        dtype = numpy_type.name
        infos.append(TensorInfo(value.name, static, dtype))
    if batch is not None and infos and not any(info.shape[:1] == (batch,) for info in infos):
        shapes = ", ".join(f"{info.name} {_dims(info.shape)}" for info in infos)
        raise TdcError(
            f"batch={batch} fits no input, the model's shapes are fixed ({shapes}); leave batch (--batch) out"
        )
    infer_shapes(model)
    return infos


def frozen(
    model: onnx.ModelProto, input_shapes: Mapping[str, Sequence[int]] | None = None, batch: int | None = None
) -> tuple[onnx.ModelProto, list[TensorInfo]]:
    """A copy of ``model`` that `freeze_shapes` gave static shapes, and its inputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy, freeze_shapes(copy, input_shapes, batch)


def _given_shape(name: str, shape: Sequence[int]) -> list[int]:
    try:
        return [operator.index(extent) for extent in shape]
    except TypeError:
        raise TdcError(
            f"input_shapes[{name!r}] is {shape!r}; expected whole numbers, such as (1, 3, 224, 224)"
        ) from None


def infer_shapes(model: onnx.ModelProto) -> None:
    """Infer intermediate shapes, in place; unknown extents stay unknown.

    Raises
    ------
    TdcError
        If the model's shapes contradict each other.
    """
    # Weights are replaced by their shapes, so that the model's size does not matter.
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    big = {t.name for t in slim.graph.initializer if np.prod(t.dims, dtype=np.int64) > 1024}
    kept = [t for t in slim.graph.initializer if t.name not in big]
    for tensor in slim.graph.initializer:
        if tensor.name in big:
            slim.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del slim.graph.initializer[:]
    slim.graph.initializer.extend(kept)
    del slim.graph.value_info[:]
    for value in slim.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        slim = onnx.shape_inference.infer_shapes(slim, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise TdcError(f"the model's shapes contradict each other: {error}") from None
    del model.graph.value_info[:]
    model.graph.value_info.extend(slim.graph.value_info)
    for declared, inferred in zip(model.graph.output, slim.graph.output, strict=True):
        # An operator that ONNX does not know has no inferred shape: the declared one stays.
        if inferred.type.tensor_type.HasField("shape"):
            declared.CopyFrom(inferred)


def _dims(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(str(extent) for extent in shape) + ")"


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The model's initializers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def set_nodes(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Replace the graph's nodes."""
    nodes = list(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def use_counts(model: onnx.ModelProto) -> Counter[str]:
    """How often each value is read, also from inner graphs; a graph output counts as a read."""
    counts: Counter[str] = Counter()
    for graph in graphs(model.graph):
        counts.update(name for node in graph.node for name in node.input if name)
        counts.update(value.name for value in graph.output)
    return counts


def value_names(model: onnx.ModelProto) -> set[str]:
    """The names of all values, those of inner graphs too: what a new value must not be called."""
    names: set[str] = set()
    for graph in graphs(model.graph):
        names.update(value.name for value in (*graph.input, *graph.initializer))
        names.update(name for node in graph.node for name in node.output)
    return names


def metadata(node: onnx.NodeProto) -> dict[str, str]:
    """A node's metadata properties."""
    return {prop.key: prop.value for prop in node.metadata_props}


def layer_name(node: onnx.NodeProto) -> str:
    """The layer a convolution node came from: its weight's name without ``.weight``, else the node's own name.

    Exporters name nodes by counting (``node_conv2d_3``) and weights by module path
    (``layer1.0.conv1.weight``), so the weight's name is the one that people recognise.
    """
    weight = node.input[1] if len(node.input) > 1 else ""
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    return node.name or node.output[0]


def layer_names(model: onnx.ModelProto) -> list[str]:
    """A unique name for each of `conv_nodes`: `layer_name`, or the output's name where layers share that."""
    nodes = conv_nodes(model)
    names = [layer_name(node) for node in nodes]
    counts = Counter(names)
    return [name if counts[name] == 1 else node.output[0] for name, node in zip(names, nodes, strict=True)]


def conv_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The two-dimensional ``Conv`` nodes in graph order."""
    tensors = constants(model)

    def rank(name: str) -> int:
        return len(tensors[name].dims) if name in tensors else len(value_shape(model, name))

    return [node for node in model.graph.node if node.op_type == "Conv" and rank(node.input[1]) == 4]


def conv_shape(model: onnx.ModelProto, node: onnx.NodeProto, kernel_shape: tuple[int, ...]) -> Conv2dShape | None:
    """The shape of a ``Conv`` node; None where its input's extents are unknown."""
    dims = value_shape(model, node.input[0])
    if len(dims) != 4 or min(dims) < 1:
        return None
    attributes = _attributes(node)
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
            dims[0], dims[2], dims[3], dims[1], kernel_shape[0], (kernel_shape[2], kernel_shape[3]),
            stride, padding, dilation, attributes.get("group", 1),
        )  # fmt: skip
    except TdcError as error:
        raise TdcError(f"layer {layer_name(node)}: {error}") from None


def value_shape(model: onnx.ModelProto, name: str) -> list[int]:
    """The inferred extents of a value, 0 where one is unknown; empty where even the rank is."""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        if value.name == name:
            return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return []


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def parameter_count(model: onnx.ModelProto) -> int:
    """Elements of all floating-point initializers."""
    return sum(
        int(np.prod(t.dims, dtype=np.int64))
        for t in model.graph.initializer
        if np.issubdtype(helper.tensor_dtype_to_np_dtype(t.data_type), np.floating)
    )


def array(tensor: onnx.TensorProto) -> np.ndarray:
    """The value of an initializer."""
    return numpy_helper.to_array(tensor)
