"""Decomposition plans: which layers are decomposed, at which ranks, and why the others are kept.

Nothing here knows PyTorch or ONNX: `decompose_layers` serves both.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tdc_tvm.errors import TdcError
from tdc_tvm.files import write_atomic
from tdc_tvm.presets import PRESETS
from tdc_tvm.tucker import TuckerFactors, check_ranks, ranks_by_energy, tucker2

FORMAT_VERSION = 1


class Ranks(NamedTuple):
    """Tucker-2 ranks of one layer: channels after and before the core convolution."""

    rank_out: int
    rank_in: int

    def __str__(self) -> str:
        return f"({self.rank_out}, {self.rank_in})"


@dataclass(frozen=True)
class DecompositionPlan:
    """The ranks of every layer that is to be decomposed.

    Parameters
    ----------
    layers : mapping of str to Ranks
        By layer name: the module's path in PyTorch, the weight's name without ``.weight`` in ONNX.
        A plain tuple stands for ``(rank_out, rank_in)``.
    model : str, optional
        What the plan was made for; only shown to people.

    Raises
    ------
    TdcError
        If a rank is not a whole number of at least 1.
    """

    layers: Mapping[str, Ranks] = field(default_factory=dict)
    model: str | None = None

    def __post_init__(self) -> None:
        layers = {name: _ranks(ranks, f"layer {name!r}") for name, ranks in self.layers.items()}
        object.__setattr__(self, "layers", layers)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, in the form of its file."""
        data: dict[str, Any] = {"format_version": FORMAT_VERSION}
        if self.model is not None:
            data["model"] = self.model
        data["layers"] = {name: ranks._asdict() for name, ranks in self.layers.items()}
        return data

    @staticmethod
    def from_dict(data: Any, source: str = "the plan") -> DecompositionPlan:
        """Read a plan from plain data; ``source`` names it in errors.

        Raises
        ------
        TdcError
            If the data are not a plan of this format version.
        """
        _check_keys(data, {"format_version", "layers"}, {"model"}, source)
        if data["format_version"] != FORMAT_VERSION:
            raise TdcError(
                f"{source} has format_version {data['format_version']!r}; this release reads {FORMAT_VERSION}; "
                "write the plan again or upgrade"
            )
        if not isinstance(data.get("model", ""), str):
            raise TdcError(f"'model' of {source} is {data['model']!r}; expected text")
        layers = data["layers"]
        if not isinstance(layers, dict) or not all(isinstance(name, str) for name in layers):
            raise TdcError(f"'layers' of {source} is {_kind(layers)}; expected layer names with their ranks")
        for name, entry in layers.items():
            _check_keys(entry, {"rank_out", "rank_in"}, set(), f"layer {name!r} of {source}")
        return DecompositionPlan(
            {
                name: _ranks((entry["rank_out"], entry["rank_in"]), f"layer {name!r} of {source}")
                for name, entry in layers.items()
            },
            data.get("model"),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON or YAML, by the suffix of ``path``.

        Raises
        ------
        TdcError
            If the suffix is neither, or the file cannot be written.
        """
        if _is_yaml(path):
            import yaml

            text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        else:
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        with write_atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike) -> DecompositionPlan:
        """Read a plan from a JSON or YAML file, by the suffix of ``path``.

        Raises
        ------
        TdcError
            If the file cannot be read or is not a plan.
        """
        is_yaml = _is_yaml(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise TdcError(f"cannot read the plan {path}: {reason}") from None
        if is_yaml:
            import yaml

            try:
                data = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise TdcError(f"{path} is not valid YAML: {error}") from None
        else:
            try:
                data = json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, path))
            except json.JSONDecodeError as error:
                raise TdcError(f"{path} is not valid JSON: {error}") from None
        return DecompositionPlan.from_dict(data, str(path))


# How a user says ranks: one pair for all layers, an energy, a plan, or text that names one of these.
RankSpec = tuple[int, int] | float | DecompositionPlan | Mapping[str, tuple[int, int]] | str | os.PathLike


def preset_plan(name: str) -> DecompositionPlan:
    """The published ranks of TDC for one of torchvision's CNNs, e.g. ``"resnet18"``.

    Raises
    ------
    TdcError
        If there is no preset of that name.
    """
    if name not in PRESETS:
        raise TdcError(f"no preset named {name!r}; there are: {', '.join(sorted(PRESETS))}")
    return DecompositionPlan(PRESETS[name], name)  # type: ignore[arg-type]


def parse_ranks(spec: RankSpec) -> Ranks | float | DecompositionPlan:
    """Bring any way of saying ranks into one of three forms: a pair, an energy, a plan.

    Parameters
    ----------
    spec : RankSpec
        Text may be ``"32,64"`` (rank_out, rank_in), ``"0.9"`` (an energy), the name of a preset, or
        the path of a plan file.

    Raises
    ------
    TdcError
        If it is none of these, or the plan file cannot be read.
    """
    if isinstance(spec, DecompositionPlan):
        return spec
    if isinstance(spec, Mapping):
        return DecompositionPlan(spec)  # type: ignore[arg-type]
    if isinstance(spec, str):
        if match := re.fullmatch(r"\(?\s*(\d+)\s*,\s*(\d+)\s*\)?", spec):
            return _ranks((int(match[1]), int(match[2])), "all layers")
        if re.fullmatch(r"\d*\.\d+|\d+\.?", spec):
            return _energy(float(spec))
        if spec in PRESETS:
            return preset_plan(spec)
    if isinstance(spec, (str, os.PathLike)):
        if not Path(spec).suffix and not Path(spec).exists():
            raise TdcError(
                f"cannot read ranks from {str(spec)!r}; expected a pair such as '32,64' (rank_out, rank_in), an energy "
                f"such as '0.9', a preset ({', '.join(sorted(PRESETS))}), or the path of a .json or .yaml plan"
            )
        return DecompositionPlan.load(spec)
    if isinstance(spec, float):
        return _energy(spec)
    return _ranks(spec, "all layers")


@dataclass(frozen=True, eq=False)
class ConvLayer:
    """A convolution as the planner sees it.

    Parameters
    ----------
    name : str
        Unique in the model.
    kernel : numpy.ndarray
        Shape ``(out_channels, in_channels / groups, kernel_h, kernel_w)``.
    groups : int
        Channel groups.
    pixels : tuple[int, int], optional
        Positions (batch x height x width) of the input and of the output, if they are known: give the MACs.
    keep_reason : str, optional
        Why the caller cannot decompose this layer, whatever its kernel.
    """

    name: str
    kernel: np.ndarray
    groups: int = 1
    pixels: tuple[int, int] | None = None
    keep_reason: str | None = None

    @property
    def kind(self) -> str:
        """``conv``, ``pointwise``, ``grouped`` or ``depthwise``."""
        if self.groups > 1:
            return "depthwise" if self.kernel.shape[1] == 1 else "grouped"
        return "pointwise" if self.kernel.shape[2:] == (1, 1) else "conv"

    @property
    def obstacle(self) -> str | None:
        """Why this layer cannot be decomposed; None if it can."""
        if self.keep_reason is not None:
            return self.keep_reason
        return {"pointwise": "1x1", "grouped": "grouped", "depthwise": "depthwise"}.get(self.kind)


@dataclass(frozen=True)
class LayerReport:
    """What became of one convolution; weights and MACs without biases, MACs None if sizes are unknown."""

    name: str
    kind: str
    kernel_shape: tuple[int, ...]
    ranks: Ranks | None
    reason: str
    relative_error: float | None
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None

    @property
    def decomposed(self) -> bool:
        """Whether the layer was decomposed."""
        return self.ranks is not None


@dataclass(frozen=True)
class DecompositionReport:
    """What became of every convolution of a model, in its order."""

    layers: tuple[LayerReport, ...]
    model: str | None = None

    @property
    def plan(self) -> DecompositionPlan:
        """The ranks in use, as a plan that gives the same decomposition again."""
        return DecompositionPlan({layer.name: layer.ranks for layer in self.layers if layer.ranks}, self.model)

    @property
    def decomposed(self) -> tuple[LayerReport, ...]:
        """The decomposed layers."""
        return tuple(layer for layer in self.layers if layer.decomposed)

    @property
    def notes(self) -> tuple[str, ...]:
        """Which convolutions are not decomposed, a line for each reason."""
        kept: dict[str, list[str]] = defaultdict(list)
        for layer in self.layers:
            if not layer.decomposed:
                kept[layer.reason].append(layer.name)
        return tuple(f"not decomposed ({reason}): {_enumeration(names)}" for reason, names in kept.items())

    @property
    def params(self) -> tuple[int, int]:
        """Weights of all convolutions, before and after."""
        return sum(layer.params_before for layer in self.layers), sum(layer.params_after for layer in self.layers)

    @property
    def macs(self) -> tuple[int, int] | None:
        """MACs of all convolutions, before and after; None if a size is unknown."""
        before, after = [layer.macs_before for layer in self.layers], [layer.macs_after for layer in self.layers]
        if None in before or None in after:
            return None
        return sum(before), sum(after)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        layers = [
            {**asdict(layer), "ranks": layer.ranks and layer.ranks._asdict(), "decomposed": layer.decomposed}
            for layer in self.layers
        ]
        return {"model": self.model, "params": self.params, "macs": self.macs, "layers": layers}


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A resolved decomposition: the report, and the factors by layer name (empty if not asked for)."""

    report: DecompositionReport
    factors: Mapping[str, TuckerFactors]

    @property
    def plan(self) -> DecompositionPlan:
        """The ranks in use."""
        return self.report.plan


def decompose_layers(
    layers: Sequence[ConvLayer], ranks: RankSpec, *, factorize: bool = True, model: str | None = None
) -> Decomposition:
    """Decide on every layer's ranks, decompose the kernels, and report why.

    Parameters
    ----------
    layers : sequence of ConvLayer
        All convolutions of a model.
    ranks : RankSpec
        One pair is clamped to each layer's channels; a plan must name existing, eligible layers and
        fitting ranks; an energy gives each layer the smallest ranks that keep it, and keeps layers
        whose weights would not shrink.
    factorize : bool
        False decides on ranks only: no factors, no errors in the report.
    model : str, optional
        A name for the report and its plan; a plan's own name goes first.

    Returns
    -------
    Decomposition

    Raises
    ------
    TdcError
        If the ranks cannot be read or do not fit the layers, a kernel is not finite, or two layers
        have the same name.
    """
    spec = parse_ranks(ranks)
    names = [layer.name for layer in layers]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise TdcError(f"layer names must be unique; found several called {', '.join(repeated)}")
    if isinstance(spec, DecompositionPlan):
        model = spec.model or model
        _check_plan(spec, layers)
    reports, factors = [], {}
    for layer in layers:
        try:
            chosen, reason = _choose(layer, spec)
            if chosen is not None and factorize:
                factors[layer.name] = tucker2(layer.kernel, chosen)
        except TdcError as error:
            raise TdcError(f"layer {layer.name!r}: {error}") from None
        relative_error = factors[layer.name].relative_error if layer.name in factors else None
        reports.append(_report(layer, chosen, reason, relative_error))
    return Decomposition(DecompositionReport(tuple(reports), model), factors)


def _choose(layer: ConvLayer, spec: Ranks | float | DecompositionPlan) -> tuple[Ranks | None, str]:
    """The ranks of a layer and the reason for them; None keeps the layer."""
    if layer.obstacle:
        return None, layer.obstacle
    if isinstance(spec, DecompositionPlan):
        ranks = spec.layers.get(layer.name)
        if ranks is None:
            return None, "not in the plan"
        reason = "in the plan"
    elif isinstance(spec, Ranks):
        ranks = Ranks(*(min(pair) for pair in zip(spec, layer.kernel.shape[:2], strict=True)))
        reason = "ranks given for all layers"
        if ranks != spec:
            reason = f"ranks given for all layers, {spec} clamped to the layer's channels"
    else:
        ranks = Ranks(*ranks_by_energy(layer.kernel, spec))
        reason = f"keeps {spec:g} of the energy"
    weights = sum(_tucker_weights(layer, ranks))
    if weights >= layer.kernel.size:
        comparison = f"not smaller: ranks {ranks} take {weights} weights, the layer has {layer.kernel.size}"
        if isinstance(spec, float):
            return None, comparison
        reason += f"; {comparison}"
    return ranks, reason


def _report(layer: ConvLayer, ranks: Ranks | None, reason: str, error: float | None) -> LayerReport:
    size = layer.kernel.size
    macs_before, macs_after = None, None
    if layer.pixels is not None:
        in_pixels, out_pixels = layer.pixels
        macs_before = macs_after = out_pixels * size
        if ranks is not None:
            reduce, rest = _tucker_weights(layer, ranks)
            macs_after = in_pixels * reduce + out_pixels * rest
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        kernel_shape=tuple(layer.kernel.shape),
        ranks=ranks,
        reason=reason,
        relative_error=error,
        params_before=size,
        params_after=size if ranks is None else sum(_tucker_weights(layer, ranks)),
        macs_before=macs_before,
        macs_after=macs_after,
    )


def _tucker_weights(layer: ConvLayer, ranks: Ranks) -> tuple[int, int]:
    """Weights of the reducing 1x1, which works on the input's pixels, and of the two stages on the output's."""
    out_channels, in_channels, height, width = layer.kernel.shape
    core = ranks.rank_in * ranks.rank_out * height * width
    return in_channels * ranks.rank_in, core + ranks.rank_out * out_channels


def _check_plan(plan: DecompositionPlan, layers: Sequence[ConvLayer]) -> None:
    by_name = {layer.name: layer for layer in layers}
    absent = [_with_matches(name, by_name) for name in plan.layers if name not in by_name]
    if absent:
        is_preset = plan.model in PRESETS
        kind = f"preset {plan.model}" if is_preset else f"plan of {plan.model}" if plan.model else "plan"
        remedy = "use it with torchvision's model of that name, or say" if is_preset else "correct the names, or say"
        raise TdcError(
            f"the {kind} names {len(absent)} layer(s) that the model does not have: {_enumeration(absent)}; "
            f"{remedy} ranks or an energy for all layers"
        )
    for name, ranks in plan.layers.items():
        layer = by_name[name]
        if layer.obstacle:
            raise TdcError(
                f"the plan names layer {name!r}, which cannot be decomposed ({layer.obstacle}); remove the entry"
            )
        check_ranks(ranks, layer.kernel.shape[:2], f"layer {name!r}")


def _enumeration(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")


def _object(pairs: list[tuple[str, Any]], path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object; of equal keys, Python's reader would keep the last."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({repr(key) for key in keys if keys.count(key) > 1})
        raise TdcError(f"{path} has keys more than once: {_enumeration(repeated)}; keep one of each")
    return data


def _with_matches(name: str, known: Iterable[str]) -> str:
    matches = get_close_matches(name, list(known), n=2, cutoff=0.6)
    return repr(name) + (f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else "")


def _ranks(value: Any, owner: str) -> Ranks:
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(pair) != 2 or not all(isinstance(rank, (int, np.integer)) and not isinstance(rank, bool) for rank in pair):
        raise TdcError(
            f"the ranks of {owner} are {value!r}; expected two whole numbers (rank_out, rank_in), such as (32, 64)"
        )
    if min(pair) < 1:
        raise TdcError(f"the ranks of {owner} are {pair}; both must be at least 1 (leave a layer out to keep it)")
    return Ranks(int(pair[0]), int(pair[1]))


def _energy(value: float) -> float:
    if not 0.0 < value < 1.0:
        raise TdcError(f"cannot use {value:g} as an energy; expected a share between 0 and 1 (exclusive), such as 0.9")
    return value


def _check_keys(data: Any, required: set[str], optional: set[str], source: str) -> None:
    if not isinstance(data, dict):
        raise TdcError(f"{source} is {_kind(data)}; expected the keys {', '.join(sorted(required))}")
    if unknown := [_with_matches(str(key), required | optional) for key in data if key not in required | optional]:
        raise TdcError(
            f"{source} has unknown keys: {', '.join(unknown)}; expected {', '.join(sorted(required | optional))}"
        )
    if missing := sorted(required - set(data)):
        raise TdcError(f"{source} lacks {', '.join(missing)}; expected the keys {', '.join(sorted(required))}")


def _kind(data: Any) -> str:
    return "empty" if data is None else f"a {type(data).__name__}"


def _is_yaml(path: str | os.PathLike) -> bool:
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise TdcError(f"a plan's file ends in .json, .yaml or .yml; found {str(path)!r}")
    return suffix != ".json"
