"""Reports and verification."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper
from rich.console import Console

import tdc_tvm
from tdc_tvm.compiled_model import random_inputs
from tdc_tvm.compiler import plan_build
from tdc_tvm.errors import TdcError
from tdc_tvm.relay_passes.layers import LayerReport
from tdc_tvm.report import BuildReport, Verification, _count
from tdc_tvm.verify import reference_outputs, verify

FUSED = LayerReport(
    "layer1.[main].conv", "tucker_conv", "1x6x6x8 -> 8, 3x3", (4, 5), True, "", "fused", "strip=3", 1.25
)
UNFUSED = LayerReport(
    "layer2", "tucker_conv", "1x6x6x8 -> 8, 3x3", (4, 4), False, "the first 1x1 [stem] has stride 2x2"
)
DENSE = LayerReport("stem", "conv2d", "1x6x6x3 -> 8, 3x3", None, False, "no such chain", "direct", "lanes=8", 2.0)
REPORT = BuildReport(
    "sm_90",
    "H100",
    "fp32",
    (FUSED, UNFUSED, DENSE),
    1_234_567,
    98_765,
    3.2,
    Verification("passed", "y fits", 1e-7),
    ("n",),
)


def shown(report, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(report)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120, 170])
def test_the_table_says_everything_that_matters(width):
    text = shown(REPORT, width)
    assert max(len(line) for line in text.splitlines()) <= width
    flat = "".join(text.replace("│", " ").split())
    for part in ("3 layers on H100, fp32", "1 of 2 Tucker layers fused", "1.23 M multiply-adds", "98.8 k parameters"):
        assert part.replace(" ", "") in flat
    assert "not fused: layer2: the first 1x1 [stem] has stride 2x2" in " ".join(text.split())
    assert "no such chain" not in text
    assert "verificationagainstONNXRuntimepassed:yfits" in flat
    assert "note: n" in text


def test_wide_terminals_show_the_schedule_and_names_are_no_markup():
    text = shown(REPORT, 170)
    for part in ("layer1.[main].conv", "strip=3", "direct", "1.2", "4, 5"):
        assert part in text
    assert str(REPORT) == shown(REPORT, 170)


@pytest.mark.parametrize("measured", [None, 1.31])
@pytest.mark.parametrize("width", [80, 120, 170])
def test_a_layer_is_one_line_of_the_table(width, measured):
    config = "tile_h=16 tile_w=16 split=16 deep=0 warps=16 crews=1 group=1"
    layer = replace(FUSED, name="layer1.conv1", shape="1x14x14x128 -> 256, 3x3/2", config=config)
    layer = replace(layer, measured_latency_us=measured)
    report = replace(REPORT, layers=(layer, layer))
    rows = [line for line in shown(report, width).splitlines() if line.startswith("│")]
    assert len(rows) == 2
    assert all((config in row) == (width == 170) for row in rows)


def test_predictions_name_the_schedule_and_have_no_negative_zero():
    layer = replace(FUSED, predicted_parts_us={"core": 1.254, "contention": -0.004, "memory": -0.2})
    text = str(replace(REPORT, layers=(layer,)).predictions())
    assert "layer1.[main].conv (fused strip=3): core 1.25 + contention 0.00 + memory -0.20 = 1.25" in text


def test_plain_data_survives_json():
    data = REPORT.to_dict()
    assert BuildReport.from_dict(json.loads(json.dumps(data))) == REPORT
    assert [layer["name"] for layer in data["layers"]] == ["layer1.[main].conv", "layer2", "stem"]
    assert (REPORT.fused, REPORT.unfused) == ((FUSED,), (UNFUSED,))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (12_345, "12.3 k"), (999_900, "1 M"), (1_814_000_000, "1.81 G")],
)
def test_counts(number, text):
    assert _count(number) == text


def test_a_build_reports_its_layer(compiled):
    report = compiled.report
    (layer,) = report.layers
    assert (layer.name, layer.kind, layer.ranks, layer.fused) == ("core", "tucker_conv", (4, 4), True)
    assert report.macs == 36 * (8 * 4 + 4 * 4 * 9 + 4 * 8)
    assert report.parameters == 8 * 4 + 4 * 4 * 9 + 4 * 8
    assert report.build_seconds > 0
    assert report.verification.status == "passed"
    assert report.verification.max_error < 1e-5
    assert "1 fused Tucker layers" in repr(compiled)


def test_a_plan_decides_the_same_without_building(model_path, compiled):
    plan = plan_build(model_path, "llvm")
    assert plan.layers == compiled.report.layers
    assert "planned for" in str(plan)
    assert "verification" not in str(plan)
    assert plan_build(model_path, "sm_90").device == "H100"


@pytest.mark.parametrize("seed", [0, 7])
def test_a_right_model_passes(compiled, tucker_model, seed):
    result = verify(compiled, tucker_model(), atol=1e-5, rtol=1e-5, seed=seed)
    assert result.status == "passed"
    assert f"seed {seed}" in result.detail


def test_a_wrong_model_fails_with_the_numbers(compiled, tucker_model):
    with pytest.raises(
        TdcError,
        match=r"output 'y' differs from ONNX Runtime by .* allowed are atol .*Is this the model that was",
    ):
        verify(compiled, tucker_model(1.01), atol=1e-5, rtol=1e-4)


def test_a_build_that_is_not_exact_enough_fails(model_path):
    with pytest.raises(TdcError, match=r"verification failed: output 'y' differs"):
        tdc_tvm.build(model_path, "llvm", atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atol": -1}, "atol is -1; expected a number from 0 on"),
        ({"atol": "a"}, "atol is 'a'; expected a number"),
        ({"rtol": float("nan")}, "rtol is nan; expected a number"),
        ({"atol": None}, "atol is None; expected a number"),
        ({"precision": "int8"}, "'int8' is not supported; use one of fp32, tf32, fp16, bf16"),
        ({"seed": -1}, "the seed is -1; expected a whole number from 0 on"),
        ({"seed": 0.5}, "the seed is 0.5; expected a whole number"),
        ({"seed": -1, "verify": False}, "the seed is -1"),
    ],
)
def test_impossible_options_are_refused_ahead_of_the_work(options, message):
    with pytest.raises(TdcError, match=message):
        tdc_tvm.build("absent.onnx", "llvm", **options)


def test_zero_tolerances_need_equal_numbers(two_inputs):
    from conftest import make_two_input_model

    assert verify(two_inputs, make_two_input_model(), atol=0, rtol=0).max_error == 0


class Fake:
    """A compiled model that gives what it is told."""

    def __init__(self, compiled, result):
        self.entries, self.filled_up, self.run = compiled.entries, compiled.filled_up, lambda *values: result


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda y: y + 1, "differs from ONNX Runtime by 1 "),
        (lambda y: np.where(np.arange(6) == 3, np.nan, y), "differs from ONNX Runtime by nan"),
        (lambda y: np.where(np.arange(6) == 3, np.inf, y), "differs from ONNX Runtime by inf"),
        (lambda y: y[:, :4], r"has shape \(1, 4, 6, 6\); ONNX Runtime gives \(1, 8, 6, 6\)"),
        (lambda y: y.astype(np.float64), "output 'y' is float64; ONNX Runtime gives float32"),
        (lambda y: (y, y), "the compiled model has 2 outputs, ONNX Runtime gives 1"),
    ],
)
def test_every_kind_of_difference_is_found(compiled, tucker_model, edit, message):
    model = tucker_model()
    (y,) = reference_outputs(model, {"x": random_inputs(compiled.inputs, 0)[0]})
    with pytest.raises(TdcError, match=message):
        verify(Fake(compiled, edit(y)), model, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("error")
def test_nan_and_infinity_agree_where_the_reference_has_them(compiled, tucker_model):
    model = tucker_model()
    bias = np.array([np.inf, -np.inf, np.nan, 0, 1, 2, 3, 4], np.float32)
    model.graph.initializer.append(numpy_helper.from_array(bias, "bias"))
    model.graph.node[2].input.append("bias")
    (y,) = reference_outputs(model, {"x": random_inputs(compiled.inputs, 0)[0]})
    assert not np.isfinite(y).all()
    assert verify(Fake(compiled, y), model, atol=1e-5, rtol=1e-4).max_error == 0
    with pytest.raises(TdcError, match=r"differs from ONNX Runtime by (nan|inf)"):
        verify(Fake(compiled, np.nan_to_num(y)), model, atol=1e-5, rtol=1e-4)


def test_a_model_that_onnx_runtime_refuses(compiled, tucker_model):
    model = tucker_model()
    model.graph.node[3].op_type = "NoSuchOperator"
    with pytest.raises(TdcError, match=r"ONNX Runtime cannot load the model to verify against: .*NoSuchOperator"):
        verify(compiled, model, atol=1e-5, rtol=1e-4)


def test_full_fusion_can_be_required(tucker_model):
    model = tucker_model()
    model.graph.output.append(replace_name(model.graph.output[0], "a", (1, 4, 6, 6)))
    with pytest.raises(TdcError, match=r"1 Tucker layer\(s\) are not one operator.*\n  core: .*\nChange the model"):
        tdc_tvm.build(model, "llvm", require_full_fusion=True)
    report = tdc_tvm.build(model, "llvm").report
    assert [layer.name for layer in report.unfused] == ["core"]
    assert replace(report, build_seconds=1).unfused == report.unfused


def replace_name(value, name, shape):
    from onnx import helper

    return helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, shape)
