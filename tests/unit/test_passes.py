import numpy as np
import onnx
import pytest
import tvm
from onnx import helper
from onnx_models import ModelBuilder, dense_model, tucker_model
from test_onnx_model import branching_model

from tdc_tvm.compiled_model import random_inputs
from tdc_tvm.compiler import build, plan_build
from tdc_tvm.errors import TdcError
from tdc_tvm.onnx_model import freeze_shapes, load_onnx
from tdc_tvm.relay_passes import pipeline
from tdc_tvm.verify import reference_outputs

X = (1, 8, 7, 6)
SAME = {"pads": [1, 1, 1, 1]}


def build_and_compare(model: onnx.ModelProto, atol: float = 2e-6, **options):
    """Build, compare all outputs with ONNX Runtime on the original, and give the report's layers."""
    compiled = build(model, "llvm", verify=False, **options)
    values = random_inputs(compiled.inputs, seed=11)
    ours = compiled.run(*values)
    ours = ours if isinstance(ours, tuple) else (ours,)
    inputs = {info.name: value for info, value in zip(compiled.inputs, values, strict=True)}
    expected = reference_outputs(model, inputs)
    assert len(ours) == len(expected)
    for info, have, want in zip(compiled.outputs, ours, expected, strict=True):
        assert (have.shape, have.dtype) == (want.shape, want.dtype) == (info.shape, np.dtype(info.dtype))
        scale = np.abs(want.astype(np.float64)).max(initial=1.0)
        np.testing.assert_allclose(have.astype(np.float64), want.astype(np.float64), rtol=0, atol=atol * scale)
    return compiled.report.layers


def builder(shape=X, dtype="float32"):
    b = ModelBuilder(seed=9, dtype=dtype)
    return b, b.input("x", shape)


def chain(after=None, **tucker):
    """A Tucker layer named t on 8 channels; ``after(b, x, y)`` adds what follows it."""
    b, x = builder()
    y = b.tucker(x, 8, (4, 5), 8, **{"name": "t", **tucker})
    return b.build(after(b, x, y) if after else y)


def fused(*names):
    return [(name, "tucker_conv", True) for name in names]


def summary(layers):
    return [(layer.name, layer.kind, layer.fused) for layer in layers]


BIASES = [tuple(bool(i >> bit & 1) for bit in range(3)) for i in range(8)]


@pytest.mark.parametrize("biases", BIASES, ids=str)
def test_biases_on_any_stage_with_asymmetric_core_padding(biases):
    model = chain(lambda b, x, y: b.node("Relu", y), biases=biases, pads=[2, 1, 0, 3])
    assert summary(build_and_compare(model)) == fused("t")


@pytest.mark.parametrize(
    "core",
    [
        {"kernel": (1, 5), "pads": [0, 2, 0, 2]},
        {"kernel": (2, 3), "strides": [2, 1]},
        {"strides": [2, 3], **SAME},
        {"dilations": [2, 1], "pads": [2, 1, 2, 1]},
        {"kernel": (5, 3), "pads": [4, 4, 4, 4]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "kernel": (2, 4)},
        {"auto_pad": "VALID"},
    ],
    ids=str,
)
def test_the_cores_geometry(core):
    assert summary(build_and_compare(chain(biases=(True, False, True), **core))) == fused("t")


def clip(opset, low=None, high=None):
    def make():
        b, x = builder()
        y = b.tucker(x, 8, (4, 5), 8, name="t")
        if opset < 11:
            bounds = {key: value for key, value in (("min", low), ("max", high)) if value is not None}
            return b.build(b.node("Clip", y, **bounds), opset=opset)
        bounds = ["" if value is None else b.weight(np.float32(value)) for value in (low, high)]
        return b.build(b.node("Clip", y, *bounds), opset=opset)

    return make


def constant(b, value):
    return b.weight(np.asarray(value, "float32"))


def add_as_bias(shape, first):
    def after(b, x, y):
        c = b.random(shape)
        return b.node("Relu", b.node("Add", *((c, y) if first else (y, c))))

    return after


EPILOGUES = {
    "relu": lambda b, x, y: b.node("Relu", y),
    "relu and maxima": lambda b, x, y: b.node("MaxPool", b.node("Relu", y), kernel_shape=[2, 2], strides=[2, 2]),
    "relu then clip": lambda b, x, y: b.node(
        "Clip", b.node("Relu", y), constant(b, 0.1), constant(b, 0.5)
    ),
    "upper bound below a later lower one": lambda b, x, y: b.node(
        "Max", b.node("Min", y, constant(b, -0.5)), constant(b, -0.1)
    ),
    "bounds of four dimensions": lambda b, x, y: b.node("Max", y, constant(b, [[[[0.1]]]])),
    "bound that raises the rank": lambda b, x, y: b.node("Max", y, constant(b, [[[[[0.1]]]]])),
    "bounds by channel": lambda b, x, y: b.node("Min", y, b.random((8, 1, 1))),
    "residual is the input": lambda b, x, y: b.node("Relu", b.node("Add", y, x)),
    "residual in front": lambda b, x, y: b.node("Relu", b.node("Add", x, y)),
    "residual without activation": lambda b, x, y: b.node("Add", x, y),
    "residual after the activation": lambda b, x, y: b.node("Add", x, b.node("Relu", y)),
    "itself as residual": lambda b, x, y: b.node("Add", y, y),
    "residual is broadcast": lambda b, x, y: b.node("Relu", b.node("Add", y, b.node("GlobalAveragePool", x))),
    "residual broadcasts it": lambda b, x, y: b.node("Relu", b.node("Add", y, b.input("z", (3, *X[1:])))),
    "constant residual": lambda b, x, y: b.node("Relu", b.node("Add", y, b.random(X))),
    "bias as Add": add_as_bias((1, 8, 1, 1), False),
    "bias as Add in front": add_as_bias((8, 1, 1), True),
    "one bias for all": add_as_bias((1,), False),
    "bias by column": add_as_bias((6,), False),
    "bias of five dimensions": add_as_bias((1, 1, 8, 1, 1), False),
    "scale and shift": lambda b, x, y: b.node(
        "Add", b.node("Mul", y, b.random((8, 1, 1))), b.random((1, 8, 1, 1))
    ),
    "gate": lambda b, x, y: b.node("Mul", y, b.node("Sigmoid", b.conv(b.node("GlobalAveragePool", y), 8, 8))),
}  # fmt: skip


@pytest.mark.parametrize("after", EPILOGUES.values(), ids=EPILOGUES)
def test_what_follows_a_tucker_layer(after):
    layers = build_and_compare(chain(after, biases=(True, True, True)))
    assert summary(layers)[:1] == fused("t")


@pytest.mark.parametrize(
    "make",
    [
        clip(6, 0.0, 6.0), clip(6, 0.0), clip(6, high=0.25), clip(11, 0.0, 6.0), clip(13, -0.5, 0.25), clip(13, 0.1),
        clip(13, high=0.1), clip(17), clip(13, 1.0, -1.0), clip(13, float("nan"), 0.5),
    ],
)  # fmt: skip
def test_clips_of_every_opset(make):
    assert summary(build_and_compare(make())) == fused("t")


ACTIVATIONS = {
    "relu": lambda b, y: b.node("Relu", y),
    "clip": lambda b, y: b.node("Clip", y, constant(b, 0.1), constant(b, 0.5)),
    "upper bound": lambda b, y: b.node("Clip", y, "", constant(b, 0.5)),
    "bounds in front": lambda b, y: b.node("Min", constant(b, 0.5), b.node("Max", constant(b, 0.1), y)),
    "bounds by channel": lambda b, y: b.node("Max", b.random((8, 1, 1)), b.node("Min", y, b.random((8, 1, 1)))),
    "larger of two": lambda b, y: b.node("Max", b.input("z", X), b.node("Neg", y)),
    "relu before a pooling": lambda b, y: b.node("AveragePool", b.node("Relu", y), kernel_shape=[2, 2]),
}


@pytest.mark.parametrize("layer", [None, "conv", "tucker"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_nan_passes_through(layer, activation):
    b, x = builder()
    y = {
        None: lambda: x,
        "conv": lambda: b.conv(x, 8, 8, 3, **SAME),
        "tucker": lambda: b.tucker(x, 8, (4, 5), 8, **SAME),
    }[layer]()
    model = b.build(activation(b, y))
    compiled = build(model, "llvm", verify=False)
    values = random_inputs(compiled.inputs, seed=3)
    for i, value in enumerate(values):
        value[0, :, 0, i] = np.nan
    named = {info.name: value for info, value in zip(compiled.inputs, values, strict=True)}
    (want,) = reference_outputs(model, named)
    assert np.isnan(want).any()
    assert np.isfinite(want).any()
    np.testing.assert_allclose(compiled.run(*values), want, rtol=0, atol=1e-5)


def test_a_clip_with_a_bound_known_at_run_time():
    b, x = builder()
    y = b.tucker(x, 8, (4, 5), 8, name="t")
    assert summary(build_and_compare(b.build(b.node("Clip", y, b.input("low", ()))))) == fused("t")


def test_biases_as_additions_on_every_stage():
    b, x = builder()
    y = b.node("Add", b.random((4, 1, 1)), b.conv(x, 8, 4, name="t.0"))
    y = b.node("Add", b.conv(y, 4, 5, 3, bias=True, name="t.1", **SAME), b.random((1, 5, 1, 1)))
    y = b.node("Add", b.conv(y, 5, 8, name="t.2"), b.weight(np.float32(0.5)))
    assert summary(build_and_compare(b.build(b.node("Relu", y)))) == fused("t")


def test_batch_normalisation_between_the_stages():
    b, x = builder()
    y = b.batch_norm(b.conv(x, 8, 4, name="t.0"), 4)
    y = b.batch_norm(b.conv(y, 4, 5, 3, bias=True, name="t.1", **SAME), 5)
    y = b.batch_norm(b.conv(y, 5, 8, name="t.2"), 8)
    assert summary(build_and_compare(b.build(b.node("Relu", b.node("Add", x, y))), atol=1e-5)) == fused("t")


def two_chains_in_one_addition():
    b, x = builder()
    y, z = (b.tucker(x, 8, (4, 5), 8, biases=(True, True, True), name=name) for name in ("left", "right"))
    return b.build(b.node("Relu", b.node("Add", z, y)))


def three_chains_added():
    b, x = builder()
    y, z, w = (b.tucker(x, 8, (4, 5), 8, name=name) for name in ("left", "middle", "right"))
    return b.build(b.node("Relu", b.node("Add", b.node("Add", w, y), z)))


def chain_and_shortcut():
    b, x = builder()
    y, z = b.conv(x, 8, 8, name="short"), b.tucker(x, 8, (4, 5), 8, name="t")
    return b.build(b.node("Relu", b.node("Add", y, z)))


def residual_network():
    b, x = builder()
    for i in range(3):
        x = b.node("Relu", b.node("Add", b.tucker(x, 8, (4, 5), 8, biases=(True,) * 3, name=f"layer.{i}"), x))
    return b.build(x)


def result_read_twice():
    b, x = builder()
    y = b.tucker(x, 8, (4, 5), 8, name="t")
    return b.build(y, b.node("Relu", y))


def weights_through_other_nodes():
    b, x = builder()
    w = b.node("DequantizeLinear", b.weight(np.arange(180).reshape(5, 4, 3, 3).astype("int8")), constant(b, 0.01))
    first = b.node("Identity", b.random((4, 8, 1, 1)))
    y = b.node("Conv", b.conv(x, 8, 4, weight=first), w, name="core", **SAME)
    return b.build(b.conv(y, 5, 8))


def shared_weights():
    b, x = builder()
    w = [b.random(shape) for shape in ((4, 8, 1, 1), (4, 4, 3, 3), (8, 4, 1, 1))]
    for i in range(2):
        for j, (weight, pads) in enumerate(zip(w, ([0] * 4, [1] * 4, [0] * 4), strict=True)):
            x = b.node("Conv", x, weight, name=f"t{i}.{j}", pads=pads)
        x = b.node("Relu", x)
    return b.build(x)


def as_constant_nodes():
    model = chain(EPILOGUES["relu"], biases=(True, True, True))
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    graph = helper.make_graph([*nodes, *model.graph.node], "g", model.graph.input, model.graph.output)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=8)


def as_old_model():
    model = chain(EPILOGUES["relu"], biases=(True, True, True))
    weights = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer]
    model.graph.input.extend(weights)
    model.ir_version = 3
    model.opset_import[0].version = 9
    return model


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (two_chains_in_one_addition, ["left", "right"]),
        (three_chains_added, ["left", "middle", "right"]),
        (residual_network, ["layer.0", "layer.1", "layer.2"]),
        (result_read_twice, ["t"]),
        (weights_through_other_nodes, ["core"]),
        (shared_weights, ["t0", "t1"]),
        (as_constant_nodes, ["t"]),
        (as_old_model, ["t"]),
    ],
)
def test_every_chain_is_one_operator(make, names):
    model = make()
    layers = build_and_compare(model, require_full_fusion=True, atol=1e-5)
    assert sorted(summary(layers)) == fused(*names)


def test_a_chain_takes_over_the_addition_with_a_plain_convolution():
    layers = build_and_compare(chain_and_shortcut())
    assert sorted(summary(layers)) == [("short", "conv2d", False), *fused("t")]


def test_overlapping_chains_do_not_share_a_convolution():
    b, x = builder()
    channels = [8, 4, 5, 6, 5, 4]
    for i, window in enumerate((1, 3, 1, 3, 1)):
        x = b.conv(x, channels[i], channels[i + 1], window, name=f"c{i}", pads=[window // 2] * 4)
    layers = build_and_compare(b.build(x))
    assert {layer.name: layer.reason for layer in layers if layer.kind == "tucker_conv"} == {
        "c1": "",
        "c3": "one of its convolutions already belongs to c1",
    }
    assert {layer.name for layer in layers if layer.kind == "conv2d"} == {"c3", "c4"}


def guarded(first=None, core=None, last=None, outputs=(), between=False, dtype="float32"):
    b, x = builder(dtype=dtype)
    y = b.conv(x, 8, 4, name="t.0", out="first", **(first or {}))
    if between:
        y = b.node("Relu", y)
    y = b.conv(y, 4, 4, 3, name="t.1", out="core", bias=True, **{**SAME, **(core or {})})
    return b.build(b.conv(y, 4, 8, name="t.2", bias=True, **(last or {})), *outputs)


def weights_at_run_time():
    b, x = builder()
    y = b.node("Conv", b.conv(x, 8, 4, name="t.0"), b.input("w", (4, 4, 3, 3)), name="t.1", **SAME)
    return b.build(b.conv(y, 4, 8, name="t.2"))


def input_of_chain_is_its_residual():
    b, x = builder()
    y = b.conv(x, 8, 8, name="t.0")
    return b.build(b.node("Add", y, b.conv(b.conv(y, 8, 8, 3, name="t.1", **SAME), 8, 8, name="t.2")))


REFUSED = {
    "groups first": (guarded({"group": 2}), "the first 1x1 t.0 has 2 groups"),
    "groups core": (guarded(core={"group": 4}), "the core t.1 has 4 groups"),
    "groups last": (guarded(last={"group": 4}), "the last 1x1 t.2 has 4 groups"),
    "stride first": (guarded({"strides": [2, 1]}), "the first 1x1 t.0 has stride 2x1"),
    "stride last": (guarded(last={"strides": [2, 2]}), "the last 1x1 t.2 has stride 2x2"),
    "padding first": (guarded({"pads": [0, 1, 0, 0]}), "the first 1x1 t.0 pads its input"),
    "padding last": (guarded(last=SAME), "the last 1x1 t.2 pads its input"),
    "first is a result": (guarded(outputs=("first",)), "the output of t.0 is also used elsewhere"),
    "core is a result": (guarded(outputs=("core",)), "the output of t.1 is also used elsewhere"),
    "first is a residual": (input_of_chain_is_its_residual(), "the output of t.0 is also used elsewhere"),
    "weights at run time": (weights_at_run_time(), "the weights of t.1 are not constant"),
}


@pytest.mark.parametrize(("model", "reason"), REFUSED.values(), ids=REFUSED)
def test_guards_give_their_reason_and_the_model_runs(model, reason):
    layers = build_and_compare(model)
    assert [(layer.name, layer.reason) for layer in layers if layer.kind == "tucker_conv"] == [("t", reason)]
    assert {layer.name for layer in layers if layer.kind == "conv2d"} == {"t.0", "t.1", "t.2"}


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types_stay_with_tvm(dtype):
    model = guarded(dtype=dtype)
    layers = plan_build(model, "llvm").layers
    assert [layer.reason for layer in layers if layer.kind == "tucker_conv"] == [
        f"t.0 computes in {dtype}; the operator computes in float32"
    ]
    assert {layer.strategy for layer in layers if layer.kind == "conv2d"} == {"tvm"}


def test_half_precision_runs():
    assert len(build_and_compare(guarded(dtype="float16"), atol=2e-3)) == 4


def test_double_precision_keeps_its_digits():
    compiled = build(guarded(dtype="float64"), "llvm", verify=False)
    x = np.random.default_rng(0).standard_normal(X)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in guarded(dtype="float64").graph.initializer}
    y = np.einsum("nchw,dc->ndhw", x, weights["t.0.weight"][:, :, 0, 0])
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(y, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    y = np.einsum("nchwrs,dcrs->ndhw", windows, weights["t.1.weight"]) + weights["t.1.bias"][:, None, None]
    y = np.einsum("nchw,dc->ndhw", y, weights["t.2.weight"][:, :, 0, 0]) + weights["t.2.bias"][:, None, None]
    np.testing.assert_allclose(compiled.run(x), y, rtol=1e-12, atol=1e-12)


def test_what_is_no_chain_is_not_reported_as_one():
    for model in (guarded(between=True), dense_model()):
        assert {layer.kind for layer in plan_build(model, "llvm").layers} == {"conv2d"}


@pytest.mark.parametrize("key", ["groups core", "core is a result"])
def test_full_fusion_required(key):
    model, reason = REFUSED[key]
    with pytest.raises(TdcError, match=rf"1 Tucker layer\(s\) are not one operator.*\n  t: {reason}\n"):
        build(model, "llvm", require_full_fusion=True)


def test_full_fusion_holds_where_there_is_nothing_to_fuse():
    build(dense_model(), "llvm", require_full_fusion=True, verify=False)


def test_names_by_path_are_those_that_tell_layers_apart():
    b, x = builder()
    for i in range(0, 6, 3):
        for j, window in enumerate((1, 3, 1)):
            x = b.conv(x, 8, 8, window, name=f"features.{i + j}", pads=[window // 2] * 4)
        x = b.node("Relu", x)
    for path in ("a", "b", "c"):
        x = b.conv(x, 8, 8, 3 if path == "b" else 1, name=f"{path}.conv", pads=[int(path == "b")] * 4)
    layers = plan_build(b.build(x), "llvm").layers
    assert sorted(layer.name for layer in layers) == ["b.conv", "features.1", "features.4"]


@pytest.mark.parametrize("name", ["a b/c::1", "käse_x", "conv_end", "_5f_", "日本", "conv__ff_end", "x" * 300])
def test_names_survive_with_strange_characters(name):
    b, x = builder()
    y = b.conv(x, 8, 8, 3, name=name)
    assert summary(plan_build(b.build(b.node("Relu", y)), "llvm").layers) == [(name, "conv2d", False)]
    assert summary(plan_build(b.build(y), "llvm").layers) == [(name, "conv2d", False)]


def test_the_metadata_name_a_layer():
    layers = build_and_compare(dense_model((8, 8, 8)), decompose={"body": (8, 8), "stem": (8, 8)}, atol=1e-5)
    assert sorted(summary(layers)) == fused("body", "stem")
    assert [layer.ranks for layer in layers] == [(8, 8)] * 2


def test_a_named_layer_with_padding_of_its_own_says_why_it_is_not_fused():
    """As PyTorch exports ``padding_mode="reflect"``."""
    b, x = builder()
    y = b.node("Pad", b.conv(x, 8, 4), b.weight(np.array([0, 0, 1, 1] * 2)), mode="reflect")
    y = b.conv(b.conv(y, 4, 5, 3, name="core"), 5, 8)
    model = b.build(y)
    helper.set_model_props(model.graph.node[2], {"tdc.layer": "layer", "tdc.stage": "core"})
    layers = build_and_compare(model)
    assert [(layer.name, layer.ranks) for layer in layers if layer.kind == "tucker_conv"] == [("layer", (5, 4))]
    with pytest.raises(TdcError, match=r"  layer: other operators, such as a Pad .* stand between its convolutions"):
        build(model, "llvm", require_full_fusion=True)


def test_decomposing_at_compile_time_is_verified_and_reported():
    compiled = build(dense_model((8, 8, 8)), "llvm", decompose={"body": (3, 2)})
    assert compiled.report.verification.status == "passed"
    assert {(layer.name, layer.ranks) for layer in compiled.report.layers} == {("stem", None), ("body", (3, 2))}
    assert compiled.report.notes == ("not decomposed (not in the plan): stem",)


def pixel_shuffle(b, y):
    y = b.node("Reshape", y, b.weight(np.array([1, 2, 4, 7, 6])))
    y = b.node("Transpose", y, perm=[0, 2, 1, 3, 4])
    return b.node("Reshape", y, b.weight(np.array(X)))


def stack(b, y):
    axis = b.weight(np.array([1]))
    return b.node("Concat", b.node("Unsqueeze", y, axis), b.node("Unsqueeze", b.node("Relu", y), axis), axis=1)


AROUND = {
    "dropout": lambda b, y: b.node("Dropout", y),
    "stack": stack,
    "pixel shuffle": pixel_shuffle,
    "flattened pixels": lambda b, y: b.node("Softmax", b.node("Reshape", y, b.weight(np.array([2, 4, -1]))), axis=1),
    "channel concatenation": lambda b, y: b.node("Concat", y, b.conv(y, 8, 3), axis=1),
    "mean over pixels": lambda b, y: b.node("ReduceMean", y, axes=[2, 3], keepdims=0),
    "scalar": lambda b, y: b.node("ReduceMean", y, keepdims=0),
    "flatten": lambda b, y: b.node("Gemm", b.node("Flatten", y), b.random((336, 5)), b.random((5,))),
    "channel slice": lambda b, y: b.node("Slice", y, *(b.weight(np.array([v])) for v in (1, 4, 1))),
    "channel gather": lambda b, y: b.node("Gather", y, b.weight(np.array([5, 1])), axis=1),
    "resize": lambda b, y: b.node("Resize", y, "", constant(b, [1, 1, 2, 2]), mode="linear"),
    "pooling": lambda b, y: b.node("MaxPool", y, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 0, 1], ceil_mode=1),
    "channel normalisation": lambda b, y: b.node("Softmax", y, axis=1),
    "padding": lambda b, y: b.node("Pad", y, b.weight(np.array([0, 1, 1, 2, 0, 0, 2, 1]))),
    "depth to space": lambda b, y: b.node("DepthToSpace", y, blocksize=2),
    "slopes": lambda b, y: b.node("PRelu", y, b.random((8, 1, 1))),
    "selection": lambda b, y: b.node("Where", b.node("Greater", y, constant(b, 0)), y, b.random((8, 1, 1))),
    "transposed convolution": lambda b, y: b.node("ConvTranspose", y, b.random((8, 4, 3, 3)), strides=[2, 2]),
    "layer normalisation": lambda b, y: b.node(
        "LayerNormalization", b.node("Transpose", y, perm=[0, 2, 3, 1]), b.random((8,)), b.random((8,))
    ),
    "batch normalisation": lambda b, y: b.batch_norm(b.node("Relu", y), 8),
}  # fmt: skip


@pytest.mark.parametrize("after", AROUND.values(), ids=AROUND)
def test_the_layout_of_channels_is_right_around_other_operators(after):
    b, x = builder()
    y = b.tucker(x, 8, (4, 5), 8, biases=(True, True, True), name="t")
    layers = build_and_compare(b.build(after(b, y)), atol=1e-5)
    assert ("t", "tucker_conv", True) in summary(layers)


def test_where_the_layout_cannot_be_converted_layers_convert_at_their_borders(monkeypatch):
    def refuse(*_args):
        raise tvm.error.InternalError("cannot convert")

    monkeypatch.setattr(pipeline.relax.transform, "ConvertLayout", lambda *_: refuse)
    assert sorted(summary(build_and_compare(two_chains_in_one_addition()))) == fused("left", "right")
    layers = build_and_compare(chain(EPILOGUES["residual in front"], biases=(True,) * 3, strides=[1, 1], **SAME))
    assert summary(layers) == fused("t")


def plumbing():
    b, x = builder()
    z = b.input("z", (1, 4, 7, 6))
    ids = b.input("ids", (1, 4, 7, 6), "int64")
    y = b.node("Add", b.conv(x, 8, 4, 3, **SAME), z)
    y = b.node("Add", y, b.node("Cast", ids, to=1))
    b.output(b.node("ArgMax", y, axis=1), "int64")
    b.output(b.node("Greater", y, constant(b, 0)), "bool")
    return b.build(y, b.node("Relu", y), "x", b.random((3, 2), "table"))


def odd_names():
    b = ModelBuilder()
    x = b.node("Add", b.input("input.1 ü/x", X), b.input("1", X))
    b.input("unused", (3,))
    return b.build(b.conv(x, 8, 4, 3, out="out put:0"))


def other_ranks():
    b = ModelBuilder()
    x1, x3 = b.input("x1", (2, 4, 9)), b.input("x3", (1, 4, 5, 6, 7))
    y1 = b.batch_norm(b.conv(x1, 4, 6, (3,), bias=True, pads=[1, 1]), 6)
    return b.build(y1, b.node("Relu", b.conv(x3, 4, 2, (3, 3, 3), bias=True)))


def identity():
    b, x = builder()
    return b.build(b.node("Identity", x))


def constant_result():
    b, _ = builder()
    return b.build(b.node("Identity", b.random((2, 3))))


def no_convolution():
    b, x = builder((2, 5))
    return b.build(b.node("Relu", b.node("Gemm", x, b.random((5, 3)))))


def scalar_input():
    b, x = builder()
    return b.build(b.node("Mul", b.conv(x, 8, 4, 3), b.input("s", ())))


def convolution_of_a_constant():
    b, x = builder()
    return b.build(b.node("Add", b.conv(b.random(X), 8, 4, 3, name="still"), b.conv(x, 8, 4, 3, name="live")))


@pytest.mark.parametrize(
    ("make", "convs"),
    [
        (plumbing, 1), (odd_names, 1), (other_ranks, 0), (identity, 0), (constant_result, 0), (no_convolution, 0),
        (scalar_input, 1), (convolution_of_a_constant, 1), (branching_model, 1),
    ],
)  # fmt: skip
def test_any_other_model_builds_all_the_same(make, convs):
    assert len(build_and_compare(make(), atol=1e-5)) == convs


def test_a_convolution_inside_a_branch():
    b = ModelBuilder()
    x, condition = b.input("x", (1, 4, 6, 6)), b.input("condition", (), "bool")
    weight = b.random((4, 4, 3, 3))
    out = [helper.make_tensor_value_info(name, 1, (1, 4, 6, 6)) for name in ("a", "b")]
    then = helper.make_graph([helper.make_node("Conv", [x, weight], ["a"], **SAME)], "then", [], out[:1])
    other = helper.make_graph([helper.make_node("Relu", [x], ["b"])], "else", [], out[1:])
    y = b.node("If", condition, then_branch=then, else_branch=other)
    layers = build_and_compare(b.build(b.conv(y, 4, 8, 3, name="after")))
    assert [layer.kind for layer in layers] == ["conv2d"] * 2
    assert layers[-1].name == "after"


@pytest.mark.parametrize(("options", "batch"), [({"batch": 3}, 3), ({"input_shapes": {"x": (2, *X[1:])}}, 2)])
def test_a_symbolic_batch(options, batch):
    b, x = builder(("N", *X[1:]))
    y = b.node("Relu", b.node("Add", b.tucker(x, 8, (4, 5), 8, biases=(True,) * 3, name="t"), x))
    (layer,) = build_and_compare(b.build(y), **options)
    assert layer.fused
    assert layer.shape.startswith(f"{batch}x")


def contradiction():
    b, x = builder()
    return b.build(b.node("Reshape", x, b.weight(np.array([5, 5]))))


def wrong_channels():
    b, x = builder()
    return b.build(b.conv(x, 4, 8, 3))


def shape_at_run_time():
    b, x = builder()
    b.node("Reshape", x, b.input("shape", (2,), "int64"), out="y")
    b.outputs.append(helper.make_tensor_value_info("y", 1, (None, None)))
    return b.build()


@pytest.mark.parametrize(
    ("make", "operator"), [(contradiction, "Reshape"), (wrong_channels, "Conv"), (shape_at_run_time, "Reshape")]
)
def test_what_the_importer_refuses_is_a_users_error(make, operator, capfd):
    with pytest.raises(TdcError, match=rf"TVM cannot import the operator {operator}: .*\nCheck the model with"):
        plan_build(make(), "llvm")
    assert "Error converting" not in capfd.readouterr().out


def with_second_output(op, dtype, **attributes):
    def make():
        b, x = builder()
        b.nodes.append(helper.make_node(op, [x], ["first", "second"], name="layer", **attributes))
        b.output("first")
        b.output("second", dtype)
        return b.build()

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_second_output("Dropout", "bool"), "output 'second' is declared as bool, and TVM computes it as float32"),
        (with_second_output("MaxPool", "int64", kernel_shape=[2, 2]), r"first output of MaxPool.*\(layer: second\)"),
    ],
    ids=["Dropout", "MaxPool"],
)
def test_second_outputs_that_tvm_does_not_compute(make, message):
    with pytest.raises(TdcError, match=message):
        build(make(), "llvm", verify=False)


def test_freezing_is_enough_for_the_passes():
    model = load_onnx(tucker_model())
    assert [info.shape for info in freeze_shapes(model)] == [(1, 8, 7, 6)]
    assert plan_build(model, "llvm").macs == 42 * (8 * 4 + 4 * 5 * 9 + 5 * 6)
