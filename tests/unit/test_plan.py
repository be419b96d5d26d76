import json
import subprocess
import sys

import numpy as np
import pytest

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import ConvLayer, DecompositionPlan, Ranks, decompose_layers, parse_ranks, preset_plan
from tdc_tvm.presets import PRESETS


def conv(name, *shape, groups=1, seed=0, **facts):
    return ConvLayer(name, np.random.default_rng(seed).standard_normal(shape), groups, **facts)


LAYERS = [
    conv("stem", 8, 3, 3, 3, pixels=(64, 64)),
    conv("body.conv1", 16, 8, 3, 3, pixels=(64, 16)),
    conv("body.shortcut", 16, 8, 1, 1, pixels=(64, 16)),
    conv("body.grouped", 16, 4, 3, 3, groups=4, pixels=(16, 16)),
    conv("body.depthwise", 16, 1, 3, 3, groups=16, pixels=(16, 16)),
    conv("body.foreign", 16, 16, 3, 3, pixels=(16, 16), keep_reason="a subclass"),
]


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ".YAML"])
@pytest.mark.parametrize(
    "plan",
    [
        DecompositionPlan({"a.b": (3, 4), "käse: 1": (1, 1), "1": (2, 2), "yes": (5, 6)}, "net"),
        DecompositionPlan({}),
        preset_plan("resnet18"),
    ],
)
def test_round_trip(tmp_path, plan, suffix):
    path = tmp_path / f"plan{suffix}"
    plan.save(path)
    loaded = DecompositionPlan.load(path)
    assert loaded == plan
    assert list(loaded.layers) == list(plan.layers)


def test_the_file_says_which_rank_is_which(tmp_path):
    DecompositionPlan({"a": (3, 4)}, "net").save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "format_version": 1,
        "model": "net",
        "layers": {"a": {"rank_out": 3, "rank_in": 4}},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "is a list; expected the keys format_version, layers"),
        ("null", "is empty"),
        ('{"layers": {}}', "lacks format_version"),
        ('{"format_version": 2, "layers": {}}', "format_version 2; this release reads 1"),
        ('{"format_version": 1, "layer": {}}', r"unknown keys: 'layer' \(did you mean 'layers'\?\)"),
        ('{"format_version": 1, "layers": []}', "'layers' of .* is a list"),
        ('{"format_version": 1, "model": 3, "layers": {}}', "'model' of .* is 3; expected text"),
        ('{"format_version": 1, "layers": {"a": [3, 4]}}', "layer 'a' of .* is a list"),
        (
            '{"format_version": 1, "layers": {"a": {"rank_out": 3, "rank_in": 2}, "a": {"rank_out": 4, "rank_in": 2}}}',
            "plan.json has keys more than once: 'a'; keep one of each",
        ),
        ('{"format_version": 1, "layers": {"a": {"rank_out": 3}}}', "layer 'a' of .* lacks rank_in"),
        ('{"format_version": 1, "layers": {"a": {"rank_out": 3, "rank_in": 0}}}', "must be at least 1"),
        ('{"format_version": 1, "layers": {"a": {"rank_out": 3, "rank_in": 1.5}}}', "two whole numbers"),
        ('{"format_version": 1, "layers": {"a": {"rank_out": true, "rank_in": 2}}}', "two whole numbers"),
        ('{"format_version": 1, "layers": {"a": {"rank_out": 3, "rank_in": 2, "rank": 1}}}', "unknown keys: 'rank'"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(TdcError, match=message):
        DecompositionPlan.load(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(TdcError, match="No such file"):
        DecompositionPlan.load(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TdcError, match="not UTF-8"):
        DecompositionPlan.load(tmp_path / "binary.json")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(TdcError, match="not valid YAML"):
        DecompositionPlan.load(tmp_path / "bad.yaml")
    with pytest.raises(TdcError, match=r"ends in \.json, \.yaml or \.yml"):
        DecompositionPlan.load(tmp_path / "plan.txt")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ((32, 64), Ranks(32, 64)),
        ([32, np.int64(64)], Ranks(32, 64)),
        ("32,64", Ranks(32, 64)),
        ("(32, 64)", Ranks(32, 64)),
        (0.9, 0.9),
        ("0.9", 0.9),
        (".5", 0.5),
        ({"a": (1, 2)}, DecompositionPlan({"a": (1, 2)})),
        (DecompositionPlan({"a": (1, 2)}), DecompositionPlan({"a": (1, 2)})),
        ("resnet50", preset_plan("resnet50")),
    ],
)
def test_ways_to_say_ranks(spec, expected):
    assert parse_ranks(spec) == expected


def test_a_path_says_ranks(tmp_path):
    plan = DecompositionPlan({"a": (1, 2)})
    plan.save(tmp_path / "plan.yaml")
    assert parse_ranks(tmp_path / "plan.yaml") == parse_ranks(str(tmp_path / "plan.yaml")) == plan


@pytest.mark.parametrize(
    "spec", ["1.5", 1.0, 0.0, "0.0", "1", float("nan"), 32, (1, 2, 3), (0, 4), "0,4", None, "half"]
)
def test_what_does_not_say_ranks(spec):
    with pytest.raises(TdcError, match=r"expected|at least 1"):
        parse_ranks(spec)


def report_of(ranks, layers=LAYERS, **options):
    result = decompose_layers(layers, ranks, **options)
    return result, {layer.name: layer for layer in result.report.layers}


def test_one_pair_is_clamped_and_says_so():
    result, layers = report_of((4, 4))
    assert result.plan.layers == {"stem": (4, 3), "body.conv1": (4, 4)}
    assert "(4, 4) clamped" in layers["stem"].reason
    assert "clamped" not in layers["body.conv1"].reason
    assert result.factors["stem"].core.shape == (4, 3, 3, 3)
    assert layers["stem"].relative_error == result.factors["stem"].relative_error


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("body.shortcut", "pointwise", "1x1"),
        ("body.grouped", "grouped", "grouped"),
        ("body.depthwise", "depthwise", "depthwise"),
        ("body.foreign", "conv", "a subclass"),
    ],
)
@pytest.mark.parametrize("ranks", [(2, 2), 0.5, {}])
def test_layers_kept_whatever_the_ranks(name, kind, reason, ranks):
    layer = report_of(ranks)[1][name]
    assert (layer.kind, layer.reason, layer.ranks, layer.decomposed) == (kind, reason, None, False)
    assert layer.params_after == layer.params_before
    assert layer.macs_after == layer.macs_before


def test_a_plan_decomposes_what_it_names():
    result, layers = report_of(DecompositionPlan({"body.conv1": (5, 3)}, "net"))
    assert layers["body.conv1"].ranks == (5, 3)
    assert layers["stem"].reason == "not in the plan"
    assert result.report.model == result.plan.model == "net"


def test_params_and_macs():
    _, layers = report_of({"body.conv1": (5, 3)})
    layer = layers["body.conv1"]
    assert (layer.params_before, layer.params_after) == (16 * 8 * 9, 8 * 3 + 3 * 5 * 9 + 5 * 16)
    assert (layer.macs_before, layer.macs_after) == (16 * 16 * 8 * 9, 64 * 8 * 3 + 16 * (3 * 5 * 9 + 5 * 16))
    report = report_of({"body.conv1": (5, 3)})[0].report
    assert report.params[0] - report.params[1] == layer.params_before - layer.params_after
    assert report.macs[0] - report.macs[1] == layer.macs_before - layer.macs_after
    assert decompose_layers([conv("a", 4, 4, 3, 3)], (2, 2)).report.macs is None


def test_energy_keeps_layers_that_would_not_shrink_but_a_plan_does_not():
    layer = conv("a", 8, 8, 3, 3)
    kept = decompose_layers([layer], 0.999).report.layers[0]
    assert not kept.decomposed
    assert kept.reason == "not smaller: ranks (8, 8) take 704 weights, the layer has 576"
    asked = decompose_layers([layer], {"a": (8, 8)}).report.layers[0]
    assert asked.decomposed
    assert "not smaller" in asked.reason
    assert decompose_layers([layer], 0.4).report.layers[0].reason == "keeps 0.4 of the energy"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"body.conv": (2, 2)}, r"'body.conv' \(did you mean 'body.conv1'"),
        ({"nothing": (2, 2), "like": (1, 1)}, "2 layer.s. that the model does not have"),
        (
            DecompositionPlan({"nothing": (2, 2)}, "mine"),
            "the plan of mine names 1 layer.* 'nothing'; correct the",
        ),
        ("resnet18", r"the preset resnet18 names 16 layer.s. .* and 11 more; use it with torchvision's model"),
        ({"stem": (2, 4)}, "rank_in of layer 'stem' is 4; it must be from 1 to 3, the number of input channels"),
        ({"stem": (9, 3)}, "rank_out of layer 'stem' is 9; it must be from 1 to 8"),
        ({"body.shortcut": (2, 2)}, r"'body.shortcut', which cannot be decomposed \(1x1\)"),
        ({"body.foreign": (2, 2)}, r"cannot be decomposed \(a subclass\)"),
    ],
)
def test_plans_that_do_not_fit(plan, message):
    with pytest.raises(TdcError, match=message):
        decompose_layers(LAYERS, plan)


@pytest.mark.parametrize("ranks", [(2, 2), 0.5])
def test_a_layer_that_cannot_be_factorised_is_named(ranks):
    with pytest.raises(TdcError, match="layer 'bad': the kernel has NaN or infinite weights"):
        decompose_layers([conv("good", 4, 4, 3, 3), ConvLayer("bad", np.full((4, 4, 3, 3), np.nan))], ranks)


def test_notes_name_what_is_kept_by_reason():
    points = [conv(f"point{i}", 4, 4, 1, 1) for i in range(7)]
    report = decompose_layers([conv("a", 4, 4, 3, 3), *points, conv("b", 4, 4, 3, 3)], {"a": (2, 2)}).report
    assert report.notes == (
        "not decomposed (1x1): point0, point1, point2, point3, point4 and 2 more",
        "not decomposed (not in the plan): b",
    )


def test_refuses_layers_of_one_name():
    with pytest.raises(TdcError, match="several called a"):
        decompose_layers([conv("a", 4, 4, 3, 3), conv("a", 4, 4, 3, 3)], (2, 2))


def test_the_reports_plan_gives_the_same_again_and_the_report_is_json():
    first = decompose_layers(LAYERS, 0.6, model="net")
    second = decompose_layers(LAYERS, first.plan)
    assert second.plan == first.plan
    data = json.loads(json.dumps(first.report.to_dict()))
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in LAYERS]
    assert {layer["name"]: layer["ranks"] for layer in data["layers"] if layer["decomposed"]} == {
        name: ranks._asdict() for name, ranks in first.plan.layers.items()
    }


def test_without_factors():
    result = decompose_layers(LAYERS, (2, 2), factorize=False)
    assert not result.factors
    assert result.plan == decompose_layers(LAYERS, (2, 2)).plan
    assert all(layer.relative_error is None for layer in result.report.layers)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet18", 16), ("resnet50", 16), ("vgg16", 12), ("vgg16_bn", 12), ("densenet121", 58), ("densenet201", 98)],
)
def test_presets_have_every_layer(name, layers):
    assert len(preset_plan(name).layers) == layers
    assert sorted(PRESETS) == ["densenet121", "densenet201", "resnet18", "resnet50", "vgg16", "vgg16_bn"]


def test_an_unknown_preset_names_the_known():
    with pytest.raises(TdcError, match="no preset named 'alexnet'; there are: densenet121"):
        preset_plan("alexnet")


def test_planning_needs_neither_torch_nor_tvm():
    code = "import sys, tdc_tvm.plan; sys.exit(bool({'torch', 'tvm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
