"""Build times of the five CNNs and their latency on this CPU beside ONNX Runtime, original and compressed.

Also each distinct Tucker layer of ResNet-18: our fused operator beside the three convolutions as
TVM compiles them by itself.  Results go to a JSON file with every sample; nothing here is a test.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import tvm
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

import tdc_tvm
from tdc_tvm.bench import Contender, Latency, measure, onnxruntime_contender
from tdc_tvm.cli import environment
from tdc_tvm.files import write_atomic
from tdc_tvm.plan import preset_plan

HERE = Path(__file__).resolve().parent
NETWORKS = ("resnet18", "resnet50", "vgg16_bn", "densenet121", "densenet201")
# ResNet-18's distinct Tucker layers at TDC's ranks: channels in and out, ranks in and out, input extent, stride.
LAYERS = (
    (64, 64, 64, 32, 56, 1), (64, 64, 32, 32, 56, 1), (64, 128, 64, 64, 56, 2), (128, 128, 96, 64, 28, 1),
    (128, 256, 96, 96, 28, 2), (256, 256, 128, 96, 14, 1), (256, 512, 160, 160, 14, 2), (512, 512, 192, 160, 7, 1),
)  # fmt: skip


def network(name: str, compressed: bool, folder: Path) -> Path:
    """Export a torchvision network with seeded random weights."""
    import torch
    import torchvision

    from tdc_tvm.training import apply_plan, export_onnx

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    if compressed:
        # Latency does not depend on the weights' values, so the factors are not computed.
        model, _ = apply_plan(model, preset_plan(name))
    path = folder / f"{name}{'_tucker' if compressed else ''}.onnx"
    export_onnx(model, (1, 3, 224, 224), path, verify=False)
    return path


def tucker_layer(shape: tuple[int, int, int, int, int, int]) -> onnx.ModelProto:
    """One Tucker layer as three ONNX convolutions."""
    channels, outputs, rank_in, rank_out, extent, stride = shape
    rng = np.random.default_rng(0)

    def weight(name: str, *dims: int) -> onnx.TensorProto:
        return numpy_helper.from_array(
            (rng.standard_normal(dims) / np.sqrt(np.prod(dims[1:]))).astype(np.float32), name
        )

    weights = [
        weight("a", rank_in, channels, 1, 1), weight("b", rank_out, rank_in, 3, 3), weight("c", outputs, rank_out, 1, 1)
    ]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["u"], name="reduce"),
        helper.make_node("Conv", ["u", "b"], ["v"], name="core", pads=[1, 1, 1, 1], strides=[stride, stride]),
        helper.make_node("Conv", ["v", "c"], ["y"], name="expand"),
    ]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, channels, extent, extent])
    out_extent = extent // stride
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, outputs, out_extent, out_extent])
    graph = helper.make_graph(nodes, "layer", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def tvm_by_itself(model: onnx.ModelProto) -> Contender:
    """The model through TVM's own default CPU pipeline, tuned to this machine's instructions."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    with target:
        executable = relax.build(from_onnx(model), target, relax_pipeline=relax.get_default_pipeline(target))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    dims = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = tvm.runtime.tensor(np.random.default_rng(0).standard_normal(dims).astype(np.float32))
    return Contender("TVM, three convolutions", lambda: machine["main"](x))


def ratio(ours: Latency, other: Latency) -> float:
    """How many times longer ours takes."""
    return ours.median_ms / other.median_ms


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "cpu.json")
    args = parser.parse_args()
    console = Console()
    record: dict = {
        "command": ["scripts/bench_cpu.py", *(a for a in sys.argv[1:] if "/" not in a)],
        "environment": environment(),
    }
    for name in ("platform", "cuda compiler"):
        record["environment"].pop(name)
    record["networks"], record["layers"] = [], []

    table = Table("network", "build s", "ours ms", "ONNX Runtime ms", "ours / ORT", title="CPU, FP32, batch 1")
    with console.status("networks"):
        for name in args.networks:
            for compressed in (False, True):
                folder = Path(".") / "build" / "bench"
                folder.mkdir(parents=True, exist_ok=True)
                path = network(name, compressed, folder)
                start = time.perf_counter()
                compiled = tdc_tvm.build(path, "llvm", atol=0, rtol=1e-4)
                seconds = time.perf_counter() - start
                contenders = [Contender.of("tdc_tvm", compiled), onnxruntime_contender("ONNX Runtime", path, compiled)]
                ours, theirs = measure(contenders, repeat=args.repeat)
                label = f"{name}{', Tucker' if compressed else ''}"
                row = (
                    label,
                    f"{seconds:.1f}",
                    f"{ours.median_ms:.2f}",
                    f"{theirs.median_ms:.2f}",
                    f"{ratio(ours, theirs):.2f}",
                )
                table.add_row(*row)
                record["networks"].append(
                    {
                        "network": name,
                        "compressed": compressed,
                        "build_and_verify_seconds": seconds,
                        "max_error": compiled.report.verification.max_error,
                        "results": [ours.to_dict(), theirs.to_dict()],
                    }
                )
                path.unlink()
    console.print(table)

    table = Table("C, N, D1, D2, H, stride", "ours us", "TVM us", "TVM / ours", title="Tucker layers of ResNet-18")
    with console.status("layers"):
        for shape in LAYERS:
            model = tucker_layer(shape)
            ours, theirs = measure(
                [Contender.of("tdc_tvm, fused", tdc_tvm.build(model, "llvm")), tvm_by_itself(model)], repeat=args.repeat
            )
            speedup = 1 / ratio(ours, theirs)
            table.add_row(str(shape), f"{ours.median_ms * 1e3:.0f}", f"{theirs.median_ms * 1e3:.0f}", f"{speedup:.1f}")
            record["layers"].append({"shape": shape, "results": [ours.to_dict(), theirs.to_dict()]})
    console.print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(args.output) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
