"""Check what lower precisions change on a GPU: a trained network's classes of 1,000 real images, beside ONNX Runtime's.

The halves can run on different machines::

    python scripts/check_precision.py build OUTDIR          # no GPU needed
    python scripts/check_precision.py run OUTDIR -o precision.json

The network is the demo's, in Tucker form; the images are Fashion-MNIST's, which training never saw.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gpu_check
import gpu_layers
import numpy as np

DEMO = Path(__file__).resolve().parent / "demo"
BATCH = 100
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


def build(folder: Path, arch: str, ranks: str) -> None:
    """Compile the network in each precision, and store the images and what ONNX Runtime makes of them."""
    import tdc_tvm
    from tdc_tvm.onnx_decompose import decompose_onnx
    from tdc_tvm.onnx_model import freeze_shapes, load_onnx
    from tdc_tvm.verify import reference_outputs

    test = np.load(DEMO / "fashion_mnist_test_1000.npz")
    images = test["images"].astype(np.float32)[:, None] / 255
    model = load_onnx(DEMO / "fashion_mnist.onnx")
    freeze_shapes(model, batch=BATCH)
    decompose_onnx(model, ranks)
    gpu_check.device_of(arch)
    gpu_check.begin_build(folder)
    name = model.graph.input[0].name
    logits = [reference_outputs(model, {name: part})[0] for part in np.split(images, len(images) // BATCH)]
    np.savez_compressed(
        folder / "images.npz", images=test["images"], labels=test["labels"], logits=np.concatenate(logits)
    )
    for precision in PRECISIONS:
        compiled = tdc_tvm.build(model, arch, precision, verify=False)
        compiled.export_library(folder / f"{precision}.so")
    gpu_check.end_build(folder, {"arch": arch, "ranks": ranks, "libraries": [f"{one}.so" for one in PRECISIONS]})


def compare(logits: np.ndarray, expected: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How many images get the class that they should, and the one that the reference gives them; the largest error.

    Parameters
    ----------
    logits, expected : numpy.ndarray
        Shape ``(images, classes)``; ``expected`` in FP32.
    labels : numpy.ndarray
        Shape ``(images,)``.
    """
    classes = logits.argmax(1)
    return {
        "accuracy": float((classes == labels).mean()),
        "same_top1": float((classes == expected.argmax(1)).mean()),
        "relative_error": float(np.abs(logits - expected).max() / np.abs(expected).max()),
    }


def run(folder: Path) -> dict[str, Any]:
    """Classify the images on this machine's GPU."""
    import tvm

    import tdc_tvm

    manifest = gpu_check.read_manifest(folder)
    gpu_check.load_cuda_library()
    data = np.load(folder / "images.npz")
    images = data["images"].astype(np.float32)[:, None] / 255
    results = {"reference": compare(data["logits"], data["logits"], data["labels"])}
    for library in manifest["libraries"]:
        compiled = tdc_tvm.load(folder / library)
        logits = np.concatenate([compiled.run(part) for part in np.split(images, len(images) // BATCH)])
        results[Path(library).stem] = compare(logits, data["logits"], data["labels"])
    environment = {
        "gpu": gpu_layers.gpu_state(),
        "tvm": tvm.__version__,
        "command": " ".join(Path(word).name for word in sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    model = {"model": "scripts/demo/fashion_mnist.onnx", "ranks": manifest["ranks"], "images": len(images)}
    return {"environment": environment} | model | results


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build_command = commands.add_parser("build", help="compile; needs no GPU")
    build_command.add_argument("--arch", default="sm_90", help=gpu_check.ARCH_HELP)
    build_command.add_argument("--ranks", default="0.95", help="energy of the decomposition")
    run_command = commands.add_parser("run", help="classify and compare")
    run_command.add_argument("-o", "--output", type=Path, help="JSON")
    for command in (build_command, run_command):
        command.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "build":
        build(arguments.folder, arguments.arch, arguments.ranks)
        return 0
    results = run(arguments.folder)
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(gpu_check.exit_status(main))
