"""What became of each layer, kept as an attribute of the module while passes run over it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import tvm

_ATTR = "tdc.layers"


@dataclass(frozen=True)
class LayerReport:
    """The compiler's decision on one convolution or Tucker layer.

    Parameters
    ----------
    name : str
        The layer's name in the source model.
    kind : str
        ``"tucker_conv"`` or ``"conv2d"``.
    shape : str
        Input extents (NHWC), output channels, window.
    ranks : tuple[int, int] or None
        (rank_out, rank_in) of a Tucker layer, the order of plans.
    fused : bool
        Whether the whole layer is one operator.
    reason : str
        Why it is not fused, or why no schedule of ours serves it; empty otherwise.
    strategy, config : str
        The schedule and its parameters.
    predicted_latency_us : float or None
        By the analytical model, in microseconds.
    predicted_parts_us : dict of str to float, or None
        What the prediction is the sum of: launch, transfers, stages, synchronisation.
    measured_latency_us : float or None
        Of the same configuration, if measurements decided; if not, the model did.
    """

    name: str
    kind: str
    shape: str
    ranks: tuple[int, int] | None = None
    fused: bool = False
    reason: str = ""
    strategy: str = ""
    config: str = ""
    predicted_latency_us: float | None = None
    predicted_parts_us: dict[str, float] | None = None
    measured_latency_us: float | None = None

    def to_dict(self) -> dict:
        """The report as plain data."""
        return asdict(self)


def add_layers(mod: tvm.IRModule, layers: Iterable[LayerReport]) -> tvm.IRModule:
    """Append reports to the module's."""
    return mod.with_attr(_ATTR, json.dumps([layer.to_dict() for layer in (*layers_of(mod), *layers)]))


def layers_of(mod: tvm.IRModule) -> list[LayerReport]:
    """The reports collected so far."""
    text = (mod.attrs or {}).get(_ATTR)
    entries = json.loads(str(text)) if text is not None else []
    return [LayerReport(**{**e, "ranks": tuple(e["ranks"]) if e["ranks"] else None}) for e in entries]
