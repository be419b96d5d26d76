"""Time how long the analytical model takes to choose a layer's kernel; no GPU needed.

::

    python scripts/bench_choice.py -o choice.json --precision fp32 fp16

The layers are the distinct Tucker layers of the five CNNs at TDC's ranks.  Times are of one thread, of all candidates
of a layer, with nothing kept of earlier ones: its processor time, and what the clock on the wall says.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_layers
import gpu_check
import numpy as np

from tdc_tvm.cli import environment
from tdc_tvm.files import write_atomic
from tdc_tvm.schedules.cuda import chain_conv, conv

if TYPE_CHECKING:
    from tdc_tvm.schedules.device import DeviceSpec
    from tdc_tvm.schedules.shape import ConvShape


def measure(shape: ConvShape, device: DeviceSpec, repeats: int) -> dict[str, Any]:
    """Choose a layer's kernel so many times, after once more; every sample in milliseconds."""
    samples: dict[str, list[float]] = {"processor_ms": [], "wall_ms": []}
    for _ in range(1 + repeats):
        conv._space.cache_clear()
        chain_conv.parts_of.cache_clear()
        start = time.process_time(), time.perf_counter()
        conv.choose(shape, device)
        for name, end, begin in zip(samples, (time.process_time(), time.perf_counter()), start, strict=True):
            samples[name].append(1e3 * (end - begin))
    return {name: values[1:] for name, values in samples.items()} | {"candidates": len(conv.candidates(shape, device))}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--precision", nargs="+", default=["fp32", "tf32", "fp16"])
    parser.add_argument("--batch", nargs="+", type=bench_layers.at_least(1), default=[1])
    parser.add_argument("--repeats", type=bench_layers.at_least(1), default=15)
    parser.add_argument("--arch", default="sm_90", help=gpu_check.ARCH_HELP)
    arguments = parser.parse_args()
    device = gpu_check.device_of(arguments.arch)
    facts = environment()
    facts = {name: facts[name] for name in ("python", "tdc-tvm", "numpy", "cpu", "cpu threads")}
    record: dict[str, Any] = {"command": sys.argv, "environment": facts, "device": device.name, "layers": []}
    for precision in arguments.precision:
        medians = []
        for shape in bench_layers.select(list(bench_layers.NETWORKS), arguments.batch, precision):
            found = measure(shape, device, arguments.repeats)
            medians.append(float(np.median(found["processor_ms"])))
            record["layers"].append({"shape": str(shape), "precision": precision, "median_ms": medians[-1]} | found)
        print(f"{precision}: {len(medians)} layers, median {np.median(medians):.1f} ms, longest {max(medians):.1f} ms")
    with write_atomic(arguments.output) as path:
        path.write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(gpu_check.exit_status(main))
