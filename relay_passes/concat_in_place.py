"""Finds concatenations whose operands can be written where they will stand, so that nothing is copied.

As in a DenseNet: each layer reads what all layers before it gave.  One tensor holds the channels of the longest
concatenation; each kernel writes a strip of it, and what is concatenated before is a strip that begins with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import tvm
from tvm import relax

from tdc_tvm.relay_passes.graph import Graph
from tdc_tvm.relay_passes.outline import KIND_ATTR

_CONCAT = tvm.ir.Op.get("relax.concat")
# Channels that kernels of any precision read together: behind a strip may lie what is not written yet.
_CHANNELS = 32


@dataclass
class Strip:
    """Channels of a shared tensor.

    Parameters
    ----------
    shared : Var
        The concatenation that the tensor is.
    start, width : int
        The first channel, and the tensor's channels.
    """

    shared: relax.Var
    start: int
    width: int


@dataclass
class StripPlan:
    """Which variables of ``main`` are strips.

    Parameters
    ----------
    firsts : dict
        What a tensor begins with, and is copied there.
    written : dict
        What kernels write in place; of each tensor the first makes it, if nothing is copied there.
    read : dict
        Concatenations, of which nothing is left.
    """

    firsts: dict[relax.Var, Strip] = field(default_factory=dict)
    written: dict[relax.Var, Strip] = field(default_factory=dict)
    read: dict[relax.Var, Strip] = field(default_factory=dict)

    def view(self, var: relax.Expr) -> Strip | None:
        """The strip that a kernel reads, which begins with its tensor; None if the variable is no such."""
        return self.read.get(var) or next(
            (strip for strip in [self.written.get(var)] if strip and not strip.start), None
        )

    @staticmethod
    def of(mod: tvm.IRModule) -> StripPlan:
        """Plan a module whose convolutions are outlined."""
        plan, finder = StripPlan(), _Finder(mod)
        for var in reversed(finder.concats):
            if var not in plan.read:
                finder.add_group(var, plan)
        return plan


class _Finder:
    def __init__(self, mod: tvm.IRModule) -> None:
        self.mod, self.graph = mod, Graph.of(mod["main"])
        self.order = {var: number for number, var in enumerate(self.graph.values)}
        self.concats = [var for var, value in self.graph.values.items() if _is_concat(value)]

    def operands(self, var: relax.Var) -> list[relax.Var] | None:
        """What a concatenation consists of, those of one that it begins with in its place; None if not variables."""
        fields = self.graph.values[var].args[0]
        fields = self.graph.values.get(fields, fields) if isinstance(fields, relax.Var) else fields
        if not isinstance(fields, relax.Tuple) or not all(isinstance(one, relax.Var) for one in fields.fields):
            return None
        first, *others = fields.fields
        before = self.operands(first) if first in self.concats else [first]
        return None if before is None else [*before, *others]

    def add_group(self, shared: relax.Var, plan: StripPlan) -> None:
        """Plan a concatenation and those that it begins with, if that is possible."""
        operands = self.operands(shared)
        if operands is None or len(set(operands)) < len(operands):
            return
        starts, width = {}, 0
        for operand in operands:
            starts[operand] = width
            width += _channels(operand)
        views = {shared}
        for var in self.concats:
            members = self.operands(var)
            if members is not None and members == operands[: len(members)]:
                views.add(var)
        first, *others = operands
        taken = plan.firsts.keys() | plan.written.keys()
        is_possible = (
            all(_channels(operand) % _CHANNELS == 0 for operand in operands)
            and taken.isdisjoint(operands)
            and all(self.is_kernel(var) and self.order[first] < self.order[var] for var in others)
            and all(set(self.graph.users[var]) <= views for var in others)
            and all(self.is_read_by_kernels(var, views) for var in views - {shared})
        )
        if not is_possible or first not in self.order:
            return
        if self.is_kernel(first) and self.is_read_by_kernels(first, views):
            others = operands
        else:
            plan.firsts[first] = Strip(shared, 0, width)
        plan.written |= {var: Strip(shared, starts[var], width) for var in others}
        plan.read |= {var: Strip(shared, 0, width) for var in views}

    def is_kernel(self, var: relax.Var) -> bool:
        """Whether a variable is computed by an outlined layer that is no grouped convolution, channels last."""
        value = self.graph.values.get(var)
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.GlobalVar):
            return False
        function = self.mod[value.op]
        if not isinstance(function, relax.Function) or KIND_ATTR not in (function.attrs or {}):
            return False
        convs = list(Graph.of(function).convs.values())
        # There are none in a pooling layer.
        return all(conv.shape.groups == 1 and str(conv.call.attrs.data_layout) == "NHWC" for conv in convs)

    def is_read_by_kernels(self, var: relax.Var, views: set[relax.Var]) -> bool:
        """Whether only concatenations of the group and kernels read a variable, these as their input alone."""
        for user in self.graph.users[var]:
            if user is None or (user not in views and not self.is_kernel(user)):
                return False
            if user not in views:
                call = self.graph.values[user]
                # The input comes first; what else a kernel reads is the residual, which has a tensor of its own.
                if [arg.same_as(var) for arg in call.args] != [True] + [False] * (len(call.args) - 1):
                    return False
        return True


def _is_concat(value: relax.Expr) -> bool:
    if not isinstance(value, relax.Call) or value.op != _CONCAT or value.ty.ndim != 4:
        return False
    is_static = value.ty.shape is not None and all(isinstance(one, tvm.tirx.IntImm) for one in value.ty.shape)
    return is_static and int(value.attrs.axis) in (3, -1) and str(value.ty.dtype) == "float32"


def _channels(var: relax.Var) -> int:
    return int(var.ty.shape[3])
