"""Checkpoints: one ``.safetensors`` file each, whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.files import write_atomic
from tdc_tvm.training.config import PHASES

FORMAT_VERSION = 1


def save_checkpoint(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> None:
    """Write tensors and plain data; an existing file stays as it is until the new one is on the disk.

    Parameters
    ----------
    path : path
    tensors : mapping of str to torch.Tensor
        Of any device and memory format; they are stored in the default one.
    data : mapping
        Goes into the file's header as JSON, under the key ``tdc``.

    Raises
    ------
    TdcError
        If the file cannot be written, such as for a full disk.
    """
    from safetensors.torch import save

    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    content = save(plain, {"tdc": json.dumps({"format_version": FORMAT_VERSION, **data})})
    with write_atomic(path) as temporary:
        temporary.write_bytes(content)


def load_checkpoint(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote: tensors on the CPU, and the data.

    Raises
    ------
    TdcError
        If the file cannot be read or is of another format version.
    """
    tensors, data = _read_safetensors(path)
    if data.get("format_version") != FORMAT_VERSION:
        raise TdcError(
            f"{path} has format_version {data.get('format_version')!r}; this release reads {FORMAT_VERSION}; "
            "it was written by something else than tdc_tvm's training, or by another release"
        )
    return tensors, data


def load_state_dict(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Give a model weights; ``source`` names their file in errors.

    Raises
    ------
    TdcError
        If they are another model's.
    """
    own = model.state_dict()
    wrong = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
    wrong += [name for name in tensors if name not in own]
    if wrong:
        raise TdcError(
            f"{source} does not fit {type(model).__name__}: {len(wrong)} tensors are missing, left over or of another "
            f"shape, such as {wrong[0]!r}; use the model, class count and plan that it was trained with"
        )
    model.load_state_dict(tensors)


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Load weights into a model of the same structure.

    Parameters
    ----------
    model : nn.Module
    path : path
        What training wrote, or others: a ``.safetensors`` file, or one of ``torch.save`` that holds a state dict, by
        itself or as ``state_dict`` or ``model``.  Names may begin with ``module.``, as data-parallel training has them.

    Raises
    ------
    TdcError
        If the file cannot be read or is of another model.
    """
    tensors: Any
    if Path(path).suffix == ".safetensors":
        tensors, _ = _read_safetensors(path)
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise TdcError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
        except Exception as error:  # damaged files raise several unrelated types
            first = str(error).strip().partition("\n")[0]
            raise TdcError(f"{path} is no checkpoint of tensors alone: {first}; save model.state_dict()") from error
    for key in ("state_dict", "model"):
        tensors = tensors[key] if isinstance(tensors, dict) and isinstance(tensors.get(key), dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise TdcError(f"{path} is no checkpoint of tensors alone; save model.state_dict()")
    load_state_dict(model, {name.removeprefix("module."): tensor for name, tensor in tensors.items()}, path)


def _read_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and what `save_checkpoint` wrote beside them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get("tdc", "{}"))
    except (OSError, SafetensorError) as error:
        raise TdcError(f"cannot read the checkpoint {path}: {error}") from None


def phases_begun(folder: str | os.PathLike) -> set[str]:
    """The phases that have a checkpoint in a run's folder; "" is the training of a dense network."""
    names = {"", *(name for phases in PHASES.values() for name in phases)}
    return {name for name in names if (Path(folder) / name / "last.safetensors").is_file()}


def make_folder(path: str | os.PathLike) -> None:
    """Make a folder and those above it, if they are not there.

    Raises
    ------
    TdcError
        If it cannot be made.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise TdcError(f"cannot make the folder {path}: {error.strerror}; choose another one") from None


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with ``prefix.``, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The opposite of `part`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by ``parameter index.name``; rates and the like are no part of it."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value
        for index, values in state.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take over what `optimizer_tensors` gave; buffers get the memory format of their parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if name == "step":  # PyTorch keeps it on the CPU
            optimizer.state[parameter][name] = value.clone()
        else:
            optimizer.state[parameter][name] = torch.empty_like(parameter, dtype=value.dtype).detach().copy_(value)
