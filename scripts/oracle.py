"""Measure many configurations of each layer on a GPU: how close the analytical model's pick is to the best of them.

The steps can run on different machines::

    python scripts/oracle.py build OUTDIR --precision fp16 --shapes core resnet18   # no GPU needed
    python scripts/oracle.py run OUTDIR -o oracle.jsonl       # NumPy, PyTorch and TVM's runtime are enough
    python scripts/oracle.py report oracle.jsonl              # no GPU needed
    python scripts/fit_model.py oracle.jsonl                  # refits the model's constants

Of each layer's candidates a seeded sample is measured: the model's pick and those that it thinks best, and as many
others drawn at random; ``--sample 0`` takes all.  ``--again oracle.jsonl`` judges a pick that was not in the sample, or
kernels that changed: half of the kernels are what the model thinks best, half what was fastest in those results.
Every kernel's result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_layers
import build_layers
import gpu_check
import gpu_layers
import numpy as np
from gpu_layers import Gpu

if TYPE_CHECKING:
    from tdc_tvm.schedules.device import DeviceSpec
    from tdc_tvm.schedules.kernel import KernelConfig
    from tdc_tvm.schedules.shape import ConvShape


def sample(shape: ConvShape, device: DeviceSpec, count: int, seed: int) -> list[tuple[KernelConfig, bool]]:
    """The model's pick and ``count`` - 1 others at most, half of them by the model, half at random; all if it is 0."""
    from tdc_tvm.schedules import backend

    pick, _ = backend(device).choose(shape, device)
    others = [config for config in backend(device).candidates(shape, device) if config != pick]
    if 0 < count <= len(others):
        others.sort(key=lambda config: backend(device).estimate(shape, config, device).latency_us)
        best, rest = others[: (count - 1) // 2], others[(count - 1) // 2 :]
        rng = np.random.default_rng([seed, zlib.crc32(str(shape).encode())])
        others = best + [rest[i] for i in sorted(rng.choice(len(rest), count - 1 - len(best), replace=False))]
    return [(pick, True), *((config, False) for config in others)]


def again(
    shape: ConvShape, device: DeviceSpec, count: int, records: list[dict[str, Any]]
) -> list[tuple[KernelConfig, bool]]:
    """The model's pick, and of ``count`` others half the best by the model, half the fastest of ``records``."""
    from tdc_tvm.schedules import backend
    from tdc_tvm.schedules.kernel import KernelConfig

    timed = [record for record in records if "warm" in record and record["shape"]["text"] == str(shape)]
    timed.sort(key=lambda record: record["warm"]["ours"]["median_us"])
    fastest = [KernelConfig(record["strategy"], tuple(record["config"].items())) for record in timed[: count // 2]]
    configs = [config for config, _ in sample(shape, device, 0, 0)]
    pick = configs[0]
    configs.sort(key=lambda config: backend(device).estimate(shape, config, device).latency_us)
    chosen = dict.fromkeys([pick, *configs[: count // 2], *fastest])
    return [(config, config == pick) for config in chosen]


def measure(gpu: Gpu, kernel: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Check one kernel, then time it alone.

    Raises
    ------
    ArithmeticError
        If the kernel's result is wrong.
    """
    ours = gpu.ours(kernel)
    result: dict[str, Any] = {"error_norm": gpu.check(kernel["layer"], ours)}
    result["warm"] = gpu_layers.alternate(gpu, [ours], bench_layers.LAUNCHES, seconds)
    return result


def report(records: list[dict[str, Any]]) -> None:
    """Print, layer by layer, the pick beside the best, and what the model misjudged."""
    from rich.console import Console

    layers: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "name" in record:
            layers.setdefault(record["shape"]["text"], []).append(record)
    columns = ("mea-\nsured", "failed", "pick\nus", "pre-\ndicted", "best\nus", "pick/\nbest", "rank\ncorr.")
    table = bench_layers.make_table("The model's pick beside the best measured", ("layer",), columns)
    table.add_column("best", overflow="fold")
    ratios = []
    for text, members in layers.items():
        timed = [record for record in members if "warm" in record]
        picks = [record for record in timed if record["is_pick"]]
        if not timed or not picks:
            table.add_row(text, str(len(timed)), str(len(members) - len(timed)))
            continue
        times = np.array([record["warm"]["ours"]["median_us"] for record in timed])
        predicted = np.array([record["predicted_us"] for record in timed])
        best = timed[int(times.argmin())]
        pick_us = picks[0]["warm"]["ours"]["median_us"]
        ratios.append(pick_us / times.min())
        ranks = [values.argsort().argsort() for values in (times, predicted)]
        table.add_row(
            text,
            str(len(timed)),
            str(len(members) - len(timed)),
            f"{pick_us:.2f}",
            f"{picks[0]['predicted_us']:.2f}",
            f"{times.min():.2f}",
            f"{ratios[-1]:.3f}",
            f"{np.corrcoef(*ranks)[0, 1]:.2f}" if len(timed) > 2 else "",
            f"{best['strategy']} {' '.join(map(str, best['config'].values()))}",
        )
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    if ratios:
        console.print(f"pick/best: geometric mean {gpu_layers.geometric_mean(ratios):.3f}, worst {max(ratios):.3f}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build_command = commands.add_parser("build", help="compile the candidates; needs no GPU")
    bench_layers.add_build_options(build_command)
    build_command.add_argument(
        "--sample", type=bench_layers.at_least(0), default=200, help="candidates of a layer; 0: all"
    )
    build_command.add_argument("--seed", type=bench_layers.at_least(0), default=0)
    build_command.add_argument(
        "--again", type=Path, nargs="+", metavar="RESULTS", help="measure the fastest of these and the model's best"
    )
    bench_layers.add_run_options(commands.add_parser("run", help="check and time them"))
    report_command = commands.add_parser("report", help="print a table")
    report_command.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "run":
        return bench_layers.run_command(arguments, Path(__file__), measure)
    if arguments.command == "build":
        device = bench_layers.device_of(arguments)
        layers = bench_layers.select(arguments.shapes, arguments.batch, arguments.precision)
        records = gpu_layers.read_results(arguments.again or [])

        def candidates(shape: ConvShape) -> list[tuple[KernelConfig, bool]]:
            if arguments.again:
                return again(shape, device, arguments.sample, records)
            return sample(shape, device, arguments.sample, arguments.seed)

        manifest = bench_layers.build(
            arguments.folder,
            layers,
            device,
            arguments.precision,
            arguments.jobs,
            candidates,
        )
        return build_layers.print_build(manifest)
    report(gpu_layers.read_results(arguments.results))
    return 0


if __name__ == "__main__":
    sys.exit(gpu_check.exit_status(main))
