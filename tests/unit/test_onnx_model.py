import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import ModelBuilder, dense_model, tucker_model

from tdc_tvm.compiler import plan_build
from tdc_tvm.errors import TdcError
from tdc_tvm.onnx_model import (
    TensorInfo,
    check_operators,
    conv_nodes,
    conv_shape,
    freeze_shapes,
    infer_shapes,
    layer_names,
    load_onnx,
    metadata,
    parameter_count,
    use_counts,
)
from tdc_tvm.schedules.shape import Conv2dShape


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected an ONNX model"),
        (b"\0" * 64, "not an ONNX model"),
        (b"# Not a model, a README\n" * 20, "not an ONNX model"),
        (b'{"ir_version": 8}', "not an ONNX model"),
        (dense_model().SerializeToString()[:-200], "not an ONNX model, or it is truncated"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph with operators; export it again"),
    ],
    ids=["empty", "zeros", "text", "json", "truncated", "no graph"],
)
@pytest.mark.parametrize("as_file", [True, False])
def test_files_and_bytes_that_are_no_model(tmp_path, content, message, as_file):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(TdcError, match=message) as caught:
        load_onnx(path if as_file else content)
    assert (str(path) if as_file else "the given bytes") in str(caught.value)


@pytest.mark.parametrize("cut", range(1, 400, 37))
def test_every_truncation_is_found(cut):
    data = tucker_model().SerializeToString()
    with pytest.raises(TdcError):
        load_onnx(data[:cut])


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(TdcError, match=r"cannot read the model .*absent\.onnx: No such file"):
        load_onnx(tmp_path / "absent.onnx")
    with pytest.raises(TdcError, match=r"cannot read the model .*: Is a directory"):
        load_onnx(str(tmp_path))
    with pytest.raises(TdcError, match=r"found dict \(export a PyTorch module with"):
        load_onnx({})


def test_the_checker_speaks():
    model = dense_model()
    model.graph.node[1].input[0] = "nowhere"
    with pytest.raises(TdcError, match=r"the given ModelProto is not a valid ONNX model: .*nowhere"):
        load_onnx(model)
    model = dense_model()
    model.ir_version = 1000
    with pytest.raises(TdcError, match="not a valid ONNX model"):
        load_onnx(model)


def without_output_shape(op: str) -> onnx.ModelProto:
    domain = "" if op == "Relu" else "mine"
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", (2, 3)), ("y", None))
    )
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], domain=domain)], "net", [x], [y])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_an_output_without_a_shape_gets_the_inferred_one():
    (output,) = load_onnx(without_output_shape("Relu")).graph.output
    assert [dim.dim_value for dim in output.type.tensor_type.shape.dim] == [2, 3]
    with pytest.raises(TdcError, match=r"declares no shape for its output 'y', and none can be inferred; declare one"):
        load_onnx(without_output_shape("Own"))


def test_the_declared_shape_stays_where_none_can_be_inferred():
    model = without_output_shape("Own")
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 5)))
    infer_shapes(model)
    onnx.checker.check_model(model)
    assert [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim] == [2, 5]


def test_the_given_model_is_left_alone():
    model = dense_model()
    before = model.SerializeToString(deterministic=True)
    plan_build(model, "llvm", decompose=(4, 4))
    assert model.SerializeToString(deterministic=True) == before


def save_external(folder: Path, location: str = "weights.bin") -> Path:
    onnx.save(tucker_model(), folder / "model.onnx", save_as_external_data=True, location=location, size_threshold=0)
    return folder / "model.onnx"


def change_external(path: Path, key: str, value: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(model.SerializeToString())


def test_external_data_is_read(tmp_path):
    loaded = load_onnx(save_external(tmp_path))
    for ours, theirs in zip(loaded.graph.initializer, tucker_model().graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(ours), numpy_helper.to_array(theirs))


def test_external_data_is_found_from_another_folder(tmp_path, monkeypatch):
    save_external(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_onnx("model.onnx").graph.initializer[0].raw_data
    os.symlink(tmp_path, tmp_path / "link")
    assert load_onnx("link/model.onnx").graph.initializer[0].raw_data


def test_external_data_that_is_missing_or_cut(tmp_path):
    path = save_external(tmp_path)
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[:-8])
    with pytest.raises(
        TdcError, match=r"weights\.bin is truncated: it has \d+ bytes, tensor 'layer\.2\.weight' ends at"
    ):
        load_onnx(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(TdcError, match=r"is missing: tensor 'layer\.0\.weight' expects .*weights\.bin; copy it"):
        load_onnx(path)


def test_external_data_needs_a_path(tmp_path):
    path = save_external(tmp_path)
    for source in (path.read_bytes(), onnx.load(path, load_external_data=False)):
        with pytest.raises(TdcError, match="3 tensors in external files, which only a path can find; pass the model's"):
            load_onnx(source)


@pytest.mark.parametrize(
    "location", ["{outside}", "../outside.bin", "sub/../../outside.bin", "link.bin", "", "folder/x"]
)
def test_external_data_outside_the_models_folder(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"\0" * 10000)
    (folder / "link.bin").symlink_to(outside)
    (folder / "folder").symlink_to(tmp_path)
    (tmp_path / "x").write_bytes(b"\0" * 10000)
    path = save_external(folder)
    change_external(path, "location", location.format(outside=outside))
    with pytest.raises(TdcError, match=r"'layer\.0\.weight' .* outside the model's folder .*; expected a file in"):
        load_onnx(path)


@pytest.mark.parametrize(("key", "value"), [("offset", "-4"), ("length", "many"), ("length", "-1"), ("offset", "")])
def test_external_data_at_impossible_places(tmp_path, key, value):
    path = save_external(tmp_path)
    change_external(path, key, value)
    with pytest.raises(TdcError, match=r"'layer\.0\.weight' .* expected two whole numbers of bytes"):
        load_onnx(path)


def test_external_data_of_constant_nodes_and_branches_is_checked(tmp_path):
    for model in (constant_node_model(), branching_model()):
        onnx.save(model, tmp_path / "model.onnx")
        model = onnx.load(tmp_path / "model.onnx")
        attributes = [a for node in model.graph.node for a in node.attribute]
        (tensor,) = [a.t for a in attributes if a.HasField("t")] + [t for a in attributes for t in a.g.initializer]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="/etc/hostname")
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(TdcError, match="outside the model's folder"):
            load_onnx(tmp_path / "model.onnx")


def constant_node_model() -> onnx.ModelProto:
    b = ModelBuilder()
    x = b.input("x", (2, 3))
    b.nodes.append(
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones((2, 3), "float32"), "t"))
    )
    return b.build(b.node("Add", x, "c"))


def branching_model(op: str = "Neg") -> onnx.ModelProto:
    """A convolution whose result, and a weight of the outer graph, only the branches of an ``If`` read."""
    b = ModelBuilder()
    x, condition = b.input("x", (1, 4, 6, 6)), b.input("condition", (), "bool")
    y = b.conv(x, 4, 4, 3, name="stem", pads=[1, 1, 1, 1])
    b.random((1, 4, 1, 1), "outer")
    shape = (1, 4, 6, 6)
    branches = []
    for name, node in (
        ("then", helper.make_node("Mul", [y, "inner"], ["then.out"])),
        ("else", helper.make_node("Add", [y, "outer"], ["else.in"])),
    ):
        out = helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, shape)
        inner = numpy_helper.from_array(np.full((1, 4, 1, 1), 2.0, "float32"), "inner")
        nodes = [node] if name == "then" else [node, helper.make_node(op, ["else.in"], ["else.out"], name="deep")]
        branches.append(helper.make_graph(nodes, name, [], [out], [inner] if name == "then" else []))
    return b.build(b.node("If", condition, then_branch=branches[0], else_branch=branches[1]))


def test_reads_from_branches_count():
    counts = use_counts(branching_model())
    assert counts["outer"] == 1
    assert counts["conv0.out"] == 2


def test_unsupported_operators_are_named_all_at_once():
    b = ModelBuilder()
    x = b.input("x", (1, 4, 6, 6))
    y = b.conv(x, 4, 4, name="fine")
    y = b.node("Foo", b.node("Foo", y, name="foo1", domain="com.example"), name="foo2", domain="com.example")
    y = b.node("StringNormalizer", y, name="text")
    model = helper.make_model(helper.make_graph(b.nodes, "g", b.inputs, [], b.weights))
    model.graph.node.append(branching_model("Multinomial").graph.node[-1])
    with pytest.raises(TdcError) as caught:
        check_operators(model)
    text = str(caught.value)
    assert "3 unsupported operator(s)" in text
    assert "  com.example.Foo: foo1, foo2\n" in text
    assert "  StringNormalizer: text\n" in text
    assert "  Multinomial: deep\n" in text
    assert "Replace them in the model" in text


def test_a_batch_normalisation_in_training_mode_is_refused():
    b = ModelBuilder()
    y = b.batch_norm(b.input("x", (1, 4, 6, 6)), 4, training_mode=1, name="bn")
    b.nodes[-1].output.extend(["mean", "variance"])
    with pytest.raises(TdcError, match="BatchNormalization in training mode: bn"):
        plan_build(b.build(y), "llvm")


def test_sparse_weights_are_refused():
    b = ModelBuilder()
    y = b.node("MatMul", b.input("x", (2, 3)), "w")
    model = helper.make_model(helper.make_graph(b.nodes, "g", b.inputs, [helper.make_tensor_value_info(y, 1, (2, 4))]))
    values, places = (numpy_helper.from_array(np.array(v), "w") for v in (np.ones(1, "float32"), np.array([5])))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [3, 4]))
    with pytest.raises(TdcError, match=r"sparse weights \(w\).*store them as dense"):
        check_operators(load_onnx(model))


def shaped(**inputs) -> onnx.ModelProto:
    b = ModelBuilder()
    for name, shape in inputs.items():
        b.input(name, shape)
    first, shape = next(iter(inputs.items()))
    return b.build(b.node("Relu", first))


@pytest.mark.parametrize(
    ("inputs", "options", "expected"),
    [
        ({"x": (1, 3, 8, 8)}, {}, [(1, 3, 8, 8)]),
        ({"x": (2, 3)}, {"batch": 2}, [(2, 3)]),
        ({"x": ("N", 3, 8, 8)}, {"batch": 4}, [(4, 3, 8, 8)]),
        ({"x": ("N", 3, "H", "W")}, {"input_shapes": {"x": (1, 3, 5, 6)}}, [(1, 3, 5, 6)]),
        ({"x": ("N", 3, "H", "W")}, {"input_shapes": {"x": (1, 3, 5, 6)}, "batch": 8}, [(8, 3, 5, 6)]),
        ({"x": ("N", 3, "H", "W")}, {"input_shapes": {"x": np.array([1, 3, 5, 6])}}, [(1, 3, 5, 6)]),
        ({"x": ("N", 3), "y": ("N", 4), "z": (7,)}, {"batch": 2}, [(2, 3), (2, 4), (7,)]),
        ({"x": (), "y": ("N",)}, {"batch": 1}, [(), (1,)]),
        ({"x": (-1, 3)}, {"batch": 2}, [(2, 3)]),
        ({"x": (0, 3)}, {"batch": 2}, [(2, 3)]),
    ],
)
def test_shapes_become_static(inputs, options, expected):
    model = shaped(**inputs)
    infos = freeze_shapes(model, **options)
    assert infos == [TensorInfo(name, shape, "float32") for name, shape in zip(inputs, expected, strict=True)]
    dims = [tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in model.graph.input]
    assert dims == expected
    assert [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim] == list(expected[0])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ({"x": ("N", 3)}, {}, r"'x' has the dynamic shape \(N, 3\) without bounds; pass batch=1 \(--batch 1\)"),
        (
            {"x": (1, 3, "H", "W")},
            {"batch": 1},
            r"\(1, 3, H, W\) without bounds; pass input_shapes=\{'x': \(...\)\} \(--input-shape x:",
        ),
        ({"x": ("N", 3), "y": (1, "L")}, {"batch": 1}, r"'y' has the dynamic shape \(1, L\)"),
        ({"x": ("N", 3)}, {"batch": 0}, "every extent must be at least 1"),
        ({"x": ("N", 3)}, {"batch": 2**63}, "an extent is 2147483647 at most"),
        ({"x": (1, 3)}, {"batch": 8}, r"batch=8 fits no input, the model's shapes are fixed \(x \(1, 3\)\)"),
        ({"x": ("N", 3)}, {"input_shapes": {"y": (1, 3)}}, r"names \['y'\], but the model's inputs are \['x'\]"),
        ({"x": ("N", 3)}, {"input_shapes": {"x": (1, 4)}}, r"declared as \(N, 3\); input_shapes gives \(1, 4\)"),
        ({"x": ("N", 3)}, {"input_shapes": {"x": (1, 3, 1)}}, r"input_shapes gives \(1, 3, 1\)"),
        ({"x": ("N", 3)}, {"input_shapes": {"x": 3}}, r"input_shapes\['x'\] is 3; expected whole numbers"),
        ({"x": ("N", 3)}, {"input_shapes": {"x": ("1", 3)}}, "expected whole numbers, such as"),
        ({"x": ("N", 3)}, {"input_shapes": {"x": (1.5, 3)}}, "expected whole numbers, such as"),
        ({"x": ("N", 3)}, {"input_shapes": {"x": (-1, 3)}}, "every extent must be at least 1"),
        ({"x": ("N", 3)}, {"input_shapes": [(1, 3)]}, r"input_shapes is \[\(1, 3\)\]; expected names with shapes"),
        ({"x": ("N", 3)}, {"batch": "1"}, "batch is '1'; expected a whole number"),
        ({"x": (None, 3)}, {}, r"dynamic shape \(\?, 3\) without bounds"),
    ],
)
def test_shapes_that_stay_open_or_contradict(inputs, options, message):
    with pytest.raises(TdcError, match=message):
        freeze_shapes(shaped(**inputs), **options)


def test_inputs_that_are_no_tensors_of_numbers():
    model = shaped(x=(1, 3))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    with pytest.raises(TdcError, match="'x' has the type STRING; expected floating-point, integer or boolean"):
        freeze_shapes(model)
    model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, (1, 3)))
    with pytest.raises(TdcError, match="'x' has no declared tensor shape"):
        freeze_shapes(model)


def test_weights_declared_as_inputs_are_no_inputs():
    model = dense_model(opset=11, ir_version=3)
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )
    model = load_onnx(model)
    assert [info.name for info in freeze_shapes(model)] == ["x"]
    onnx.checker.check_model(model)


def test_local_functions_are_inlined():
    b = ModelBuilder()
    x = b.input("x", (1, 4, 6, 6))
    y = b.node("Block", x, b.random((4, 4, 1, 1)), domain="mine")
    function = helper.make_function(
        "mine", "Block", ["a", "w"], ["r"],
        [helper.make_node("Conv", ["a", "w"], ["c"]), helper.make_node("Relu", ["c"], ["r"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    graph = helper.make_graph(
        b.nodes, "g", b.inputs, [helper.make_tensor_value_info(y, TensorProto.FLOAT, (1, 4, 6, 6))], b.weights
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = load_onnx(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8))
    check_operators(model)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu"]


def test_only_two_dimensional_convolutions_are_layers():
    b = ModelBuilder()
    x1, x2, x3 = b.input("x1", (1, 4, 9)), b.input("x2", (1, 4, 9, 9)), b.input("x3", (1, 4, 9, 9, 9))
    run_time_weight = b.input("w", (4, 4, 3, 3))
    ys = [b.conv(x1, 4, 4, (3,)), b.conv(x2, 4, 4, 3, name="two"), b.conv(x3, 4, 4, (3, 3, 3))]
    ys += [b.node("ConvTranspose", x2, b.random((4, 4, 3, 3))), b.node("Conv", x2, run_time_weight, name="free")]
    model = b.build(*ys)
    assert [node.name for node in conv_nodes(model)] == ["two", "free"]
    assert layer_names(model) == ["two", "free"]


def test_layer_names_are_recognisable_and_unique():
    b = ModelBuilder()
    x = b.input("x", (1, 4, 6, 6))
    shared = b.random((4, 4, 3, 3), "twin.weight")
    x = b.conv(x, 4, 4, 3, name="block.conv1")
    x = b.conv(x, 4, 4, 1, out="anonymous")
    for _ in range(2):
        x = b.conv(x, 4, 4, 3, weight=shared, pads=[1, 1, 1, 1])
    b.nodes[0].name = "node_conv2d_0"
    assert layer_names(b.build(x)) == ["block.conv1", "anonymous", "conv2.out", "conv3.out"]


@pytest.mark.parametrize(
    ("attributes", "padding", "extent"),
    [
        ({}, (0, 0, 0, 0), (5, 4)),
        ({"auto_pad": "VALID", "strides": [2, 2]}, (0, 0, 0, 0), (3, 2)),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (1, 0, 1, 1), (4, 3)),
        ({"auto_pad": "SAME_LOWER", "strides": [2, 2]}, (1, 1, 1, 0), (4, 3)),
        ({"auto_pad": "SAME_UPPER", "dilations": [2, 1]}, (2, 1, 2, 1), (7, 6)),
        ({"pads": [2, 0, 1, 3], "dilations": [1, 2], "strides": [1, 2]}, (2, 0, 1, 3), (8, 3)),
    ],
)
def test_convolution_shapes(attributes, padding, extent):
    b = ModelBuilder()
    model = b.build(b.conv(b.input("x", (2, 4, 7, 6)), 4, 5, 3, **attributes))
    freeze_shapes(model)
    shape = conv_shape(model, model.graph.node[0], (5, 4, 3, 3))
    strides, dilations = (tuple(attributes.get(key, (1, 1))) for key in ("strides", "dilations"))
    assert shape == Conv2dShape(2, 7, 6, 4, 5, (3, 3), strides, padding, dilations)
    assert (shape.out_height, shape.out_width) == extent
    inferred = [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim]
    assert inferred == [2, 5, *extent]


def test_a_window_that_does_not_fit_is_named():
    b = ModelBuilder()
    model = b.build(b.conv(b.input("x", (1, 4, 2, 2)), 4, 4, 3, name="wide"))
    with pytest.raises(TdcError, match=r"layer wide: .* a \(3, 3\) window .* does not fit into 2x2"):
        plan_build(model, "llvm", decompose=(2, 2))


def test_counting():
    model = dense_model((4, 8, 6))
    assert parameter_count(model) == 4 * 8 * 9 + 8 + 8 * 6 * 9
    assert metadata(model.graph.node[0]) == {}
