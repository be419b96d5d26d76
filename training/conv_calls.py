"""Which convolutions a network runs on an example, as values."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tdc_tvm.schedules.shape import Conv2dShape
from tdc_tvm.training.inputs import Example, run_with_hooks


def conv_calls(
    model: nn.Module, example: Example, precision: str
) -> tuple[dict[str, list[Conv2dShape]], list[Conv2dShape], dict[str, str]]:
    """Run a model once and record its layers.

    Returns
    -------
    convs : dict of str to list of Conv2dShape
        Of each ``nn.Conv2d`` by its path, in the order of calls.
    others : list of Conv2dShape
        Of fully connected layers, as the 1x1 convolutions that they are compiled as.
    uncounted : dict of str to str
        Convolutions of other kinds that ran, and their kind.

    Raises
    ------
    TdcError
        If the model does not run on the example.
    """
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

    layers = [
        (module, record(name)) for name, module in model.named_modules() if isinstance(module, (_ConvNd, nn.Linear))
    ]
    run_with_hooks(model, example, layers)
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
