"""Accuracy of PyTorch and ONNX models, and new statistics for batch normalisation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.training.batches import Batches
from tdc_tvm.training.inputs import eval_mode, run_model

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Score:
    """Mean cross entropy, shares of images whose class is the first or among the first five, and their number."""

    loss: float
    top1: float
    top5: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        """The score as plain data for JSON."""
        return asdict(self)


def evaluate(
    model: nn.Module, batches: Batches, *, precision: str = "fp32", accelerator: Accelerator | None = None
) -> Score:
    """Evaluate a model in eval mode.

    Parameters
    ----------
    model : nn.Module
        On the batches' device.
    batches : Batches
    precision : str
        ``fp32``, or autocast to ``bf16`` or ``fp16``.
    accelerator : Accelerator, optional
        Adds up what its processes have counted.

    Raises
    ------
    TdcError
        If the model does not run on the images, or its outputs do not fit the labels.
    """
    sums: torch.Tensor | None = None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with eval_mode(model):
        for images, labels in batches.epoch(0):
            with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
                logits = run_model(model, (images,))
            check_logits(logits, labels, batches.classes)
            part = _count(logits.float(), labels)
            sums = part if sums is None else sums + part
    if sums is None:
        sums = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)
    if accelerator is not None:
        sums = accelerator.reduce(sums, "sum")  # type: ignore[assignment]
    return _score(sums)


def evaluate_onnx(path: str | os.PathLike, batches: Batches) -> Score:
    """Evaluate an ONNX model of one input (batch, channels, height, width) by ONNX Runtime on the CPU.

    Raises
    ------
    TdcError
        If ONNX Runtime cannot load or run it, or it has other outputs than the data has classes.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises several unrelated types
        raise TdcError(f"ONNX Runtime cannot load {path}: {error}") from None
    (value, *others) = session.get_inputs()
    if others:
        raise TdcError(f"{path} takes {len(others) + 1} inputs; expected images alone")
    fixed = value.shape[0] if isinstance(value.shape[0], int) else None
    sums = torch.zeros(4, dtype=torch.float64)
    for images, labels in batches.epoch(0):
        size = fixed or len(images)
        for part, truth in zip(images.split(size), labels.split(size), strict=True):
            # A model of a fixed batch gets the last one filled up with copies.
            whole = torch.cat([part, part[:1].expand(size - len(part), -1, -1, -1)]) if fixed else part
            try:
                (output, *_) = session.run(None, {value.name: whole.contiguous().numpy()})
            except Exception as error:
                raise TdcError(f"ONNX Runtime cannot run {path} on {tuple(whole.shape)}: {error}") from None
            logits = torch.from_numpy(output)[: len(part)].float()
            check_logits(logits, truth, batches.classes)
            sums += _count(logits, truth)
    return _score(sums)


def recalibrate(model: nn.Module, batches: Batches, count: int) -> None:
    """Give batch normalisation the mean statistics of some training batches; weights stay.

    Parameters
    ----------
    model : nn.Module
        On the batches' device.
    batches : Batches
        Training data.
    count : int
        How many batches; 0 leaves the statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or not count:
        return
    with _cumulative(norms), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
        with eval_mode(model):
            for norm in norms:
                norm.train()
            for images, _ in islice(batches.epoch(0), count):
                run_model(model, (images,))


@contextmanager
def _cumulative(norms: list[Any]) -> Iterator[None]:
    """Batch normalisation keeps a plain mean of its batches instead of a moving one."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def check_logits(logits: Any, labels: torch.Tensor, classes: int | None, who: str = "the model") -> None:
    """Refuse outputs that are no logits (batch, classes), or of other classes than the labels are.

    Parameters
    ----------
    logits
        What ``who`` gave.
    labels : torch.Tensor
        Of the same images.
    classes : int, optional
        How many the data have; None looks at the labels.
    who : str
        For messages.

    Raises
    ------
    TdcError
        If they do not fit.
    """
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise TdcError(f"{who} gives {found}; expected logits of shape ({len(labels)}, classes)")
    outputs = logits.shape[1]
    if classes is not None and classes != outputs:
        raise TdcError(f"class count mismatch: {who} has {outputs} outputs, the data {classes} classes")
    for label in () if classes is not None or not len(labels) else (int(labels.min()), int(labels.max())):
        if not 0 <= label < outputs:
            raise TdcError(f"class count mismatch: {who} has {outputs} outputs, the data a label {label}")


def _count(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums over a batch: loss, first right, one of five right, images."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum").double()
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(labels))])


def _score(sums: torch.Tensor) -> Score:
    loss, top1, top5, count = sums.tolist()
    if not count:
        raise TdcError("there are no images to evaluate on")
    return Score(loss / count, top1 / count, top5 / count, round(count))
