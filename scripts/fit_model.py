"""Fit the constants of the analytical model to what ``scripts/oracle.py`` measured::

    python scripts/fit_model.py oracle.jsonl more.jsonl --write     # no GPU needed

Prints how the picks of the stored, the fitted and the held-out constants compare with the best configuration
measured; held out means that a layer had no part in the fit of the constants it is judged by.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import build_layers
import gpu_check
import gpu_layers
import numpy as np
from scipy.optimize import least_squares

from tdc_tvm.files import write_atomic
from tdc_tvm.schedules.cuda import chain_conv, model
from tdc_tvm.schedules.cuda.plan import Part
from tdc_tvm.schedules.device import GPUS, DeviceSpec
from tdc_tvm.schedules.kernel import KernelConfig

# How much a pick that is not the best counts, beside the errors of a layer's predictions together.
PICKS_COUNT = 3.0
# How far from the best a pick may be.
WORST_PICK = 1.15
# Predictions this share apart are nearly the same.
NEARLY = 0.02


@dataclass
class Measured:
    """What was measured of one layer, and the kernels behind it, many at once.

    Parameters
    ----------
    text : str
        The layer.
    times_us : numpy.ndarray
        Medians.
    groups : list of (indices, parts)
        Which of the times belong to configurations of the same stages cut in the same places, of the same units,
        and their kernels.
    """

    text: str
    precision: str
    times_us: np.ndarray
    groups: list[tuple[np.ndarray, list[Part]]]

    def predict(self, constants: model.Constants) -> np.ndarray:
        """Latencies by the model, in microseconds."""
        predicted = np.zeros_like(self.times_us)
        for indices, parts in self.groups:
            predicted[indices] = sum(model.latency_us(part, len(parts) == 1, constants) for part in parts)
        return predicted

    def soft_loss(self, predicted: np.ndarray) -> float:
        """How much longer than the best the pick takes, as a share; averaged over what seems about as fast."""
        weight = np.exp((1 - predicted / predicted.min()) / NEARLY)
        return weight @ self.times_us / weight.sum() / self.times_us.min() - 1

    def loss(self, constants: model.Constants) -> float:
        """The pick's time over the best."""
        return self.times_us[self.predict(constants).argmin()] / self.times_us.min()


def read_measured(records: list[dict[str, Any]], device: DeviceSpec) -> list[Measured]:
    """Group records by layer."""
    layers: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "warm" in record:
            layers.setdefault(record["shape"]["text"], []).append(record)
    found = []
    for text, members in layers.items():
        shape = build_layers.shape_of(members[0]["shape"])
        by_stages: dict[tuple, list[int]] = {}
        for index, record in enumerate(members):
            config = KernelConfig(record["strategy"], tuple(record["config"].items()))
            stages, cuts = chain_conv.stages_of(shape, config.strategy), chain_conv.cuts_of(config)
            units = tuple(config[f"group{number or ''}"] for number in range(len(cuts) + 1))
            by_stages.setdefault((stages, cuts, units), []).append(index)
        groups = []
        for (stages, cuts, units), indices in by_stages.items():
            parts = []
            for number, (begin, end) in enumerate(itertools.pairwise((0, *cuts, len(stages)))):
                names = [f"{field}{number or ''}" for field in chain_conv.FIELDS[:-1]]
                values = np.array([[members[i]["config"][name] for i in indices] for name in names])
                in_width = chain_conv.between_width(stages[begin].in_channels, stages[0]) if begin else None
                out_width = None
                if end < len(stages):
                    out_width = chain_conv.between_width(stages[end - 1].out_channels, stages[0])
                given = (*values, units[number])
                parts.append(chain_conv.make_part(stages[begin:end], given, device, in_width, out_width))
            groups.append((np.array(indices), parts))
        times = np.array([record["warm"]["ours"]["median_us"] for record in members])
        found.append(Measured(text, stages[0].precision, times, groups))
    return found


def fit_constants(layers: list[Measured], start: model.Constants, most: int = 40) -> model.Constants:
    """The constants under which predictions are closest to what was measured, fast kernels counting more.

    In ``most`` steps at most.
    """
    names = model.names()

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        constants = model.Constants(*np.exp(logarithms))
        parts = []
        for layer in layers:
            predicted = layer.predict(constants)
            parts.append([PICKS_COUNT * layer.soft_loss(predicted)])
            # What is far from the best counts by how near it is, or seems to be: it is picked if it seems near.
            seen_us = np.minimum(layer.times_us, predicted)
            weight = np.minimum(1.0, layer.times_us.min() / seen_us) ** 4
            parts.append(weight * np.log(predicted / layer.times_us) / np.sqrt(len(weight)))
        # Constants that the data do not tell stay where they are.
        return np.concatenate([*parts, 0.01 * (logarithms - origin)])

    origin = np.log([getattr(start, name) for name in names])
    found = least_squares(residuals, origin, loss="soft_l1", f_scale=0.1, ftol=1e-4, max_nfev=most)
    return model.Constants(*(float(f"{value:.4g}") for value in np.exp(found.x)))


def fit(records: list[dict[str, Any]], device: DeviceSpec) -> dict[str, model.Constants]:
    """Fit the constants of each precision, and print how they do on layers that were held out."""
    constants = {}
    for precision in dict.fromkeys(layer.precision for layer in read_measured(records, device)):
        layers = [layer for layer in read_measured(records, device) if layer.precision == precision]
        start = model.constants()[precision]
        fitted = fit_constants(layers, start)
        losses, held_out = [layer.loss(fitted) for layer in layers], []
        # Five folds, each a set of whole layers.
        for fold in range(min(5, len(layers))):
            rest = [layer for i, layer in enumerate(layers) if i % 5 != fold]
            refitted = fit_constants(rest, fitted, 8) if rest else fitted
            held_out += [(layer.loss(refitted), layer.text) for i, layer in enumerate(layers) if i % 5 == fold]
        before = [layer.loss(start) for layer in layers]
        for name, values in (("stored", before), ("fitted", losses), ("held out", [loss for loss, _ in held_out])):
            print(f"{precision} {name}: pick/best {gpu_layers.geometric_mean(values):.3f}, worst {max(values):.3f}")
        for loss, text in sorted(held_out, reverse=True)[:5]:
            print(f"    {loss:.3f}  {text}")
        is_kept = max(losses) > max(WORST_PICK, *before)
        if is_kept:
            print(f"{precision}: the stored constants stay, with which no pick is as far from the best")
        constants[precision] = start if is_kept else fitted
    return constants


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--gpu", default="H100", choices=GPUS, help="what they were measured on")
    parser.add_argument("--write", action="store_true", help=f"store the constants in {model.DATA}")
    arguments = parser.parse_args()
    records = gpu_layers.read_results(arguments.results)
    for record in records:
        measured_on = record.get("environment", {}).get("gpu", {}).get("name", arguments.gpu)
        if arguments.gpu not in measured_on:
            raise SystemExit(f"these results are of an {measured_on}; say so with --gpu, or give others")
        if "cold" in record:
            raise SystemExit("these results have cuDNN in them: they are of bench_layers.py; fit to those of oracle.py")
    if not any("warm" in record for record in records):
        raise SystemExit("no kernel was timed in these results: all have errors; run: oracle.py report")
    fitted = fit(records, GPUS[arguments.gpu])
    values = {name: asdict(one) for name, one in fitted.items()}
    print(json.dumps(values, indent=1))
    if arguments.write:
        with write_atomic(model.DATA) as temporary:
            temporary.write_text(json.dumps(json.loads(model.DATA.read_text()) | values, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(gpu_check.exit_status(main))
