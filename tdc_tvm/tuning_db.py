"""What was measured of kernels: a file of JSON lines that several processes and machines can add to.

A line is a record: a configuration of a convolution on a device, and the samples or the error that came of it.
Records are only ever added, each by one write under a lock and flushed to disk: who is killed loses the one in flight
at most.  Of several records of the same configuration, on the same device and of the same kernels, the one with the
latest date counts, whatever file it came from.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from tdc_tvm.errors import TdcError
from tdc_tvm.files import check_output
from tdc_tvm.schedules import backend
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.digest import source_digest
from tdc_tvm.schedules.kernel import KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, ConvShape, TuckerConvShape

FORMAT = 1
SUFFIXES = (".jsonl",)


@dataclass(frozen=True)
class TuningKey:
    """What a measurement is good for: another device or other kernels may take another time.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        The convolution, its precision included.
    device, arch : str
        The GPU or CPU that it ran on, and the architecture that it was compiled for.
    kernels : str
        `source_digest` of the schedules.
    """

    shape: ConvShape
    device: str
    arch: str
    kernels: str

    @staticmethod
    def of(shape: ConvShape, device: DeviceSpec) -> TuningKey:
        """That of the present schedules."""
        return TuningKey(shape, device.name, device.arch, source_digest())


@dataclass(frozen=True)
class TuningRecord:
    """One configuration, measured.

    Parameters
    ----------
    key : TuningKey
        What was measured where.
    config : KernelConfig
        The configuration.
    samples_us : tuple of float
        Times of a launch; none of a candidate that failed.
    error : str
        Why it failed.
    predicted_us : float, optional
        What the analytical model predicted.
    tuner : str
        The search that asked for it, and its seed.
    versions : mapping of str to str
        Of TVM, CUDA and whatever else was measured with.
    date : str
        When, UTC, in ISO 8601.

    Raises
    ------
    TdcError
        If there are neither samples nor an error, or both, or a sample is no time.
    """

    key: TuningKey
    config: KernelConfig
    samples_us: tuple[float, ...] = ()
    error: str = ""
    predicted_us: float | None = None
    tuner: str = ""
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="microseconds"))

    def __post_init__(self) -> None:
        if bool(self.samples_us) == bool(self.error):
            raise TdcError("a record has either samples_us or an error; found " + ("both" if self.error else "neither"))
        if not all(isinstance(us, (int, float)) and math.isfinite(us) and us > 0 for us in self.samples_us):
            raise TdcError(f"found samples_us={list(self.samples_us)!r}; expected positive numbers")

    @property
    def median_us(self) -> float:
        """The middle sample; infinite for a candidate that failed."""
        return float(np.median(self.samples_us)) if self.samples_us else math.inf

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        outcome: dict[str, Any] = {"error": self.error}
        if self.samples_us:
            outcome = {"median_us": round(self.median_us, 4), "samples_us": list(self.samples_us)}
        return {
            "format": FORMAT,
            "shape": shape_to_dict(self.key.shape),
            "device": self.key.device,
            "arch": self.key.arch,
            "kernels": self.key.kernels,
            "strategy": self.config.strategy,
            "config": dict(self.config.parameters),
            **outcome,
            "predicted_us": self.predicted_us,
            "tuner": self.tuner,
            "versions": dict(self.versions),
            "date": self.date,
        }

    @staticmethod
    def from_dict(data: Any) -> TuningRecord:
        """Read what `to_dict` gave.

        Raises
        ------
        TdcError
            If it is anything else.
        """
        if not isinstance(data, dict) or "format" not in data:
            raise TdcError("expected a record that 'tdc tune' wrote")
        if data["format"] != FORMAT:
            raise TdcError(f"found format {data['format']!r}, this version of tdc_tvm reads {FORMAT}; tune again")
        try:
            config, versions = dict(data["config"]), dict(data["versions"])
            if any(type(value) is not int for value in config.values()):
                raise TdcError(f"found config={config!r}; expected ints")
            texts = {name: data[name] for name in ("device", "arch", "kernels", "strategy", "tuner", "date")}
            if wrong := [name for name, value in texts.items() if type(value) is not str]:
                raise TdcError(f"found {wrong[0]}={texts[wrong[0]]!r}; expected text")
            return TuningRecord(
                TuningKey(shape_from_dict(data["shape"]), texts["device"], texts["arch"], texts["kernels"]),
                KernelConfig(texts["strategy"], tuple(config.items())),
                tuple(data.get("samples_us", ())),
                data.get("error", ""),
                data["predicted_us"],
                texts["tuner"],
                versions,
                texts["date"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TdcError(f"expected a record that 'tdc tune' wrote; {type(error).__name__}: {error}") from None

    @property
    def line(self) -> str:
        """The record as the database holds it; equal records have equal lines."""
        return json.dumps(self.to_dict(), separators=(",", ":"))


def shape_to_dict(shape: ConvShape) -> dict[str, Any]:
    """All of a shape as plain data."""
    return {"kind": "tucker" if isinstance(shape, TuckerConvShape) else "conv", **asdict(shape)}


def shape_from_dict(data: Mapping[str, Any]) -> ConvShape:
    """Read what `shape_to_dict` gave, or JSON made of it.

    Raises
    ------
    TdcError
        If it is no shape.
    """
    values = dict(data)
    kind = values.pop("kind", None)
    try:
        if kind == "tucker":
            return TuckerConvShape(**{**values, "dense": shape_from_dict({**values["dense"], "kind": "conv"})})
        if kind == "conv":
            tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, (list, tuple))}
            return Conv2dShape(**{**values, **tuples})
    except (KeyError, TypeError) as error:
        raise TdcError(f"found no convolution in {dict(data)!r}: {error}") from None
    raise TdcError(f"found a shape of kind {kind!r}; expected 'conv' or 'tucker'")


class TuningDatabase:
    """A file of records, read once and added to.

    Parameters
    ----------
    path : path
        The file (.jsonl); made by the first `append` if it is not there.
    must_exist : bool
        Whether it has to be there.

    Raises
    ------
    TdcError
        If it cannot be read, or holds anything but records; a line that was left unfinished is passed over with a
        warning.

    Examples
    --------
    >>> database = TuningDatabase("tuning.jsonl")                           # doctest: +SKIP
    >>> record = database.best(TuningKey.of(shape, device))                 # doctest: +SKIP
    >>> tdc_tvm.build("model.onnx", "cuda", tuning_db=database)             # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike, *, must_exist: bool = False) -> None:
        self.path = Path(path)
        self.records: list[TuningRecord] = []
        self._by_key: dict[TuningKey, dict[KernelConfig, TuningRecord]] = {}
        if self.path.suffix not in SUFFIXES:
            raise TdcError(f"the name of a tuning database ends in {' or '.join(SUFFIXES)}; found {str(path)!r}")
        if must_exist and not self.path.exists():
            raise TdcError(f"there is no tuning database {path}; make one with: tdc tune MODEL.onnx --database {path}")
        if self.path.exists():
            for record in _read(self.path):
                self._add(record)

    def append(self, *records: TuningRecord) -> None:
        """Add records to the file, behind what other processes have added, by one write that is flushed to disk.

        Raises
        ------
        TdcError
            If the file cannot be written, or the disk is full.
        """
        if not records:
            return
        if not self.path.exists():
            check_output(self.path, "a tuning database", SUFFIXES)
        data = "".join(f"{record.line}\n" for record in records).encode()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                size = os.fstat(descriptor).st_size
                # What another process left unfinished gets a line of its own.
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    data = b"\n" + data
                if os.write(descriptor, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            finally:
                # Which also gives the lock back.
                os.close(descriptor)
        except OSError as error:
            raise TdcError(
                f"cannot add to {self.path}: {error.strerror}; free some space, or name another file"
            ) from None
        for record in records:
            self._add(record)

    def merge(self, others: Iterable[TuningDatabase]) -> int:
        """Add the records of other databases that are not in this one; equal records are one.

        Different measurements of the same configuration are all kept, of which the latest counts; so the order of the
        databases makes no difference.

        Returns
        -------
        int
            How many were added.
        """
        known = {record.line for record in self.records}
        missing: dict[str, TuningRecord] = {}
        for other in others:
            missing |= {record.line: record for record in other.records if record.line not in known}
        self.append(*missing.values())
        return len(missing)

    def measured(self, key: TuningKey) -> dict[KernelConfig, TuningRecord]:
        """The record that counts of each configuration, failed ones included."""
        return dict(self._by_key.get(key, {}))

    def best(self, key: TuningKey) -> TuningRecord | None:
        """The fastest configuration; of equals the first in order.

        Times of different clocks do not compare: where some are of a CUDA graph, those over RPC do not count.
        """
        timed = [record for record in self._by_key.get(key, {}).values() if record.samples_us]
        return min(timed, key=lambda r: (r.versions.get("clock", ""), r.median_us, r.config), default=None)

    def _add(self, record: TuningRecord) -> None:
        self.records.append(record)
        known = self._by_key.setdefault(record.key, {})
        before = known.get(record.config)
        if before is None or (before.date, before.line) <= (record.date, record.line):
            known[record.config] = record


def _read(path: Path) -> list[TuningRecord]:
    try:
        with path.open("rb") as file:
            # Not in the midst of another process's write.
            fcntl.flock(file, fcntl.LOCK_SH)
            lines = file.read().split(b"\n")
    except OSError as error:
        raise TdcError(f"cannot read the tuning database {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            data = json.loads(line)
        except ValueError:
            # Unfinished ones begin like a record, or with zeros where the machine went down.
            if line[:1] not in (b"{", b"\0"):
                raise TdcError(
                    f"{path}, line {number}: found {line[:40]!r}; expected a record that 'tdc tune' wrote"
                ) from None
            warnings.warn(f"{path}, line {number} was left unfinished and is passed over", stacklevel=4)
            continue
        try:
            records.append(TuningRecord.from_dict(data))
        except TdcError as error:
            raise TdcError(f"{path}, line {number}: {error}") from None
    return records


class TunedChoices:
    """What a database says of a build's layers: the fastest configuration measured, for exactly that key.

    Parameters
    ----------
    database : TuningDatabase
        Measurements.
    device : DeviceSpec
        What kernels are built for.
    measured_on : str, optional
        The device that counts, if it is called otherwise.
    """

    def __init__(self, database: TuningDatabase, device: DeviceSpec, measured_on: str | None = None) -> None:
        self.database, self.device = database, device
        self.measured_on = measured_on or device.name
        self.decided: set[ConvShape] = set()
        self.asked: set[ConvShape] = set()

    def __call__(self, shape: ConvShape) -> tuple[KernelConfig, float] | None:
        """The configuration and its median in microseconds; None if nothing was measured."""
        self.asked.add(shape)
        key = TuningKey(shape, self.measured_on, self.device.arch, source_digest())
        record = self.database.best(key)
        if record is None:
            return None
        if reason := backend(self.device).reject_reason(shape, record.config, self.device):
            raise TdcError(
                f"{self.database.path}: {record.config.strategy} {record.config} for {shape} {reason}; "
                "the record was changed: take it out, and tune again"
            )
        self.decided.add(shape)
        return record.config, record.median_us

    def notes(self) -> tuple[str, ...]:
        """What was left out, and why: records of these layers that are of another device, target or kernels."""
        kernels = source_digest()
        left_out: Counter[str] = Counter()
        for record in self.database.records:
            key = record.key
            if key.shape not in self.asked:
                continue
            if key.device != self.measured_on:
                left_out[f"of {key.device}, not {self.measured_on}"] += 1
            elif key.arch != self.device.arch:
                left_out[f"for {key.arch}, not {self.device.arch}"] += 1
            elif key.kernels != kernels:
                left_out[f"of kernel version {key.kernels}, not {kernels}"] += 1
        return tuple(
            f"tuning database {self.database.path}: {count} record{'' if count == 1 else 's'} of these layers "
            f"{'is' if count == 1 else 'are'} {what}, and left out"
            for what, count in left_out.items()
        )


def open_database(database: str | os.PathLike | TuningDatabase) -> TuningDatabase:
    """A database, or the one that a path names and that must be there."""
    if isinstance(database, TuningDatabase):
        return database
    if not isinstance(database, (str, os.PathLike)):
        raise TdcError(f"found the tuning database {database!r}; expected a path or a TuningDatabase")
    return TuningDatabase(database, must_exist=True)


def same_device(records: Sequence[TuningRecord], key: TuningKey) -> list[TuningRecord]:
    """Records of other layers that are like those of ``key`` in all else."""
    return [
        record
        for record in records
        if record.key.shape != key.shape
        and (record.key.device, record.key.arch, record.key.kernels) == (key.device, key.arch, key.kernels)
    ]
