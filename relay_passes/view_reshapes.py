"""Lowers what only changes a tensor's shape to a view of it; TVM has a kernel for each that gives a result."""

from __future__ import annotations

from tvm import relax

from tdc_tvm.relay_passes.graph import RESHAPES, ints, is_static


def _legalize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    x = call.args[0]
    if is_static(x) and is_static(call) and _keeps_order(call):
        return call if call.op.name == "relax.reshape" else relax.op.reshape(x, call.ty.shape)
    return call.op.get_attr("FLegalize")(bb, call)


def _keeps_order(call: relax.Call) -> bool:
    """Whether elements lie in the same order as before: axes that change places have one element."""
    if call.op.name != "relax.permute_dims":
        return True
    extents = ints(call.args[0].ty.shape.values)
    axes = tuple(reversed(range(len(extents)))) if call.attrs.axes is None else ints(call.attrs.axes)
    moved = [axis % len(extents) for axis in axes if extents[axis] > 1]
    return moved == sorted(moved)


# For LegalizeOps.
VIEW_RESHAPES = {name: _legalize for name in (*(op.name for op in RESHAPES), "relax.permute_dims")}
