from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_models import ModelBuilder, tucker_model
from test_onnx_model import branching_model

from tdc_tvm.compiled_model import random_inputs
from tdc_tvm.onnx_model import constants, freeze_shapes, layer_names, load_onnx
from tdc_tvm.onnx_rewrite import set_weight, simplify
from tdc_tvm.verify import reference_outputs

X = (1, 8, 7, 6)
SAME = {"pads": [1, 1, 1, 1]}


def simplified(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Counter]:
    """The simplified model, checked against the original, and how often it has each operator."""
    ours = load_onnx(model)
    infos = freeze_shapes(ours)
    simplify(ours)
    onnx.checker.check_model(ours, full_check=True)
    values = {info.name: value for info, value in zip(infos, random_inputs(tuple(infos), seed=3), strict=True)}
    for have, want in zip(reference_outputs(ours, values), reference_outputs(model, values), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5 * np.abs(want).max())
    return ours, Counter(node.op_type for node in ours.graph.node)


def builder(shape=X):
    b = ModelBuilder(seed=1)
    return b, b.input("x", shape)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2])
def test_a_batch_normalisation_is_folded_into_its_convolution(bias, rank, group):
    b, x = builder((1, 4, *[5] * rank))
    y = b.conv(x, 4, 6, [3] * rank, bias=bias, name="conv", group=group)
    model, ops = simplified(b.build(b.batch_norm(y, 6, epsilon=1e-2)))
    assert ops == {"Conv": 1}
    assert list(constants(model)) == ["conv.weight", "conv.bias" if bias else "conv.weight_bias"]


def test_two_batch_normalisations_in_a_row_are_folded():
    b, x = builder()
    y = b.batch_norm(b.batch_norm(b.conv(x, 8, 8, 3, bias=True), 8), 8)
    assert simplified(b.build(b.node("Relu", y)))[1] == {"Conv": 1, "Relu": 1}


def test_an_empty_bias_is_no_bias():
    b, x = builder()
    y = b.node("Conv", x, b.random((8, 8, 3, 3)), "")
    assert simplified(b.build(b.batch_norm(y, 8)))[1] == {"Conv": 1}


@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_that_share_weights_fold_apart(bias):
    b, x = builder()
    w = [b.random((8, 8, 3, 3), "twin.weight"), *([b.random((8,), "twin.bias")] if bias else [])]
    for _ in range(3):
        x = b.node("Relu", b.batch_norm(b.node("Conv", x, *w, **SAME), 8))
    assert simplified(b.build(x))[1] == {"Conv": 3, "Relu": 3}


def test_a_weight_that_something_else_reads_is_kept():
    b, x = builder()
    w = b.random((8, 8, 3, 3), "w")
    y = b.batch_norm(b.conv(x, 8, 8, 3, weight=w), 8)
    model, _ = simplified(b.build(y, b.node("Neg", w)))
    assert {"w", "w_1"} <= set(constants(model))


def kept_conv_output():
    b, x = builder()
    y = b.conv(x, 8, 8, 3)
    return b.build(b.node("Add", b.batch_norm(y, 8), b.node("Relu", y)))


def conv_output_is_result():
    b, x = builder()
    y = b.conv(x, 8, 8, 3)
    return b.build(b.batch_norm(y, 8), y)


def no_conv():
    b, x = builder()
    return b.build(b.conv(b.batch_norm(x, 8), 8, 8, 3))


def transposed_conv():
    b, x = builder()
    return b.build(b.batch_norm(b.node("ConvTranspose", x, b.random((8, 4, 3, 3))), 4))


def matrix():
    b, x = builder((3, 8))
    return b.build(b.batch_norm(x, 8))


def shared_by_run_time_weight():
    b, x = builder()
    y = b.node("Conv", x, b.input("w", (8, 8, 3, 3)))
    return b.build(b.batch_norm(y, 8))


def read_in_a_branch():
    model = branching_model()
    b = ModelBuilder(seed=2)
    y = b.batch_norm("conv0.out", 4)
    model.graph.initializer.extend(b.weights)
    model.graph.node.extend(b.nodes)
    model.graph.output.append(helper.make_tensor_value_info(y, 1, (1, 4, 6, 6)))
    return model


@pytest.mark.parametrize(
    "make",
    [
        kept_conv_output, conv_output_is_result, no_conv, transposed_conv, matrix, shared_by_run_time_weight,
        read_in_a_branch,
    ],
)  # fmt: skip
def test_any_other_batch_normalisation_becomes_scale_and_shift(make):
    _, ops = simplified(make())
    assert ops["BatchNormalization"] == 0
    assert ops["Mul"] == 1


def test_statistics_computed_at_run_time_stay():
    b, x = builder()
    mean = b.input("mean", (8,))
    y = b.batch_norm(b.conv(x, 8, 8, 3), 8)
    b.nodes[-1].input[3] = mean
    assert simplified(b.build(y))[1]["BatchNormalization"] == 1


def test_weights_that_old_models_declare_as_inputs_are_folded():
    b, x = builder()
    y = b.batch_norm(b.conv(x, 8, 8, 3), 8)
    b.inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in b.weights]
    model, ops = simplified(b.build(y, opset=8, ir_version=3))
    assert ops == {"Conv": 1}
    assert [value.name for value in model.graph.input] == ["x"]


def test_a_layer_keeps_its_name_when_folded():
    b, x = builder()
    y = b.batch_norm(b.conv(x, 8, 8, 3, out="first"), 8)
    y = b.batch_norm(b.conv(y, 8, 8, 1, name="second"), 8)
    model = b.build(y)
    assert layer_names(simplified(model)[0]) == layer_names(model) == ["first", "second"]


@pytest.mark.parametrize("taken", ["w_bias", "bn.out.scaled"])
def test_new_names_avoid_taken_ones(taken):
    b, x = builder()
    other = b.input(taken, X)
    y = b.node("Add", b.batch_norm(b.conv(x, 8, 8, 3, weight=b.random((8, 8, 3, 3), "w"), **SAME), 8), other)
    simplified(b.build(b.batch_norm(y, 8, out="bn.out")))


def test_a_weight_gets_a_free_name():
    model = tucker_model()
    assert set_weight(model, "new", np.ones(2)) == "new"
    assert set_weight(model, "new", np.ones(2)) == "new_1"
    assert set_weight(model, "x", np.ones(2)) == "x_1"
    assert set_weight(model, model.graph.node[0].output[0], np.ones(2)) == "conv0.out_1"


def test_constant_nodes_become_weights():
    model = tucker_model(biases=(True, True, True))
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes += [
        helper.make_node("Constant", [], ["low"], value_float=-0.25),
        helper.make_node("Constant", [], ["shape"], value_ints=[6, -1]),
        helper.make_node("Constant", [], ["scale"], value_floats=[0.5]),
        helper.make_node("Constant", [], ["axis"], value_int=1),
    ]
    after = [
        helper.make_node("Clip", [model.graph.output[0].name, "low"], ["clipped"]),
        helper.make_node("Reshape", ["clipped", "shape"], ["flat"]),
        helper.make_node("Mul", ["flat", "scale"], ["scaled"]),
        helper.make_node("CumSum", ["scaled", "axis"], ["summed"]),
    ]
    graph = helper.make_graph(
        [*nodes, *model.graph.node, *after],
        "g",
        model.graph.input,
        [helper.make_tensor_value_info("summed", 1, (6, 42))],
    )
    lifted, ops = simplified(helper.make_model(graph, opset_imports=model.opset_import, ir_version=8))
    assert ops["Constant"] == 0
    shapes = {name: tuple(tensor.dims) for name, tensor in constants(lifted).items()}
    assert (shapes["low"], shapes["shape"], shapes["axis"]) == ((), (2,), ())
    assert numpy_helper.to_array(constants(lifted)["shape"]).dtype == np.int64


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize("geometry", [{"strides": [2, 2]}, {"strides": [1, 3], "dilations": [2, 1]}])
def test_automatic_padding_is_spelled_out(mode, geometry):
    if mode.startswith("SAME") and "dilations" in geometry:
        geometry = {"strides": [1, 3]}  # ONNX Runtime's padding ignores dilation in some releases
    b, x = builder()
    model, _ = simplified(b.build(b.conv(x, 8, 4, (3, 4), auto_pad=mode, **geometry)))
    assert "auto_pad" not in {a.name for a in model.graph.node[0].attribute}


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min"])
@pytest.mark.parametrize("shape", [(8, 1, 1), (1,), (), (6,), (1, 8, 1, 1), (2, 1, 8, 1, 1)])
@pytest.mark.parametrize("first", [True, False])
def test_constants_of_elementwise_operators_are_arranged(op, shape, first):
    b, x = builder()
    y = b.conv(x, 8, 8, 3, **SAME)
    c = b.weight(b.rng.uniform(0.5, 1.5, shape).astype("float32"))
    model, _ = simplified(b.build(b.node(op, *((c, y) if first else (y, c)))))
    inputs = model.graph.node[-1].input
    values = constants(model)
    assert (inputs[0] in values) == (first and op in ("Sub", "Div"))
    rank = len(values[next(name for name in inputs if name in values)].dims)
    assert rank == (max(len(shape), 4) if shape else 0)


def test_broadcasting_by_attributes_is_left_alone():
    b, x = builder()
    b.node("Add", b.conv(x, 8, 8, 3, **SAME), b.random((8,)), out="y", broadcast=1, axis=1)
    b.outputs.append(helper.make_tensor_value_info("y", 1, X))
    model = b.build(opset=6)
    freeze_shapes(model)
    simplify(model)
    assert list(constants(model)[model.graph.node[-1].input[1]].dims) == [8]


def test_unused_weights_go_but_those_of_branches_stay():
    model = branching_model()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3), "unused"))
    simple, _ = simplified(model)
    assert set(constants(simple)) == {"stem.weight", "outer"}
