"""Fully connected layers as 1x1 convolutions: one image of one row, whose pixels are the batch."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tdc_tvm.relay_passes.graph import RESHAPES, ints, is_static

_ADD, _MATMUL = (tvm.ir.Op.get(f"relax.{name}") for name in ("add", "matmul"))
_PERMUTE = tvm.ir.Op.get("relax.permute_dims")
_CLIPS = [tvm.ir.Op.get(f"relax.{name}") for name in ("nn.relu", "maximum", "minimum")]


@tvm.transform.module_pass(opt_level=0, name="DenseToConv")
def dense_to_conv(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Make products of a matrix and constant weights convolutions, bias and activation right after them.

    So they get kernels that stream their weights through all of a GPU's processors, and epilogues.
    """
    mod = mod.clone()
    mod["main"] = _Rewriter().visit_expr(mod["main"])
    return relax.transform.DeadCodeElimination()(relax.transform.CanonicalizeBindings()(mod))


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self) -> None:
        super().__init__()
        # Results as (1, 1, batch, channels).
        self.pixels: list[relax.Var] = []
        self.count = 0

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if call.op == _MATMUL and _is_dense(call):
            x, weight = call.args
            batch, depth = (int(extent) for extent in x.ty.shape)
            kernel = weight.value.numpy().T
            image = self._image(x)
            if image is not None:
                # The weights can be permuted at compile time, images cannot.
                x, extents = image, ints(image.ty.shape.values)
                channels_first = kernel.reshape(-1, extents[3], extents[1], extents[2])
                kernel = channels_first.transpose(0, 2, 3, 1).reshape(kernel.shape)
            x = self.builder_.emit(relax.op.reshape(x, (1, 1, batch, depth)))
            kernel = np.ascontiguousarray(kernel)[:, :, None, None]
            conv = relax.op.nn.conv2d(x, relax.const(kernel), data_layout="NHWC", kernel_layout="OIHW")
            self.count += 1
            return self._as_matrix(self.builder_.emit(conv, f"dense{self.count}"))
        if call.op == _ADD or any(call.op == op for op in _CLIPS):
            results = [self._as_pixels(arg) for arg in call.args]
            others = [arg for arg, result in zip(call.args, results, strict=True) if result is None]
            if len(others) < len(results) and all(_is_row(arg) for arg in others):
                args = [_row(arg) if result is None else result for arg, result in zip(call.args, results, strict=True)]
                return self._as_matrix(self.builder_.emit(relax.Call(call.op, args, call.attrs)))
        return call

    def _image(self, x: relax.Expr) -> relax.Expr | None:
        """What a matrix is a batch of, channels last, if a permutation put its channels first; else None."""
        batch = int(x.ty.shape[0])
        while isinstance(x, relax.Var) and isinstance(call := self.lookup_binding(x), relax.Call):
            x = call.args[0] if call.args else x
            if call.op == _PERMUTE:
                is_image = call.attrs.axes is not None and ints(call.attrs.axes) == (0, 3, 1, 2) and is_static(x)
                return x if is_image else None
            if not any(call.op == op for op in RESHAPES) or int(call.ty.shape[0]) != batch:
                return None
        return None

    def _as_matrix(self, result: relax.Var) -> relax.Expr:
        self.pixels.append(result)
        return relax.op.reshape(result, tuple(result.ty.shape)[2:])

    def _as_pixels(self, value: relax.Expr) -> relax.Var | None:
        """What a matrix is a reshaped result of a convolution; None if it is not."""
        found = self.lookup_binding(value) if isinstance(value, relax.Var) else None
        if not isinstance(found, relax.Call) or found.op.name != "relax.reshape":
            return None
        return next((result for result in self.pixels if result.same_as(found.args[0])), None)


def _is_dense(call: relax.Call) -> bool:
    x, weight = call.args
    is_static = all(isinstance(extent, tvm.tirx.IntImm) for extent in x.ty.shape) if x.ty.shape is not None else False
    is_float = str(call.ty.dtype) == str(weight.ty.dtype) == "float32"
    return (
        isinstance(weight, tvm.ir.GenericConst) and len(weight.value.shape) == x.ty.ndim == 2 and is_static and is_float
    )


def _is_row(value: relax.Expr) -> bool:
    """Whether a constant is the same for all rows of a matrix."""
    if not isinstance(value, tvm.ir.GenericConst):
        return False
    shape = tuple(value.value.shape)
    return len(shape) < 2 or (len(shape) == 2 and shape[0] == 1)


def _row(value: tvm.ir.GenericConst) -> relax.Expr:
    """A constant for all pixels."""
    array = value.value.numpy()
    return relax.const(array.reshape(1, 1, 1, -1), str(array.dtype))
