"""torchvision's classification models, also in a form for small images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan
from tdc_tvm.training.checkpoint import load_checkpoint
from tdc_tvm.training.config import ModelConfig
from tdc_tvm.training.decompose import apply_plan


def create_model(config: ModelConfig, classes: int, channels: int = 3) -> nn.Module:
    """Make a model with random weights, or with those that ``config.weights`` names.

    ``small_images`` keeps the resolution that networks for 224 x 224 images give away at once: ResNets and
    DenseNets get a 3x3 stem of stride 1 and no max pooling behind it; VGGs end in global average pooling, dropout
    and one linear layer instead of three of 25,088 x 4,096 and more.

    Parameters
    ----------
    config : ModelConfig
    classes : int
        Outputs.
    channels : int
        Of the images.

    Raises
    ------
    TdcError
        If torchvision has no such model, it has no form for small images, or the weights do not fit.
    """
    import torchvision

    try:
        pretrained = config.weights is not None and not _is_file(config.weights)
        if pretrained:
            model = torchvision.models.get_model(config.name, weights=config.weights)
            _replace_head(model, classes, config.name)
        else:
            model = torchvision.models.get_model(config.name, weights=None, num_classes=classes)
    except (ValueError, KeyError) as error:
        raise TdcError(
            f"torchvision has no model {config.name!r} with weights {config.weights!r} ({error}); "
            "torchvision.models.list_models() names the models"
        ) from None
    if config.small_images:
        if pretrained:
            raise TdcError("torchvision's weights are for its own stems; leave out small_images or the weights")
        _adapt_to_small_images(model, config.name, classes)
    if channels != 3:
        _set_channels(model, channels)
    if config.weights is not None and not pretrained:
        load_weights(model, config.weights)
    return model


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Load weights that training wrote into a model of the same structure.

    Raises
    ------
    TdcError
        If the file cannot be read or is of another model.
    """
    tensors, _ = load_checkpoint(path)
    own = model.state_dict()
    wrong = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
    wrong += [name for name in tensors if name not in own]
    if wrong:
        raise TdcError(
            f"{path} does not fit {type(model).__name__}: {len(wrong)} tensors are missing, left over or of another "
            f"shape, such as {wrong[0]!r}; use the model, class count and plan that it was trained with"
        )
    model.load_state_dict(tensors)


def load_model(path: str | os.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """Make the model that a checkpoint of ``tdc train`` or ``tdc compress`` holds, Tucker layers included.

    Returns
    -------
    model : nn.Module
        In eval mode, on the CPU.
    info : dict
        What the checkpoint says: ``model``, ``plan``, ``classes``, ``channels`` and ``data``.

    Raises
    ------
    TdcError
        If the file cannot be read, or its model is not one of torchvision's.
    """
    _, info = load_checkpoint(path)
    if "model" not in info:
        raise TdcError(
            f"{path} does not say which model it is of; make the model, call tdc_tvm.training.apply_plan and load the "
            "weights with tdc_tvm.training.load_weights"
        )
    model = create_model(ModelConfig(**(info["model"] | {"weights": None})), info["classes"], info["channels"])
    if info.get("plan"):
        model, _ = apply_plan(model, DecompositionPlan.from_dict(info["plan"], str(path)), inplace=True)
    load_weights(model, path)
    return model.eval(), info


def _is_file(weights: str) -> bool:
    return Path(weights).suffix == ".safetensors"


def _adapt_to_small_images(model: Any, name: str, classes: int) -> None:
    if name.startswith(("resnet", "resnext", "wide_resnet")):
        model.conv1 = _stem(model.conv1)
        model.maxpool = nn.Identity()
    elif name.startswith("densenet"):
        model.features.conv0 = _stem(model.features.conv0)
        model.features.pool0 = nn.Identity()
    elif name.startswith("vgg"):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, classes))
        nn.init.normal_(model.classifier[1].weight, 0, 0.01)
        nn.init.zeros_(model.classifier[1].bias)
    else:
        raise TdcError(f"{name} has no form for small images; ResNets, DenseNets and VGGs have")


def _stem(conv: nn.Conv2d) -> nn.Conv2d:
    stem = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem


def _set_channels(model: nn.Module, channels: int) -> None:
    name, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    stem = nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, stem)


def _replace_head(model: nn.Module, classes: int, name: str) -> None:
    """Give a pretrained model a linear layer for another number of classes."""
    head, linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    if linear.out_features == classes:
        return
    parent, _, child = head.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Linear(linear.in_features, classes))
