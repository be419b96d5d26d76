"""torchvision's classification models, also in a form for small images."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan
from tdc_tvm.training.checkpoint import load_checkpoint, load_weights, phases_begun
from tdc_tvm.training.config import ModelConfig
from tdc_tvm.training.decompose import apply_plan


def create_model(config: ModelConfig, classes: int = 1000, channels: int = 3) -> nn.Module:
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
        If torchvision has no such model, it has no form for small images, or the weights are not there or do not fit.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if config.name not in known:
        close = get_close_matches(config.name, known, n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise TdcError(
            f"torchvision has no model {config.name!r} for classification{hint}; torchvision.models.list_models() "
            "names them"
        )
    pretrained = config.weights is not None and not is_file(config.weights)
    if pretrained:
        if config.small_images:
            raise TdcError("torchvision's weights are for its own stems; leave out small_images or the weights")
        names = [*(weights.name for weights in models.get_model_weights(config.name)), "DEFAULT"]
        if config.weights not in names:
            raise TdcError(
                f"torchvision has no weights {config.weights!r} for {config.name}; there are {', '.join(names)}, and "
                "checkpoints by their path"
            )
        try:
            model = models.get_model(config.name, weights=config.weights)
        except OSError as error:
            raise TdcError(f"cannot download the weights of {config.name}: {error}; give a checkpoint's path") from None
        _replace_head(model, classes)
    else:
        model = models.get_model(config.name, weights=None, num_classes=classes)
    if config.small_images:
        _adapt_to_small_images(model, config.name, classes)
    if channels != 3:
        _set_channels(model, channels)
    if config.weights is not None and not pretrained:
        load_weights(model, config.weights)
    return model


def load_model(path: str | os.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """Make the model that a checkpoint of ``tdc train`` or ``tdc compress`` holds, Tucker layers included.

    Returns
    -------
    model : nn.Module
        In eval mode, on the CPU.
    info : dict
        What the checkpoint says: ``model``, ``plan``, ``classes``, ``channels``, ``image_size``, ``mean`` and ``std``.

    Raises
    ------
    TdcError
        If the file cannot be read, or its model is not one of torchvision's.
    """
    _, info = load_checkpoint(path)
    if "finished" in info:
        raise TdcError(f"{path} is what training resumes from; give model.safetensors or best.safetensors beside it")
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


def load_dense(path: str | os.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """As `load_model`, of a network that is not compressed yet; ``path`` may be the folder of its run.

    Raises
    ------
    TdcError
        As `load_model`, and if it is compressed.
    """
    file = Path(path)
    if not file.exists():
        raise TdcError(f"there is no {path}; expected the folder or a checkpoint of 'tdc train'")
    compressed = TdcError(f"{path} is compressed already; give the dense network that it was made from")
    if phases_begun(file) - {"", "dense"}:
        raise compressed
    if file.is_dir():
        file = file / "model.safetensors"
        if not file.is_file():
            raise TdcError(
                f"{path} has no model.safetensors: no run of 'tdc train' has ended there; continue it with resume, or "
                "give a checkpoint, such as best.safetensors"
            )
    model, info = load_model(file)
    if info.get("plan"):
        raise compressed
    return model, info


def is_file(name: str) -> bool:
    """Whether a file or folder is meant, and not one of torchvision's names."""
    return os.sep in name or Path(name).suffix != ""


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


def _replace_head(model: nn.Module, classes: int) -> None:
    """Give a pretrained model a linear layer for another number of classes."""
    head, linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    if linear.out_features == classes:
        return
    parent, _, child = head.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Linear(linear.in_features, classes))
