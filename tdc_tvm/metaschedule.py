"""TVM's MetaSchedule: it searches schedules for functions that have none, such as what our operators do not cover.

Its candidates are built in processes that stay, and timed by the clock of `tdc_tvm.measure`.  TVM's own builder starts
its processes anew for each batch, each of which then parses tensor intrinsics that no build needs: half a minute.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import re
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule, ScheduleError
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock
from tvm.support.popen_pool import PopenPoolExecutor, StatusKind
from tvm.target import Target

from tdc_tvm.cuda_toolchain import cuda_compiler, load_cuda_runtime
from tdc_tvm.errors import TdcError
from tdc_tvm.measure import Clock, make_clock
from tdc_tvm.quiet import without_chatter
from tdc_tvm.relay_passes.tune_rest import BUILD_CONFIG
from tdc_tvm.schedules.device import DeviceSpec, cpu_threads, use_cpu_threads
from tdc_tvm.targets import local_gpu_arch

# Rounds that a function's trials are divided into at least, so that the cost model learns, and candidates of one at
# most and, as each begins with a search of some seconds, at least.
_ROUNDS, _MOST, _LEAST = 4, 64, 8
# How often a space of schedules is drawn, which may fail.
_DRAWS = 10
# Of schedules that evolve in a round; TVM's default.  A round applies some thousands, which is what it takes long for.
POPULATION = 512
# Hyperthreads included, which TVM's defaults leave idle.
_CORES = len(os.sched_getaffinity(0))
_LOG = logging.getLogger(__name__)
# Warnings, as of a space with fewer schedules than trials, are no news to a user.
_LOG.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Trial:
    """A schedule that was measured.

    Parameters
    ----------
    function : str
        Whose it is.
    us : float
        Time of a launch; infinite if it failed.
    seconds : float
        From the beginning of the search until its batch was measured.
    error : str
        Why it failed.
    """

    function: str
    us: float
    seconds: float
    error: str = ""


def limited(target: Target) -> Target:
    """A target that says what MetaSchedule wants to know: the limits of a GPU's block, or a CPU's cores."""
    device = DeviceSpec.from_target(target)
    values = dict(target.export())
    values.pop("tag", None)
    if target.kind.name == "llvm":
        return Target(values | {"num-cores": cpu_threads()})
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": device.smem_per_block_bytes}
    return Target(values | limits)


@functools.cache
def check_installed() -> None:
    """Refuse to go on without the packages that MetaSchedule needs.

    Raises
    ------
    TdcError
        If one is missing.
    """
    from importlib.util import find_spec

    missing = [name for name in ("xgboost", "cloudpickle", "psutil", "tornado") if find_spec(name) is None]
    if missing:
        raise TdcError(f"MetaSchedule needs {', '.join(missing)}; install it with: pip install 'tdc-tvm[tune]'")


class MetaSchedule:
    """Processes that build and measure candidates; they stay from one search to the next.

    Parameters
    ----------
    target : tvm.target.Target
        What is built for, which must be this machine's.
    seconds : float
        Of timing for a candidate, about.
    workers : int, optional
        Processes that build; by default as many as there are cores.
    timeout_s : float
        After which a build or a measurement has failed.

    Raises
    ------
    TdcError
        If a package is missing.
    """

    def __init__(
        self, target: Target, seconds: float = 0.05, workers: int | None = None, timeout_s: float = 60.0
    ) -> None:
        check_installed()
        self.target = limited(target)
        self.builder = _Builder(workers or _CORES, timeout_s)
        # Its number and repeat are not asked for by our clock.
        config = ms.runner.EvaluatorConfig(number=1, repeat=1, min_repeat_ms=math.ceil(seconds * 1e3))
        self.runner = ms.runner.LocalRunner(
            timeout_sec=timeout_s,
            evaluator_config=config,
            f_run_evaluator=functools.partial(_evaluate, DeviceSpec.from_target(target)),
            initializer=functools.partial(_begin_measuring, target.kind.name),
        )

    def __enter__(self) -> MetaSchedule:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for pool in (self.builder.pool, self.runner.pool):
            pool.shutdown()

    def tune(
        self,
        functions: Mapping[str, tirx.PrimFunc],
        trials: int,
        database: ms.database.Database,
        *,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        observe: Callable[[Trial], object] = lambda trial: None,
    ) -> None:
        """Search schedules by evolution and XGBoost; what is measured goes into a database batch by batch.

        Parameters
        ----------
        functions : mapping of str to PrimFunc
            Without a schedule; those that MetaSchedule finds none for are passed over.
        trials : int
            Candidates to measure, of all functions together.
        database : tvm.s_tir.meta_schedule.database.Database
            What is added to.
        weights : mapping of str to float, optional
            How often each function is called: where time is lost is searched most.
        seed : int
            Of the search.
        observe : callable
            Given each `Trial`, when its batch was measured.

        Raises
        ------
        TdcError
            If there are fewer trials than functions.
        """
        if trials < len(functions):
            raise TdcError(f"found {trials} trials for {len(functions)} functions; expected one for each at least")
        _register_intrinsics()
        seeds = ms.utils.fork_seed(seed + 1, n=len(functions))
        tasks = {
            name: task_context(name, function, self.target, number)
            for (name, function), number in zip(functions.items(), seeds, strict=True)
        }
        contexts = {name: context for name, context in tasks.items() if context is not None}
        if not contexts:
            return
        share = trials // len(contexts)
        round_size = min(share, max(_LEAST, min(_MOST, math.ceil(share / _ROUNDS))))
        callbacks = [
            _Observer(list(contexts), time.monotonic(), observe),
            ms.measure_callback.AddToDatabase(),
            ms.measure_callback.UpdateCostModel(),
            ms.measure_callback.RemoveBuildArtifact(),
        ]
        with without_chatter():
            ms.tune.tune_tasks(
                tasks=list(contexts.values()),
                task_weights=[(weights or {}).get(name, 1.0) for name in contexts],
                work_dir="",
                max_trials_global=trials,
                num_trials_per_iter=round_size,
                builder=self.builder,
                runner=self.runner,
                database=database,
                cost_model=ms.cost_model.XGBModel(num_tuning_cores=1, tree_method="hist"),
                measure_callbacks=callbacks,
            )

    def best(self, function: tirx.PrimFunc, database: ms.database.Database, rank: int = 0) -> tirx.PrimFunc | None:
        """A function by the fastest schedule that a database has of it, or the ``rank``-th after it; None without."""
        workload = database.commit_workload(ms.tune_context._normalize_mod(function))
        records = database.get_top_k(workload, rank + 1)
        if len(records) <= rank:
            return None
        schedule = Schedule(workload.mod)
        records[rank].trace.apply_to_schedule(schedule, remove_postproc=False)
        return schedule.mod["main"]


def check_measures_here(target: Target) -> None:
    """Refuse a target that is not this machine's GPU or CPU.

    Raises
    ------
    TdcError
        If it is another's.
    """
    if target.kind.name == "cuda":
        arch, here = str(target.attrs["arch"]), local_gpu_arch()
        if here is not None and here.rstrip("a") == arch.rstrip("a"):
            return
        found = f"a GPU of {here}" if here else "no NVIDIA GPU that TVM can use"
    else:
        arch, here = str(target.attrs.get("mcpu", "generic")), tvm.target.codegen.llvm_get_system_cpu()
        if here == arch:
            return
        found = f"a CPU of {here}"
    raise TdcError(
        f"MetaSchedule measures on this machine, which has {found}; the target is {arch}: tune where there is one and"
        " bring the database here, where 0 trials take what it has"
    )


def database_folder(beside: Path, device: str, arch: str) -> Path:
    """Where MetaSchedule's database of a device is kept: it does not tell devices apart itself.

    Parameters
    ----------
    beside : path
        The tuning database (.jsonl), or a folder.
    device, arch : str
        As a `TuningKey` has them.
    """
    folder = beside.with_suffix(".metaschedule") if beside.suffix == ".jsonl" else beside
    return folder / re.sub(r"[^A-Za-z0-9._-]+", "-", f"{device}-{arch}")


def open_database(folder: Path) -> ms.database.Database:
    """MetaSchedule's own database, in a folder that is made if it is not there.

    Raises
    ------
    TdcError
        If the folder cannot be made, or holds anything else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TdcError(f"cannot make MetaSchedule's database {folder}: {error.strerror}; name another folder") from None
    try:
        return ms.database.JSONDatabase(work_dir=str(folder))
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise TdcError(f"cannot read MetaSchedule's database {folder} ({first}); remove it, or name another") from None


def task_context(name: str, function: tirx.PrimFunc, target: Target, seed: int) -> ms.TuneContext | None:
    """A function and the space of its schedules: on GPUs that of tensor cores if it reads FP16 and fits them.

    None if there is no schedule of it.
    """
    spaces = [target.kind.name]
    if target.kind.name == "cuda" and any(str(parameter.dtype) == "float16" for parameter in function.params):
        spaces.insert(0, "cuda-tensorcore")

    def context(generator: ms.space_generator.SpaceGenerator) -> ms.TuneContext:
        return ms.TuneContext(
            mod=function,
            target=target,
            space_generator=generator,
            search_strategy=ms.search_strategy.EvolutionarySearch(
                population_size=POPULATION, init_min_unmeasured=min(50, POPULATION)
            ),
            task_name=name,
            rand_state=seed,
            num_threads=_CORES,
            logger=_LOG,
        )

    for space in spaces:
        rules = {"postprocs": space, "mutator_probs": space}
        drawn = context(ms.space_generator.PostOrderApply(sch_rules=space, **rules))
        for _ in range(_DRAWS):
            # Some tiles do not fit where pixels are padded to the tiles of tensor cores.
            with suppress(ScheduleError, tvm.error.InternalError):
                sketches = list(drawn.generate_design_space())
                fixed = ms.space_generator.ScheduleFn(lambda schedule, found=sketches: found, sch_rules=[], **rules)
                return context(fixed).clone()
        _LOG.info("no schedule of %s was found in the space %s", name, space)
    return None


@contextmanager
def _parse_quickly() -> Iterator[None]:
    """Let TVM's parser of scripts look at the stack without reading the source of every frame, ten times as fast."""
    from tvm.tirx.script.parser import entry

    def stack(context: int = 0) -> list[inspect.FrameInfo]:
        frame: types.FrameType | None = sys._getframe(1)
        found = []
        while frame is not None:
            code = frame.f_code
            found.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
            frame = frame.f_back
        return found

    original = entry.inspect
    entry.inspect = types.SimpleNamespace(**vars(inspect) | {"stack": stack})
    try:
        yield
    finally:
        entry.inspect = original


@derived_object
class _Builder(ms.builder.PyBuilder):
    """Builds candidates in processes that stay; what a build leaks is gone when its process has done many."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        super().__init__()
        self.timeout_s = timeout_s
        self.pool = PopenPoolExecutor(workers, timeout_s, maximum_process_uses=200)

    def build(self, build_inputs: list[ms.builder.BuilderInput]) -> list[ms.builder.BuilderResult]:
        """A library of each."""
        jobs = [(one.mod, one.target) for one in build_inputs]
        results = []
        for done in self.pool.map_with_error_catching(_build_artifact, jobs):
            if done.status == StatusKind.COMPLETE:
                results.append(ms.builder.BuilderResult(done.value, None))
            else:
                error = f"not built in {self.timeout_s:g} s" if done.status == StatusKind.TIMEOUT else str(done.value)
                results.append(ms.builder.BuilderResult(None, error))
        return results


def _register_intrinsics() -> None:
    """What tensorized schedules are made of."""
    with _parse_quickly():
        import tvm.s_tir.tensor_intrin  # noqa: F401


def _build_artifact(job: tuple[tvm.IRModule, Target]) -> str:
    """In a process of the builder: the path of a library, alone in a folder that MetaSchedule removes."""
    path = Path(tempfile.mkdtemp(prefix="tdc-metaschedule-"), "candidate.so")
    build_library(*job, path)
    return str(path)


def build_library(
    mod: tvm.IRModule, target: Target, path: Path, config: Mapping[str, Any] = types.MappingProxyType(BUILD_CONFIG)
) -> None:
    """Compile scheduled functions into a library, by default as MetaSchedule's candidates."""
    context = cuda_compiler(target) if target.kind.name == "cuda" else nullcontext()
    with context, target, tvm.transform.PassContext(config=dict(config)), without_chatter():
        mod = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(mod)
        tvm.tirx.build(mod, target=target).export_library(str(path))


def _begin_measuring(kind: str) -> None:
    if kind == "cuda":
        load_cuda_runtime()
    else:
        use_cpu_threads()


def _evaluate(
    device: DeviceSpec,
    module: tvm.runtime.Module,
    place: tvm.runtime.Device,
    config: ms.runner.EvaluatorConfig,
    arguments: Sequence[Any],
) -> list[float]:
    """In the process that measures: seconds of a launch, by the clock that our kernels are timed by."""
    function = module["main"]
    try:
        function(*arguments[0])
        place.sync()
        samples_us = _clock_of(device, config.min_repeat_ms * 1e-3)(lambda: function(*arguments[0]))
        return [float(np.median(samples_us)) * 1e-6]
    except Exception:
        # A kernel's fault stays with the process: it begins anew.
        try:
            place.sync()
        except Exception:
            os._exit(1)
        raise


@functools.cache
def _clock_of(device: DeviceSpec, seconds: float) -> Clock:
    return make_clock(device, seconds)


@derived_object
class _Observer(ms.measure_callback.PyMeasureCallback):
    """Tells what came of a batch."""

    def __init__(self, names: Sequence[str], begin: float, observe: Callable[[Trial], object]) -> None:
        super().__init__()
        self.names, self.begin, self.observe = names, begin, observe

    def apply(
        self,
        task_scheduler: ms.task_scheduler.TaskScheduler,
        task_id: int,
        measure_candidates: list[ms.MeasureCandidate],
        builder_results: list[ms.builder.BuilderResult],
        runner_results: list[ms.runner.RunnerResult],
    ) -> None:
        """See `Trial`."""
        seconds = time.monotonic() - self.begin
        for built, run in zip(builder_results, runner_results, strict=True):
            error = str(built.error_msg or run.error_msg or "")
            us = math.inf if error else 1e6 * float(np.median([float(one) for one in run.run_secs]))
            self.observe(Trial(self.names[task_id], us, seconds, error))
