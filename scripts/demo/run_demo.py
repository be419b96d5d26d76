"""The main job on real weights and real images, on this machine, without PyTorch.

A residual CNN trained on Fashion-MNIST is decomposed at compile time; original and compressed are
built, verified against ONNX Runtime, and compared on 1,000 test images that training never saw.
"""

from __future__ import annotations

import argparse
import os
import sys
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


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="0.95", help="ranks OUT,IN, an energy in (0, 1), or a plan file")
    parser.add_argument("--target", default="auto", help="auto, llvm or cuda")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/demo"), help="folder of the two libraries")
    args = parser.parse_args()
    console = Console()
    test = np.load(HERE / "fashion_mnist_test_1000.npz")
    args.output.mkdir(parents=True, exist_ok=True)
    models: dict[str, CompiledModel] = {}
    accuracies: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for name, ranks in (("original", None), ("compressed", args.ranks)):
            task = progress.add_task(name)

            def show(step: str, name: str = name, task: object = task) -> None:
                progress.update(task, description=f"{name}: {step}")

            models[name] = tdc_tvm.build(
                HERE / "fashion_mnist.onnx", args.target, decompose=ranks, batch=1, progress=show
            )
            models[name].export_library(args.output / f"{name}.so")
            show("classifying 1,000 test images")
            accuracies[name] = accuracy(models[name], test["images"], test["labels"])
    results = measure([Contender.of(name, compiled) for name, compiled in models.items()], warmup=20, repeat=200)
    latency = {result.name: result.median_ms for result in results}

    console.print(models["compressed"].report)
    table = Table(title="Fashion-MNIST, batch 1", title_justify="left")
    for column in ("", *models, "change"):
        table.add_column(column, justify="right" if column else "left")
    for label, form, values in (
        ("M multiply-adds in convolutions", "{:.1f}", {name: m.report.macs / 1e6 for name, m in models.items()}),
        ("parameters (thousands)", "{:.0f}", {name: m.report.parameters / 1e3 for name, m in models.items()}),
        ("test accuracy, %", "{:.1f}", {name: 100 * value for name, value in accuracies.items()}),
        ("latency, ms (median of 200)", "{:.3f}", latency),
    ):
        before, after = values["original"], values["compressed"]
        points = label.startswith("test accuracy")
        change = f"{after - before:+.1f} points" if points else f"{after / before - 1:+.0%}"
        table.add_row(label, form.format(before), form.format(after), change)
    console.print(table)
    console.print("The compressed model is decomposed only, not fine-tuned: the accuracy it loses is shown as it is.")
    library = args.output / "compressed.so"
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
