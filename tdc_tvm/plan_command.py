"""``tdc plan``: ranks for a PyTorch model by predicted latency."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tdc_tvm.errors import TdcError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


class Precision(str, Enum):
    """Arithmetic of the compiled model."""

    fp32 = "fp32"
    tf32 = "tf32"
    fp16 = "fp16"
    bf16 = "bf16"


class Objective(str, Enum):
    """What ranks are chosen by."""

    latency = "latency"
    macs = "macs"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A torchvision model's name, a checkpoint of 'tdc train', or package.module:factory.", metavar="MODEL"
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The plan to write (.json, .yaml).")],
    device: Annotated[
        str, typer.Option("--device", "-d", metavar="NAME", help="A GPU such as H100, or a target as of 'tdc build'.")
    ] = "auto",
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="NAME", help="torchvision's, such as DEFAULT, or a checkpoint's path."),
    ] = None,
    precision: Annotated[Precision, typer.Option("--precision", metavar="NAME", help="Arithmetic.")] = Precision.fp32,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Images at once.")] = 1,
    input_shape: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="SHAPE", help="Channels x height x width of an image; 3x224x224, or a checkpoint's own."
        ),
    ] = None,
    mac_reduction: Annotated[
        float | None,
        typer.Option("--mac-reduction", metavar="X", help="Budget: share of the convolutions' MACs to save."),
    ] = None,
    latency_us: Annotated[
        float | None, typer.Option("--latency-us", metavar="X", help="Budget: largest predicted latency.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option("--speedup", metavar="X", help="Budget: the original's predicted latency over it.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", metavar="X", help="Budget: largest error proxy.")
    ] = None,
    theta: Annotated[
        float, typer.Option("--theta", metavar="X", help="A layer gets ranks only if faster by this share.")
    ] = 0.15,
    objective: Annotated[
        Objective, typer.Option("--objective", metavar="NAME", help="latency; or macs, to compare with.")
    ] = Objective.latency,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FOLDER", help="Images in a folder for each class: weigh layers' errors."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, metavar="N", help="Images of --data that are used.")
    ] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Chooses images, and random weights.")] = 0,
    table: Annotated[
        Path | None,
        typer.Option("--table", metavar="FILE", help="Latencies (.json): read if there, or measured; else written."),
    ] = None,
    macs_plan: Annotated[
        Path | None,
        typer.Option("--macs-plan", metavar="FILE", help="Write the plan by MACs at the same error, to compare with."),
    ] = None,
    pareto: Annotated[
        list[Path] | None,
        typer.Option("--pareto", metavar="FILE", help="Draw latency against error (.png, .html); may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of tables.")] = False,
) -> None:
    """Choose ranks by predicted latency: for each convolution of a PyTorch model, or leave it dense.

    Give one budget: --mac-reduction, --latency-us, --speedup or --max-error.
    """
    from tdc_tvm import cli
    from tdc_tvm.files import check_output
    from tdc_tvm.training import RankProblem
    from tdc_tvm.training.ranks import check_budget
    from tdc_tvm.training.ranks_report import check_plots, comparison, write_front
    from tdc_tvm.training.sensitivity import cross_entropy

    budget = check_budget(mac_reduction, latency_us, speedup, max_error)
    plans = [path for path in (output, macs_plan) if path is not None]
    kept = [path for path in (table, weights) if path is not None]
    for path in (*plans, *(pareto or [])):
        what, suffixes = ("a plan", (".json", ".yaml", ".yml")) if path in plans else ("a front", (".png", ".html"))
        check_output(path, what, suffixes, kept)
        kept.append(path)
    if pareto:
        check_plots()
    if table is not None and not table.exists():
        check_output(table, "a table of latencies", (".json",))
    # Not before tdc_tvm.training, which says how to install it.
    import torch

    torch.manual_seed(seed)
    given = None if input_shape is None else _extents(input_shape)
    network, info = load_network(model, weights)
    size = info.get("image_size", 224)
    extents = given or (info.get("channels", 3), size, size)
    images = None if data is None else _Images(data, extents, info, samples, seed)
    loss = functools.partial(cross_entropy, classes=None if images is None else images.classes)
    bars = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*bars, console=cli.messages, transient=True, disable=not cli.messages.is_terminal) as progress:
        task = progress.add_task("Predicting latencies", total=None)
        problem = RankProblem.of(
            network, (batch, *extents), device, precision=precision.value, table=table, name=model,
            loader=None if images is None else progress.track(images, description="Taking gradients"),
            loss=loss, batches=sys.maxsize,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    with cli._progress("Choosing ranks") as step:
        choice = problem.solve(**budget, theta=theta, objective=objective.value)
        choice.plan.save(output)
        rivals = {}
        if choice.error:
            step("at the same error, by latency and by MACs")
            rivals = {
                "by latency, same error": problem.solve(max_error=choice.error * (1 + 1e-9), theta=theta),
                "by MACs, same error": problem.by_macs(choice.error),
            }
        if macs_plan is not None:
            rivals.get("by MACs, same error", choice).plan.save(macs_plan)
        if pareto:
            step("the front")
            front = problem.front(theta=theta)
            by_macs = [problem.by_macs(plan.error, gap=1e-3) for plan in front if plan.error]
            for path in pareto:
                write_front(path, choice, front, by_macs)
    if as_json:
        more = {key.split(",")[0].replace(" ", "_").lower(): rival.totals() for key, rival in rivals.items()}
        cli._print_json(choice.to_dict() | {"same_error": more, "output": str(output)})
        return
    cli.console.print(choice)
    if weights is None and ":" not in model and not info:
        cli.messages.print("note: these are random weights, and errors of no meaning; say --weights", style="yellow")
    if rivals and rivals["by latency, same error"].plan == choice.plan:
        del rivals["by latency, same error"]
    cli.console.print(comparison({"this plan": choice, **rivals}))
    for written in (*plans, *([table] if table is not None else []), *(pareto or [])):
        cli.console.print(f"wrote {written}", soft_wrap=True)


def load_network(name: str, weights: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """A torchvision model, a trained one, or what a user's factory makes; and what a checkpoint says of it.

    Parameters
    ----------
    name : str
        ``"resnet18"``; a ``.safetensors`` file of ``tdc train``; or ``"package.module:factory"``: a function without
        arguments, found from the current folder.
    weights : str, optional
        A name of torchvision's weights, ``"DEFAULT"``, or the path of a checkpoint: a state dict (``.pt``, ``.pth``,
        ``.safetensors``), or a dict that has one as ``state_dict`` or ``model``.

    Returns
    -------
    model : nn.Module
        In eval mode.
    info : dict
        As of `tdc_tvm.training.load_model`; empty for other models.

    Raises
    ------
    TdcError
        If there is no such model, factory or file, or the weights do not fit.
    """
    from torch import nn

    if name.endswith(".safetensors"):
        if weights is not None:
            raise TdcError(f"{name} has weights of its own; leave --weights out")
        from tdc_tvm.training import load_model

        return load_model(name)
    is_file = weights is not None and (os.sep in weights or Path(weights).suffix != "" or Path(weights).exists())
    if ":" in name:
        if weights is not None and not is_file:
            raise TdcError(f"torchvision's weights {weights!r} are for its models; give a checkpoint's path for {name}")
        model = _factory(name)()
        if not isinstance(model, nn.Module):
            raise TdcError(f"{name} gives a {type(model).__name__}; expected a torch.nn.Module")
    else:
        model = _torchvision_model(name, None if is_file else weights)
    if is_file:
        assert weights is not None
        _load_checkpoint(model, weights)
    return model.eval(), {}


def _factory(name: str) -> Callable[[], Any]:
    module_name, _, factory = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise TdcError(f"cannot import {module_name!r}: {error}; expected package.module:factory") from None
    found = getattr(module, factory, None)
    if not callable(found):
        raise TdcError(f"the module {module_name} has no function {factory!r}; expected package.module:factory")
    return found


def _torchvision_model(name: str, weights: str | None) -> nn.Module:
    try:
        from torchvision import models
    except ModuleNotFoundError:
        raise TdcError("models by name are torchvision's; install it with: pip install 'tdc-tvm[train]'") from None
    if name not in models.list_models():
        close = get_close_matches(name, models.list_models(), n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise TdcError(f"torchvision has no model {name!r}{hint}; for a model of your own say package.module:factory")
    if weights is not None:
        known = [weight.name for weight in models.get_model_weights(name)]
        if weights not in (*known, "DEFAULT"):
            raise TdcError(
                f"torchvision has no weights {weights!r} for {name}; there are {', '.join(known) or 'none'}, DEFAULT,"
                " and checkpoints by their path"
            )
    try:
        return models.get_model(name, weights=weights)
    except OSError as error:
        raise TdcError(f"cannot download the weights of {name}: {error}; give a checkpoint's path") from None


def _load_checkpoint(model: nn.Module, path: str) -> None:
    import torch

    state: Any
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise TdcError(f"{path} needs safetensors; install it with: pip install safetensors") from None
    except OSError as error:
        raise TdcError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except Exception as error:  # damaged files raise several unrelated types
        first = str(error).strip().partition("\n")[0]
        raise TdcError(f"{path} is no checkpoint of tensors alone: {first}; save model.state_dict()") from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    try:
        model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    except (RuntimeError, AttributeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TdcError(f"{path} does not fit {type(model).__name__}: {' '.join(lines[1:3] or lines)[:300]}") from None


def _extents(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise TdcError(f"cannot read the input {text!r}; expected channels, height and width, such as 3x224x224")
    channels, height, width = map(int, parts)
    return channels, height, width


class _Images:
    """Batches of 16 of some images of a folder, which has a folder for each class, as training reads them."""

    def __init__(
        self, folder: Path, extents: tuple[int, int, int], info: dict[str, Any], samples: int, seed: int
    ) -> None:
        import torch
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        from tdc_tvm.training.data import IMAGENET_MEAN, IMAGENET_STD, read_image

        channels, height, width = extents
        if channels != 3 or height != width:
            shape = f"{channels}x{height}x{width}"
            raise TdcError(f"--data gives square images of 3 channels; the input is {shape}: leave --data out")

        def read(path: str) -> np.ndarray:
            try:
                return read_image(path, height).copy()
            except TdcError as error:
                raise TdcError(f"cannot read the image {error}; repair or remove it") from None

        scaled = transforms.Normalize(info.get("mean", IMAGENET_MEAN), info.get("std", IMAGENET_STD))
        try:
            data = ImageFolder(str(folder), transforms.Compose([transforms.ToTensor(), scaled]), loader=read)
        except OSError as error:
            raise TdcError(
                f"cannot read images from {folder}: {error.strerror or error}; expected a folder for each class"
            ) from None
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
        self.classes = len(data.classes)
        self._batches = torch.utils.data.DataLoader(torch.utils.data.Subset(data, order), batch_size=16)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)
