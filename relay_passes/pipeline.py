"""The one ordered list of passes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.target import Target

from tdc_tvm.relay_passes.dense_to_conv import dense_to_conv
from tdc_tvm.relay_passes.fuse_conv2d import FuseConv2d
from tdc_tvm.relay_passes.fuse_pool2d import fuse_pool2d
from tdc_tvm.relay_passes.fuse_tucker_conv import FuseTuckerConv
from tdc_tvm.relay_passes.import_onnx import conv_name, is_conv2d, name_convs
from tdc_tvm.relay_passes.keep_nan import KEEP_NAN
from tdc_tvm.relay_passes.keep_storage import keep_storage
from tdc_tvm.relay_passes.lower_conv import LowerConv, Tuned
from tdc_tvm.relay_passes.narrow_activations import narrow_activations
from tdc_tvm.relay_passes.tune_rest import TuneRest
from tdc_tvm.relay_passes.view_reshapes import VIEW_RESHAPES
from tdc_tvm.schedules.device import DeviceSpec

_PERMUTE = tvm.ir.Op.get("relax.permute_dims")


@tvm.transform.module_pass(opt_level=0, name="ConvertToNhwc")
def convert_to_nhwc(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Put channels last everywhere; where TVM's conversion fails, layers convert at their own borders."""
    # TVM has no transposed convolution with channels last.
    layouts = {"relax.nn.conv2d": ["NHWC", "OIHW"], "relax.nn.conv2d_transpose": ["NCHW", "IOHW"]}
    try:
        mod = relax.transform.ConvertLayout(layouts)(mod)
    except tvm.error.InternalError:
        # TVM 0.27 aborts on operators that change the rank (stack, for one) of a converted value.
        return mod
    mod = name_convs(mod, _names_of_outputs(mod["main"]))
    mod["main"] = _PermuteConstants().visit_expr(mod["main"])
    # The conversion permutes a value once for each of its users.
    return relax.transform.EliminateCommonSubexpr()(relax.transform.CanonicalizeBindings()(mod))


def _names_of_outputs(main: relax.Function) -> dict[relax.Var, str]:
    """The names of convolutions that are outputs: the conversion permutes those back, into a variable of that name."""
    values = {b.var: b.value for block in main.body.blocks for b in block.bindings}
    return {
        value.args[0]: conv_name(var)
        for var, value in values.items()
        if isinstance(value, relax.Call)
        and value.op == _PERMUTE
        and is_conv2d(values.get(value.args[0]))
        and conv_name(var) != var.name
    }


@relax.expr_functor.mutator
class _PermuteConstants(relax.PyExprMutator):
    """Evaluates ``permute_dims`` of constants; FoldConstant would compile a function for each."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if call.op == _PERMUTE and isinstance(call.args[0], tvm.ir.GenericConst):
            axes = None if call.attrs.axes is None else [int(axis) for axis in call.attrs.axes]
            value = np.ascontiguousarray(np.transpose(call.args[0].value.numpy(), axes))
            return relax.const(value, str(value.dtype))  # without its type, 64 bits would become 32
        return call


def graph_passes(
    device: DeviceSpec, precision: str, layer_names: Mapping[str, str], tuned: Tuned | None = None
) -> list[tvm.transform.Pass]:
    """From an imported model to kernels for every convolution, high-level operators around them."""
    is_gpu = device.kind == "cuda"
    return [
        # Canonical form: inference-time operators, constants evaluated, channels last.
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        relax.transform.FoldConstant(),
        convert_to_nhwc,
        *([dense_to_conv] if is_gpu else []),
        # Our operators.
        FuseTuckerConv(layer_names, pools=is_gpu),
        FuseConv2d(prologues=is_gpu, pools=is_gpu),
        *([fuse_pool2d] if is_gpu else []),
        LowerConv(device, precision, tuned),
        relax.transform.CanonicalizeBindings(),
        narrow_activations,
    ]


def lowering_passes(target: Target, tune_rest: TuneRest | None = None) -> list[tvm.transform.Pass]:
    """From kernels and high-level operators to scheduled functions and a planned executable."""
    if target.kind.name == "cuda":
        from tvm.relax.backend.cuda import pipeline

        # dlight's, for every function that has none yet
        _, *fuse_others, schedule = pipeline.legalize_passes(target)
        planned: list[tvm.transform.Pass] = [keep_storage]
        legal = KEEP_NAN | VIEW_RESHAPES
    else:
        from tvm.relax.backend.cpu_generic import pipeline

        from tdc_tvm.schedules.cpu.generic import ScheduleGenericCpu

        _, *fuse_others = pipeline.legalize_passes(target)
        schedule, planned, legal = ScheduleGenericCpu(), [], KEEP_NAN
    plan_memory, *finalize = pipeline.finalize_passes(target)
    return [
        *pipeline.library_dispatch_passes(target),
        relax.transform.LegalizeOps(legal),
        *fuse_others,
        *([tune_rest] if tune_rest is not None else []),
        schedule,
        *pipeline.dataflow_lower_passes(target),
        plan_memory,
        *planned,
        *finalize,
    ]
