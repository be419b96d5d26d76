"""Keeps activations in the type that kernels store, where they would be widened and narrowed again."""

from __future__ import annotations

import tvm
from tvm import relax

_CAST, _CONCAT = (tvm.ir.Op.get(f"relax.{name}") for name in ("astype", "concat"))
# What gives nearly the same from operands of fewer bits: no sums of many terms, no quotients, no exponentials.
_NARROW = {
    tvm.ir.Op.get(f"relax.{name}")
    for name in (
        "add", "multiply", "subtract", "maximum", "minimum", "clip", "nn.relu", "nn.leakyrelu", "nn.max_pool2d",
        "concat", "permute_dims", "reshape", "flatten", "squeeze", "expand_dims", "strided_slice", "split",
    )
}  # fmt: skip
_WIDE = "float32"


@tvm.transform.module_pass(opt_level=0, name="NarrowActivations")
def narrow_activations(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Compute what lies between casts from and to a narrow type in that type, and drop casts that undo each other.

    Casts to FP32 stand behind kernels that store FP16 or BF16; those back, before the next ones.
    """
    mod = mod.clone()
    mod["main"] = _Narrower().visit_expr(mod["main"])
    return relax.transform.DeadCodeElimination()(mod)


@relax.expr_functor.mutator
class _Narrower(relax.PyExprMutator):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if call.op == _CAST:
            source = self._narrow(call.args[0])
            return source if source is not None and source.ty.dtype == call.attrs.dtype else call
        if call.op not in _NARROW or not _is_wide(call):
            return call
        operands = list(self._fields(call.args[0])) if call.op == _CONCAT else list(call.args)
        narrow = [self._narrow(operand) for operand in operands]
        types = {str(one.ty.dtype) for one in narrow if one is not None}
        others = [operand for operand, one in zip(operands, narrow, strict=True) if one is None]
        tensors = [one for one in others if isinstance(one.ty, relax.TensorType) and not _is_constant(one)]
        if len(types) != 1 or tensors:
            return call
        (dtype,) = types
        values = [
            one if one is not None else _cast_constant(operand, dtype)
            for operand, one in zip(operands, narrow, strict=True)
        ]
        args = [relax.Tuple(values)] if call.op == _CONCAT else values
        result = self.builder_.emit(relax.Call(call.op, args, call.attrs))
        return relax.op.astype(result, _WIDE)

    def _fields(self, value: relax.Expr) -> relax.Tuple | list[relax.Expr]:
        found = self.lookup_binding(value) if isinstance(value, relax.Var) else value
        return found.fields if isinstance(found, relax.Tuple) else [value]

    def _narrow(self, value: relax.Expr) -> relax.Expr | None:
        """What a value was widened from; None if it was not."""
        found = self.lookup_binding(value) if isinstance(value, relax.Var) else value
        if not isinstance(found, relax.Call) or found.op != _CAST or str(found.attrs.dtype) != _WIDE:
            return None
        return found.args[0] if str(found.args[0].ty.dtype) in ("float16", "bfloat16") else None


def _is_wide(call: relax.Call) -> bool:
    return isinstance(call.ty, relax.TensorType) and str(call.ty.dtype) == _WIDE


def _is_constant(value: relax.Expr) -> bool:
    return isinstance(value, tvm.ir.GenericConst)


def _cast_constant(value: relax.Expr, dtype: str) -> relax.Expr:
    if not _is_constant(value) or str(value.ty.dtype) != _WIDE:
        return value
    import ml_dtypes

    array = value.value.numpy()
    return relax.const(array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype), dtype)
