import json
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan
from tdc_tvm.training import decompose, export_onnx


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding="valid")
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.point = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, image):
        return self.fc(self.point(self.layer1(self.stem(image))).mean((2, 3)))


def make_net():
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def props(thing):
    return {prop.key: prop.value for prop in thing.metadata_props}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, report = decompose(make_net(), {"layer1.0.conv1": (4, 3), "layer1.1.conv2": (5, 6)})
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    export_onnx(model.train(), (1, 3, 16, 16), path, dynamic_batch=True)
    return model, report, path


def test_three_plain_convolutions_carry_the_layers_name(exported):
    _, _, path = exported
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    convs = [props(node) for node in proto.graph.node if node.op_type == "Conv"]
    layers = Counter(conv["tdc.layer"] for conv in convs)
    assert layers == {
        "stem": 1,
        "layer1.0.conv1": 3,
        "layer1.0.conv2": 1,
        "layer1.1.conv1": 1,
        "layer1.1.conv2": 3,
        "point": 1,
    }
    tucker = [conv for conv in convs if conv["tdc.layer"] == "layer1.0.conv1"]
    assert [conv["tdc.stage"] for conv in tucker] == ["reduce", "core", "expand"]
    assert {(conv["tdc.rank_in"], conv["tdc.rank_out"]) for conv in tucker} == {("3", "4")}
    assert all(set(conv) == {"tdc.layer"} for conv in convs if layers[conv["tdc.layer"]] == 1)


def test_batch_normalisation_is_folded(exported):
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(exported[2]).graph.node}


def test_the_model_carries_its_plan(exported):
    _, report, path = exported
    plan = DecompositionPlan.from_dict(json.loads(props(onnx.load(path))["tdc.plan"]))
    assert plan == report.plan


def test_no_paths_of_the_exporting_machine_are_left(exported):
    data = exported[2].read_bytes()
    assert b"test_export" not in data
    assert b"site-packages" not in data


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_dynamic_batch_agrees_with_pytorch(exported, batch):
    model, _, path = exported
    x = torch.rand(batch, 3, 16, 16)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(["output"], {"image": x.numpy()})
    with torch.no_grad():
        expected = model.eval()(x).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_model_is_left_as_it_was(tmp_path):
    model = make_net().train()
    model.layer1[0].bn1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, torch.rand(2, 3, 16, 16), tmp_path / "net.onnx")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    proto = onnx.load(tmp_path / "net.onnx")
    assert [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 16, 16]
    assert "tdc.plan" not in props(proto)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, left, right):
        y = self.conv(left)
        return y, (y * right).sum(1)


def test_several_inputs_and_outputs(tmp_path):
    inputs = (torch.rand(2, 2, 6, 6), torch.rand(2, 2, 1, 1))
    proto = export_onnx(TwoInputs(), inputs, tmp_path / "two.onnx", dynamic_batch=True)
    assert [value.name for value in proto.graph.input] == ["left", "right"]
    assert [value.name for value in proto.graph.output] == ["output_0", "output_1"]


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(3, 3, 3, 3))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
        self.shared = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.shared(self.shared(self.normed(nn.functional.conv2d(x, self.kernel))).relu())


def test_names_of_computed_shared_and_functional_convolutions(tmp_path):
    proto = export_onnx(Names(), (1, 3, 6, 6), tmp_path / "names.onnx")
    names = [props(node).get("tdc.layer") for node in proto.graph.node if node.op_type == "Conv"]
    assert names == [None, "normed", "shared", "shared"]


def test_the_memory_format_leaves_no_trace(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    kinds = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.rand(2, 3, 8, 8).to(memory_format=memory_format)
        proto = export_onnx(model.to(memory_format=memory_format), x, tmp_path / "net.onnx", dynamic_batch=True)
        kinds.append([node.op_type for node in proto.graph.node])
    assert kinds[0] == kinds[1]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_half_precision(tmp_path):
    proto = export_onnx(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).half(), (1, 3, 8, 8), tmp_path / "half.onnx")
    assert {tensor.data_type for tensor in proto.graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_a_difference_is_an_error_and_nothing_is_written(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(TdcError, match="differs from PyTorch's by"):
        export_onnx(model, (1, 3, 8, 8), tmp_path / "net.onnx", tolerance=-1.0)
    assert not list(tmp_path.iterdir())
    export_onnx(model, (1, 3, 8, 8), tmp_path / "net.onnx", tolerance=-1.0, verify=False)


class Untraceable(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Conv2d(3, 4, 3), (1, 4, 8, 8), "does not run on inputs of shape"),
        (3, (1, 3, 8, 8), "a model is a torch.nn.Module; found int"),
        (nn.Conv2d(3, 4, 3), "input", "an example input is"),
        (Untraceable(), (1, 4), "cannot export Untraceable"),
        (nn.Linear(30000, 30000, device="meta"), (1, 30000), r"take 3.35 GiB; an ONNX file holds less than 2 GiB"),
    ],
)
def test_mistakes(tmp_path, model, example, message):
    with pytest.raises(TdcError, match=message):
        export_onnx(model, example, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_exporter(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(TdcError, match=r"needs onnxscript; install it with: pip install 'tdc-tvm\[train\]'"):
        export_onnx(nn.ReLU(), (1, 2), tmp_path / "relu.onnx")


def test_a_missing_directory(tmp_path):
    with pytest.raises(TdcError, match="does not exist; create it"):
        export_onnx(nn.Sequential(nn.Conv2d(3, 4, 3)), (1, 3, 8, 8), tmp_path / "absent" / "net.onnx")
