"""Compression of a trained network: ADMM, decomposition, fine-tuning; and the baselines, by the same code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.files import write_atomic
from tdc_tvm.plan import DecompositionPlan, RankSpec, parse_ranks
from tdc_tvm.training.batches import Batches, LoaderBatches, seed_all
from tdc_tvm.training.checkpoint import make_folder, phases_begun
from tdc_tvm.training.config import PHASES, CompressConfig, PhaseConfig, RunConfig
from tdc_tvm.training.decompose import apply_plan
from tdc_tvm.training.evaluation import evaluate, recalibrate
from tdc_tvm.training.hooi import decompose_kernels
from tdc_tvm.training.inputs import check_model, copy_model
from tdc_tvm.training.trainer import PhaseResult, Trainer, broadcast, make_accelerator


@dataclass
class History:
    """What happened during compression.

    Parameters
    ----------
    method : str
    epochs : list of dict
        The figures of every epoch of every phase, in order.
    decomposition : dict
        ``relative_error`` by layer (``||W - W'|| / ||W||``), and the scores before and after it, after also with
        new statistics of batch normalisation; empty if nothing was decomposed.
    finished : bool
        False if the deadline came first; the same call with ``resume=True`` goes on.
    """

    method: str
    epochs: list[dict[str, Any]] = field(default_factory=list)
    decomposition: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The history as plain data for JSON."""
        return dict(vars(self))


def compress(
    model: nn.Module,
    loader: Batches | Iterable[Any],
    plan: RankSpec,
    *,
    eval_loader: Batches | Iterable[Any] | None = None,
    holdout_loader: Batches | Iterable[Any] | None = None,
    config: CompressConfig | None = None,
    run: RunConfig | None = None,
    teacher: nn.Module | None = None,
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    deadline: float | None = None,
    info: Mapping[str, Any] | None = None,
    show: bool = True,
) -> tuple[nn.Module, History]:
    """Bring a trained network to Tucker format with as little loss of accuracy as can be.

    Parameters
    ----------
    model : nn.Module
        Any classifier: images in, logits (batch, classes) out.  It is not changed.
    loader : iterable
        Training data: a loader of (images, labels) such as a ``DataLoader``, or `Batches`.  Of a ``DataLoader``
        each of several processes takes its own batches; other loaders must give every process its share.
    plan : RankSpec
        The ranks of every layer that is to be decomposed, or any other way of saying ranks.
    eval_loader : iterable, optional
        Evaluated after every epoch, and reported as ``val``.
    holdout_loader : iterable, optional
        Likewise, as ``holdout``; the best epoch is chosen by it.
    config : CompressConfig, optional
        The method and its phases.
    run : RunConfig, optional
        Seed, device, precision, checkpoints.
    teacher : nn.Module, optional
        For distillation; by default ``model`` as it is.
    folder : path, optional
        For ``plan.json``, ``history.json``, ``decomposition.json``, and a folder of checkpoints and figures for each
        phase, such as ``admm/`` and ``finetune/``; the last one's ``model.safetensors`` is what comes out.
    resume : bool
        Continue what lies in ``folder``.
    deadline : float, optional
        A `time.monotonic` value: stop with a checkpoint before an epoch that would not end by then.
    info : mapping, optional
        Written into the checkpoints' headers.
    show : bool
        False says nothing on standard error.

    Returns
    -------
    model : nn.Module
        In Tucker format (dense for the method ``dense``), in eval mode, on the device it was trained on.
    history : History

    Raises
    ------
    TdcError
        If the plan does not fit the model, ``folder`` holds another run, or training fails as `Trainer.fit` says.

    Examples
    --------
    >>> tucker, history = compress(model, loader, {"layer1.0.conv1": (32, 32)})  # doctest: +SKIP
    """
    check_model(model)
    config, run = config or CompressConfig(), run or RunConfig()
    spec = resolve_plan(model, plan)
    apply_plan(model, spec)  # a plan for another model is refused before anything is trained
    root = None if folder is None else Path(folder)
    if root is not None:
        _check_folder(root, config.method, spec, resume)
    accelerator = make_accelerator(run)
    batches = share_loader(loader, accelerator, run.seed, train=True)
    given = {"holdout": holdout_loader, "val": eval_loader}
    parts = {
        name: share_loader(part, accelerator, run.seed, train=False) for name, part in given.items() if part is not None
    }
    if root is not None and accelerator.is_main_process:
        make_folder(root)
        spec.save(root / "plan.json")
    history = History(config.method)
    student = copy_model(model)
    finetune = config.finetune
    if (config.method != "dense" and finetune.distill_weight) or config.admm_phase.distill_weight:
        teacher = copy_model(model if teacher is None else teacher)

    def phase(title: str, options: PhaseConfig, net: nn.Module, **more: Any) -> PhaseResult:
        trainer = Trainer(
            net,
            batches,
            options,
            run,
            accelerator,
            title=title,
            folder=None if root is None else root / title,
            parts=parts,
            teacher=teacher,
            info={**(info or {}), "plan": None if title in ("admm", "dense") else spec.to_dict()},
            resume=resume,
            deadline=deadline,
            show=show,
            **more,
        )
        result = trainer.fit()
        history.epochs += result.history
        return result

    if config.method == "admm":
        result = phase("admm", config.admm_phase, student, admm=(spec.layers, config.admm))
        if not result.finished:
            return student.eval(), history
        spare = config.admm_phase.epochs - result.epochs_run
        finetune = replace(finetune, epochs=finetune.epochs + spare)
    elif config.method in ("direct", "dense"):
        finetune = replace(finetune, epochs=finetune.epochs + config.admm_phase.epochs)
    if config.method == "dense":
        finetune = replace(finetune, distill_weight=0.0)
    elif config.method == "scratch":
        student, _ = apply_plan(student, spec, inplace=True)
        seed_all(run.seed, 1)
        reinitialize(student)
    else:
        begun = root is not None and (root / "finetune" / "last.safetensors").is_file()
        if begun and resume:
            student, _ = apply_plan(student, spec, inplace=True)
            history.decomposition = _read_json(root / "decomposition.json")  # type: ignore[operator]
        else:
            student.to(accelerator.device)

            def scores(net: nn.Module, when: str) -> dict[str, float]:
                found = {
                    n: evaluate(net, p, precision=run.precision, accelerator=accelerator) for n, p in parts.items()
                }
                return {f"{name}_top1_{when}": score.top1 for name, score in found.items()}

            figures: dict[str, Any] = scores(student, "before")
            factors = decompose_kernels(student, spec)
            student, report = apply_plan(student, spec, inplace=True, factors=factors)
            figures |= scores(student, "decomposed")
            recalibrate(student, batches, config.recalibration_batches)
            if accelerator.num_processes > 1:
                broadcast([*student.parameters(), *student.buffers()])
            figures |= scores(student, "recalibrated")
            figures["relative_error"] = {layer.name: layer.relative_error for layer in report.decomposed}
            history.decomposition = figures
            if root is not None and accelerator.is_main_process:
                write_json(root / "decomposition.json", figures)
    result = phase(PHASES[config.method][-1], finetune, student)
    history.finished = result.finished
    if root is not None and accelerator.is_main_process:
        write_json(root / "history.json", history.to_dict())
    return student.eval(), history


def _check_folder(root: Path, method: str, plan: DecompositionPlan, resume: bool) -> None:
    """Refuse a folder that holds another run, before anything is written there."""
    begun = phases_begun(root)
    if not begun:
        return
    if not resume:
        raise TdcError(f"{root} holds a run already; continue it with resume, or choose another folder")
    if begun != set(PHASES[method][: len(begun)]):
        raise TdcError(
            f"{root} holds a run of another method than {method}, or has lost a phase: found "
            f"{', '.join(sorted(begun))}, expected {' and then '.join(PHASES[method])}; resume with its own method, "
            "put the phase's folder back, or choose another folder"
        )
    if DecompositionPlan.load(root / "plan.json").layers != plan.layers:
        raise TdcError(f"{root} holds a run with other ranks; resume with its plan.json, or choose another folder")


def resolve_plan(model: nn.Module, ranks: RankSpec) -> DecompositionPlan:
    """Ranks per layer from any way of saying them: a pair, an energy, a preset, a plan or its file.

    Raises
    ------
    TdcError
        If they cannot be read or do not fit the model.
    """
    spec = parse_ranks(ranks)
    if isinstance(spec, DecompositionPlan):
        return spec
    from tdc_tvm.training.decompose import decompose

    return decompose(model, spec)[1].plan


def reinitialize(model: nn.Module) -> None:
    """Give a model random weights, convolutions as He et al. (2015) do; draws from the global generator."""
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def share_loader(loader: Any, accelerator: Any, seed: int, *, train: bool) -> Batches:
    """A user's loader as `Batches`; of a ``DataLoader`` each of several processes takes its share of the batches."""
    if callable(getattr(loader, "epoch", None)):
        return loader
    batches = LoaderBatches(loader, accelerator.device, seed)
    if accelerator.num_processes > 1 and isinstance(loader, torch.utils.data.DataLoader):
        from accelerate.data_loader import prepare_data_loader

        # All processes train for as many steps, some on images that others have, too; each is evaluated once.
        shared: Any
        if train:
            shared = accelerator.prepare_data_loader(loader)
        else:
            rank, world = accelerator.process_index, accelerator.num_processes
            shared = prepare_data_loader(loader, num_processes=world, process_index=rank, even_batches=False)
        batches.loader, batches.steps = shared, len(shared)
    return batches


def write_json(path: Path, data: Any) -> None:
    """Write plain data as JSON, whole or not at all."""
    with write_atomic(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise TdcError(f"cannot read {path}: {error}; remove the folder and start again") from None
