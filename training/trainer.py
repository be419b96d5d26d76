"""The training loop: one phase of dense, ADMM or Tucker training, resumable bit for bit."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import Ranks
from tdc_tvm.training.admm import Admm, AdmmConfig
from tdc_tvm.training.batches import Batch, Batches, seed_all
from tdc_tvm.training.checkpoint import (
    load_checkpoint,
    load_optimizer,
    load_state_dict,
    make_folder,
    optimizer_tensors,
    part,
    save_checkpoint,
    with_prefix,
)
from tdc_tvm.training.config import PhaseConfig, RunConfig, flat
from tdc_tvm.training.evaluation import check_logits, evaluate
from tdc_tvm.training.inputs import run_model
from tdc_tvm.training.progress import Log, Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(run: RunConfig) -> Accelerator:
    """The processes and devices of this run; also under ``torchrun`` and ``accelerate launch``.

    Raises
    ------
    TdcError
        If accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError:
        raise TdcError("training needs accelerate; install it with: pip install 'tdc-tvm[train]'") from None
    # Mixed precision is the trainer's own: accelerate's would wrap the model's forward.
    # Unless it is told of the CPU, accelerate lets processes that torchrun started there run unconnected.
    cpu = run.device == "cpu" or not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, mixed_precision="no")


@dataclass
class PhaseResult:
    """What a phase came to; ``finished`` is False if it ran out of time and waits to be resumed."""

    finished: bool
    epochs_run: int
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains a model for one phase.

    Parameters
    ----------
    model : nn.Module
        Maps images to logits (batch, classes); it is trained in place, on the accelerator's device.
    batches : Batches
        Training data.
    phase : PhaseConfig
    run : RunConfig
    accelerator : accelerate.Accelerator
        From `make_accelerator`.
    title : str
        The phase's name in figures and messages.
    folder : path, optional
        For checkpoints (``last.safetensors``, ``best.safetensors``, finally ``model.safetensors``), figures
        (``metrics.jsonl``) and ``tensorboard/``.  None keeps nothing.
    parts : mapping of str to Batches
        Evaluated after every epoch.  ``best`` is the epoch of the best top-1 on ``holdout``, or on ``val`` where
        nothing is held out.
    admm : (mapping of str to Ranks, AdmmConfig), optional
        Draws these layers to these ranks.
    teacher : nn.Module, optional
        For distillation.
    info : mapping
        Written into the checkpoints' headers, for `tdc_tvm.training.load_model`.
    resume : bool
        Continue from the last checkpoint in ``folder``, if there is one.
    deadline : float, optional
        A `time.monotonic` value: the phase stops with a checkpoint before an epoch that would not end by then.
    show : bool
        False says nothing on standard error.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        phase: PhaseConfig,
        run: RunConfig,
        accelerator: Accelerator,
        *,
        title: str = "train",
        folder: str | os.PathLike | None = None,
        parts: Mapping[str, Batches] | None = None,
        admm: tuple[Mapping[str, Ranks], AdmmConfig] | None = None,
        teacher: nn.Module | None = None,
        info: Mapping[str, Any] | None = None,
        resume: bool = False,
        deadline: float | None = None,
        show: bool = True,
    ) -> None:
        self.model, self.batches, self.phase, self.run, self.accelerator = model, batches, phase, run, accelerator
        self.title, self.parts, self.info = title, dict(parts or {}), dict(info or {})
        self.folder = None if folder is None else Path(folder)
        self.resume, self.deadline = resume, deadline
        self.show = show and accelerator.is_main_process
        self.device = accelerator.device
        self.steps = len(batches)
        self.total = phase.epochs * self.steps
        self.epoch, self.step = 0, 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, right answers, images
        self.stopped_early = False
        self.update_seconds = 0.0
        self.config: dict[str, Any] = {
            "phase": asdict(phase),
            "steps": self.steps,
            "admm": None if admm is None else {"ranks": {k: list(v) for k, v in admm[0].items()}, **asdict(admm[1])},
            **{key: getattr(run, key) for key in ("seed", "precision", "channels_last", "compile", "deterministic")},
        }
        # PyTorch has channels_last for tensors of four dimensions; kernels of Conv3d have five.
        flat = run.channels_last and all(parameter.ndim < 5 for parameter in model.parameters())
        self.memory_format = torch.channels_last if flat else torch.contiguous_format
        self.model.to(self.device).to(memory_format=self.memory_format)
        state = self._find_state()
        self.finished = state is not None and state[1]["finished"]
        if state is not None:
            load_state_dict(self.model, state[0] if self.finished else part(state[0], "model"), self._last)
        self.teacher = None
        if phase.distill_weight and not self.finished:
            if teacher is None:
                raise TdcError("distill_weight needs a teacher; give one, or set distill_weight to 0")
            self.teacher = teacher.to(self.device).to(memory_format=self.memory_format).eval().requires_grad_(False)
        self.optimizer = _optimizer(model, phase)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.precision == "fp16")
        self.ema: Any = None
        if phase.ema_decay and not self.finished:
            from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

            average = get_ema_multi_avg_fn(phase.ema_decay)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.admm: Admm | None = None
        if admm is not None and not self.finished:
            ranks, config = admm
            weights = {name: model.get_submodule(name).weight for name in ranks}
            updates = self.total // config.projection_interval
            share = broadcast if accelerator.num_processes > 1 else None
            self.admm = Admm(weights, ranks, config, updates, share)  # type: ignore[arg-type]
        if state is not None:
            self._restore(*state)
        if phase.mixup and self.batches.classes is None:
            raise TdcError("mixup needs the number of classes, which a user's loader does not tell; set mixup to 0")

    def fit(self) -> PhaseResult:
        """Train to the end of the phase, or to the deadline.

        Raises
        ------
        TdcError
            If the model does not run on the images, its outputs do not fit the labels, the loss is not finite (the
            last checkpoint stays), or a checkpoint cannot be written.
        """
        if self.finished:
            return PhaseResult(True, self.epoch, self.history)
        if self.folder is not None and self.accelerator.is_main_process:
            make_folder(self.folder)
            for unfinished in self.folder.glob(".*.*.safetensors"):  # by a process that was killed
                unfinished.unlink()
        main = self.accelerator.is_main_process
        done = self.epoch * self.steps + self.step
        log = Log(self.folder if main else None, self.history, self.run.tensorboard, done)
        progress = Progress(self.title, self.total, done, self.show)
        for note in log.notes:
            progress.say(f"note: {note}")
        if self.run.compile:
            self.model.compile()
        wrapped = self.accelerator.prepare_model(self.model)
        try:
            with _determinism(self.run.deterministic, self.device):
                finished = self._epochs(wrapped, log, progress)
        finally:
            progress.close()
            log.close()
            self.accelerator.free_memory()
            self.optimizer.zero_grad(set_to_none=True)
        if finished:
            if self.ema is not None:
                self.model.load_state_dict(self.ema.module.state_dict())
            self._save_weights("model", self.history[-1] if self.history else {})
            self.finished = True
            self._save_state()
        return PhaseResult(finished, self.epoch, self.history)

    def _epochs(self, model: nn.Module, log: Log, progress: Progress) -> bool:
        """All epochs that are left; False if time ran out."""
        seconds = 0.0
        while self.epoch < self.phase.epochs and not self.stopped_early:
            if self._late(seconds):
                return False
            begin = time.monotonic()
            self._train_epoch(model, log, progress)
            self._share_buffers()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            record = self._record(time.monotonic() - begin)
            self.epoch, self.step = self.epoch + 1, 0
            self.sums.zero_()
            self.stopped_early = self.admm is not None and self.admm.last is not None and self.admm.last.converged
            key = "holdout_top1" if "holdout" in self.parts else "val_top1"
            if key in record and (self.best is None or record[key] > self.best[key]):
                self.best = {key: record[key], "epoch": record["epoch"]}
                self._save_weights("best", record)
            self.history.append(record)
            log.epoch(record, self.epoch * self.steps)
            progress.epoch(record, self.phase.epochs)
            if self.epoch < self.phase.epochs and not self.stopped_early:
                self._save_state()
            seconds = time.monotonic() - begin
        return True

    def _train_epoch(self, model: nn.Module, log: Log, progress: Progress) -> None:
        model.train()
        self.update_seconds = 0.0
        rank = self.accelerator.process_index
        for step, batch in enumerate(self.batches.epoch(self.epoch, self.step), self.step):
            number = self.epoch * self.steps + step
            # Dropout and the like draw from here: the step alone says what, so that no state needs to be kept.
            seed_all(self.run.seed, self.epoch, step, rank)
            rate = learning_rate(self.phase, number, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self._train_step(model, batch, first=step == self.step)
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            if self.admm is not None and (number + 1) % self.admm.config.projection_interval == 0:
                self._check_loss(number)
                residuals = self.admm.update()
                self.update_seconds += residuals.seconds
                log.scalars({f"admm/{name}": value for name, value in residuals.to_dict().items()}, number + 1)
            progress.step()
            if (number + 1) % self.run.log_steps == 0:
                mean = self._check_loss(number)
                log.scalars({"lr": rate, "loss_so_far": mean}, number + 1)
            every = self.run.checkpoint_steps
            if every and (step + 1) % every == 0 and step + 1 < self.steps:
                self._check_loss(number, weights=True)
                self.step = step + 1
                self._save_state()
        self._check_loss((self.epoch + 1) * self.steps - 1, weights=True)
        if self.admm is not None and not self.admm.done and self.epoch + 1 == self.phase.epochs:
            self.admm.update()  # a phase shorter than the interval still says how far it came

    def _share_buffers(self) -> None:
        """Give all processes the first one's statistics of batch normalisation, as they have its weights."""
        if self.accelerator.num_processes > 1:
            for net in (self.model, self.ema):
                broadcast([] if net is None else list(net.buffers()))

    def _train_step(self, model: nn.Module, batch: Batch, first: bool) -> None:
        images, labels = batch
        phase = self.phase
        images = images.contiguous(memory_format=self.memory_format) if images.ndim == 4 else images
        targets = labels
        if phase.mixup:
            from torchvision.transforms import v2

            images, targets = v2.MixUp(alpha=phase.mixup, num_classes=self.batches.classes)(images, labels)
        with self._autocast():
            logits = run_model(model, (images,))
        if first:
            check_logits(logits, labels, self.batches.classes)
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=phase.label_smoothing)
        if self.teacher is not None:
            with torch.no_grad(), self._autocast():
                expected = run_model(self.teacher, (images,))
            if first:
                check_logits(expected, labels, logits.shape[1], "the teacher")
            loss = torch.lerp(
                loss, distillation(logits, expected.float(), phase.distill_temperature), phase.distill_weight
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if phase.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), phase.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.admm is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            self.admm.pull_(rate / (1 - phase.momentum) if phase.optimizer == "sgd" else rate)
        with torch.no_grad():
            right = (logits.argmax(1) == labels).sum()
            count = torch.full_like(right, len(labels))
            self.sums += torch.stack([loss.double() * len(labels), right, count])

    def _record(self, train_seconds: float) -> dict[str, Any]:
        """The figures of the epoch that has just been trained."""
        sums = self.accelerator.reduce(self.sums.clone(), "sum").tolist()  # type: ignore[union-attr]
        record: dict[str, Any] = {
            "phase": self.title,
            "epoch": self.epoch + 1,
            "step": (self.epoch + 1) * self.steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": sums[0] / sums[2],
            "train_top1": sums[1] / sums[2],
            "train_seconds": train_seconds,
            "images_per_s": sums[2] / train_seconds,
        }
        if self.admm is not None and self.admm.last is not None:
            record |= self.admm.last.to_dict()
            del record["seconds"]
            record["update_seconds"] = self.update_seconds  # of all updates in this epoch, part of train_seconds
        if skipped := self.batches.skipped:
            record["skipped_images"] = len(skipped)
        model = self.model if self.ema is None else self.ema.module
        for name, batches in self.parts.items():
            score = evaluate(model, batches, precision=self.run.precision, accelerator=self.accelerator)
            record |= {f"{name}_{key}": value for key, value in score.to_dict().items() if key != "count"}
        return record

    def _autocast(self) -> torch.autocast:
        enabled = self.run.precision != "fp32"
        return torch.autocast(self.device.type, DTYPES[self.run.precision] if enabled else None, enabled=enabled)

    def _check_loss(self, number: int, weights: bool = False) -> float:
        """Stop if the loss, or a weight that is about to be saved, is not finite; all processes do."""
        loss, _, count = self.accelerator.reduce(self.sums.clone(), "sum").tolist()  # type: ignore[union-attr]
        culprit = None if math.isfinite(loss) else f"the loss became {loss}"
        if culprit is None and weights:
            norms = torch._foreach_norm([parameter.detach() for parameter in self.model.parameters()])
            culprit = None if bool(torch.stack(norms).isfinite().all()) else "weights became NaN or infinite"
        if culprit is not None:
            kept = "there is no checkpoint"
            if self.folder is not None and self._last.is_file():
                kept = f"the last good checkpoint is {self._last}"
            raise TdcError(
                f"{culprit} by step {number % self.steps + 1} of epoch {self.epoch + 1} ({self.title}); "
                f"{kept}; lower lr, set clip_norm, or train in another precision"
            )
        return loss / max(count, 1)

    def _late(self, epoch_seconds: float) -> bool:
        """Whether the next epoch would end after the deadline; the main process decides for all."""
        if self.deadline is None:
            return False
        late = torch.tensor(float(time.monotonic() + epoch_seconds > self.deadline), device=self.device)
        if self.accelerator.num_processes > 1:
            broadcast([late])
        return bool(late.item())

    @property
    def _last(self) -> Path:
        """The checkpoint to continue from."""
        return (self.folder or Path()) / "last.safetensors"

    def _find_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What the checkpoint holds, if there is one."""
        if self.folder is None or not self._last.is_file():
            return None
        path = self._last
        if not self.resume:
            raise TdcError(f"{self.folder} holds a run already; continue it with resume, or choose another folder")
        tensors, data = load_checkpoint(path)
        if data["finished"]:
            tensors, _ = load_checkpoint(self.folder / "model.safetensors")
        now = json.loads(json.dumps(self.config))
        if data.get("config") != now:
            before = flat(data.get("config") or {})
            differing = [key for key, value in flat(now).items() if before.get(key) != value]
            raise TdcError(
                f"{path} was written by another configuration (they differ in {', '.join(differing[:5])}); "
                "resume with the one that the run was started with, or choose another folder"
            )
        return tensors, data

    def _restore(self, tensors: dict[str, torch.Tensor], data: dict[str, Any]) -> None:
        self.epoch, self.step = data["epoch"], data["step"]
        self.history, self.best = data["history"], data["best"]
        self.stopped_early = data["stopped_early"]
        if self.accelerator.is_main_process:
            self.sums.copy_(torch.tensor(data["sums"], dtype=torch.float64))
        if self.finished:
            return
        load_optimizer(self.optimizer, part(tensors, "optimizer"))
        if data["scaler"]:
            self.scaler.load_state_dict(data["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(part(tensors, "ema"))
        if self.admm is not None:
            self.admm.load_state_dict(part(tensors, "admm"), data["admm"])

    def _save_state(self) -> None:
        """Write ``last.safetensors``: all that the next step depends on; a finished phase has ``model.safetensors``."""
        sums = self.accelerator.reduce(self.sums.clone(), "sum").tolist()  # type: ignore[union-attr]
        if self.folder is None or not self.accelerator.is_main_process:
            return
        tensors: dict[str, torch.Tensor] = {}
        data: dict[str, Any] = {
            "config": self.config,
            "epoch": self.epoch,
            "step": self.step,
            "sums": sums,
            "history": self.history,
            "best": self.best,
            "stopped_early": self.stopped_early,
            "finished": self.finished,
        }
        if not self.finished:
            tensors |= with_prefix("model", self.model.state_dict())
            tensors |= with_prefix("optimizer", optimizer_tensors(self.optimizer))
            data["scaler"] = self.scaler.state_dict()
            if self.ema is not None:
                tensors |= with_prefix("ema", self.ema.state_dict())
            if self.admm is not None:
                state, data["admm"] = self.admm.state_dict()
                tensors |= with_prefix("admm", state)
        save_checkpoint(self._last, tensors, data)

    def _save_weights(self, name: str, record: Mapping[str, Any]) -> None:
        """Write the weights alone, those of the moving average if there is one."""
        if self.folder is None or not self.accelerator.is_main_process:
            return
        model = self.model if self.ema is None else self.ema.module
        path = self.folder / f"{name}.safetensors"
        save_checkpoint(path, model.state_dict(), {**self.info, "record": dict(record)})


def learning_rate(phase: PhaseConfig, step: int, steps: int) -> float:
    """The rate of a step: linear warm-up, then a cosine.

    Parameters
    ----------
    phase : PhaseConfig
    step : int
        From 0, of the whole phase.
    steps : int
        Of one epoch.
    """
    warmup, total = phase.warmup_epochs * steps, phase.epochs * steps
    if step < warmup:
        return phase.lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(total - warmup, 1)
    return phase.lr * (phase.final_lr + (1 - phase.final_lr) * (1 + math.cos(math.pi * share)) / 2)


def distillation(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 * KL(teacher / T || student / T)``, the batch's mean (Hinton, Vinyals and Dean, 2015).

    Parameters
    ----------
    logits, teacher : torch.Tensor
        Shape (batch, classes).
    """
    ours, theirs = (F.log_softmax(value / temperature, 1) for value in (logits, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def _optimizer(model: nn.Module, phase: PhaseConfig) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TdcError("the model has no parameters to train")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": phase.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if phase.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=phase.lr)
    return torch.optim.SGD(groups, lr=phase.lr, momentum=phase.momentum, nesterov=phase.momentum > 0)


def broadcast(tensors: list[torch.Tensor]) -> None:
    """Give all processes the first one's values, in place."""
    for tensor in tensors:
        torch.distributed.broadcast(tensor.data, 0)


@contextmanager
def _determinism(enabled: bool, device: torch.device) -> Iterator[None]:
    """Choose between repeatable and fastest GPU kernels; the caller's settings are restored."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = cudnn.benchmark
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark = not enabled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark = benchmark
