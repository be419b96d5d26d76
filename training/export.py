"""Export of PyTorch models to ONNX, with every convolution named after its layer."""

from __future__ import annotations

import ast
import json
import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from tdc_tvm.errors import TdcError
from tdc_tvm.files import write_atomic
from tdc_tvm.plan import DecompositionPlan
from tdc_tvm.training.decompose import TuckerConv2d
from tdc_tvm.training.inputs import Example, check_model, copy_model, eval_mode, example_inputs, run_model

# Protocol buffers end at 2 GiB; the rest is room for the graph.
MAX_WEIGHT_BYTES = 2**31 - 2**26
DEFAULT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def export_onnx(
    model: nn.Module,
    example: Example,
    path: str | os.PathLike,
    *,
    dynamic_batch: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Export a model to ONNX, in eval mode and on the CPU; the model itself is not changed.

    A Tucker layer becomes three plain ``Conv`` nodes, so that any runtime can run the file.  Each
    convolution node has metadata properties: ``tdc.layer`` (the module's path), and for Tucker
    layers ``tdc.stage`` (``reduce``, ``core`` or ``expand``), ``tdc.rank_in`` and ``tdc.rank_out``.
    The model's metadata property ``tdc.plan`` holds the plan as JSON.

    Parameters
    ----------
    model : nn.Module
        The model, decomposed or not.
    example : tensor, tensors or shape
        What the model is called with.
    path : path
        The ``.onnx`` file; written whole or not at all.
    dynamic_batch : bool
        Leave the leading dimension of all inputs open (called ``batch``).
    verify : bool
        Compare ONNX Runtime with PyTorch on the example, and on another batch size if it is dynamic.
    tolerance : float, optional
        Largest allowed ``max |difference| / max |PyTorch|``; by default 1e-4 in FP32, 2e-2 in FP16.
    metadata : mapping of str to str, optional
        More metadata properties of the model.

    Returns
    -------
    onnx.ModelProto
        What was written.

    Raises
    ------
    TdcError
        If the model does not run on the example, cannot be exported, has more weights than an ONNX
        file holds (2 GiB), differs from PyTorch in ONNX Runtime, the file cannot be written, or as `check_exporter`.
    """
    check_model(model)
    check_exporter()
    weight_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if weight_bytes > MAX_WEIGHT_BYTES:
        raise TdcError(
            f"the model's weights take {weight_bytes / 2**30:.2f} GiB; an ONNX file holds less than 2 GiB; "
            "decompose the model first, or convert it with model.half()"
        )
    # A copy on the CPU: the user's model keeps its mode and device, and no TF32 blurs the comparison.  In
    # PyTorch's own memory format: from channels_last the exporter makes gathers of what is a reshape.
    model = copy_model(model).cpu().to(memory_format=torch.contiguous_format)
    inputs = tuple(tensor.contiguous() for tensor in example_inputs(model, example))
    if dynamic_batch:
        inputs = _with_batch(inputs, max(2, _batch(inputs)))
    with eval_mode(model):
        expected = _tensors(run_model(model, inputs))
        proto = _export(model, inputs, len(expected), dynamic_batch)
        _tag(proto, model)
        for key, value in (metadata or {}).items():
            proto.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(proto)
        data = proto.SerializeToString()
        if verify:
            limit = DEFAULT_TOLERANCE.get(expected[0].dtype, 1e-4) if tolerance is None else tolerance
            _verify(data, inputs, expected, limit)
            if dynamic_batch:
                other = _with_batch(inputs, _batch(inputs) + 1)
                _verify(data, other, _tensors(run_model(model, other)), limit)
    with write_atomic(path) as temporary:
        temporary.write_bytes(data)
    return proto


def check_exporter() -> None:
    """Refuse to export without what PyTorch's exporter needs.

    Raises
    ------
    TdcError
        If onnxscript is not installed.
    """
    if find_spec("onnxscript") is None:
        raise TdcError("ONNX export needs onnxscript; install it with: pip install 'tdc-tvm[train]'")


def _export(model: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: int, dynamic_batch: bool) -> onnx.ModelProto:
    dynamic_shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        dynamic_shapes = tuple({0: batch} for _ in inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                output_names=["output"] if outputs == 1 else [f"output_{i}" for i in range(outputs)],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise TdcError(f"PyTorch cannot export {type(model).__name__} to ONNX: {error}") from error
    assert program is not None
    return program.model_proto


def _tag(proto: onnx.ModelProto, model: nn.Module) -> None:
    """Name convolutions after their modules, and drop the exporter's notes, which hold file paths."""
    convs = {name for name, module in model.named_modules() if isinstance(module, _ConvNd)}
    tucker = {name: module for name, module in model.named_modules() if isinstance(module, TuckerConv2d)}
    for node in proto.graph.node:
        layer = _module_path(node, convs) if node.op_type.startswith("Conv") else None
        del node.metadata_props[:]
        node.doc_string = ""
        if layer is None:
            continue
        parent, _, stage = layer.rpartition(".")
        properties = {"tdc.layer": layer}
        if parent in tucker:
            ranks = tucker[parent].ranks
            properties = {
                "tdc.layer": parent,
                "tdc.stage": stage,
                "tdc.rank_in": str(ranks.rank_in),
                "tdc.rank_out": str(ranks.rank_out),
            }
        onnx.helper.set_model_props(node, properties)  # type: ignore[arg-type]
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    if tucker:
        plan = DecompositionPlan({name: layer.ranks for name, layer in tucker.items()}, type(model).__name__)
        onnx.helper.set_model_props(proto, {"tdc.plan": json.dumps(plan.to_dict())})


def _module_path(node: onnx.NodeProto, convs: set[str]) -> str | None:
    """The module that a convolution node comes from; None if it comes from a plain function call.

    The weight is named after it.  Where the exporter made a new weight, its note on scopes tells;
    batch normalisation that was folded in overwrites that note, so it comes second.
    """
    path = node.input[1].removesuffix(".weight")
    if path in convs:
        return path
    notes = {prop.key: prop.value for prop in node.metadata_props}
    scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
    return next((scope for scope in reversed(scopes) if scope in convs), None)


def _verify(data: bytes, inputs: tuple[torch.Tensor, ...], expected: list[torch.Tensor], tolerance: float) -> None:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        found = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    except Exception as error:  # ONNX Runtime raises several unrelated types
        raise TdcError(
            f"ONNX Runtime cannot run the exported model: {error}; pass verify=False to write it anyway"
        ) from error
    for name, ours, theirs in zip((v.name for v in session.get_outputs()), found, expected, strict=True):
        reference = theirs.double().numpy()
        scale = float(np.abs(reference).max(initial=0.0)) or 1.0
        error_ratio = float(np.abs(ours.astype(np.float64) - reference).max(initial=0.0)) / scale
        if not error_ratio <= tolerance:
            raise TdcError(
                f"the exported model's output {name!r} differs from PyTorch's by {error_ratio:.2e} of its maximum; "
                f"at most {tolerance:.0e} was expected; nothing was written (see tolerance and verify)"
            )


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _batch(inputs: tuple[torch.Tensor, ...]) -> int:
    return inputs[0].shape[0]


def _with_batch(inputs: tuple[torch.Tensor, ...], batch: int) -> tuple[torch.Tensor, ...]:
    """The inputs repeated or cut to another batch size (torch.export takes a size of 1 for a constant)."""
    return tuple(torch.cat([tensor] * -(-batch // tensor.shape[0]))[:batch] for tensor in inputs)
