"""Time whole networks on a GPU: ours, and on the Tucker model and on the original PyTorch and TVM's default pipeline.

The steps can run on different machines::

    python scripts/bench_models.py build OUTDIR --precision fp16 --models resnet18    # no GPU needed
    python scripts/bench_models.py run OUTDIR -o models.jsonl    # NumPy, PyTorch, torchvision and TVM's runtime
    python scripts/bench_models.py report models.jsonl --plot models.png    # no GPU needed

Times are of one call within a CUDA graph of several, after another replay of that graph, all contenders in turns, a
process for each network.  cuDNN is the best of two layouts, in benchmark mode.  What no graph of ours can hold, PyTorch
by itself (eager) and ``torch.compile``, is timed by the host's clock, a call at a time, and so is our graph beside
them.  Weights are random signs, so that libraries pack well; all models compute with the same.  Memory is that of
weights, of what lies between kernels, and of outputs.  The floor of ours is `network_floor`'s, of the GPU built for.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import lzma
import math
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_layers
import gpu_check
import gpu_layers
import numpy as np
import report_models
from gpu_layers import Contender, Gpu
from report_models import FORMS

if TYPE_CHECKING:
    from torch import nn

MODELS = ("resnet18", "resnet50", "vgg16_bn", "densenet121", "densenet201")
# What torch.compile calls its ways.
MODES = {"compile": "reduce-overhead", "max-autotune": "max-autotune"}
CONTENDERS = ("cudnn", "eager", *MODES, "tvm")
# Calls in a graph.
CALLS = 5
# Rows of a matrix before they repeat, if it has more elements than that.
_ROWS, _MANY = 32, 1 << 22


def make_model(name: str, is_tucker: bool) -> nn.Module:
    """One of torchvision's networks, or its Tucker form at TDC's ranks, with random signs for weights.

    The same on every machine: they come from NumPy, by the weights' names.
    """
    return copy.deepcopy(_make_model(name, is_tucker))


@functools.lru_cache(maxsize=2)
def _make_model(name: str, is_tucker: bool) -> nn.Module:
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
    """Compile the networks and write the manifest.

    Raises
    ------
    SystemExit
        If a baseline does not compute in the precision.
    """
    import network_floor
    import tvm

    import tdc_tvm
    from tdc_tvm.schedules.digest import source_digest
    from tdc_tvm.targets import resolve_target
    from tdc_tvm.training import export_onnx

    device = gpu_check.device_of(arguments.arch)
    if arguments.baselines and arguments.precision != "fp32":
        raise SystemExit("TVM's default pipeline is built in fp32 alone; leave out --baselines, or build fp32")
    gpu_check.begin_build(folder)
    target = resolve_target(arguments.arch)
    layers: dict[str, dict[str, Any]] = {}
    kernels: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        library = Path(temporary, "model.so")

        def pack(key: str) -> str:
            (folder / f"{key}.so.xz").write_bytes(lzma.compress(library.read_bytes(), preset=3))
            return f"{key}.so.xz"

        for name, batch in itertools.product(arguments.models, arguments.batch):
            extents = (batch, 3, 224, 224)
            models = {form: Path(temporary, f"{form}.onnx") for form in FORMS}
            for form in FORMS if arguments.baselines else arguments.forms:
                export_onnx(make_model(name, form == "tucker"), extents, models[form])
            baselines = {}
            for form in FORMS if arguments.baselines else ():
                built = build_baseline(models[form], target, library)
                baselines[form] = {"library": pack(f"{name}-{form}-{batch}-tvm")} | built
                print(f"{name}-{form}-{batch}, TVM: {built['build_seconds']:.1f} s", file=sys.stderr, flush=True)
            for form in arguments.forms:
                key = f"{name}-{form}-{batch}"
                compiled = tdc_tvm.build(models[form], target, arguments.precision, verify=False)
                compiled.export_library(library)
                report = compiled.report.to_dict()
                launches, peak_bytes = network_floor.analyse(models[form], target, arguments.precision)
                floor = network_floor.floor(launches, device, peak_bytes)
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
                kernels.append(
                    {
                        "name": key,
                        "layer": key,
                        "library": pack(key),
                        "config": {},
                        "build_seconds": report["build_seconds"],
                        "predicted_us": sum(layer["predicted_latency_us"] or 0.0 for layer in report["layers"]),
                        "peak_bytes": peak_bytes,
                        "floor_of": device.name,
                        "floor_us": round(sum(one["floor_us"] for one in floor), 3),
                        "floor": floor,
                        "baselines": baselines,
                    }
                )
                print(f"{key}: {report['build_seconds']:.1f} s", file=sys.stderr, flush=True)
    np.savez_compressed(folder / gpu_layers.CONSTANTS)
    built_with = {
        "tdc_tvm": tdc_tvm.__version__,
        "tvm": tvm.__version__,
        "schedules_sha256": source_digest(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    manifest = {"precision": arguments.precision, "device": device.name, "built_with": built_with}
    manifest |= {"layers": layers, "kernels": kernels}
    gpu_check.end_build(folder, manifest)
    return manifest


def build_baseline(model: Path, target: Any, library: Path) -> dict[str, Any]:
    """Compile a model by TVM's default pipeline; how long it took, and its memory."""
    import network_floor

    from tdc_tvm.bench import build_default
    from tdc_tvm.onnx_model import load_onnx

    start = time.perf_counter()
    executable, mod = build_default(load_onnx(model), target)
    executable.export_library(str(library))
    return {
        "build_seconds": time.perf_counter() - start,
        "peak_bytes": network_floor.memory_bytes(mod["main"]),
    }


@dataclass(frozen=True)
class Rival:
    """A contender and the form that it computes.

    Parameters
    ----------
    contender : Contender
        A whole network.
    form : str
        One of `FORMS`.
    clock : str
        One of `report_models.CLOCKS`.
    weights_bytes : int
        Of what takes the rest of its memory from PyTorch.
    peak_bytes : int, optional
        Of anything else: all its memory.
    """

    contender: Contender
    form: str
    clock: str
    weights_bytes: int = 0
    peak_bytes: int | None = None


def load_network(gpu: Gpu, name: str, library: str, x: Any) -> Contender:
    """A network that TVM compiled."""
    import tvm
    import tvm.runtime.vm

    main = tvm.runtime.vm.VirtualMachine(gpu.library(library), tvm.cuda(0))["main"]
    return Contender(name, [x], lambda data: main(data[0]))


def cudnn(gpu: Gpu, name: str, is_tucker: bool, x: Any) -> dict[str, tuple[nn.Module, list[Any]]]:
    """PyTorch's network and its input in both layouts, batch normalisations folded into convolutions."""
    import torch
    from torch.fx.experimental.optimization import fuse

    found = {}
    for layout in ("nchw", "nhwc"):
        memory = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        model = fuse(make_model(name, is_tucker)).to(gpu.device, gpu.dtype, memory_format=memory)
        found[layout] = model, [x.to(gpu.dtype).contiguous(memory_format=memory)]
    return found


def rivals(
    gpu: Gpu, kernel: dict[str, Any], x: Any, seconds: float, wanted: Sequence[str]
) -> Iterator[tuple[Rival, str]]:
    """Those of `CONTENDERS` that are wanted, on both forms, and their layouts: the best one of cuDNN's."""
    import torch

    for form in FORMS:
        if "tvm" in wanted:
            baseline = kernel["baselines"][form]
            network = load_network(gpu, f"tvm_{form}", baseline["library"], x)
            yield Rival(network, form, "warm", peak_bytes=baseline["peak_bytes"]), "nchw"
        if set(wanted) <= {"tvm"}:
            continue

        def call(name: str, net: Callable[[Any], Any], data: list[Any]) -> Contender:
            return Contender(name, data, lambda given: net(given[0]))

        found = cudnn(gpu, gpu.layers[kernel["layer"]]["network"], form == "tucker", x)
        layouts = [call(layout, net, data) for layout, (net, data) in found.items()]
        times = gpu_layers.alternate(gpu, layouts, CALLS, seconds / 4, most=10)
        best = min(times, key=lambda one: times[one]["median_us"])
        net, data = found[best]
        weights_bytes = sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
        if "cudnn" in wanted:
            yield Rival(call(form, net, data), form, "warm", weights_bytes), best
        if "eager" in wanted:
            yield Rival(call(f"eager_{form}", net, data), form, "wall", weights_bytes), best
        for name in [name for name in MODES if name in wanted]:
            compiled = torch.compile(net, mode=MODES[name])
            yield Rival(call(f"{name}_{form}", compiled, data), form, "wall", weights_bytes), best


def examine(rival: Rival, expected: Any) -> dict[str, Any]:
    """The error of a contender, its memory besides the input, and how many kernels it launches."""
    import torch

    contender = rival.contender
    # Compiles, or tries cuDNN's algorithms; it is the second call that torch.compile records, and takes memory for.
    contender.launch(contender.data)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = contender.launch(contender.data)
    torch.cuda.synchronize()
    called_bytes = torch.cuda.max_memory_allocated() - before
    peak_bytes = rival.weights_bytes + called_bytes if rival.peak_bytes is None else rival.peak_bytes
    error = float((out.double() - expected).norm() / expected.norm())
    return {"error_norm": error, "peak_bytes": peak_bytes, "kernels": len(launched(contender))}


def measure(gpu: Gpu, kernel: dict[str, Any], seconds: float, wanted: Sequence[str] = ("cudnn",)) -> dict[str, Any]:
    """Check one network, then time it beside what is ``wanted`` of `CONTENDERS` on the same form and on the other.

    A contender that does not run is not timed; the result says why.

    Raises
    ------
    ArithmeticError
        If our result is wrong.
    """
    import torch

    layer = gpu.layers[kernel["layer"]]
    form = layer["form"]
    generator = torch.Generator(gpu.device).manual_seed(0)
    x = torch.randn(layer["x"], generator=generator, device=gpu.device)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        expected = {
            form: make_model(layer["network"], form == "tucker").to(gpu.device).double()(x.double()) for form in FORMS
        }
    ours = load_network(gpu, "ours", kernel["library"], x)
    out = ours.launch(ours.data)
    facts = {"ours": examine(Rival(ours, form, "warm", peak_bytes=kernel["peak_bytes"]), expected[form])}
    error = facts["ours"]["error_norm"]
    if not error <= 20 * gpu.precision.tolerance(64):
        raise ArithmeticError(f"wrong result: relative error {error:.2e}")
    agree = float((out.argmax(1) == expected[form].argmax(1)).double().mean())
    result: dict[str, Any] = {"error_norm": error, "top1_agreement": agree, "kernels": launched(ours), "failed": {}}
    fields: dict[str, list[Contender]] = {"warm": [ours], "wall": []}
    for rival, layout in rivals(gpu, kernel, x, seconds, wanted):
        name = rival.contender.name
        try:
            facts[name] = examine(rival, expected[rival.form])
        except Exception as failure:
            result["failed"][name] = f"{type(failure).__name__}: {failure}"[:1000]
            continue
        facts[name]["layout"] = layout
        fields[rival.clock].append(rival.contender)
    times = {"warm": gpu_layers.alternate(gpu, fields["warm"], CALLS, seconds)}
    if fields["wall"]:
        replay, _ = gpu.capture(ours, 1, cold=False)
        callers = [Contender("ours", [], lambda _: replay()), *fields["wall"]]
        clocks = {caller.name: functools.partial(gpu.call_us, caller) for caller in callers}
        times["wall"] = gpu_layers.take_turns(clocks, seconds)
    return result | {clock: {name: facts[name] | one for name, one in found.items()} for clock, found in times.items()}


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


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build_command = commands.add_parser("build", help="compile; needs no GPU")
    build_command.add_argument("folder", type=Path)
    build_command.add_argument("--precision", choices=list(gpu_layers.PRECISIONS), default="fp32")
    build_command.add_argument("--arch", default="sm_90", help=gpu_check.ARCH_HELP)
    build_command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    build_command.add_argument("--forms", nargs="+", choices=FORMS, default=["tucker"])
    build_command.add_argument("--batch", nargs="+", type=bench_layers.at_least(1), default=[1])
    build_command.add_argument("--baselines", nargs="+", choices=("tvm",), default=[], help="fp32 alone, both forms")
    run_command = commands.add_parser("run", help="check and time them, and others")
    bench_layers.add_run_options(run_command)
    run_command.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["cudnn"])
    # torch.compile takes minutes, and writes nothing meanwhile.
    run_command.set_defaults(stall=600)
    report_command = commands.add_parser("report", help="print tables, draw a plot")
    report_command.add_argument("results", type=Path, nargs="+")
    report_command.add_argument("--plot", type=Path, metavar="FILE.png", help="of all; needs matplotlib")
    arguments = parser.parse_args()
    if arguments.command == "run":
        kernels = gpu_layers.read_manifest(arguments.folder)["kernels"]
        if "tvm" in arguments.contenders and not all(kernel.get("baselines") for kernel in kernels):
            raise SystemExit("this build has nothing of TVM's default pipeline; build again with --baselines tvm")
        timed = functools.partial(measure, wanted=arguments.contenders)
        return bench_layers.run_command(arguments, Path(__file__), timed, most=1)
    if arguments.command == "build":
        build(arguments.folder, arguments)
        return 0
    from rich.console import Console

    records = gpu_layers.read_results(arguments.results)
    if any("name" in record and "network" not in record["shape"] for record in records):
        raise SystemExit("these results are not of networks; run: bench_layers.py report, or oracle.py report")
    if arguments.plot:
        report_models.plot(records, arguments.plot)
    report_models.report(records, Console(width=None if sys.stdout.isatty() else 160))
    return 0


if __name__ == "__main__":
    sys.exit(gpu_check.exit_status(main))
