"""From ONNX to Relax, with every convolution named after its layer."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from tdc_tvm.errors import TdcError
from tdc_tvm.onnx_model import conv_nodes

CONV_OP = tvm.ir.Op.get("relax.nn.conv2d")


class _Conv(onnx_frontend.Conv):
    """Binds each two-dimensional convolution to a variable named after its node.

    TVM's converter leaves the call unbound, so that it stands wherever it is first used.
    """

    @classmethod
    def _impl_v11(cls, bb, inputs, attr, params):
        result = super()._impl_v11(bb, onnx_frontend.onnx_input(inputs[:2]), attr, params)
        if is_conv2d(result):
            name = attr["tvm_custom"]["name"]  # only nodes inside a branch may have none
            result = bb.emit(result, _encode(name) if name else "conv")
        if inputs[2] is None:
            return result
        return relax.op.add(result, relax.op.reshape(inputs[2], [1, -1] + [1] * (result.ty.ndim - 2)))


class _Clip(onnx_frontend.Clip):
    """Imports constant bounds as ``maximum`` and ``minimum``, which passes can match and carry a layout through.

    TVM emits opaque functions, and its layout conversion stops at ``relax.clip``.
    """

    @classmethod
    def _impl_v1(cls, bb, inputs, attr, params):
        return _clip(bb, inputs[0], attr.get("min"), attr.get("max"))

    @classmethod
    def _impl_v13(cls, bb, inputs, attr, params):
        bounds = [inputs[1], inputs[2]]
        if not all(bound is None or isinstance(bound, tvm.ir.GenericConst) for bound in bounds):
            return super()._impl_v13(bb, inputs, attr, params)
        return _clip(bb, inputs[0], *(None if bound is None else bound.value.numpy().item() for bound in bounds))


def _clip(bb: relax.BlockBuilder, x: relax.Expr, low: float | None, high: float | None) -> relax.Expr:
    """Clip to bounds; None and, as in ONNX Runtime, NaN are no bound."""
    for bound, op in ((low, relax.op.maximum), (high, relax.op.minimum)):
        if bound is not None and not np.isnan(bound):
            x = bb.normalize(op(x, relax.const(bound, str(x.ty.dtype))))
    return x


def _elementwise(base: type, op) -> type:
    """A converter for ONNX ``Max`` or ``Min`` by a binary operator; TVM's stacks its inputs first."""

    class Converter(base):  # type: ignore[misc, valid-type]
        @classmethod
        def _impl_v1(cls, bb, inputs, attr, params):
            result = inputs[0]
            for other in inputs[1:]:
                result = bb.normalize(op(result, other))
            return result

        _impl_v6 = _impl_v8 = _impl_v12 = _impl_v13 = _impl_v1

    return Converter


@contextmanager
def _our_converters() -> Iterator[None]:
    ours = {
        "Clip": _Clip,
        "Conv": _Conv,
        "Max": _elementwise(onnx_frontend.Max, relax.op.maximum),
        "Min": _elementwise(onnx_frontend.Min, relax.op.minimum),
    }
    theirs = {name: getattr(onnx_frontend, name) for name in ours}
    vars(onnx_frontend).update(ours)
    try:
        yield
    finally:
        vars(onnx_frontend).update(theirs)


def import_onnx(model: onnx.ModelProto, conv_names: Sequence[str]) -> tvm.IRModule:
    """Import a checked, static ONNX model.

    Parameters
    ----------
    model : onnx.ModelProto
        Every input has a static shape.  Its two-dimensional ``Conv`` nodes get the names.
    conv_names : sequence of str
        A name for each two-dimensional ``Conv`` node, in graph order.

    Returns
    -------
    tvm.IRModule
        ``main`` takes the model's inputs in order.  The variable that holds a convolution's result
        is called after its name (`conv_name` reads it).

    Raises
    ------
    TdcError
        If TVM cannot import the model.
    """
    for node, name in zip(conv_nodes(model), conv_names, strict=True):
        node.name = name
    printed = io.StringIO()
    try:
        with _our_converters(), redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names of variables, which nobody sees
            mod = onnx_frontend.from_onnx(model)
    except Exception as error:  # whatever an operator's converter raises
        if missing := re.search(r"Missing outputs during conversion\. .* in (\w+)", str(error)):
            nodes = [n for n in model.graph.node if n.op_type == missing[1] and len(n.output) > 1]
            more = "; ".join(f"{n.name or n.output[0]}: {', '.join(n.output[1:])}" for n in nodes)
            raise TdcError(
                f"TVM computes only the first output of {missing[1]}, and the model has more ({more});"
                " take them out of the model"
            ) from error
        # The importer prints which operator it was.
        found = re.search(r"converting operator (\w+)", printed.getvalue())
        culprit = f"the operator {found[1]}" if found else "the model"
        raise TdcError(
            f"TVM cannot import {culprit}: {str(error).strip() or type(error).__name__}\n"
            "Check the model with onnx.checker.check_model(model, full_check=True);"
            " if it is valid, replace what TVM names, or export with another opset"
        ) from error
    values = {b.var: b.value for block in mod["main"].body.blocks for b in block.bindings}
    # A convolution that is the output is bound once more, and passes drop the first variable.
    outputs = {var: conv_name(value) for var, value in values.items() if is_conv2d(values.get(value))}
    return name_convs(mod, outputs)


def name_convs(mod: tvm.IRModule, names: dict[relax.Var, str]) -> tvm.IRModule:
    """Call variables of ``main`` that hold a convolution's result by their layers' names."""
    mod["main"] = _Renamer(names).visit_expr(mod["main"])
    return mod


def is_conv2d(value: relax.Expr) -> bool:
    """Whether a bound expression is a two-dimensional convolution."""
    return isinstance(value, relax.Call) and value.op == CONV_OP


# A variable's name ends up in generated C, so every byte that is no letter or digit is written as _ and its hex code.
_PREFIX, _SUFFIX = "conv_", "_end"


def _encode(name: str) -> str:
    escaped = "".join(c if c.isascii() and c.isalnum() else "".join(f"_{b:02x}" for b in c.encode()) for c in name)
    return _PREFIX + escaped + _SUFFIX


def conv_name(var: relax.Var) -> str:
    """The layer's name that `import_onnx` gave to a convolution's variable; else the variable's own."""
    hint = str(var.name)
    if not (hint.startswith(_PREFIX) and hint.endswith(_SUFFIX)):
        return hint
    escaped = hint.removeprefix(_PREFIX).removesuffix(_SUFFIX).encode()
    return re.sub(rb"_([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), escaped).decode()


@relax.expr_functor.mutator
class _Renamer(relax.PyExprMutator):
    def __init__(self, names: dict[relax.Var, str]) -> None:
        super().__init__()
        self.names = names

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var not in self.names:
            super().visit_var_binding_(binding)
            return
        name = _encode(self.names[binding.var])
        value = self.visit_expr(binding.value)
        new = type(binding.var)(name, binding.var.ty)
        self.builder_.emit_normalized(relax.VarBinding(new, value))
        self.set_var_remap(binding.var, new)
