"""From outlined convolutions to kernels: measurements or the analytical model choose, the schedules build."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tdc_tvm.relay_passes.concat_in_place import Strip, StripPlan
from tdc_tvm.relay_passes.fuse_pool2d import pool_shape
from tdc_tvm.relay_passes.graph import RESHAPES, Graph
from tdc_tvm.relay_passes.layers import LayerReport, add_layers
from tdc_tvm.relay_passes.outline import KIND_ATTR, NAME_ATTR, POOL2D, TUCKER_CONV
from tdc_tvm.schedules import backend
from tdc_tvm.schedules.cuda.fold_width import Folded
from tdc_tvm.schedules.cuda.pool import make_kernel as make_pool
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, Estimate, Kernel, KernelConfig, Prologue, Tensors
from tdc_tvm.schedules.shape import DTYPES, Conv2dShape, ConvShape, Epilogue, TuckerConvShape

_PERMUTE = tvm.ir.Op.get("relax.permute_dims")
_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
# The best configuration that was measured, and its time in microseconds; None where the model is to choose.
Tuned = Callable[[ConvShape], tuple[KernelConfig, float] | None]


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


@dataclass(frozen=True)
class _Choice:
    """How a convolution is computed, what the model predicts of it, and what was measured, if that decided."""

    config: KernelConfig
    estimate: Estimate
    measured_us: float | None = None


@tvm.transform.module_pass(opt_level=0, name="LowerConv")
@dataclass
class LowerConv:
    """Replace calls of outlined convolutions by ``call_tir`` of kernels scheduled for ``device``.

    Kernels that store another type than FP32 have casts around them.  ``tuned`` is asked for a configuration of each
    shape before the model is.
    """

    device: DeviceSpec
    precision: str
    tuned: Tuned | None = None

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        lowerer = _Lowerer(mod, self.device, self.precision, self.tuned)
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
    pool, head = tails[-1].pool is not None, graph.conv_head(convs[0])
    if function.attrs[KIND_ATTR] == TUCKER_CONV:
        first, core, last = (conv.shape for conv in convs)
        dense = Conv2dShape(
            first.batch, first.height, first.width, first.in_channels, last.out_channels,
            core.kernel, core.stride, core.padding, core.dilation, pool=pool,
        )  # fmt: skip
        shape: ConvShape = TuckerConvShape(dense, core.in_channels, core.out_channels, weights[0].bias is not None)
    else:
        shape = replace(convs[0].shape, pool=pool, prologue=head is not None)
    layout, residual = str(convs[0].call.attrs.data_layout), tails[-1].residual
    operands = [convs[0].data if head is None else head.source, *(() if residual is None else (residual,))]
    inputs = tuple(next(i for i, p in enumerate(function.params) if p.same_as(operand)) for operand in operands)
    name, prologue = str(function.attrs[NAME_ATTR]), None if head is None else head.prologue
    return ConvOp(name, shape, tails[-1].epilogue, tuple(weights), inputs, layout, prologue)


@relax.expr_functor.mutator
class _Lowerer(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, device: DeviceSpec, precision: str, tuned: Tuned | None) -> None:
        super().__init__(mod)
        self.mod = mod
        self.device, self.precision, self.tuned = device, precision, tuned
        self.layers: list[LayerReport] = []
        self.choices: dict[ConvShape, _Choice] = {}
        # Of GPUs' kernels, which can read and write strips; the tensors, as far as they are written.
        self.plan = StripPlan.of(mod) if device.kind == "cuda" else StripPlan()
        self.tensors: dict[relax.Var, relax.Var] = {}
        self.target: Strip | None = None
        self.results, self.is_result = _results(mod["main"]), False

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        var, plan = binding.var, self.plan
        if var in plan.read:
            shared = plan.read[var].shared
            # The whole of it is a tensor as any other.
            is_whole = var.same_as(shared)
            tensor = self.tensors[shared]
            self.set_var_remap(var, self._cast(tensor, "float32") if is_whole else tensor)
            return
        self.target, self.is_result = plan.written.get(var), var in self.results and self.device.kind == "cuda"
        super().visit_var_binding_(binding)
        self.target = None
        if var in plan.written:
            self.tensors[plan.written[var].shared] = self.get_var_remap(var)
        if var in plan.firsts:
            self._begin_tensor(self.visit_expr(var), plan.firsts[var])

    def _begin_tensor(self, first: relax.Expr, strip: Strip) -> None:
        """Copy the first strip to a tensor that has room for all."""
        first = self._cast(first, DTYPES[self.precision])
        shape = tuple(int(extent) for extent in first.ty.shape)
        callee = self.builder_.add_func(copy_strip(shape, strip.width, str(first.ty.dtype)), "copy_strip")
        out = relax.TensorType((*shape[:3], strip.width), str(first.ty.dtype))
        self.tensors[strip.shared] = self.builder_.emit(relax.call_tir(callee, relax.Tuple([first]), out))

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        function = self.mod[call.op] if isinstance(call.op, tvm.ir.GlobalVar) else None
        if not isinstance(function, relax.Function) or KIND_ATTR not in (function.attrs or {}):
            return super().visit_call_(call)
        if function.attrs[KIND_ATTR] == POOL2D:
            return self._lower_pool(call, function)
        # Not as a call: what is read can be wider than what it stands for.
        args, target = [self.visit_expr(arg) for arg in call.args], self.target
        op = read_conv(function)
        # What has groups is computed in FP32.
        is_grouped = isinstance(op.shape, Conv2dShape) and op.shape.groups > 1
        shape = op.shape if is_grouped else op.shape.with_precision(self.precision)
        is_result = self.is_result and not is_grouped
        kernel, folded = self._kernel(op, shape, self.plan.view(call.args[op.inputs[0]]), target, is_result)
        callee = self.builder_.add_func(kernel.func, "tucker_conv" if len(op.weights) == 3 else "conv2d")
        dense = shape.dense if isinstance(shape, TuckerConvShape) else shape
        is_nchw = op.data_layout == "NCHW"
        x, *residual = (args[i] for i in op.inputs)
        residual = [self._given(arg, dense.dtype, is_nchw) for arg in residual]
        x = self._given(x, dense.dtype, is_nchw) if folded is None else self._fold(x, folded, is_nchw)
        constants = [relax.const(np.ascontiguousarray(value)) for value in kernel.constants]
        channels = dense.out_channels if target is None else target.width
        out = (*dense.stored_extents[:3], channels)
        operands = [x, *constants, *residual]
        types = [relax.TensorType(extents, dense.dtype) for extents in (out, *kernel.between)]
        if is_result:
            types[0] = relax.TensorType(out, "float32")
        result = self._call(callee, operands, types)
        if kernel.between:
            result = self.builder_.emit(relax.TupleGetItem(self.builder_.emit(result), 0))
        if target is not None:
            return result
        result = self._permuted(result, _TO_NCHW) if is_nchw else result
        return self._cast(result, "float32")

    def _given(self, value: relax.Expr, dtype: str, is_nchw: bool) -> relax.Expr:
        """What a kernel reads, channels last."""
        value = self._cast(value, dtype)
        return self._permuted(value, _TO_NHWC) if is_nchw else value

    def _fold(self, x: relax.Expr, folded: Folded, is_nchw: bool) -> relax.Var:
        """Fold the windows of a convolution's input; what was permuted only for it is read as it was."""
        source = self.builder_.lookup_binding(x) if isinstance(x, relax.Var) else None
        if isinstance(source, relax.Call) and source.op == _PERMUTE and tuple(map(int, source.attrs.axes)) == _TO_NHWC:
            x, is_nchw = source.args[0], True
        dtype = folded.before.dtype
        kernel = folded.make_kernel(self.device, "fold_width", is_nchw)
        callee = self.builder_.add_func(kernel.func, "fold_width")
        packed = relax.TensorType((folded.before.batch, folded.before.height, folded.columns, folded.pitch), dtype)
        x = x if is_nchw else self._cast(x, dtype)
        return self.builder_.emit(relax.call_tir(callee, relax.Tuple([x]), packed))

    def _lower_pool(self, call: relax.Call, function: relax.Function) -> relax.Expr:
        graph = Graph.of(function)
        (var, value) = list(graph.values.items())[-1]
        found = pool_shape(value)
        assert found is not None, "only layers with a kernel are outlined"
        shape, view, target = replace(found, dtype=DTYPES[self.precision]), self.plan.view(call.args[0]), self.target
        head = graph.head(var, value.args[0], shape.channels, 3)
        if shape.is_identity and head is None and target is None and view is None:
            return self.visit_expr(call.args[0])
        tensors = Tensors(None if view is None else view.width, out_dtype="float32" if self.is_result else None)
        if target is not None:
            tensors = replace(tensors, out_width=target.width, out_start=target.start)
        kernel = make_pool(shape, self.device, "pool2d", None if head is None else head.prologue, tensors)
        callee = self.builder_.add_func(kernel.func, "pool2d")
        x = self._cast(self.visit_expr(call.args[0]), shape.dtype)
        channels = shape.channels if target is None else target.width
        out = (shape.batch, shape.out_height, shape.out_width, channels)
        types = [relax.TensorType(out, tensors.out_dtype or shape.dtype)]
        result = self._call(callee, [x, *map(relax.const, kernel.constants)], types)
        return result if target is not None else self._cast(result, "float32")

    def _call(self, callee: tvm.ir.GlobalVar, operands: list[relax.Expr], types: list[relax.TensorType]) -> relax.Call:
        """Call a kernel, whose first result is a strip if there is a target: of a tensor that is there, or is made."""
        if self.target is None or self.target.shared not in self.tensors:
            return relax.call_tir(callee, relax.Tuple(operands), types)
        places = [len(operands), *[-1] * (len(types) - 1)]
        arguments = relax.Tuple([*operands, self.tensors[self.target.shared]])
        return relax.op.call_tir_inplace(callee, arguments, places, types)

    def _kernel(
        self, op: ConvOp, shape: ConvShape, view: Strip | None, target: Strip | None, is_result: bool
    ) -> tuple[Kernel, Folded | None]:
        """The kernel of a convolution, which reads a strip, or writes one or a result of the network.

        And how its window is folded, if it is.
        """
        make = functools.partial(backend(self.device).make_kernel, device=self.device, name=op.name)
        if self.device.kind != "cuda":
            choice = self._choose(shape)
            self.layers.append(_report(op.name, shape, choice))
            return make(shape, op.epilogue, op.weights, choice.config), None
        tensors = Tensors(None if view is None else view.width, out_dtype="float32" if is_result else None)
        if target is not None:
            tensors = replace(tensors, out_width=target.width, out_start=target.start)
        computed, weights = shape, op.weights
        folded = Folded.of(shape) if isinstance(shape, Conv2dShape) and op.prologue is None else None
        if folded is not None and self._predicted_us(folded.shape) < self._predicted_us(shape):
            computed, weights = folded.shape, (folded.weights(*op.weights),)
            tensors = replace(tensors, in_width=folded.pitch, in_columns=folded.columns)
        else:
            folded = None
        choice = self._choose(computed)
        self.layers.append(_report(op.name, shape, choice))
        return make(computed, op.epilogue, weights, choice.config, prologue=op.prologue, tensors=tensors), folded

    def _predicted_us(self, shape: ConvShape) -> float:
        """Of the model's choice, which says whether a window is folded."""
        return backend(self.device).choose(shape, self.device)[1].latency_us

    def _choose(self, shape: ConvShape) -> _Choice:
        """What measured fastest, or else the model's choice; the same for the same shape."""
        if shape not in self.choices:
            found = self.tuned(shape) if self.tuned is not None else None
            if found is None:
                self.choices[shape] = _Choice(*backend(self.device).choose(shape, self.device))
            else:
                estimate = backend(self.device).estimate(shape, found[0], self.device)
                self.choices[shape] = _Choice(found[0], estimate, found[1])
        return self.choices[shape]

    def _cast(self, value: relax.Expr, dtype: str) -> relax.Expr:
        value = self.builder_.normalize(value)
        return value if str(value.ty.dtype) == dtype else self.builder_.emit(relax.op.astype(value, dtype))

    def _permuted(self, value: relax.Expr, axes: tuple[int, ...]) -> relax.Var:
        return self.builder_.emit(relax.op.permute_dims(self.builder_.normalize(value), axes))


def _results(main: relax.Function) -> set[relax.Var]:
    """What a network gives, or is reshaped to what it gives and read by nothing else."""
    graph, found = Graph.of(main), set()
    returned = main.body.body
    for value in returned.fields if isinstance(returned, relax.Tuple) else [returned]:
        while isinstance(value, relax.Var) and len(graph.users[value]) == 1:
            found.add(value)
            call = graph.values.get(value)
            if isinstance(call, relax.Var):
                value = call
            elif isinstance(call, relax.Call) and any(call.op == op for op in (*RESHAPES, _PERMUTE)):
                value = call.args[0]
            else:
                break
    return found


def _report(name: str, shape: ConvShape, choice: _Choice) -> LayerReport:
    config, estimate = choice.config, choice.estimate
    chosen = (config.strategy, str(config), estimate.latency_us, dict(estimate.parts_us), choice.measured_us)
    if isinstance(shape, TuckerConvShape):
        ranks = (shape.rank_out, shape.rank_in)
        return LayerReport(name, "tucker_conv", str(shape.dense), ranks, True, "", *chosen)
    return LayerReport(name, "conv2d", str(shape), None, False, "not a Tucker layer", *chosen)


def copy_strip(shape: tuple[int, ...], width: int, dtype: str) -> tvm.tirx.PrimFunc:
    """A function, not scheduled, that copies a tensor to the first channels of one that has ``width`` of them."""
    # As in functions of TVM's operators, that they can be one kernel together.
    extents = [tvm.tirx.IntImm("int64", extent) for extent in shape]
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer(extents, dtype))
        out = T.arg("out", T.buffer((*extents[:3], tvm.tirx.IntImm("int64", width)), dtype))
        with T.grid(*extents) as loops, T.sblock("copy"):
            at = [T.axis.spatial(extent, loop) for extent, loop in zip(extents, loops, strict=True)]
            T.reads(x[tuple(at)])
            T.writes(out[tuple(at)])
            T.buffer_store(out, x[tuple(at)], at)
    return builder.get()
