"""From outlined convolutions to kernels: the analytical model chooses, the schedules build."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from tdc_tvm.relay_passes.graph import Graph
from tdc_tvm.relay_passes.layers import LayerReport, add_layers
from tdc_tvm.relay_passes.outline import KIND_ATTR, NAME_ATTR, TUCKER_CONV
from tdc_tvm.schedules import backend
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, Estimate, KernelConfig, Prologue
from tdc_tvm.schedules.shape import Conv2dShape, ConvShape, Epilogue, TuckerConvShape

_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class ConvOp:
    """An outlined convolution, read back: all that a schedule needs to know.

    ``inputs`` are the positions of the activations, and of the residual if there is one, among the
    function's parameters; both may be the same.
    """

    name: str
    shape: ConvShape
    epilogue: Epilogue
    weights: tuple[ConvWeights, ...]
    inputs: tuple[int, ...]
    data_layout: str
    prologue: Prologue | None


@tvm.transform.module_pass(opt_level=0, name="LowerConv")
@dataclass
class LowerConv:
    """Replace calls of outlined convolutions by ``call_tir`` of kernels scheduled for ``device``.

    Kernels that store another type than FP32 have casts around them.
    """

    device: DeviceSpec
    precision: str

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        lowerer = _Lowerer(mod, self.device, self.precision)
        main = lowerer.visit_expr(mod["main"])
        lowerer.builder_.update_func(mod.get_global_var("main"), main)
        mod = relax.transform.DeadCodeElimination()(lowerer.builder_.get())
        return add_layers(mod, lowerer.layers)


def read_conv(function: relax.Function) -> ConvOp:
    """Read an outlined convolution."""
    graph = Graph.of(function)
    convs = list(graph.convs.values())
    tails = [*(graph.biased(conv) for conv in convs[:-1]), graph.tail(convs[-1])]
    weights = []
    for conv, tail in zip(convs, tails, strict=True):
        assert conv.kernel is not None, "only convolutions with constant weights are outlined"
        weights.append(ConvWeights(conv.kernel, tail.bias))
    shape: ConvShape = convs[0].shape
    if function.attrs[KIND_ATTR] == TUCKER_CONV:
        first, core, last = (conv.shape for conv in convs)
        dense = Conv2dShape(
            first.batch, first.height, first.width, first.in_channels, last.out_channels,
            core.kernel, core.stride, core.padding, core.dilation,
        )  # fmt: skip
        shape = TuckerConvShape(dense, core.in_channels, core.out_channels, weights[0].bias is not None)
    layout = str(convs[0].call.attrs.data_layout)
    head, residual = graph.head(convs[0]), tails[-1].residual
    operands = [convs[0].data if head is None else head.source, *(() if residual is None else (residual,))]
    inputs = tuple(next(i for i, p in enumerate(function.params) if p.same_as(operand)) for operand in operands)
    name, prologue = str(function.attrs[NAME_ATTR]), None if head is None else head.prologue
    return ConvOp(name, shape, tails[-1].epilogue, tuple(weights), inputs, layout, prologue)


@relax.expr_functor.mutator
class _Lowerer(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, device: DeviceSpec, precision: str) -> None:
        super().__init__(mod)
        self.mod = mod
        self.device, self.precision = device, precision
        self.layers: list[LayerReport] = []
        self.choices: dict[ConvShape, tuple[KernelConfig, Estimate]] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        function = self.mod[call.op] if isinstance(call.op, tvm.ir.GlobalVar) else None
        if not isinstance(function, relax.Function) or KIND_ATTR not in (function.attrs or {}):
            return call
        op = read_conv(function)
        schedules, shape = backend(self.device), op.shape
        # What has groups is computed in FP32.
        if not (isinstance(shape, Conv2dShape) and shape.groups > 1):
            shape = shape.with_precision(self.precision)
        if shape not in self.choices:
            self.choices[shape] = schedules.choose(shape, self.device)
        config, estimate = self.choices[shape]
        prologue = () if op.prologue is None else (op.prologue,)
        kernel = schedules.make_kernel(shape, op.epilogue, op.weights, config, self.device, op.name, *prologue)
        self.layers.append(_report(op.name, shape, config, estimate))
        callee = self.builder_.add_func(kernel.func, "tucker_conv" if len(op.weights) == 3 else "conv2d")
        dense = shape.dense if isinstance(shape, TuckerConvShape) else shape
        is_nchw = op.data_layout == "NCHW"
        operands = (self._cast(call.args[i], dense.dtype) for i in op.inputs)
        x, *residual = (self._permuted(arg, _TO_NHWC) if is_nchw else arg for arg in operands)
        constants = [relax.const(np.ascontiguousarray(value)) for value in kernel.constants]
        out = (dense.batch, dense.out_height, dense.out_width, dense.out_channels)
        types = [relax.TensorType(extents, dense.dtype) for extents in (out, *kernel.between)]
        result = relax.call_tir(callee, relax.Tuple([x, *constants, *residual]), types)
        if kernel.between:
            result = self.builder_.emit(relax.TupleGetItem(self.builder_.emit(result), 0))
        result = self._permuted(result, _TO_NCHW) if is_nchw else result
        return self._cast(result, "float32")

    def _cast(self, value: relax.Expr, dtype: str) -> relax.Expr:
        value = self.builder_.normalize(value)
        return value if str(value.ty.dtype) == dtype else self.builder_.emit(relax.op.astype(value, dtype))

    def _permuted(self, value: relax.Expr, axes: tuple[int, ...]) -> relax.Var:
        return self.builder_.emit(relax.op.permute_dims(self.builder_.normalize(value), axes))


def _report(name: str, shape: ConvShape, config: KernelConfig, estimate: Estimate) -> LayerReport:
    chosen = (config.strategy, str(config), estimate.latency_us, dict(estimate.parts_us))
    if isinstance(shape, TuckerConvShape):
        ranks = (shape.rank_out, shape.rank_in)
        return LayerReport(name, "tucker_conv", str(shape.dense), ranks, True, "", *chosen)
    return LayerReport(name, "conv2d", str(shape), None, False, "not a Tucker layer", *chosen)
