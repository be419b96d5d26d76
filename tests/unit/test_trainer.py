import errno
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import Ranks
from tdc_tvm.training import TuckerConv2d, compress
from tdc_tvm.training.admm import AdmmConfig
from tdc_tvm.training.checkpoint import load_checkpoint
from tdc_tvm.training.config import CompressConfig, Config, PhaseConfig, RunConfig, from_dict, load_config, save_config
from tdc_tvm.training.evaluation import recalibrate
from tdc_tvm.training.models import create_model, load_weights
from tdc_tvm.training.progress import Progress
from tdc_tvm.training.trainer import Trainer, learning_rate, make_accelerator

RUN = RunConfig(device="cpu", tensorboard=False, log_steps=4)
PLAN = {"1.0": (8, 6), "1.3": (8, 8)}


class Net(nn.Sequential):
    """Three convolutions, normalisation and dropout; 1 x 12 x 12 to 10 classes."""

    def __init__(self):
        def block(inputs, outputs, stride):
            return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        body = nn.Sequential(*block(16, 32, 2), *block(32, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(nn.Sequential(*block(1, 16, 1)), body, nn.Dropout(0.1), nn.Linear(32, 10))


class ReadsAWeight(Net):
    def forward(self, x):
        return super().forward(x) + 0 * self.get_submodule("1.0").weight.sum()


class TwoOutputs(Net):
    def forward(self, x):
        return super().forward(x), x


def samples(count, seed=0):
    """Noisy copies of ten patterns."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 1, 12, 12, generator=generator)
    generator.manual_seed(seed + 1)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return torch.utils.data.TensorDataset(
        patterns[labels] + 1.5 * torch.randn(count, 1, 12, 12, generator=generator), labels
    )


@pytest.fixture(scope="module")
def loader():
    return torch.utils.data.DataLoader(samples(600), 50, shuffle=True)


@pytest.fixture(scope="module")
def val_loader():
    return torch.utils.data.DataLoader(samples(500, 1), 250)


@pytest.fixture(scope="module")
def dense(loader, val_loader):
    """A trained network."""
    torch.manual_seed(0)
    config = CompressConfig("dense", admm_phase=PhaseConfig(0), finetune=PhaseConfig(6, warmup_epochs=0))
    model, history = compress(Net(), loader, PLAN, eval_loader=val_loader, config=config, run=RUN, show=False)
    assert history.epochs[-1]["val_top1"] > 0.95
    return model


def method(name, **admm):
    return CompressConfig(
        name,
        AdmmConfig(**{"rho": 3e-2, "rho_max": 5.0, "projection_interval": 4} | admm),
        PhaseConfig(8, lr=0.1, final_lr=0.2, warmup_epochs=0),
        PhaseConfig(2, lr=0.02, warmup_epochs=0, distill_weight=0.5),
        recalibration_batches=8,
    )


def direct(model, loader, **more):
    """Compression by plain decomposition."""
    return compress(model, loader, PLAN, config=method("direct"), run=RUN, show=False, **more)


def test_admm_truncates_less_and_keeps_more_than_plain_decomposition(dense, loader, val_loader, tmp_path):
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    results = {}
    for name in ("admm", "direct"):
        model, history = compress(
            dense,
            loader,
            PLAN,
            eval_loader=val_loader,
            config=method(name),
            run=RUN,
            folder=tmp_path / name,
            show=False,
        )
        assert isinstance(model[1][0], TuckerConv2d)
        assert history.finished
        assert len(history.epochs) == 10
        results[name] = history
        assert history.decomposition == json.loads((tmp_path / name / "decomposition.json").read_text())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert all(parameter.requires_grad for parameter in dense.parameters())
    errors = {name: history.decomposition["relative_error"] for name, history in results.items()}
    assert all(errors["admm"][layer] < 0.25 * errors["direct"][layer] for layer in PLAN)
    kept = {name: history.decomposition["val_top1_decomposed"] for name, history in results.items()}
    assert kept["admm"] > kept["direct"] + 0.2
    epochs = [epoch for epoch in results["admm"].epochs if epoch["phase"] == "admm"]
    assert epochs[-1]["primal_relative"] < 0.1 < epochs[0]["primal_relative"]
    assert epochs[-1]["dual"] > 0
    assert results["admm"].epochs[-1]["val_top1"] > 0.9
    lines = (tmp_path / "admm" / "admm" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == epochs


def test_epochs_that_admm_does_not_need_go_to_fine_tuning(dense, loader):
    config = method("admm", relative_tolerance=100.0)
    _, history = compress(dense, loader, PLAN, config=config, run=RUN, show=False)
    assert [epoch["phase"] for epoch in history.epochs] == ["admm"] + ["finetune"] * 9


def test_tucker_from_scratch_learns_and_dense_stays_dense(dense, loader, val_loader):
    config = replace(method("scratch"), finetune=PhaseConfig(6, warmup_epochs=0))
    model, history = compress(dense, loader, PLAN, eval_loader=val_loader, config=config, run=RUN, show=False)
    assert isinstance(model[1][3], TuckerConv2d)
    assert history.epochs[0]["val_top1"] < history.epochs[-1]["val_top1"]
    assert history.epochs[-1]["val_top1"] > 0.6


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp32", {"optimizer": "adamw", "lr": 1e-3}),
        ("fp32", {"mixup": 0.2, "clip_norm": 1.0}),
        ("bf16", {"ema_decay": 0.9}),
    ],
)
def test_a_stopped_phase_continues_bit_for_bit(loader, tmp_path, options, precision):
    """Stopped after every checkpoint, of which there are several in an epoch."""
    run = replace(RUN, precision=precision, checkpoint_steps=5, channels_last="mixup" not in options)
    phase = PhaseConfig(**{"epochs": 2, "lr": 0.05} | options)

    def trainer(folder, resume=False):
        torch.manual_seed(0)
        from tdc_tvm.training.batches import LoaderBatches

        batches = LoaderBatches(loader, "cpu")
        batches.classes = 10
        ranks = {name: Ranks(*pair) for name, pair in PLAN.items()}
        admm = (ranks, AdmmConfig(projection_interval=3))
        return Trainer(
            Net(),
            batches,
            phase,
            run,
            make_accelerator(run),
            folder=folder,
            parts={"val": batches},
            admm=admm,
            resume=resume,
            show=False,
        )

    whole = trainer(tmp_path / "whole")
    whole.fit()

    class StopError(Exception):
        pass

    stops = 0
    while True:
        part = trainer(tmp_path / "parts", resume=True)
        save = part._save_state

        def save_and_stop(save=save, part=part):
            save()
            if not part.finished:
                raise StopError

        part._save_state = save_and_stop
        try:
            part.fit()
        except StopError:
            stops += 1
            continue
        break
    assert stops == 5
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name]), name
    files = ("model.safetensors", "best.safetensors")
    for name in files:
        ours, theirs = (load_checkpoint(tmp_path / folder / name)[0] for folder in ("whole", "parts"))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    drop = ("train_seconds", "images_per_s", "update_seconds")
    histories = [[{k: v for k, v in e.items() if k not in drop} for e in t.history] for t in (whole, part)]
    assert histories[0] == histories[1]


KILLED = """
import os, random, signal, sys, time, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, {tests!r})
import accelerate, safetensors.torch, torch, torch._dynamo
from dataclasses import replace
from pathlib import Path
from test_trainer import Net, PLAN, RUN, method, samples
from tdc_tvm.training import compress
from tdc_tvm.training.checkpoint import load_checkpoint

def train(folder):
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(samples(600), 50, shuffle=True)
    config = replace(method("admm"), admm_phase=replace(method("admm").admm_phase, epochs=2))
    run = replace(RUN, checkpoint_steps=2)
    compress(Net(), loader, PLAN, config=config, run=run, folder=folder, resume=True, show=False)

def checkpoints(folder):
    found = set()
    for path in Path(folder).rglob("last.safetensors"):
        try:
            found.add(path.stat().st_ino)
        except FileNotFoundError:
            pass
    return found

def attempt(folder, saves):
    # A child of a process that has computed nothing yet: what OpenMP started would not survive the fork.
    child = os.fork()
    if not child:
        try:
            train(folder)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if saves is not None:
        seen, end = checkpoints(folder), time.monotonic() + 60
        while saves and time.monotonic() < end:
            now = checkpoints(folder)
            saves -= now != seen
            seen = now
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "training failed"
    return os.WIFEXITED(status)

random.seed(0)
attempt({whole!r}, None)
within = 0
for saves in (3, 4, 3):
    assert not attempt({parts!r}, saves), "the run ended before it was killed"
    states = [load_checkpoint(path)[1] for path in Path({parts!r}).rglob("last.safetensors")]
    within += any(state["step"] for state in states)
assert within, "the run was never killed within an epoch"
attempt({parts!r}, None)
"""


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    """SIGKILL at random moments: all that a run leaves behind is whole."""
    script = KILLED.format(
        tests=str(Path(__file__).parent), whole=str(tmp_path / "whole"), parts=str(tmp_path / "parts")
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for name in ("admm/model.safetensors", "finetune/model.safetensors"):
        ours, theirs = (load_checkpoint(tmp_path / folder / name)[0] for folder in ("whole", "parts"))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


class Bomb(Net):
    """Its first layer's gradient becomes infinite in its last call of an epoch, when the loss is still right."""

    calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == 24:
            next(self.parameters()).register_hook(lambda gradient: gradient * torch.inf)
        return super().forward(x)


class Diverging(Net):
    """Its logits become NaN after some calls in training."""

    calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * (torch.nan if self.calls > 18 else 1.0)


def fit(model, loader, folder=None, phase=None, **options):
    from tdc_tvm.training.batches import LoaderBatches

    phase = phase or PhaseConfig(3)
    return Trainer(
        model, LoaderBatches(loader, "cpu"), phase, RUN, make_accelerator(RUN), folder=folder, show=False, **options
    ).fit()


def test_a_loss_that_is_not_finite_stops_the_run_and_the_checkpoint_stays(loader, tmp_path):
    with pytest.raises(TdcError, match=r"loss became nan by step 8 of epoch 2.*last good checkpoint is .*last\.safe"):
        fit(Diverging(), loader, tmp_path)
    tensors, data = load_checkpoint(tmp_path / "last.safetensors")
    assert data["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


def test_weights_that_are_not_finite_are_never_saved(loader, tmp_path):
    with pytest.raises(TdcError, match="weights became NaN or infinite by step 12 of epoch 2"):
        fit(Bomb(), loader, tmp_path)
    for name in ("last", "best"):
        path = tmp_path / f"{name}.safetensors"
        assert not path.exists() or all(t.isfinite().all() for t in load_checkpoint(path)[0].values())


def test_a_full_disk_leaves_the_old_checkpoint(loader, tmp_path, monkeypatch):
    fit(Net(), loader, tmp_path, PhaseConfig(1))
    before = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    (tmp_path / "more").mkdir()
    for path, content in before.items():
        (tmp_path / "more" / path.name).write_bytes(content)

    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TdcError, match="no space left"):
        fit(Net(), loader, tmp_path / "new", PhaseConfig(2))
    assert not list((tmp_path / "new").glob("*.safetensors"))
    from tdc_tvm.training.checkpoint import save_checkpoint

    with pytest.raises(TdcError, match="no space left"):
        save_checkpoint(tmp_path / "more" / "last.safetensors", {"a": torch.zeros(9)}, {})
    assert all((tmp_path / "more" / path.name).read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda loader, path: compress(Net(), loader, {"layer1.0.conv1": (8, 8)}), "does not have: 'layer1.0.conv1'"),
        (lambda loader, path: compress(Net(), loader, "resnet18"), "preset resnet18 names 16 layer"),
        (lambda loader, path: compress(Net(), loader, {"1.0": (64, 8)}), "rank_out of layer '1.0' is 64"),
        (
            lambda loader, path: fit(nn.Sequential(nn.Flatten(), nn.Linear(144, 5)), loader),
            "5 outputs, the data a label 9",
        ),
        (lambda loader, path: fit(nn.Sequential(nn.Conv2d(1, 9, 3)), loader), "expected logits of shape"),
        (
            lambda loader, path: direct(TwoOutputs(), loader, eval_loader=loader),
            "the model gives a tuple; expected log",
        ),
        (lambda loader, path: direct(ReadsAWeight(), loader), "'TuckerConv2d' object has no attribute 'weight'"),
        (lambda loader, path: direct(Net(), loader, teacher=TwoOutputs()), "the teacher gives a tuple"),
        (
            lambda loader, path: direct(Net(), loader, teacher=nn.Sequential(nn.Flatten(), nn.Linear(144, 7))),
            "the teacher has 7 outputs, the data 10 classes",
        ),
        (
            lambda loader, path: fit(Net(), [(torch.zeros(4, 3, 12, 12), torch.zeros(4))]),
            "labels of type torch.float32",
        ),
        (
            lambda loader, path: fit(Net(), [(torch.zeros(4, 3, 12, 12), torch.arange(4))]),
            r"does not run on inputs of shape \(4, 3, 12, 12\)",
        ),
        (lambda loader, path: fit(Net(), [(torch.zeros(1, 1, 12, 12), torch.tensor([-1]))]), "the data a label -1"),
        (lambda loader, path: fit(nn.Flatten(), loader), "no parameters to train"),
        (lambda loader, path: fit(Net(), loader, phase=PhaseConfig(1, distill_weight=0.5)), "needs a teacher"),
        (lambda loader, path: fit(Net(), loader, phase=PhaseConfig(1, mixup=0.5)), "mixup needs the number of classes"),
        (lambda loader, path: [fit(Net(), loader, path, PhaseConfig(1)) for _ in range(2)], "holds a run already"),
        (
            lambda loader, path: [fit(Net(), loader, path, PhaseConfig(1, lr=lr), resume=True) for lr in (0.1, 0.2)],
            r"another configuration \(they differ in phase.lr\)",
        ),
        (lambda loader, path: fit(Net(), loader, "/proc/none"), "cannot make the folder /proc/none"),
        (lambda loader, path: load_weights(Net(), path / "none.safetensors"), "cannot read the checkpoint"),
    ],
)
def test_mistakes(loader, tmp_path, call, message):
    with pytest.raises(TdcError, match=message):
        call(loader, tmp_path)


def test_a_folder_of_another_run_stays_as_it_is(loader, tmp_path):
    config = replace(method("direct"), admm_phase=PhaseConfig(0), finetune=PhaseConfig(1))
    fine = {"config": config, "run": RUN, "folder": tmp_path, "show": False}
    compress(Net(), loader, PLAN, **fine)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = {"1.0": (8, 8)}
    for plan, more, message in (
        (other, {}, "holds a run already"),
        (other, {"resume": True}, "holds a run with other ranks"),
        (
            PLAN,
            {"resume": True, "config": replace(config, method="dense")},
            "a run of another method than dense, or has lost a phase: found",
        ),
        (PLAN, {"resume": True, "config": replace(config, method="admm")}, "a run of another method than admm"),
    ):
        with pytest.raises(TdcError, match=message):
            compress(Net(), loader, plan, **(fine | more))
    model = Net()
    model[1].append(nn.Linear(32, 32))
    with pytest.raises(TdcError, match=r"last\.safetensors does not fit Net"):
        compress(model, loader, PLAN, **(fine | {"resume": True}))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_networks_with_other_kinds_of_convolutions(loader):
    volume = nn.Sequential(nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 2, 3, padding=1), nn.Flatten(1, 2))
    grouped = nn.Conv2d(16, 16, 3, groups=4)
    model = nn.Sequential(
        volume, nn.Conv2d(2, 16, 3), grouped, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    config = replace(method("admm"), admm_phase=PhaseConfig(1), finetune=PhaseConfig(1, ema_decay=0.9))
    tucker, _ = compress(model, loader, {"1": (8, 2)}, config=config, run=replace(RUN, precision="fp16"), show=False)
    assert isinstance(tucker[1], TuckerConv2d)
    assert isinstance(tucker[2], nn.Conv2d)


def test_a_deadline_stops_between_epochs_and_the_run_continues(loader, tmp_path, monkeypatch):
    assert fit(Net(), loader, tmp_path, deadline=time.monotonic() - 1).epochs_run == 0
    # After the first epoch, whose length it is told, the phase finds that it is late.
    monkeypatch.setattr(Trainer, "_late", lambda self, seconds: seconds > 0)
    result = fit(Net(), loader, tmp_path)
    monkeypatch.undo()
    assert (result.finished, result.epochs_run) == (False, 1)
    result = fit(Net(), loader, tmp_path, resume=True)
    assert (result.finished, result.epochs_run) == (True, 3)
    again = fit(Net(), loader, tmp_path, resume=True)
    assert (again.finished, again.history) == (True, result.history)


def test_recalibration_takes_the_mean_of_its_batches():
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.Dropout(0.5)).eval()
    images = torch.randn(3, 8, 2, 4, 4)
    from tdc_tvm.training.batches import LoaderBatches

    batches = LoaderBatches([(x, torch.zeros(8, dtype=torch.long)) for x in images], "cpu")
    recalibrate(model, batches, 2)
    torch.testing.assert_close(model[0].running_mean, images[:2].mean((0, 1, 3, 4)))
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(dim=1) for x in images[:2]])
    torch.testing.assert_close(model[0].running_var, variances.mean(0))
    assert (model[0].momentum, model[0].training) == (0.3, False)


def test_the_rate_warms_up_and_falls_along_a_cosine():
    phase = PhaseConfig(10, lr=0.4, warmup_epochs=2, final_lr=0.25)
    rates = [learning_rate(phase, step, 10) for step in range(100)]
    assert np.argmax(rates) in (19, 20)
    assert rates[20] == pytest.approx(0.4)
    assert rates[60] == pytest.approx(0.25, rel=1e-6)
    assert rates[-1] == pytest.approx(0.1, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "size", "stem"), [("resnet18", 16, "conv1"), ("densenet121", 32, "features.conv0"), ("vgg11_bn", 32, None)]
)
def test_models_for_small_images(name, size, stem):
    from tdc_tvm.training.config import ModelConfig

    with torch.device("meta"):
        model = create_model(ModelConfig(name, small_images=True), 7, channels=1)
        assert model(torch.empty(2, 1, size, size)).shape == (2, 7)
    if stem is not None:
        assert model.get_submodule(stem).kernel_size == (3, 3)
    with pytest.raises(TdcError, match="no form for small images"):
        create_model(ModelConfig("alexnet", small_images=True), 7)
    with pytest.raises(TdcError, match="no model 'resnet17'"):
        create_model(ModelConfig("resnet17"), 7)


def test_configurations_come_back_from_their_files_and_mistakes_are_named(tmp_path):
    config = from_dict(Config, {"data": {"name": "cifar10", "mean": [0, 0.5, 1]}, "train": {"lr": "1e-3"}}, "here")
    assert (config.train.lr, config.data.mean) == (1e-3, [0.0, 0.5, 1.0])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    for data, message in (
        ({"trian": {}}, "unknown key 'trian' .did you mean 'train'"),
        ({"train": {"epochs": "many"}}, "'epochs' of 'train' of here is 'many'; expected int"),
        ({"train": {"lr": "fast"}}, "expected float"),
        ({"data": 3}, "'data' of here is a int"),
        ({"run": {"precision": "int8"}}, "precision is 'int8'"),
        ({"compress": {"method": "magic"}}, "method is 'magic'"),
        ({"train": {"momentum": 1}}, "momentum is 1; expected 0 to below 1"),
        ({"train": {"label_smoothing": 2}}, "label_smoothing is 2; expected 0 to 1"),
        ({"train": {"mixup": -0.1}}, "mixup is -0.1; expected 0 or more"),
        ({"train": {"clip_norm": 0}}, "clip_norm is 0; expected more than 0"),
        ({"data": {"image_size": 0}}, "image_size is 0; expected 1 or more"),
        ({"data": {"workers": -1}}, "workers is -1; expected 0 or more"),
        ({"run": {"seed": -1}}, "seed is -1; expected 0 or more"),
    ):
        with pytest.raises(TdcError, match=message):
            from_dict(Config, data, "here")
    (tmp_path / "part.yaml").write_text("data:\ncompress: {admm: , finetune: {epochs: 3}}")
    mine = load_config(tmp_path / "part.yaml", config)
    assert mine.compress.finetune == replace(config.compress.finetune, epochs=3)
    assert replace(mine, compress=config.compress) == config
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(TdcError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_an_epochs_line_tells_of_images_left_out(capsys):
    record = {"phase": "train", "epoch": 1, "step": 4, "train_loss": 0.5, "skipped_images": 2, "val_loss": 9.0}
    Progress("train", 4, done=4).epoch(record, 3)
    assert capsys.readouterr().err == "train 1/3: train_loss 0.5, skipped_images 2\n"


def test_a_bar_ends_with_no_time_left(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    bar = Progress("train", 2)
    bar._bar.tasks[0].start_time -= 9
    for _ in range(2):
        bar.step()
    bar.close()
    assert "2/2 0:00:09 left: 0:00:00" in shown.getvalue()
