"""What a compiled network launches and keeps in memory, and a time that it cannot be faster than."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.target import Target

from tdc_tvm.cuda_graph import with_storage
from tdc_tvm.onnx_decompose import tucker_layer_names
from tdc_tvm.onnx_model import layer_names, load_onnx
from tdc_tvm.onnx_rewrite import simplify
from tdc_tvm.quiet import without_chatter
from tdc_tvm.relay_passes.fuse_pool2d import pool_shape
from tdc_tvm.relay_passes.graph import Graph
from tdc_tvm.relay_passes.import_onnx import import_onnx
from tdc_tvm.relay_passes.layers import LayerReport, layers_of
from tdc_tvm.relay_passes.lower_conv import ConvOp, LowerConv, read_conv
from tdc_tvm.relay_passes.outline import KIND_ATTR, POOL2D
from tdc_tvm.relay_passes.pipeline import graph_passes, lowering_passes
from tdc_tvm.schedules.cuda import chain_conv
from tdc_tvm.schedules.cuda.pool import Pool2dShape
from tdc_tvm.schedules.cuda.work import UNITS
from tdc_tvm.schedules.device import DeviceSpec
from tdc_tvm.schedules.kernel import KernelConfig
from tdc_tvm.schedules.shape import DTYPES

_ALLOC_STORAGE = tvm.ir.Op.get("relax.vm.alloc_storage")


@dataclass(frozen=True)
class Launch:
    """A kernel that a network launches.

    Parameters
    ----------
    name : str
        Of its layer or function.
    moved_bytes : int
        What it must read and write, each once.
    macs : int
        Its multiply-adds.
    precision : str
        They are computed in.
    is_early : bool
        Whether it is launched before the kernel before it has ended.
    """

    name: str
    moved_bytes: int
    macs: int = 0
    precision: str = "fp32"
    is_early: bool = False


def floor(launches: Sequence[Launch], device: DeviceSpec, footprint_bytes: int) -> list[dict[str, Any]]:
    """The least time of each kernel of a network: its launch, its transfers or its products, the longest of them.

    The device's numbers are those of its probe: launches inside a CUDA graph (early ones are cheaper), bandwidths as
    read, and multiply-adds on CUDA cores for FP32, by ``mma.sync`` else.  All transfers are from the L2 cache where it
    has room for the whole network, and from memory otherwise.  Nothing is counted twice: not the halos of tiles, the
    weights that several blocks read, or the padding of packed ones; biases and means are not counted at all.

    Parameters
    ----------
    launches : sequence of Launch
        In order.
    device : DeviceSpec
        A GPU.
    footprint_bytes : int
        Weights and everything between the kernels.

    Returns
    -------
    list of dict
        For each kernel ``name``, ``launch_us``, ``memory_us``, ``compute_us`` and their maximum, ``floor_us``; the
        network's is the sum of those.
    """
    probe = device.probe
    assert probe is not None
    bandwidth = probe.l2_bytes_per_s if footprint_bytes <= device.l2_bytes else probe.dram_bytes_per_s
    floors = []
    for launch in launches:
        is_fma = launch.precision == "fp32"
        flops_per_s = probe.fma_flops_per_s if is_fma else probe.mma_flops_per_s[launch.precision]
        parts = {
            "launch_us": probe.dependent_launch_us if launch.is_early else probe.launch_us,
            "memory_us": 1e6 * launch.moved_bytes / bandwidth,
            "compute_us": 2e6 * launch.macs / flops_per_s,
        }
        parts["floor_us"] = max(parts.values())
        floors.append({"name": launch.name} | {name: round(value, 4) for name, value in parts.items()})
    return floors


def memory_bytes(main: relax.Function) -> int:
    """Weights, planned storages and outputs of a lowered function; its inputs are the caller's."""
    constants, storages = set(), []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst) and isinstance(expr.ty, relax.TensorType):
            constants.add(expr)
        elif isinstance(expr, relax.Call) and expr.op == _ALLOC_STORAGE:
            storages.append(math.prod(int(extent) for extent in expr.args[0].values))

    relax.analysis.post_order_visit(main, visit)
    return sum(_tensor_bytes(constant) for constant in constants) + sum(storages)


def analyse(model: Path, target: Target, precision: str) -> tuple[list[Launch], int]:
    """What `tdc_tvm.build` makes of a model for a GPU, by the same passes: its kernels, and its memory in bytes."""
    proto = load_onnx(model)
    simplify(proto)
    device = DeviceSpec.from_target(target)
    operators: list[ConvOp | Pool2dShape] = []
    with without_chatter(), target, tvm.transform.PassContext(opt_level=3):
        mod = import_onnx(proto, layer_names(proto))
        for step in graph_passes(device, precision, tucker_layer_names(proto)):
            if isinstance(step, LowerConv):
                operators = _operators(mod, precision)
            mod = step(mod)
        layers = layers_of(mod)
        mod = tvm.transform.Sequential(lowering_passes(target))(mod)
    return list(_launches(mod, operators, layers)), memory_bytes(mod[with_storage("main")])


def _calls(mod: tvm.IRModule, name: str) -> Iterator[tuple[relax.Call, Any]]:
    """The calls of a module's functions in one of them, and what they call."""
    for block in mod[name].body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.Call) and isinstance(binding.value.op, tvm.ir.GlobalVar):
                yield binding.value, mod[binding.value.op]


def _operators(mod: tvm.IRModule, precision: str) -> list[ConvOp | Pool2dShape]:
    """What kernels of ours will compute, in order."""
    found: list[ConvOp | Pool2dShape] = []
    for _, function in _calls(mod, "main"):
        kind = (function.attrs or {}).get(KIND_ATTR)
        if kind == POOL2D:
            pool = pool_shape(list(Graph.of(function).values.values())[-1])
            assert pool is not None
            if not pool.is_identity:
                found.append(replace(pool, dtype=DTYPES[precision]))
        elif kind is not None:
            op = read_conv(function)
            is_grouped = getattr(op.shape, "groups", 1) > 1
            found.append(op if is_grouped else replace(op, shape=op.shape.with_precision(precision)))
    return found


def _launches(
    mod: tvm.IRModule, operators: Sequence[ConvOp | Pool2dShape], layers: Sequence[LayerReport]
) -> Iterator[Launch]:
    ours, reports = iter(operators), iter(layers)
    for call, function in _calls(mod, with_storage("main")):
        is_early = "tirx.kernel_launch_params" in function.attrs
        if function.attrs.get("tdc.config") in (None, "fold"):
            sizes = [_tensor_bytes(arg) for arg in call.args]
            # A strip is written to a tensor that has room for more.
            is_strip = "copy_strip" in call.op.name_hint
            yield Launch(call.op.name_hint, 2 * sizes[0] if is_strip else sum(sizes), is_early=is_early)
            continue
        op = next(ours)
        if isinstance(op, Pool2dShape):
            yield Launch(call.op.name_hint, pool_bytes(op), is_early=is_early)
            continue
        report = next(reports)
        parameters = tuple((key, int(value)) for key, value in (part.split("=") for part in report.config.split()))
        yield from conv_launches(op, KernelConfig(report.strategy, parameters), is_early)
    left = [*ours, *reports]
    assert not left, f"no kernel for {left}"


def conv_launches(op: ConvOp, config: KernelConfig, is_early: bool) -> Iterator[Launch]:
    """The kernels of a convolution; what lies between them is written and read."""
    stages = chain_conv.stages_of(op.shape, config.strategy)
    bounds = (0, *chain_conv.cuts_of(config), len(stages))
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        first, last = stages[begin], stages[end - 1]
        # A stride can be longer than the window.
        rows = min(first.height, first.out_height * first.kernel[0])
        columns = min(first.width, first.out_width * first.kernel[1])
        outputs = math.prod(last.stored_extents)
        if op.epilogue.residual and end == len(stages):
            outputs += last.out_pixels * last.out_channels
        elements = first.batch * rows * columns * first.in_channels + outputs
        # Grouped convolutions have no groups of warps.
        group = dict(config.parameters).get(f"group{number or ''}", 1)
        weight_dtype = UNITS[first.precision, group].weight_dtype
        weights = sum(stage.weight_count for stage in stages[begin:end])
        yield Launch(
            f"{op.name}_{number}" if len(bounds) > 2 else op.name,
            elements * tvm.DataType(first.dtype).itemsize + weights * tvm.DataType(weight_dtype).itemsize,
            sum(stage.macs for stage in stages[begin:end]),
            first.precision,
            is_early,
        )


def pool_bytes(shape: Pool2dShape) -> int:
    """What a pooling layer reads and writes."""
    pixels = shape.height * shape.width + shape.out_height * shape.out_width
    return shape.batch * shape.channels * pixels * tvm.DataType(shape.dtype).itemsize


def _tensor_bytes(value: relax.Expr) -> int:
    return math.prod(int(extent) for extent in value.ty.shape) * tvm.DataType(str(value.ty.dtype)).itemsize
