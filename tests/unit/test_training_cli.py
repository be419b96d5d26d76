import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tdc_tvm import cli
from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan
from tdc_tvm.training import load_model
from tdc_tvm.training.config import load_config
from tdc_tvm.training.data import Arrays, load_arrays, save_arrays

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
data: {name: arrays, batch_size: 16, eval_batch_size: 40, holdout: 8}
model: {name: squeezenet1_1}
train: {epochs: 1, lr: 0.02}
compress:
  admm: {projection_interval: 1}
  admm_phase: {epochs: 1}
  finetune: {epochs: 1, distill_weight: 0.5}
  recalibration_batches: 1
run: {device: cpu, tensorboard: false}
"""
PLAN = DecompositionPlan({"features.3.expand3x3": (16, 8), "features.12.expand3x3": (64, 32)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration, a plan and a data set of 32 x 32 pixels."""
    root = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 20)):
        labels = np.arange(count) % 4
        images = (rng.integers(0, 100, (count, 32, 32, 3)) + 40 * labels[:, None, None, None]).astype(np.uint8)
        save_arrays(root / f"{part}.npz", Arrays(images, labels), "abcd")
    (root / "config.yaml").write_text(CONFIG)
    PLAN.save(root / "plan.json")
    return root


def call(*arguments, error=None):
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if error is not None:
        assert isinstance(result.exception, TdcError), result.output
        assert error in str(result.exception)
        return None
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_train_compress_evaluate(folder, monkeypatch):
    dense, tucker = folder / "dense", folder / "tucker"
    call("train", "-c", folder / "config.yaml", "--root", folder, "--seed", 3, "-o", dense)
    text = call("train", "-c", folder / "config.yaml", "--root", folder, "--seed", 3, "-o", dense, "--resume", "--json")
    assert json.loads(text)["finished"] is True
    call("train", "-c", folder / "config.yaml", "--root", folder, "-o", dense, error="holds a run already")
    before = (dense / "config.yaml").read_bytes()
    for more in (("--set", "data.augment=none"), ("--model", "alexnet"), ("-c", folder / "config.yaml", "--seed", 4)):
        call("train", "-o", dense, "--resume", "--root", folder, *more, error="another configuration (they differ in")
    assert (dense / "config.yaml").read_bytes() == before
    call("compress", dense, "-r", "resnet50", "-o", folder / "wrong", error="names 16 layer(s) that the model does not")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        call("compress", dense, "-r", folder / "plan.json", "-o", tucker, error="ONNX export needs onnxscript")
    call("compress", dense, "-r", folder / "plan.json", "-o", dense, error="the trained network lies there")
    (folder / "more.yaml").write_text("compress: {recalibration_batches: 2}\ndata: {eval_batch_size: 20}")
    more = ("-c", folder / "more.yaml")
    result = json.loads(call("compress", dense, "-r", folder / "plan.json", *more, "-o", tucker, "--json"))
    ours, theirs = load_config(tucker / "config.yaml"), load_config(dense / "config.yaml")
    assert ours.compress == replace(theirs.compress, recalibration_batches=2)
    assert ours.data == replace(theirs.data, eval_batch_size=20)
    assert json.loads(call("evaluate", dense, *more, "--json"))["val"]["count"] == 20
    assert result["macs"][1] < result["macs"][0]
    for path in (tucker, tucker / "finetune"):
        call("compress", path, "-r", "8,8", "-o", folder / "twice", error="compressed already")
    before = [(tucker / name).read_bytes() for name in ("config.yaml", "plan.json")]
    other = ("compress", dense, "-o", tucker, "--set", "compress.finetune.lr=1")
    call(*other, "-r", "8,8", error="holds a run already")
    call(*other, "-r", "8,8", "--resume", error="another configuration (they differ in compress.finetune.lr)")
    call("compress", dense, "-o", tucker, "-r", "8,8", "--resume", error="holds a run with other ranks")
    assert [(tucker / name).read_bytes() for name in ("config.yaml", "plan.json")] == before

    model, info = load_model(tucker / "finetune" / "model.safetensors")
    assert info["plan"] == PLAN.to_dict()
    proto = onnx.load(tucker / "model.onnx")
    properties = {prop.key: json.loads(prop.value) for prop in proto.metadata_props}
    assert properties["tdc.plan"]["layers"] == PLAN.to_dict()["layers"]
    assert properties["tdc.input"]["image_size"] == 32
    scores = [
        json.loads(call("evaluate", path, "--json"))
        for path in (tucker / "finetune" / "model.safetensors", tucker / "model.onnx")
    ]
    for part, count in (("holdout", 8), ("val", 20)):
        assert scores[0][part]["count"] == count
        for key in ("top1", "top5", "loss"):
            assert scores[1][part][key] == pytest.approx(scores[0][part][key], rel=1e-4)
        assert scores[0][part]["top1"] == pytest.approx(result["scores"][part]["top1"])
    assert not model.training

    two = folder / "two"
    two.mkdir()
    arrays, _, _ = load_arrays(folder / "val.npz")
    for part in ("train", "val"):
        save_arrays(two / f"{part}.npz", Arrays(arrays.images, arrays.labels % 2), "ab")
    for path in (tucker / "model.onnx", dense):
        call("evaluate", path, "--root", two, error="the model has 4 outputs, the data 2 classes")


def test_a_budget_ends_a_run_that_resume_continues(folder):
    output = folder / "budget"
    settings = ("-c", folder / "config.yaml", "--root", folder, "-o", output)
    text = call("train", *settings, "--budget", 0)
    assert "--resume continues" in text
    code = "import sys; from tdc_tvm.files import lock_folder\nwith lock_folder(sys.argv[1]): print(); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        call("train", *settings, "--set", "train.lr=0.5", error="another process is at work in")
    assert load_config(output / "config.yaml").train.lr == 0.02
    assert not (output / "model.safetensors").exists()
    (output / ".last.0123456789ab.safetensors").write_bytes(b"as a killed process leaves it")
    call("train", "-o", output, "--resume")
    assert not list(output.glob(".last*"))
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("train", "-o", "{folder}/x", "--data", "svhn"), "no data set named 'svhn'"),
        (("train", "-o", "{folder}/x", "--set", "train.epoch=3"), "unknown key 'epoch' (did you mean 'epochs'?)"),
        (("train", "-o", "{folder}/x", "--set", "epochs"), "expected KEY=VALUE"),
        (("train", "-o", "{folder}/x", "-c", "{folder}/none.yaml"), "cannot read the configuration"),
        (
            (
                "train",
                "-o",
                "{folder}/x",
                "--data",
                "arrays",
                "--root",
                "{folder}",
                "--model",
                "fcn_resnet50",
                "--set",
                "data.batch_size=8",
            ),
            "no model 'fcn_resnet50' for classification",
        ),
        (
            (
                "train",
                "-o",
                "{folder}/x",
                "--data",
                "arrays",
                "--root",
                "{folder}",
                "--model",
                "inception_v3",
                "--set",
                "data.batch_size=8",
            ),
            "does not run on inputs of shape (1, 3, 32, 32)",
        ),
        (("compress", "{folder}/none", "-r", "8,8", "-o", "{folder}/x"), "expected the folder or a checkpoint of"),
        (("compress", "{folder}", "-r", "8,8", "-o", "{folder}/x"), "has no model.safetensors: no run of 'tdc train'"),
        (("evaluate", "{folder}"), "has neither model.safetensors nor model.onnx: no run has ended there"),
        (
            ("compress", "a.onnx", "-r", "8,8", "-o", "b.onnx", "--method", "admm"),
            "--method is for what 'tdc train' wrote",
        ),
        (("evaluate", "{folder}/none.onnx"), "there is no model"),
        (("evaluate", "{folder}/dense/last.safetensors"), "give model.safetensors or best.safetensors beside it"),
    ],
)
def test_mistakes(folder, arguments, error):
    call(*(text.format(folder=folder) for text in arguments), error=error)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packed(tmp_path):
    """Two packed files of four images and one of two."""
    source = tmp_path / "packed"
    source.mkdir()
    (source / "wnids.txt").write_text("n02\nn01\n")
    for name, values in (("train-0", (0, 60)), ("train-1", (120, 180)), ("val", (30, 90))):
        files = []
        for value in values:
            file = io.BytesIO()
            Image.new("RGB", (64, 64), (value, 0, 0)).save(file, "JPEG")
            files.append(np.frombuffer(file.getvalue(), np.uint8))
        offset = np.cumsum([0, *map(len, files)])
        np.savez(source / f"{name}.npz", jpeg=np.concatenate(files), offset=offset, label=np.array([1, 0], np.int16))
    return source


def test_packed_images_become_folders_and_arrays(packed, tmp_path):
    from tdc_tvm.training.config import DataConfig
    from tdc_tvm.training.data import read_dataset

    script = load_script("prepare_tiny_imagenet")
    script.main([str(packed), str(tmp_path / "folders")])
    script.main([str(packed), str(tmp_path / "arrays"), "--arrays"])
    config = DataConfig("tiny-imagenet", str(tmp_path / "folders"), in_memory=True, cache=str(tmp_path / "cache"))
    folders = read_dataset(config)
    arrays = read_dataset(DataConfig("arrays", str(tmp_path / "arrays")))
    assert folders.classes == arrays.classes == ["n02", "n01"]
    for ours, theirs in ((folders.train, arrays.train), (folders.val, arrays.val)):
        assert len(ours) == len(theirs)
        pairs = [sorted(zip(s.images[:, 0, 0, 0].tolist(), s.labels.tolist(), strict=True)) for s in (ours, theirs)]
        assert pairs[0] == pairs[1]
    file = dict(np.load(packed / "val.npz"))
    file["jpeg"] = file["jpeg"][:-1]
    np.savez(packed / "val.npz", **file)
    with pytest.raises(SystemExit, match=r"val\.npz is not consistent"):
        script.main([str(packed), str(tmp_path / "broken")])
    with pytest.raises(SystemExit, match=r"cannot write /proc/none: No such file"):
        script.main([str(packed), "/proc/none"])
    (packed / "val.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(SystemExit, match=r"cannot read .*val\.npz"):
        script.main([str(packed), str(tmp_path / "broken")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "{folder}/none.jsonl"], r"cannot read results from .*none.jsonl: No such file"),
        (["report", "{folder}/torn.jsonl"], r"line 2 of .*torn.jsonl is no result: .*; remove it"),
        (["run", "{folder}/config.yaml", "--plan", "macs=most"], "expected a number, such as macs=0.6"),
        (["run", "{folder}/config.yaml", "--plan", "macs=0.1"], "has results of other ranks than macs=0.1"),
    ],
)
def test_mistakes_with_the_experiment(folder, tmp_path, arguments, message):
    line = json.dumps({"seed": 0, "method": "direct", "plan": PLAN.to_dict()})
    (tmp_path / "results.jsonl").write_text(f"{line}\n")
    (folder / "torn.jsonl").write_text(f"{line}\n{line[:20]}")
    arguments = [text.format(folder=folder) for text in arguments]
    if arguments[0] == "run":
        arguments += ["--data", str(folder), "-o", str(tmp_path)]
    with pytest.raises(SystemExit, match=message):
        load_script("train_tiny_imagenet").main(arguments)


def test_a_uniform_plan_saves_what_is_asked():
    from torchvision.models import resnet18

    from tdc_tvm.training import apply_plan

    script = load_script("train_tiny_imagenet")
    with torch.device("meta"):
        model = resnet18()
    plan = script.uniform_plan(model, (1, 3, 64, 64), 0.6)
    _, report = apply_plan(model, plan, example=(1, 3, 64, 64))
    assert len(plan.layers) == 16
    assert 0.6 <= 1 - report.macs[1] / report.macs[0] < 0.65


def test_the_experiment_imports_no_compiler():
    import subprocess

    code = (
        f"import sys; sys.argv = ['x']; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import train_tiny_imagenet;"
        "bad = {'tvm', 'tensorly', 'typer', 'rich', 'tensorboard'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
