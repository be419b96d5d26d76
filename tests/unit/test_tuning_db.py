"""The tuning database: what survives a kill, several processes, a merge; and what of it decides a build."""

import json
import multiprocessing
from dataclasses import replace

import pytest

import tdc_tvm
from tdc_tvm.compiler import tunable_shapes
from tdc_tvm.errors import TdcError
from tdc_tvm.report import BuildReport
from tdc_tvm.schedules.cuda import conv
from tdc_tvm.schedules.device import GPUS
from tdc_tvm.schedules.kernel import KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, TuckerConvShape
from tdc_tvm.targets import gpu_name
from tdc_tvm.tuning import parse_shape
from tdc_tvm.tuning_db import TuningDatabase, TuningKey, TuningRecord, shape_from_dict, shape_to_dict

H100 = GPUS["H100"]
SAME = (1, 1, 1, 1)
DENSE = Conv2dShape(1, 6, 6, 8, 8, (3, 3), padding=SAME)
KEY = TuningKey.of(TuckerConvShape(DENSE, 4, 4), H100)


def record(us=2.0, warps=4, key=KEY, date="2026-01-01T00:00:00+00:00", **fields):
    outcome = {"error": "hung"} if us is None else {"samples_us": (us, us + 0.5, us + 1)}
    return TuningRecord(key, KernelConfig("tile", (("tile_h", 4), ("warps", warps))), date=date, **outcome, **fields)


def filled(path, *records):
    database = TuningDatabase(path)
    database.append(*records)
    return database


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "t.jsonl"
    kept = record(predicted_us=1.9, tuner="xgboost, seed 3", versions={"tvm": "0.27", "cuda": "nvrtc 13.0"})
    failed = record(None, warps=8)
    filled(path, kept, failed)
    assert TuningDatabase(path).records == [kept, failed]
    line = json.loads(path.read_text().splitlines()[0])
    assert line["median_us"] == 2.5
    assert line["shape"]["dense"]["padding"] == [1, 1, 1, 1]
    assert {"device", "arch", "kernels", "versions", "tuner", "date", "strategy", "config"} <= line.keys()


SHAPES = [
    DENSE,
    Conv2dShape(8, 15, 9, 40, 72, (3, 5), (2, 1), (1, 0, 2, 3), (2, 1), precision="fp16"),
    Conv2dShape(1, 9, 8, 6, 6, (3, 3), padding=SAME, groups=6),
    Conv2dShape(1, 14, 14, 256, 128, prologue=True, precision="bf16"),
    Conv2dShape(1, 15, 14, 64, 128, (3, 3), padding=(2, 2, 2, 2), dilation=(2, 2), pool=True, precision="tf32"),
    TuckerConvShape(replace(DENSE, stride=(2, 2), pool=True), 4, 6, reduce_bias=True),
    TuckerConvShape(replace(DENSE, padding=(0, 0, 0, 0), precision="fp16"), 32, 16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_flag_of_a_shape_is_kept(shape):
    assert shape_from_dict(json.loads(json.dumps(shape_to_dict(shape)))) == shape
    assert parse_shape(str(shape)) == shape


def test_ranks_beside_a_layers_text_are_out_then_in():
    assert parse_shape("1x6x6x8->8, 3x3", "fp16", (6, 4)) == TuckerConvShape(DENSE.with_precision("fp16"), 4, 6)


def test_a_kill_at_any_moment_loses_the_record_in_flight_alone(tmp_path):
    path = tmp_path / "t.jsonl"
    whole = [record(us, warps=warps) for us, warps in ((3.0, 4), (2.0, 8), (1.0, 16))]
    filled(path, *whole)
    content = path.read_bytes()
    last = content.rindex(b"\n", 0, -1) + 1
    for end in range(last + 1, len(content), 97):
        path.write_bytes(content[:end])
        with pytest.warns(UserWarning, match="line 3 was left unfinished and is passed over"):
            database = TuningDatabase(path)
        assert database.records == whole[:2]
        more = record(4.0, warps=1)
        database.append(more)
        with pytest.warns(UserWarning, match="line 3"):
            assert TuningDatabase(path).records == [*whole[:2], more]


@pytest.mark.filterwarnings("error")
def test_a_last_line_without_its_end_is_whole(tmp_path):
    path = tmp_path / "t.jsonl"
    filled(path, record(), record(warps=8))
    path.write_bytes(path.read_bytes()[:-1])
    filled(path, record(warps=16))
    assert [one.config["warps"] for one in TuningDatabase(path).records] == [4, 8, 16]


def _append(path, process, count):
    database = TuningDatabase(path)
    for number in range(count):
        database.append(record(1.0 + number, warps=process, tuner="x" * 20_000))


@pytest.mark.filterwarnings("error::UserWarning")
def test_processes_append_side_by_side(tmp_path):
    path, count = tmp_path / "t.jsonl", 40
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path, number, count)) for number in (1, 2, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    records = TuningDatabase(path).records
    for number in (1, 2, 3):
        assert [one.samples_us[0] for one in records if one.config["warps"] == number] == [
            1.0 + i for i in range(count)
        ]


def test_a_merge_keeps_each_record_once_and_the_latest_counts_in_any_order(tmp_path):
    old, new = record(1.0, date="2026-01-01"), record(3.0, date="2026-02-01")
    other = record(2.0, warps=8)
    bests = []
    for number, order in enumerate(((old, new), (new, old))):
        first = filled(tmp_path / f"a{number}.jsonl", order[0], other)
        second = filled(tmp_path / f"b{number}.jsonl", order[1], other)
        assert first.merge([second, second]) == 1
        assert first.merge([second]) == 0
        again = TuningDatabase(first.path)
        assert len(again.records) == 3
        assert again.measured(KEY)[old.config] == new
        bests.append((first.best(KEY), again.best(KEY)))
    assert bests == [(other, other)] * 2


def test_times_of_different_clocks_are_not_compared(tmp_path):
    remote = {"clock": "time_evaluator over RPC"}
    database = filled(tmp_path / "t.jsonl", record(5.0, 4, versions=remote), record(4.0, 8, versions=remote))
    assert database.best(KEY).config["warps"] == 8
    database.append(record(4.5, 16))
    assert database.best(KEY).config["warps"] == 16


def test_failed_candidates_are_known_and_never_the_best(tmp_path):
    database = filled(tmp_path / "t.jsonl", record(2.0, date="2026-01-01"), record(None, date="2026-02-01"))
    assert database.best(KEY) is None
    database.append(record(9.0, warps=8))
    assert database.best(KEY).config["warps"] == 8
    assert len(database.measured(KEY)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("conv1 2.5 us\n", "line 1: found b'conv1 2.5 us'; expected a record that 'tdc tune' wrote"),
        ('{"name": "k0"}\n', "line 1: expected a record that 'tdc tune' wrote"),
        ("[1]\n", "line 1: expected a record"),
        ('{"format": 2}\n', "found format 2, this version of tdc_tvm reads 1"),
        ('{"format": 1}\n', "line 1: expected a record that 'tdc tune' wrote; KeyError"),
        (record().line.replace('"warps":4', '"warps":"4"') + "\n", "expected ints"),
        (record().line.replace("2.5,", "-2.5,") + "\n", "expected positive numbers"),
        (record().line.replace('"samples_us"', '"samples"') + "\n", "either samples_us or an error; found neither"),
        (record().line.replace('"batch":1', '"batch":0') + "\n", "extents must be positive"),
        (record().line.replace('"kind":"tucker"', '"kind":"pool"') + "\n", "found a shape of kind 'pool'"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(TdcError, match=message):
        TuningDatabase(path)


def test_impossible_places_are_refused(tmp_path):
    with pytest.raises(TdcError, match=r"ends in \.jsonl; found"):
        TuningDatabase(tmp_path / "t.json")
    with pytest.raises(TdcError, match=r"there is no tuning database .*tdc tune"):
        TuningDatabase(tmp_path / "t.jsonl", must_exist=True)
    with pytest.raises(TdcError, match=r"does not exist; create it first"):
        filled(tmp_path / "absent" / "t.jsonl", record())
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(TdcError, match="cannot read the tuning database"):
        TuningDatabase(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("name", "cores", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 132, "H100"),
        ("NVIDIA H100 PCIe", 114, "NVIDIA H100 PCIe"),
        ("NVIDIA GeForce RTX 3090", 82, "RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", 84, "NVIDIA GeForce RTX 3090 Ti"),
        ("NVIDIA L40S", 142, "NVIDIA L40S"),
    ],
)
def test_a_gpu_of_other_size_is_another_gpu(name, cores, known):
    assert gpu_name(name, cores) == known


@pytest.fixture
def slow_choice(model_path):
    """The one shape of the tiny model on sm_90, and a configuration that the model would not choose."""
    (shape,) = tunable_shapes(model_path, "sm_90", "fp16")
    by_model = sorted(conv.candidates(shape, H100), key=lambda one: conv.estimate(shape, one, H100).latency_us)
    return shape, by_model[-1]


def test_measurements_decide_a_layer_of_a_build(tmp_path, model_path, slow_choice):
    shape, config = slow_choice
    assert config != conv.choose(shape, H100)[0]
    key = TuningKey.of(shape, H100)
    path = tmp_path / "t.jsonl"
    filled(path, TuningRecord(key, config, (1.1, 1.2, 1.3)), replace(record(0.1), key=replace(key, device="H200")))
    built = tdc_tvm.build(model_path, "sm_90", "fp16", tuning_db=path)
    (layer,) = built.report.layers
    assert (layer.strategy, layer.config, layer.measured_latency_us) == (config.strategy, str(config), 1.2)
    assert layer.predicted_latency_us == pytest.approx(conv.estimate(shape, config, H100).latency_us)
    assert any("1 record of these layers is of H200, not H100, and left out" in note for note in built.report.notes)
    text = str(built.report)
    assert "tuned: 1 of 1 layers decided by measurements in the tuning database" in text
    assert "tuned, measured 1.20" in str(built.report.predictions())
    assert BuildReport.from_dict(json.loads(json.dumps(built.report.to_dict()))) == built.report
    usual = tdc_tvm.build(model_path, "sm_90", "fp16").report
    assert usual.layers[0].measured_latency_us is None
    assert "tuned" not in str(usual)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"device": "H200"}, "of H200, not H100"),
        ({"arch": "sm_90a"}, "for sm_90a, not sm_90"),
        ({"kernels": "0123456789abcdef"}, "of kernel version 0123456789abcdef, not "),
    ],
)
def test_what_is_of_another_machine_or_kernel_is_left_out_and_named(tmp_path, model_path, slow_choice, change, note):
    shape, config = slow_choice
    key = replace(TuningKey.of(shape, H100), **change)
    database = filled(tmp_path / "t.jsonl", TuningRecord(key, config, (1.0,)))
    report = tdc_tvm.build(model_path, "sm_90", "fp16", tuning_db=database).report
    assert report.layers[0].measured_latency_us is None
    assert report.layers[0].config == str(conv.choose(shape, H100)[0])
    assert any(note in one and "left out" in one for one in report.notes)


def test_another_precision_is_another_key(tmp_path, model_path, slow_choice):
    shape, config = slow_choice
    database = filled(tmp_path / "t.jsonl", TuningRecord(TuningKey.of(shape, H100), config, (1.0,)))
    assert tdc_tvm.build(model_path, "sm_90", "bf16", tuning_db=database).report.tuned == ()


def test_a_build_refuses_what_is_no_database(tmp_path, model_path, slow_choice):
    with pytest.raises(TdcError, match="found the tuning database 3; expected a path"):
        tdc_tvm.build(model_path, "sm_90", tuning_db=3)
    with pytest.raises(TdcError, match="there is no tuning database"):
        tdc_tvm.build(model_path, "sm_90", tuning_db=tmp_path / "absent.jsonl")
    shape, config = slow_choice
    broken = replace(config, parameters=tuple((name, 7) for name, _ in config.parameters))
    database = filled(tmp_path / "t.jsonl", TuningRecord(TuningKey.of(shape, H100), broken, (1.0,)))
    with pytest.raises(TdcError, match="the record was changed: take it out"):
        tdc_tvm.build(model_path, "sm_90", "fp16", tuning_db=database)
