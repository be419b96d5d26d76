"""Lowers ``relu``, ``maximum`` and ``minimum`` so that NaN stays NaN, as in ONNX; TVM's own forms drop it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, te, tirx, topi

Legalize = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]


def _legalize(name: str, wins: Callable[[Any, Any], Any], by_tvm: Callable) -> Legalize:
    """The larger or the smaller of two by element; ``wins(x, y)`` says whether ``x`` is it for certain."""

    def choose(a: te.Tensor, b: te.Tensor | float) -> te.Tensor:
        if not str(a.dtype).startswith(("float", "bfloat")):
            return by_tvm(a, b)
        if not isinstance(b, te.Tensor):
            bound = tirx.const(b, a.dtype)
            return te.compute(a.shape, lambda *at: tirx.Select(wins(bound, a(*at)), bound, a(*at)))

        def element(*at: Any) -> Any:
            x, y = _at(a, at), _at(b, at)
            # Neither wins where one is NaN, and then the sum is NaN.
            return tirx.Select(wins(x, y), x, tirx.Select(tirx.Or(wins(y, x), x.equal(y)), y, x + y))

        return te.compute(by_tvm(a, b).shape, element)

    def legalize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        a, b = call.args if len(call.args) == 2 else (call.args[0], relax.const(0.0, call.args[0].ty.dtype))
        if _is_number(a):
            a, b = b, a
        return bb.call_te(choose, a, b.value.numpy().item() if _is_number(b) else b, primfunc_name_hint=name)

    return legalize


def _at(tensor: te.Tensor, index: tuple) -> Any:
    """An element of a tensor that is broadcast over ``index``."""
    own = index[len(index) - tensor.ndim :]
    return tensor(*(0 if extent == 1 else i for i, extent in zip(own, tensor.shape, strict=True)))


def _is_number(expr: relax.Expr) -> bool:
    return isinstance(expr, tvm.ir.GenericConst) and not expr.value.shape


# For LegalizeOps.
KEEP_NAN = {
    "relax.nn.relu": _legalize("relu", operator.gt, topi.maximum),
    "relax.maximum": _legalize("maximum", operator.gt, topi.maximum),
    "relax.minimum": _legalize("minimum", operator.lt, topi.minimum),
}
