"""Ranks by latency: for every convolution of a network the ranks, or none, that serve a budget best."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tvm.target import Target

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import Ranks
from tdc_tvm.schedules.device import GPUS, DeviceSpec
from tdc_tvm.schedules.shape import Conv2dShape, TuckerConvShape
from tdc_tvm.targets import resolve_target
from tdc_tvm.training.conv_calls import conv_calls
from tdc_tvm.training.decompose import apply_plan
from tdc_tvm.training.inputs import Example, check_model
from tdc_tvm.training.knapsack import GAP, Rows, solve_knapsack, solve_twice, total_of
from tdc_tvm.training.latency_table import LatencyTable, Progress
from tdc_tvm.training.rank_choice import LayerChoice, RankChoice
from tdc_tvm.training.sensitivity import Loss, cross_entropy, sensitivities
from tdc_tvm.tucker import truncation_errors

THETA = 0.15
# How much more error a MAC budget's plan may have than the least possible, to be faster.
SLACK = 0.1


def choose_ranks(
    model: nn.Module,
    example: Example,
    device: DeviceSpec | Target | str,
    *,
    mac_reduction: float | None = None,
    latency_us: float | None = None,
    speedup: float | None = None,
    max_error: float | None = None,
    precision: str = "fp32",
    theta: float = THETA,
    objective: str = "latency",
    loader: Iterable[Any] | None = None,
    loss: Loss = cross_entropy,
    batches: int = 8,
    table: str | os.PathLike | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> RankChoice:
    """Choose the ranks of every convolution of a network, or leave it dense, under one budget.

    Parameters
    ----------
    model, example, device, precision, loader, loss, batches, table, name, progress
        As in `RankProblem.of`.
    mac_reduction, latency_us, speedup, max_error, theta, objective
        As in `RankProblem.solve`.

    Returns
    -------
    RankChoice
        Its ``plan`` is the plan.

    Raises
    ------
    TdcError
        As `RankProblem.of` and `RankProblem.solve`.

    Examples
    --------
    >>> choice = choose_ranks(model, (1, 3, 224, 224), "H100", speedup=1.5)  # doctest: +SKIP
    >>> choice.plan.save("plan.json")  # doctest: +SKIP
    """
    budget = check_budget(mac_reduction, latency_us, speedup, max_error)
    problem = RankProblem.of(
        model, example, device, precision=precision, loader=loader, loss=loss, batches=batches, table=table,
        name=name, progress=progress,
    )  # fmt: skip
    return problem.solve(**budget, theta=theta, objective=objective)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A convolution and its options, the first of which is to leave it dense."""

    name: str
    shape: str
    obstacle: str | None
    options: tuple[Ranks | None, ...]
    latency_us: np.ndarray
    macs: np.ndarray
    # Squared and relative, and times the sensitivity.
    error: np.ndarray
    proxy: np.ndarray


@dataclass(frozen=True, eq=False)
class RankProblem:
    """A network's options: latency, multiply-adds and error of each layer at all ranks; solved for many budgets.

    Parameters
    ----------
    model, device, precision, source, proxy, other_us, notes
        As in `RankChoice`.
    layers : tuple
        Every convolution with its options.
    """

    model: str
    device: str
    precision: str
    source: str
    proxy: str
    other_us: float
    layers: tuple[_Layer, ...]
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(
        model: nn.Module,
        example: Example,
        device: DeviceSpec | Target | str,
        *,
        precision: str = "fp32",
        loader: Iterable[Any] | None = None,
        loss: Loss = cross_entropy,
        batches: int = 8,
        table: str | os.PathLike | None = None,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> RankProblem:
        """Predict latencies, decompose kernels, and weigh errors.

        Parameters
        ----------
        model : nn.Module
            Trained; it is run on ``example`` once and not changed.
        example : tensor, tensors or shape
            What the network will be run on, such as ``(1, 3, 224, 224)``: its batch and sizes count.
        device : DeviceSpec, target or str
            A GPU's name in `tdc_tvm.schedules.device.GPUS`, or anything that `tdc_tvm.build` takes as a target.
        precision : str
            ``"fp32"``, ``"tf32"``, ``"fp16"`` or ``"bf16"``.
        loader : iterable, optional
            Batches ``(images, labels)``: the error proxy is then the increase of the loss that the truncation is
            expected to cause, see `sensitivities`.  Without it all layers weigh the same, and the proxy is the sum of
            relative squared errors.
        loss : callable
            From model and batch to the mean loss, for other loaders and losses.
        batches : int
            How many batches are used at most.
        table : path, optional
            A file of latencies, see `LatencyTable`; one that is not there yet, or lacks layers, is written.
        name : str, optional
            What the network is called; by default its class.
        progress : callable, optional
            Called with the number of predictions done and of all.

        Raises
        ------
        TdcError
            If the model does not run on the example, has no convolution, or a kernel is not finite; if the device is
            unknown or does not have the precision; if the table or the loader are not as they must be.
        """
        check_model(model)
        spec = find_device(device)
        # A plan of no layers decomposes none, and says what stands against each.
        reports = apply_plan(model, {}, inplace=True)[1].layers
        convs, others, uncounted = conv_calls(model, example, precision)
        convs = {report.name: convs.get(report.name, []) for report in reports if report.name not in uncounted}
        if not any(convs.values()):
            raise TdcError(f"{type(model).__name__} runs no nn.Conv2d on the example; there are no ranks to choose")
        obstacles = {report.name: None if report.reason == "not in the plan" else report.reason for report in reports}
        weights = None if loader is None else sensitivities(model, loader, loss=loss, batches=batches)
        latencies = _latencies(spec, precision, convs, obstacles, others, table, progress)
        layers = []
        for layer_name, shapes in convs.items():
            weight = 1.0 if weights is None else weights.get(layer_name, 0.0)
            layers.append(_layer(model, layer_name, shapes, obstacles[layer_name], latencies, weight))
        notes = []
        if uncounted:
            notes.append(f"not counted: {', '.join(f'{key} ({kind})' for key, kind in uncounted.items())}")
        if all(len(layer.options) == 1 for layer in layers):
            notes.append("no convolution of this network has a Tucker form that saves anything")
        return RankProblem(
            name or type(model).__name__,
            spec.name,
            precision,
            latencies.source,
            "sum of relative squared errors" if weights is None else "expected increase of the loss",
            sum(latencies[shape].dense_us for shape in others),
            tuple(layers),
            tuple(notes),
        )

    def solve(
        self,
        *,
        mac_reduction: float | None = None,
        latency_us: float | None = None,
        speedup: float | None = None,
        max_error: float | None = None,
        theta: float = THETA,
        objective: str = "latency",
        gap: float = GAP,
    ) -> RankChoice:
        """Choose ranks under exactly one budget, as a multiple-choice knapsack by HiGHS (scipy.optimize.milp).

        Parameters
        ----------
        mac_reduction : float
            Least share of the convolutions' multiply-adds to save, in (0, 1).  The fewest would be the lowest ranks,
            so that it does not choose alone: the plan is the fastest of those whose error is at most 10 % above the
            least error that the multiply-adds allow.
        latency_us, speedup : float
            Largest predicted latency, or smallest ratio of the original's to it: the least error is chosen.
        max_error : float
            Largest error proxy: the least latency is chosen, and of equally fast plans the one of least error.
        theta : float
            A layer gets ranks only if its operator is predicted to be faster than the original by this share.
        objective : str
            ``"latency"``, or ``"macs"`` for what ranks are chosen by elsewhere: the fewest multiply-adds for
            ``max_error``, the least error for ``mac_reduction``; latency and theta have no part in it.
        gap : float
            Relative optimality gap that ends the search, if 10 s do not; `RankChoice` has the one that was reached.

        Raises
        ------
        TdcError
            If there is not exactly one budget, one of the values makes no sense, or no ranks meet the budget.
        """
        budget = check_budget(mac_reduction, latency_us, speedup, max_error)
        ((kind, value),) = budget.items()
        if objective not in ("latency", "macs"):
            raise TdcError(f"found the objective {objective!r}; use 'latency' or 'macs'")
        if not 0.0 <= theta < 1.0:
            raise TdcError(f"found theta {theta}; expected a share from 0 to below 1, such as 0.15")
        if objective == "macs" and kind in ("latency_us", "speedup"):
            raise TdcError("ranks by multiply-adds know no latency; give mac_reduction or max_error as the budget")
        by_macs = objective == "macs"
        allowed = [_allowed(layer, None if by_macs else theta) for layer in self.layers]
        times, macs, errors = (
            [getattr(layer, field)[keep] for layer, keep in zip(self.layers, allowed, strict=True)]
            for field in ("latency_us", "macs", "proxy")
        )
        if kind in ("latency_us", "speedup"):
            limit = value if kind == "latency_us" else self._dense_us / value
            goal = f"least error within {limit:.1f} us" + (f" (1/{value:g})" if kind == "speedup" else "")
            self._check_reach("latency_us", limit, self.other_us + _least(times), theta)
            chosen, reached = solve_knapsack(errors, [(times, limit - self.other_us)], gap)
        elif kind == "mac_reduction":
            limit = (1.0 - value) * sum(float(layer.macs[0]) for layer in self.layers)
            self._check_reach("mac_reduction", limit, _least(macs), None if by_macs else theta)
            chosen, reached = solve_knapsack(errors, [(macs, limit)], gap)
            goal = f"least error at {value:.1%} fewer MACs"
            if not by_macs:
                goal = f"least latency at {value:.1%} fewer MACs and an error within {SLACK:.0%} of the least"
                limits = [(macs, limit), (errors, (1.0 + SLACK) * total_of(errors, chosen))]
                chosen, reached = solve_twice(times, errors, limits, gap, chosen)
        else:
            goal = f"{'fewest MACs' if by_macs else 'least latency'} within an error of {value:.4g}"
            chosen, reached = solve_twice(macs if by_macs else times, errors, [(errors, value)], gap)
        layers = tuple(
            _choice(layer, int(keep[i]), None if by_macs else theta)
            for layer, keep, i in zip(self.layers, allowed, chosen, strict=True)
        )
        return RankChoice(
            self.model, self.device, self.precision, self.source, self.proxy, goal, layers, self.other_us, reached,
            self.notes,
        )  # fmt: skip

    def front(self, points: int = 24, theta: float = THETA) -> list[RankChoice]:
        """The Pareto front of latency against error: the least error for latencies from the least to the original's.

        Parameters
        ----------
        points : int
            Latencies, equally spaced; what is the same plan for several is listed once.
        theta : float
            As in `solve`.
        """
        times = [layer.latency_us[_allowed(layer, theta)] for layer in self.layers]
        least = self.other_us + _least(times)
        found: dict[Any, RankChoice] = {}
        for limit in np.linspace(least * (1 + 1e-9), self._dense_us, points):
            choice = self.solve(latency_us=float(limit), theta=theta, gap=1e-3)
            found.setdefault(tuple(layer.ranks for layer in choice.layers), choice)
        return list(found.values())

    def by_macs(self, error: float, gap: float = GAP) -> RankChoice:
        """What choosing by multiply-adds gives at the same error."""
        return self.solve(max_error=error * (1 + 1e-9), objective="macs", gap=gap)

    @property
    def _dense_us(self) -> float:
        return self.other_us + sum(float(layer.latency_us[0]) for layer in self.layers)

    def _check_reach(self, kind: str, limit: float, least: float, theta: float | None) -> None:
        """Refuse a budget that is below the least that the options allow."""
        if least <= limit:
            return
        total = sum(float(layer.macs[0]) for layer in self.layers)
        if theta is None:
            wanted, most = 1 - limit / total, 1 - least / total
            raise TdcError(f"{wanted:.1%} fewer MACs cannot be reached: {most:.1%} is the most; ask for fewer")
        fast = sum(len(_allowed(layer, theta)) > 1 for layer in self.layers)
        able = sum(len(layer.options) > 1 for layer in self.layers)
        why = f"{fast} of {able} layers with a Tucker form have ranks that are {theta:.0%} faster"
        if kind == "latency_us":
            dense = f"{self._dense_us:.1f} us for the original ({self.other_us:.1f} of both in fully connected layers)"
            raise TdcError(
                f"{limit:.1f} us cannot be reached: the least predicted is {least:.1f} us, {dense}; {why};"
                f" ask for more time{', or lower theta' if theta else ''}"
            )
        fewest = sum(float(layer.macs.min()) for layer in self.layers)
        lower = (
            f", or lower theta (at 0: up to {1 - fewest / total:.1%}, with layers that are no faster)" if theta else ""
        )
        raise TdcError(
            f"{1 - limit / total:.1%} fewer MACs cannot be reached: {1 - least / total:.1%} is the most, as {why} than"
            f" the dense convolution on {self.device} in {self.precision}; ask for fewer{lower}"
        )


def find_device(device: DeviceSpec | Target | str) -> DeviceSpec:
    """A GPU of the package's table by its name, or the device that a target stands for.

    Raises
    ------
    TdcError
        If it is neither.
    """
    if isinstance(device, DeviceSpec):
        return device
    if isinstance(device, str):
        named = {name.lower(): spec for name, spec in GPUS.items()}
        if device.lower() in named:
            return named[device.lower()]
    try:
        return DeviceSpec.from_target(resolve_target(device))
    except TdcError as error:
        raise TdcError(f"no device {str(device)!r}: {error}; GPUs known by name: {', '.join(GPUS)}") from None


def _least(values: Rows) -> float:
    return float(sum(options.min() for options in values))


def _allowed(layer: _Layer, theta: float | None) -> np.ndarray:
    """Positions of the options that may be chosen: dense, and what is faster by ``theta``, if that is given."""
    if theta is None:
        return np.arange(len(layer.options))
    fast = layer.latency_us <= (1.0 - theta) * layer.latency_us[0] * (1 + 1e-9)
    fast[0] = True
    return np.flatnonzero(fast)


def _choice(layer: _Layer, option: int, theta: float | None) -> LayerChoice:
    dense_us, latency_us = float(layer.latency_us[0]), float(layer.latency_us[option])
    if option:
        reason = _comparison(dense_us, latency_us)
    elif layer.obstacle is not None:
        reason = layer.obstacle
    elif len(layer.options) == 1:
        reason = "too few channels to gain anything"
    elif theta is not None and len(_allowed(layer, theta)) == 1:
        best = 1 + int(np.argmin(layer.latency_us[1:]))
        comparison = _comparison(dense_us, float(layer.latency_us[best]))
        reason = f"at best {comparison}, at {layer.options[best]}; needs {theta:.0%}"
        if layer.latency_us[best] >= dense_us * (1 - 1e-9):
            reason = f"no ranks make it faster; needs {theta:.0%}"
    else:
        reason = "the budget is met without it"
    return LayerChoice(
        layer.name,
        layer.shape,
        layer.options[option],
        dense_us,
        latency_us,
        int(layer.macs[0]),
        int(layer.macs[option]),
        math.sqrt(float(layer.error[option])),
        float(layer.proxy[option]),
        reason,
    )


def _comparison(dense_us: float, latency_us: float) -> str:
    """How much faster or slower a layer gets."""
    share = 1.0 - latency_us / dense_us
    if abs(share) < 0.0005:
        return "as fast"
    return f"{abs(share):.1%} {'faster' if share > 0 else 'slower'}"


def check_budget(
    mac_reduction: float | None, latency_us: float | None, speedup: float | None, max_error: float | None
) -> dict[str, float]:
    """The one budget that was given, by its name.

    Raises
    ------
    TdcError
        If there is none, or several, or its value makes no sense.
    """
    values = {
        "mac_reduction": mac_reduction,
        "latency_us": latency_us,
        "speedup": speedup,
        "max_error": max_error,
    }
    given = {name: float(value) for name, value in values.items() if value is not None}
    if len(given) != 1:
        raise TdcError(f"found {' and '.join(given) or 'no budget'}; give exactly one of {', '.join(values)}")
    ((name, value),) = given.items()
    least, expected = {
        "mac_reduction": (0.0, "a share between 0 and 1 (exclusive), such as 0.6"),
        "latency_us": (0.0, "a positive time in microseconds"),
        "speedup": (1.0, "a ratio above 1, such as 1.5"),
        "max_error": (0.0, "a positive number"),
    }[name]
    if not least < value < (1.0 if name == "mac_reduction" else math.inf):
        raise TdcError(f"found {name} {value:g}; expected {expected}")
    return given


def _latencies(
    device: DeviceSpec,
    precision: str,
    convs: dict[str, list[Conv2dShape]],
    obstacles: dict[str, str | None],
    others: Sequence[Conv2dShape],
    path: str | os.PathLike | None,
    progress: Progress | None,
) -> LatencyTable:
    table = LatencyTable(device.name, precision)
    if path is not None and Path(path).exists():
        table = LatencyTable.load(path, device.name, precision)
    every = [shape for shapes in convs.values() for shape in shapes]
    tucker = [shape for name, shapes in convs.items() if obstacles[name] is None for shape in shapes]
    if table.complete([*every, *others], tucker, device, progress) and path is not None:
        table.save(path)
    return table


def _layer(
    model: nn.Module,
    name: str,
    shapes: Sequence[Conv2dShape],
    obstacle: str | None,
    latencies: LatencyTable,
    sensitivity: float,
) -> _Layer:
    if not shapes:
        obstacle = obstacle or "not run on the example"
    tables = [latencies[shape] for shape in shapes]
    options: list[Ranks | None] = [None]
    if obstacle is None:
        # Calls of one module on several sizes.
        options += [ranks for ranks in tables[0].tucker_us if all(ranks in table.tucker_us for table in tables)]
    error = np.zeros(len(options))
    if len(options) > 1:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        if weight.is_meta:
            raise TdcError("the model is on the meta device and has no weights to decompose; load them first")
        try:
            errors = truncation_errors(weight.detach().to("cpu", torch.float64).numpy())
        except TdcError as problem:
            raise TdcError(f"layer {name!r}: {problem}") from None
        error[1:] = [errors[ranks.rank_out - 1, ranks.rank_in - 1] for ranks in options if ranks]
    latency_us = [
        sum(table.dense_us if ranks is None else table.tucker_us[ranks] for table in tables) for ranks in options
    ]
    macs = [
        sum(shape.macs if ranks is None else TuckerConvShape(shape, ranks.rank_in, ranks.rank_out).macs
            for shape in shapes)
        for ranks in options
    ]  # fmt: skip
    text = "; ".join(dict.fromkeys(str(shape.with_precision("fp32")).partition("x")[2] for shape in shapes))
    return _Layer(
        name, text, obstacle, tuple(options), np.array(latency_us), np.array(macs), error, sensitivity * error
    )
