"""One pass that schedules whatever has no kernel of its own: elementwise, pooling, matrix products and the like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.target import Target
from tvm.tirx.analysis import undefined_vars

from tdc_tvm.schedules.device import DeviceSpec

# Below this many element operations a parallel region costs more than it saves.
_WORTH_A_LAUNCH = 16384
# Up to this many terms a sum stays in a register; a longer one streams its operands row by row.
_SHORT_REDUCTION = 64
_ROWS_AT_ONCE = 8
_SPATIAL, _REDUCTION = 0, 2
# What TVM raises where a primitive does not apply, and what reading a hand-written body with symbolic extents may.
_RESISTS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


@tvm.transform.module_pass(opt_level=0, name="ScheduleGenericCpu")
class ScheduleGenericCpu:
    """Schedule every s_tir PrimFunc that is not scheduled yet, for the CPU target in scope.

    Threads share the outer loops, the innermost one is vectorised, sums are initialised apart.  A function that
    resists stays as it is; afterwards each one is marked ``tirx.is_scheduled``.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Run the pass; see the class."""
        target = Target.current(allow_none=True) or Target({"kind": "llvm"})
        device = DeviceSpec.from_target(target)
        changed = {}
        for name, func in mod.functions_items():
            attrs = getattr(func, "attrs", None) or {}
            if (
                isinstance(func, tirx.PrimFunc)
                and attrs.get("s_tir", False)
                and not attrs.get("tirx.is_scheduled", False)
            ):
                changed[name] = schedule_function(func, device).with_attr("tirx.is_scheduled", True)
        mod.update(tvm.IRModule(changed))
        return mod


def schedule_function(func: tirx.PrimFunc, device: DeviceSpec) -> tirx.PrimFunc:
    """Schedule one function; it comes back as it was where nothing applies.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Any function of the s_tir dialect.
    device : DeviceSpec
        A CPU.
    """
    try:
        sch = s_tir.Schedule(func, error_render_level="none")
        blocks = _inline(sch)
    except _RESISTS:
        return func
    while blocks:
        try:
            blocks = _schedule_last(sch, blocks, device)
        except _RESISTS:
            # Every step preserves the meaning, so what has been done to this block may stay.
            blocks = blocks[:-1]
    return sch.mod["main"]


@dataclass(frozen=True)
class _Axes:
    """The loops of one block by kind, and their extents."""

    spatial: list[Any]
    reduction: list[Any]
    spatial_extents: list[int]
    reduction_extents: list[int]

    @property
    def work(self) -> int:
        return math.prod(self.spatial_extents) * math.prod(self.reduction_extents)


def _axes(sch: s_tir.Schedule, block: Any) -> _Axes:
    """Loops of a block whose iterators are its loops, one to one.

    Raises
    ------
    ValueError
        If they are not, or an extent is symbolic.
    """
    loops = sch.get_loops(block)
    iterators = sch.get(block).iter_vars
    extents = [sch.get(loop).extent for loop in loops]
    if len(loops) < len(iterators) or not all(isinstance(extent, tirx.IntImm) for extent in extents):
        raise ValueError("loops and iterators differ")
    own = list(zip(loops, [int(extent) for extent in extents], strict=True))[len(loops) - len(iterators) :]
    kinds = [int(iterator.iter_type) for iterator in iterators]
    if any(kind not in (_SPATIAL, _REDUCTION) for kind in kinds):
        raise ValueError("opaque iterators")
    split: dict[int, list[tuple[Any, int]]] = {_SPATIAL: [], _REDUCTION: []}
    for kind, item in zip(kinds, own, strict=True):
        split[kind].append(item)
    return _Axes(
        [loop for loop, _ in split[_SPATIAL]],
        [loop for loop, _ in split[_REDUCTION]],
        [extent for _, extent in split[_SPATIAL]],
        [extent for _, extent in split[_REDUCTION]],
    )


def _is_injective(sch: s_tir.Schedule, block: Any) -> bool:
    return all(int(iterator.iter_type) == _SPATIAL for iterator in sch.get(block).iter_vars)


def _moves_data(value: Any) -> bool:
    """Whether an expression only selects among elements and constants."""
    if isinstance(value, tirx.Select):
        # A condition on elements, as in a ReLU, is arithmetic.
        if any(isinstance(node, tvm.ir.TensorLoad) for node in _nodes(value.condition)):
            return False
        return _moves_data(value.true_value) and _moves_data(value.false_value)
    if isinstance(value, tvm.ir.Call) and getattr(value.op, "name", "").endswith(".if_then_else"):
        return all(_moves_data(argument) for argument in value.args[1:])
    return isinstance(value, tvm.ir.TensorLoad | tirx.FloatImm | tirx.IntImm)


def _inline(sch: s_tir.Schedule) -> list[Any]:
    """Fold elementwise producers into their only consumer; returns the blocks that remain."""
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if not _is_injective(sch, block):
            continue
        consumers = sch.get_consumers(block)
        body = sch.get(block).body
        copies = _is_store(body) and _moves_data(body.value)
        # Arithmetic must not be repeated for every element that a reduction reads.
        if len(consumers) == 1 and (copies or _is_injective(sch, consumers[0])):
            try:
                sch.compute_inline(block)
            except _RESISTS:
                continue
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def _schedule_last(sch: s_tir.Schedule, blocks: list[Any], device: DeviceSpec) -> list[Any]:
    """Schedule the last block, together with the sum that only it consumes; returns the blocks left to do."""
    last, before = blocks[-1], blocks[:-1]
    if not _is_injective(sch, last):
        outer = _share(sch, _axes(sch, last), device, _axes(sch, last).work)
        _reduce(sch, last, len(outer), device)
        return before
    summed = [block for block in before if not _is_injective(sch, block)]
    fused = None
    if before and summed and _same(sch, before[-1], summed[-1]) and _only_feeds(sch, before[-1], last):
        fused = before[-1]
    axes = _axes(sch, last)
    if fused is None or not _aligned(sch, fused, axes):
        _share(sch, axes, device, axes.work)
        _vectorize(sch, last, device)
        return before
    outer = _share(sch, axes, device, _axes(sch, fused).work)
    if outer:
        sch.compute_at(fused, outer[-1], preserve_unit_loops=True)
    _vectorize(sch, last, device)
    _reduce(sch, fused, len(outer), device)
    return before[:-1]


def _same(sch: s_tir.Schedule, a: Any, b: Any) -> bool:
    return sch.get(a).same_as(sch.get(b))


def _only_feeds(sch: s_tir.Schedule, producer: Any, consumer: Any) -> bool:
    consumers = sch.get_consumers(producer)
    return len(consumers) == 1 and _same(sch, consumers[0], consumer)


def _aligned(sch: s_tir.Schedule, summed: Any, axes: _Axes) -> bool:
    """Whether a sum's output has the extents of its consumer, so that it can move under the same loops."""
    return _axes(sch, summed).spatial_extents == axes.spatial_extents


def _share(sch: s_tir.Schedule, axes: _Axes, device: DeviceSpec, work: int) -> list[Any]:
    """Divide a block among the threads; returns the loops outside of which nothing else of it lies."""
    if not axes.spatial:
        return []
    *rows, last = axes.spatial
    row_count = math.prod(axes.spatial_extents[:-1])
    parallel = work >= _WORTH_A_LAUNCH
    if rows and (row_count >= device.core_count or not parallel):
        outer = sch.fuse(*rows) if len(rows) > 1 else rows[0]
        if parallel:
            sch.parallel(outer)
        return [outer]
    if not parallel or axes.spatial_extents[-1] < 2 * device.core_count:
        return []
    width = _width(axes.spatial_extents[-1], device)
    units = axes.spatial_extents[-1] // width
    chunks = min(units, device.core_count)
    if units % chunks and units > 8 * chunks:
        # Uneven shares are better than a predicate on every store; small multiples even them out.
        chunks = next((n for n in range(chunks, 16 * chunks) if units % n == 0), chunks)
    outer, _ = sch.split(last, [chunks, None]) if units % chunks == 0 else sch.split(last, [None, width])
    sch.reorder(outer, *rows)
    sch.parallel(outer)
    return [outer]


def _width(extent: int, device: DeviceSpec) -> int:
    """The widest vector that divides an extent; 1 if only very narrow ones do, which LLVM handles better."""
    lanes = max(device.vector_bytes, 16) // 4
    while lanes > 1 and extent % lanes:
        lanes //= 2
    return lanes if lanes >= 4 else 1


def _vectorize(sch: s_tir.Schedule, block: Any, device: DeviceSpec) -> None:
    """Vectorise a block's innermost loop where it divides evenly; LLVM takes care of the others."""
    loop = sch.get_loops(block)[-1]
    statement = sch.get(block)
    cuts = _cuts(statement.body.value, statement.iter_vars[-1].var) if _is_store(statement.body) else []
    extent = int(sch.get(loop).extent)
    if cuts and extent == int(statement.iter_vars[-1].dom.extent):
        # A concatenation would otherwise ask for every element which input it comes from.
        edges = [0, *(cut for cut in cuts if 0 < cut < extent), extent]
        sizes = [end - begin for begin, end in itertools.pairwise(edges)]
        sch.loop_partition(loop, [*sizes[:-1], None])
        return
    width = _width(extent, device)
    if width > 1:
        _, inner = sch.split(loop, [None, width])
        sch.vectorize(inner)


def _is_store(body: Any) -> bool:
    return isinstance(body, tirx.BufferStore)


def _cuts(value: Any, axis: Any) -> list[int]:
    """Where conditions of the form ``constant <= axis`` change within an expression, ascending."""
    return sorted(
        {
            int(node.a)
            for node in _nodes(value)
            if isinstance(node, tirx.LE) and isinstance(node.a, tirx.IntImm) and node.b.same_as(axis)
        }
    )


def _nodes(value: Any) -> Iterator[Any]:
    """An expression and all its parts; the indices of elements are none."""
    pending = [value]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, tvm.ir.Call):
            pending.extend(node.args)
        elif not isinstance(node, tvm.ir.TensorLoad):
            parts = ("a", "b", "value", "condition", "true_value", "false_value")
            pending.extend(getattr(node, name) for name in parts if hasattr(node, name))


def _reduce(sch: s_tir.Schedule, block: Any, outside: int, device: DeviceSpec) -> None:
    """Order the loops of a reduction that lie inside ``outside`` ones: lanes innermost, sums in registers or in L1."""
    statement = sch.get(block)
    kinds = [int(iterator.iter_type) for iterator in statement.iter_vars]
    loops = sch.get_loops(block)[outside:]
    if len(loops) > len(kinds):
        raise ValueError("loops and iterators differ")
    kinds = kinds[len(kinds) - len(loops) :]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _REDUCTION]
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _SPATIAL]
    if not reduction or not spatial or len(statement.writes) != 1 or _reads_along_reduction(statement):
        return
    extents = [int(sch.get(loop).extent) for loop in reduction]
    width = _width(int(sch.get(spatial[-1]).extent), device)
    # A loop that no vector divides stays whole and innermost, for LLVM to vectorise with its remainder.
    wide, lanes = sch.split(spatial[-1], [None, width]) if width > 1 else (None, spatial[-1])
    across = [] if wide is None else [wide]
    if math.prod(extents) <= _SHORT_REDUCTION:
        sch.reorder(*spatial[:-1], *across, *reduction, lanes)
        outermost = reduction[0]
    else:
        rows, row = sch.split(reduction[-1], [None, math.gcd(extents[-1], _ROWS_AT_ONCE)])
        inner = [*across, row, lanes] if across else [lanes, row]
        sch.reorder(*spatial[:-1], *reduction[:-1], rows, *inner)
        sch.unroll(row)
        outermost = [*reduction[:-1], rows][0]
    if width > 1:
        # Before the sum is taken apart: its update alone no longer counts as a reduction.
        sch.vectorize(lanes)
    sch.decompose_reduction(block, outermost)


def _reads_along_reduction(block: Any) -> bool:
    """Whether neighbouring terms of a sum are neighbours in memory, so that lanes across outputs would be strided."""
    reduced = {iterator.var for iterator in block.iter_vars if int(iterator.iter_type) == _REDUCTION}
    inner = [iterator.var for iterator in block.iter_vars if int(iterator.iter_type) == _SPATIAL][-1]
    found = False
    along = False
    for region in block.reads:
        used = undefined_vars(region.region[-1].min)
        found |= any(var.same_as(inner) for var in used)
        along |= any(var.same_as(other) for var in used for other in reduced)
    return along and not found
