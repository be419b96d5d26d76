"""The demo's networks: a residual CNN trained on Fashion-MNIST, and its Tucker form, trained by ADMM.

    python scripts/train_demo.py plan                                   # ranks by latency: scripts/demo/plan.json
    python scripts/train_demo.py train --data FOLDER [--budget SECONDS] # train, compress, export, record

The first step needs TVM, but no data and no GPU; the second needs neither TVM nor an installation of this package,
and the same command continues what ran out of time.  ``--smoke`` shows on a CPU that everything works.

The ranks are for the CPU that most users of the demo have: four cores with AVX2.  For one image of 28 x 28 pixels an
H100 is no help: there the model expects no ranks to make any of the network's layers 15 % faster.  ``--device H100``
tells.  They are chosen from the weights of the ONNX file that is there, in which batch normalisation is folded into
the kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan
from tdc_tvm.training import apply_plan, compress
from tdc_tvm.training.admm import AdmmConfig
from tdc_tvm.training.batches import make_batches, seed_all
from tdc_tvm.training.compression import write_json
from tdc_tvm.training.config import CompressConfig, DataConfig, PhaseConfig, RunConfig
from tdc_tvm.training.data import read_dataset
from tdc_tvm.training.evaluation import evaluate
from tdc_tvm.training.hooi import decompose_kernels
from tdc_tvm.training.runs import export
from tdc_tvm.training.trainer import Trainer, make_accelerator

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "scripts" / "demo"
DEBIAN_DATA = Path("/usr/share/datasets/fashion-mnist")
# Mean and standard deviation of the training pixels, scaled to 0..1.
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530
SHAPE = (1, 1, 28, 28)
# All for the same epochs; "dense" is the original, trained on.
METHODS = {"admm": "fashion_mnist_tucker.onnx", "direct": "fashion_mnist_direct.onnx", "dense": None}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first carries the stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, h, w) to (batch, out_channels, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DemoNet(nn.Module):
    """1.2 million parameters; images of values 0..1, shape (batch, 1, 28, 28), to 10 logits.

    ``tdc plan`` takes it as ``scripts.train_demo:DemoNet``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        self.stage1 = Block(64, 64, stride=1)
        self.stage2 = Block(64, 128, stride=2)
        self.stage3 = Block(128, 256, stride=2)
        self.fc = nn.Linear(256, 10)
        nn.init.zeros_(self.stage1.bn2.weight)  # residual branches start as the identity

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify a batch of images."""
        x = (x - PIXEL_MEAN) / PIXEL_STD
        x = F.relu(self.bn(self.stem(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))


def read_onnx(path: Path) -> DemoNet:
    """Read an exported network back; batch normalisation, which is folded into the kernels, only adds the bias."""
    from tdc_tvm.onnx_model import load_onnx

    weights = load_onnx(path).graph.initializer
    tensors = {weight.name: torch.from_numpy(numpy_helper.to_array(weight).copy()) for weight in weights}
    net = DemoNet().eval()
    state = net.state_dict()
    try:
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d):
                norm = name.replace("stem", "bn").replace("conv", "bn").replace("shortcut.0", "shortcut.1")
                state[f"{name}.weight"] = tensors[f"{name}.weight"]
                state[f"{norm}.weight"].fill_(math.sqrt(1 + net.get_submodule(norm).eps))
                state[f"{norm}.bias"] = tensors[f"{name}.weight_bias"]
        net.load_state_dict(state | {name: tensors[name] for name in ("fc.weight", "fc.bias")})
    except (KeyError, RuntimeError) as error:
        raise TdcError(f"{path} is not the demo's network as this script exports it: {error}") from None
    return net


def plan(args: argparse.Namespace) -> None:
    os.environ["TVM_NUM_THREADS"] = str(args.threads)
    from rich.console import Console
    from tvm.target import Target

    from tdc_tvm.schedules.device import GPUS
    from tdc_tvm.training import choose_ranks

    device = args.device if args.device in GPUS else Target({"kind": "llvm", "mcpu": args.device})
    choice = choose_ranks(read_onnx(args.weights), SHAPE, device, speedup=args.speedup)
    Console().print(choice)
    choice.plan.save(args.output)
    record = {
        "command": command(args),
        "weights_sha256": {args.weights.name: sha256(args.weights)},
        **choice.to_dict(),
    }
    write_json(args.output.with_name(f"{args.output.stem}_choice.json"), record)
    print(f"wrote {args.output} and, with all predictions, {args.output.stem}_choice.json")


def train(args: argparse.Namespace) -> None:
    deadline = None if args.budget is None else time.monotonic() + args.budget
    ranks = DecompositionPlan.load(args.plan)
    gpu = args.device == "auto" and torch.cuda.is_available()
    run = RunConfig(seed=args.seed, device=args.device, precision="bf16" if gpu else "fp32", tensorboard=False)
    # The network itself normalises.
    config = DataConfig(
        "fashion-mnist", str(args.data), batch_size=512, eval_batch_size=1000, holdout=5000, padding=2, erase=0.5,
        mean=[0.0], std=[1.0],
    )  # fmt: skip
    dense_phase = PhaseConfig(epochs=args.epochs, lr=0.2, warmup_epochs=5)
    # Two of them: as many epochs again.
    half = PhaseConfig(epochs=args.epochs // 2, lr=0.05)
    options = CompressConfig(
        admm=AdmmConfig(projection_interval=50),
        admm_phase=replace(half, final_lr=0.1),
        finetune=replace(half, distill_weight=0.5),
    )
    if args.smoke:
        config = replace(config, batch_size=16, eval_batch_size=32, holdout=32)
        options = replace(options, admm=AdmmConfig(projection_interval=1), recalibration_batches=2)
    dataset = read_dataset(config)
    if args.smoke:
        splits = {name: getattr(dataset, name).subset(np.arange(32)) for name in ("train", "holdout", "val")}
        dataset = replace(dataset, **splits)
    accelerator = make_accelerator(run)
    torch.backends.cudnn.allow_tf32 = False  # evaluation in true FP32
    loader = make_batches(dataset.train, dataset, config, train=True, seed=args.seed, device=accelerator.device)
    holdout, test = (
        make_batches(split, dataset, config, train=False, device=accelerator.device)
        for split in (dataset.holdout, dataset.val)
    )
    info = {"classes": 10, "channels": 1, "image_size": SHAPE[-1], "mean": config.mean, "std": config.std}
    guard_plan(ranks, args.work)
    args.output.mkdir(parents=True, exist_ok=True)
    variants: dict[str, Any] = {}

    def add(name: str, model: nn.Module, macs: int, epochs: Sequence[dict], file: str | None, **more: Any) -> None:
        """Evaluate a network on images that it has not seen, and export it."""
        scores = {"holdout": evaluate(model, holdout), "test": evaluate(model, test)}
        variants[name] = {
            **{part: score.to_dict() for part, score in scores.items()},
            "macs": macs,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "train_seconds": sum(epoch["train_seconds"] for epoch in epochs),
            **more,
            "epochs": epochs,
        }
        if file is not None:
            export(model, info, args.output / file)
            variants[name]["onnx_sha256"] = {file: sha256(args.output / file)}
        print(f"{name}: {scores['test'].top1:.2%} of {scores['test'].count:,} test images", file=sys.stderr)

    seed_all(args.seed)
    dense = DemoNet()
    trainer = Trainer(
        dense, loader, dense_phase, run, accelerator, title="train", folder=args.work / "train",
        parts={"holdout": holdout}, info=info, resume=True, deadline=deadline,
    )  # fmt: skip
    result = trainer.fit()
    if not result.finished:
        return print("time is up in the dense training; the same command continues")
    dense.eval()
    factors = decompose_kernels(dense, ranks)
    decomposed, report = apply_plan(dense, ranks, factors=factors, example=SHAPE)
    assert report.macs is not None
    add("dense", dense, report.macs[0], result.history, "fashion_mnist.onnx")
    add("decomposed", decomposed, report.macs[1], [], None)
    for method, file in METHODS.items():
        model, history = compress(
            dense, loader, ranks, holdout_loader=holdout, config=replace(options, method=method), run=run,
            folder=args.work / method, resume=True, deadline=deadline, info=info,
        )  # fmt: skip
        if not history.finished:
            return print(f"time is up in {method}; the same command continues")
        name = "dense, trained on" if method == "dense" else method
        more = {"decomposition": history.decomposition} if history.decomposition else {}
        add(name, model, report.macs[method != "dense"], history.epochs, file, **more)
    record = {
        "command": command(args),
        "options": {
            "data": asdict(replace(config, root="")),
            "train": asdict(dense_phase),
            "compress": asdict(options),
            "run": asdict(run),
        },
        "environment": environment(accelerator.device),
        "data_sha256": {path.name: sha256(path) for path in sorted(args.data.rglob("*-ubyte.gz"))},
        "images": {"train": len(dataset.train), "holdout": len(dataset.holdout), "test": len(dataset.val)},
        "plan": ranks.to_dict(),
        "variants": variants,
    }
    write_json(args.output / "fashion_mnist.json", record)
    print(f"wrote fashion_mnist.json and three ONNX files to {args.output}")


def guard_plan(ranks: DecompositionPlan, work: Path) -> None:
    """Let no run go on that another plan has begun.

    Raises
    ------
    TdcError
        If one has.
    """
    for method in METHODS:
        begun = work / method / "plan.json"
        if begun.is_file() and DecompositionPlan.load(begun).layers != ranks.layers:
            raise TdcError(f"{work / method} was begun with another plan; choose another folder with --work")


def command(args: argparse.Namespace) -> list[str]:
    """The command line, without the folders of this machine."""
    return ["scripts/train_demo.py", *(Path(word).name if "/" in word else word for word in args.words)]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def environment(device: torch.device) -> dict[str, str]:
    """What the figures depend on besides the command."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "numpy": np.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cuda": str(torch.version.cuda) if cuda else "",
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "",
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("plan", help="choose ranks by latency; needs TVM")
    first.add_argument("--weights", type=Path, default=DEMO / "fashion_mnist.onnx", help="the dense network")
    first.add_argument("--device", default="x86-64-v3", help="LLVM's name of a processor, or a GPU such as H100")
    first.add_argument(
        "--threads", type=int, choices=range(1, 257), default=4, metavar="N", help="cores of the processor"
    )
    first.add_argument("--speedup", type=float, default=3.0, help="predicted, of the whole network")
    first.add_argument("-o", "--output", type=Path, default=DEMO / "plan.json")
    second = commands.add_parser("train", help="train, compress and export; needs no TVM")
    second.add_argument("--plan", type=Path, default=DEMO / "plan.json")
    second.add_argument("--data", type=Path, default=DEBIAN_DATA, help="folder of Fashion-MNIST's four *-ubyte.gz")
    second.add_argument("--epochs", type=int, default=60, help="of the dense network; of each compression as many")
    second.add_argument("--seed", type=int, default=0)
    second.add_argument("--budget", type=float, help="seconds after which to stop, with a checkpoint")
    second.add_argument("--device", choices=["auto", "cpu"], default="auto")
    second.add_argument("--work", type=Path, help="folder of checkpoints, by default build/train_demo")
    second.add_argument("-o", "--output", type=Path, help="folder of ONNX files and record, by default scripts/demo")
    second.add_argument("--smoke", action="store_true", help="two epochs of 32 images, by default in build/smoke")
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    if args.command == "train":
        if args.smoke:
            args.epochs = 2
        args.work = args.work or ROOT / "build" / ("smoke" if args.smoke else "train_demo")
        args.output = args.output or (args.work if args.smoke else DEMO)
    try:
        (plan if args.command == "plan" else train)(args)
    except TdcError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
