"""Train the demo's small residual CNN on Fashion-MNIST and export it to ONNX.

The ONNX file takes float32 images of shape (batch, 1, 28, 28) with values from 0 to 1.  Beside it a
JSON record of the run is written.  A GPU takes a few minutes; ``--smoke`` shows on a CPU that
everything works.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
DEBIAN_DATA = Path("/usr/share/datasets/fashion-mnist")
HELD_OUT = 5000
# Mean and standard deviation of the training pixels, scaled to 0..1.
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530
LICENSE = """\
The images in fashion_mnist_test_1000.npz are the first 1,000 of the test set of Fashion-MNIST
(https://github.com/zalandoresearch/fashion-mnist), under this licence:

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


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
    """1.2 million parameters; images of values 0..1, shape (batch, 1, 28, 28), to 10 logits."""

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


@dataclass(frozen=True)
class Data:
    """Images (uint8, count x 28 x 28) and labels (int64) of the two parts, and where they came from."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: dict[str, str]


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of bytes; expected Fashion-MNIST's *-ubyte.gz")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape.astype(int)).copy()


def load_data(folder: Path | None) -> Data:
    """Read Debian's package ``dataset-fashion-mnist``, or any folder with the same files, or ask torchvision."""
    if folder is None and not DEBIAN_DATA.is_dir():
        from torchvision.datasets import FashionMNIST

        cache = Path.home() / ".cache" / "fashion-mnist"
        FashionMNIST(cache, download=True)
        folder = cache / "FashionMNIST" / "raw"
    folder = folder or DEBIAN_DATA
    files = [
        folder / f"{part}-{what}-ubyte.gz" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
    ]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise SystemExit(f"the data set is incomplete: no {', '.join(missing)}")
    images, labels, test_images, test_labels = map(read_idx, files)
    source = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return Data(images, labels.astype(np.int64), test_images, test_labels.astype(np.int64), source)


def write_test_images(data: Data, folder: Path) -> None:
    """Write the demo's test images and their licence."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "fashion_mnist_test_1000.npz",
        images=data.test_images[:1000],
        labels=data.test_labels[:1000].astype(np.uint8),
    )
    (folder / "LICENSE-fashion-mnist").write_text(LICENSE)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to two pixels, mirror half of the images, and blank a random rectangle in half of them.

    Parameters
    ----------
    images : torch.Tensor
        uint8, shape (batch, 28, 28).
    """
    count, size = images.shape[0], images.shape[-1]
    device = images.device

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (count, 1), device=device, generator=generator)

    pixels = torch.arange(size, device=device)
    rows, columns = draw(0, 5) + pixels, draw(0, 5) + pixels
    columns = torch.where(draw(0, 2) == 1, columns.flip(1), columns)
    padded = F.pad(images, (2, 2, 2, 2))
    shifted = padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    top, left, height, width = draw(0, size), draw(0, size), draw(4, 13), draw(4, 13)
    in_rows = (pixels >= top) & (pixels < top + height) & (draw(0, 2) == 1)
    in_columns = (pixels >= left) & (pixels < left + width)
    return shifted.masked_fill(in_rows[:, :, None] & in_columns[:, None, :], 0)


def to_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 (batch, 28, 28) to the network's float input."""
    return images[:, None].float().div(255).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean loss and accuracy, in eval mode and FP32."""
    model.eval()
    logits = torch.cat([model(to_input(batch)) for batch in images.split(1000)])
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return F.cross_entropy(logits, labels).item(), accuracy


def train(model: nn.Module, data: Data, args: argparse.Namespace, console: Console) -> list[dict[str, float]]:
    """Train with SGD and a one-cycle schedule; returns every epoch's figures."""
    device = next(model.parameters()).device
    order = np.random.default_rng(args.seed).permutation(len(data.train_images))
    images = torch.from_numpy(data.train_images[order]).to(device)
    labels = torch.from_numpy(data.train_labels[order]).to(device)
    held_images, held_labels = images[:HELD_OUT], labels[:HELD_OUT]
    images, labels = images[HELD_OUT:], labels[HELD_OUT:]
    if args.smoke:
        images, labels, held_images, held_labels = images[:512], labels[:512], held_images[:256], held_labels[:256]
    steps = math.ceil(len(images) / args.train_batch)
    # No weight decay on biases and batch normalisation.
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        momentum=0.9,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.epochs * steps, pct_start=0.2
    )
    generator = torch.Generator(device).manual_seed(args.seed)
    history = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=args.epochs)
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            model.train()
            loss_sum = torch.zeros((), device=device)
            correct = torch.zeros((), device=device)
            for batch in torch.randperm(len(images), device=device, generator=generator).split(args.train_batch):
                x, y = to_input(augment(images[batch], generator)), labels[batch]
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), y, label_smoothing=0.1)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                loss_sum += loss.detach() * len(batch)
                correct += (logits.argmax(1) == y).sum()
            held_loss, held_accuracy = evaluate(model, held_images, held_labels)
            history.append(
                {
                    "epoch": epoch,
                    "train_loss": loss_sum.item() / len(images),
                    "train_accuracy": correct.item() / len(images),
                    "held_out_loss": held_loss,
                    "held_out_accuracy": held_accuracy,
                    "seconds": time.perf_counter() - start,
                }
            )
            progress.update(bar, advance=1, description=f"held-out accuracy {held_accuracy:.2%}")
    return history


def import_export():
    """The package's ONNX export, from an installation or else from this source tree."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import tdc_tvm

    if importlib.util.find_spec("tdc_tvm.training") is None:
        tdc_tvm.__path__.append(str(ROOT))  # the folders beside tdc_tvm/ are its subpackages
    from tdc_tvm.training.export import export_onnx

    return export_onnx


def environment(device: torch.device) -> dict[str, str]:
    """What the figures depend on besides the command."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "numpy": np.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cuda": torch.version.cuda if cuda else "",
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "",
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    output = ROOT / "scripts/demo/fashion_mnist.onnx"
    parser.add_argument("-o", "--output", type=Path, default=output, help="the ONNX file")
    parser.add_argument("--data", type=Path, help="folder of the four *-ubyte.gz files")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--train-batch", type=int, default=512, help="images per training step")
    parser.add_argument("--lr", type=float, default=0.2, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, help="fixed batch size of the ONNX file; dynamic if absent")
    parser.add_argument("--checkpoint", type=Path, help="also save the PyTorch weights, for fine-tuning, to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="one epoch on 512 images")
    parser.add_argument("--test-images", action="store_true", help="only write the demo's 1,000 test images")
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs, args.train_batch = 1, 64
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    console = Console()
    data = load_data(args.data)
    if args.test_images:
        write_test_images(data, ROOT / "scripts/demo")
        return
    export_onnx = import_export()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # evaluation in true FP32; training runs in BF16
    model = DemoNet().to(device, memory_format=torch.channels_last)
    start = time.perf_counter()
    history = train(model, data, args, console)
    train_seconds = time.perf_counter() - start
    count = 256 if args.smoke else len(data.test_images)
    test_images = torch.from_numpy(data.test_images[:count]).to(device)
    test_labels = torch.from_numpy(data.test_labels[:count]).to(device)
    test_loss, test_accuracy = evaluate(model, test_images, test_labels)
    export_onnx(model, (args.batch or 2, 1, 28, 28), args.output, dynamic_batch=args.batch is None)
    if args.checkpoint:
        torch.save(model.state_dict(), args.checkpoint)
    record = {
        "command": ["scripts/train_demo.py", *(Path(a).name if "/" in a else a for a in argv or sys.argv[1:])],
        "options": {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()},
        "environment": environment(device),
        "data_sha256": data.source,
        "held_out_images": 256 if args.smoke else HELD_OUT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "onnx_sha256": hashlib.sha256(args.output.read_bytes()).hexdigest(),
        "train_seconds": train_seconds,
        "test_images": count,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "epochs": history,
    }
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"test accuracy {test_accuracy:.2%} on {count} images; wrote {args.output} and its .json")


if __name__ == "__main__":
    main()
