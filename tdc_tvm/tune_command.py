"""``tdc tune``: measure configurations of a model's layers, or of one layer, into a database."""

from __future__ import annotations

from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tdc_tvm.errors import TdcError
from tdc_tvm.plan_command import Precision

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tdc_tvm.schedules.shape import ConvShape
    from tdc_tvm.search import Measurer
    from tdc_tvm.tuning import Machine, Tuned
    from tdc_tvm.tuning_db import TuningDatabase


class Strategy(str, Enum):
    """How to search."""

    xgboost = "xgboost"
    model = "model"
    random = "random"
    exhaustive = "exhaustive"


DatabaseOption = Annotated[
    Path, typer.Option("--database", "-d", metavar="FILE", help="The tuning database (.jsonl) to add to.")
]


def tune(
    database: DatabaseOption,
    model: Annotated[
        Path | None, typer.Argument(help="ONNX model, all of whose convolutions are tuned.", metavar="[MODEL.onnx]")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            metavar="SHAPE",
            help="A layer instead of a model, as reports have it: '1x56x56x64 -> 128, 3x3/2'; may be repeated.",
        ),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option("--ranks", metavar="OUT,IN", help="Of --layer: a Tucker layer at these ranks.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            "-t",
            metavar="NAME",
            help="cuda, this machine's GPU, or llvm, its CPU; with --tracker the servers', or sm_90a and the like.",
        ),
    ] = "cuda",
    tracker: Annotated[
        str | None,
        typer.Option(
            "--tracker", metavar="HOST:PORT", help="Measure on the servers of a TVM RPC tracker, all at once."
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="NAME", help="Of --tracker: which servers, all of one kind.")
    ] = None,
    precision: Annotated[
        Precision, typer.Option("--precision", metavar="NAME", help="Arithmetic: fp32; on GPUs tf32, fp16, bf16.")
    ] = Precision.fp32,
    decompose: Annotated[
        str | None,
        typer.Option("--decompose", metavar="RANKS", help="Decompose the model first, as 'tdc build' does."),
    ] = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option("--input-shape", metavar="SHAPE", help="Shape of a dynamic input, NAME:1x3x224x224."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, metavar="N", help="Size of a dynamic leading dimension; may be repeated."),
    ] = None,
    strategy: Annotated[
        Strategy, typer.Option("--strategy", metavar="NAME", help="xgboost, model, random or exhaustive.")
    ] = Strategy.xgboost,
    trials: Annotated[
        int, typer.Option("--trials", min=1, metavar="N", help="Configurations to measure of each layer, at most.")
    ] = 64,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, metavar="X", help="Of timing for a configuration, about.")
    ] = 0.05,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the search.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on: what the database has of a layer counts as measured.")
    ] = False,
    merge: Annotated[
        list[Path] | None,
        typer.Option("--merge", metavar="FILE", help="Add another database's records first; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of tables.")] = False,
) -> None:
    """Measure configurations of layers, on this machine or on others, for 'tdc build --tuning-db'.

    Every measurement is stored as it comes; after a kill, --resume goes on.
    """
    from tdc_tvm import cli
    from tdc_tvm.tuning_db import TuningDatabase

    if (model is None) == (not layer) and (layer or not merge):
        raise TdcError("name what to tune: either MODEL.onnx or --layer SHAPE")
    if model is None and (decompose or input_shape or batch):
        raise TdcError(
            "--decompose, --input-shape and --batch are for models; a --layer says its extents: leave them out"
        )
    if ranks is not None and model is not None:
        raise TdcError("--ranks is for --layer; a model is decomposed by --decompose")
    if (tracker is None) != (key is None):
        raise TdcError("--tracker HOST:PORT and --key NAME go together: where servers are found, and which of them")
    with cli._warnings_as_notes():
        store = TuningDatabase(database)
        if merge:
            added = store.merge([TuningDatabase(path, must_exist=True) for path in merge])
            cli.messages.print(f"{added} new records in {database}", markup=False, soft_wrap=True)
    if model is None and not layer:
        return
    with _measurer(target, seconds, tracker, key) as (machine, measurer, size):
        shapes = _shapes(machine, model, layer, ranks, precision.value, decompose, cli._shapes(input_shape), batch)
        results = _tune_all(shapes, machine, measurer, store, strategy.value, trials, seed, resume, size)
    if as_json:
        cli.print_json({"database": str(database), "device": machine.name, "layers": [_data(one) for one in results]})
        return
    cli.console.print(table(results, machine, cli.console.width))
    failed = sum(one.failed for one in results)
    cli.console.print(
        f"{sum(one.trials for one in results)} configurations measured, {failed} failed; they are in {database}",
        soft_wrap=True,
    )
    if model is not None:
        where = "" if tracker is None else f", on a machine with {machine.name}"
        cli.console.print(f"use them{where}:  tdc build {model} -o model.so --tuning-db {database}", soft_wrap=True)


@contextmanager
def _measurer(
    target: str, seconds: float, tracker: str | None, key: str | None
) -> Iterator[tuple[Machine, Measurer, int]]:
    """What is tuned on, what measures there, and how many configurations it is given at a time."""
    from tdc_tvm.measure import LocalMeasurer
    from tdc_tvm.search import BATCH
    from tdc_tvm.tuning import Machine

    if tracker is not None and key is not None:
        from tdc_tvm.measure_rpc import RpcMeasurer
        from tdc_tvm.rpc_servers import Tracker

        with RpcMeasurer(Tracker.parse(tracker, key), target, seconds) as remote:
            yield remote.machine, remote, max(BATCH, remote.server_count)
        return
    machine = Machine.here(target)
    with LocalMeasurer(machine.target, machine.device, seconds) as local:
        yield machine, local, BATCH


def _shapes(
    machine: Machine,
    model: Path | None,
    layers: Sequence[str] | None,
    ranks: str | None,
    precision: str,
    decompose: str | None,
    input_shapes: dict[str, list[int]] | None,
    batch: list[int] | None,
) -> list[ConvShape]:
    from tdc_tvm import cli
    from tdc_tvm.compiler import tunable_shapes
    from tdc_tvm.plan import Ranks, parse_ranks
    from tdc_tvm.tuning import parse_shape

    if model is None:
        pair = None if ranks is None else parse_ranks(ranks)
        if pair is not None and not isinstance(pair, Ranks):
            raise TdcError(f"found --ranks {ranks}; expected a pair such as 32,64 (rank_out, rank_in)")
        return list(dict.fromkeys(parse_shape(text, precision, pair) for text in layers or ()))
    with cli._progress(f"Reading {model.name}"):
        return tunable_shapes(
            model, machine.target, precision, decompose=decompose, input_shapes=input_shapes, batch=batch
        )


def _tune_all(
    shapes: Sequence[ConvShape],
    machine: Machine,
    measurer: Measurer,
    store: TuningDatabase,
    strategy: str,
    trials: int,
    seed: int,
    resume: bool,
    size: int,
) -> list[Tuned]:
    from tdc_tvm import cli
    from tdc_tvm.tuning import tune_shape
    from tdc_tvm.tuning_db import TuningRecord

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    results = []
    with Progress(*columns, console=cli.messages, transient=True, disable=not cli.messages.is_terminal) as progress:
        task = progress.add_task("Tuning", total=trials * len(shapes))
        for number, shape in enumerate(shapes):
            best: list[float] = []

            def observe(record: TuningRecord, shape: ConvShape = shape, best: list[float] = best) -> None:
                best[:] = [min([record.median_us, *best])]
                progress.update(task, advance=1, description=f"{shape}: {best[0]:.2f} us")

            progress.update(task, completed=number * trials, description=str(shape))
            results.append(
                tune_shape(
                    shape, machine, measurer, store,
                    strategy=strategy, trials=trials, seed=seed, resume=resume, batch=size, observe=observe,
                )
            )  # fmt: skip
    return results


def table(results: Sequence[Tuned], machine: Machine, width: int) -> Table:
    """A line for each layer."""
    shown = Table(title=f"Tuned on {machine.name} for {machine.device.arch}", title_justify="left")
    columns = ["layer", "trials", "failed", "pick\nus", "best\nus", "gain", "predicted\nus", "best configuration"]
    hidden = {"best configuration"} if width < 120 else set()
    for column in columns:
        if column not in hidden:
            is_text = column in ("layer", "best configuration")
            shown.add_column(column, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for one in results:
        best = one.best
        gain = "" if best is None or one.pick_us is None else f"{one.pick_us / best.median_us:.2f}"
        cells = [
            str(one.shape),
            f"{one.trials} of {one.candidates}",
            str(one.failed),
            "" if one.pick_us is None else f"{one.pick_us:.2f}",
            "" if best is None else f"{best.median_us:.2f}",
            gain,
            "" if best is None or best.predicted_us is None else f"{best.predicted_us:.2f}",
            "" if best is None else f"{best.config.strategy} {best.config}",
        ]
        shown.add_row(*(Text(cell) for cell, name in zip(cells, columns, strict=True) if name not in hidden))
    return shown


def _data(one: Tuned) -> dict[str, Any]:
    best = one.best
    return {
        "layer": str(one.shape),
        "candidates": one.candidates,
        "trials": one.trials,
        "failed": one.failed,
        "pick_us": one.pick_us,
        "best_us": None if best is None else best.median_us,
        "strategy": None if best is None else best.config.strategy,
        "config": None if best is None else dict(best.config.parameters),
    }
