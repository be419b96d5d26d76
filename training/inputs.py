"""Example inputs of a PyTorch model, and running a model without leaving traces on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tdc_tvm.errors import TdcError

# One tensor, several, or the shape of one (filled with a fixed random pattern).
Example = torch.Tensor | Sequence[torch.Tensor] | Sequence[int]


def example_inputs(model: nn.Module, example: Example) -> tuple[torch.Tensor, ...]:
    """Bring an example to a tuple of tensors on the model's device.

    Parameters
    ----------
    model : nn.Module
        Gives device and floating-point type for an input made from a shape.
    example : tensor, tensors or shape
        A shape, such as ``(1, 3, 224, 224)``, gives values from 0 to 1, always the same.

    Raises
    ------
    TdcError
        If it is none of these.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = tensors[0].dtype if tensors else torch.float32
    if isinstance(example, torch.Tensor):
        return (example.to(device),)
    items: tuple[Any, ...] = tuple(example) if isinstance(example, Sequence) and not isinstance(example, str) else ()
    if items and all(isinstance(item, torch.Tensor) for item in items):
        return tuple(item.to(device) for item in items)
    if items and all(isinstance(item, int) and item > 0 for item in items):
        values = torch.rand(items, generator=torch.Generator().manual_seed(0))
        return (values.to(device, dtype),)
    raise TdcError(
        f"an example input is a tensor, a tuple of tensors or a shape such as (1, 3, 224, 224); found {example!r}"
    )


def check_model(model: Any) -> None:
    """Refuse what is no PyTorch model."""
    if not isinstance(model, nn.Module):
        raise TdcError(f"a model is a torch.nn.Module; found {type(model).__name__}")


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy of a model.

    Raises
    ------
    TdcError
        If it has computed weights, which PyTorch does not copy.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise TdcError(
            f"{type(model).__name__} cannot be copied: {error}; make computed weights permanent first "
            "(torch.nn.utils.prune.remove, remove_weight_norm)"
        ) from error


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the body with the model in eval mode and without gradients; every module's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def run_model(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    """Run the model once.

    Raises
    ------
    TdcError
        If the model does not accept the inputs.
    """
    try:
        return model(*inputs)
    # A model that reads a layer's weight itself does not find it in Tucker format.
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise TdcError(f"the model does not run on inputs of shape {shapes}: {error}") from error


def run_with_hooks(model: nn.Module, example: Example, hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> None:
    """Run a model once in eval mode, with forward hooks that are removed afterwards."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        with eval_mode(model):
            run_model(model, example_inputs(model, example))
    finally:
        for handle in handles:
            handle.remove()
