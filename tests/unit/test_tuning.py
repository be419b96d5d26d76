"""Searches, measurers, `tdc tune` and the comparison of ways to choose."""

import functools
import json
import math
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tdc_tvm import cli
from tdc_tvm.errors import TdcError
from tdc_tvm.measure import Case, LocalMeasurer, ReplayMeasurer
from tdc_tvm.schedules.device import GPUS, DeviceSpec
from tdc_tvm.schedules.kernel import KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, TuckerConvShape, stages_of
from tdc_tvm.search import STRATEGIES, Measurement, Space, XgboostSearch, run_search
from tdc_tvm.targets import local_gpu_arch, resolve_target
from tdc_tvm.tuning import Machine, tune_shape
from tdc_tvm.tuning_db import TuningDatabase

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import compare_tuners

ROOT = Path(__file__).parents[2]
H100 = GPUS["H100"]
SAME = (1, 1, 1, 1)
STORED = ROOT / "scripts" / "results" / "oracle-h100-fp16.jsonl.xz"
SHAPE = TuckerConvShape(Conv2dShape(1, 14, 14, 40, 24, (3, 3), padding=SAME, precision="fp16"), 24, 16)


@functools.cache
def space():
    return Space.of(SHAPE, H100)


def pretended(one, failing=()):
    """Times that the model misjudges by the strategy, as a replay."""
    factors = {"tile": 1.3, "cluster": 1.1, "dense": 0.8, "two": 1.6, "three": 2.0}
    stored = {}
    for number, (config, us) in enumerate(zip(one.configs, one.predicted_us.tolist(), strict=True)):
        us *= factors[config.strategy]
        is_failing = number in failing
        stored[config] = Measurement(config, () if is_failing else (us,), "hung" if is_failing else "")
    return ReplayMeasurer({one.shape: stored})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_repeats_itself_and_no_configuration(strategy):
    one = space()
    measurer = pretended(one, failing=(int(one.order[0]), 3))
    runs = [list(run_search(STRATEGIES[strategy](one, 5), measurer, 40)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len({result.config for result in runs[0]}) == 40
    assert len(list(run_search(STRATEGIES[strategy](one, 5), measurer, 10**9))) == len(one.configs)


@pytest.mark.parametrize("strategy", ["random", "xgboost"])
def test_another_seed_is_another_search(strategy):
    orders = [
        [r.config for r in run_search(STRATEGIES[strategy](space(), seed), pretended(space()), 40)] for seed in (0, 1)
    ]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_goes_on_where_another_ended(strategy):
    one, measurer = space(), pretended(space())
    whole = list(run_search(STRATEGIES[strategy](one, 2), measurer, 32))
    resumed = STRATEGIES[strategy](one, 2)
    resumed.observe(whole[:16])
    assert list(run_search(resumed, measurer, 32)) == whole[16:]


def test_the_model_is_asked_first_and_then_corrected():
    one = space()
    strategies = [r.config.strategy for r in run_search(XgboostSearch(one), pretended(one), 24)]
    first = list(run_search(XgboostSearch(one), pretended(one), 8))
    assert [r.config for r in first[:6]] == [one.configs[number] for number in one.order[:6]]
    # What is faster than predicted is asked for from then on.
    assert strategies[8:].count("dense") >= 12
    best = min(pretended(one).stored[SHAPE].values(), key=lambda r: r.median_us)
    assert best.config in {r.config for r in run_search(XgboostSearch(one), pretended(one), 24)}


def test_other_layers_teach_a_search():
    one = space()
    other = Space.of(TuckerConvShape(SHAPE.dense, 16, 16), H100)
    times = {number: r.median_us for number, r in enumerate(pretended(other).stored[other.shape].values())}
    taught = XgboostSearch(one, 0, [(other, times)])
    assert [config.strategy for config in taught.propose(8)].count("dense") >= 6
    # CPUs' parameters are others, which teach nothing.
    cpu = DeviceSpec.from_target(resolve_target("llvm"))
    foreign = Space.of(TuckerConvShape(SHAPE.dense.with_precision("fp32"), 16, 16), cpu)
    alone = XgboostSearch(one, 0, [(foreign, dict.fromkeys(range(len(foreign.configs)), 1.0))])
    assert alone.propose(8) == XgboostSearch(one, 0).propose(8)


def test_all_candidates_may_fail():
    one = space()
    measurer = pretended(one, failing=range(len(one.configs)))
    results = list(run_search(XgboostSearch(one), measurer, 24))
    assert len(results) == 24
    assert all(math.isinf(result.median_us) for result in results)


def test_xgboost_needs_a_quarter_of_the_trials_of_random_search_on_real_measurements():
    trials = {"random": [], "xgboost": []}
    layers = [layer for layer, _ in zip(compare_tuners.read_stored([STORED], "present"), range(4), strict=False)]
    for one, about in layers:
        times = {number: about["measured"][config].median_us for number, config in enumerate(one.configs)}
        limit = 1.02 * min(times.values())
        for name, counts in trials.items():
            for seed in range(3):
                found = run_search(STRATEGIES[name](one, seed), ReplayMeasurer({one.shape: about["measured"]}), 200)
                counts.append(next(n for n, result in enumerate(found, 1) if result.median_us <= limit))
    assert np.mean(trials["xgboost"]) <= np.mean(trials["random"]) / 4


def test_a_replay_has_nothing_else_to_say():
    with pytest.raises(TdcError, match="was not measured; there is nothing to replay"):
        list(ReplayMeasurer({}).measure(SHAPE, [KernelConfig("tile")]))


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        Conv2dShape(2, 9, 7, 6, 10, (3, 2), (2, 1), (0, 1, 2, 1), groups=2),
        Conv2dShape(1, 7, 7, 16, 8, prologue=True),
        TuckerConvShape(Conv2dShape(1, 7, 8, 16, 8, (3, 3), padding=SAME, pool=True), 4, 6, reduce_bias=True),
    ],
    ids=str,
)
def test_the_expected_output_is_pytorchs(shape):
    case = Case.of(shape)
    value = torch.from_numpy(case.x.astype(np.float64)).permute(0, 3, 1, 2)
    if case.prologue is not None:
        scale, shift = (torch.from_numpy(one)[:, None, None] for one in (case.prologue.scale, case.prologue.shift))
        value = (value * scale + shift).relu()
    for stage, one in zip(stages_of(shape), case.weights, strict=True):
        top, left, bottom, right = stage.padding
        bias = None if one.bias is None else torch.from_numpy(one.bias).double()
        value = torch.nn.functional.conv2d(
            torch.nn.functional.pad(value, (left, right, top, bottom)), torch.from_numpy(one.kernel).double(), bias,
            stage.stride, 0, stage.dilation, stage.groups,
        )  # fmt: skip
    value = value.relu() if isinstance(shape, TuckerConvShape) else value
    if stages_of(shape)[-1].pool:
        value = torch.nn.functional.max_pool2d(value, 2)
    np.testing.assert_allclose(case.expected, value.permute(0, 2, 3, 1).numpy(), rtol=1e-6, atol=1e-6)
    case.check(case.expected.astype(np.float32))
    with pytest.raises(ArithmeticError, match="wrong result: relative error"):
        case.check(case.expected * 1.01)
    with pytest.raises(ArithmeticError, match="nan"):
        case.check(np.full_like(case.expected, np.nan))


@pytest.fixture(scope="module")
def cpu():
    return Machine.here("llvm")


SMALL = TuckerConvShape(Conv2dShape(1, 6, 6, 8, 8, (3, 3), padding=SAME), 4, 4)


def test_kernels_are_measured_here_and_bad_ones_are_errors(cpu):
    good = Space.of(SMALL, cpu.device).configs[:2]
    bad = KernelConfig("fused_tile", (("strip", 6),))
    with LocalMeasurer(cpu.target, cpu.device, seconds=0.01) as measurer:
        results = list(measurer.measure(SMALL, [good[0], bad, good[1]]))
        assert [result.config for result in results] == [good[0], bad, good[1]]
        assert results[1].error.startswith("was not built: TdcError")
        assert all(len(results[i].samples_us) >= 5 and results[i].seconds > 0 for i in (0, 2))
        # A batch that nobody reads to its end leaves nothing behind.
        next(measurer.measure(SMALL, list(good)))
        (again,) = measurer.measure(SMALL, [good[1]])
        assert again.config == good[1]
        assert again.samples_us


def test_a_process_that_hangs_or_dies_is_an_error_of_the_kernel(cpu):
    configs = Space.of(SMALL, cpu.device).configs[:2]
    with LocalMeasurer(cpu.target, cpu.device, timeout_s=0.01) as hanging:
        assert {result.error for result in hanging.measure(SMALL, configs)} == {"no result in 0.01 s"}
    with LocalMeasurer("nonsense", cpu.device) as dying:
        (result,) = dying.measure(SMALL, configs[:1])
        assert result.error == "the process ended with status 1"


def test_each_measurement_is_stored_before_the_next_and_counts_when_resumed(tmp_path, cpu):
    path = tmp_path / "t.jsonl"
    one = Space.of(SMALL, cpu.device)
    asked = []

    class Killed(ReplayMeasurer):
        def measure(self, shape, configs):
            for result in super().measure(shape, configs):
                assert len(TuningDatabase(path).records) == len(asked)
                asked.append(result.config)
                yield result
                if len(asked) == 3:
                    raise KeyboardInterrupt

    stored = {config: Measurement(config, (us,)) for config, us in zip(one.configs, one.predicted_us, strict=True)}
    with pytest.raises(KeyboardInterrupt):
        tune_shape(SMALL, cpu, Killed({SMALL: stored}), TuningDatabase(path), strategy="random")
    assert len(TuningDatabase(path).records) == 3
    measurer = ReplayMeasurer({SMALL: {config: stored[config] for config in one.configs if config not in asked}})
    done = tune_shape(SMALL, cpu, measurer, TuningDatabase(path), strategy="random", resume=True)
    assert (done.trials, done.failed) == (len(one.configs), 0)
    assert done.best.median_us == min(one.predicted_us)
    kept = TuningDatabase(path).records
    assert len(kept) == len(one.configs)
    assert kept[0].tuner == "random, seed 0"
    assert kept[0].versions["tvm"]


def test_a_measurer_of_many_is_given_as_many_at_a_time(tmp_path, cpu):
    one = Space.of(SMALL, cpu.device)
    sizes = []

    class Counting(ReplayMeasurer):
        def measure(self, shape, configs):
            sizes.append(len(configs))
            return super().measure(shape, configs)

    measurer = Counting({SMALL: {config: Measurement(config, (1.0,)) for config in one.configs}})
    tune_shape(SMALL, cpu, measurer, TuningDatabase(tmp_path / "t.jsonl"), strategy="random", trials=4, batch=3)
    assert sizes == [3, 1]


def tdc(*arguments, width=100):
    console = (cli.console.width, cli.messages.width)
    cli.console.width = cli.messages.width = width
    try:
        result = CliRunner().invoke(cli.main, [str(a) for a in arguments], catch_exceptions=False)
    finally:
        cli.console.width, cli.messages.width = console
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("width", [80, 120])
def test_a_model_is_tuned_and_built(tmp_path, model_path, width):
    path = tmp_path / "t.jsonl"
    options = ("--target", "llvm", "--seconds", 0.01, "--database", path)
    text = tdc("tune", model_path, *options, "--trials", 2, width=width)
    table, _, _ = text.partition("2 configurations")
    assert max(map(len, table.splitlines())) <= width
    assert "2 configurations measured, 0 failed" in text
    assert f"--tuning-db {path}" in text
    data = json.loads(tdc("tune", model_path, *options, "--trials", 3, "--resume", "--json"))
    assert data["layers"][0]["trials"] == 3
    assert len(TuningDatabase(path).records) == 3
    library = tmp_path / "t.so"
    report = json.loads(tdc("build", model_path, "-o", library, "--target", "llvm", "--tuning-db", path, "--json"))
    assert report["layers"][0]["measured_latency_us"] == data["layers"][0]["best_us"]
    merged = tmp_path / "all.jsonl"
    tdc("tune", "--database", merged, "--merge", path, "--merge", path)
    assert merged.read_text() == path.read_text()


@pytest.mark.skipif(local_gpu_arch() is not None, reason="this machine has a GPU")
def test_tuning_needs_a_gpu(model_path, tmp_path):
    with pytest.raises(TdcError, match="there is no NVIDIA GPU on this machine"):
        tdc("tune", model_path, "-d", tmp_path / "t.jsonl")
    assert not (tmp_path / "t.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either MODEL.onnx or --layer"),
        (("m.onnx", "--layer", "1x6x6x8 -> 8"), "either MODEL.onnx or --layer"),
        (("--layer", "6x6x8 -> 8"), "cannot read the layer '6x6x8 -> 8'"),
        (("--layer", "1x6x6x8 -> 8", "--ranks", "0.9"), "found --ranks 0.9; expected a pair"),
        (("--layer", "1x6x6x8 -> 8", "--batch", "2"), "are for models"),
        (("m.onnx", "--ranks", "4,4"), "--ranks is for --layer"),
        (("--layer", "1x6x6x8 -> 8", "--target", "sm_90"), "tuning measures on this machine; found the target 'sm_90'"),
        (("--layer", "1x6x6x8 -> 8", "--tracker", "rack:9190"), "--tracker HOST:PORT and --key NAME go together"),
        (("--layer", "1x6x6x8 -> 8", "--key", "gpu"), "--tracker HOST:PORT and --key NAME go together"),
        (
            ("--layer", "1x6x6x8 -> 8", "--tracker", "rack", "--key", "gpu"),
            "found the tracker 'rack'; expected HOST:PORT",
        ),
        (("--layer", "1x6x6x8 -> 8", "--tracker", "rack:0", "--key", "gpu"), "found the tracker 'rack:0'"),
        (("--merge", "absent.jsonl"), "there is no tuning database absent.jsonl"),
        (("absent.onnx",), "absent.onnx"),
    ],
)
def test_mistakes_are_explained(tmp_path, arguments, message):
    target = () if "--target" in arguments else ("--target", "llvm")
    with pytest.raises(TdcError, match=message):
        tdc("tune", *arguments, "-d", tmp_path / "t.jsonl", *target)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two of the stored layers with 40 candidates each, and what contenders made of them."""
    folder = tmp_path_factory.mktemp("tuners")
    results, output = folder / "oracle.jsonl", folder / "tuners.jsonl"
    kept = {"layer4": [], "layer14": []}
    lines = compare_tuners.gpu_layers.read_records(STORED)
    for record in lines[1:]:
        if len(kept.get(record["layer"], [0] * 40)) < 40:
            kept[record["layer"]].append(record)
    results.write_text("".join(json.dumps(one) + "\n" for one in (lines[0], *kept["layer4"], *kept["layer14"])))
    arguments = ["compare_tuners.py", "run", "--replay", str(results), "-o", str(output), "--seeds", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        assert compare_tuners.main() == 0
    return output


def test_a_comparison_has_every_trial(comparison):
    (environment,), layers = compare_tuners.read_comparison([comparison])
    assert environment["command"].startswith("compare_tuners.py run --replay oracle.jsonl")
    assert environment["measured_on"]["oracle.jsonl"]["gpu"]["name"] == "NVIDIA H100 80GB HBM3"
    records = [json.loads(line) for line in comparison.read_text().splitlines()]
    for record in records:
        if "contender" in record:
            best = np.minimum.accumulate([math.inf if us is None else us for us in record["us"]])
            assert record["best_us"] == best.tolist()
            assert len(set(record["trials"])) == len(record["us"])
    for layer in layers:
        assert {name: len(runs) for name, runs in layer.runs.items()} == {
            "model": 1, "xgboost": 2, "xgboost-taught": 2, "xgboost-alone": 2, "random": 2,
        }  # fmt: skip
        assert all(run.best_us[-1] == layer.oracle_us for runs in layer.runs.values() for run in runs)


@pytest.mark.parametrize("width", [80, 120])
def test_a_comparison_is_reported_from_the_file_alone(comparison, tmp_path, width):
    pytest.importorskip("matplotlib", reason="plots need the extra [plots]")
    out = StringIO()
    compare_tuners.report([comparison], Console(file=out, width=width), tmp_path / "plots")
    text = out.getvalue()
    table = text[: text.index("compare_tuners.py run")]
    assert max(map(len, table.splitlines())) <= width
    assert "Tucker layers, FP16: 2 layers; rank correlation of the model" in table
    assert "…" not in text
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "tuners.png", "tuners-tucker-layers-fp16.png", "tuners.html",
    }  # fmt: skip
    page = (tmp_path / "plots" / "tuners.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert "XGBoost without the model" in page


def test_ranks_of_equals_are_equal():
    assert compare_tuners._ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_what_is_no_comparison_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"name": "k0"}\n')
    with pytest.raises(SystemExit, match=r"expected what `compare_tuners.py run` writes"):
        compare_tuners.read_comparison([path])
    with pytest.raises(SystemExit, match="cannot read"):
        compare_tuners.read_comparison([tmp_path / "absent.jsonl"])
