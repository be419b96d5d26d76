"""Time our kernels for convolution layers on a GPU, beside cuDNN on the same layer and on the original convolution.

The steps can run on different machines::

    python scripts/bench_layers.py build OUTDIR --gpu H200 --shapes all --batch 1 8 32   # no GPU needed
    python scripts/bench_layers.py run OUTDIR -o results.jsonl    # NumPy, PyTorch and TVM's runtime are enough
    python scripts/bench_layers.py report results.jsonl --plots FOLDER                   # no GPU needed

Times are of one launch within a CUDA graph of many, after another replay of that graph, all contenders in
turns.  Warm launches repeat on the same data; cold ones go round copies of input, weights and output that
exceed the L2 cache by half.  cuDNN is the best of two layouts, with and without its fused bias and ReLU,
and of all the algorithms that its benchmark mode tries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import build_layers
import gpu_check
import gpu_layers
from gpu_layers import Contender, Gpu

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tdc_tvm.schedules.device import DeviceSpec
    from tdc_tvm.schedules.shape import ConvShape

# Input channels, output channels and extent of TDC's 18 core convolutions (Xiang et al., PPoPP 2023).
CORE = (
    (64, 32, 224), (64, 32, 112), (32, 32, 56), (64, 32, 56), (64, 64, 56), (32, 32, 28), (64, 32, 28), (96, 64, 28),
    (160, 96, 28), (192, 96, 28), (32, 32, 14), (64, 32, 14), (128, 96, 14), (192, 96, 14), (32, 32, 7), (64, 32, 7),
    (96, 64, 7), (192, 160, 7),
)  # fmt: skip
NETWORKS = {
    "resnet18": ("resnet18",),
    "vgg16": ("vgg16",),
    "resnet50": ("resnet50",),
    "densenet": ("densenet121", "densenet201"),
}
LAUNCHES = 20


def core_shapes(batch: int) -> Iterator[tuple[ConvShape, str]]:
    """TDC's core convolutions: 3x3, stride 1, same padding."""
    from tdc_tvm.schedules.shape import Conv2dShape

    for channels, outputs, extent in CORE:
        yield Conv2dShape(batch, extent, extent, channels, outputs, (3, 3), padding=(1, 1, 1, 1)), "core"


def network_shapes(name: str, batch: int) -> Iterator[tuple[ConvShape, str]]:
    """The Tucker layers of one of torchvision's networks at TDC's ranks, 224x224."""
    import torch
    import torchvision

    from tdc_tvm.plan import preset_plan
    from tdc_tvm.schedules.shape import Conv2dShape, TuckerConvShape

    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None).eval()
        shapes: dict[str, torch.Size] = {}
        layers = {key: (model.get_submodule(key), ranks) for key, ranks in preset_plan(name).layers.items()}
        for key, (layer, _) in layers.items():
            layer.register_forward_pre_hook(lambda _, inputs, key=key: shapes.update({key: inputs[0].shape}))
        model(torch.empty(batch, 3, 224, 224))
    for key, (layer, ranks) in layers.items():
        extents = (batch, *shapes[key][2:], layer.in_channels, layer.out_channels)
        dense = Conv2dShape(*extents, layer.kernel_size, layer.stride, layer.padding * 2, layer.dilation, layer.groups)
        yield TuckerConvShape(dense, ranks.rank_in, ranks.rank_out), name


def select(names: Sequence[str], batches: Sequence[int], precision: str) -> dict[ConvShape, list[str]]:
    """The distinct layers, batch by batch, and the groups that each belongs to."""
    wanted = ("core", *NETWORKS) if "all" in names else names
    layers: dict[ConvShape, list[str]] = {}
    for batch in batches:
        for name in wanted:
            networks = NETWORKS.get(name, ())
            sources = [core_shapes(batch)] if name == "core" else [network_shapes(one, batch) for one in networks]
            for source in sources:
                for shape, group in source:
                    groups = layers.setdefault(shape.with_precision(precision), [])
                    if group not in groups:
                        groups.append(group)
    return layers


def build(
    folder: Path,
    layers: dict[ConvShape, list[str]],
    device: DeviceSpec,
    precision: str,
    jobs: int,
    choose: Callable[[ConvShape], list[tuple[Any, bool]]],
) -> dict[str, Any]:
    """Compile what ``choose`` gives for every layer: configurations, and whether each is the model's pick."""
    described = {
        f"layer{index}": build_layers.describe(shape, groups) for index, (shape, groups) in enumerate(layers.items())
    }
    candidates = [
        build_layers.Candidate(key, shape, config, is_pick)
        for key, shape in zip(described, layers, strict=True)
        for config, is_pick in choose(shape)
    ]
    return build_layers.build(folder, described, candidates, device, precision, jobs)


def cudnn(gpu: Gpu, layer: dict[str, Any], chain: str, name: str) -> list[Contender]:
    """Ways to run a layer's ``chain`` of convolutions with PyTorch: ``name/layout`` and ``name/layout/fused``.

    A chain that ends with a bias and a ReLU can end with cuDNN's operator for all three.
    """
    import torch

    weights, stages = gpu_layers.make_weights(layer, chain), layer[chain]
    contenders = []
    for layout in ("nchw", "nhwc"):
        memory = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        data = [gpu.input(layer).permute(0, 3, 1, 2).contiguous(memory_format=memory)]
        data += [gpu.tensor(kernel).contiguous(memory_format=memory) for kernel, _ in weights]
        if layer["relu"]:
            data.append(gpu.tensor(weights[-1][1]))
            contenders.append(Contender(f"{name}/{layout}/fused", data, _chain(stages, "fused")))
        contenders.append(Contender(f"{name}/{layout}", data, _chain(stages, "relu" if layer["relu"] else "none")))
    return contenders


def _chain(stages: Sequence[dict[str, Any]], end: str) -> Callable[[Sequence[Any]], Any]:
    """A launch of convolutions on ``(x, *kernels, [bias])``; ``end`` is ``none``, ``relu`` or ``fused``."""
    from torch import cudnn_convolution_relu
    from torch.nn.functional import conv2d, relu_

    def launch(data: Sequence[Any]):
        value, *kernels = data[: len(stages) + 1]
        bias = data[-1] if end != "none" else None
        for kernel, stage in zip(kernels[:-1], stages[:-1], strict=True):
            value = conv2d(value, kernel, **gpu_layers.options(stage))
        last = gpu_layers.options(stages[-1])
        if end == "fused":
            return cudnn_convolution_relu(value, kernels[-1], bias, *last.values())
        value = conv2d(value, kernels[-1], bias, **last)
        return relu_(value) if end == "relu" else value

    return launch


def measure(gpu: Gpu, kernel: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Check one kernel, then time it beside the best way of cuDNN, on the same layer and on the original.

    Raises
    ------
    ArithmeticError
        If the kernel's result is wrong.
    """
    layer = gpu.layers[kernel["layer"]]
    ours = gpu.ours(kernel)
    result = {"error_norm": gpu.check(kernel["layer"], ours)}
    finalists, variants = [ours], {}
    chains = {"triplet": "stages", "original": "original"} if layer["kind"] == "tucker" else {"original": "stages"}
    for name, chain in chains.items():
        found = {contender.name: contender for contender in cudnn(gpu, layer, chain, name)}
        if chain == "stages":
            out = found[f"{name}/nchw"].launch(found[f"{name}/nchw"].data)
            result["cudnn_error_norm"] = gpu.error(kernel["layer"], out.permute(0, 2, 3, 1))
        times = gpu_layers.alternate(gpu, list(found.values()), LAUNCHES, seconds / 4, most=10)
        best = min(times, key=lambda one: times[one]["median_us"])
        variants |= times
        finalists.append(Contender(name, found[best].data, found[best].launch))
        result[f"best_{name}"] = best
    result["warm"] = gpu_layers.alternate(gpu, finalists, LAUNCHES, seconds)
    result["cold"] = gpu_layers.alternate(gpu, finalists, LAUNCHES, seconds / 2, cold=True)
    return result | {"variants": variants}


def speedups(records: Sequence[dict[str, Any]], caches: str = "warm") -> dict[str, list[float]]:
    """How much longer cuDNN takes than ours, by ``triplet`` and ``original``; failed kernels have no part in it."""
    ratios: dict[str, list[float]] = {"triplet": [], "original": []}
    for record in records:
        times = record.get(caches, {})
        for name in ratios.keys() & times.keys():
            ratios[name].append(times[name]["median_us"] / times["ours"]["median_us"])
    return ratios


def by_group(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Kernels by group, precision and batch; one can be in several."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for record in records:
        shape = record["shape"]
        for group in shape["groups"]:
            groups.setdefault((group, shape["precision"], shape["batch"]), []).append(record)
    return groups


def report(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table for each group, precision and batch, and the geometric means of all."""
    for environment in (record["environment"] for record in records if "environment" in record):
        console.print(environment)
    groups = by_group([record for record in records if "name" in record])
    for (group, precision, batch), members in groups.items():
        title = f"{group} {precision}, batch {batch}: us of a launch, L2-warm (ratios to ours; cold: L2-cold)"
        ratios = ("tri/\nour", "orig/\nour")
        cold = ("cold", *(f"cold\n{ratio}" for ratio in ratios))
        columns = ("ours", "p99", "tri-\nplet", "orig-\ninal", *ratios, *cold, "pre-\ndicted")
        table = make_table(title, ("layer",), columns)
        for record in members:
            table.add_row(record["shape"]["text"], *_cells(record))
        console.print(table)
        for record in members:
            if "error" in record:
                line = f"failed: {record['shape']['text']}: {record['error'][:300]}"
                console.print(line, markup=False, highlight=False)
    columns = ("batch", "kernels", "failed", "triplet", "original", "cold\ntriplet", "cold\noriginal")
    summary = make_table("Geometric means of cuDNN's time over ours", ("group", "precision"), columns)
    for (group, precision, batch), members in groups.items():
        failed = sum("error" in record for record in members)
        means = [
            f"{gpu_layers.geometric_mean(ratios):.2f}" if ratios else "-"
            for caches in ("warm", "cold")
            for ratios in speedups(members, caches).values()
        ]
        summary.add_row(group, precision, str(batch), str(len(members)), str(failed), *means)
    console.print(summary)


def make_table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table of narrow columns; where there is no space, texts are wrapped and numbers stay whole."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(record: dict[str, Any]) -> list[str]:
    if "error" in record:
        return ["failed"]

    def cell(times: dict[str, Any], name: str, key: str = "median_us") -> str:
        return _digits(times[name][key]) if name in times else "-"

    def ratio(caches: str, name: str) -> str:
        found = speedups([record], caches)[name]
        return f"{found[0]:.2f}" if found else "-"

    warm = record["warm"]
    return [
        cell(warm, "ours"),
        cell(warm, "ours", "p99_us"),
        cell(warm, "triplet"),
        cell(warm, "original"),
        ratio("warm", "triplet"),
        ratio("warm", "original"),
        cell(record["cold"], "ours"),
        ratio("cold", "triplet"),
        ratio("cold", "original"),
        _digits(record["predicted_us"]),
    ]


def _digits(time_us: float) -> str:
    return f"{time_us:.2f}" if time_us < 100 else f"{time_us:.1f}"


def load_pyplot() -> Any:
    """Matplotlib's plots, to files.

    Raises
    ------
    SystemExit
        If matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as missing:
        message = "plots need matplotlib, which is not installed; run: pip install 'tdc-tvm[plots]'"
        raise SystemExit(message) from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw bars of ours, the triplet and the original for each group, precision and batch.

    Raises
    ------
    SystemExit
        If matplotlib is missing, or the folder cannot be made.
    """
    pyplot = load_pyplot()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"cannot draw plots in {folder}: {error.strerror}; name another folder") from error
    paths = []
    for (group, precision, batch), members in by_group([record for record in records if "warm" in record]).items():
        figure, axes = pyplot.subplots(figsize=(max(6, 0.9 * len(members)), 5), layout="constrained")
        names = [name for name in ("ours", "triplet", "original") if name in members[0]["warm"]]
        for index, name in enumerate(names):
            places = [place + 0.8 * (index / len(names)) for place in range(len(members))]
            heights = [record["warm"][name]["median_us"] for record in members]
            label = name if name == "ours" else f"{name} (cuDNN)"
            bars = axes.bar(places, heights, 0.8 / len(names), align="edge", label=label)
            axes.bar_label(bars, fmt="%.1f", fontsize=7, rotation=90, padding=2)
        axes.set_xticks([place + 0.4 for place in range(len(members))])
        axes.set_xticklabels(
            [record["shape"]["text"].replace(" at ", "\n") for record in members], rotation=60, ha="right"
        )
        axes.set_ylabel("us of a launch, L2-warm")
        axes.margins(y=0.18)
        axes.set_title(f"{group} {precision}, batch {batch}")
        axes.legend()
        paths.append(folder / f"{group}_{precision}_batch{batch}.png")
        figure.savefig(paths[-1], dpi=120)
        pyplot.close(figure)
    return paths


def at_least(least: float) -> Callable[[str], float]:
    """A parser of an option: a number of the type of ``least``, and not below it."""

    def parse(text: str) -> float:
        value = type(least)(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"found {text}, expected {least} or more")
        return value

    parse.__name__ = type(least).__name__
    return parse


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``build``, which the oracle shares."""
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", choices=list(gpu_layers.PRECISIONS), default="fp32")
    parser.add_argument("--arch", default="sm_90", help=gpu_check.ARCH_HELP)
    parser.add_argument("--gpu", help="compile for this GPU of the package's table, such as H200, instead of --arch")
    parser.add_argument("--shapes", nargs="+", choices=["all", "core", *NETWORKS], default=["all"])
    parser.add_argument("--batch", nargs="+", type=at_least(1), default=[1])
    parser.add_argument("--jobs", type=at_least(1), default=1, help="processes to compile with")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``run``, which the oracle shares."""
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="JSON lines; kernels that have one are skipped"
    )
    parser.add_argument("--budget", type=at_least(0.0), default=540, help="seconds after which no kernel is begun")
    parser.add_argument(
        "--stall", type=at_least(0.0), default=120, help="seconds without a result that a kernel is given"
    )
    parser.add_argument("--batch", nargs="+", type=at_least(1), help="only these batch sizes")
    parser.add_argument("--shapes", nargs="+", help="only layers of these groups, such as core or densenet121")
    parser.add_argument("--seconds", type=at_least(0.0), default=0.6, help="of timing for a kernel, about")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)


def device_of(arguments: argparse.Namespace) -> DeviceSpec:
    """The GPU to compile for."""
    from tdc_tvm.schedules.device import GPUS

    if arguments.gpu is None:
        return gpu_check.device_of(arguments.arch)
    if arguments.gpu not in GPUS:
        raise SystemExit(f"no GPU {arguments.gpu!r} in the table; there are: {', '.join(GPUS)}")
    return GPUS[arguments.gpu]


def run_command(
    arguments: argparse.Namespace,
    script: Path,
    measure: Callable[[Gpu, dict[str, Any], float], dict[str, Any]],
    most: int | None = None,
) -> int:
    """``run``: as the supervisor, or with a deadline as its worker, which measures ``most`` kernels at most."""
    manifest = gpu_layers.read_manifest(arguments.folder)
    names = gpu_layers.kernel_names(manifest, arguments.batch, arguments.shapes)
    if arguments.deadline is None:
        gpu_layers.check_machine(arguments.output)
        worker = [sys.executable, str(script), *sys.argv[1:]]
        left = gpu_layers.supervise(worker, manifest, names, arguments.output, arguments.budget, arguments.stall, most)
        failed = len(gpu_layers.failed(names, arguments.output, manifest))
        print(f"{len(names) - left} of {len(names)} kernels have a record in {arguments.output}, {failed} of an error")
        return 1 if left or failed else 0
    import torch

    with torch.inference_mode():
        gpu = Gpu(arguments.folder)
        return gpu_layers.work(
            gpu, names, arguments.output, arguments.deadline, lambda *given: measure(*given, arguments.seconds), most
        )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_build_options(commands.add_parser("build", help="compile the model's picks; needs no GPU"))
    add_run_options(commands.add_parser("run", help="check and time them, and cuDNN"))
    report_command = commands.add_parser("report", help="print tables, draw plots")
    report_command.add_argument("results", type=Path, nargs="+")
    report_command.add_argument("--plots", type=Path, help="folder for PNG files; needs matplotlib")
    arguments = parser.parse_args()
    if arguments.command == "run":
        return run_command(arguments, Path(__file__), measure)
    if arguments.command == "build":
        from tdc_tvm.schedules import backend

        device = device_of(arguments)
        layers = select(arguments.shapes, arguments.batch, arguments.precision)
        manifest = build(
            arguments.folder,
            layers,
            device,
            arguments.precision,
            arguments.jobs,
            lambda shape: [(backend(device).choose(shape, device)[0], True)],
        )
        return build_layers.print_build(manifest)
    from rich.console import Console

    records = gpu_layers.read_results(arguments.results)
    if any("warm" in record and "cold" not in record for record in records):
        raise SystemExit("these results have no cuDNN in them: they are of oracle.py; run: oracle.py report")
    paths = plot(records, arguments.plots) if arguments.plots else []
    report(records, Console(width=None if sys.stdout.isatty() else 200))
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(gpu_check.exit_status(main))
