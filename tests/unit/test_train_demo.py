"""The script that makes the demo's networks: a plan on a machine with TVM, training on one without."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tdc_tvm.plan import DecompositionPlan
from tdc_tvm.training import apply_plan

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "scripts" / "demo"
PLAN = DecompositionPlan({"stage2.conv2": (32, 32), "stage3.conv2": (64, 64)})


@pytest.fixture(scope="module")
def train_demo():
    spec = importlib.util.spec_from_file_location("train_demo", ROOT / "scripts" / "train_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path):
    """A folder as Fashion-MNIST comes, of a few images of noise."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for part, count in (("train", 96), ("t10k", 40)):
        for what, shape, high in (("images-idx3", (count, 28, 28), 256), ("labels-idx1", (count,), 10)):
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
            values = rng.integers(0, high, shape, np.uint8)
            (folder / f"{part}-{what}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    return folder


def test_training_needs_no_compiler_and_goes_on_after_its_budget(train_demo, data, tmp_path, monkeypatch, capsys):
    for name in ("tvm", "tvm_ffi", "tensorly", "rich", "typer"):
        monkeypatch.setitem(sys.modules, name, None)
    PLAN.save(tmp_path / "plan.json")
    out = tmp_path / "out"
    command = ["train", "--smoke", "--device", "cpu", "--data", data, "--plan", tmp_path / "plan.json", "--work", out]
    command = [str(word) for word in command]
    train_demo.main([*command, "--budget", "0"])
    assert "time is up in the dense training" in capsys.readouterr().out
    train_demo.main(command)
    record = json.loads((out / "fashion_mnist.json").read_text())
    assert record["images"] == {"train": 32, "holdout": 32, "test": 32}
    assert len(record["data_sha256"]) == 4
    assert DecompositionPlan.from_dict(record["plan"]).layers == PLAN.layers
    variants = record["variants"]
    assert list(variants) == ["dense", "decomposed", "admm", "direct", "dense, trained on"]
    assert [epoch["phase"] for epoch in variants["admm"]["epochs"]] == ["admm", "finetune"]
    assert {len(variants[name]["epochs"]) for name in ("dense", "admm", "direct", "dense, trained on")} == {2}
    sizes = [(variant["macs"], variant["parameters"]) for variant in variants.values()]
    assert sizes[0] == sizes[4] == (148_169_728, 1_226_442)
    assert sizes[1] == sizes[2] == sizes[3]
    assert sizes[1] < sizes[0]
    x = np.random.default_rng(1).random((3, 1, 28, 28), np.float32)
    for name, layers in (("", 0), ("_tucker", 2), ("_direct", 2)):
        path = out / f"fashion_mnist{name}.onnx"
        session = onnxruntime.InferenceSession(path)
        assert session.run(None, {session.get_inputs()[0].name: x})[0].shape == (3, 10)
        stages = [p.value for n in onnx.load(path).graph.node for p in n.metadata_props if p.key == "tdc.stage"]
        assert stages.count("core") == layers
    DecompositionPlan({"stage2.conv2": (32, 32)}).save(tmp_path / "plan.json")
    with pytest.raises(SystemExit, match="begun with another plan"):
        train_demo.main(command)


def test_the_exported_network_is_read_back(train_demo):
    path = DEMO / "fashion_mnist.onnx"
    net = train_demo.read_onnx(path)
    images = np.load(DEMO / "fashion_mnist_test_1000.npz")["images"][:8, None].astype(np.float32) / 255
    session = onnxruntime.InferenceSession(path)
    expected = session.run(None, {session.get_inputs()[0].name: images})[0]
    with torch.no_grad():
        np.testing.assert_allclose(net(torch.from_numpy(images)).numpy(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("weights", "error"), [("{model}", "is not the demo's network"), ("none.onnx", "cannot read the model none.onnx")]
)
def test_other_weights_are_refused(train_demo, model_path, tmp_path, monkeypatch, weights, error):
    monkeypatch.setenv("TVM_NUM_THREADS", "1")  # restored after the test
    with pytest.raises(SystemExit, match=error):
        train_demo.main(["plan", "--weights", weights.format(model=model_path), "-o", str(tmp_path / "plan.json")])


def test_the_plan_is_for_a_stated_processor(train_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TVM_NUM_THREADS", "1")  # restored after the test
    train_demo.main(["plan", "-o", str(tmp_path / "plan.json"), "--device", "haswell", "--threads", "3"])
    assert "on haswell x 3, fp32" in capsys.readouterr().out
    choice = json.loads((tmp_path / "plan_choice.json").read_text())
    assert choice["device"] == "haswell x 3"
    assert choice["totals"]["speedup"] >= 3
    chosen = {layer["name"] for layer in choice["layers"] if layer["ranks"]}
    assert set(DecompositionPlan.load(tmp_path / "plan.json").layers) == chosen


def test_the_plan_in_the_repository_fits_the_network(train_demo):
    plan = DecompositionPlan.load(DEMO / "plan.json")
    _, report = apply_plan(train_demo.DemoNet(), plan, example=(1, 1, 28, 28))
    choice = json.loads((DEMO / "plan_choice.json").read_text())
    assert report.macs == (choice["totals"]["dense_macs"], choice["totals"]["macs"])
