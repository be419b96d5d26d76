"""The compiler's front door."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import tvm
from onnx import helper
from tvm import relax
from tvm.target import Target

from tdc_tvm.artifact import Entry, Metadata, ObjectFiles, check_runs_here, cxx_compiler, host_features
from tdc_tvm.compiled_model import CompiledModel, check_seed
from tdc_tvm.cuda_toolchain import cuda_compiler
from tdc_tvm.errors import TdcError
from tdc_tvm.onnx_decompose import conv_shape, decompose_onnx, tucker_layer_names
from tdc_tvm.onnx_model import (
    ModelSource,
    TensorInfo,
    array,
    check_operators,
    constants,
    conv_nodes,
    freeze_shapes,
    frozen,
    layer_names,
    load_onnx,
    parameter_count,
)
from tdc_tvm.onnx_rewrite import simplify
from tdc_tvm.plan import RankSpec
from tdc_tvm.quiet import without_chatter
from tdc_tvm.relay_passes.import_onnx import import_onnx
from tdc_tvm.relay_passes.layers import layers_of
from tdc_tvm.relay_passes.link_entries import link_entries
from tdc_tvm.relay_passes.lower_conv import Tuned
from tdc_tvm.relay_passes.pipeline import graph_passes, lowering_passes
from tdc_tvm.relay_passes.tune_rest import BUILD_CONFIG, TuneRest
from tdc_tvm.report import BuildReport, Verification
from tdc_tvm.schedules.cuda.lowering import TIR_PIPELINE
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.shape import DTYPES, ConvShape
from tdc_tvm.targets import local_name, resolve_target
from tdc_tvm.tuning_db import TunedChoices, TuningDatabase, open_database
from tdc_tvm.verify import check_tolerances
from tdc_tvm.verify import verify as verify_model

Progress = Callable[[str], object]


def build(
    model: ModelSource,
    target: str | Target = "auto",
    precision: str = "fp32",
    *,
    decompose: RankSpec | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | Sequence[int] | None = None,
    require_full_fusion: bool = False,
    verify: bool = True,
    atol: float = 1e-5,
    rtol: float | None = None,
    seed: int = 0,
    tuning_db: str | os.PathLike | TuningDatabase | None = None,
    tune_rest: int | None = None,
    tune_rest_db: str | os.PathLike | None = None,
    progress: Progress = lambda step: None,
) -> CompiledModel:
    """Compile an ONNX model, every Tucker layer as one operator.

    Parameters
    ----------
    model : path, bytes or onnx.ModelProto
        Any model that TVM can import; Tucker layers are found by their form, whoever made them.
    target : str or tvm.target.Target
        ``"auto"`` (the local GPU if there is one, else the CPU), ``"llvm"``, ``"cuda"``,
        ``"sm_90"``, a TVM tag such as ``"nvidia/nvidia-h100"``, or a Target.
    precision : str
        Of convolutions: ``"fp32"`` strict single precision; on GPUs also ``"tf32"`` (stored in FP32), ``"fp16"`` and
        ``"bf16"`` (activations too), all summed in FP32.  Inputs and outputs of the model keep their types.
    decompose : RankSpec, optional
        Decompose dense convolutions first: ranks for all layers ``(rank_out, rank_in)``, an energy
        in (0, 1), a `DecompositionPlan` or its path, or a preset's name.
    input_shapes : mapping of input name to shape, optional
        For inputs with dynamic dimensions.
    batch : int or sequence of int, optional
        Size of a dynamic leading dimension, whatever ``input_shapes`` has there.  Several sizes share one library:
        the first is its function ``main``, a further one of 8 is ``main_8``.
    require_full_fusion : bool
        Fail if a Tucker layer cannot be one operator.
    verify : bool
        Compare with ONNX Runtime if the build can run here.
    atol, rtol, seed
        See `tdc_tvm.verify.verify`.
    tuning_db : path or TuningDatabase, optional
        Of what `tdc tune` measured: the fastest configuration decides a layer, where the database has one of exactly
        its shape and precision, the device, its architecture and these kernels.  The model decides the others; the
        report says which are which, and what was left out.
    tune_rest : int, optional
        Let TVM's MetaSchedule tune what our operators do not cover, by so many trials for each function on average,
        measured on this machine; 0 takes what its database has, which is never tuned again.
    tune_rest_db : path, optional
        The folder of MetaSchedule's databases, one for each device; by default that of the tuning database's name with
        the suffix ``.metaschedule``.
    progress : callable
        Called with the name of each step as it begins.

    Returns
    -------
    CompiledModel

    Raises
    ------
    TdcError
        If the model, the plan, a batch size, the target or a tuning database is faulty, a compiler is missing, a
        chain stays unfused although full fusion is required, MetaSchedule is to measure for another machine, or
        verification fails.

    Examples
    --------
    >>> compiled = tdc_tvm.build("resnet18.onnx", batch=1)  # doctest: +SKIP
    >>> print(compiled.report)                              # doctest: +SKIP
    >>> compiled.export_library("resnet18.so")              # doctest: +SKIP
    """
    start = time.perf_counter()
    check_precision(precision)
    check_tolerances(atol, rtol)
    check_seed(seed)
    sizes = _batch_sizes(batch)
    cxx_compiler()
    database = None if tuning_db is None else open_database(tuning_db)
    rest = _tune_rest(tune_rest, tune_rest_db, database, target, seed, progress)
    source = _prepare(model, target, precision, decompose, input_shapes, sizes[0], progress)
    choices = None if database is None else TunedChoices(database, source.device, local_name(target))
    context = cuda_compiler(source.target) if source.target.kind.name == "cuda" else nullcontext()
    config = {} if rest is None else BUILD_CONFIG
    with context, compiling(), source.target, tvm.transform.PassContext(opt_level=3, config=config):
        entries: list[Entry] = []
        reports, graphs = [], {}
        for size in sizes:
            job = source.at(size)
            mod = _graph(job, progress, choices)
            report = job.report(mod)
            if require_full_fusion:
                _check_fused(report)
            name = f"main_{size}" if entries else "main"
            entries.append(Entry(name, size, tuple(job.inputs), _outputs(job.proto, mod)))
            reports.append(report)
            graphs[name] = mod
        progress("generating code")
        mod = tvm.transform.Sequential(lowering_passes(source.target, rest))(link_entries(graphs))
        pipeline = TIR_PIPELINE if source.target.kind.name == "cuda" else "default"
        code = ObjectFiles(relax.build(mod, source.target, relax_pipeline=None, tir_pipeline=pipeline))
    notes = (*source.notes, *(choices.notes() if choices is not None else ()))
    if rest is not None:
        notes += (f"MetaSchedule: {rest.note()}",)
    seconds = time.perf_counter() - start
    report = replace(reports[0], further=tuple(reports[1:]), build_seconds=seconds, notes=notes)
    metadata = Metadata(
        entries=tuple(entries),
        kind=source.target.kind.name,
        arch=report.target,
        machine=_machine(source.target),
        cpu_features=host_features(source.target),
        tvm_version=tvm.__version__,
        source_sha256=source.source_sha256,
        report=report.to_dict(),
    )
    compiled = CompiledModel(metadata, code)
    if verify:
        progress("verifying")
        compiled.report = replace(report, verification=_verification(compiled, source.proto, atol, rtol, seed))
        compiled.metadata = replace(metadata, report=compiled.report.to_dict())
    return compiled


def _tune_rest(
    trials: int | None,
    folder: str | os.PathLike | None,
    database: TuningDatabase | None,
    target: str | Target,
    seed: int,
    progress: Progress,
) -> TuneRest | None:
    """What schedules functions that are not our operators, if that is asked for."""
    if trials is None:
        if folder is not None:
            raise TdcError("tune_rest_db is for tune_rest, which is not given; say tune_rest=0 to take what it has")
        return None
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 0:
        raise TdcError(f"tune_rest is {trials!r}; expected the number of trials for a function, such as 64, or 0")
    if folder is None and database is None:
        raise TdcError(
            "tune_rest keeps its database beside the tuning database, and there is none; name a folder as tune_rest_db"
            " (--tune-rest-db FOLDER), or a tuning database (--tuning-db FILE)"
        )
    from tdc_tvm import metaschedule

    resolved = resolve_target(target)
    device = DeviceSpec.from_target(resolved)
    if trials:
        metaschedule.check_installed()
        metaschedule.check_measures_here(resolved)
    beside = Path(folder) if folder is not None else database.path  # type: ignore[union-attr]
    store = metaschedule.open_database(
        metaschedule.database_folder(beside, local_name(target) or device.name, device.arch)
    )

    def search(functions: dict[str, tvm.tirx.PrimFunc], weights: dict[str, float]) -> None:
        progress(f"tuning {len(functions)} other functions, {trials} trials for each")
        with metaschedule.MetaSchedule(resolved) as tuner:
            tuner.tune(functions, trials * len(functions), store, weights=weights, seed=seed)

    return TuneRest(store, search if trials else None)


def plan_build(
    model: ModelSource,
    target: str | Target = "auto",
    *,
    decompose: RankSpec | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | Sequence[int] | None = None,
) -> BuildReport:
    """What `build` would decide on every layer, without compiling anything; no GPU or compiler is needed.

    Parameters and errors are those of `build`.
    """
    sizes = _batch_sizes(batch)
    source = _prepare(model, target, "fp32", decompose, input_shapes, sizes[0], lambda step: None)
    reports = []
    with compiling(), source.target:
        for size in sizes:
            job = source.at(size)
            reports.append(job.report(_graph(job, lambda step: None)))
    return replace(reports[0], further=tuple(reports[1:]))


def tunable_shapes(
    model: ModelSource,
    target: str | Target = "auto",
    precision: str = "fp32",
    *,
    decompose: RankSpec | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | Sequence[int] | None = None,
) -> list[ConvShape]:
    """The different convolutions of a model that a tuning database can decide, in the order of the network.

    Parameters and errors are those of `build`.
    """
    check_precision(precision)
    sizes = _batch_sizes(batch)
    source = _prepare(model, target, precision, decompose, input_shapes, sizes[0], lambda step: None)
    found: dict[ConvShape, None] = {}
    with compiling(), source.target:
        for size in sizes:
            _graph(source.at(size), lambda step: None, lambda shape: found.setdefault(shape))
    return list(found)


@dataclass(frozen=True)
class _Source:
    """A checked model, its inputs as they are declared, and what it is built for."""

    proto: onnx.ModelProto
    input_shapes: Mapping[str, Sequence[int]] | None
    target: Target
    device: DeviceSpec
    precision: str
    source_sha256: str
    notes: tuple[str, ...]

    def at(self, batch: int | None) -> _Job:
        proto, inputs = frozen(self.proto, self.input_shapes, batch)
        simplify(proto)
        return _Job(self, batch, proto, inputs)


@dataclass(frozen=True)
class _Job:
    """A copy of the model with static shapes, made simpler."""

    source: _Source
    batch: int | None
    proto: onnx.ModelProto
    inputs: list[TensorInfo]

    def report(self, mod: tvm.IRModule) -> BuildReport:
        target = self.source.target
        return BuildReport(
            target=str(target.attrs.get("arch", target.attrs.get("mcpu", target.kind.name))),
            device=self.source.device.name,
            precision=self.source.precision,
            layers=tuple(layers_of(mod)),
            macs=_macs(self.proto),
            parameters=parameter_count(self.proto),
            notes=self.source.notes,
            batch=self.batch,
        )


def _batch_sizes(batch: int | Sequence[int] | None) -> tuple[int | None, ...]:
    """The batch sizes that ``batch`` stands for; None is the size that the model declares."""
    if batch is None:
        return (None,)
    sizes = tuple(batch) if isinstance(batch, Iterable) and not isinstance(batch, (str, bytes)) else (batch,)
    whole = all(isinstance(size, (int, np.integer)) and not isinstance(size, bool) and size > 0 for size in sizes)
    if not sizes or not whole or len(set(sizes)) < len(sizes):
        raise TdcError(
            f"batch is {batch!r}; expected a whole number from 1 on, such as 1, or several different ones,"
            " such as [1, 8] (--batch 1 --batch 8)"
        )
    return tuple(int(size) for size in sizes)


def check_precision(precision: str) -> None:
    """Refuse an unknown precision."""
    if precision not in DTYPES:
        raise TdcError(f"precision {precision!r} is not supported; use one of {', '.join(DTYPES)}")


def _prepare(
    model: ModelSource,
    target: str | Target,
    precision: str,
    decompose: RankSpec | None,
    input_shapes: Mapping[str, Sequence[int]] | None,
    batch: int | None,
    progress: Progress,
) -> _Source:
    """Read and check a model, also whether ``batch`` fits it: before it is decomposed, which takes long."""
    resolved = resolve_target(target)
    device = DeviceSpec.from_target(resolved)
    known = ["fp32", *device.tensor_flops_per_s] if device.kind == "cuda" else ["fp32"]
    if precision not in known:
        raise TdcError(f"{device.name} ({resolved.kind.name}) computes in {' or '.join(known)}, not in {precision}")
    progress("reading the model")
    proto = load_onnx(model)
    digest = hashlib.sha256()
    for tensor in proto.graph.initializer:
        digest.update(tensor.SerializeToString(deterministic=True))
    for node in proto.graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    check_operators(proto)
    declared = onnx.GraphProto(input=proto.graph.input)
    freeze_shapes(proto, input_shapes, batch)
    notes: tuple[str, ...] = ()
    if decompose is not None:
        progress("decomposing")
        notes = decompose_onnx(proto, decompose).notes
    del proto.graph.input[:]
    proto.graph.input.extend(declared.input)
    return _Source(proto, input_shapes, resolved, device, precision, digest.hexdigest(), notes)


def _graph(job: _Job, progress: Progress, tuned: Tuned | None = None) -> tvm.IRModule:
    """The model with a kernel for every convolution."""
    progress("importing")
    mod = import_onnx(job.proto, layer_names(job.proto))
    progress("fusing and scheduling")
    passes = graph_passes(job.source.device, job.source.precision, tucker_layer_names(job.proto), tuned)
    return tvm.transform.Sequential(passes)(mod)


@contextmanager
def compiling() -> Iterator[None]:
    """TVM at work: its chatter is dropped, and what it cannot do is said as one of our errors."""
    with without_chatter():
        try:
            yield
        except TdcError:
            raise
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            raise TdcError(f"TVM cannot compile this model: {type(error).__name__}: {first}") from error


def _check_fused(report: BuildReport) -> None:
    if report.unfused:
        lines = "\n".join(f"  {layer.name}: {layer.reason}" for layer in report.unfused)
        raise TdcError(
            f"{len(report.unfused)} Tucker layer(s) are not one operator, and full fusion is required:\n{lines}\n"
            "Change the model as the reasons say, or build without require_full_fusion (--require-full-fusion)"
        )


def _outputs(proto: onnx.ModelProto, mod: tvm.IRModule) -> tuple[TensorInfo, ...]:
    result = mod["main"].ret_ty
    fields = result.fields if isinstance(result, relax.TupleType) else [result]
    infos = []
    for value, field in zip(proto.graph.output, fields, strict=True):
        if field.shape is None or not all(isinstance(extent, tvm.tirx.IntImm) for extent in field.shape.values):
            raise TdcError(
                f"the shape of output {value.name!r} depends on the input's values; only static shapes can be built:"
                " take that operator out of the model"
            )
        declared, found = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name, str(field.dtype)
        if found != declared:
            raise TdcError(
                f"output {value.name!r} is declared as {declared}, and TVM computes it as {found};"
                " take that output out of the model"
            )
        infos.append(TensorInfo(value.name, tuple(int(extent) for extent in field.shape.values), found))
    return tuple(infos)


def _macs(proto: onnx.ModelProto) -> int:
    tensors = constants(proto)
    shapes = [
        conv_shape(proto, node, array(tensors[node.input[1]]).shape)
        for node in conv_nodes(proto)
        if node.input[1] in tensors
    ]
    return sum(shape.macs for shape in shapes if shape is not None)


def _machine(target: Target) -> str:
    host = target if target.kind.name == "llvm" else target.host
    triple = str(host.attrs.get("mtriple", ""))
    return triple.split("-")[0] if triple else platform.machine()


def _verification(
    compiled: CompiledModel, reference: onnx.ModelProto, atol: float, rtol: float | None, seed: int
) -> Verification:
    try:
        check_runs_here(compiled.metadata, "the model")
    except TdcError as error:
        return Verification("skipped", f"it cannot run on this machine ({error})")
    return verify_model(compiled, reference, atol=atol, rtol=rtol, seed=seed)
