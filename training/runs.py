"""Whole runs from a configuration: data, model, training or compression, ONNX file."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.files import lock_folder
from tdc_tvm.training.batches import Batches, make_batches, seed_all
from tdc_tvm.training.checkpoint import make_folder, phases_begun
from tdc_tvm.training.compression import History, compress, resolve_plan, write_json
from tdc_tvm.training.config import Config, DataConfig, RunConfig, flat, load_config, save_config
from tdc_tvm.training.data import Dataset, read_dataset
from tdc_tvm.training.decompose import apply_plan
from tdc_tvm.training.evaluation import Score, evaluate, evaluate_onnx
from tdc_tvm.training.export import check_exporter, export_onnx
from tdc_tvm.training.inputs import eval_mode, example_inputs, run_model
from tdc_tvm.training.models import create_model, load_model
from tdc_tvm.training.trainer import PhaseResult, Trainer, make_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

INPUT_PROPERTY = "tdc.input"
# Of a configuration, what a run that continues may have otherwise: its results stay the same.
_FREE = (
    "data.root", "data.cache", "data.download", "data.workers", "data.eval_batch_size", "model.weights",
    "run.device", "run.checkpoint_steps", "run.log_steps", "run.tensorboard",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Data:
    """A data set's batches: ``train``, and ``parts`` to evaluate on (``holdout``, ``val``)."""

    dataset: Dataset
    train: Batches
    parts: dict[str, Batches]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one image as the network's input."""
        return 1, self.dataset.channels, self.dataset.image_size, self.dataset.image_size


def open_data(config: DataConfig, run: RunConfig, accelerator: Accelerator) -> Data:
    """Read a data set and make this process's batches of it.

    Raises
    ------
    TdcError
        As `read_dataset` and `make_batches` say.
    """
    with accelerator.main_process_first():  # which decodes; the others find the cache
        dataset = read_dataset(config)
    if dataset.skipped and accelerator.is_main_process:
        more = f" and {len(dataset.skipped) - 5} more" if len(dataset.skipped) > 5 else ""
        accelerator.print(f"note: {len(dataset.skipped)} images left out: {', '.join(dataset.skipped[:5])}{more}")
    where: dict[str, Any] = {
        "seed": run.seed,
        "device": accelerator.device,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
    }
    parts = {"holdout": dataset.holdout, "val": dataset.val}
    return Data(
        dataset,
        make_batches(dataset.train, dataset, config, train=True, **where),
        {n: make_batches(part, dataset, config, train=False, **where) for n, part in parts.items() if part is not None},
    )


def train(
    config: Config,
    folder: str | os.PathLike,
    *,
    resume: bool = False,
    deadline: float | None = None,
    show: bool = True,
    data: Data | None = None,
) -> tuple[nn.Module, PhaseResult]:
    """Train a dense network, as ``tdc train`` does.

    Parameters
    ----------
    config : Config
    folder : path
        Gets ``config.yaml``, ``metrics.jsonl``, ``tensorboard/`` and the checkpoints.
    resume : bool
        Continue what lies there.
    deadline : float, optional
        A `time.monotonic` value to stop before, with a checkpoint.
    show : bool
        False says nothing on standard error.
    data : Data, optional
        If it is open already.

    Raises
    ------
    TdcError
        For mistakes in the configuration and the data, if ``folder`` holds another run or another process is at work
        there, and as `Trainer.fit` says.
    """
    _check_folder(config, folder, resume, "train")
    accelerator = make_accelerator(config.run)
    data = data or open_data(config.data, config.run, accelerator)
    seed_all(config.run.seed)
    model = create_model(config.model, len(data.dataset.classes), data.dataset.channels)
    with eval_mode(model):
        run_model(model, example_inputs(model, data.shape))  # images may be too small for it
    with _hold(folder, accelerator):
        trainer = Trainer(
            model,
            data.train,
            config.train,
            config.run,
            accelerator,
            folder=folder,
            parts=data.parts,
            info=model_info(config, data.dataset),
            resume=resume,
            deadline=deadline,
            show=show,
        )
        _write_config(config, folder, accelerator)
        result = trainer.fit()
        return model.eval(), result


def compress_run(
    config: Config,
    model: nn.Module,
    ranks: Any,
    folder: str | os.PathLike,
    *,
    resume: bool = False,
    deadline: float | None = None,
    show: bool = True,
    data: Data | None = None,
) -> tuple[nn.Module, History, dict[str, Any]]:
    """Compress a trained network and export it, as ``tdc compress`` does.

    Parameters
    ----------
    config : Config
    model : nn.Module
        Trained on the configuration's data.
    ranks : RankSpec
        Any way of saying ranks.
    folder : path
        Gets what `compress` writes, ``config.yaml``, ``model.onnx`` and ``result.json``.
    resume, deadline, show, data
        As in `train`.

    Returns
    -------
    model : nn.Module
    history : History
    result : dict
        What ``result.json`` holds: scores in FP32, MACs and weights of all convolutions, files; empty if time ran out.

    Raises
    ------
    TdcError
        For mistakes in the configuration and the data, and as `compress` and `export_onnx` say.
    """
    check_exporter()  # rather than after hours of training
    plan = resolve_plan(model, ranks)
    apply_plan(model, plan)  # a plan for another model is refused before the data are read
    _check_folder(config, folder, resume, "compress")
    accelerator = make_accelerator(config.run)
    data = data or open_data(config.data, config.run, accelerator)
    with _hold(folder, accelerator):
        _write_config(config, folder, accelerator)
        info = model_info(config, data.dataset)
        tucker, history = compress(
            model,
            data.train,
            plan,
            eval_loader=data.parts.get("val"),
            holdout_loader=data.parts.get("holdout"),
            config=config.compress,
            run=config.run,
            folder=folder,
            resume=resume,
            deadline=deadline,
            info=info,
            show=show,
        )
        if not history.finished:
            return tucker, history, {}
        scores = {name: evaluate(tucker, part, accelerator=accelerator).to_dict() for name, part in data.parts.items()}
        _, report = apply_plan(model, plan, example=data.shape)
        dense = config.compress.method == "dense"
        assert report.macs is not None
        result = {
            "method": config.compress.method,
            "scores": scores,
            "macs": [report.macs[0], report.macs[0] if dense else report.macs[1]],
            "conv_weights": [report.params[0], report.params[0] if dense else report.params[1]],
            "parameters": sum(parameter.numel() for parameter in tucker.parameters()),
            "decomposition": history.decomposition,
        }
        if accelerator.is_main_process:
            root = Path(folder)
            export(tucker, info, root / "model.onnx")
            write_json(root / "result.json", result)
        return tucker, history, result


def export(model: nn.Module, info: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a model as ONNX with an open batch; its metadata say how images become its input.

    The property ``tdc.input`` is JSON: ``image_size``, ``mean`` and ``std`` of images scaled to 0..1, ``classes``.
    """
    size = info["image_size"]
    about = {"image_size": size, "mean": info["mean"], "std": info["std"], "classes": info["classes"]}
    shape = (2, info["channels"], size, size)
    export_onnx(model, shape, path, dynamic_batch=True, metadata={INPUT_PROPERTY: json.dumps(about)})


def evaluate_file(path: str | os.PathLike, config: DataConfig, run: RunConfig) -> dict[str, Score]:
    """Evaluate a checkpoint or an ONNX model on a data set's parts, in FP32, as ``tdc evaluate`` does.

    Returns
    -------
    dict of str to Score
        For ``holdout`` (if some training images are held out) and ``val``.

    Raises
    ------
    TdcError
        If the file or the data set cannot be read, they do not fit, or there is nothing to evaluate on.
    """
    is_onnx = Path(path).suffix == ".onnx"
    if is_onnx:
        run = replace(run, device="cpu")
        about, model = _onnx_input(path), None
    else:
        model, about = load_model(path)
    config = as_trained(config, about)
    accelerator = make_accelerator(run)
    with accelerator.main_process_first():
        dataset = read_dataset(config)
    parts = {"holdout": dataset.holdout, "val": dataset.val}
    scores = {}
    for name, part in parts.items():
        if part is None:
            continue
        if model is not None:
            model.to(accelerator.device)
            batches = make_batches(
                part,
                dataset,
                config,
                train=False,
                device=accelerator.device,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
            )
            scores[name] = evaluate(model, batches, accelerator=accelerator)
        else:
            scores[name] = evaluate_onnx(path, make_batches(part, dataset, config, train=False))
    if not scores:
        raise TdcError(f"{config.root} has no validation images; set holdout to evaluate on training images")
    return scores


def as_trained(config: DataConfig, info: dict[str, Any]) -> DataConfig:
    """The configuration of data for a model of which a file says ``info`` (empty if it says nothing)."""
    if not info:
        return config
    size = config.image_size or (info["image_size"] if config.name in ("imagefolder", "tiny-imagenet") else None)
    return replace(config, image_size=size, mean=config.mean or info["mean"], std=config.std or info["std"])


def model_info(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint says of its model."""
    return {
        "model": asdict(config.model),
        "classes": len(dataset.classes),
        "channels": dataset.channels,
        "image_size": dataset.image_size,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }


def _onnx_input(path: str | os.PathLike) -> dict[str, Any]:
    """What `export` said of the input; empty for other ONNX files."""
    try:
        properties = onnx.load(str(path), load_external_data=False).metadata_props
    except Exception as error:  # protobuf's own types
        raise TdcError(f"cannot read {path} as an ONNX model: {error}") from None
    return next((json.loads(prop.value) for prop in properties if prop.key == INPUT_PROPERTY), {})


def _check_folder(config: Config, folder: str | os.PathLike, resume: bool, section: str) -> None:
    """Refuse a folder that holds a run, or one of another configuration; ``section`` is that of the command."""
    path = Path(folder) / "config.yaml"
    if phases_begun(folder) and not resume:
        raise TdcError(f"{folder} holds a run already; continue it with resume, or choose another folder")
    if not phases_begun(folder) or not path.is_file():
        return
    before, now = flat(asdict(load_config(path))), flat(asdict(config))
    parts = ("data", "model", "run", section)
    differing = [k for k in now if k.partition(".")[0] in parts and k not in _FREE and before[k] != now[k]]
    if differing:
        raise TdcError(
            f"{folder} holds a run of another configuration (they differ in {', '.join(differing[:5])}); resume with "
            "the one that it was started with, or choose another folder"
        )


def _hold(folder: str | os.PathLike, accelerator: Accelerator) -> AbstractContextManager[None]:
    """Keep other runs out of a folder; the main process does."""
    if not accelerator.is_main_process:
        return nullcontext()
    make_folder(folder)
    return lock_folder(folder)


def _write_config(config: Config, folder: str | os.PathLike, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        save_config(config, Path(folder) / "config.yaml")
