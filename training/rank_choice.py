"""What was chosen for a network and each of its layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tdc_tvm.plan import DecompositionPlan, Ranks


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
