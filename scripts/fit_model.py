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
import gpu_layers
import numpy as np
from scipy.optimize import least_squares, minimize

from tdc_tvm.schedules.cuda import chain_conv, model
from tdc_tvm.schedules.cuda.plan import Part
from tdc_tvm.schedules.device import GPUS, DeviceSpec
from tdc_tvm.schedules.kernel import KernelConfig

# Predictions that differ by this share seem alike; errors of more than this share are large.
_NEARLY, _SMALL = 0.05, 0.1


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

    def loss(self, constants: model.Constants) -> float:
        """The pick's time over the best."""
        return self.times_us[self.predict(constants).argmin()] / self.times_us.min()

    def expected_loss(self, predicted: np.ndarray) -> float:
        """Its logarithm, on average of picks that seem nearly as fast: smooth, and unlike the pick's own not luck."""
        chances = (predicted.min() / predicted) ** (1 / _NEARLY)
        return chances @ np.log(self.times_us / self.times_us.min()) / chances.sum()

    def errors(self, predicted: np.ndarray) -> np.ndarray:
        """How far predictions are off, in small errors; what is far from the best counts by how near it is, or seems.

        It is picked if it seems near.
        """
        weights = np.minimum(1.0, self.times_us.min() / np.minimum(self.times_us, predicted)) ** 4
        return weights * np.log(predicted / self.times_us) / _SMALL

    def misfit(self, predicted: np.ndarray) -> float:
        """Errors on average: squares of small ones, and for large ones absolute values."""
        return np.mean(2 * _SMALL**2 * (np.sqrt(1 + self.errors(predicted) ** 2) - 1))


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
                parts.append(chain_conv.make_part(stages[begin:end], (*values, units[number]), device))
            groups.append((np.array(indices), parts))
        times = np.array([record["warm"]["ours"]["median_us"] for record in members])
        found.append(Measured(text, stages[0].precision, times, groups))
    return found


def fit_constants(layers: list[Measured], start: model.Constants) -> model.Constants:
    """The constants that pick best, and under which predictions are close to what was measured."""
    names = model.names()
    origin = np.log([getattr(start, name) for name in names])

    def objective(logarithms: np.ndarray) -> float:
        constants = model.Constants(*np.exp(logarithms))
        total = 0.0
        for layer in layers:
            predicted = layer.predict(constants)
            # Not less than by what was measured itself.
            excess = max(0.0, layer.expected_loss(predicted) - layer.expected_loss(layer.times_us))
            # The worst pick counts more.
            total += excess + 4 * excess**2 + layer.misfit(predicted)
        # Constants that the data do not tell stay where they are.
        return total / len(layers) + 1e-5 * np.sum((logarithms - origin) ** 2)

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        constants = model.Constants(*np.exp(logarithms))
        errors = [layer.errors(layer.predict(constants)) / np.sqrt(len(layer.times_us)) for layer in layers]
        return np.concatenate([*errors, 0.1 * (logarithms - origin)])

    # Close to what was measured first, and then picks: squares are found much faster.
    near = least_squares(residuals, origin, loss="soft_l1").x
    found = minimize(objective, near, method="L-BFGS-B", options={"maxiter": 60, "eps": 1e-3})
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
            refitted = fit_constants(rest, fitted) if rest else fitted
            held_out += [(layer.loss(refitted), layer.text) for i, layer in enumerate(layers) if i % 5 == fold]
        before = [layer.loss(start) for layer in layers]
        for name, values in (("stored", before), ("fitted", losses), ("held out", [loss for loss, _ in held_out])):
            print(f"{precision} {name}: pick/best {gpu_layers.geometric_mean(values):.3f}, worst {max(values):.3f}")
        for loss, text in sorted(held_out, reverse=True)[:5]:
            print(f"    {loss:.3f}  {text}")
        constants[precision] = fitted
    return constants


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--gpu", default="H100", choices=GPUS, help="what they were measured on")
    parser.add_argument("--write", action="store_true", help="store the constants in the package's source")
    arguments = parser.parse_args()
    records = [record for path in arguments.results for record in gpu_layers.read_records(path)]
    fitted = fit(records, GPUS[arguments.gpu])
    values = {name: asdict(one) for name, one in (model.constants() | fitted).items()}
    print(json.dumps({name: values[name] for name in fitted}, indent=1))
    if arguments.write:
        model.DATA.write_text(json.dumps(values, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
