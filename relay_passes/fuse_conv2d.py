"""Gives every remaining convolution its epilogue."""

from __future__ import annotations

from dataclasses import dataclass

import tvm

from tdc_tvm.relay_passes.graph import Graph
from tdc_tvm.relay_passes.layers import LayerReport, add_layers
from tdc_tvm.relay_passes.outline import CONV2D, Chain, outline


@tvm.transform.module_pass(opt_level=0, name="FuseConv2d")
@dataclass
class FuseConv2d:
    """Outline each convolution with the bias, residual and activation after it.

    And with the normalisation and activation before it, which only it reads, if the schedules take ``prologues``;
    and with the maxima of 2x2 after it, if they take ``pools``.

    Convolutions that our schedules do not take (weights computed at run time, other types than
    float32) stay with TVM's own schedules, and the reason is added to the module's layer reports.
    """

    prologues: bool = False
    pools: bool = False

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        claimed: set[tvm.relax.Var] = set()
        chains: list[Chain] = []
        left: list[LayerReport] = []
        for conv in graph.convs.values():
            reason = ""
            if conv.kernel is None:
                reason = "its weights are not constant: TVM's own schedule"
            elif conv.dtype != "float32":
                reason = f"it computes in {conv.dtype}, our schedules in float32: TVM's own schedule"
            if reason:
                left.append(LayerReport(conv.name, "conv2d", str(conv.shape), reason=reason, strategy="tvm"))
                continue
            head = graph.conv_head(conv) if self.prologues else None
            before = head.variables if head is not None and claimed.isdisjoint(head.variables) else []
            claimed.update(before)
            chains.append(Chain(CONV2D, conv.name, [*before, *graph.claim_tail(conv, claimed, self.pools)]))
        return add_layers(outline(mod, graph.values, chains), left)
