"""Tuning: a search over a convolution's configurations, whose measurements go into a database one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm

import tdc_tvm
from tdc_tvm.cuda_toolchain import cuda_version
from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.digest import source_digest
from tdc_tvm.schedules.shape import Conv2dShape, ConvShape, TuckerConvShape
from tdc_tvm.search import BATCH, STRATEGIES, Measurement, Measurer, Search, Space, XgboostSearch, run_search
from tdc_tvm.targets import local_gpu, local_name, resolve_target
from tdc_tvm.tuning_db import TuningDatabase, TuningKey, TuningRecord, same_device


@dataclass(frozen=True)
class Machine:
    """What is tuned on: what kernels are built for, and what measurements of them are good for.

    Parameters
    ----------
    target : str
        ``"sm_90a"`` and the like, ``"llvm"``, or another machine's as TVM's JSON.
    device : DeviceSpec
        What the kernels are built for, as `tdc_tvm.build` does.
    name : str
        What its measurements count for.
    versions : dict
        What a record says was measured with.
    """

    target: str
    device: DeviceSpec
    name: str
    versions: dict[str, str]

    @staticmethod
    def here(target: str = "cuda") -> Machine:
        """The GPU (``"cuda"``) or CPU (``"llvm"``) of the machine that runs this.

        Raises
        ------
        TdcError
            If there is no GPU, or the target is another.
        """
        if target not in ("cuda", "llvm"):
            raise TdcError(
                f"tuning measures on this machine; found the target {target!r}, expected 'cuda', its GPU, or 'llvm',"
                " its CPU; --tracker measures on others"
            )
        versions = {"tdc_tvm": tdc_tvm.__version__, "tvm": tvm.__version__}
        if target == "llvm":
            device = DeviceSpec.from_target(resolve_target(target))
            return Machine(target, device, device.name, versions)
        gpu = local_gpu()
        if gpu is None:
            raise TdcError(
                "tuning measures kernels, and there is no NVIDIA GPU on this machine that TVM can use; tune where there"
                " is one and bring the database here, or tune for the CPU with --target llvm"
            )
        resolved = resolve_target(target)
        versions |= {"cuda": cuda_version(), "gpu": str(gpu.device_name)}
        device = DeviceSpec.from_target(resolved)
        return Machine(str(resolved.attrs["arch"]), device, local_name(target) or device.name, versions)

    def key(self, shape: ConvShape) -> TuningKey:
        """Of what is measured here."""
        return TuningKey(shape, self.name, self.device.arch, source_digest())


@dataclass(frozen=True)
class Tuned:
    """What came of tuning a shape.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        The convolution.
    candidates, trials, failed : int
        How many configurations there are, were measured, and failed.
    pick_us : float or None
        Measured of the model's pick; None if it was not measured, or failed.
    best : TuningRecord or None
        The fastest; None if all failed.
    """

    shape: ConvShape
    candidates: int
    trials: int
    failed: int
    pick_us: float | None
    best: TuningRecord | None


def tune_shape(
    shape: ConvShape,
    machine: Machine,
    measurer: Measurer,
    database: TuningDatabase,
    *,
    strategy: str = "xgboost",
    trials: int = 64,
    seed: int = 0,
    resume: bool = False,
    batch: int = BATCH,
    observe: Callable[[TuningRecord], object] = lambda record: None,
) -> Tuned:
    """Search for the fastest configuration of a convolution; each measurement is in the database before the next.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        The convolution.
    machine : Machine
        What is measured on.
    measurer : Measurer
        What measures.
    database : TuningDatabase
        What is added to; XGBoost learns from its other layers, too.
    strategy : str
        One of `tdc_tvm.search.STRATEGIES`.
    trials : int
        Configurations to measure, at most.
    seed : int
        Of the search.
    resume : bool
        Whether what the database has of this key counts as measured already.
    batch : int
        Configurations that are given to the measurer at a time, at most.
    observe : callable
        Given each new record.

    Raises
    ------
    TdcError
        If there is no such strategy, no configuration can run, or the database cannot be written.
    """
    if strategy not in STRATEGIES:
        raise TdcError(f"no search strategy {strategy!r}; use one of {', '.join(STRATEGIES)}")
    space, key = Space.of(shape, machine.device), machine.key(shape)
    search = _search(strategy, space, seed, key, machine.device, database)
    known = database.measured(key) if resume else {}
    search.observe(Measurement(record.config, record.samples_us, record.error) for record in known.values())
    records = {config: record for config, record in known.items() if config in space.numbers}
    predicted = dict(zip(space.configs, space.predicted_us.tolist(), strict=True))
    for result in run_search(search, measurer, trials, batch):
        record = TuningRecord(
            key,
            result.config,
            result.samples_us,
            result.error,
            round(predicted[result.config], 4),
            f"{strategy}, seed {seed}",
            machine.versions,
        )
        database.append(record)
        records[result.config] = record
        observe(record)
    timed = [record for record in records.values() if record.samples_us]
    pick = records.get(space.configs[space.order[0]])
    return Tuned(
        shape,
        len(space.configs),
        len(records),
        len(records) - len(timed),
        pick.median_us if pick is not None and pick.samples_us else None,
        min(timed, key=lambda record: (record.median_us, record.config), default=None),
    )


def _search(
    strategy: str, space: Space, seed: int, key: TuningKey, device: DeviceSpec, database: TuningDatabase
) -> Search:
    if strategy != "xgboost":
        return STRATEGIES[strategy](space, seed)
    others = list(dict.fromkeys(record.key for record in same_device(database.records, key)))
    return XgboostSearch(space, seed, [_history(other, device, database) for other in others])


def _history(key: TuningKey, device: DeviceSpec, database: TuningDatabase) -> tuple[Space, dict[int, float]]:
    """What a database has of another layer."""
    records = database.measured(key)
    space = Space.of(key.shape, device, sorted(records))
    return space, {space.numbers[config]: record.median_us for config, record in records.items()}


# What `str` of a shape gives.
_SHAPE = re.compile(
    r"(?P<batch>\d+)x(?P<height>\d+)x(?P<width>\d+)x(?P<inputs>\d+) *-> *(?P<outputs>\d+)"
    r"(?:, *(?P<kernel_h>\d+)x(?P<kernel_w>\d+)(?:/(?P<stride_h>\d+)(?:x(?P<stride_w>\d+))?)?)?"
    r"(?: dilation (?P<dilation_h>\d+)x(?P<dilation_w>\d+))?"
    r"(?: padding (?P<padding>\d+(?:x\d+x\d+x\d+)?))?(?: groups (?P<groups>\d+))?"
    r"(?: (?P<precision>fp32|tf32|fp16|bf16))?(?P<prologue> with a prologue)?(?P<pool> \+ 2x2 max)?"
    r"(?: at ranks \((?P<rank_in>\d+), (?P<rank_out>\d+)\)(?P<bias> with a bias of the first stage)?)?"
)


def parse_shape(text: str, precision: str = "fp32", ranks: Sequence[int] | None = None) -> ConvShape:
    """The convolution that a report's text such as ``"1x56x56x64 -> 128, 3x3/2"`` stands for.

    Parameters
    ----------
    text : str
        What ``str`` of a shape gives: batch, height, width and channels of the input, channels of the output, the
        window (1x1 if there is none), its stride, and padding, by default half of the window.
    precision : str
        Arithmetic, where the text does not say.
    ranks : pair of int, optional
        ``(rank_out, rank_in)`` of a Tucker layer, where the text does not say.

    Raises
    ------
    TdcError
        If it is no such text, or there is no such convolution.
    """
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise TdcError(
            f"cannot read the layer {text!r}; expected BATCHxHEIGHTxWIDTHxCHANNELS -> CHANNELS, a window and a stride,"
            " as reports have it: '1x56x56x64 -> 128, 3x3/2'"
        )
    found = {name: int(value) for name, value in match.groupdict().items() if value and value.isdigit()}
    kernel = (found.get("kernel_h", 1), found.get("kernel_w", 1))
    stride = found.get("stride_h", 1)
    dilation = (found.get("dilation_h", 1), found.get("dilation_w", 1))
    top, left = (gap * (extent - 1) // 2 for gap, extent in zip(dilation, kernel, strict=True))
    bottom, right = top, left
    if match["padding"]:
        given = [int(extent) for extent in match["padding"].split("x")]
        top, left, bottom, right = given if len(given) == 4 else given * 4
    dense = Conv2dShape(
        found["batch"],
        found["height"],
        found["width"],
        found["inputs"],
        found["outputs"],
        kernel,
        (stride, found.get("stride_w", stride)),
        (top, left, bottom, right),
        dilation,
        found.get("groups", 1),
        match["precision"] or precision,
        match["prologue"] is not None,
        match["pool"] is not None,
    )
    if "rank_in" in found:
        return TuckerConvShape(dense, found["rank_in"], found["rank_out"], match["bias"] is not None)
    if ranks is None:
        return dense
    rank_out, rank_in = ranks
    return TuckerConvShape(dense, rank_in, rank_out)
