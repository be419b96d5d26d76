"""Searches for the fastest configuration of a convolution: which candidates to measure next.

A search proposes configurations and is told what came of them.  It knows nothing of how they are measured, and what it
does depends on its space, its seed and what it was told alone.  So a search that is told what an earlier one
measured goes on where that one ended.
"""

from __future__ import annotations

import functools
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tdc_tvm.errors import TdcError
from tdc_tvm.schedules import backend
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import Estimate, KernelConfig
from tdc_tvm.schedules.shape import ConvShape, TuckerConvShape, stages_of

# Candidates that are built and measured together.
BATCH = 8


@dataclass(frozen=True)
class Measurement:
    """What came of a configuration: times of a launch, or an error.

    ``seconds`` is the wall time that building and measuring it took, if that is known.
    """

    config: KernelConfig
    samples_us: tuple[float, ...] = ()
    error: str = ""
    seconds: float | None = None

    @property
    def median_us(self) -> float:
        """The middle sample; infinite for a configuration that failed."""
        return float(np.median(self.samples_us)) if self.samples_us else math.inf


class Measurer(Protocol):
    """Measures configurations of a shape: on this machine, on others, or from what was stored."""

    def measure(self, shape: ConvShape, configs: Sequence[KernelConfig]) -> Iterable[Measurement]:
        """One after the other, in order."""


@dataclass(frozen=True)
class Space:
    """The configurations of a shape, and what the analytical model predicts of each.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        The convolution.
    configs : tuple of KernelConfig
        The candidates, all different.
    estimates : tuple of Estimate
        Of each.
    """

    shape: ConvShape
    configs: tuple[KernelConfig, ...]
    estimates: tuple[Estimate, ...] = field(hash=False)

    @staticmethod
    def of(shape: ConvShape, device: DeviceSpec, configs: Sequence[KernelConfig] | None = None) -> Space:
        """Of these configurations, or of all candidates; predictions are the present model's.

        Raises
        ------
        TdcError
            If none can run.
        """
        schedules = backend(device)
        if configs is None:
            pick, _ = schedules.choose(shape, device)
            configs = list(dict.fromkeys([pick, *schedules.candidates(shape, device)]))
        return Space(shape, tuple(configs), tuple(schedules.estimate(shape, one, device) for one in configs))

    @functools.cached_property
    def predicted_us(self) -> np.ndarray:
        """The model's latencies."""
        return np.array([estimate.latency_us for estimate in self.estimates])

    @functools.cached_property
    def order(self) -> np.ndarray:
        """Numbers of the configurations, the fastest by the model first; of equals the first in order."""
        keys = sorted(range(len(self.configs)), key=lambda i: (self.predicted_us[i], self.configs[i]))
        return np.array(keys)

    @functools.cached_property
    def numbers(self) -> dict[KernelConfig, int]:
        """Of each configuration."""
        return {config: number for number, config in enumerate(self.configs)}


class Search(ABC):
    """Which of a space's configurations to measure, in which order.

    Parameters
    ----------
    space : Space
        What there is.
    seed : int
        Of all that is drawn at random.
    """

    def __init__(self, space: Space, seed: int = 0) -> None:
        self.space, self.seed = space, seed
        # Layers of one seed draw different numbers.
        self.seeds = (seed, zlib.crc32(str(space.shape).encode()))
        self.times_us: dict[int, float] = {}

    def propose(self, count: int) -> list[KernelConfig]:
        """At most ``count`` configurations to measure next, none of them known; fewer where no more are left."""
        return [self.space.configs[number] for number in self._next(count)]

    def observe(self, results: Iterable[Measurement]) -> None:
        """Take note of what was measured, whoever asked for it; what is not of this space tells nothing."""
        for result in results:
            number = self.space.numbers.get(result.config)
            if number is not None:
                self.times_us[number] = result.median_us

    @abstractmethod
    def _next(self, count: int) -> list[int]:
        """Numbers of configurations."""

    def _first_unknown(self, order: Iterable[int], count: int) -> list[int]:
        return [int(number) for number in order if number not in self.times_us][:count]


class ModelSearch(Search):
    """What the analytical model thinks fastest, in its order: with ``k`` trials its top ``k``."""

    def _next(self, count: int) -> list[int]:
        return self._first_unknown(self.space.order, count)


class ExhaustiveSearch(Search):
    """Every candidate: the oracle."""

    def _next(self, count: int) -> list[int]:
        return self._first_unknown(range(len(self.space.configs)), count)


class RandomSearch(Search):
    """At random, each once."""

    def _next(self, count: int) -> list[int]:
        order = np.random.default_rng(self.seeds).permutation(len(self.space.configs))
        return self._first_unknown(order, count)


class XgboostSearch(Search):
    """Boosted trees learn from what was measured how far the analytical model is off.

    They predict the logarithm of the time over the model's prediction, from the configuration, the shape and the
    prediction's parts.  The first batch is what the model thinks best, and the best of each further strategy, whose
    errors the trees cannot know yet.  Of later batches one in `BATCH` is drawn at random; the rest is what the two
    predict to be fastest together.

    Parameters
    ----------
    space : Space
        What there is.
    seed : int
        Of the trees, and of what is drawn at random.
    history : sequence of (Space, dict of int to float)
        Other layers on the same device, and the microseconds of their configurations: what the model misjudged there
        is learned ahead of the first batch.
    with_model : bool
        Whether the model's predictions are used at all; without them the first batch is random.

    Raises
    ------
    TdcError
        If xgboost is not installed.
    """

    # Of the first batch, the best of other strategies than those that the model thinks best.
    LEADERS = 2
    # What was measured of other layers counts by this much.
    HISTORY_WEIGHT = 0.3

    def __init__(
        self,
        space: Space,
        seed: int = 0,
        history: Sequence[tuple[Space, dict[int, float]]] = (),
        with_model: bool = True,
    ) -> None:
        super().__init__(space, seed)
        try:
            import xgboost
        except ModuleNotFoundError:
            raise TdcError(
                "XGBoost-guided search needs xgboost; install it with: pip install 'tdc-tvm[tune]', or choose another"
                " strategy"
            ) from None
        self._xgboost: Any = xgboost
        self.with_model = with_model
        # Without the model all configurations seem alike.
        self._prior = np.log(space.predicted_us) if with_model else np.zeros(len(space.configs))
        self._features = features(space, with_model)
        self._history = [
            _lesson(other, times_us, with_model)
            for other, times_us in history
            if times_us and _further_parameters(other) == _further_parameters(space)
        ]

    def _next(self, count: int) -> list[int]:
        rng = np.random.default_rng([*self.seeds, len(self.times_us)])
        if not self.times_us and not self._history:
            if not self.with_model:
                return self._first_unknown(rng.permutation(len(self.space.configs)), count)
            return self._first(count)
        promising = self._first_unknown(np.argsort(self._predict(), kind="stable"), len(self.space.configs))
        drawn = count // BATCH if len(promising) > count else 0
        best, rest = promising[: count - drawn], promising[count - drawn :]
        return best + [rest[i] for i in rng.choice(len(rest), drawn, replace=False)]

    def _first(self, count: int) -> list[int]:
        order = self._first_unknown(self.space.order, len(self.space.configs))
        leaders: dict[str, int] = {}
        for number in order:
            leaders.setdefault(self.space.configs[number].strategy, number)
        room = min(self.LEADERS, max(0, count - 1))
        others = [number for number in leaders.values() if number not in order[: count - room]][:room]
        chosen = order[: count - len(others)]
        return chosen + [number for number in others if number not in chosen]

    def _predict(self) -> np.ndarray:
        """Logarithms of times of all configurations."""
        lessons = list(self._history)
        if self.times_us:
            found, targets, weights = _lesson(self.space, self.times_us, self.with_model)
            lessons.append((found, targets, weights / self.HISTORY_WEIGHT))
        inputs, targets, weights = (np.concatenate(one) for one in zip(*lessons, strict=True))
        data = self._xgboost.DMatrix(inputs, targets, weight=weights)
        options = {
            "max_depth": 5,
            "eta": 0.15,
            "subsample": 0.8,
            "colsample_bynode": 0.8,
            "base_score": float(np.median(targets)),
            "seed": self.seed,
            "nthread": 1,
            "verbosity": 0,
        }
        trees = self._xgboost.train(options, data, 60)
        return self._prior + trees.predict(self._xgboost.DMatrix(self._features))


def _lesson(space: Space, times_us: dict[int, float], with_model: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What there is to learn of a layer: features, logarithms to predict, and weights, the fastest counting most."""
    numbers = np.array(sorted(times_us))
    times = np.array([times_us[number] for number in numbers])
    timed = times[np.isfinite(times)]
    # What failed is as if it were twice as slow as the slowest.
    times = np.where(np.isfinite(times), times, 2 * timed.max(initial=1.0))
    targets = np.log(times)
    if with_model:
        targets = targets - np.log(space.predicted_us[numbers])
    # Levels of layers differ; only the order within each matters.
    weights = XgboostSearch.HISTORY_WEIGHT * (times.min() / times) ** 2
    return features(space, with_model)[numbers], targets - np.median(targets), weights


_STRATEGIES = ("tile", "cluster", "two", "three", "dense", "conv")
_PARTS = ("launch", "weights", "input", "reduce", "core", "expand", "handover", "output", "contention", "memory")
_FIELDS = ("tile_h", "tile_w", "split", "deep", "warps", "crews", "group")
_PARAMETERS = (*(f"{name}{number}" for number in ("", 1, 2) for name in _FIELDS), "cut")


@functools.lru_cache(maxsize=256)
def features(space: Space, with_model: bool = True) -> np.ndarray:
    """Numbers that times depend on, a row for each configuration: of the shape, the configuration, the prediction.

    Columns are the same for all spaces of like parameters; those that a strategy does not have are NaN.
    """
    first, last = stages_of(space.shape)[0], stages_of(space.shape)[-1]
    dense = space.shape.dense if isinstance(space.shape, TuckerConvShape) else space.shape
    shape = [
        dense.out_height * dense.out_width * dense.batch,
        dense.in_channels,
        dense.out_channels,
        first.out_channels,
        last.in_channels,
        dense.kernel[0] * dense.kernel[1],
        dense.stride[0],
    ]
    named = _further_parameters(space)
    rows = []
    for config, estimate in zip(space.configs, space.estimates, strict=True):
        values = dict(config.parameters)
        pixels = values.get("tile_h", math.nan) * values.get("tile_w", math.nan)
        warps = values.get("warps", math.nan) * values.get("crews", math.nan)
        row = [*shape, *(config.strategy == one for one in _STRATEGIES), pixels, warps, pixels / warps]
        row += [values.get(name, math.nan) for name in (*_PARAMETERS, *named)]
        if with_model:
            total_us = estimate.latency_us
            row += [math.log(total_us), *(estimate.parts_us.get(name, 0.0) / total_us for name in _PARTS)]
        rows.append(row)
    return np.array(rows, float)


def _further_parameters(space: Space) -> list[str]:
    """Of grouped convolutions, and on CPUs."""
    return sorted({name for config in space.configs for name, _ in config.parameters} - set(_PARAMETERS))


STRATEGIES: dict[str, Callable[..., Search]] = {
    "model": ModelSearch,
    "exhaustive": ExhaustiveSearch,
    "random": RandomSearch,
    "xgboost": XgboostSearch,
}


def run_search(search: Search, measurer: Measurer, trials: int, batch: int = BATCH) -> Iterator[Measurement]:
    """Measure what a search proposes, until it has seen ``trials`` configurations or has no more.

    Parameters
    ----------
    search : Search
        What it was told before counts as trials.
    measurer : Measurer
        What measures.
    trials : int
        The budget.
    batch : int
        Configurations that are proposed at a time, at most.

    Yields
    ------
    Measurement
        Each as it comes; the search is told a batch when all of it is there.
    """
    while (left := trials - len(search.times_us)) > 0:
        configs = search.propose(min(batch, left))
        if not configs:
            return
        results = []
        for result in measurer.measure(search.space.shape, configs):
            results.append(result)
            yield result
        search.observe(results)
