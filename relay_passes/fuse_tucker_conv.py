"""Finds Tucker convolutions, 1x1 -> kxk -> 1x1, in any model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

import tvm

from tdc_tvm.relay_passes.graph import Conv, Graph, Tail
from tdc_tvm.relay_passes.layers import LayerReport, add_layers
from tdc_tvm.relay_passes.outline import TUCKER_CONV, Chain, outline


@tvm.transform.module_pass(opt_level=0, name="FuseTuckerConv")
@dataclass
class FuseTuckerConv:
    """Outline every chain of three convolutions 1x1 -> kxk -> 1x1 as one Tucker convolution.

    Biases may stand after any of the three; residual, activation and maxima of 2x2 after the last go along.  A
    chain that has the form but fails a guard stays as it is, and so does a layer that the metadata
    names but that has another form; the reason is added to the module's layer reports.

    Parameters
    ----------
    layer_names : mapping of the core convolution's name to the Tucker layer's name
        From the model's metadata; a chain without it is named after its convolutions.
    pools : bool
        Whether the schedules take maxima of 2x2.
    """

    layer_names: Mapping[str, str] = field(default_factory=dict)
    pools: bool = False

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])
        taken: dict[tvm.relax.Var, str] = {}
        claimed: set[tvm.relax.Var] = set()
        chains: list[Chain] = []
        refused: list[LayerReport] = []
        candidates = list(_candidates(graph))
        cores = {stages[1].var for stages in candidates}
        for conv in graph.convs.values():
            if conv.name in self.layer_names and conv.var not in cores:
                reason = "other operators, such as a Pad that is not with zeros, stand between its convolutions"
                ranks = (conv.shape.out_channels, conv.shape.in_channels)
                name = self.layer_names[conv.name]
                refused.append(LayerReport(name, "tucker_conv", f"{conv.shape}", ranks, False, reason))
        for stages in candidates:
            name = self._name(stages, graph)
            shared = next((taken[stage.var] for stage in stages if stage.var in taken), None)
            reason = f"one of its convolutions already belongs to {shared}" if shared else _reason(graph, stages)
            if reason:
                shape = f"{stages[1].shape}"
                ranks = (stages[1].shape.out_channels, stages[0].shape.out_channels)
                refused.append(LayerReport(name, "tucker_conv", shape, ranks, False, reason))
                continue
            first, core, last = stages
            variables = [
                *graph.biased(first).variables,
                *graph.biased(core).variables,
                *graph.claim_tail(last, claimed, self.pools),
            ]
            taken.update({stage.var: name for stage in stages})
            chains.append(Chain(TUCKER_CONV, name, variables))
        return add_layers(outline(mod, graph.values, chains), refused)

    def _name(self, stages: tuple[Conv, Conv, Conv], graph: Graph) -> str:
        """The metadata's name; else the module path that the three share and no other convolution; else the core's."""
        names = [stage.name for stage in stages]
        if names[1] in self.layer_names:
            return self.layer_names[names[1]]
        paths = zip(*(name.split(".") for name in names), strict=False)
        shared = "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, paths))
        inside = [conv for conv in graph.convs.values() if conv.name.startswith(shared)]
        return shared[:-1] if shared and len(inside) == len(stages) else names[1]


def _candidates(graph: Graph) -> Iterator[tuple[Conv, Conv, Conv]]:
    """Chains of the form 1x1 -> kxk -> 1x1 in program order, guards not yet asked."""
    for first in graph.convs.values():
        if first.shape.kernel != (1, 1):
            continue
        for core in graph.readers(graph.biased(first).last):
            if core.shape.kernel == (1, 1):
                continue
            for last in graph.readers(graph.biased(core).last):
                if last.shape.kernel == (1, 1):
                    yield first, core, last


def _reason(graph: Graph, stages: tuple[Conv, Conv, Conv]) -> str:
    """Why a candidate cannot be one operator; empty if it can."""
    first, core, last = stages
    for stage, role in ((first, "first"), (last, "last")):
        if stage.shape.groups > 1:
            return f"the {role} 1x1 {stage.name} has {stage.shape.groups} groups"
        if stage.shape.stride != (1, 1):
            return f"the {role} 1x1 {stage.name} has stride {stage.shape.stride[0]}x{stage.shape.stride[1]}"
        if any(stage.shape.padding):
            return f"the {role} 1x1 {stage.name} pads its input"
    if core.shape.groups > 1:
        return f"the core {core.name} has {core.shape.groups} groups"
    for stage in stages:
        if stage.kernel is None:
            return f"the weights of {stage.name} are not constant"
        if stage.dtype != "float32":
            return f"{stage.name} computes in {stage.dtype}; the operator computes in float32"
    for stage in (first, core):
        tail: Tail = graph.biased(stage)
        if graph.sole_user(tail.last) is None:
            return f"the output of {stage.name} is also used elsewhere"
    return ""
