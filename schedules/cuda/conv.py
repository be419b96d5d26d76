"""Convolutions on NVIDIA GPUs, NHWC: strategies, the model that chooses among them, and kernels.

| strategy | kernels | for |
|---|---|---|
| ``tile`` | a Tucker convolution as one, each tile by one block | many pixels |
| ``cluster`` | the same, each tile by a cluster of blocks (from sm_90 on) | few pixels, many channels |
| ``two`` | cut before or after the core | |
| ``three`` | one for each stage | what else does not fit |
| ``dense`` | the dense convolution that a Tucker convolution stands for | what gains nothing from fewer products |
| ``conv`` | a dense convolution | |
| ``direct`` | a grouped or depthwise one | |
"""

from __future__ import annotations

import functools
import itertools
from typing import NoReturn

import numpy as np

from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.cuda import chain_conv, direct, model
from tdc_tvm.schedules.cuda.chain_conv import FIELDS, between_width, parts_of
from tdc_tvm.schedules.cuda.plan import MAX_PIXELS
from tdc_tvm.schedules.cuda.space import splits, tiles, tiles_of_eights
from tdc_tvm.schedules.cuda.work import UNITS
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import (
    ConvWeights,
    Estimate,
    Kernel,
    KernelConfig,
    Prologue,
    Tensors,
    check_prologue,
    check_weights,
)
from tdc_tvm.schedules.shape import (
    MAX_ELEMENTS,
    Conv2dShape,
    ConvShape,
    Epilogue,
    TuckerConvShape,
    oversize_reason,
    stages_of,
)

STRATEGIES = ("tile", "cluster", "two", "three", "dense", "conv")
# Pixels of a tile, at least, and at most where warps multiply by themselves.
_LEAST, _MOST = 8, 128
# Warps of a crew, and crews, by what multiplies: on tensor cores several blocks on a processor do as well.
_WARPS = {"fma": ((4, 1), (8, 1), (16, 1)), "mma": ((4, 1), (8, 1), (16, 1)), "wgmma": ((4, 1), (8, 1))}
_FMA_CREWS = {1: ((8, 1), (4, 2), (4, 3)), 4: ((8, 1), (16, 1), (4, 2), (4, 3))}
# Ways of one kernel that are tried in strategies of several: the best, by the model.
_BEST_PARTS = 3
_CUTS = ((1,), (2,), (1, 2))


def candidates(shape: ConvShape, device: DeviceSpec) -> list[KernelConfig]:
    """Every configuration that the model chooses from.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        The convolution.
    device : DeviceSpec
        The GPU.

    Returns
    -------
    list[KernelConfig]
        None of them is rejected.

    Raises
    ------
    TdcError
        If none can run: the GPU does not have the precision, or 32-bit indices do not reach all of a tensor.
    """
    _check(shape, device)
    if isinstance(shape, Conv2dShape) and shape.groups > 1:
        return direct.candidates(shape, device)
    return [config for config, _ in _estimates(shape, device)] or _refuse(shape, device)


def _check(shape: ConvShape, device: DeviceSpec) -> None:
    if not isinstance(shape, ConvShape) or not isinstance(device, DeviceSpec):
        found = f"{type(shape).__name__} and {type(device).__name__}"
        raise TdcError(f"found {found}; expected a Conv2dShape or TuckerConvShape and a DeviceSpec")
    reason = _shape_reason(shape, device)
    if reason:
        raise TdcError(f"no CUDA schedule for {shape}: {reason}")


def _refuse(shape: ConvShape, device: DeviceSpec) -> NoReturn:
    smem_bytes = device.smem_per_block_optin_bytes
    raise TdcError(
        f"no CUDA schedule for {shape} fits: {device.name} has {smem_bytes} bytes of shared memory for a block, and"
        f" 32-bit indices reach {MAX_ELEMENTS:,} elements of packed weights; use fewer channels"
    )


def _shape_reason(shape: ConvShape, device: DeviceSpec) -> str:
    """Why no configuration can compute a shape on a device, with numbers; empty if some can."""
    if device.kind != "cuda":
        return f"a CUDA schedule on a device of kind {device.kind!r}"
    stages = stages_of(shape)
    is_grouped, precision = stages[0].groups > 1, stages[0].precision
    known = ["fp32", *(() if is_grouped else device.tensor_flops_per_s)]
    if precision not in known:
        what = "grouped convolutions" if is_grouped else "convolutions"
        return f"needs {precision}; {device.name} ({device.arch}) computes {what} in {' or '.join(known)} only"
    return oversize_reason(stages)


def _estimates(shape: ConvShape, device: DeviceSpec, only_best: bool = False) -> list[tuple[KernelConfig, float]]:
    """Configurations that run, all or the best of one kernel, and their predicted latencies in microseconds."""
    found = []

    def add(stages: tuple[Conv2dShape, ...], one_block: str, several: str) -> None:
        ways, latencies_us = _space(stages, device)
        least = latencies_us.min(initial=np.inf)
        for i in np.flatnonzero(latencies_us == least) if only_best else range(len(ways)):
            strategy = one_block if ways[i][2] == 1 else several
            found.append((KernelConfig(strategy, tuple(zip(FIELDS, ways[i].tolist(), strict=True))), latencies_us[i]))

    if isinstance(shape, Conv2dShape):
        add((shape,), "conv", "conv")
        return found
    stages = shape.stages
    add(stages, "tile", "cluster")
    for cuts in _CUTS:
        spaces = []
        for begin, end in itertools.pairwise((0, *cuts, 3)):
            in_width = between_width(stages[begin].in_channels, stages[0]) if begin else None
            out_width = between_width(stages[end - 1].out_channels, stages[0]) if end < 3 else None
            ways, latencies_us = _space(stages[begin:end], device, in_width, out_width)
            if only_best:
                order = np.flatnonzero(latencies_us == latencies_us.min(initial=np.inf))
            else:
                order = np.argsort(latencies_us, kind="stable")[:_BEST_PARTS]
            spaces.append([(ways[i].tolist(), latencies_us[i]) for i in order])
        for chosen in itertools.product(*spaces):
            named = tuple(
                (f"{field}{number or ''}", value)
                for number, (values, _) in enumerate(chosen)
                for field, value in zip(FIELDS, values, strict=True)
            )
            total_us = sum(latency_us for _, latency_us in chosen)
            if len(cuts) == 2:
                found.append((KernelConfig("three", named), total_us))
            else:
                found.append((KernelConfig("two", (*named, ("cut", cuts[0]))), total_us))
    if shape.is_mergeable and not oversize_reason((shape.dense,)):
        precision = shape.dense.precision
        rate = device.fp32_flops_per_s if precision == "fp32" else device.tensor_flops_per_s[precision]
        # Its products alone can take longer than all else.
        if not (only_best and 2e6 * shape.dense.macs / rate > min((us for _, us in found), default=np.inf)):
            add((shape.dense,), "dense", "dense")
    return found


@functools.lru_cache(maxsize=1024)
def _space(
    stages: tuple[Conv2dShape, ...], device: DeviceSpec, in_width: int | None = None, out_width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """All ways to compute some stages by one kernel: values of `FIELDS`, and predictions.

    A width in memory is given where another kernel is before this one, or after it.
    """
    core = next((stage for stage in stages if not stage.is_pointwise), stages[0])
    ways, latencies_us = [], []
    for (precision, group), unit in UNITS.items():
        if precision != core.precision or (unit.warps > 1 and device.compute_capability != 90):
            continue
        if unit.halves and not chain_conv.make_part(stages, (1, 1, 1, 0, 4, 1, group), device).is_memory_bound:
            continue
        # Maxima of 2x2 are of one tile.
        step = 2 if stages[-1].pool else 1
        shapes = tiles(core, _LEAST, _MOST, step) if unit.warps == 1 else tiles_of_eights(core, MAX_PIXELS, step)
        if not shapes:
            continue
        sharing: np.ndarray = np.array(splits(stages, core))
        has_crews = unit.name == "fma" and device.compute_capability >= 90
        warps = np.array(_FMA_CREWS[group] if has_crews else _WARPS[unit.name])
        tile, share, block = np.indices((len(shapes), len(sharing), len(warps))).reshape(3, -1)
        grid = np.stack([*np.array(shapes)[tile].T, *sharing[share].T, *warps[block].T, np.full(len(tile), group)])
        part = chain_conv.make_part(stages, (*grid[:-1], group), device, in_width, out_width)
        fits = np.broadcast_to(part.fits, grid.shape[1])
        latencies_us.append(np.broadcast_to(model.latency_us(part, in_width is out_width is None), grid.shape[1])[fits])
        ways.append(grid.T[fits])
    return np.concatenate(ways), np.concatenate(latencies_us)


def reject_reason(shape: ConvShape, config: KernelConfig, device: DeviceSpec) -> str:
    """Why a configuration cannot run on a device, with numbers; empty if it can."""
    reason = _shape_reason(shape, device)
    if reason:
        return reason
    if isinstance(shape, Conv2dShape):
        expected: tuple[str, ...] = ("direct",) if shape.groups > 1 else ("conv",)
    else:
        expected = STRATEGIES[:-1]
    if config.strategy not in expected:
        return f"strategy {config.strategy!r} is not for {shape}; expected {' or '.join(map(repr, expected))}"
    if config.strategy == "dense" and isinstance(shape, TuckerConvShape) and not shape.is_mergeable:
        return "is not one dense convolution: the bias of the first stage does not reach the core's padding"
    if config.strategy == "direct":
        assert isinstance(shape, Conv2dShape)
        return direct.reject_reason(shape, config, device)
    reason = config.reject_reason(chain_conv.allowed(shape, config.strategy))
    reason = reason or oversize_reason(chain_conv.stages_of(shape, config.strategy))
    return reason or next((fault for part in parts_of(shape, config, device) if (fault := part.reject_reason())), "")


def estimate(shape: ConvShape, config: KernelConfig, device: DeviceSpec) -> Estimate:
    """Predict the latency of a configuration.

    Raises
    ------
    TdcError
        If the configuration cannot run on the device.
    """
    reason = reject_reason(shape, config, device)
    if reason:
        raise TdcError(f"cannot estimate {config.strategy} {config} for {shape}: {reason}")
    return _estimate(shape, config, device)


def _estimate(shape: ConvShape, config: KernelConfig, device: DeviceSpec) -> Estimate:
    if config.strategy == "direct":
        assert isinstance(shape, Conv2dShape)
        return direct.estimate(shape, config, device)
    return model.estimate(parts_of(shape, config, device))


def choose(shape: ConvShape, device: DeviceSpec) -> tuple[KernelConfig, Estimate]:
    """The configuration with the lowest predicted latency; of equals the first in order.

    Raises
    ------
    TdcError
        If no configuration can run; see `candidates`.
    """
    _check(shape, device)
    if isinstance(shape, Conv2dShape) and shape.groups > 1:
        options = [(c, direct.estimate(shape, c, device).latency_us) for c in direct.candidates(shape, device)]
    else:
        options = _estimates(shape, device, only_best=True)
    if not options:
        _refuse(shape, device)
    config, _ = min(options, key=lambda pair: (pair[1], pair[0]))
    # None of the options is rejected.
    return config, _estimate(shape, config, device)


def make_kernel(
    shape: ConvShape,
    epilogue: Epilogue,
    weights: tuple[ConvWeights, ...],
    config: KernelConfig,
    device: DeviceSpec,
    name: str,
    prologue: Prologue | None = None,
    tensors: Tensors | None = None,
) -> Kernel:
    """Build a kernel and pack its weights.

    Parameters
    ----------
    shape : Conv2dShape or TuckerConvShape
        The convolution.
    epilogue : Epilogue
        What follows it.
    weights : tuple[ConvWeights, ...]
        One stage, or the three of a Tucker convolution; each can have a bias.
    config : KernelConfig
        How to compute it.
    device : DeviceSpec
        The GPU to compile for.
    name : str
        What the kernel's block is called.
    prologue : Prologue, optional
        What comes before it.
    tensors : Tensors, optional
        What the kernel reads and writes, if not just the input and the output.

    Returns
    -------
    Kernel
        Its function has no ``global_symbol``.

    Raises
    ------
    TdcError
        If the configuration cannot run on the device, or the weights or the prologue do not fit the shape.
    """
    reason = reject_reason(shape, config, device)
    if reason:
        raise TdcError(f"cannot run {config} for {shape}: {reason}")
    check_weights(shape, weights)
    check_prologue(shape, prologue)
    if config.strategy == "direct":
        assert isinstance(shape, Conv2dShape)
        return direct.make_kernel(shape, epilogue, weights, config, name)
    return chain_conv.make_kernel(shape, epilogue, weights, config, device, name, prologue, tensors or Tensors())
