"""Reading a Relax function: who defines a value, who uses it, and what follows a convolution."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from tdc_tvm.relay_passes.import_onnx import conv_name, is_conv2d
from tdc_tvm.schedules.kernel import Prologue
from tdc_tvm.schedules.shape import Conv2dShape, Epilogue

_ADD, _MULTIPLY, _RELU, _MAX, _MIN = (
    tvm.ir.Op.get(f"relax.{name}") for name in ("add", "multiply", "nn.relu", "maximum", "minimum")
)

MAX_POOL = tvm.ir.Op.get("relax.nn.max_pool2d")
# What only changes a tensor's shape.
RESHAPES = [tvm.ir.Op.get(f"relax.{name}") for name in ("reshape", "flatten", "squeeze", "expand_dims")]


@dataclass(frozen=True)
class Conv:
    """A convolution in the graph: the variable it defines, its call and its shape."""

    var: relax.Var
    call: relax.Call
    shape: Conv2dShape

    @property
    def name(self) -> str:
        """The layer's name."""
        return conv_name(self.var)

    @property
    def data(self) -> relax.Expr:
        """The activations it reads."""
        return self.call.args[0]

    @property
    def kernel(self) -> np.ndarray | None:
        """The weights as OIHW, or None where they are not constant."""
        weight = self.call.args[1]
        return weight.value.numpy() if isinstance(weight, tvm.ir.GenericConst) else None

    @property
    def dtype(self) -> str:
        """Element type of the result."""
        return str(self.var.ty.dtype)


@dataclass
class Tail:
    """What is computed from a convolution's result alone, as far as a kernel's epilogue can take it over."""

    last: relax.Var
    variables: list[relax.Var]
    residual: relax.Var | None = None
    clip_min: float | None = None
    clip_max: float | None = None
    bias: np.ndarray | None = None
    pool: relax.Var | None = None

    @property
    def epilogue(self) -> Epilogue:
        """The epilogue as a schedule sees it."""
        return Epilogue(self.residual is not None, self.clip_min, self.clip_max)


@dataclass(frozen=True)
class Head:
    """What a convolution's input is computed by from ``source``, as far as a kernel's prologue can take it over."""

    source: relax.Var
    variables: list[relax.Var]
    prologue: Prologue


@dataclass
class Graph:
    """Definitions and uses of ``main``'s variables, in program order."""

    values: dict[relax.Var, relax.Expr] = field(default_factory=dict)
    users: dict[relax.Var, list[relax.Var | None]] = field(default_factory=lambda: defaultdict(list))
    convs: dict[relax.Var, Conv] = field(default_factory=dict)

    @staticmethod
    def of(func: relax.Function) -> Graph:
        """Read a function; a use outside any top-level binding (the result) is recorded as None."""
        graph = Graph()
        for block in func.body.blocks:
            for binding in block.bindings:
                graph.values[binding.var] = binding.value
                graph._record_uses(binding.value, binding.var)
                if is_conv2d(binding.value):
                    conv = _conv(binding.var, binding.value)
                    if conv is not None:
                        graph.convs[binding.var] = conv
        graph._record_uses(func.body.body, None)
        return graph

    def _record_uses(self, value: relax.Expr, user: relax.Var | None) -> None:
        def visit(expr: relax.Expr) -> None:
            if isinstance(expr, relax.Var):
                self.users[expr].append(user)

        relax.analysis.post_order_visit(value, visit)

    def sole_user(self, var: relax.Var) -> relax.Var | None:
        """The one variable computed from ``var``; None where there are more, or it is a result."""
        users = self.users[var]
        return users[0] if len(users) == 1 else None

    def readers(self, var: relax.Var) -> list[Conv]:
        """The convolutions that read ``var`` as their activations."""
        return [self.convs[u] for u in self.users[var] if u in self.convs and self.convs[u].data.same_as(var)]

    def biased(self, conv: Conv) -> Tail:
        """The bias after ``conv``, as far as it is the only use of the convolution's result."""
        tail = Tail(conv.var, [conv.var])
        axis = channel_axis(conv)
        while (found := self._after(tail, _ADD)) is not None:
            bias = _by_channel(found[1], conv.shape.out_channels, axis)
            if bias is None:
                break
            tail.bias = bias if tail.bias is None else tail.bias + bias
            self._advance(tail, found[0])
        return tail

    def tail(self, conv: Conv) -> Tail:
        """Bias, residual, clip and maxima of 2x2 after ``conv``, as far as each is the only use of the one before.

        In this order, but that clip and maxima can be exchanged.
        """
        tail = self.biased(conv)
        if (found := self._after(tail, _ADD)) is not None:
            others = [arg for arg in found[1].args if isinstance(arg, relax.Var) and not arg.same_as(tail.last)]
            if len(others) == 1 and tvm_ffi.structural_equal(others[0].ty, conv.var.ty):
                tail.residual = others[0]
                self._advance(tail, found[0])
        while (found := self._after(tail, _RELU, _MAX, _MIN, MAX_POOL)) is not None:
            if found[1].op == MAX_POOL:
                if tail.pool is not None or not _is_2x2_of(conv.shape, found[1]):
                    break
                tail.pool = found[0]
                self._advance(tail, found[0])
                continue
            bounds = _clip_bounds(found[1])
            if bounds is None:
                break
            low, high = bounds
            if low is not None and tail.clip_max is not None:
                break  # a later lower bound may exceed the upper one: not a plain clip any more
            if high is not None and tail.clip_min is not None and high < tail.clip_min:
                break
            tail.clip_min = low if tail.clip_min is None else tail.clip_min if low is None else max(low, tail.clip_min)
            tail.clip_max = (
                high if tail.clip_max is None else tail.clip_max if high is None else min(high, tail.clip_max)
            )
            self._advance(tail, found[0])
        return tail

    def conv_head(self, conv: Conv) -> Head | None:
        """What can be computed where ``conv`` reads its input; None if there is nothing."""
        if conv.shape.groups > 1 or any(conv.shape.padding):
            return None
        return self.head(conv.var, conv.data, conv.shape.in_channels, channel_axis(conv))

    def head(self, reader: relax.Var, source: relax.Expr, channels: int, axis: int) -> Head | None:
        """Scale, shift and clip by channels before ``reader``, which alone reads them; None if there are none."""
        scale = shift = low = high = None
        variables: list[relax.Var] = []
        # From the reader upwards: bounds, then what is added, then what is multiplied.
        while isinstance(source, relax.Var) and source in self.values and self._is_read_by(source, reader):
            call = self.values[source]
            if not isinstance(call, relax.Call):
                break
            is_outermost = scale is None and shift is None
            by_channel = _by_channel(call, channels, axis)
            if call.op == _MULTIPLY and scale is None and by_channel is not None:
                scale = by_channel
            elif call.op == _ADD and is_outermost and by_channel is not None:
                shift = by_channel
            elif any(call.op == op for op in (_RELU, _MAX, _MIN)) and is_outermost:
                bounds = _clip_bounds(call) or (None, None)
                if bounds[0] is not None and low is None:
                    low = bounds[0]
                elif bounds[1] is not None and high is None:
                    high = bounds[1]
                else:
                    break
            else:
                break
            variables.insert(0, source)
            reader, source = source, next(arg for arg in call.args if isinstance(arg, relax.Var))
        if (scale is None and shift is None) or (low is not None and high is not None and low > high):
            return None
        scale = np.ones(channels, np.float32) if scale is None else scale
        shift = np.zeros(channels, np.float32) if shift is None else shift
        return Head(source, variables, Prologue(scale, shift, low, high))

    def _is_read_by(self, var: relax.Var, reader: relax.Var) -> bool:
        user = self.sole_user(var)
        return user is not None and user.same_as(reader)

    def claim_tail(self, conv: Conv, claimed: set[relax.Var], pools: bool) -> list[relax.Var]:
        """The variables of ``conv``'s tail; where two convolutions end in one addition, the first takes it over.

        Maxima, and what follows them, only if the schedules take ``pools``.
        """
        variables, tail = [], self.tail(conv)
        for var in tail.variables:
            if var in claimed or (var is tail.pool and not pools):
                break
            variables.append(var)
        claimed.update(variables)
        return variables

    def _after(self, tail: Tail, *ops: tvm.ir.Op) -> tuple[relax.Var, relax.Call] | None:
        user = self.sole_user(tail.last)
        value = self.values[user] if user is not None else None
        if isinstance(value, relax.Call) and any(value.op == op for op in ops):
            return user, value
        return None

    def _advance(self, tail: Tail, var: relax.Var) -> None:
        tail.variables.append(var)
        tail.last = var


def _is_2x2_of(shape: Conv2dShape, call: relax.Call) -> bool:
    """Whether a pooling layer's windows are the whole 2x2 of a convolution's output, channels last."""
    attrs, out = call.attrs, call.ty.shape
    extents = (shape.out_height // 2, shape.out_width // 2)
    return (
        shape.groups == 1
        and min(extents) > 0
        and (str(attrs.layout), str(attrs.out_layout)) == ("NHWC", "NHWC")
        and ints(attrs.pool_size) == ints(attrs.strides) == (2, 2)
        and ints(attrs.dilation) == (1, 1)
        and not any(ints(attrs.padding))
        and ints(out.values)[1:3] == extents
    )


def channel_axis(conv: Conv) -> int:
    """Where the channels of a convolution's activations lie."""
    return str(conv.call.attrs.data_layout).index("C")


def _conv(var: relax.Var, call: relax.Call) -> Conv | None:
    """The convolution that ``call`` is; None for layouts or shapes that the schedules do not take."""
    attrs = call.attrs
    data, weight = call.args[0].ty, call.args[1].ty
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout))
    if layouts not in (("NHWC", "OIHW"), ("NCHW", "OIHW")) or str(attrs.out_layout) != layouts[0]:
        return None
    extents = dict(zip(layouts[0], data.shape.values, strict=True))
    kernel = [int(v) for v in weight.shape.values]
    if not all(isinstance(v, tvm.tirx.IntImm) for v in extents.values()):
        return None
    n, h, w, c = (int(extents[axis]) for axis in "NHWC")
    return Conv(
        var,
        call,
        Conv2dShape(
            n, h, w, c, kernel[0], (kernel[2], kernel[3]),
            ints(attrs.strides), ints(attrs.padding), ints(attrs.dilation), int(attrs.groups),
        ),
    )  # fmt: skip


def ints(values) -> tuple:
    """Extents of a layer as Python's numbers."""
    return tuple(int(v) for v in values)


def is_static(value: relax.Expr) -> bool:
    """Whether a value is a tensor whose extents are all known."""
    ty = value.ty
    if not isinstance(ty, relax.TensorType) or not isinstance(ty.shape, relax.ShapeExpr):
        return False
    return all(isinstance(extent, tvm.tirx.IntImm) for extent in ty.shape.values)


def _by_channel(call: relax.Call, channels: int, axis: int) -> np.ndarray | None:
    """A call's constant operand, one value per channel; None if there is none or it varies along another axis."""
    const = next((arg.value.numpy() for arg in call.args if isinstance(arg, tvm.ir.GenericConst)), None)
    if const is None or const.ndim > 4:
        return None
    shape = (1,) * (4 - const.ndim) + const.shape
    if any(extent != 1 for i, extent in enumerate(shape) if i != axis) or shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(const.reshape(-1), (channels,)).copy()


def _clip_bounds(call: relax.Call) -> tuple[float | None, float | None] | None:
    if call.op == _RELU:
        return 0.0, None
    for arg in call.args:
        # A constant of a higher rank would raise the result's.
        if isinstance(arg, tvm.ir.GenericConst) and len(arg.value.shape) <= 4 and arg.value.numpy().size == 1:
            bound = float(arg.value.numpy().reshape(-1)[0])
            return (bound, None) if call.op == _MAX else (None, bound)
    return None
