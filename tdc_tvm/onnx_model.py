"""Reading ONNX models: everything that can be wrong with one is found here, before TVM sees it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from tdc_tvm.errors import TdcError

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
        A copy of its own, weights included, local functions inlined.

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
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker raises several unrelated types
        raise TdcError(f"{label} is not a valid ONNX model: {str(error).strip()}") from None
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return model


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TdcError(f"cannot read the model {path}: {error.strerror or error}") from None


def _load_external_data(model: onnx.ModelProto, label: str, folder: Path | None) -> None:
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
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
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        if path.stat().st_size < end:
            raise TdcError(
                f"external data {path} is truncated: it has {path.stat().st_size} bytes,"
                f" tensor {tensor.name!r} ends at byte {end}"
            )
    try:
        onnx.load_external_data_for_model(model, str(folder))
    except Exception as error:  # onnx raises several unrelated types here
        raise TdcError(f"external data of {label} cannot be read: {error}") from None


def check_operators(model: onnx.ModelProto) -> None:
    """Refuse operators that TVM's importer does not know, all at once.

    Raises
    ------
    TdcError
        Naming every unsupported operator with the layers that use it.
    """
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    known = _get_convert_map()
    # The importer translates these itself, outside its table.
    known_anyway = {"Constant", "If", "Identity"}
    unsupported: dict[str, list[str]] = defaultdict(list)
    for node in model.graph.node:
        foreign = node.domain not in ("", "ai.onnx")
        if foreign or (node.op_type not in known and node.op_type not in known_anyway):
            operator = f"{node.domain}.{node.op_type}" if foreign else node.op_type
            unsupported[operator].append(node.name or node.output[0])
    if unsupported:
        lines = [f"  {operator}: {', '.join(layers)}" for operator, layers in sorted(unsupported.items())]
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
        The size of a dynamic leading dimension.

    Returns
    -------
    list[TensorInfo]
        The inputs, weights not counted, in the model's order.

    Raises
    ------
    TdcError
        If a dimension stays dynamic, or a given shape contradicts the model.
    """
    given = dict(input_shapes or {})
    weights = {t.name for t in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    names = [value.name for value in inputs]
    if unknown := sorted(set(given) - set(names)):
        raise TdcError(f"input_shapes names {unknown}, but the model's inputs are {names}")
    infos = []
    for value in inputs:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
            raise TdcError(f"input {value.name!r} has no declared tensor shape; declare it in the model")
        declared: list[int | str] = [
            dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or "?") for dim in tensor.shape.dim
        ]
        shape: list[int | str] = list(declared)
        if value.name in given:
            shape = [int(extent) for extent in given[value.name]]
            fits = len(shape) == len(declared) and all(
                isinstance(want, str) or want == have for want, have in zip(declared, shape, strict=True)
            )
            if not fits:
                raise TdcError(
                    f"input {value.name!r} is declared as {_dims(declared)}; input_shapes gives {_dims(shape)}"
                )
        elif shape and isinstance(shape[0], str) and batch is not None:
            shape[0] = int(batch)
        if any(isinstance(extent, str) for extent in shape):
            hint = (
                "pass batch=1 (or another size)"
                if all(isinstance(e, int) for e in shape[1:])
                else (f"pass input_shapes={{{value.name!r}: (...)}}")
            )
            raise TdcError(f"input {value.name!r} has the dynamic shape {_dims(shape)} without bounds; {hint}")
        static = tuple(int(extent) for extent in shape)
        if min(static, default=1) < 1:
            raise TdcError(f"input {value.name!r} has the shape {_dims(static)}; every extent must be at least 1")
        for dim, extent in zip(tensor.shape.dim, static, strict=True):
            dim.dim_value = extent
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
        infos.append(TensorInfo(value.name, static, dtype))
    infer_shapes(model)
    return infos


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
    declared = {value.name for value in slim.graph.input}
    for tensor in slim.graph.initializer:
        if tensor.name in big and tensor.name not in declared:
            slim.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
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
    del model.graph.output[:]
    model.graph.output.extend(slim.graph.output)


def _dims(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(str(extent) for extent in shape) + ")"


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The model's initializers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def use_counts(model: onnx.ModelProto) -> Counter[str]:
    """How often each value is read, a graph output counted as a read."""
    counts = Counter(name for node in model.graph.node for name in node.input if name)
    counts.update(value.name for value in model.graph.output)
    return counts


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


def conv_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The two-dimensional ``Conv`` nodes in graph order."""
    tensors = constants(model)
    shapes = {
        value.name: len(value.type.tensor_type.shape.dim) for value in (*model.graph.value_info, *model.graph.input)
    }

    def rank(name: str) -> int:
        return len(tensors[name].dims) if name in tensors else shapes.get(name, 0)

    return [node for node in model.graph.node if node.op_type == "Conv" and rank(node.input[1]) == 4]


def parameter_count(model: onnx.ModelProto) -> int:
    """Elements of all floating-point initializers."""
    return sum(
        int(np.prod(t.dims, dtype=np.int64))
        for t in model.graph.initializer
        if np.issubdtype(onnx.helper.tensor_dtype_to_np_dtype(t.data_type), np.floating)
    )


def array(tensor: onnx.TensorProto) -> np.ndarray:
    """The value of an initializer."""
    return numpy_helper.to_array(tensor)
