"""Ranks by latency: for every convolution of a network the ranks, or none, that serve a budget best."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from tvm.target import Target

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan, Ranks
from tdc_tvm.quiet import without_chatter
from tdc_tvm.schedules.device import GPUS, DeviceSpec
from tdc_tvm.schedules.shape import Conv2dShape, TuckerConvShape
from tdc_tvm.targets import resolve_target
from tdc_tvm.training.decompose import apply_plan
from tdc_tvm.training.inputs import Example, check_model, eval_mode, example_inputs, run_model
from tdc_tvm.training.latency_table import LatencyTable, Progress
from tdc_tvm.training.sensitivity import Loss, cross_entropy, sensitivities
from tdc_tvm.tucker import truncation_errors

THETA = 0.15
# How much more error a MAC budget's plan may have than the least possible, to be faster.
SLACK = 0.1
# That end a solver's search: relative optimality gap, and seconds.
GAP, _SECONDS = 1e-4, 10.0


@dataclass(frozen=True)
class LayerChoice:
    """What was chosen for one convolution.

    Parameters
    ----------
    name, shape : str
        Its path in the model, and what it computes for each image; calls of several shapes are separated by semicolons.
    ranks : Ranks or None
        None leaves it dense.
    dense_us, latency_us : float
        Predicted latency as it is and as chosen, all its calls together.
    dense_macs, macs : int
        Multiply-adds as it is and as chosen.
    relative_error : float
        ``||K - K'|| / ||K||`` of the truncated higher-order SVD.
    proxy : float
        What that is expected to cost: the square of it, times the layer's sensitivity.
    reason : str
        Why these ranks, or none.
    """

    name: str
    shape: str
    ranks: Ranks | None
    dense_us: float
    latency_us: float
    dense_macs: int
    macs: int
    relative_error: float
    proxy: float
    reason: str


@dataclass(frozen=True)
class RankChoice:
    """Ranks for a whole network; prints as a table.

    Parameters
    ----------
    model, device, precision : str
        What they are for.
    source : str
        Of the latencies: ``"analytical model"``, or how they were measured.
    proxy : str
        What the error proxy is in.
    goal : str
        What was minimised under which budget.
    layers : tuple[LayerChoice, ...]
        Every convolution, in the model's order.
    other_us : float
        Predicted latency of the fully connected layers, which stay as they are.
    gap : float
        How much better than this plan another could be at most, relative, in what was minimised.
    notes : tuple[str, ...]
        What the user should know besides.
    """

    model: str
    device: str
    precision: str
    source: str
    proxy: str
    goal: str
    layers: tuple[LayerChoice, ...]
    other_us: float
    gap: float
    notes: tuple[str, ...] = ()

    @property
    def plan(self) -> DecompositionPlan:
        """The ranks, as `tdc_tvm.training.apply_plan`, `decompose` and ``tdc compress`` take them."""
        return DecompositionPlan({layer.name: layer.ranks for layer in self.layers if layer.ranks}, self.model)

    @property
    def dense_us(self) -> float:
        """Predicted latency of the convolutions and fully connected layers of the original."""
        return self.other_us + sum(layer.dense_us for layer in self.layers)

    @property
    def latency_us(self) -> float:
        """The same of the network as chosen."""
        return self.other_us + sum(layer.latency_us for layer in self.layers)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of the original's convolutions."""
        return sum(layer.dense_macs for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds of the convolutions as chosen."""
        return sum(layer.macs for layer in self.layers)

    @property
    def mac_reduction(self) -> float:
        """Share of the convolutions' multiply-adds that is saved."""
        return 1.0 - self.macs / self.dense_macs

    @property
    def error(self) -> float:
        """The error proxy, all layers together."""
        return sum(layer.proxy for layer in self.layers)

    def totals(self) -> dict[str, Any]:
        """The figures of the whole network."""
        names = ("dense_us", "latency_us", "other_us", "dense_macs", "macs", "mac_reduction", "error")
        return {name: getattr(self, name) for name in names} | {"speedup": self.dense_us / self.latency_us}

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain data for JSON."""
        names = ("model", "device", "precision", "source", "proxy", "goal", "gap", "notes")
        layers = [{**asdict(layer), "ranks": layer.ranks and layer.ranks._asdict()} for layer in self.layers]
        return {name: getattr(self, name) for name in names} | {"totals": self.totals(), "layers": layers}

    def __rich_console__(self, _console: Any, options: Any) -> Iterable[Any]:
        from tdc_tvm.training.ranks_report import tables

        return tables(self, options.max_width)

    def __str__(self) -> str:
        from tdc_tvm.training.ranks_report import as_text

        return as_text(self)


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
        convs, others, uncounted = _calls(model, example, precision)
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
            self._check_reach("mac_reduction", limit, _least(macs), theta)
            chosen, reached = solve_knapsack(errors, [(macs, limit)], gap)
            goal = f"least error at {value:.1%} fewer MACs"
            if not by_macs:
                goal = f"least latency at {value:.1%} fewer MACs and an error within {SLACK:.0%} of the least"
                limits = [(macs, limit), (errors, (1.0 + SLACK) * _total(errors, chosen))]
                chosen, reached = _solve_twice(times, errors, limits, gap, chosen)
        else:
            goal = f"{'fewest MACs' if by_macs else 'least latency'} within an error of {value:.4g}"
            chosen, reached = _solve_twice(macs if by_macs else times, errors, [(errors, value)], gap)
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

    def _check_reach(self, kind: str, limit: float, least: float, theta: float) -> None:
        """Refuse a budget that is below the least that the options allow."""
        if least <= limit:
            return
        fast = sum(len(_allowed(layer, theta)) > 1 for layer in self.layers)
        able = sum(len(layer.options) > 1 for layer in self.layers)
        why = f"{fast} of {able} layers with a Tucker form have ranks that are {theta:.0%} faster"
        if kind == "latency_us":
            dense = f"{self._dense_us:.1f} us for the original"
            raise TdcError(
                f"{limit:.1f} us cannot be reached: the least predicted is {least:.1f} us, {dense}; {why};"
                " ask for more time, or lower theta"
            )
        total = sum(float(layer.macs[0]) for layer in self.layers)
        fewest = sum(float(layer.macs.min()) for layer in self.layers)
        raise TdcError(
            f"{1 - limit / total:.1%} fewer MACs cannot be reached: {1 - least / total:.1%} is the most, as {why} than"
            f" the dense convolution on {self.device} in {self.precision}; ask for fewer, or lower theta"
            f" (at 0: up to {1 - fewest / total:.1%}, with layers that are no faster)"
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
        raise TdcError(f"no device {str(device)!r}: {error}; GPUS known by name: {', '.join(GPUS)}") from None


def solve_knapsack(
    costs: Sequence[np.ndarray],
    limits: Sequence[tuple[Sequence[np.ndarray], float]],
    gap: float = GAP,
    known: list[int] | None = None,
) -> tuple[list[int], float]:
    """Choose one option of each group, so that the sum of costs is least and other sums stay within limits.

    Parameters
    ----------
    costs : sequence of arrays
        Cost of each option, by group.
    limits : sequence of (arrays, float)
        What else the options take, by group, and how much of it there is.
    gap : float
        Relative optimality gap that is good enough.
    known : list[int], optional
        A choice within the limits, which is given back where none better is found in time.

    Returns
    -------
    chosen : list[int]
        The option of each group.
    gap : float
        By how much of its cost the optimum can be lower.

    Raises
    ------
    TdcError
        If no choice is within the limits, or none was found in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    keep = [_undominated(np.stack(rows, axis=1)) for rows in zip(costs, *(rows for rows, _ in limits), strict=True)]
    sizes = [len(options) for options in keep]
    group = np.repeat(np.arange(len(keep)), sizes)
    count = len(group)

    def row(values: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
        """Costs above each group's least, and the sum of these: small numbers, that tolerances are absolute for."""
        flat = np.concatenate([np.asarray(v, float)[options] for v, options in zip(values, keep, strict=True)])
        least = np.array([flat[group == i].min() for i in range(len(keep))])
        return flat - least[group], float(least.sum())

    one = csr_array((np.ones(count), (group, np.arange(count))), (len(keep), count))
    constraints = [LinearConstraint(one, 1, 1)]
    for values, limit in limits:
        above, least = row(values)
        room = limit * (1 + 1e-9) - least
        if room < 0:
            raise TdcError(f"no choice is within {limit:.4g}: the least is {least:.4g}")
        # An option that alone takes more than there is room for is none.
        scale = max(room, 1e-12 * float(above.max())) or 1.0
        constraints.append(LinearConstraint(np.minimum(above / scale, 2.0)[None] * 1e3, -np.inf, 1e3))
    objective, base = row(costs)
    spread = sum(objective[group == i].max() for i in range(len(keep))) or 1.0
    with without_chatter(1):
        result = milp(objective * (1e4 / spread), integrality=1, bounds=Bounds(0, 1), constraints=constraints,
                      options={"mip_rel_gap": gap, "time_limit": _SECONDS})  # fmt: skip
    if result.x is None and known is None:
        raise TdcError(f"the solver found no choice of ranks: {result.message}")
    found = [known] if known is not None else []
    if result.x is not None:
        found.append([int(options[np.argmax(result.x[group == i])]) for i, options in enumerate(keep)])
    cost, chosen = min((_total(costs, choice), choice) for choice in found)
    bound = base + (result.mip_dual_bound or 0.0) * spread / 1e4
    reached = max(0.0, cost - bound) / cost if cost > 0 else 0.0
    # What is left of it at the optimum is rounding.
    return chosen, reached if reached > 1e-9 else 0.0


def _solve_twice(
    costs: Sequence[np.ndarray],
    errors: Sequence[np.ndarray],
    limits: Sequence[tuple[Sequence[np.ndarray], float]],
    gap: float,
    known: list[int] | None = None,
) -> tuple[list[int], float]:
    """The least cost, and of the choices that have it the one of the least error."""
    chosen, reached = solve_knapsack(costs, limits, gap, known)
    limits = [*limits, (costs, _total(costs, chosen))]
    return solve_knapsack(errors, limits, gap, chosen)[0], reached


def _total(values: Sequence[np.ndarray], chosen: Sequence[int]) -> float:
    return float(sum(options[i] for options, i in zip(values, chosen, strict=True)))


def _undominated(costs: np.ndarray) -> np.ndarray:
    """Which rows are not as high as another in every column; of equal rows the first."""
    order = np.lexsort((np.arange(len(costs)), *costs.T[::-1]))
    kept: list[int] = []
    for i in order:
        if not any((costs[j] <= costs[i]).all() for j in kept):
            kept.append(int(i))
    return np.array(sorted(kept))


def _least(values: Sequence[np.ndarray]) -> float:
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


def _calls(
    model: nn.Module, example: Example, precision: str
) -> tuple[dict[str, list[Conv2dShape]], list[Conv2dShape], dict[str, str]]:
    """The shapes of each convolution's calls, of the fully connected layers', and convolutions that have no shape."""
    convs: dict[str, list[Conv2dShape]] = {}
    others: list[Conv2dShape] = []
    uncounted: dict[str, str] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            x = args[0]
            if isinstance(module, nn.Linear):
                rows = x.numel() // x.shape[-1]
                others.append(Conv2dShape(rows, 1, 1, module.in_features, module.out_features, precision=precision))
            elif isinstance(module, nn.Conv2d):
                convs.setdefault(name, []).append(_shape(module, x, precision))
            else:
                uncounted[name] = type(module).__name__

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear))
    ]
    try:
        with eval_mode(model):
            run_model(model, example_inputs(model, example))
    finally:
        for handle in handles:
            handle.remove()
    return convs, others, uncounted


def _shape(conv: nn.Conv2d, x: torch.Tensor, precision: str) -> Conv2dShape:
    height, width = x.shape[-2:]
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return Conv2dShape(
        1 if x.ndim == 3 else x.shape[0],
        height,
        width,
        conv.in_channels,
        conv.out_channels,
        tuple(conv.kernel_size),  # type: ignore[arg-type]
        tuple(conv.stride),  # type: ignore[arg-type]
        (top, left, bottom, right),
        tuple(conv.dilation),  # type: ignore[arg-type]
        conv.groups,
        precision,
    )


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
