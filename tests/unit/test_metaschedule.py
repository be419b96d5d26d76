"""MetaSchedule: what it tunes of a network, and as a contender in comparisons; few trials, small populations."""

from __future__ import annotations

import re
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from onnx_models import ModelBuilder
from rich.console import Console

import tdc_tvm
from tdc_tvm import TdcError, metaschedule
from tdc_tvm.targets import local_gpu_arch, resolve_target
from tdc_tvm.tuning import parse_shape

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import baseline_tuners
import compare_tuners


@pytest.fixture(scope="module")
def small_search():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metaschedule, "POPULATION", 4)
        yield


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A convolution, which is ours, and a transposed one and a softmax, which are not."""
    model = ModelBuilder()
    y = model.conv(model.input("x", (1, 3, 6, 6)), 3, 8, 3, pads=[1, 1, 1, 1])
    y = model.node("ConvTranspose", y, model.random((8, 4, 3, 3)))
    y = model.node("Softmax", y, axis=1, out="y")
    path = tmp_path_factory.mktemp("rest") / "network.onnx"
    path.write_bytes(model.build(y).SerializeToString())
    return path


def rest_note(report):
    (note,) = (note for note in report.notes if note.startswith("MetaSchedule"))
    return note


def test_what_is_not_ours_is_tuned_once_and_right(network, tmp_path, small_search):
    store = tmp_path / "tuning.jsonl"
    store.touch()
    first = tdc_tvm.build(network, "llvm", tuning_db=store, tune_rest=2)
    assert first.report.verification.status == "passed"
    open_count = int(rest_note(first.report).split(" of ")[1].split()[0])
    assert open_count >= 2
    assert rest_note(first.report).endswith(f"{open_count} of them tuned now")
    (folder,) = (tmp_path / "tuning.metaschedule").iterdir()
    records = (folder / "database_tuning_record.json").read_text()
    assert len(records.splitlines()) >= open_count
    again = tdc_tvm.build(network, "llvm", tuning_db=store, tune_rest=2)
    assert rest_note(again.report).endswith("0 of them tuned now")
    assert (folder / "database_tuning_record.json").read_text() == records
    x = np.random.default_rng(0).standard_normal((1, 3, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(again.run(x), first.run(x), rtol=1e-5, atol=1e-6)


LAYER = "1x6x6x4 -> 8, 3x3/2"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, small_search):
    """Of a Tucker layer on this machine's CPU."""
    output = tmp_path_factory.mktemp("tuners") / "tuners.jsonl"
    compare("--layer", LAYER, "--ranks", "4,4", "-o", output, "--contenders", "model:2", "metaschedule:6", "tvm")
    return output


def compare(*options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare_tuners.py", "run", "--target", "llvm", *map(str, options)])
        assert compare_tuners.main() == 0


def test_metaschedule_and_tvms_default_take_part_in_a_comparison(comparison):
    _, (layer,) = compare_tuners.read_comparison([comparison])
    (searched,), (default,) = layer.runs["metaschedule"], layer.runs["tvm"]
    assert searched.trials >= 6
    # As a whole, and by the sum of its stages while it was searched: the same schedules.
    assert 0 < searched.final_us < 1e6
    assert np.isfinite(searched.best_us[-1])
    assert np.all(np.diff(searched.seconds) >= 0)
    assert (default.trials, default.after(8)) == (0, default.final_us)
    assert 0 < default.final_us < 1e6
    assert layer.oracle_us == layer.runs["model"][0].best_us[-1]


@pytest.mark.parametrize("width", [80, 120])
def test_contenders_that_are_not_ours_are_reported(comparison, tmp_path, width):
    pytest.importorskip("matplotlib", reason="plots need the extra [plots]")
    out = StringIO()
    compare_tuners.report([comparison], Console(file=out, width=width), tmp_path)
    text = out.getvalue()
    assert "MetaSchedule" in text
    assert "TVM's default" in text
    assert "the model's pick with 0 trials beside others" in text
    assert "geometric mean" in text
    table = text[: text.index("compare_tuners.py run")]
    assert max(map(len, table.splitlines())) <= width
    _, (layer,) = compare_tuners.read_comparison([comparison])
    ratio = layer.runs["model"][0].after(1) / layer.runs["metaschedule"][0].final_us
    assert f"{ratio:.3f}" in text
    assert "MetaSchedule" in (tmp_path / "tuners.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", LAYER, "--contenders", "autotvm"), "found the contender 'autotvm'; expected one of model"),
        (("--layer", LAYER, "--contenders", "metaschedule:x"), "and its trials if others"),
        (("--layer", LAYER, "--contenders", "metaschedule"), "say how many trials it has"),
        (("--layer", LAYER, "--contenders", "cudnn"), "PyTorch finds none here"),
        (("--layer", LAYER, "--skip", "1"), "found --skip 1 of 1 layers"),
        (("--shapes", "core", "--ranks", "4,4"), "--shapes have TDC's ranks"),
        (("--layer", "1x6x6x4 -> 8, 3x3 padding 0x0x1x1", "--contenders", "tvm"), "symmetric padding"),
        (("--replay", "absent.jsonl", "--contenders", "tvm"), "a replay does not"),
    ],
)
def test_what_a_comparison_cannot_do_is_said_first(tmp_path, options, message):
    if "cudnn" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(TdcError, match=re.escape(message)):
        compare(*options, "-o", tmp_path / "tuners.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune_rest": -1}, "tune_rest is -1; expected the number of trials"),
        ({"tune_rest": 4}, "name a folder as tune_rest_db"),
        ({"tune_rest_db": "folder"}, "say tune_rest=0"),
        ({"tune_rest": 4, "tune_rest_db": "folder", "target": "sm_80"}, "which has no NVIDIA GPU"),
        (
            {"tune_rest": 4, "tune_rest_db": "folder", "target": tvm.target.Target({"kind": "llvm", "mcpu": "atom"})},
            "the target is atom",
        ),
    ],
)
def test_what_cannot_be_tuned_is_said_first(network, options, message):
    if "sm_80" in options.values() and local_gpu_arch() is not None:
        pytest.skip("there is a GPU here")
    with pytest.raises(TdcError, match=message):
        tdc_tvm.build(network, **{"target": "llvm", **options})


@pytest.mark.parametrize("extent", [7, 14])
def test_stages_in_fp16_are_tensorized_though_pixels_do_not_divide(extent):
    target = metaschedule.limited(resolve_target("sm_90a"))
    shape = parse_shape(f"1x{extent}x{extent}x32 -> 32, 3x3", "fp16", (16, 16))
    metaschedule._register_intrinsics()
    for name, function in baseline_tuners.stage_functions(shape, "NHWC").items():
        for seed in (1, 2):
            spaces = metaschedule.task_context(name, function, target, seed).generate_design_space()
            assert all("wmma_sync_16x16x16_f16f16f32" in str(one.trace) for one in spaces)


def test_databases_of_devices_lie_side_by_side():
    folder = metaschedule.database_folder(Path("a/tuning.jsonl"), "NVIDIA H100 80GB", "sm_90a")
    assert folder == Path("a/tuning.metaschedule/NVIDIA-H100-80GB-sm_90a")
    assert metaschedule.database_folder(Path("rest"), "H100", "sm_90a") == Path("rest/H100-sm_90a")
