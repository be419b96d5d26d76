"""Time whole networks on a GPU: ours, and PyTorch with cuDNN in a CUDA graph, on the Tucker model and on the original.

The steps can run on different machines::

    python scripts/bench_models.py build OUTDIR --precision fp16 --models resnet18    # no GPU needed
    python scripts/bench_models.py run OUTDIR -o models.jsonl    # NumPy, PyTorch, torchvision and TVM's runtime
    python scripts/bench_models.py report models.jsonl           # no GPU needed

Times are of one call within a CUDA graph of several, after another replay of that graph, all contenders in turns.
cuDNN is the best of two layouts, in benchmark mode.  Weights are random signs, so that libraries pack well; all
models compute with the same.
"""

from __future__ import annotations

import argparse
import lzma
import math
import sys
import tempfile
import zlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_layers
import build_layers
import gpu_check
import gpu_layers
import numpy as np
from gpu_layers import Contender, Gpu

if TYPE_CHECKING:
    from torch import nn

MODELS = ("resnet18", "resnet50", "vgg16_bn", "densenet121", "densenet201")
# Calls in a graph.
CALLS = 5
# Rows of a matrix before they repeat, if it has more elements than that.
_ROWS, _MANY = 32, 1 << 22


def make_model(name: str, is_tucker: bool) -> nn.Module:
    """One of torchvision's networks, or its Tucker form at TDC's ranks, with random signs for weights.

    The same on every machine: they come from NumPy, by the weights' names.
    """
    import torch
    import torchvision

    from tdc_tvm.training.decompose import apply_plan

    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None).eval()
        if is_tucker:
            model, _ = apply_plan(model, name)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            rng = np.random.default_rng(zlib.crc32(key.encode()))
            if tensor.ndim > 1:
                # The rows of large matrices repeat, that libraries pack well.
                rows = min(len(tensor), _ROWS) if tensor.numel() > _MANY else len(tensor)
                signs = rng.integers(0, 2, (rows, *tensor.shape[1:]), np.int8) * 2.0 - 1
                signs = signs[np.arange(len(tensor)) % rows]
                # Between a Tucker layer's stages is no ReLU that takes half of the power away.
                gain = 1 if key.endswith((".reduce.weight", ".core.weight")) else 2
                tensor.copy_(torch.from_numpy(signs * math.sqrt(gain / np.prod(tensor.shape[1:]))))
            elif key.endswith(("running_var", "weight")):
                tensor.fill_(1.0)
            elif tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(rng.integers(-4, 5, tuple(tensor.shape)) / 32.0))
            else:
                tensor.fill_(0)
    return model


def build(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile the networks and write the manifest."""
    import tvm

    import tdc_tvm
    from tdc_tvm.training import export_onnx

    device = gpu_check.device_of(arguments.arch)
    gpu_check.begin_build(folder)
    layers: dict[str, dict[str, Any]] = {}
    kernels: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.models:
            for form in arguments.forms:
                for batch in arguments.batch:
                    key, extents = f"{name}-{form}-{batch}", (batch, 3, 224, 224)
                    path, library = Path(temporary, "model.onnx"), Path(temporary, "model.so")
                    export_onnx(make_model(name, form == "tucker"), extents, path)
                    compiled = tdc_tvm.build(path, arguments.arch, arguments.precision, verify=False)
                    compiled.export_library(library)
                    (folder / f"{key}.so.xz").write_bytes(lzma.compress(library.read_bytes(), preset=3))
                    report = compiled.report.to_dict()
                    layers[key] = {
                        "text": f"{name} {form}, batch {batch}",
                        "groups": [name],
                        "precision": arguments.precision,
                        "x": extents,
                        "network": name,
                        "form": form,
                        "batch": batch,
                        "macs": report["macs"],
                    }
                    predicted_us = sum(layer["predicted_latency_us"] or 0.0 for layer in report["layers"])
                    built = {"build_seconds": report["build_seconds"], "predicted_us": predicted_us}
                    kernels.append({"name": key, "layer": key, "library": f"{key}.so.xz", "config": {}, **built})
                    print(f"{key}: {report['build_seconds']:.1f} s", file=sys.stderr, flush=True)
    np.savez_compressed(folder / gpu_layers.CONSTANTS)
    built_with = {
        "tdc_tvm": tdc_tvm.__version__,
        "tvm": tvm.__version__,
        "schedules_sha256": build_layers.source_digest(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    manifest = {"precision": arguments.precision, "device": device.name, "built_with": built_with}
    manifest |= {"layers": layers, "kernels": kernels}
    gpu_check.end_build(folder, manifest)
    return manifest


def cudnn(gpu: Gpu, name: str, is_tucker: bool, x: Any) -> list[Contender]:
    """PyTorch's network in both layouts, batch normalisations folded into convolutions."""
    import torch
    from torch.fx.experimental.optimization import fuse

    contenders = []
    for layout in ("nchw", "nhwc"):
        memory = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        model = fuse(make_model(name, is_tucker)).to(gpu.device, gpu.dtype, memory_format=memory)
        data = [x.to(gpu.dtype).contiguous(memory_format=memory)]
        contenders.append(Contender(layout, data, lambda data, net=model: net(data[0])))
    return contenders


def measure(gpu: Gpu, kernel: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Check one network, then time it beside cuDNN on the same network and on the original.

    Raises
    ------
    ArithmeticError
        If the result is wrong.
    """
    import torch
    import tvm
    import tvm.runtime.vm

    layer = gpu.layers[kernel["layer"]]
    main = tvm.runtime.vm.VirtualMachine(gpu.library(kernel["library"]), tvm.cuda(0))["main"]
    generator = torch.Generator(gpu.device).manual_seed(0)
    x = torch.randn(layer["x"], generator=generator, device=gpu.device)
    ours = Contender("ours", [x], lambda data: main(data[0]))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = make_model(layer["network"], layer["form"] == "tucker").to(gpu.device).double()(x.double())
    out = ours.launch(ours.data).double()
    error = float((out - expected).norm() / expected.norm())
    if not error <= 20 * gpu.precision.tolerance(64):
        raise ArithmeticError(f"wrong result: relative error {error:.2e}")
    agree = float((out.argmax(1) == expected.argmax(1)).double().mean())
    result: dict[str, Any] = {"error_norm": error, "top1_agreement": agree, "kernels": launched(ours)}
    finalists, forms = [ours], {"tucker": True, "original": False}
    for name, is_tucker in forms.items():
        found = {contender.name: contender for contender in cudnn(gpu, layer["network"], is_tucker, x)}
        times = gpu_layers.alternate(gpu, list(found.values()), CALLS, seconds / 4, most=10)
        best = min(times, key=lambda one: times[one]["median_us"])
        finalists.append(Contender(name, found[best].data, found[best].launch))
        result[f"best_{name}"] = best
    result["warm"] = gpu_layers.alternate(gpu, finalists, CALLS, seconds)
    return result


def launched(contender: Contender) -> list[tuple[str, float, float]]:
    """The kernels of one call, when each began and how long it ran, in microseconds; some wait for the one before."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        contender.launch(contender.data)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        contender.launch(contender.data)
        torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    start = events[0].time_range.start
    return [
        (event.name, round(event.time_range.start - start, 2), round(event.time_range.elapsed_us(), 2))
        for event in events
    ]


def report(records: Sequence[dict[str, Any]]) -> None:
    """Print a table of networks."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    columns = (
        "ours\nus",
        "cuDNN\ntucker",
        "cuDNN\noriginal",
        "tucker/\nours",
        "orig/\nours",
        "kernels",
        "error",
        "build s",
    )
    table = bench_layers.make_table("Networks: us of a call", ("network", "precision"), columns)
    for record in records:
        if "environment" in record:
            continue
        shape = record["shape"]
        if "warm" not in record:
            table.add_row(shape["text"], shape["precision"], "failed")
            console.print(f"failed: {shape['text']}: {record.get('error', '')[:300]}", markup=False, highlight=False)
            continue
        ours, tucker, original = (record["warm"][name]["median_us"] for name in ("ours", "tucker", "original"))
        table.add_row(
            shape["text"],
            shape["precision"],
            *(f"{value:.1f}" for value in (ours, tucker, original)),
            f"{tucker / ours:.2f}",
            f"{original / ours:.2f}",
            str(len(record["kernels"])),
            f"{record['error_norm']:.1e}",
            f"{record['build_seconds']:.0f}",
        )
    console.print(table)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build_command = commands.add_parser("build", help="compile; needs no GPU")
    build_command.add_argument("folder", type=Path)
    build_command.add_argument("--precision", choices=list(gpu_layers.PRECISIONS), default="fp32")
    build_command.add_argument("--arch", default="sm_90", help=gpu_check.ARCH_HELP)
    build_command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    build_command.add_argument("--forms", nargs="+", choices=("tucker", "original"), default=["tucker"])
    build_command.add_argument("--batch", nargs="+", type=bench_layers.at_least(1), default=[1])
    bench_layers.add_run_options(commands.add_parser("run", help="check and time them, and cuDNN"))
    report_command = commands.add_parser("report", help="print a table")
    report_command.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "run":
        return bench_layers.run_command(arguments, Path(__file__), measure)
    if arguments.command == "build":
        build(arguments.folder, arguments)
        return 0
    report(gpu_layers.read_results(arguments.results))
    return 0


if __name__ == "__main__":
    sys.exit(gpu_check.exit_status(main))
