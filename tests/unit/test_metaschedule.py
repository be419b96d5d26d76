"""MetaSchedule: what it tunes of a network, and as a contender in comparisons; few trials, small populations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_models import ModelBuilder
from typer.testing import CliRunner

import tdc_tvm
from tdc_tvm import TdcError, cli, metaschedule
from tdc_tvm.measure import LocalMeasurer
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.targets import resolve_target
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


def test_metaschedule_and_tvms_default_are_right_and_timed_whole(small_search):
    shape = parse_shape("1x6x6x4 -> 8, 3x3/2", ranks=(4, 4))
    with LocalMeasurer("llvm", DeviceSpec.from_target(resolve_target("llvm"))) as measurer:
        assert 0 < baseline_tuners.tvm_default(shape, measurer) < 1e6
        trials, final_us = baseline_tuners.metaschedule(shape, measurer, 6, seed=0)
    assert len(trials) == 6
    assert {trial.function for trial in trials} == {"stage0", "stage1", "stage2"}
    assert 0 < final_us < 1e6
