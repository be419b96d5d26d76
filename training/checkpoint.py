"""Checkpoints: one ``.safetensors`` file each, whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from tdc_tvm.errors import TdcError
from tdc_tvm.files import write_atomic

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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            data = json.loads((file.metadata() or {}).get("tdc", "{}"))
    except (OSError, SafetensorError) as error:
        raise TdcError(f"cannot read the checkpoint {path}: {error}") from None
    if data.get("format_version") != FORMAT_VERSION:
        raise TdcError(
            f"{path} has format_version {data.get('format_version')!r}; this release reads {FORMAT_VERSION}; "
            "it was written by something else than tdc_tvm's training, or by another release"
        )
    return tensors, data


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
