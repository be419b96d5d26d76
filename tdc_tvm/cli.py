"""The ``tdc`` command."""

from __future__ import annotations

import json
import math
import platform
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from tdc_tvm import __version__, cli_training
from tdc_tvm.errors import TdcError
from tdc_tvm.plan_command import Precision, plan
from tdc_tvm.tune_command import tune

# Names of layers and files may hold brackets, which rich would take for its markup.
console = Console(markup=False, highlight=False)
# What is not the command's result goes to standard error, so that --json can be piped.
messages = Console(stderr=True)

main = typer.Typer(
    name="tdc",
    help="Fast Tucker-compressed CNNs on Apache TVM: plan, compress, tune, build, run, verify, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"tdc_tvm {__version__}")
        raise typer.Exit


@main.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


Model = Annotated[Path, typer.Argument(help="ONNX model.", metavar="MODEL.onnx")]
Library = Annotated[Path, typer.Argument(help="Library written by 'tdc build'.", metavar="MODEL.so")]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        metavar="NAME",
        help="auto, llvm, cuda, sm_80, sm_90, or a TVM tag such as nvidia/nvidia-h100.",
    ),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option("--precision", metavar="NAME", help="Arithmetic: fp32; on GPUs also tf32, fp16 and bf16."),
]
RanksOption = Annotated[
    str | None,
    typer.Option(
        "--decompose",
        metavar="RANKS",
        help="Decompose dense convolutions first: ranks 'OUT,IN', an energy in (0, 1), a plan (.json, .yaml), "
        "or a preset such as resnet18.",
    ),
]
ShapesOption = Annotated[
    list[str] | None,
    typer.Option("--input-shape", metavar="SHAPE", help="Shape of a dynamic input, NAME:1x3x224x224; may be repeated."),
]
BatchOption = Annotated[
    list[int] | None,
    typer.Option("--batch", min=1, metavar="N", help="Size of a dynamic leading dimension; may be repeated."),
]
AtolOption = Annotated[
    float, typer.Option("--atol", min=0, metavar="X", help="Absolute tolerance against ONNX Runtime.")
]
RtolOption = Annotated[
    float | None,
    typer.Option(
        "--rtol",
        min=0,
        metavar="X",
        help="Tolerance relative to an output's largest magnitude; by default 1e-4 in FP32, more in lower precisions.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of random input.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of tables.")]


@main.command()
def compress(
    model: Annotated[
        Path, typer.Argument(help="ONNX model, or a folder or checkpoint of 'tdc train'.", metavar="MODEL")
    ],
    ranks: Annotated[
        str,
        typer.Option(
            "--ranks",
            "-r",
            metavar="RANKS",
            help="Ranks 'OUT,IN', an energy in (0, 1), a plan file, or a preset such as resnet18.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="The ONNX file, or the folder of a run, to write.")
    ],
    save_plan: Annotated[
        Path | None,
        typer.Option("--save-plan", metavar="FILE", help="Write the ranks in use as a plan (.json, .yaml)."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="Of training: admm (the default), direct, scratch or dense."),
    ] = None,
    config: cli_training.ConfigOption = None,
    settings: cli_training.SetOption = None,
    resume: cli_training.ResumeOption = False,
    budget: cli_training.BudgetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a model into Tucker format.

    An ONNX model's convolutions are decomposed, ONNX to ONNX and without PyTorch.  What 'tdc train' wrote is
    compressed by ADMM training, decomposition and fine-tuning, and exported to ONNX.
    """
    of_training = {"--method": method, "--config": config, "--set": settings, "--budget": budget}
    if model.suffix != ".onnx":
        if save_plan is not None:
            raise TdcError("--save-plan is for ONNX models; a run's folder gets plan.json anyway: leave it out")
        cli_training.compress_trained(model, ranks, output, config, method, settings, resume, budget, as_json)
        return
    if wrong := [name for name, value in of_training.items() if value is not None] + ["--resume"] * resume:
        raise TdcError(
            f"{', '.join(wrong)} is for what 'tdc train' wrote; an ONNX model is only decomposed: leave it out"
        )
    import onnx

    from tdc_tvm.files import check_output, write_atomic
    from tdc_tvm.onnx_decompose import decompose_onnx
    from tdc_tvm.onnx_model import infer_shapes, load_onnx, parameter_count

    check_output(output, "the compressed model", (".onnx",), [model])
    if save_plan is not None:
        check_output(save_plan, "a plan", (".json", ".yaml", ".yml"), [model, output, ranks])
    with _progress("Decomposing") as step:
        step("reading the model")
        proto = load_onnx(model)
        before = parameter_count(proto)
        step("decomposing")
        infer_shapes(proto)
        report = decompose_onnx(proto, ranks)
        step("writing")
        onnx.checker.check_model(proto)
        with write_atomic(output) as temporary:
            onnx.save(proto, str(temporary))
        if save_plan is not None:
            report.plan.save(save_plan)
    data = report.to_dict() | {"output": str(output), "parameters": [before, parameter_count(proto)]}
    if as_json:
        print_json(data)
        return
    table = Table(
        title=f"{len(report.decomposed)} of {len(report.layers)} convolutions decomposed", title_justify="left"
    )
    for column in ("layer", "kernel\nout, in, h, w", "ranks\nout, in", "relative\nerror", "weights", "reason"):
        table.add_column(column, overflow="fold", no_wrap="\n" in column)
    for layer in report.layers:
        table.add_row(
            layer.name,
            "x".join(str(extent) for extent in layer.kernel_shape),
            f"{layer.ranks.rank_out}, {layer.ranks.rank_in}" if layer.ranks else "",
            "" if layer.relative_error is None else f"{layer.relative_error:.3f}",
            f"{layer.params_before:,} -> {layer.params_after:,}" if layer.ranks else f"{layer.params_before:,}",
            layer.reason,
        )
    console.print(table)
    console.print(f"parameters {before:,} -> {data['parameters'][1]:,}; wrote {output}", soft_wrap=True)


main.command()(plan)
main.command()(tune)
cli_training.register(main.command)


@main.command()
def build(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The library (.so) to write.")],
    target: TargetOption = "auto",
    precision: PrecisionOption = Precision.fp32,
    decompose: RanksOption = None,
    input_shape: ShapesOption = None,
    batch: BatchOption = None,
    require_full_fusion: Annotated[
        bool, typer.Option("--require-full-fusion", help="Fail if a Tucker layer is not one operator.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with ONNX Runtime if it can run here.")
    ] = True,
    tuning_db: Annotated[
        Path | None,
        typer.Option("--tuning-db", metavar="FILE", help="What 'tdc tune' measured decides layers it has (.jsonl)."),
    ] = None,
    tune_rest: Annotated[
        int | None,
        typer.Option(
            "--tune-rest",
            metavar="TRIALS",
            help="Let MetaSchedule tune all but our operators here, so often for each; 0: take what it has found.",
        ),
    ] = None,
    tune_rest_db: Annotated[
        Path | None,
        typer.Option(
            "--tune-rest-db", metavar="FOLDER", help="Of MetaSchedule's databases; by default beside --tuning-db."
        ),
    ] = None,
    atol: AtolOption = 1e-5,
    rtol: RtolOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compile a model into a deployable library."""
    from tdc_tvm.artifact import check_library_path

    check_library_path(output)
    compiled = _build(
        model,
        target,
        precision,
        decompose,
        input_shape,
        batch,
        require_full_fusion,
        verify,
        atol,
        rtol,
        seed,
        tuning_db,
        tune_rest,
        tune_rest_db,
    )
    compiled.export_library(output)
    if as_json:
        print_json(compiled.report.to_dict() | {"output": str(output)})
        return
    console.print(compiled.report)
    console.print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    console.print(
        f"use it:  tdc_tvm.load({str(output)!r}).run(x)   or   tdc run {output} --input x.npy",
        soft_wrap=True,
    )


@main.command()
def run(
    library: Library,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            help="NAME=FILE.npy, or FILE.npy for a model of one input; may be repeated; random without it.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the outputs here (.npz).")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Run a compiled model."""
    from tdc_tvm.compiled_model import load, random_inputs
    from tdc_tvm.files import check_output, write_atomic

    if output is not None:
        files = (text.partition("=")[2] or text for text in inputs or [])
        check_output(output, "the outputs' file", (".npz",), [library, *files])
    compiled = load(library)
    with _warnings_as_notes():
        if inputs:
            result = compiled.run(**_read_arrays(inputs, [info.name for info in compiled.inputs]))
        else:
            result = compiled.run(*random_inputs(compiled.inputs, seed))
    arrays = result if isinstance(result, tuple) else (result,)
    named = dict(zip((info.name for info in compiled.outputs), arrays, strict=True))
    if output is not None:
        with write_atomic(output) as temporary:
            _save_arrays(temporary, named)
    summary = [
        {
            "name": name,
            "shape": list(a.shape),
            "dtype": a.dtype.name,
            "min": float(a.min()),
            "mean": float(a.mean()),
            "max": float(a.max()),
        }
        for name, a in named.items()
    ]
    if as_json:
        print_json({"outputs": summary, "output": None if output is None else str(output)})
        return
    table = Table(Column("output", overflow="fold"), "shape", "dtype", "min", "mean", "max")
    for row in summary:
        table.add_row(
            row["name"],
            "x".join(map(str, row["shape"])),
            row["dtype"],
            *(f"{row[key]:.5g}" for key in ("min", "mean", "max")),
        )
    console.print(table)
    if output is not None:
        console.print(f"wrote {output}", soft_wrap=True)


@main.command()
def verify(
    library: Library,
    model: Model,
    atol: AtolOption = 1e-5,
    rtol: RtolOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare a compiled model with ONNX Runtime on seeded random input.

    The model must be the one that the library computes: after 'tdc build --decompose', the output of
    'tdc compress' with the same ranks.
    """
    from dataclasses import asdict

    from tdc_tvm.compiled_model import load
    from tdc_tvm.onnx_model import frozen, load_onnx
    from tdc_tvm.verify import verify as compare

    compiled = load(library)
    proto = load_onnx(model)
    ours, theirs = [info.name for info in compiled.inputs], [value.name for value in proto.graph.input]
    if ours != theirs:
        raise TdcError(
            f"{library} takes the inputs {', '.join(ours)}, {model} takes {', '.join(theirs)};"
            " expected the model that the library was built from"
        )
    try:
        for entry in compiled.entries:
            frozen(proto, {info.name: info.shape for info in entry.inputs})
    except TdcError as error:
        raise TdcError(f"{library} was not built from {model}: {error}") from None
    result = compare(compiled, proto, atol=atol, rtol=rtol, seed=seed)
    if as_json:
        print_json(asdict(result))
    else:
        console.print(f"verified: {result.detail}", style="green", soft_wrap=True)


@main.command()
def bench(
    models: Annotated[
        list[Path], typer.Argument(help="Libraries (.so) or ONNX models, measured side by side.", metavar="MODEL...")
    ],
    target: TargetOption = "auto",
    precision: PrecisionOption = Precision.fp32,
    decompose: RanksOption = None,
    input_shape: ShapesOption = None,
    batch: BatchOption = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, metavar="N", help="Calls measured per model.")] = 50,
    warmup: Annotated[int, typer.Option("--warmup", min=0, metavar="N", help="Calls before the measurement.")] = 5,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Measure ONNX Runtime beside each ONNX model.")
    ] = True,
    tvm_default: Annotated[
        bool, typer.Option("--tvm-default", help="Measure TVM's default pipeline (FP32) beside each ONNX model.")
    ] = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure latency: models and their rivals alternate, call by call, in one process.

    Every batch size that a library was built for is measured, or those that --batch says.
    """
    from tdc_tvm.bench import Contender, measure, onnxruntime_contender, tvm_contender
    from tdc_tvm.compiled_model import load

    if tvm_default and all(path.suffix == ".so" for path in models):
        raise TdcError("--tvm-default needs an ONNX model to build; give the one that the library was built from, too")
    contenders: list[Contender] = []
    for path in models:
        if path.suffix == ".so":
            name, compiled = path.name, load(path)
        else:
            name = f"{path.name}, tdc_tvm"
            compiled = _build(path, target, precision, decompose, input_shape, batch, False, True, 1e-5, None, seed)
        sizes = [entry.batch for entry in compiled.entries]
        several = len(sizes) > 1
        for size in batch if batch and sizes != [None] else sizes:
            at = f", batch {size}" if several else ""
            contenders.append(Contender.of(name + at, compiled, seed, size))
            if reference and path.suffix != ".so":
                contenders.append(onnxruntime_contender(f"{path.name}, ONNX Runtime{at}", path, compiled, seed, size))
            if tvm_default and path.suffix != ".so":
                with _progress("TVM's default pipeline"):
                    contenders.append(tvm_contender(f"{path.name}, TVM{at}", path, compiled, seed, size))
    with _bar("Measuring", warmup + repeat) as advance:
        results = measure(contenders, warmup=warmup, repeat=repeat, advance=advance)
    if as_json:
        print_json({"environment": environment(), "results": [result.to_dict() for result in results]})
        return
    table = Table(Column("model", overflow="fold"), "median ms", "p99 ms", "min ms", "ratio")
    for result in results:
        row = (result.median_ms, result.p99_ms, result.min_ms)
        table.add_row(result.name, *(f"{value:.3f}" for value in row), f"{result.median_ms / results[0].median_ms:.2f}")
    console.print(table)


@main.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A library (.so) or an ONNX model.", metavar="MODEL")],
    target: TargetOption = "auto",
    decompose: RanksOption = None,
    input_shape: ShapesOption = None,
    batch: BatchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a library holds, or what would become of an ONNX model's layers, without building it."""
    if path.suffix == ".so":
        from tdc_tvm.artifact import read_metadata
        from tdc_tvm.report import BuildReport

        data = read_metadata(path)
        if batch:
            sizes = ", ".join(str(entry.batch) for entry in data.entries)
            raise TdcError(f"--batch is for ONNX models; {path} was built for batches of {sizes}: leave it out")
        if as_json:
            from dataclasses import asdict

            print_json(asdict(data))
            return
        for entry in data.entries:
            at = f"batch {entry.batch} ({entry.function}): " if len(data.entries) > 1 else ""
            for title, tensors in (("input", entry.inputs), ("output", entry.outputs)):
                for info in tensors:
                    console.print(f"{at}{title} {info.name}: {info.dtype}{list(info.shape)}")
        console.print(
            f"for {data.kind} {data.arch} on {data.machine}, TVM {data.tvm_version}, source {data.source_sha256[:12]}"
        )
        report = BuildReport.from_dict(data.report)
        console.print(report, report.predictions())
        return
    from tdc_tvm.compiler import plan_build

    report = plan_build(path, target, decompose=decompose, input_shapes=_shapes(input_shape), batch=batch)
    if as_json:
        print_json(report.to_dict())
    else:
        console.print(report, report.predictions())


@main.command()
def env(
    probe: Annotated[bool, typer.Option("--probe", help="Measure this machine's GPU by microbenchmarks.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show versions, compilers and devices: what to put into a bug report."""
    data = environment()
    if probe:
        from tdc_tvm.probe import build as build_probe
        from tdc_tvm.probe import run as run_probe

        if data["gpu arch"] is None:
            raise TdcError("there is no NVIDIA GPU on this machine that TVM can use; --probe measures one")
        with _progress("Measuring the GPU") as step:
            step("compiling")
            module = build_probe(data["gpu arch"])
            step("running")
            data["probe"] = run_probe(module)["measured"]
    if as_json:
        print_json(data)
        return
    table = Table("", Column(overflow="fold"), show_header=False)
    data |= data.pop("probe", {})
    for key, value in data.items():
        table.add_row(key, "none" if value is None else str(value))
    console.print(table)


def environment() -> dict[str, Any]:
    """Versions, compilers and devices of this machine."""
    import tvm
    from tvm.support import cc

    from tdc_tvm.cuda_toolchain import find_cuda_compiler
    from tdc_tvm.schedules.device import cpu_threads
    from tdc_tvm.targets import local_gpu, local_gpu_arch

    gpu = local_gpu()

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def cuda_compiler() -> str:
        try:
            found = find_cuda_compiler()
        except TdcError as error:
            return str(error)
        return f"{found.name} ({found.path})"

    packages = (
        "tdc-tvm",
        "apache-tvm",
        "apache-tvm-ffi",
        "onnx",
        "onnxruntime",
        "numpy",
        "tensorly",
        "torch",
        "xgboost",
    )
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "cpu": tvm.target.codegen.llvm_get_system_cpu(),
        "cpu threads": cpu_threads(),
        "gpu": None if gpu is None else gpu.device_name,
        "gpu arch": local_gpu_arch(),
        "c++ compiler": cc.get_cc(),
        "cuda compiler": cuda_compiler(),
    }


def _build(
    model: Path,
    target: str,
    precision: Precision,
    decompose: str | None,
    input_shape: list[str] | None,
    batch: list[int] | None,
    require_full_fusion: bool,
    verify: bool,
    atol: float,
    rtol: float | None,
    seed: int,
    tuning_db: Path | None = None,
    tune_rest: int | None = None,
    tune_rest_db: Path | None = None,
) -> Any:
    from tdc_tvm.compiler import build as compile_model

    with _warnings_as_notes(), _progress(f"Building {model.name}") as step:
        return compile_model(
            model,
            target,
            precision.value,
            decompose=decompose,
            input_shapes=_shapes(input_shape),
            batch=batch,
            require_full_fusion=require_full_fusion,
            verify=verify,
            atol=atol,
            rtol=rtol,
            seed=seed,
            tuning_db=tuning_db,
            tune_rest=tune_rest,
            tune_rest_db=tune_rest_db,
            progress=step,
        )


def _shapes(texts: list[str] | None) -> dict[str, list[int]] | None:
    shapes = {}
    for text in texts or []:
        name, _, extents = text.rpartition(":")
        try:
            shapes[name] = [int(extent) for extent in extents.split("x")]
        except ValueError:
            name = ""
        if not name:
            raise TdcError(f"cannot read the shape {text!r}; expected NAME:1x3x224x224")
    return shapes or None


def _read_arrays(texts: list[str], names: list[str]) -> dict[str, np.ndarray]:
    arrays = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator:
            if len(names) != 1:
                raise TdcError(f"the model has the inputs {', '.join(names)}; write --input NAME=FILE.npy for each")
            name, path = names[0], text
        if name in arrays:
            raise TdcError(f"input {name!r} is given twice; write --input {name}=FILE.npy once")
        try:
            arrays[name] = np.load(path, allow_pickle=False)
        except OSError as error:
            raise TdcError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, EOFError) as error:
            raise TdcError(f"{path} is not a .npy file: {error}") from None
        if not isinstance(arrays[name], np.ndarray):
            raise TdcError(f"{path} holds several arrays; expected a .npy file with one")
    return arrays


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Warnings on standard error, without the line of code that Python shows with them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: messages.print(f"note: {message}", markup=False, soft_wrap=True)
        yield


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    """A spinner with the current step and the time taken, on standard error."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task(title)
        yield lambda step: progress.update(task, description=f"{title}: {step}")


@contextmanager
def _bar(title: str, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a .npz file; `numpy.savez` cannot take every name of an output, such as "file"."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def print_json(data: Any) -> None:
    """Print plain data as JSON."""
    sys.stdout.write(json.dumps(_plain(data), indent=2, allow_nan=False) + "\n")


def _plain(data: Any) -> Any:
    """``data`` with null for numbers that JSON does not have: NaN and the infinities."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def app() -> None:
    """Run the command; a user's mistake is one message and exit status 1."""
    try:
        main()
    except TdcError as error:
        messages.print(f"[red]error:[/red] {_escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
