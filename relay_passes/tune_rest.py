"""One pass that gives functions without a kernel of ours the schedules that MetaSchedule found for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import tvm
from tvm import relax, tirx
from tvm.relax.analysis import has_reshape_pattern
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

# How MetaSchedule's schedules are built, while they are measured and afterwards.  The pass that is off merges buffers
# of several types, which LowerIntrin rejects in tensorized schedules, and those of two reductions across threads.
BUILD_CONFIG = {"tirx.disable_storage_rewrite": True}
# Searches schedules of functions, given with how often each is called, and puts them into the database.
Search = Callable[[dict[str, tirx.PrimFunc], dict[str, float]], None]


@tvm.transform.module_pass(opt_level=0, name="TuneRest")
@dataclass
class TuneRest:
    """Schedule what has none yet by a database's best; what it does not have is searched for first.

    Parameters
    ----------
    database : tvm.s_tir.meta_schedule.database.Database
        Of the device in scope.
    search : callable or None
        What searches; None to take what there is.
    searched, decided, open : list of str
        Names of functions: those that were searched for, those that the database decided, and all that have no
        schedule; filled in by the pass.

    Notes
    -----
    Functions of dynamic shape, and those that nothing was found for, stay as they are.
    """

    database: ms.database.Database
    search: Search | None
    searched: list[str] = field(default_factory=list)
    decided: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Run the pass; see the class."""
        target = Target.current()
        tasks = [task for task in ms.relax_integration.extract_tasks(mod, target) if is_open(_function(task))]
        missing = [task for task in tasks if not self._has(task, target)]
        self.open += [task.task_name for task in tasks]
        if self.search is not None and missing:
            self.search(
                {task.task_name: _function(task) for task in missing},
                {task.task_name: float(task.weight) for task in missing},
            )
            self.searched += [task.task_name for task in missing]
        self.decided += [task.task_name for task in tasks if self._has(task, target)]
        with self.database:
            return relax.transform.MetaScheduleApplyDatabase()(mod)

    def note(self) -> str:
        """What came of it."""
        return (
            f"{len(self.decided)} of {len(self.open)} functions that are not our operators have a schedule of its"
            f" database, {len(self.searched)} of them tuned now"
        )

    def _has(self, task: ms.ExtractedTask, target: Target) -> bool:
        return self.database.query_tuning_record(task.dispatched[0], target, task.task_name) is not None


def _function(task: ms.ExtractedTask) -> tirx.PrimFunc:
    return task.dispatched[0]["main"]


def is_open(function: tirx.PrimFunc) -> bool:
    """Whether MetaSchedule is to schedule a function: it has no schedule, static extents, and is no mere view."""
    attrs = function.attrs or {}
    if attrs.get("tirx.is_scheduled", False) or not attrs.get("s_tir", False) or has_reshape_pattern(function):
        return False
    return all(isinstance(extent, tirx.IntImm) for one in function.params for extent in getattr(one, "shape", ()))
