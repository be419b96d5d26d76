"""How much the loss depends on each layer's weights, from gradients of a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.training.inputs import eval_mode

# From a model and a batch of the loader to the mean loss of its images.
Loss = Callable[[nn.Module, Any], torch.Tensor]


def cross_entropy(model: nn.Module, batch: Any, *, classes: int | None = None) -> torch.Tensor:
    """The mean cross-entropy of ``(images, labels)``.

    Parameters
    ----------
    model : nn.Module
        Gives scores ``(batch, classes)``.
    batch : pair of tensors
        Images, and whole numbers ``(batch,)``.
    classes : int, optional
        How many there are in the data, if that is known.

    Raises
    ------
    TdcError
        If the batch is no such pair, or the labels do not fit the model's classes.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise TdcError(
            f"the loader gives {type(batch).__name__}; expected pairs (images, labels); say loss= for others"
        )
    parameter = next(model.parameters())
    images, labels = batch[0].to(parameter.device, parameter.dtype), batch[1].to(parameter.device)
    scores = model(images)
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2:
        raise TdcError("the model does not give scores (batch, classes); say loss= for others")
    if classes not in (None, scores.shape[1]) or labels.min() < 0 or labels.max() >= scores.shape[1]:
        found = f"{classes} classes" if classes else f"labels from {int(labels.min())} to {int(labels.max())}"
        raise TdcError(
            f"the data have {found}, the model has {scores.shape[1]} classes; use the data that it was trained on"
        )
    return nn.functional.cross_entropy(scores.float(), labels)


def sensitivities(
    model: nn.Module, loader: Iterable[Any], *, loss: Loss = cross_entropy, batches: int = 8
) -> dict[str, float]:
    """The increase of the loss that each convolution's relative squared error of 1 is expected to cause.

    Parameters
    ----------
    model : nn.Module
        Trained; it is run in eval mode, and nothing of it is changed.
    loader : iterable
        Batches, as ``loss`` takes them.
    loss : callable
        From model and batch to the mean loss of the batch's images.
    batches : int
        How many are used, at most.

    Returns
    -------
    dict of str to float
        By the path of each ``nn.Conv2d`` whose weight is not computed, in the unit of the loss:
        ``tr(F) / n * ||W||^2 / 2``.

    Raises
    ------
    TdcError
        If the loader gives nothing or no batches that the loss takes, or a loss or gradient is not finite.

    Notes
    -----
    HAWQ-V2 (Dong et al., NeurIPS 2020) expects of a change dW of a layer's n weights the loss to rise by half the mean
    of the Hessian's trace times ``||dW||^2``.  The Fisher information F stands for the Hessian, as usual for trained
    models (Theis et al., arXiv 1801.05787): its trace is the mean of the images' squared gradients, here estimated by
    that of batches of B images times B, which the mean gradient, near zero after training, hardly changes.
    """
    weights = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and "weight" in module._parameters
    }
    required = [weight.requires_grad for weight in weights.values()]
    squares = torch.zeros(len(weights), dtype=torch.float64)
    count = 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with eval_mode(model), torch.enable_grad():
            for batch in loader:
                value = loss(model, batch)
                if not bool(torch.isfinite(value)):
                    found = float(value.detach())
                    raise TdcError(f"the loss of batch {count} is {found}; it must be finite: check model and data")
                gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                size = _batch_size(batch)
                for i, gradient in enumerate(gradients):
                    if gradient is not None:
                        squares[i] += size * float(gradient.detach().double().square().sum())
                count += 1
                if count >= batches:
                    break
    finally:
        for weight, wanted in zip(weights.values(), required, strict=True):
            weight.requires_grad_(wanted)
    if not count:
        raise TdcError("the loader gives no batch; at least one is needed for the layers' sensitivity")
    result = {}
    for (name, weight), square in zip(weights.items(), squares.tolist(), strict=True):
        result[name] = 0.5 * square / count / weight.numel() * float(weight.detach().double().square().sum())
        if not result[name] < float("inf"):
            raise TdcError(f"the gradient of layer {name!r} is not finite; check model and data")
    return result


def _batch_size(batch: Any) -> int:
    """Images of a batch: the first extent of its first tensor."""
    while isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    return batch.shape[0] if isinstance(batch, torch.Tensor) and batch.ndim else 1
