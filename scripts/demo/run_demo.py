"""The main job on real weights and real images, on this machine, without PyTorch.

A residual CNN trained on Fashion-MNIST, its Tucker form as plain decomposition at compile time makes it, and the one
that ADMM trained, at the same ranks: all are built, verified against ONNX Runtime, and compared on 1,000 test images
that training never saw.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import tdc_tvm
from tdc_tvm.bench import Contender, measure
from tdc_tvm.compiled_model import CompiledModel

HERE = Path(__file__).resolve().parent


def accuracy(compiled: CompiledModel, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images classified rightly; one call per image, as the model is built for batch 1."""
    inputs = images.astype(np.float32)[:, None, None] / 255
    return float(np.mean([compiled.run(x).argmax() == label for x, label in zip(inputs, labels, strict=True)]))


def with_change(value: float, dense: float, form: str) -> str:
    """A figure, and by how much it differs from the dense network's; in points if it is a percentage."""
    change = f"{value - dense:+.1f}" if form.endswith("%") else f"{value / dense - 1:+.0%}"
    return f"{form.format(value)} ({change})"


def comparison(
    models: Mapping[str, CompiledModel], accuracies: Mapping[str, float], latencies_ms: Mapping[str, float]
) -> Table:
    """All networks, the dense one first."""
    caption = (
        "In brackets the change from dense, of accuracy in points. MACs: multiply-adds in convolutions. "
        "Accuracy: on 1,000 test images. Latency: median of 200 calls. All agree with ONNX Runtime."
    )
    table = Table(title="Fashion-MNIST, batch 1", title_justify="left", caption=caption, caption_justify="left")
    for column in ("", "M MACs", "k parameters", "accuracy", "latency, ms"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    rows = {
        name: (
            (model.report.macs / 1e6, "{:.1f}"),
            (model.report.parameters / 1e3, "{:.0f}"),
            (100 * accuracies[name], "{:.1f}%"),
            (latencies_ms[name], "{:.3f}"),
        )
        for name, model in models.items()
    }
    for name, cells in rows.items():
        pairs = zip(cells, rows["dense"], strict=True)
        texts = [
            form.format(value) if name == "dense" else with_change(value, dense, form)
            for (value, form), (dense, _) in pairs
        ]
        table.add_row(name, *texts)
    return table


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", default=str(HERE / "plan.json"),
        help="of the plain decomposition: OUT,IN, an energy in (0, 1), or a plan file; by default ADMM's",
    )  # fmt: skip
    parser.add_argument("--target", default="auto", help="auto, llvm or cuda")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/demo"), help="folder of the libraries")
    args = parser.parse_args()
    console = Console()
    test = np.load(HERE / "fashion_mnist_test_1000.npz")
    args.output.mkdir(parents=True, exist_ok=True)
    dense, trained = HERE / "fashion_mnist.onnx", HERE / "fashion_mnist_tucker.onnx"
    networks = {"dense": (dense, None), "decomposed only": (dense, args.ranks)}
    if trained.is_file():
        networks["trained by ADMM"] = (trained, None)
    models: dict[str, CompiledModel] = {}
    accuracies: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for name, (path, ranks) in networks.items():
            task = progress.add_task(name)

            def show(step: str, name: str = name, task: object = task) -> None:
                progress.update(task, description=f"{name}: {step}")

            models[name] = tdc_tvm.build(path, args.target, decompose=ranks, batch=1, progress=show)
            library = args.output / f"{name.split()[0]}.so"
            models[name].export_library(library)
            show("classifying 1,000 test images")
            accuracies[name] = accuracy(models[name], test["images"], test["labels"])
    results = measure([Contender.of(name, compiled) for name, compiled in models.items()], warmup=20, repeat=200)

    console.print(models[name].report)
    console.print(comparison(models, accuracies, {result.name: result.median_ms for result in results}))
    if trained.is_file():
        scores = json.loads((HERE / "fashion_mnist.json").read_text())["variants"]
        shares = {name: f"{100 * score['test']['top1']:.2f}%" for name, score in scores.items()}
        console.print(
            f"All {scores['dense']['test']['count']:,} test images, as trained: dense {shares['dense']}; "
            f"for as many epochs again: ADMM {shares['admm']}, decomposition and fine-tuning {shares['direct']}, "
            f"dense {shares['dense, trained on']}.",
            highlight=False,
        )
    else:
        console.print(
            f"The network trained by ADMM is missing: {trained.name}. A GPU makes it in minutes:\n"
            "  python scripts/train_demo.py train --data FOLDER",
            highlight=False,
            soft_wrap=True,
        )
    size_mb = library.stat().st_size / 1e6
    console.print(f"\nThe deployable library: {library} ({size_mb:.1f} MB). Use it:", soft_wrap=True)
    console.print(
        f"  {os.path.relpath(sys.executable)} -c \"import numpy as np, tdc_tvm; m = tdc_tvm.load('{library}'); "
        'print(m.run(np.zeros((1, 1, 28, 28), np.float32)))"',
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


if __name__ == "__main__":
    main()
