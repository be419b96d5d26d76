"""``tdc plan``: ranks for a PyTorch model by predicted latency."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tdc_tvm import cli_training
from tdc_tvm.errors import TdcError

if TYPE_CHECKING:
    from torch import nn

    from tdc_tvm.training.batches import Batches
    from tdc_tvm.training.config import DataConfig


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
            help="A torchvision model's name, a folder or checkpoint of 'tdc train', or package.module:factory.",
            metavar="MODEL",
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
    data: cli_training.DataOption = None,
    root: cli_training.RootOption = None,
    skip_corrupt: cli_training.SkipCorruptOption = False,
    samples: Annotated[
        int, typer.Option("--samples", min=1, metavar="N", help="Training images that weigh the layers' errors.")
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

    Give one budget: --mac-reduction, --latency-us, --speedup or --max-error.  With --data or --root the layers'
    errors are weighed by how much the loss depends on them.
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
    new_tables = [table] if table is not None and not table.exists() else []
    for path in new_tables:
        check_output(path, "a table of latencies", (".json",))
    # Not before tdc_tvm.training, which says how to install it.
    import torch

    torch.manual_seed(seed)
    given = None if input_shape is None else _extents(input_shape)
    network, info = load_network(model, weights)
    size = info.get("image_size", 224)
    extents = given or (info.get("channels", 3), size, size)
    images = None
    if data is not None or root is not None:
        values = {"data.name": data, "data.root": root and str(root), "data.skip_corrupt": skip_corrupt or None}
        beside = cli_training.config_of(Path(model)) if info else None
        images = _batches(cli_training.read_config(beside, values).data, info, extents, samples, seed)
    loss = functools.partial(cross_entropy, classes=None if images is None else images.classes)
    bars = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*bars, console=cli.messages, transient=True, disable=not cli.messages.is_terminal) as progress:
        task = progress.add_task("Predicting latencies", total=None)
        problem = RankProblem.of(
            network, (batch, *extents), device, precision=precision.value, table=table, name=model,
            loader=None if images is None else
            progress.track(images.epoch(0), total=len(images), description="Taking gradients"),
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
        cli.print_json(choice.to_dict() | {"same_error": more, "output": str(output)})
        return
    cli.console.print(choice)
    if weights is None and ":" not in model and not info:
        cli.messages.print("note: these are random weights, and errors of no meaning; say --weights", style="yellow")
    if rivals and rivals["by latency, same error"].plan == choice.plan:
        del rivals["by latency, same error"]
    cli.console.print(comparison({"this plan": choice, **rivals}))
    for written in (*plans, *new_tables, *(pareto or [])):
        cli.console.print(f"wrote {written}", soft_wrap=True)


def load_network(name: str, weights: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """A torchvision model, a trained one, or what a user's factory makes; and what a checkpoint says of it.

    Parameters
    ----------
    name : str
        ``"resnet18"``; a folder or ``.safetensors`` file of ``tdc train``; or ``"package.module:factory"``: a function
        without arguments, found from the current folder.
    weights : str, optional
        A name of torchvision's weights, ``"DEFAULT"``, or the path of a checkpoint, as of
        `tdc_tvm.training.load_weights`.

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

    from tdc_tvm.training.checkpoint import load_weights
    from tdc_tvm.training.config import ModelConfig
    from tdc_tvm.training.models import create_model, is_file, load_dense

    if ":" in name:
        if weights is not None and not is_file(weights):
            raise TdcError(f"torchvision's weights {weights!r} are for its models; give a checkpoint's path for {name}")
        model = _factory(name)()
        if not isinstance(model, nn.Module):
            raise TdcError(f"{name} gives a {type(model).__name__}; expected a torch.nn.Module")
        if weights is not None:
            load_weights(model, weights)
        return model.eval(), {}
    if is_file(name):
        if Path(name).suffix not in ("", ".safetensors") and not Path(name).is_dir():
            raise TdcError(
                f"{name} is no checkpoint of 'tdc train' (.safetensors); give the model's name, or"
                f" package.module:factory for one of your own, and PyTorch's weights as --weights"
            )
        if weights is not None:
            raise TdcError(f"{name} has weights of its own; leave --weights out")
        return load_dense(name)
    return create_model(ModelConfig(name, weights=weights)).eval(), {}


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


def _extents(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise TdcError(f"cannot read the input {text!r}; expected channels, height and width, such as 3x224x224")
    channels, height, width = map(int, parts)
    return channels, height, width


def _batches(
    config: DataConfig, info: dict[str, Any], extents: tuple[int, int, int], samples: int, seed: int
) -> Batches:
    """Batches of 16 of some training images, as they are evaluated; ``info`` as of `load_network`."""
    import numpy as np

    from tdc_tvm.training.batches import make_batches
    from tdc_tvm.training.data import read_dataset
    from tdc_tvm.training.runs import as_trained

    size = extents[1] if config.name in ("imagefolder", "tiny-imagenet") else None
    config = replace(as_trained(config, info), image_size=size, eval_batch_size=16, holdout=0, in_memory=False)
    dataset = read_dataset(config)
    found = (dataset.channels, dataset.image_size, dataset.image_size)
    if found != extents:
        shapes = ("x".join(map(str, shape)) for shape in (found, extents))
        raise TdcError("the data's images are {}, the input is {}; say --input, or leave --data out".format(*shapes))
    order = np.random.default_rng(seed).permutation(len(dataset.train))[:samples]
    return make_batches(dataset.train.subset(np.sort(order)), dataset, config, train=False)
