"""Lowers finished kernels: TVM's pipeline without what would schedule, synchronise or move buffers again."""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx

# Marks the functions that are lowered here; the value is the configuration, as text.
CONFIG_ATTR = "tdc.config"


def _finished_passes() -> list[tvm.transform.Pass]:
    """TVM's own list for scheduled functions, shortened.

    ``ThreadSync`` is not among them: it does not see what clusters and asynchronous copies wait for,
    puts barriers under conditions, and between an unroll pragma and its loop.  Our kernels place
    their barriers themselves.
    """
    return [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LiftThreadBinding(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        s_tir.transform.MergeSharedMemoryAllocations(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.BF16StorageLegalize(),
    ]


def _pipeline() -> tuple[tvm.transform.Pass, tvm.transform.Pass, tvm.transform.Pass]:
    """Finished kernels by the list above, all else as TVM does; passes for the host's and the device's code."""
    usual, host, device = tirx.get_tir_pipeline("s_tir")

    @tvm.transform.module_pass(opt_level=0, name="LowerFinishedKernels")
    def lower(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        def is_finished(func: tirx.PrimFunc) -> bool:
            return CONFIG_ATTR in (func.attrs or {})

        finished = tirx.transform.Filter(is_finished)(mod)
        others = tirx.transform.Filter(lambda func: not is_finished(func))(mod)
        result = usual(others) if others.functions else others
        if finished.functions:
            result.update(tvm.transform.Sequential(_finished_passes())(finished))
        return result

    return lower, host, device


# For the argument ``pipeline`` of ``tvm.tirx.build`` and ``tir_pipeline`` of ``relax.build``.
TIR_PIPELINE = "tdc"
tirx.register_tir_pipeline(TIR_PIPELINE, _pipeline)
