"""Compare ways of choosing a configuration: the analytical model, its best few measured, and searches.

All see the same layers, candidates and measurements::

    python scripts/compare_tuners.py run --replay scripts/results/oracle-h100-fp16.jsonl.xz -o tuners.jsonl --seeds 10
    python scripts/compare_tuners.py run --layer '1x56x56x64 -> 64, 3x3' --ranks 32,32 -o tuners.jsonl  # on this GPU
    python scripts/compare_tuners.py run --shapes core --contenders model:8 metaschedule:200 tvm cudnn -o tuners.jsonl
    python scripts/compare_tuners.py report tuners.jsonl --plots build/tuners                           # no GPU needed

``--replay`` answers with what ``oracle.py`` measured, so a search can choose among those candidates alone, of which
half were the best by the model of that day: a random search finds fast ones sooner than among all that there are.  A
replayed run ends when it has found the fastest, after which nothing can change.

``metaschedule``, ``tvm`` and ``cudnn`` choose among other kernels than ours (see `baseline_tuners`), timed by the same
clock on this machine.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import baseline_tuners
import bench_layers
import build_layers
import gpu_check
import gpu_layers
import numpy as np
from gpu_layers import geometric_mean

from tdc_tvm.errors import TdcError
from tdc_tvm.files import check_output, write_atomic

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tdc_tvm.search import Measurement, Measurer, Space

# Within how much of the fastest a search has arrived, and trials after which its best is told.
NEAR = (0.02, 0.05)
AFTER = (1, 8, 32)


@dataclass(frozen=True)
class Trial:
    """A configuration that a contender measured: its number among the layer's, or `FOREIGN`, the time, and the wall
    time since the contender began, as far as that was measured.
    """

    number: int
    us: float
    seconds: float | None


# Of kernels that are not ours: a trial's, and that of the chosen one, which is timed as a whole and is no trial.
FOREIGN, FINAL = -1, -2


@dataclass(frozen=True)
class Contender:
    """A way of choosing.

    Parameters
    ----------
    label : str
        What it is called in reports.
    is_random : bool
        Whether it is run once for each seed.
    run : callable
        From (space, measurer, trials, seed, the other layers' spaces and times) to trials, as they come.  What has a
        compiler of its own, such as MetaSchedule, gives trials whose number is `FOREIGN` and then one that is `FINAL`.
    is_ours : bool
        Whether it chooses among our kernels, and so has a part in the oracle.
    """

    label: str
    is_random: bool
    run: Callable[[Space, Any, int, int, Callable[[], list]], Iterator[Trial]]
    is_ours: bool = True


def _search(make: Callable[..., Any], is_taught: bool = False) -> Callable[..., Iterator[Trial]]:
    """A search of the package as a contender."""
    from tdc_tvm.search import run_search

    def run(space: Space, measurer: Measurer, trials: int, seed: int, others: Callable[[], list]) -> Iterator[Trial]:
        begin, is_timed = time.monotonic(), True
        search = make(space, seed, others()) if is_taught else make(space, seed)
        for result in run_search(search, measurer, trials):
            is_timed = is_timed and result.seconds is not None
            seconds = round(time.monotonic() - begin, 3) if is_timed else None
            yield Trial(space.numbers[result.config], result.median_us, seconds)

    return run


def _metaschedule(layout: str) -> Callable[..., Iterator[Trial]]:
    def run(space: Space, measurer: Any, trials: int, seed: int, others: Callable[[], list]) -> Iterator[Trial]:
        found, final_us = baseline_tuners.metaschedule(space.shape, measurer, trials, seed, layout)
        for trial in found:
            yield Trial(FOREIGN, trial.us, trial.seconds)
        yield Trial(FINAL, final_us, None)

    return run


def _tvm(space: Space, measurer: Any, trials: int, seed: int, others: Callable[[], list]) -> Iterator[Trial]:
    yield Trial(FINAL, baseline_tuners.tvm_default(space.shape, measurer), None)


def _cudnn(space: Space, measurer: Any, trials: int, seed: int, others: Callable[[], list]) -> Iterator[Trial]:
    yield Trial(FINAL, baseline_tuners.cudnn(space.shape), None)


def contenders() -> dict[str, Contender]:
    """All there are."""
    from tdc_tvm.search import ExhaustiveSearch, ModelSearch, RandomSearch, XgboostSearch

    def without_model(space: Space, seed: int) -> XgboostSearch:
        return XgboostSearch(space, seed, with_model=False)

    return {
        "model": Contender("the model's order", False, _search(ModelSearch)),
        "xgboost": Contender("XGBoost", True, _search(XgboostSearch)),
        "xgboost-taught": Contender("XGBoost, taught by the other layers", True, _search(XgboostSearch, True)),
        "xgboost-alone": Contender("XGBoost without the model", True, _search(without_model)),
        "random": Contender("random", True, _search(RandomSearch)),
        "exhaustive": Contender("all candidates", False, _search(ExhaustiveSearch)),
        "metaschedule": Contender("MetaSchedule", False, _metaschedule("NHWC"), is_ours=False),
        "metaschedule-nchw": Contender("MetaSchedule, NCHW", False, _metaschedule("NCHW"), is_ours=False),
        "tvm": Contender("TVM's default", False, _tvm, is_ours=False),
        "cudnn": Contender("cuDNN", False, _cudnn, is_ours=False),
    }


# Those that a replay can run, all but the whole of the space.
USUAL = ("model", "xgboost", "xgboost-taught", "xgboost-alone", "random")


def read_stored(paths: Sequence[Path], predictions: str) -> Iterator[tuple[Space, dict[str, Any]]]:
    """Layers of what ``oracle.py`` measured: spaces, and what they were measured on, with what.

    ``predictions`` are the present model's (``present``), or those of the day they were measured (``stored``).
    """
    from tdc_tvm.schedules.device import GPUS
    from tdc_tvm.schedules.kernel import Estimate, KernelConfig
    from tdc_tvm.search import Measurement, Space

    for path in paths:
        layers: dict[str, list[dict[str, Any]]] = {}
        environment: dict[str, Any] = {}
        for record in gpu_layers.read_results([path]):
            if "environment" in record:
                environment = record["environment"]
            elif "cold" in record:
                raise SystemExit(f"{path} is of bench_layers.py; give what oracle.py measured")
            else:
                layers.setdefault(record["shape"]["text"], []).append(record)
        gpu = environment.get("gpu", {}).get("name", "")
        device = next((spec for name, spec in GPUS.items() if name in gpu), GPUS["H100"])
        for members in layers.values():
            shape = build_layers.shape_of(members[0]["shape"])
            configs = [KernelConfig(one["strategy"], tuple(one["config"].items())) for one in members]
            if predictions == "present":
                space = Space.of(shape, device, configs)
            else:
                space = Space(shape, tuple(configs), tuple(Estimate(one["predicted_parts_us"]) for one in members))
            measured = {}
            for config, one in zip(configs, members, strict=True):
                times = one.get("warm", {}).get("ours", {})
                samples = (times["median_us"],) if times else ()
                measured[config] = Measurement(config, samples, one.get("error", ""))
            about = {
                "source": path.name,
                "group": f"{'Tucker layers' if members[0]['shape']['kind'] == 'tucker' else 'core convolutions'}, "
                f"{members[0]['shape']['precision'].upper()}",
                "measured_on": environment,
            }
            yield space, about | {"measured": measured}


def run(arguments: argparse.Namespace) -> int:
    """Let all contenders choose, layer by layer; records go to the output as they come."""
    known = contenders()
    chosen = dict(_read_contender(text) for text in arguments.contenders)
    _check_contenders(chosen, arguments)
    if arguments.replay:
        layers = list(read_stored(arguments.replay, arguments.predictions))
        measurer_of = _replay(layers)
    else:
        layers, measurer_of = _local(arguments)
    if not all(known[name].is_ours for name in chosen):
        for space, _ in layers:
            baseline_tuners.check_shape(space.shape)
    environment = {
        "command": " ".join(Path(word).name for word in sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **_versions(),
        "predictions": arguments.predictions,
        "batch": _batch_size(),
        "measured_on": {about["source"]: about["measured_on"] for _, about in layers},
    }
    check_output(arguments.output, "a comparison", (".jsonl",), arguments.replay or ())
    begin, longest = time.monotonic(), 0.0
    with arguments.output.open("w") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
            file.flush()

        write({"environment": environment})
        for number, (space, about) in enumerate(layers, 1):
            begin_layer = time.monotonic()
            if arguments.budget is not None and begin_layer - begin + longest > arguments.budget:
                left = arguments.skip + number - 1
                print(f"out of time; go on into another file with --skip {left}", file=sys.stderr)
                break
            print(f"layer {number} of {len(layers)}: {space.shape}", file=sys.stderr, flush=True)
            write(
                {
                    "layer": str(space.shape),
                    "group": about["group"],
                    "source": about["source"],
                    "configs": [f"{config.strategy} {config}" for config in space.configs],
                    "predicted_us": [round(us, 3) for us in space.predicted_us.tolist()],
                    "measured_us": _times(space, about),
                }
            )
            for name, most in chosen.items():
                for seed in range(arguments.seeds if known[name].is_random else 1):
                    most = arguments.trials if most is None else most
                    trials = _trials(space, about, known[name], measurer_of(about), seed, layers, most)
                    write({"layer": str(space.shape), "contender": name, "seed": seed} | _columns(trials))
            longest = max(longest, time.monotonic() - begin_layer)
    return 0


def _read_contender(text: str) -> tuple[str, int | None]:
    """A contender's name and its trials, if the text says how many."""
    name, colon, trials = text.partition(":")
    if name not in contenders() or (colon and not (trials.isdigit() and int(trials))):
        raise TdcError(
            f"found the contender {text!r}; expected one of {', '.join(contenders())}, and its trials if others than"
            " --trials: metaschedule:200"
        )
    return name, int(trials) if colon else None


def _check_contenders(chosen: Mapping[str, int | None], arguments: argparse.Namespace) -> None:
    foreign = [name for name in chosen if not contenders()[name].is_ours]
    if arguments.replay and foreign:
        raise TdcError(
            f"{', '.join(foreign)} measure on this machine, and a replay does not: leave them out, or say --layer or"
            " --shapes instead of --replay"
        )
    if "cudnn" in chosen:
        baseline_tuners.check_cudnn()
    if arguments.shapes and arguments.ranks:
        raise TdcError("--ranks is for --layer; --shapes have TDC's ranks: leave it out")
    if any(name.startswith("metaschedule") and not (most or arguments.trials) for name, most in chosen.items()):
        raise TdcError("MetaSchedule never comes to an end by itself; say how many trials it has: metaschedule:200")


def _replay(layers: Sequence[tuple[Space, dict[str, Any]]]) -> Callable[[dict[str, Any]], Measurer]:
    from tdc_tvm.measure import ReplayMeasurer

    measurer = ReplayMeasurer({space.shape: about["measured"] for space, about in layers})
    return lambda about: measurer


def _local(arguments: argparse.Namespace) -> tuple[list, Callable[[dict[str, Any]], Measurer]]:
    """Layers to measure on this machine's GPU, or CPU."""
    from tdc_tvm.measure import LocalMeasurer
    from tdc_tvm.search import Space
    from tdc_tvm.tuning import Machine, parse_shape

    machine = Machine.here(arguments.target)
    ranks = None if arguments.ranks is None else tuple(map(int, arguments.ranks.split(",")))
    measurer = LocalMeasurer(machine.target, machine.device)
    if arguments.shapes:
        shapes = list(bench_layers.select(arguments.shapes, [1], arguments.precision))
    else:
        shapes = [parse_shape(text, arguments.precision, ranks) for text in arguments.layer]
    layers = []
    for shape in shapes[arguments.skip :]:
        group = f"{'Tucker layers' if hasattr(shape, 'stages') else 'convolutions'}, {arguments.precision.upper()}"
        about = {"source": machine.name, "group": group, "measured_on": machine.versions, "measured": None}
        layers.append((Space.of(shape, machine.device), about))
    if not layers:
        raise TdcError(f"found --skip {arguments.skip} of {len(shapes)} layers; expected fewer: none is left")
    first, _ = layers[0]
    # The measuring process begins before the first contender's clock does.
    list(measurer.measure(first.shape, first.configs[:1]))
    return layers, lambda about: measurer


def _trials(
    space: Space,
    about: Mapping[str, Any],
    contender: Contender,
    measurer: Measurer,
    seed: int,
    layers: Sequence[tuple[Space, dict[str, Any]]],
    most: int,
) -> list[Trial]:
    def others() -> list[tuple[Space, dict[int, float]]]:
        return [
            (other, {other.numbers[config]: one.median_us for config, one in told["measured"].items()})
            for other, told in layers
            if other.shape != space.shape and told["group"] == about["group"] and told["measured"]
        ]

    measured: Mapping[Any, Measurement] | None = about["measured"]
    best_us = min((one.median_us for one in measured.values()), default=0.0) if measured else 0.0
    found = []
    for trial in contender.run(space, measurer, most or len(space.configs), seed, others):
        found.append(trial)
        if trial.us <= best_us:
            break
    return found


def _times(space: Space, about: Mapping[str, Any]) -> list[float | None] | None:
    """Of all candidates, where they are known; null of those that failed."""
    if about["measured"] is None:
        return None
    times = [about["measured"][config].median_us for config in space.configs]
    return [us if np.isfinite(us) else None for us in times]


def _columns(trials: Sequence[Trial]) -> dict[str, Any]:
    """Every trial in order: the configuration's number, its time, the best so far, and seconds where they are known."""
    final = [trial.us for trial in trials if trial.number == FINAL]
    trials = [trial for trial in trials if trial.number != FINAL]
    best = np.minimum.accumulate([trial.us for trial in trials]).tolist()
    columns: dict[str, Any] = {
        "trials": [trial.number for trial in trials],
        "us": [trial.us if np.isfinite(trial.us) else None for trial in trials],
        "best_us": [us if np.isfinite(us) else None for us in best],
    }
    if all(trial.seconds is not None for trial in trials):
        columns["seconds"] = [trial.seconds for trial in trials]
    if final:
        columns["final_us"] = round(final[0], 3) if np.isfinite(final[0]) else None
    return columns


def _versions() -> dict[str, str]:
    from importlib import metadata

    import xgboost

    from tdc_tvm.schedules.digest import source_digest

    # XGBoost is installed under several names.
    packages = {name: metadata.version(name) for name in ("apache-tvm", "numpy")}
    return packages | {"xgboost": xgboost.__version__, "schedules_sha256": source_digest()}


def _batch_size() -> int:
    from tdc_tvm.search import BATCH

    return BATCH


@dataclass(frozen=True)
class Run:
    """What a contender did with a seed: the best so far after each trial, and the seconds until then, if known.

    What needs no trial has one best; what was built and timed again has its time then as ``final_us``.
    """

    seed: int
    best_us: np.ndarray
    seconds: np.ndarray | None
    trials: int
    final_us: float

    @staticmethod
    def of(record: Mapping[str, Any]) -> Run:
        """Read what ``run`` wrote."""
        times = [np.inf if us is None else us for us in record["best_us"]]
        final_us = record.get("final_us", times[-1] if times else None)
        final_us = np.inf if final_us is None else final_us
        seconds = np.array(record["seconds"]) if record.get("seconds") else None
        return Run(record["seed"], np.array(times or [final_us]), seconds, len(times), final_us)

    def after(self, trials: int) -> float:
        """The best of so many trials, or of all if there were fewer."""
        return float(self.best_us[min(trials, len(self.best_us)) - 1])

    def trials_to(self, limit_us: float) -> float:
        """How many it took to be as fast; infinite if it never was."""
        reached = np.flatnonzero(self.best_us <= limit_us)
        return float(reached[0] + 1) if len(reached) else np.inf


@dataclass(frozen=True)
class Layer:
    """A layer of a comparison: what its candidates are predicted to take, and do, and what contenders did."""

    name: str
    group: str
    predicted_us: np.ndarray
    measured_us: np.ndarray | None
    runs: dict[str, list[Run]]

    @property
    def oracle_us(self) -> float:
        """The fastest that was measured of all."""
        if self.measured_us is not None:
            return float(np.nanmin(self.measured_us))
        known = contenders()
        ours = [run for name, runs in self.runs.items() if known[name].is_ours for run in runs]
        return min(run.best_us[-1] for run in ours or (run for runs in self.runs.values() for run in runs))

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of predictions and times."""
        if self.measured_us is None:
            return np.nan
        timed = np.isfinite(self.measured_us)
        ranks = [_ranks(values[timed]) for values in (self.predicted_us, self.measured_us)]
        return float(np.corrcoef(*ranks)[0, 1])

    def ratio(self, contender: str, trials: int) -> float:
        """The best of so many trials over the fastest of all, the geometric mean of seeds."""
        return geometric_mean(run.after(trials) / self.oracle_us for run in self.runs[contender])

    def trials_to(self, contender: str, near: float) -> float:
        """Trials until within a share of the fastest, the mean of seeds."""
        return float(np.mean([run.trials_to((1 + near) * self.oracle_us) for run in self.runs[contender]]))


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0 on; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[places]


def read_comparison(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[Layer]]:
    """The environments and layers of files that ``run`` wrote.

    Raises
    ------
    SystemExit
        If a file is not of this script.
    """
    environments, layers = [], []
    for path in paths:
        for line in gpu_layers.read_lines(path):
            record = json.loads(line) if line.startswith("{") else {}
            if "environment" in record:
                environments.append(record["environment"])
            elif "configs" in record:
                measured = record["measured_us"]
                times = None if measured is None else np.array([np.nan if us is None else us for us in measured])
                layers.append(Layer(record["layer"], record["group"], np.array(record["predicted_us"]), times, {}))
            elif "contender" in record:
                layers[-1].runs.setdefault(record["contender"], []).append(Run.of(record))
            else:
                raise SystemExit(f"{path}: found {line[:40]!r}, expected what `compare_tuners.py run` writes")
    if not any(layer.runs for layer in layers):
        raise SystemExit("these files have no trials in them; run: compare_tuners.py run")
    return environments, [layer for layer in layers if layer.runs]


def by_group(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Layers of a kind and precision."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return groups


# A table: its title, columns, and rows of text; the first column is text.
Rows = tuple[str, list[str], list[list[str]]]


def summary(group: str, layers: Sequence[Layer]) -> Rows:
    """A line for each contender: means over layers."""
    labels = {name: contender.label for name, contender in contenders().items()}
    columns = [
        "",
        *(f"best of {count}\n/ oracle" if count > 1 else "first\n/ oracle" for count in AFTER),
        "worst\nof 8",
        "layers\nin 2%",
    ]
    columns += [f"trials to\nwithin {near:.0%}" for near in NEAR] + ["most\nto 2%", "of\nrandom's"]
    rows = []
    names = [name for name in labels if all(name in layer.runs for layer in layers)]
    to_random = _mean_trials(layers, "random", NEAR[0]) if "random" in names else np.nan
    for name in names:
        ratios = [[layer.ratio(name, count) for layer in layers] for count in AFTER]
        to = [_mean_trials(layers, name, near) for near in NEAR]
        rows.append(
            [
                labels[name],
                *(f"{geometric_mean(one):.3f}" for one in ratios),
                f"{max(ratios[AFTER.index(8)]):.3f}",
                str(sum(ratio <= 1 + NEAR[0] for ratio in ratios[AFTER.index(8)])),
                *(_count(value) for value in to),
                _count(max(layer.trials_to(name, NEAR[0]) for layer in layers)),
                "" if np.isnan(to_random) else f"{to[0] / to_random:.2f}",
            ]
        )
    correlation = np.mean([layer.rank_correlation for layer in layers])
    title = f"{group}: {len(layers)} layers"
    if np.isfinite(correlation):
        title += f"; rank correlation of the model {correlation:.2f}"
    return title, columns, rows


def _mean_trials(layers: Sequence[Layer], name: str, near: float) -> float:
    """The geometric mean over layers."""
    return geometric_mean(layer.trials_to(name, near) for layer in layers)


def _count(value: float) -> str:
    return f"{value:.1f}" if np.isfinite(value) else "never"


def details(group: str, layers: Sequence[Layer]) -> Rows:
    """A line for each layer."""
    names = [
        name
        for name, contender in contenders().items()
        if name != "exhaustive" and contender.is_ours and all(name in layer.runs for layer in layers)
    ]
    columns = ["layer", "oracle\nus", "pick\n/ oracle", "top 8\n/ oracle", "rank\ncorr."]
    columns += [f"{name.replace('-', '-' + chr(10))}" for name in names]
    rows = []
    for layer in layers:
        has_model = "model" in layer.runs
        rows.append(
            [
                _short(layer.name),
                f"{layer.oracle_us:.2f}",
                f"{layer.ratio('model', 1):.3f}" if has_model else "",
                f"{layer.ratio('model', 8):.3f}" if has_model else "",
                f"{layer.rank_correlation:.2f}" if np.isfinite(layer.rank_correlation) else "-",
                *(_count(layer.trials_to(name, NEAR[0])) for name in names),
            ]
        )
    return f"{group}: trials to within {NEAR[0]:.0%} of the oracle, means over seeds", columns, rows


def baselines(group: str, layers: Sequence[Layer]) -> Rows | None:
    """The model's pick, with no trial, beside kernels that are not ours, a line for each layer; None without any."""
    labels = {name: one.label for name, one in contenders().items() if not one.is_ours}
    names = [name for name in labels if all(name in layer.runs for layer in layers)]
    if not names or not all("model" in layer.runs for layer in layers):
        return None
    columns = ["layer", "pick\nus", "best of\nours", *(f"{_narrow(labels[name])}\nus" for name in names)]
    columns += ["trials", "seconds"] + [f"pick /\n{_narrow(labels[name])}" for name in names]
    rows, ratios = [], []
    for layer in layers:
        pick_us = layer.runs["model"][0].after(1)
        runs = [layer.runs[name][0] for name in names]
        ratios.append([pick_us / run.final_us for run in runs])
        # Of the first that has trials: MetaSchedule.
        search = next((run for run in runs if run.seconds is not None), None)
        rows.append(
            [
                _short(layer.name),
                f"{pick_us:.2f}",
                f"{layer.oracle_us:.2f}",
                *(f"{run.final_us:.2f}" if np.isfinite(run.final_us) else "failed" for run in runs),
                *(["-", "-"] if search is None else [str(search.trials), f"{search.seconds[-1]:.0f}"]),
                *(f"{ratio:.3f}" if ratio else "-" for ratio in ratios[-1]),
            ]
        )
    means = [geometric_mean(ratio for ratio in column if ratio) for column in zip(*ratios, strict=True)]
    blanks = [""] * (len(columns) - len(names) - 1)
    rows.append(["geometric mean", *blanks, *(f"{mean:.3f}" for mean in means)])
    return f"{group}: the model's pick with 0 trials beside others", columns, rows


def _narrow(label: str) -> str:
    """For the head of a column."""
    return label.replace("MetaSchedule", "Meta-\nSchedule").replace("TVM's ", "TVM's\n")


def _short(name: str) -> str:
    """Of a layer, without its precision, which its group has."""
    return re.sub(r" (tf32|fp16|bf16)|at ranks ", "", name)


def _table(rows: Rows, width: int) -> Table:
    title, columns, lines = rows
    wide = {"pick\n/ oracle", "xgboost-\nalone", "worst\nof 8", "best of\nours", "trials"}
    hidden = wide if width < 110 else set()
    shown = [
        number for number, column in enumerate(columns) if column not in hidden and any(line[number] for line in lines)
    ]
    names = [columns[number] for number in shown]
    table = bench_layers.make_table(title, names[:1], names[1:])
    for line in lines:
        table.add_row(*(line[number] for number in shown))
    return table


def report(paths: Sequence[Path], console: Console, plots: Path | None) -> None:
    """Print tables; draw curves and a page that has all, if there is a folder for them."""
    environments, layers = read_comparison(paths)
    tables = []
    for group, members in by_group(layers).items():
        tables += [summary(group, members), details(group, members)]
        beside = baselines(group, members)
        tables += [] if beside is None else [beside]
    for table in tables:
        console.print(_table(table, console.width))
        console.print()
    for environment in environments:
        console.print(f"{environment['command']}  ({environment['date']}; predictions: {environment['predictions']})")
    if plots is None:
        return
    plots.mkdir(parents=True, exist_ok=True)
    pictures = {"tuners": draw_groups(by_group(layers))}
    for group, members in by_group(layers).items():
        pictures["tuners-" + group.lower().replace(", ", "-").replace(" ", "-")] = draw_layers(group, members)
    images = {}
    for name, figure in pictures.items():
        with io.BytesIO() as buffer:
            figure.savefig(buffer, dpi=110, format="png")
            images[name] = buffer.getvalue()
        with write_atomic(plots / f"{name}.png") as temporary:
            temporary.write_bytes(images[name])
        console.print(str(plots / f"{name}.png"))
    with write_atomic(plots / "tuners.html") as temporary:
        temporary.write_text(_page(environments, tables, images), encoding="utf-8")
    console.print(str(plots / "tuners.html"))


_COLOURS = {
    "model": "#1f77b4",
    "xgboost": "#d62728",
    "xgboost-taught": "#9467bd",
    "xgboost-alone": "#ff7f0e",
    "random": "#7f7f7f",
    "exhaustive": "#bcbd22",
    "metaschedule": "#2ca02c",
    "metaschedule-nchw": "#98df8a",
    "tvm": "#8c564b",
    "cudnn": "#e377c2",
}
# Trials that curves are drawn over.
_DRAWN = 128
_TICKS = (0, 1, 2, 5, 10, 20, 50, 100)


def draw_groups(groups: Mapping[str, Sequence[Layer]]) -> Any:
    """Best so far against trials, and against wall time where it is known: geometric means over layers."""
    from matplotlib.figure import Figure

    is_timed = any(run.seconds is not None for run in _all_runs(groups))
    across = min(2, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(6.4 * across, 3.9 * down * (1 + is_timed)), layout="constrained")
    axes = figure.subplots(down * (1 + is_timed), across, squeeze=False)
    for number, (group, layers) in enumerate(groups.items()):
        row, column = divmod(number, across)
        _draw_curves(axes[row][column], layers, f"{group} ({len(layers)} layers, geometric mean)")
        if is_timed:
            _draw_wall_time(axes[down + row][column], layers, group)
    for number in range(len(groups), down * across):
        axes[number // across][number % across].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def _all_runs(groups: Mapping[str, Sequence[Layer]]) -> Iterator[Run]:
    return (run for layers in groups.values() for layer in layers for runs in layer.runs.values() for run in runs)


def _bands(layers: Sequence[Layer], name: str) -> np.ndarray:
    """Per cent above the oracle for each seed (rows) after each trial, the geometric mean over layers."""
    logarithms = []
    for layer in layers:
        rows = []
        for run in layer.runs[name]:
            best = np.full(_DRAWN, run.best_us[-1])
            count = min(_DRAWN, len(run.best_us))
            best[:count] = run.best_us[:count]
            rows.append(np.log(best / layer.oracle_us))
        logarithms.append(rows)
    return 100 * np.expm1(np.mean(logarithms, axis=0))


def _draw_curves(axes: Any, layers: Sequence[Layer], title: str) -> None:
    trials, lowest = np.arange(1, _DRAWN + 1), [0.0]
    for name, contender in contenders().items():
        if not all(name in layer.runs for layer in layers) or name == "exhaustive":
            continue
        curves = _bands(layers, name)
        lowest.append(float(np.min(curves, initial=0.0, where=np.isfinite(curves))))
        # What lies on the model's line is seen through its gaps.
        style, order = ((0, (4, 2)), 3) if name == "model" else ("solid", 2)
        axes.plot(
            trials,
            np.median(curves, axis=0),
            color=_COLOURS[name],
            label=contender.label,
            linewidth=1.6,
            linestyle=style,
            zorder=order,
        )
        if len(curves) > 1:
            low, high = np.percentile(curves, (10, 90), axis=0)
            axes.fill_between(trials, low, high, color=_COLOURS[name], alpha=0.18, linewidth=0)
    axes.axhline(100 * NEAR[0], color="black", linewidth=0.6, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], labels=["1", "2", "4", "8", "16", "32", "64", "128"])
    axes.set_yscale("symlog", linthresh=1, linscale=0.6)
    axes.set_ylim(min(-0.1, 1.1 * min(lowest)), 150)
    axes.set_yticks(_TICKS, labels=[f"{tick} %" for tick in _TICKS])
    axes.set_xlabel("trials (band: 10th to 90th percentile of seeds; dots: 2 %)", fontsize=8)
    axes.set_ylabel("best so far, above the oracle")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_wall_time(axes: Any, layers: Sequence[Layer], group: str) -> None:
    for name in contenders():
        runs = [(layer, run) for layer in layers for run in layer.runs.get(name, ()) if run.seconds is not None]
        if not runs:
            continue
        last = max(run.seconds[-1] for _, run in runs)
        times = np.linspace(min(run.seconds[0] for _, run in runs), last, 200)
        curves = []
        for layer, run in runs:
            place = np.searchsorted(run.seconds, times, side="right") - 1
            curves.append(np.log(run.best_us[np.maximum(place, 0)] / layer.oracle_us))
        axes.plot(times, 100 * np.expm1(np.mean(curves, axis=0)), color=_COLOURS[name], linewidth=1.5)
    axes.set_yscale("symlog", linthresh=1, linscale=0.6)
    axes.set_yticks(_TICKS, labels=[f"{tick} %" for tick in _TICKS])
    axes.set_xlabel("seconds, building and measuring", fontsize=8)
    axes.set_ylabel("best so far, above the oracle")
    axes.set_title(f"{group}: wall time", loc="left", fontsize=10, fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_layers(group: str, layers: Sequence[Layer]) -> Any:
    """Best so far against trials, layer by layer."""
    from matplotlib.figure import Figure

    across = min(3, len(layers))
    down = -(-len(layers) // across)
    figure = Figure(figsize=(4.6 * across, 2.9 * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for number in range(down * across):
        one = axes[number // across][number % across]
        if number >= len(layers):
            one.set_visible(False)
            continue
        _draw_curves(one, layers[number : number + 1], layers[number].name.replace(" at ranks", "\nat ranks"))
        one.set_xlabel("")
        one.set_ylabel("")
        one.title.set_fontsize(8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{group}: best so far against trials", fontsize=12, fontweight="bold")
    return figure


_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
img { max-width: 100%; height: auto; } h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 13px; } th { text-align: right; vertical-align: bottom; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; } td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } code { font-size: 12px; }"""


def _page(environments: Sequence[Mapping[str, Any]], tables: Sequence[Rows], images: Mapping[str, bytes]) -> str:
    """One file with all of it."""

    def cells(kind: str, values: Iterable[str]) -> str:
        return "".join(f"<{kind}>{html.escape(value).replace(chr(10), '<br>')}</{kind}>" for value in values)

    def shown(table: Rows) -> str:
        title, columns, rows = table
        body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
        return f"<h2>{html.escape(title)}</h2>\n<table><tr>{cells('th', columns)}</tr>\n{body}</table>\n"

    def picture(name: str) -> str:
        data = base64.b64encode(images[name]).decode()
        return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></p>\n'

    first, *others = images
    commands = "".join(
        f"<p><code>{html.escape(one['command'])}</code><br>{html.escape(one['date'])}, predictions of the"
        f" {html.escape(one['predictions'])} model, batches of {one['batch']}</p>\n"
        for one in environments
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Ways of choosing a configuration</title>\n'
        f"<style>{_STYLE}</style></head><body>\n<h1>Ways of choosing a configuration</h1>\n{commands}{picture(first)}"
        f"{''.join(map(shown, tables))}{''.join(map(picture, others))}</body></html>\n"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run_command = commands.add_parser("run", help="let all contenders choose")
    run_command.add_argument("-o", "--output", type=Path, required=True, help="JSON lines to write")
    source = run_command.add_mutually_exclusive_group(required=True)
    source.add_argument("--replay", type=Path, nargs="+", metavar="RESULTS", help="what oracle.py measured")
    source.add_argument("--layer", nargs="+", metavar="SHAPE", help="measure here: '1x56x56x64 -> 64, 3x3'")
    source.add_argument(
        "--shapes", nargs="+", choices=["core", *bench_layers.NETWORKS], help="measure here: TDC's layers, batch 1"
    )
    run_command.add_argument("--skip", type=bench_layers.at_least(0), default=0, help="so many layers, measured before")
    run_command.add_argument(
        "--budget",
        type=bench_layers.at_least(0.0),
        help="seconds; no layer is begun that would not fit, if it is as long as the longest",
    )
    run_command.add_argument("--ranks", metavar="OUT,IN", help="of --layer: Tucker layers")
    run_command.add_argument(
        "--precision", choices=list(gpu_layers.PRECISIONS), default="fp32", help="of --layer and --shapes"
    )
    run_command.add_argument(
        "--target", default="cuda", help="of --layer and --shapes: cuda, or llvm for this machine's CPU"
    )
    run_command.add_argument("--seeds", type=bench_layers.at_least(1), default=5)
    run_command.add_argument("--trials", type=bench_layers.at_least(0), default=0, help="of a run at most; 0: all")
    run_command.add_argument(
        "--predictions",
        choices=("present", "stored"),
        default="present",
        help="the present model's, whose constants were fitted to such results, or those made when they were measured",
    )
    run_command.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME[:TRIALS]",
        default=USUAL,
        help=f"of {', '.join(contenders())}; by default those that a replay can run, without all candidates",
    )
    report_command = commands.add_parser("report", help="print tables, draw curves; no GPU needed")
    report_command.add_argument("results", type=Path, nargs="+")
    report_command.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="for PNG files and a page; needs matplotlib"
    )
    arguments = parser.parse_args()
    if arguments.command == "run":
        return run(arguments)
    from rich.console import Console

    report(arguments.results, Console(), arguments.plots)
    return 0


if __name__ == "__main__":
    sys.exit(gpu_check.exit_status(main))
