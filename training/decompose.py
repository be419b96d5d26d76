"""Tucker decomposition of PyTorch models."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import (
    ConvLayer,
    DecompositionPlan,
    DecompositionReport,
    Ranks,
    RankSpec,
    decompose_layers,
    parse_ranks,
)
from tdc_tvm.training.inputs import Example, check_model, copy_model, run_with_hooks
from tdc_tvm.tucker import TuckerFactors, check_ranks, tucker2


class TuckerConv2d(nn.Module):
    """A convolution as ``reduce`` (1x1), ``core`` (kxk) and ``expand`` (1x1).

    ``core`` carries stride, padding and dilation, ``expand`` the bias.  As ``reduce`` has no bias,
    padding behind it equals padding before it, for every padding mode.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype
        As in ``nn.Conv2d``.
    ranks : tuple[int, int]
        ``(rank_out, rank_in)``: channels after and before the core.

    Raises
    ------
    TdcError
        If a rank is below 1 or above the channels of its side.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        ranks: tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_ranks(ranks, (out_channels, in_channels), "a TuckerConv2d")
        rank_out, rank_in = ranks
        self.reduce = nn.Conv2d(in_channels, rank_in, 1, bias=False, device=device, dtype=dtype)
        self.core = nn.Conv2d(
            rank_in,
            rank_out,
            kernel_size,  # type: ignore[arg-type]
            stride=stride,  # type: ignore[arg-type]
            padding=padding,  # type: ignore[arg-type]
            dilation=dilation,  # type: ignore[arg-type]
            bias=False,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )
        self.expand = nn.Conv2d(rank_out, out_channels, 1, bias=bias, device=device, dtype=dtype)

    @property
    def ranks(self) -> Ranks:
        """``(rank_out, rank_in)``."""
        return Ranks(self.core.out_channels, self.core.in_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(batch, in_channels, height, width)`` to ``(batch, out_channels, out_height, out_width)``."""
        return self.expand(self.core(self.reduce(x)))

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, ranks: tuple[int, int], *, init: bool = True, factors: TuckerFactors | None = None
    ) -> TuckerConv2d:
        """Build the Tucker form of a convolution.

        Parameters
        ----------
        conv : nn.Conv2d
            A dense convolution; it is not changed.
        ranks : tuple[int, int]
            ``(rank_out, rank_in)``.
        init : bool
            False leaves the weights at PyTorch's random initialisation, to be loaded from a checkpoint.
        factors : TuckerFactors, optional
            The decomposed kernel, if it is known already.

        Returns
        -------
        TuckerConv2d
            Of the convolution's type, device, train or eval mode and ``requires_grad``.

        Raises
        ------
        TdcError
            If the convolution has groups, a rank does not fit, or the kernel is not finite.
        """
        if conv.groups != 1:
            raise TdcError(f"a convolution with {conv.groups} groups has no Tucker form; only dense ones have")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            ranks,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        layer.train(conv.training)
        for stage in (layer.reduce, layer.core, layer.expand):
            stage.weight.requires_grad_(conv.weight.requires_grad)
        if conv.bias is not None and layer.expand.bias is not None:
            layer.expand.bias.requires_grad_(conv.bias.requires_grad)
        if init:
            factors = factors or tucker2(_kernel(conv), ranks)
            with torch.no_grad():
                layer.reduce.weight.copy_(torch.from_numpy(factors.u_in))
                layer.core.weight.copy_(torch.from_numpy(factors.core))
                layer.expand.weight.copy_(torch.from_numpy(factors.u_out))
                if conv.bias is not None and layer.expand.bias is not None:
                    layer.expand.bias.copy_(conv.bias)
        return layer


def decompose(
    model: nn.Module, ranks: RankSpec, *, example: Example | None = None, inplace: bool = False
) -> tuple[nn.Module, DecompositionReport]:
    """Replace a model's dense convolutions by their Tucker form.

    Parameters
    ----------
    model : nn.Module
        Any model; a module used in several places is decomposed once and stays shared.
    ranks : RankSpec
        A pair ``(rank_out, rank_in)`` for all layers, an energy in (0, 1), a plan, a preset's name or
        the path of a plan file.
    example : tensor, tensors or shape, optional
        An input: the model is run on it once, and the report then has MACs.
    inplace : bool
        True changes ``model``; by default a copy is changed.

    Returns
    -------
    model : nn.Module
        The decomposed model (a new module if ``model`` itself is a convolution).
    report : DecompositionReport
        What became of every convolution, and why.

    Raises
    ------
    TdcError
        If the ranks cannot be read or do not fit, or the model does not run on ``example``.
    """
    return _decompose(model, ranks, example, inplace, init=True, factors=None)


def apply_plan(
    model: nn.Module,
    plan: DecompositionPlan | Mapping[str, tuple[int, int]] | str | os.PathLike,
    *,
    init: bool = False,
    inplace: bool = False,
    example: Example | None = None,
    factors: Mapping[str, TuckerFactors] | None = None,
) -> tuple[nn.Module, DecompositionReport]:
    """Give a model the structure that a plan describes, by default without computing factors.

    A checkpoint of a decomposed model then loads with ``load_state_dict``.

    Parameters
    ----------
    model : nn.Module
        The original architecture.
    plan : DecompositionPlan, mapping, preset's name or path
        Which layers to replace, at which ranks.
    init : bool
        True decomposes the kernels, as `decompose` does; False leaves random weights.
    inplace : bool
        True changes ``model``; by default a copy is changed.
    example : tensor, tensors or shape, optional
        An input: the model is run on it once, and the report then has MACs.
    factors : mapping of str to TuckerFactors, optional
        The decomposed kernels of all layers in the plan, if they are known already; used instead of ``init``.

    Returns
    -------
    model : nn.Module
    report : DecompositionReport

    Raises
    ------
    TdcError
        If the plan cannot be read or does not fit the model.
    """
    spec = parse_ranks(plan)
    if not isinstance(spec, DecompositionPlan):
        raise TdcError(f"apply_plan needs a plan with ranks per layer; found {plan!r}; use decompose for it")
    return _decompose(model, spec, example, inplace, init, factors)


def _decompose(
    model: nn.Module,
    ranks: RankSpec,
    example: Example | None,
    inplace: bool,
    init: bool,
    factors: Mapping[str, TuckerFactors] | None,
) -> tuple[nn.Module, DecompositionReport]:
    check_model(model)
    if not inplace:
        model = copy_model(model)
    convs = {name: module for name, module in model.named_modules() if isinstance(module, _ConvNd)}
    pixels = _pixels(model, convs, example) if example is not None else {}
    compute = init and factors is None
    layers = _layers(model, convs, pixels, with_values=compute)
    result = decompose_layers(layers, ranks, factorize=compute, model=type(model).__name__)
    known, report = result.factors, result.report
    if factors is not None:
        known = factors
        errors = {name: entry.relative_error for name, entry in factors.items()}
        report = replace(
            report, layers=tuple(replace(layer, relative_error=errors.get(layer.name)) for layer in report.layers)
        )
    replacements: dict[nn.Module, nn.Module] = {}
    for name, chosen in result.plan.layers.items():
        conv = convs[name]
        assert isinstance(conv, nn.Conv2d)
        replacements[conv] = TuckerConv2d.from_conv(
            conv, chosen, init=init or factors is not None, factors=known.get(name)
        )
    for module in list(model.modules()):
        for child_name, child in module._modules.items():
            if child in replacements:
                module._modules[child_name] = replacements[child]
    return replacements.get(model, model), report


def _layers(
    model: nn.Module, convs: Mapping[str, _ConvNd], pixels: Mapping[str, tuple[int, int]], with_values: bool
) -> list[ConvLayer]:
    inside = {id(part) for module in model.modules() if isinstance(module, TuckerConv2d) for part in module.modules()}
    users = Counter(id(conv.weight) for conv in convs.values())
    layers = []
    for name, conv in convs.items():
        reason = _keep_reason(conv)
        if id(conv) in inside:
            reason = "part of a Tucker layer"
        elif users[id(conv.weight)] > 1:
            reason = "shares its weight with another layer"
        if isinstance(conv.weight, nn.UninitializedParameter):
            kernel: np.ndarray = np.empty((0, 0, 0, 0))
        elif reason is None and with_values:
            kernel = _kernel(conv)
        else:
            kernel = np.broadcast_to(np.float64(0.0), tuple(conv.weight.shape))
        layers.append(ConvLayer(name, kernel, conv.groups, pixels.get(name), reason))
    return layers


def _keep_reason(conv: _ConvNd) -> str | None:
    if isinstance(conv.weight, nn.UninitializedParameter):
        return "lazy: its shape is not known before the first run"
    if "weight" not in conv._parameters:
        return (
            "its weight is computed; make it permanent first (torch.nn.utils.parametrize.remove_parametrizations,"
            " torch.nn.utils.remove_weight_norm or torch.nn.utils.prune.remove)"
        )
    if type(conv) is not nn.Conv2d:
        kind = "a subclass of Conv2d" if isinstance(conv, nn.Conv2d) else "not a Conv2d"
        return f"{type(conv).__name__} is {kind}"
    return None


def _kernel(conv: _ConvNd) -> np.ndarray:
    if conv.weight.is_meta:
        raise TdcError("the model is on the meta device and has no weights to decompose; load them first")
    return conv.weight.detach().to("cpu", torch.float64).numpy()


def _pixels(model: nn.Module, convs: Mapping[str, _ConvNd], example: Example) -> dict[str, tuple[int, int]]:
    """Positions of each convolution's input and output (batch x height x width), all its calls added up."""
    pixels: dict[str, tuple[int, int]] = {}

    def record(name: str):
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            before, after = pixels.get(name, (0, 0))
            x = args[0]
            pixels[name] = before + x.numel() // x.shape[1], after + output.numel() // output.shape[1]

        return hook

    run_with_hooks(model, example, ((conv, record(name)) for name, conv in convs.items()))
    return pixels
