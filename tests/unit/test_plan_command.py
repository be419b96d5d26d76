"""``tdc plan``, as a newcomer meets it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tdc_tvm import cli
from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan
from tdc_tvm.plan_command import load_network
from tdc_tvm.schedules.shape import Conv2dShape
from tdc_tvm.training.conv_calls import conv_calls
from tdc_tvm.training.latency_table import LatencyTable, LayerLatencies

MODULE = """
from torch import nn

def net(classes=2):
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))

def three():
    return 3

constant = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with a module of models, and images of two classes."""
    image = pytest.importorskip("PIL.Image", reason="images need torchvision's Pillow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    (tmp_path / "own_models.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
            image.fromarray(pixels).save(tmp_path / "images" / "train" / name / f"{i}.png")
    return tmp_path


def tdc_plan(*arguments, width=100):
    console = (cli.console.width, cli.messages.width)
    cli.console.width = cli.messages.width = width
    try:
        command = ["plan", *map(str, arguments)]
        result = CliRunner().invoke(cli.main, command, catch_exceptions=False, env={"COLUMNS": "200"})
    finally:
        cli.console.width, cli.messages.width = console
    assert result.exit_code == 0, result.output
    return result.stdout


OWN = ("own_models:net", "--device", "H100", "--precision", "tf32", "--input", "3x16x16", "-o", "plan.json")


def test_the_main_job(folder):
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in load_network(OWN[0], None)[0].state_dict().items()}}, "w.pt"
    )
    arguments = (*OWN, "--max-error", "0.5", "--theta", "0", "--weights", "w.pt", "--root", "images", "--batch", 64)
    text = tdc_plan(*arguments, "--table", "table.json", "--macs-plan", "macs.json", "--pareto", "front.html")
    assert "convolutions of own_models:net on H100, tf32" in text
    assert "expected increase of the loss" in text
    assert "by MACs, same error" in text
    assert text.rstrip().endswith("wrote plan.json\nwrote macs.json\nwrote table.json\nwrote front.html")
    written = DecompositionPlan.load("plan.json")
    assert set(written.layers) == {"2"}
    assert set(DecompositionPlan.load("macs.json").layers) == {"2"}
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "front.html", "macs.json", "own_models.py", "plan.json", "table.json", "w.pt",
    ]  # fmt: skip

    assert "wrote table.json" not in tdc_plan(*arguments, "--table", "table.json")
    data = json.loads(tdc_plan(*arguments, "--table", "table.json", "--json"))
    assert data["totals"]["error"] <= 0.5
    assert {layer["name"]: tuple(layer["ranks"].values()) for layer in data["layers"] if layer["ranks"]} == {
        name: tuple(ranks) for name, ranks in written.layers.items()
    }
    assert data["same_error"]["by_latency"]["latency_us"] <= data["totals"]["latency_us"] * (1 + 1e-9)
    assert data["output"] == "plan.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "found no budget; give exactly one of"),
        (("--speedup", 2, "--latency-us", 3), "found latency_us and speedup"),
        (("--speedup", 9), "cannot be reached: the least predicted is"),
        (("--mac-reduction", "0.99"), r"99.0% fewer MACs cannot be reached: 0.0% is the most"),
        (("--speedup", 2, "--device", "H1"), "no device 'H1'"),
        (("--speedup", 2, "--input", "224x224"), "cannot read the input '224x224'; expected channels"),
        (("--mac-reduction", "0.99", "--objective", "macs"), r"reached: 80\.6% is the most; ask for fewer"),
        (("--speedup", 2, "--input", "1x16x16", "--root", "images"), "images are 3x16x16, the input is 1x16x16"),
        (("--speedup", 2, "--root", "nowhere"), "the data set's folder nowhere does not exist"),
        (("--speedup", 2, "--data", "imagefolder"), r"the data set's folder \(none given\) does not exist"),
        (("--speedup", 2, "--output", "plan.txt"), r"a plan ends in .json or .yaml or .yml; found 'plan.txt'"),
        (("--speedup", 2, "--pareto", "front.pdf"), "a front ends in .png or .html"),
        (("--speedup", 2, "--table", "own_models.py"), "own_models.py is not valid JSON"),
        (("--speedup", 2, "--table", "old_plan.json"), "old_plan.json is no table of latencies"),
        (("--speedup", 2, "--macs-plan", "plan.json"), "plan.json would be lost"),
        (("--speedup", 2, "--weights", "DEFAULT"), "torchvision's weights 'DEFAULT' are for its models"),
        (("--speedup", 2, "--weights", "none.pt"), "cannot read the checkpoint none.pt: No such file"),
        (("--speedup", 2, "--weights", "own_models.py"), "own_models.py is no checkpoint of tensors alone"),
    ],
)
def test_mistakes_leave_nothing_behind(folder, arguments, message):
    DecompositionPlan({"2": (8, 8)}).save("old_plan.json")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(TdcError, match=message):
        tdc_plan(*OWN, *arguments)
    assert [name for name in sorted(path.name for path in folder.iterdir()) if name != "__pycache__"] == before


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet81", None, r"torchvision has no model 'resnet81' for classification \(did you mean .*resnet18"),
        ("runs/dense", None, "there is no runs/dense; expected the folder or a checkpoint of 'tdc train'"),
        ("net.pt", None, "net.pt is no checkpoint of 'tdc train'"),
        ("resnet18", "IMAGENET", "no weights 'IMAGENET' for resnet18; there are IMAGENET1K_V1, DEFAULT"),
        ("nowhere.models:net", None, "cannot import 'nowhere.models'"),
        ("own_models:nat", None, "the module own_models has no function 'nat'"),
        ("own_models:constant", None, "has no function 'constant'"),
        ("own_models:three", None, "own_models:three gives a int; expected a torch.nn.Module"),
    ],
)
def test_models_that_are_not_there(folder, name, weights, message):
    with pytest.raises(TdcError, match=message):
        load_network(name, weights)


def test_checkpoints_that_do_not_fit(folder):
    torch.save(nn.Linear(2, 2).state_dict(), "other.pt")
    with pytest.raises(TdcError, match=r"other.pt does not fit Sequential: 8 tensors are missing, left over"):
        load_network("own_models:net", "other.pt")
    torch.save([1, 2], "list.pt")
    with pytest.raises(TdcError, match=r"list.pt is no checkpoint of tensors alone"):
        load_network("own_models:net", "list.pt")


def test_a_run_says_what_it_takes(folder):
    from tdc_tvm.training.checkpoint import save_checkpoint
    from tdc_tvm.training.config import Config, DataConfig, ModelConfig, save_config
    from tdc_tvm.training.models import create_model

    model = create_model(ModelConfig("resnet18", small_images=True), classes=2)
    info = {"model": {"name": "resnet18", "small_images": True}, "classes": 2, "channels": 3, "image_size": 16,
            "mean": [0.5] * 3, "std": [0.25] * 3}  # fmt: skip
    (folder / "run").mkdir()
    save_checkpoint("run/model.safetensors", model.state_dict(), info)
    save_config(Config(DataConfig("imagefolder", "images", image_size=16, workers=0)), "run/config.yaml")
    table = LatencyTable("H100", "fp32", "made up")
    convs = conv_calls(model, (1, 3, 16, 16), "fp32")[0]
    shapes = {Conv2dShape(1, 1, 1, 512, 2), *(shape for calls in convs.values() for shape in calls)}
    table.layers = {shape: LayerLatencies(1.0) for shape in shapes}
    table.save("table.json")
    options = (
        "--device",
        "H100",
        "--max-error",
        1,
        "--table",
        "table.json",
        "--data",
        "imagefolder",
        "-o",
        "plan.json",
    )
    for path in ("run/", "run/model.safetensors"):
        text = tdc_plan(path, *options)
        assert f"ranks for 0 of 20 convolutions of {path} on H100" in text
        assert "expected increase of the loss" in text
        assert "random weights" not in text
    with pytest.raises(TdcError, match="has weights of its own; leave --weights out"):
        tdc_plan("run/", *options, "--weights", "DEFAULT")
    with pytest.raises(TdcError, match="images are 3x32x32, the input is 3x16x16"):
        tdc_plan("run/", *options, "--data", "arrays", "--root", arrays_of(folder / "arrays", 32))
    save_checkpoint("run/model.safetensors", model.state_dict(), info | {"plan": {"format_version": 1, "layers": {}}})
    with pytest.raises(TdcError, match="run/ is compressed already"):
        tdc_plan("run/", *options)


def arrays_of(folder, size):
    from tdc_tvm.training.data import Arrays, save_arrays

    folder.mkdir()
    save_arrays(folder / "train.npz", Arrays(np.zeros((4, size, size, 3), np.uint8), np.arange(4) % 2), "ab")
    return folder


def test_damaged_images_and_foreign_classes_are_named(folder):
    images = folder / "images" / "train"
    (images / "cat" / "0.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(TdcError, match=r"1 of 6 images cannot be read: images/train/cat/0.png"):
        tdc_plan(*OWN, "--max-error", 1, "--root", "images")
    assert not (folder / "plan.json").exists()
    tdc_plan(*OWN, "--max-error", 1, "--root", "images", "--skip-corrupt")
    (images / "owl").mkdir()
    (images / "dog" / "0.png").rename(images / "owl" / "0.png")
    with pytest.raises(TdcError, match="the data have 3 classes, the model has 2 classes"):
        tdc_plan(*OWN, "--max-error", 1, "--root", "images", "--skip-corrupt")


def test_a_mistake_is_one_message_and_exit_status_1(folder):
    command = [sys.executable, "-c", "from tdc_tvm.cli import app; app()", "plan", *OWN]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "80"})
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: found no budget; give exactly one of")
    assert "Traceback" not in result.stderr
