import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import ModelBuilder, dense_model, tucker_model
from test_onnx_model import branching_model

from tdc_tvm.compiled_model import random_inputs
from tdc_tvm.errors import TdcError
from tdc_tvm.onnx_decompose import decompose_onnx, tucker_layer_names
from tdc_tvm.onnx_model import array, constants, conv_nodes, freeze_shapes, load_onnx, metadata, parameter_count
from tdc_tvm.plan import DecompositionPlan, Ranks
from tdc_tvm.verify import reference_outputs


def decomposed(model, ranks, **shapes):
    ours = load_onnx(model)
    infos = freeze_shapes(ours, **shapes)
    report = decompose_onnx(ours, ranks)
    onnx.checker.check_model(ours, full_check=True)
    return ours, report, infos


def outputs(model, infos):
    values = random_inputs(tuple(infos), seed=4)
    return reference_outputs(model, {info.name: value for info, value in zip(infos, values, strict=True)})


def conv_model(*, channels=(6, 8), window=3, bias=True, size=(9, 8), dtype="float32", **attributes):
    b = ModelBuilder(seed=5, dtype=dtype)
    x = b.input("x", (2, channels[0], *size))
    return b.build(b.conv(x, *channels, window, bias=bias, name="conv", **attributes))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"pads": [1, 1, 1, 1], "strides": [2, 2]},
        {"pads": [2, 0, 1, 3], "strides": [1, 2], "dilations": [2, 1], "window": (3, 2)},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "window": (2, 4)},
        {"auto_pad": "VALID", "kernel_shape": [3, 3]},
        {"window": (1, 5), "channels": (3, 2)},
        {"window": 7, "pads": [3, 3, 3, 3]},
    ],
    ids=str,
)
def test_full_ranks_compute_the_same(options):
    model = conv_model(**options)
    in_channels, out_channels = options.get("channels", (6, 8))
    ours, report, infos = decomposed(model, (out_channels, in_channels))
    assert report.layers[0].ranks == Ranks(out_channels, in_channels)
    assert report.layers[0].relative_error < 1e-6
    for have, want in zip(outputs(ours, infos), outputs(model, infos), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5 * np.abs(want).max())


def test_the_error_reported_is_the_error_of_the_kernel():
    model = conv_model(bias=False)
    ours, report, _ = decomposed(model, (4, 3))
    u_in, core, u_out = (array(t).astype(np.float64) for t in constants(ours).values())
    kernel = array(model.graph.initializer[0]).astype(np.float64)
    rebuilt = np.einsum("nd,dcrs,ci->nirs", u_out[:, :, 0, 0], core, u_in[:, :, 0, 0])
    error = np.linalg.norm(rebuilt - kernel) / np.linalg.norm(kernel)
    assert report.layers[0].relative_error == pytest.approx(error, rel=1e-4)


def test_three_plain_convolutions_stand_for_a_layer():
    model, report, _ = decomposed(dense_model((4, 8, 6)), {"body": (5, 3)})
    layer = [node for node in model.graph.node if metadata(node).get("tdc.layer") == "body"]
    assert [node.op_type for node in layer] == ["Conv"] * 3
    assert [metadata(node)["tdc.stage"] for node in layer] == ["reduce", "core", "expand"]
    assert {(metadata(node)["tdc.rank_in"], metadata(node)["tdc.rank_out"]) for node in layer} == {("3", "5")}
    assert [tuple(constants(model)[node.input[1]].dims) for node in layer] == [(3, 8, 1, 1), (5, 3, 3, 3), (6, 5, 1, 1)]
    assert [node.name for node in layer] == ["body.reduce", "body.core", "body.expand"]
    assert tucker_layer_names(model) == {"body.core": "body"}
    assert "body.weight" not in constants(model)
    assert model.ir_version >= 10
    assert report.plan == DecompositionPlan({"body": Ranks(5, 3)}, "net")


def test_the_bias_goes_to_the_last_stage():
    model, _, _ = decomposed(conv_model(), (4, 3))
    assert [list(node.input[2:]) for node in model.graph.node] == [[], [], ["conv.bias"]]


def test_macs_and_weights_are_counted():
    _, report, _ = decomposed(conv_model(pads=[1, 1, 1, 1], strides=[2, 2]), (4, 3))
    in_pixels, out_pixels = 2 * 9 * 8, 2 * 5 * 4
    assert report.macs == (out_pixels * 8 * 6 * 9, in_pixels * 6 * 3 + out_pixels * (3 * 4 * 9 + 4 * 8))
    assert report.params == (8 * 6 * 9, 6 * 3 + 3 * 4 * 9 + 4 * 8)


def test_macs_stay_open_where_shapes_are():
    model = dense_model()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    assert decompose_onnx(load_onnx(model), (2, 2)).macs is None


def test_every_layer_is_reported_with_its_reason():
    b = ModelBuilder()
    x = b.input("x", (1, 8, 9, 9))
    same = {"pads": [1, 1, 1, 1]}
    x = b.conv(x, 8, 8, 3, name="dense", **same)
    x = b.conv(x, 8, 8, 1, name="point")
    x = b.conv(x, 8, 8, 3, name="grouped", group=2, **same)
    x = b.conv(x, 8, 8, 3, name="depthwise", group=8, **same)
    x = b.node("Conv", x, b.input("w", (8, 8, 3, 3)), name="free", **same)
    x = b.node("Conv", x, b.node("Mul", "w", b.weight(np.float32(2)), name="scale"), name="scaled", **same)
    x = b.conv(x, 8, 2, 3, name="narrow", **same)
    model, report, _ = decomposed(b.build(x), (4, 4))
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["dense"] == "ranks given for all layers"
    assert (reasons["point"], reasons["grouped"], reasons["depthwise"]) == ("1x1", "grouped", "depthwise")
    assert reasons["free"] == "its weights are an input of the model, not constant"
    assert reasons["scaled"] == "its weights are computed by Mul scale, not constant"
    assert reasons["narrow"].startswith("ranks given for all layers, (4, 4) clamped to the layer's channels")
    assert [layer.name for layer in report.decomposed] == ["dense", "narrow"]
    again = decompose_onnx(model, (2, 2))
    assert not again.decomposed
    assert {layer.reason for layer in again.layers if layer.name.startswith("dense.")} == {
        "already part of the Tucker layer dense"
    }


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("op", ["Constant", "Identity"])
def test_weights_that_are_constant_by_a_node_are_decomposed(op, copies):
    """Two copies of one weight: exporters merge equal weights and rename them by ``Identity``."""
    b = ModelBuilder(seed=5)
    x = b.input("x", (1, 8, 9, 9))
    weight = b.random((8, 8, 3, 3))
    for i in range(copies):
        if op == "Constant":
            b.nodes.append(helper.make_node(op, [], [f"w{i}"], value=b.weights[0]))
        else:
            b.node(op, weight, out=f"w{i}")
        x = b.node("Conv", x, f"w{i}")
    model = b.build(x)
    ours, report, infos = decomposed(model, (8, 8))
    assert len(report.decomposed) == copies
    assert parameter_count(load_onnx(model)) == 576 * copies + 576 * (op == "Constant")
    for have, want in zip(outputs(ours, infos), outputs(model, infos), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5 * np.abs(want).max())


def test_layers_that_share_weights_are_decomposed_apart():
    b = ModelBuilder()
    x = b.input("x", (1, 6, 8, 8))
    w = b.random((6, 6, 3, 3), "twin.weight")
    for _ in range(2):
        x = b.node("Relu", b.conv(x, 6, 6, 3, weight=w, pads=[1, 1, 1, 1]))
    model = b.build(x)
    ours, report, infos = decomposed(model, (6, 6))
    assert [layer.name for layer in report.decomposed] == ["conv0.out", "conv2.out"]
    np.testing.assert_allclose(outputs(ours, infos)[0], outputs(model, infos)[0], atol=1e-5)
    one, report, infos = decomposed(model, {"conv2.out": (6, 6)})
    assert len(conv_nodes(one)) == 4
    np.testing.assert_allclose(outputs(one, infos)[0], outputs(model, infos)[0], atol=1e-5)


@pytest.mark.parametrize("taken", ["conv.core.out", "conv.reduce.out", "conv.core.weight"])
def test_new_names_avoid_taken_ones(taken):
    b = ModelBuilder()
    x, other = b.input("x", (1, 6, 8, 8)), b.input(taken, (1, 4, 8, 8))
    model = b.build(b.node("Add", b.conv(x, 6, 4, 3, name="conv", pads=[1, 1, 1, 1]), other))
    ours, _, infos = decomposed(model, (4, 6))
    np.testing.assert_allclose(outputs(ours, infos)[0], outputs(model, infos)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["a b/c::1", "käse", "日本", "_", "layer.weight"])
def test_names_with_strange_characters(name):
    b = ModelBuilder()
    y = b.conv(b.input("x", (1, 6, 8, 8)), 6, 4, 3, weight=b.random((4, 6, 3, 3)))
    b.nodes[0].name = name
    model, report, _ = decomposed(b.build(y), {name: (2, 2)})
    assert [layer.name for layer in report.decomposed] == [name]
    assert list(tucker_layer_names(model).values()) == [name]


def test_a_model_with_branches():
    model = branching_model()
    ours, report, infos = decomposed(model, (4, 4))
    assert len(report.decomposed) == 1
    np.testing.assert_allclose(outputs(ours, infos)[0], outputs(model, infos)[0], atol=1e-5)


def test_half_precision_stays_half_precision():
    model, _, _ = decomposed(conv_model(dtype="float16"), (4, 3))
    assert {tensor.data_type for tensor in model.graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_a_model_without_convolutions():
    b = ModelBuilder()
    model = b.build(b.node("Relu", b.input("x", (2, 3))))
    ours, report, _ = decomposed(model, (4, 4))
    assert report.layers == ()
    assert [node.op_type for node in ours.graph.node] == ["Relu"]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"stemm": (2, 2)}, r"1 layer\(s\) that the model does not have: 'stemm' \(did you mean 'stem'\?\)"),
        ({"stem": (9, 2)}, r"'stem'.*9.*8"),
        ({"stem": (2, 5)}, r"'stem'.*5.*4"),
        ({"stem": (0, 2)}, "at least 1"),
        ({"body": (2, 2.5)}, "expected two whole numbers"),
        ("no-such-preset", "cannot read ranks from 'no-such-preset'"),
        ("absent.json", "cannot read the plan absent.json"),
        (1.5, "cannot use 1.5 as an energy"),
    ],
)
def test_plans_that_do_not_fit(ranks, message):
    with pytest.raises(TdcError, match=message):
        decompose_onnx(load_onnx(dense_model((4, 8, 6))), ranks)


def test_a_plan_may_not_name_what_cannot_be_decomposed():
    with pytest.raises(TdcError, match=r"names layer 'layer\.0', which cannot be decomposed \(1x1\); remove the entry"):
        decompose_onnx(load_onnx(tucker_model()), {"layer.0": (2, 2)})


def test_weights_that_are_not_finite():
    model = load_onnx(conv_model())
    kernel = array(model.graph.initializer[0]).copy()
    kernel[0, 0] = np.nan
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(kernel, "conv.weight"))
    with pytest.raises(TdcError, match="layer 'conv': the kernel has NaN or infinite"):
        decompose_onnx(model, (4, 3))
