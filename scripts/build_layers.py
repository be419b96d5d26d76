"""Compile kernels for `gpu_layers` to run on a machine with a GPU; here none is needed.

A build is a folder: a manifest, libraries of 32 kernels each, and how their constants are packed.  It
holds no weights: both sides make them from a seed.
"""

from __future__ import annotations

import hashlib
import lzma
import multiprocessing
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_check import begin_build, end_build
from gpu_layers import CONSTANTS, flatten, weights_of

if TYPE_CHECKING:
    from tdc_tvm.schedules.device import DeviceSpec
    from tdc_tvm.schedules.kernel import ConvWeights, KernelConfig
    from tdc_tvm.schedules.shape import Conv2dShape, ConvShape

KERNELS_PER_LIBRARY = 32
# Small enough to be exact in every precision.
_DIGIT_BITS, _DIGITS = 8, 3


@dataclass(frozen=True)
class Candidate:
    """A kernel to compile: a layer of the manifest, its shape, and a configuration."""

    layer: str
    shape: ConvShape
    config: KernelConfig
    is_pick: bool


def describe(shape: ConvShape, groups: Sequence[str]) -> dict[str, Any]:
    """A layer as plain data, for a machine that has no compiler.

    A Tucker layer has a bias at its end and a ReLU, a plain convolution neither.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        Its padding must be the same on opposite sides, as PyTorch wants it.
    groups : sequence of str
        What the layer is listed under in reports.
    """
    is_tucker = hasattr(shape, "stages")
    dense = shape.dense if is_tucker else shape
    stages = shape.stages if is_tucker else (shape,)

    def stage_of(conv: Conv2dShape, bias: bool) -> dict[str, Any]:
        assert conv.padding[:2] == conv.padding[2:], f"{conv} has asymmetric padding"
        weight = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel)
        options = {"stride": conv.stride, "padding": conv.padding[:2], "dilation": conv.dilation, "groups": conv.groups}
        return {"weight": weight, "bias": bias, **options}

    return {
        "text": str(shape),
        "kind": "tucker" if is_tucker else "conv",
        "groups": list(groups),
        "seed": zlib.crc32(str(shape).encode()),
        "precision": dense.precision,
        "x": (dense.batch, dense.height, dense.width, dense.in_channels),
        "out": (dense.batch, dense.out_height, dense.out_width, dense.out_channels),
        "stages": [stage_of(stage, is_tucker and stage is stages[-1]) for stage in stages],
        "original": [stage_of(dense, is_tucker)],
        "relu": is_tucker,
        "macs": shape.macs,
        "depth": sum(stage.weight_count // stage.out_channels for stage in stages),
    }


def shape_of(layer: dict[str, Any]) -> ConvShape:
    """The shape that `describe` was given."""
    from tdc_tvm.schedules.shape import Conv2dShape, TuckerConvShape

    (original,) = layer["original"]
    dense = Conv2dShape(
        *layer["x"],
        original["weight"][0],
        tuple(original["weight"][2:]),
        tuple(original["stride"]),
        (*original["padding"], *original["padding"]),
        tuple(original["dilation"]),
        original["groups"],
        layer["precision"],
    )
    if layer["kind"] == "conv":
        return dense
    reduce, core, _ = (stage["weight"] for stage in layer["stages"])
    return TuckerConvShape(dense, reduce[0], core[0])


def find_packing(
    pack: Callable[[tuple[ConvWeights, ...]], Sequence[np.ndarray]],
    weights: Sequence[tuple[np.ndarray, np.ndarray | None]],
) -> list[np.ndarray]:
    """How a kernel packs its weights, found by packing the weights' own numbers.

    Parameters
    ----------
    pack : callable
        From a kernel's weights to its constants.
    weights : sequence of (kernel, bias)
        From `weights_of`.

    Returns
    -------
    list[numpy.ndarray]
        For each constant the positions of its elements in `flatten`, as integers; or its values,
        if it holds anything but weights and zeros.
    """
    from tdc_tvm.schedules.kernel import ConvWeights

    values = flatten(weights)

    def pack_values(source: np.ndarray) -> list[np.ndarray]:
        parts, at = [], 1
        for pair in weights:
            arrays = []
            for array in pair:
                size = 0 if array is None else array.size
                arrays.append(None if array is None else source[at : at + size].reshape(array.shape))
                at += size
            parts.append(ConvWeights(*arrays))
        return list(pack(tuple(parts)))

    numbers = np.arange(values.size)
    packed = pack_values(values)
    positions = [np.zeros(array.shape, np.int64) for array in packed]
    for shift in range(0, _DIGITS * _DIGIT_BITS, _DIGIT_BITS):
        digits = pack_values((numbers >> shift & (1 << _DIGIT_BITS) - 1).astype(np.float32))
        for position, digit in zip(positions, digits, strict=True):
            position += digit.astype(np.int64) << shift
    return [
        position.astype(np.int32)
        if np.array_equal(values.take(position, mode="clip").astype(array.dtype), array)
        else array
        for position, array in zip(positions, packed, strict=True)
    ]


def store_constant(constant: np.ndarray) -> np.ndarray:
    """Positions as differences, which repeat and so compress well; values as they are."""
    if constant.dtype.kind != "i":
        return constant
    return np.diff(constant.ravel(), prepend=np.int32(0)).reshape(constant.shape)


def build(
    folder: Path,
    layers: dict[str, dict[str, Any]],
    candidates: Sequence[Candidate],
    device: DeviceSpec,
    precision: str,
    jobs: int = 1,
) -> dict[str, Any]:
    """Compile the candidates and write the manifest.

    Parameters
    ----------
    folder : Path
        Where to; made if it is not there.
    layers : dict
        From `describe`, by key.
    candidates : sequence of Candidate
        What to compile.
    device : DeviceSpec
        The GPU to compile for.
    precision : str
        A key of `PRECISIONS`.
    jobs : int
        Processes to compile with.

    Returns
    -------
    dict
        The manifest.  A kernel that does not compile has an ``error`` and no library.
    """
    import tvm

    import tdc_tvm
    from tdc_tvm.schedules.digest import source_digest

    begin_build(folder)
    named = [(f"k{index}", layers[one.layer], one) for index, one in enumerate(candidates)]
    starts = range(0, len(named), KERNELS_PER_LIBRARY)
    tasks = [(folder, device, named[start : start + KERNELS_PER_LIBRARY]) for start in starts]
    records, constants = [], {}
    with _processes(jobs) as pool:
        # A pool that is interrupted while it begins cannot be shut down.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            results = pool.map(_compile, *zip(*tasks, strict=True))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, (more, arrays) in enumerate(results, 1):
            records += more
            constants |= arrays
            print(f"library {number} of {len(tasks)}", file=sys.stderr, flush=True)
    np.savez_compressed(folder / CONSTANTS, **constants)
    manifest = {
        "precision": precision,
        "device": asdict(device),
        "built_with": {
            "tdc_tvm": tdc_tvm.__version__,
            "tvm": tvm.__version__,
            "schedules_sha256": source_digest(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
        "layers": layers,
        "kernels": records,
    }
    end_build(folder, manifest)
    return manifest


@contextmanager
def _processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool that is killed if the body is interrupted: by itself it would go on with what it was given."""
    with tempfile.TemporaryDirectory() as temporary:
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin_process, (temporary,))
        try:
            yield pool
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_process(temporary: str) -> None:
    # Ctrl-C reaches all processes; in the midst of a compilation it would count as that kernel's failure.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Where the files of a process that is killed are removed by the one that killed it.
    tempfile.tempdir = temporary


def _compile(
    folder: Path, device: DeviceSpec, named: list[tuple[str, dict[str, Any], Candidate]]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Compile one library; if that fails, its halves, down to the kernels that are to blame."""
    try:
        return _compile_library(folder, device, named)
    except Exception as error:
        if len(named) == 1:
            name, _, candidate = named[0]
            failed = _record(name, candidate, device) | {"error": f"{type(error).__name__}: {error}"[:2000]}
            return [failed], {}
    records, constants = [], {}
    for half in (named[: len(named) // 2], named[len(named) // 2 :]):
        more, arrays = _compile(folder, device, half)
        records += more
        constants |= arrays
    return records, constants


def _compile_library(
    folder: Path, device: DeviceSpec, named: list[tuple[str, dict[str, Any], Candidate]]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    import tvm
    from tvm.target import Target

    from tdc_tvm.cuda_toolchain import cubin_kernels, cuda_compiler
    from tdc_tvm.schedules import backend
    from tdc_tvm.schedules.cuda.lowering import TIR_PIPELINE
    from tdc_tvm.schedules.kernel import Kernel
    from tdc_tvm.schedules.shape import Epilogue

    target = Target({"kind": "cuda", "arch": device.arch})
    library, functions, records, constants = f"from_{named[0][0]}.so.xz", {}, [], {}
    for name, layer, candidate in named:

        def make(weights: tuple[ConvWeights, ...], layer: dict = layer, candidate: Candidate = candidate) -> Kernel:
            epilogue = Epilogue(clip_min=0.0 if layer["relu"] else None)
            shape, config = candidate.shape, candidate.config
            if config.strategy == "dense":
                # Its weights are merged already.
                shape, config = shape.dense, replace(config, strategy="conv")
            return backend(device).make_kernel(shape, epilogue, weights, config, device, "conv")

        made: list[Kernel] = []

        def pack(weights: tuple[ConvWeights, ...], make=make, made: list[Kernel] = made) -> Sequence[np.ndarray]:
            made.append(make(weights))
            return made[-1].constants

        keys = []
        for constant in find_packing(pack, weights_of(layer, candidate.config.strategy)):
            keys.append(
                hashlib.sha256(repr((constant.shape, constant.dtype)).encode() + constant.tobytes()).hexdigest()
            )
            constants[keys[-1][:16]] = store_constant(constant)
        functions[name] = made[0].func.with_attr("global_symbol", name)
        entries = [
            {"key": key[:16], "dtype": str(array.dtype)} for key, array in zip(keys, made[0].constants, strict=True)
        ]
        places = {"library": library, "constants": entries, "between": made[0].between}
        records.append(_record(name, candidate, device) | places)
    with cuda_compiler(target):
        module = tvm.tirx.build(tvm.IRModule(functions), target=target, pipeline=TIR_PIPELINE)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "library.so")
        module.export_library(str(path))
        found = cubin_kernels(path)
        (folder / library).write_bytes(lzma.compress(path.read_bytes()))
    for record in records:
        cubins = [one for one in found if one.name.startswith(record["name"] + "_kernel")]
        record["registers"] = [one.registers for one in cubins]
        record["local_bytes"] = [one.local_bytes for one in cubins]
    return records, constants


def _record(name: str, candidate: Candidate, device: DeviceSpec) -> dict[str, Any]:
    from tdc_tvm.schedules import backend

    estimate = backend(device).estimate(candidate.shape, candidate.config, device)
    return {
        "name": name,
        "layer": candidate.layer,
        "strategy": candidate.config.strategy,
        "config": dict(candidate.config.parameters),
        "is_pick": candidate.is_pick,
        "predicted_us": estimate.latency_us,
        "predicted_parts_us": estimate.parts_us,
    }


def print_build(manifest: dict[str, Any]) -> int:
    """Say what was built and what was not; an exit status."""
    failed = [kernel for kernel in manifest["kernels"] if "error" in kernel]
    for kernel in failed:
        print(f"{manifest['layers'][kernel['layer']]['text']}: {kernel['config']}: {kernel['error'][:300]}")
    spilling = sum(any(kernel.get("local_bytes", ())) for kernel in manifest["kernels"])
    print(
        f"{len(manifest['layers'])} layers, {len(manifest['kernels'])} kernels, {len(failed)} failed, {spilling} spill"
    )
    return 1 if failed else 0
