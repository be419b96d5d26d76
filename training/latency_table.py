"""How long each layer of a network takes: as it is, and at each pair of ranks that it might get."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tdc_tvm.schedules
from tdc_tvm.errors import TdcError
from tdc_tvm.files import write_atomic
from tdc_tvm.plan import Ranks
from tdc_tvm.schedules import backend
from tdc_tvm.schedules.cuda.fold_width import Folded
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.shape import Conv2dShape, TuckerConvShape

FORMAT_VERSION = 1
MODEL = "analytical model"
# Called with what is done and what there is to do, in predictions.
Progress = Callable[[int, int], None]


# Fewer channels, as of images, are not worth a 1x1.
MIN_CHANNELS = 16


def candidate_ranks(channels: int) -> list[int]:
    """The ranks tried for a side of a layer: multiples of 8, or of 16 from 128 channels on and 32 from rank 128; all.

    Kernels compute channels by eights and more, so that ranks between would take the same time.
    """
    if channels < 128:
        return [*range(8, channels, 8), channels]
    return [*range(16, min(channels, 128), 16), *range(128, channels, 32), channels]


def candidates(shape: Conv2dShape) -> list[Ranks]:
    """The ranks that a layer might get: those that save weights or multiply-adds; none of layers of few channels."""
    if min(shape.in_channels, shape.out_channels) < MIN_CHANNELS:
        return []
    found = []
    for rank_out, rank_in in itertools.product(candidate_ranks(shape.out_channels), candidate_ranks(shape.in_channels)):
        tucker = TuckerConvShape(shape, rank_in, rank_out)
        if tucker.weight_count < shape.weight_count or tucker.macs < shape.macs:
            found.append(Ranks(rank_out, rank_in))
    return found


@dataclass(frozen=True)
class LayerLatencies:
    """Latencies of one convolution in microseconds.

    Parameters
    ----------
    dense_us : float
        As it is.
    tucker_us : mapping of Ranks to float
        As one operator in Tucker form; empty if it has none.
    """

    dense_us: float
    tucker_us: Mapping[Ranks, float] = field(default_factory=dict)


@dataclass
class LatencyTable:
    """Latencies of convolutions on one device in one precision, by shape; as a file, JSON.

    Parameters
    ----------
    device, precision : str
        What they are for.
    source : str
        ``"analytical model"``, or how they were measured.
    layers : dict of Conv2dShape to LayerLatencies
        Shapes without their precision: ``"fp32"``.

    Notes
    -----
    A file looks like this; ``kernel`` to ``groups`` may be left out where they are those of a plain 1x1::

        {"format_version": 1, "source": "measured", "device": "H100", "precision": "fp16",
         "layers": [{"shape": {"batch": 1, "height": 56, "width": 56, "in_channels": 64, "out_channels": 64,
                               "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1, 1, 1],
                               "dilation": [1, 1], "groups": 1},
                     "dense_us": 1.94,
                     "ranks": [[32, 64, 1.62]]}]}

    Each of ``ranks`` is rank_out, rank_in and microseconds.  What the model predicted has besides the
    ``fingerprint`` of the model: that of another release is predicted again.
    """

    device: str
    precision: str
    source: str = MODEL
    layers: dict[Conv2dShape, LayerLatencies] = field(default_factory=dict)

    @property
    def is_predicted(self) -> bool:
        """Whether the model predicts what is missing."""
        return self.source == MODEL

    def __getitem__(self, shape: Conv2dShape) -> LayerLatencies:
        return self.layers[shape.with_precision("fp32")]

    def complete(
        self,
        dense: Iterable[Conv2dShape],
        tucker: Iterable[Conv2dShape],
        device: DeviceSpec,
        progress: Progress | None = None,
    ) -> int:
        """Predict what is missing.

        Parameters
        ----------
        dense, tucker : iterables of Conv2dShape
            All layers of a network, and those of them that have a Tucker form; of any precision.
        device : DeviceSpec
            The device that the table is for.
        progress : callable, optional
            Called after each prediction with the number of those done and of all.

        Returns
        -------
        int
            How many layers were added.

        Raises
        ------
        TdcError
            If the device cannot compute a layer in the precision, or a measured table lacks one.
        """
        wanted = {shape.with_precision("fp32"): False for shape in dense}
        wanted |= {shape.with_precision("fp32"): True for shape in tucker}
        missing = {
            shape: candidates(shape) if has_form else []
            for shape, has_form in wanted.items()
            if shape not in self.layers or (self.is_predicted and has_form and not self.layers[shape].tucker_us)
        }
        missing = {shape: pairs for shape, pairs in missing.items() if pairs or shape not in self.layers}
        if missing and not self.is_predicted:
            names = "; ".join(str(shape) for shape in list(missing)[:5])
            raise TdcError(
                f"the table of latencies ({self.source}) lacks {len(missing)} of the network's {len(wanted)} kinds of"
                f" layer: {names}; measure them, too, or leave the table out to have all predicted"
            )
        done, total = 0, sum(1 + len(pairs) for pairs in missing.values())
        for shape, pairs in missing.items():
            found = []
            for ranks in (None, *pairs):
                found.append(_predict_us(shape.with_precision(self.precision), ranks, device))
                done += 1
                if progress is not None:
                    progress(done, total)
            self.layers[shape] = LayerLatencies(found[0], dict(zip(pairs, found[1:], strict=True)))
        return len(missing)

    def save(self, path: str | os.PathLike) -> None:
        """Write the table.

        Raises
        ------
        TdcError
            If the file cannot be written.
        """
        entries = []
        for shape, latencies in self.layers.items():
            extents = {name: value for name, value in asdict(shape).items() if name in _SHAPE_KEYS}
            ranks = [[*pair, latency_us] for pair, latency_us in latencies.tucker_us.items()]
            entries.append({"shape": extents, "dense_us": latencies.dense_us, "ranks": ranks})
        data: dict[str, Any] = {"format_version": FORMAT_VERSION, "source": self.source}
        if self.is_predicted:
            data["fingerprint"] = fingerprint()
        data |= {"device": self.device, "precision": self.precision}
        # A line for each layer, which people can compare.
        lines = ",\n  ".join(json.dumps(entry) for entry in entries)
        text = json.dumps(data)[:-1] + f', "layers": [\n  {lines}\n]}}\n'
        with write_atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike, device: str, precision: str) -> LatencyTable:
        """Read a table; empty if another release's model predicted it.

        Raises
        ------
        TdcError
            If the file cannot be read, is no table, or is of another device or precision.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise TdcError(f"cannot read the table of latencies {path}: {error.strerror or error}") from None
        except ValueError as error:
            raise TdcError(f"{path} is not valid JSON: {error}") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION or "device" not in data:
            raise TdcError(
                f"{path} is no table of latencies of format_version {FORMAT_VERSION} (found {version!r});"
                " give another file, or a name that is not there yet to write one"
            )
        for key, expected in (("device", device), ("precision", precision)):
            if data.get(key) != expected:
                raise TdcError(
                    f"{path} holds latencies of the {key} {data.get(key)!r}, wanted is {expected!r};"
                    " give another file for it"
                )
        table = LatencyTable(device, precision, str(data.get("source", "measured")))
        if table.is_predicted and data.get("fingerprint") != fingerprint():
            return table
        entries = data.get("layers")
        for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
            try:
                shape, latencies = _read_entry(entry)
            except (KeyError, TypeError, ValueError, TdcError) as error:
                what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise TdcError(f"layer {number} of {path} is no entry of a table of latencies: {what}") from None
            table.layers[shape] = latencies
        return table


_SHAPE_KEYS = [key.name for key in fields(Conv2dShape) if key.name not in ("precision", "prologue")]


def _read_entry(entry: Any) -> tuple[Conv2dShape, LayerLatencies]:
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entry["shape"].items()
    }
    shape = Conv2dShape(**values)
    tucker_us = {Ranks(int(rank_out), int(rank_in)): float(us) for rank_out, rank_in, us in entry["ranks"]}
    for ranks in tucker_us:
        if not (1 <= ranks.rank_out <= shape.out_channels and 1 <= ranks.rank_in <= shape.in_channels):
            raise ValueError(f"the ranks {ranks} do not fit {shape}")
    latencies = LayerLatencies(float(entry["dense_us"]), tucker_us)
    if not all(0.0 < us < math.inf for us in (latencies.dense_us, *tucker_us.values())):
        raise ValueError(f"latencies of {shape} are not all positive and finite")
    return shape, latencies


def _predict_us(shape: Conv2dShape, ranks: Ranks | None, device: DeviceSpec) -> float:
    """What the compiler expects of a layer, which it computes as the same model says (`LowerConv`)."""
    choose = backend(device).choose
    if ranks is not None:
        return choose(TuckerConvShape(shape, ranks.rank_in, ranks.rank_out), device)[1].latency_us
    if shape.groups > 1:
        # Computed in FP32 on GPUs.
        shape = replace(shape, precision="fp32")
    latency_us = choose(shape, device)[1].latency_us
    folded = Folded.of(shape) if device.kind == "cuda" else None
    return latency_us if folded is None else min(latency_us, choose(folded.shape, device)[1].latency_us)


def fingerprint() -> str:
    """Of all that the model's predictions depend on: code and data of the schedules."""
    folder = Path(tdc_tvm.schedules.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
