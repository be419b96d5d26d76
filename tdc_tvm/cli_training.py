"""The commands that train: ``tdc train``, ``tdc compress`` of a trained network, ``tdc evaluate``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tdc_tvm.errors import TdcError

if TYPE_CHECKING:
    from tdc_tvm.training.config import Config

# Like those of tdc_tvm.cli, which imports this module.
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE.yaml",
        help="Configuration; what it leaves out keeps its default, or what MODEL was trained with.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One value, such as data.batch_size=256; may be repeated."),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="NAME",
        help="imagefolder, tiny-imagenet, cifar10, cifar100, fashion-mnist, or arrays.",
    ),
]
RootOption = Annotated[Path | None, typer.Option("--root", metavar="FOLDER", help="Where the data set lies.")]
HoldoutOption = Annotated[
    int | None, typer.Option("--holdout", min=0, metavar="N", help="Training images kept out, to choose by.")
]
SkipCorruptOption = Annotated[
    bool, typer.Option("--skip-corrupt", help="Leave out images that cannot be read, instead of failing.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue what lies in the output folder.")]
BudgetOption = Annotated[
    float | None,
    typer.Option("--budget", min=0, metavar="SECONDS", help="Stop before, with a checkpoint; --resume continues."),
]


def train(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder of the run.")],
    config: ConfigOption = None,
    data: DataOption = None,
    root: RootOption = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="One of torchvision's, such as resnet18.")
    ] = None,
    small_images: Annotated[
        bool, typer.Option("--small-images", help="The model's form for images of about 32 to 64 pixels.")
    ] = False,
    epochs: Annotated[int | None, typer.Option("--epochs", min=0, metavar="N")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, metavar="N")] = None,
    precision: Annotated[str | None, typer.Option("--precision", metavar="NAME", help="fp32, bf16 or fp16.")] = None,
    holdout: HoldoutOption = None,
    skip_corrupt: SkipCorruptOption = False,
    settings: SetOption = None,
    resume: ResumeOption = False,
    budget: BudgetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of text.")] = False,
) -> None:
    """Train a network; several GPUs by 'torchrun --no-python --nproc-per-node N tdc train ...'."""
    values = {
        "data.name": data,
        "data.root": None if root is None else str(root),
        "data.holdout": holdout,
        "data.skip_corrupt": skip_corrupt or None,
        "model.name": model,
        "model.small_images": small_images or None,
        "train.epochs": epochs,
        "run.seed": seed,
        "run.precision": precision,
    }
    resolved = read_config(config or _resumed(output, resume), values, settings)
    from tdc_tvm.training.runs import train as train_run

    _, result = train_run(resolved, output, resume=resume, deadline=_deadline(budget))
    last = result.history[-1] if result.history else {}
    _print(
        last | {"finished": result.finished, "output": str(output)},
        as_json,
        f"wrote {output / 'model.safetensors'}" if result.finished else _UNFINISHED,
    )


def compress_trained(
    source: Path,
    ranks: str,
    output: Path,
    config: Path | None,
    method: str | None,
    settings: list[str] | None,
    resume: bool,
    budget: float | None,
    as_json: bool,
) -> None:
    """Compress what ``tdc train`` wrote: the second half of ``tdc compress``, which documents the arguments."""
    beside = _resumed(output, resume) or config_of(source)
    resolved = read_config(config, {"compress.method": method}, settings, beside)
    from tdc_tvm.training.models import load_dense
    from tdc_tvm.training.runs import compress_run

    if output.resolve() in (source.resolve(), source.parent.resolve() if source.is_file() else None):
        raise TdcError(f"cannot write to {output}: the trained network lies there; choose another folder")
    model, info = load_dense(source)
    trained = info["model"]
    resolved = replace(
        resolved, model=replace(resolved.model, name=trained["name"], small_images=trained["small_images"])
    )
    _, history, result = compress_run(resolved, model, ranks, output, resume=resume, deadline=_deadline(budget))
    if not history.finished:
        _print({"finished": False, "output": str(output)}, as_json, _UNFINISHED)
        return
    flat = {f"{part}_{key}": value for part, score in result["scores"].items() for key, value in score.items()}
    before, after = result["macs"]
    if as_json:
        _print(result | {"finished": True, "output": str(output)}, True, "")
    else:
        text = f"conv MACs {before:,} -> {after:,} ({after / before - 1:+.1%}); wrote {output / 'model.onnx'}"
        _print(flat, False, text)


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint (.safetensors), an ONNX model, or a run's folder.", metavar="MODEL")
    ],
    config: ConfigOption = None,
    data: DataOption = None,
    root: RootOption = None,
    holdout: HoldoutOption = None,
    skip_corrupt: SkipCorruptOption = False,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of text.")] = False,
) -> None:
    """Print a model's top-1 and top-5 accuracy on a data set's validation images.

    The data set is by default the one that the model was trained on.
    """
    path = model / "model.safetensors" if model.is_dir() else model
    if model.is_dir() and not path.is_file():
        path = model / "model.onnx"
    if not path.is_file():
        if model.is_dir():
            raise TdcError(
                f"{model} has neither model.safetensors nor model.onnx: no run has ended there; continue it with "
                "--resume, or give a checkpoint, such as best.safetensors"
            )
        raise TdcError(f"there is no model {path}")
    values = {
        "data.name": data,
        "data.root": None if root is None else str(root),
        "data.holdout": holdout,
        "data.skip_corrupt": skip_corrupt or None,
    }
    resolved = read_config(config, values, settings, config_of(path))
    from tdc_tvm.training.runs import evaluate_file

    scores = evaluate_file(path, resolved.data, resolved.run)
    if as_json:
        _print({name: score.to_dict() for name, score in scores.items()} | {"model": str(path)}, True, "")
        return
    for name, score in scores.items():
        _print({}, False, f"{name}: top-1 {score.top1:.2%}, top-5 {score.top5:.2%} of {score.count} images")


_UNFINISHED = "time is up; the same command with --resume continues"


def read_config(
    path: Path | None, values: dict[str, Any], settings: list[str] | None = None, base: Path | None = None
) -> Config:
    """The configuration: ``base``, over it the file, over both the command line's values (None leaves the files')."""
    _require_training()
    import yaml

    from tdc_tvm.training.config import Config, from_dict, load_config

    config = Config()
    for file in (base, path):
        config = config if file is None else load_config(file, config)
    for text in settings or []:
        key, separator, value = text.partition("=")
        if not separator:
            raise TdcError(f"--set is {text!r}; expected KEY=VALUE, such as data.batch_size=256")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[key] = value
    from dataclasses import asdict

    tree = asdict(config)
    for key, value in values.items():
        if value is None:
            continue
        *parents, last = key.split(".")
        branch = tree
        for parent in parents:
            if not isinstance(branch.get(parent), dict):
                raise TdcError(f"--set has the unknown key {key!r}; see the configuration beside a run's results")
            branch = branch[parent]
        branch[last] = value
    return from_dict(Config, tree, "the configuration")


def _resumed(output: Path, resume: bool) -> Path | None:
    """The configuration of the run that is to be continued, if it has begun."""
    path = output / "config.yaml"
    return path if resume and path.is_file() else None


def config_of(path: Path) -> Path | None:
    """The configuration of a run's folder or file: there, or one folder up (phases have folders of their own)."""
    folder = path if path.is_dir() else path.parent
    places = (folder / "config.yaml", folder.parent / "config.yaml")
    return next((place for place in places if place.is_file()), None)


def _require_training() -> None:
    missing = []
    for package in ("torch", "torchvision", "accelerate", "safetensors"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            missing.append(package)
    if missing:
        raise TdcError(f"training needs {', '.join(missing)}; install it with: pip install 'tdc-tvm[train]'")


def _deadline(budget: float | None) -> float | None:
    import time

    return None if budget is None else time.monotonic() + budget


def _print(figures: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a result; of several processes the first alone does."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        from tdc_tvm.cli import print_json

        print_json(figures)
        return
    shown = {key: value for key, value in figures.items() if key.endswith(("top1", "top5", "loss"))}
    if shown:
        print(", ".join(f"{key} {value:.4f}" for key, value in shown.items()))
    print(text)


def register(command: Callable[[], Callable[[Callable], Any]]) -> None:
    """Add ``train`` and ``evaluate`` to the commands."""
    command()(train)
    command()(evaluate)
