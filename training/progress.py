"""What a run says while it goes on: a bar with the time left, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tdc_tvm.errors import TdcError
from tdc_tvm.files import write_atomic


class Progress:
    """Shows a phase's progress on standard error; only the main process does.

    On a terminal it is a bar with the time left (if rich is installed), otherwise a line per epoch.

    Parameters
    ----------
    title : str
        The phase's name.
    steps : int
        Of the whole phase.
    done : int
        Steps that were done before.
    show : bool
        False is silent.
    """

    def __init__(self, title: str, steps: int, done: int = 0, show: bool = True) -> None:
        self.title, self.steps, self.first, self.done, self.show = title, steps, done, done, show
        self.begin = time.monotonic()
        self._bar: Any = None
        if show and sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import (
                    BarColumn,
                    MofNCompleteColumn,
                    TextColumn,
                    TimeElapsedColumn,
                    TimeRemainingColumn,
                )
                from rich.progress import Progress as Bar
            except ModuleNotFoundError:
                return
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left:"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(title, total=steps, completed=done)
            self._bar.start()

    def step(self) -> None:
        """Count one step."""
        self.done += 1
        if self._bar is not None:
            self._bar.advance(self._task)

    def epoch(self, record: Mapping[str, Any], epochs: int) -> None:
        """Show an epoch's figures."""
        if not self.show:
            return
        figures = ", ".join(
            f"{key} {_text(value)}" for key, value in record.items() if key in _SHOWN and value is not None
        )
        self.say(f"{self.title} {record['epoch']}/{epochs}: {figures}{self._left()}")

    def say(self, text: str) -> None:
        """Show a line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.show:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self) -> str:
        if self._bar is not None or self.done <= self.first or self.done >= self.steps:
            return ""
        seconds = (time.monotonic() - self.begin) / (self.done - self.first) * (self.steps - self.done)
        return f", {timedelta(seconds=round(seconds))} left"


_SHOWN = (
    "train_loss",
    "train_top1",
    "holdout_top1",
    "val_top1",
    "primal_relative",
    "dual_relative",
    "rho",
    "skipped_images",
    "train_seconds",
)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Log:
    """A phase's figures as JSON lines (``metrics.jsonl``) and for TensorBoard (``tensorboard/``).

    Parameters
    ----------
    folder : Path, optional
        None keeps nothing.
    history : sequence of dict
        Epochs that a checkpoint has: the file then holds these, and what came after them goes.
    tensorboard : bool
    step : int
        Where the phase continues.
    """

    def __init__(self, folder: Path | None, history: Sequence[Mapping[str, Any]], tensorboard: bool, step: int) -> None:
        self.folder = folder
        self._writer: Any = None
        self.notes: list[str] = []
        if folder is None:
            return
        with write_atomic(folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(_line(record) for record in history), encoding="utf-8")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.notes.append("tensorboard is not installed; the figures go to metrics.jsonl alone")
                return
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step if step else None)

    def epoch(self, record: Mapping[str, Any], step: int) -> None:
        """Add an epoch."""
        if self.folder is not None:
            path = self.folder / "metrics.jsonl"
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(_line(record))
            except OSError as error:
                raise TdcError(f"cannot write {path}: {error.strerror}; mend that and resume") from None
        self.scalars(record, step)

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Add points to TensorBoard's curves."""
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name not in ("epoch", "step"):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"
