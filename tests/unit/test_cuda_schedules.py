"""The CUDA schedules: choices, structure, what ptxas makes of them, and numbers (emulated on the CPU)."""

import importlib.util
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tvm
from cuda_emulator import Emulator, cuda_source, launches_of
from tvm.target import Target

from tdc_tvm.cuda_toolchain import cubin_kernels, cuda_compiler, find_cuda_compiler
from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.cuda import conv
from tdc_tvm.schedules.cuda.block import Buffers
from tdc_tvm.schedules.cuda.chain import Chain
from tdc_tvm.schedules.cuda.chain_conv import FIELDS, parts_of
from tdc_tvm.schedules.cuda.lowering import TIR_PIPELINE
from tdc_tvm.schedules.cuda.pack import round_to
from tdc_tvm.schedules.cuda.plan import SLOTS_IN_USE
from tdc_tvm.schedules.cuda.work import UNITS
from tdc_tvm.schedules.device import GPUS
from tdc_tvm.schedules.kernel import ConvWeights, KernelConfig, Prologue, Tensors
from tdc_tvm.schedules.shape import DTYPES, Conv2dShape, Epilogue, TuckerConvShape

_spec = importlib.util.spec_from_file_location("gpu_check", Path(__file__).parents[2] / "scripts" / "gpu_check.py")
gpu_check = sys.modules["gpu_check"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_check)

H100 = GPUS["H100"]
PLAIN = Epilogue()
SAME = (1, 1, 1, 1)
RESNET = [
    Conv2dShape(1, 224, 224, 3, 64, (7, 7), (2, 2), (3, 3, 3, 3)),
    Conv2dShape(1, 56, 56, 64, 64, (3, 3), padding=SAME),
    Conv2dShape(1, 7, 7, 512, 512, (3, 3), padding=SAME),
    TuckerConvShape(Conv2dShape(1, 56, 56, 64, 64, (3, 3), padding=SAME), 32, 32),
    TuckerConvShape(Conv2dShape(1, 28, 28, 128, 128, (3, 3), padding=SAME), 96, 64),
    TuckerConvShape(Conv2dShape(1, 7, 7, 512, 512, (3, 3), padding=SAME), 192, 160),
]
POOLED = [
    Conv2dShape(1, 56, 56, 64, 64, (3, 3), padding=SAME, pool=True),
    TuckerConvShape(Conv2dShape(1, 28, 28, 128, 128, (3, 3), padding=SAME, pool=True), 96, 64),
    TuckerConvShape(Conv2dShape(1, 14, 14, 512, 512, (3, 3), padding=SAME, pool=True), 192, 160),
]


def has_compiler() -> bool:
    try:
        find_cuda_compiler()
    except TdcError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs NVRTC (the extra [cuda]) or nvcc")


def weights_for(shape, bias=True):
    stages = getattr(shape, "stages", None) or (shape,)
    return tuple(
        ConvWeights(
            np.ones((s.out_channels, s.in_channels // s.groups, *s.kernel), np.float32),
            np.ones(s.out_channels, np.float32) if bias else None,
        )
        for s in stages
    )


def kernel_for(shape, config=None, epilogue=PLAIN, device=H100, bias=True):
    if isinstance(shape, TuckerConvShape):
        shape = replace(shape, reduce_bias=bias)
    config = config or conv.choose(shape, device)[0]
    return conv.make_kernel(shape, epilogue, weights_for(shape, bias), config, device, "conv")


def emulate(tmp_path, runs, edit=lambda source: source):
    """Run (case, config, device) triples; the errors and their limits."""
    functions, data = {}, {}
    for index, (case, config, device) in enumerate(runs):
        rng = np.random.default_rng(index)
        weights, (x, residual) = gpu_check.make_weights(case, rng), gpu_check.make_inputs(case, rng)
        kernel = conv.make_kernel(case.shape, case.epilogue, weights, config, device, "conv")
        functions[f"case{index}"] = kernel.func
        inputs = [x, *kernel.constants, *([] if residual is None else [residual])]
        between = [np.full(extents, np.nan, x.dtype) for extents in kernel.between]
        data[f"case{index}"] = inputs, between, gpu_check.reference(case, x, weights, residual), case, config
    emulator = Emulator(functions, tmp_path, edit)
    failures = []
    for name, (inputs, between, expected, case, config) in data.items():
        out = np.full(expected.shape, np.nan, inputs[0].dtype)
        emulator(name, [*inputs, out, *between])
        error = gpu_check.error_of(out, expected)
        if not error <= gpu_check.tolerance(case.precision, case.depth):
            failures.append(f"{name}: {error:.2e}; {case}; {config.strategy} {config}")
    return failures


def test_random_shapes_are_right_with_the_chosen_configuration(tmp_path):
    cases = gpu_check.random_cases(24, seed=1, largest=9)
    assert not emulate(tmp_path, [(case, conv.choose(case.shape, H100)[0], H100) for case in cases])


# What a kernel can do about its size, by name.
WAYS = {
    "ring": lambda part: any(part.placement.ring),
    "cluster": lambda part: bool(part.is_cluster),
    "rows kept": lambda part: part.rows_kept(part.core_index) > 1,
    "input ahead": lambda part: part.buffers > 1,
    "maxima": lambda part: part.pools,
}


def test_random_shapes_are_right_with_random_configurations(tmp_path):
    """On GPUs of few processors and little shared memory too, so that every way is gone."""
    rng = np.random.default_rng(2)
    runs, gone = [], set()

    def ways_of(config):
        if config.strategy == "direct":
            return set()
        parts = parts_of(case.shape, config, device)
        return {name for name, goes in WAYS.items() if any(map(goes, parts))}

    for number, case in enumerate(gpu_check.random_cases(40, seed=2, largest=16)):
        smem_bytes = int(rng.choice([64, 100, 227])) * 1024
        device = replace(H100, core_count=int(rng.choice([1, 8, 132])), smem_per_block_optin_bytes=smem_bytes)
        configs = conv.candidates(case.shape, device)
        configs = [configs[i] for i in rng.permutation(len(configs))[:60]]
        wanted = next((way for way in WAYS if way not in gone), list(WAYS)[number % len(WAYS)])
        config = next((config for config in configs if wanted in ways_of(config)), configs[0])
        gone |= ways_of(config)
        runs.append((case, config, device))
    assert gone == set(WAYS)
    assert not emulate(tmp_path, runs)


def test_padding_is_zero_after_the_first_bias(tmp_path):
    shape = TuckerConvShape(Conv2dShape(1, 3, 3, 4, 5, (3, 3), padding=(2, 1, 0, 2)), 6, 3)
    case = gpu_check.Case(shape, Epilogue(), (True, False, False))
    assert not emulate(tmp_path, [(case, config, H100) for config in conv.candidates(shape, H100)[:6]])


def config_of(strategy, *parts, **more):
    """A configuration from (tile_h, tile_w, split, warps[, group = 1[, deep = 0[, crews = 1]]]) of each kernel."""
    values = []
    for number, part in enumerate(parts):
        tile_h, tile_w, split, warps, group, deep, crews = (*part, *(1, 0, 1)[len(part) - 4 :])
        given = (tile_h, tile_w, split, deep, warps, crews, group)
        values += [(f"{field}{number or ''}", value) for field, value in zip(FIELDS, given, strict=True)]
    return KernelConfig(strategy, (*values, *more.items()))


@pytest.mark.parametrize("precision", DTYPES)
def test_every_strategy_is_right(tmp_path, precision):
    dense = Conv2dShape(2, 9, 8, 40, 24, (3, 3), (2, 1), SAME, precision=precision)
    shape, plain = TuckerConvShape(dense, 33, 17), (3, 4, 1, 4)
    configs = [
        config_of("tile", plain),
        config_of("cluster", (4, 8, 3, 2)),
        config_of("cluster", (2, 2, 8, 1)),
        config_of("two", plain, (2, 8, 2, 2), cut=1),
        config_of("two", (2, 4, 2, 8), plain, cut=2),
        config_of("three", (8, 8, 1, 2), plain, (5, 3, 2, 1)),
        config_of("three", (4, 4, 2, 2, 1, 1), (3, 4, 3, 4, 1, 1), (5, 3, 2, 1, 1, 1)),
    ]
    merged = gpu_check.Case(shape, Epilogue(True, 0.0), (False, True, True))
    case = gpu_check.Case(shape, Epilogue(True, 0.0), (True, True, True))
    conv_case = gpu_check.Case(dense, Epilogue(True, 0.0), (True,))
    runs = [(case, config, H100) for config in configs]
    runs.append((merged, config_of("dense", (3, 3, 2, 4)), H100))
    unpadded = TuckerConvShape(replace(dense, padding=(0, 0, 0, 0)), 33, 17)
    runs.append((gpu_check.Case(unpadded, Epilogue(), (True, True, False)), config_of("dense", (3, 3, 2, 4)), H100))
    runs.append((conv_case, config_of("conv", (3, 3, 2, 4)), H100))
    assert not emulate(tmp_path, [*runs, (conv_case, config_of("conv", (4, 3, 3, 4, 1, 1)), H100)])


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_four_warps_together_are_right(tmp_path, precision):
    """`wgmma`: several tiles of pixels and of channels, rings, clusters, more tiles than blocks."""
    small = replace(H100, core_count=2)
    tight = replace(H100, smem_per_block_optin_bytes=(92 if precision == "tf32" else 68) * 1024)
    roomier = replace(H100, smem_per_block_optin_bytes=120 * 1024)
    dense = Conv2dShape(2, 15, 19, 40, 72, (3, 3), padding=SAME, precision=precision)
    case = gpu_check.Case(TuckerConvShape(dense, 40, 24), Epilogue(True, 0.0), (True, True, True))
    deep = gpu_check.Case(TuckerConvShape(dense, 72, 24), Epilogue(), (True, False, True))
    merged = gpu_check.Case(TuckerConvShape(dense, 33, 17), Epilogue(), (False, True, False))
    dilated = Conv2dShape(1, 20, 17, 33, 50, (5, 3), padding=(3, 1, 2, 2), dilation=(2, 1), precision=precision)
    runs = [
        (case, config_of("tile", (8, 8, 1, 8, 4)), H100),
        (case, config_of("tile", (16, 8, 1, 4, 4)), small),
        (deep, config_of("tile", (7, 8, 1, 16, 4)), roomier),
        (case, config_of("cluster", (7, 8, 3, 4, 4)), small),
        (case, config_of("two", (7, 9, 2, 4, 4), (8, 8, 2, 8, 4), cut=1), H100),
        (case, config_of("two", (16, 8, 1, 16, 4), (3, 19, 1, 4), cut=2), small),
        (case, config_of("three", (3, 19, 1, 4, 4), (5, 8, 1, 8, 4), (16, 16, 3, 8, 4)), small),
        (merged, config_of("dense", (8, 8, 2, 16, 4)), tight),
        (gpu_check.Case(dilated, Epilogue(), (True,)), config_of("conv", (7, 8, 1, 8, 4)), tight),
        (gpu_check.Case(dilated, Epilogue(), (True,)), config_of("conv", (7, 8, 2, 8, 4, 1)), H100),
        (case, config_of("three", (3, 19, 2, 4, 4, 1), (5, 8, 2, 8, 4, 1), (16, 16, 3, 8, 4)), small),
    ]
    for stride in (2, 1), (1, 2), (3, 2):
        strided = replace(dense, stride=stride)
        tucker = TuckerConvShape(strided, 40, 24)
        runs.append((gpu_check.Case(tucker, Epilogue(), (True, True, False)), config_of("tile", (7, 8, 1, 8, 4)), H100))
        runs.append((gpu_check.Case(strided, Epilogue(), (False,)), config_of("conv", (4, 8, 2, 4, 4)), small))
    parts = [part for case, config, device in runs for part in parts_of(case.shape, config, device)]
    assert max(part.rounds for part in parts) > 1
    assert any(any(part.placement.ring) for part in parts)
    assert not emulate(tmp_path, runs)


def test_blocks_can_compute_several_tiles(tmp_path):
    """As on a GPU with few processors: some blocks have a tile more than others."""
    small = replace(H100, core_count=1)
    runs = []
    for precision in ("fp32", "fp16"):
        dense = Conv2dShape(5, 9, 8, 16, 24, (3, 3), padding=SAME, precision=precision)
        case = gpu_check.Case(TuckerConvShape(dense, 16, 16), Epilogue(True, 0.0), (True, True, True))
        runs.append((case, config_of("tile", (4, 4, 1, 4)), small))
        runs.append((case, config_of("cluster", (4, 4, 2, 4)), small))
        runs.append((gpu_check.Case(dense, Epilogue(), (False,)), config_of("conv", (4, 4, 1, 4)), small))
        tight = replace(small, smem_per_block_optin_bytes=(24 if precision == "fp16" else 36) * 1024)
        runs.append((case, config_of("tile", (4, 4, 1, 4)), tight))
        runs.append((gpu_check.Case(dense, Epilogue(), (True,)), config_of("conv", (4, 4, 1, 4)), tight))
    parts = [part for case, config, device in runs for part in parts_of(case.shape, config, device)]
    assert all(part.rounds > 1 for part in parts)
    assert any(part.tile_count % (part.blocks // part.split) for part in parts)
    assert {part.buffers for part in parts} == {1, 2}
    assert {part.fetches_ahead for part in parts} == {False, True}
    assert not emulate(tmp_path, runs)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_crews_have_tiles_of_their_own(tmp_path, precision):
    """Some without a tile in the end, with input fetched ahead into one place or two."""
    small = replace(H100, core_count=1)
    dense = Conv2dShape(3, 9, 17, 40, 24, (3, 3), padding=SAME, precision=precision)
    case = gpu_check.Case(TuckerConvShape(dense, 33, 17), Epilogue(True, 0.0), (True, True, True))
    conv_case = gpu_check.Case(dense, Epilogue(), (True,))
    runs = [
        (case, config_of("tile", (4, 4, 1, 2, 1, 0, 3)), small),
        (case, config_of("tile", (4, 4, 1, 4, 1, 0, 2)), replace(small, smem_per_block_optin_bytes=64 * 1024)),
        (case, config_of("two", (4, 4, 2, 2, 1, 0, 2), (3, 8, 1, 4, 1, 0, 3), cut=1), small),
        (conv_case, config_of("conv", (4, 4, 1, 4, 1, 0, 2)), small),
        (conv_case, config_of("conv", (4, 4, 1, 4, 1, 0, 4)), H100),
    ]
    if precision != "fp32":
        runs.append((case, config_of("tile", (8, 8, 1, 4, 4, 0, 2)), small))
        runs.append((conv_case, config_of("conv", (7, 8, 1, 4, 4, 0, 3)), small))
    parts = [part for case, config, device in runs for part in parts_of(case.shape, config, device)]
    assert all(part.fits for part in parts)
    assert {part.buffers for part in parts} == {1, 2}
    assert any(part.tile_count % part.tiles_at_once for part in parts)
    assert max(part.rounds for part in parts) > 1
    assert not emulate(tmp_path, runs)


@pytest.mark.parametrize("stride", [1, 2])
def test_eight_lanes_can_share_a_sum(tmp_path, stride):
    """Of tiles of all kinds: with columns and rows to divide among them, and with too few."""
    shape = TuckerConvShape(Conv2dShape(2, 9, 17, 40, 24, (3, 3), stride=(stride, 1), padding=SAME), 33, 17)
    case = gpu_check.Case(shape, Epilogue(True, 0.0), (True, True, True))
    conv_case = gpu_check.Case(replace(shape.dense, in_channels=3), Epilogue(), (True,))
    runs = [
        (one, config_of(strategy, *parts, **more), H100)
        for one, strategy, parts, more in (
            (case, "tile", [(4, 4, 1, 4, 4)], {}),
            (case, "tile", [(8, 8, 1, 2, 4, 0, 2)], {}),
            (case, "cluster", [(2, 8, 2, 4, 4)], {}),
            (case, "two", [(1, 2, 1, 8, 4), (2, 2, 2, 1, 4)], {"cut": 1}),
            (conv_case, "conv", [(1, 1, 3, 4, 4)], {}),
            (conv_case, "conv", [(16, 8, 1, 4, 4)], {}),
        )
    ]
    works = {
        (work.rows, work.columns)
        for case, config, device in runs
        for part in parts_of(case.shape, config, device)
        for work in part.works
    }
    assert len(works) > 4
    assert any(columns == 1 for _, columns in works)
    assert not emulate(tmp_path, runs)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_rows_of_the_window_are_kept(tmp_path, precision):
    runs, kept, smem_bytes = [], set(), (96 if precision == "fp16" else 128) * 1024
    for kernel, dilation, config in (
        ((3, 3), (1, 1), ("tile", (8, 8, 1, 4))),
        ((2, 3), (1, 2), ("tile", (4, 16, 1, 16))),
        ((5, 1), (1, 1), ("cluster", (8, 8, 2, 4))),
        ((3, 3), (1, 1), ("conv", (8, 8, 1, 8))),
    ):
        dense = Conv2dShape(1, 13, 15, 40, 24, kernel, (1, 1), SAME, dilation, precision=precision)
        shape = dense if config[0] == "conv" else TuckerConvShape(dense, 40, 60)
        case = gpu_check.Case(shape, Epilogue(), (True,) if shape is dense else (True, False, True))
        for device in (H100, replace(H100, smem_per_block_optin_bytes=smem_bytes)):
            runs.append((case, config_of(*config), device))
            (part,) = parts_of(shape, runs[-1][1], device)
            kept.add((part.rows_kept(part.core_index), part.placement.ring[part.core_index]))
    assert {rows for rows, _ in kept} == {2, 3, 5}
    assert any(ring for _, ring in kept)
    assert not emulate(tmp_path, runs)


@pytest.mark.parametrize("gpu", [H100, GPUS["A100"]], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_weights_go_through_a_ring(tmp_path, precision, gpu):
    """One tile or several, a block or a cluster, the depth whole or in parts; by bulk copies, or by all threads."""
    dense = Conv2dShape(1, 8, 8, 64, 96, (3, 3), padding=SAME, precision=precision)
    case = gpu_check.Case(TuckerConvShape(dense, 48, 96), Epilogue(True, 0.0), (True, True, True))
    runs = []
    for processors in (132, 1):
        smem_bytes = (76 if precision == "fp16" else 96) * 1024
        device = replace(gpu, core_count=processors, smem_per_block_optin_bytes=smem_bytes)
        for config in (
            config_of("tile", (2, 4, 1, 8)),
            config_of("tile", (2, 2, 1, 4)),
            config_of("cluster", (2, 4, 2, 3)),
            config_of("three", (4, 4, 1, 4), (2, 4, 1, 6), (4, 4, 1, 4)),
        ):
            if gpu is H100 or config.strategy != "cluster":
                runs.append((case, config, device))
    parts = [part for case, config, device in runs for part in parts_of(case.shape, config, device)]
    stages = [(part, i) for part in parts for i in range(len(part.stages)) if part.placement.ring[i]]
    assert {part.rounds > 1 for part, _ in stages} == {False, True}
    assert {part.works[i].splits > 1 for part, i in stages} == {False, True}
    assert {part.split > 1 for part, i in stages} == ({False, True} if gpu is H100 else {False})
    assert any(part.tiles_of_work(i)[0] * part.tiles_of_work(i)[1] < part.warps for part, i in stages)
    assert not emulate(tmp_path, runs)


@pytest.mark.parametrize("gpu", [H100, GPUS["A100"]], ids=lambda gpu: gpu.name)
def test_a_ring_has_room_for_chunks_of_the_next_tile(tmp_path, gpu):
    device = replace(gpu, core_count=2, smem_per_block_optin_bytes=64 * 1024)
    case = gpu_check.Case(
        TuckerConvShape(Conv2dShape(1, 12, 12, 32, 96, (3, 3), padding=SAME), 32, 32), PLAIN, (True,) * 3
    )
    config = config_of("tile", (2, 12, 1, 4))
    (part,) = parts_of(case.shape, config, device)
    (chunks,) = (part.chunks(i) for i in range(3) if part.placement.ring[i])
    assert chunks < part.placement.slots - SLOTS_IN_USE
    assert part.rounds > 1
    assert not emulate(tmp_path, [(case, config, device)])


@pytest.mark.parametrize(
    ("statement", "instead"),
    [
        (r"tdc_await\d\(\);", ";"),
        (r"__syncthreads\(\);", ";"),
        (r"tdc_mailbox_wait\(", "(void)("),
        (r"tdc_cluster_wait\(\);", ";"),
    ],
)
def test_the_emulator_sees_what_is_missing(tmp_path, statement, instead):
    """A test of the tests: each way to wait for others is left out of a cluster with a ring."""
    device = replace(H100, core_count=2, smem_per_block_optin_bytes=96 * 1024)
    dense = Conv2dShape(1, 8, 8, 64, 96, (3, 3), padding=SAME)
    case = gpu_check.Case(TuckerConvShape(dense, 48, 96), Epilogue(), (True, True, True))
    run = (case, config_of("cluster", (2, 4, 2, 3)), device)
    (part,) = parts_of(case.shape, run[1], device)
    assert any(part.placement.ring)
    assert part.rounds > 1

    left_out = []

    def edit(source):
        begin = source.index('extern "C" __global__')
        edited, count = re.subn(statement, instead, source[begin:])
        left_out.append(count)
        return source[:begin] + edited

    try:
        failures = emulate(tmp_path, [run], edit)
    except AssertionError as fault:
        failures = [str(fault)]
    assert left_out[0]
    assert failures


def test_weights_that_do_not_fit_into_shared_memory_are_read_from_global_memory(tmp_path):
    tight = replace(H100, smem_per_block_optin_bytes=16 * 1024)
    runs = []
    for precision in ("fp32", "fp16"):
        dense = Conv2dShape(1, 6, 6, 64, 64, (3, 3), padding=SAME, precision=precision)
        case = gpu_check.Case(TuckerConvShape(dense, 24, 24), Epilogue(), (True, True, True))
        runs.append((case, config_of("tile", (2, 3, 1, 4)), tight))
    parts = [part for case, config, device in runs for part in parts_of(case.shape, config, device)]
    assert all(not all(part.placement.resident) and not any(part.placement.ring) for part in parts)
    assert not emulate(tmp_path, runs)


def test_an_input_that_does_not_fit_into_shared_memory_is_read_from_global_memory(tmp_path):
    tight = replace(H100, smem_per_block_optin_bytes=5 * 1024)
    runs = []
    for precision in ("fp32", "fp16"):
        for channels in (64, 67):
            dense = Conv2dShape(2, 6, 5, channels, 24, (3, 3), (1, 2), (2, 1, 0, 1), (1, 2), precision=precision)
            runs.append((gpu_check.Case(dense, Epilogue(True, 0.0), (True,)), config_of("conv", (4, 2, 1, 2)), tight))
    parts = [part for case, config, device in runs for part in parts_of(case.shape, config, device)]
    assert not any(part.is_staged for part in parts)
    assert not emulate(tmp_path, runs)


def test_tiles_of_as_many_pixels_are_tried_once_where_there_is_no_window():
    tiles = []
    for kernel, padding in ((1, 0), (3, 1)):
        shape = Conv2dShape(1, 56, 56, 64, 64, (kernel, kernel), padding=(padding,) * 4)
        tiles.append({(config["tile_h"], config["tile_w"]) for config in conv.candidates(shape, H100)})
    pointwise, windowed = tiles
    assert len(pointwise) == len({rows * columns for rows, columns in pointwise})
    # 56 x 56 are 49 tiles of 8 x 8, but 56 of 2 x 32.
    assert (8, 8) in pointwise
    assert {(8, 8), (4, 16), (8, 4)} <= windowed
    assert (16, 4) not in windowed


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_inputs_begin_at_whole_rows_of_banks(precision):
    shape = TuckerConvShape(Conv2dShape(1, 7, 7, 64, 96, (3, 3), padding=(1, 1, 1, 1), precision=precision), 48, 32)
    parts = [part for config in conv.candidates(shape, H100)[::20] for part in parts_of(shape, config, H100)]
    places = [at for part in parts for at in Chain(part, Epilogue(), Buffers(None, None, [], [], None)).input_at]
    assert len(places) > 30
    assert all(at % 32 == 0 for at in places)


def test_there_is_always_a_way():
    """However large the ranks: three kernels need next to no shared memory."""
    for precision in DTYPES:
        dense = Conv2dShape(1, 12, 12, 16, 16, (7, 7), padding=(3, 3, 3, 3), precision=precision)
        config, _ = conv.choose(TuckerConvShape(dense, 6_000, 6_000, reduce_bias=True), H100)
        assert config.strategy == "three"


@pytest.mark.parametrize("shape", RESNET[1:], ids=str)
def test_no_barrier_parts_a_pragma_from_its_loop(shape):
    lines = [line.strip() for line in cuda_source({"k": kernel_for(shape).func}).splitlines()]
    assert lines.count("__syncthreads();") >= 1
    assert not [after for line, after in pairwise(lines) if line.startswith("#pragma") and not after.startswith("for")]


def test_a_residual_is_not_read_behind_its_end(tmp_path):
    shape = Conv2dShape(2, 6, 3, 39, 78, (5, 5), padding=(2, 2, 1, 1), groups=39)
    case = gpu_check.Case(shape, Epilogue(True, -0.5, 1.5), (True,))
    assert not emulate(tmp_path, [(case, conv.choose(shape, H100)[0], H100)])


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("epilogue", [PLAIN, Epilogue(clip_min=0.0), Epilogue(clip_min=0.0, clip_max=6.0)], ids=str)
def test_a_nan_reaches_the_outputs_that_depend_on_it_and_no_others(tmp_path, epilogue, pool):
    shape = TuckerConvShape(Conv2dShape(1, 8, 8, 4, 4, (3, 3), padding=SAME, pool=pool), 4, 4)
    kernel = kernel_for(shape, epilogue=epilogue)
    x = np.ones((1, 8, 8, 4), np.float32)
    x[0, 3, 4] = np.nan
    out = np.zeros(shape.stages[-1].stored_extents, np.float32)
    Emulator({"k": kernel.func}, tmp_path)("k", [x, *kernel.constants, out])
    expected = np.zeros((8, 8), bool)
    expected[2:5, 3:6] = True
    expected = expected.reshape(4, 2, 4, 2).any((1, 3)) if pool else expected
    np.testing.assert_array_equal(np.isnan(out[0, :, :, 0]), expected)


@pytest.mark.parametrize("shape", RESNET, ids=str)
def test_function_is_marked_as_scheduled(shape):
    config, _ = conv.choose(shape, H100)
    func = kernel_for(shape, config, bias=False).func
    assert func.attrs["tirx.is_scheduled"]
    assert func.attrs["op_pattern"] == 8
    assert func.attrs["tdc.config"] == str(config)
    assert "global_symbol" not in func.attrs


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_input_constants_residual_output(bias, residual):
    shape = TuckerConvShape(Conv2dShape(1, 8, 8, 4, 4, (3, 3), padding=SAME), 4, 4)
    kernel = kernel_for(shape, config_of("tile", (4, 4, 1, 4)), epilogue=Epilogue(residual), bias=bias)
    names = [param.name for param in kernel.func.params]
    constants = [name for i in range(3) for name in ([f"weight{i}", f"bias{i}"] if bias else [f"weight{i}"])]
    assert names == ["x", *constants, *(["residual"] if residual else []), "out"]
    assert len(kernel.constants) == len(constants)
    assert all(constant.dtype == np.float32 and constant.flags.c_contiguous for constant in kernel.constants)


@pytest.mark.parametrize("shape", RESNET[1:], ids=str)
def test_a_third_of_the_processors_or_more_get_a_block(shape):
    assert max(blocks for blocks, _, _ in launches_of(kernel_for(shape).func)) >= H100.core_count // 3


@pytest.mark.parametrize("device", list(GPUS.values()), ids=lambda device: device.name)
@pytest.mark.parametrize("shape", [*RESNET, *POOLED], ids=str)
def test_candidates_run_and_the_cheapest_is_chosen(shape, device):
    configs = conv.candidates(shape, device)
    assert configs
    assert not any(conv.reject_reason(shape, config, device) for config in configs)
    config, estimate = conv.choose(shape, device)
    assert estimate.latency_us == min(conv.estimate(shape, c, device).latency_us for c in configs)
    assert conv.choose(shape, device) == (config, estimate)
    assert estimate.latency_us > device.launch_us


@pytest.mark.parametrize(
    ("config", "device", "precision", "reason"),
    [
        (("tile", (16, 16, 1, 8)), "RTX 2080 Ti", "fp32", "KB of shared memory, RTX 2080 Ti has 64 KB"),
        (("cluster", (4, 4, 2, 8)), "A100", "fp32", "clusters of 2 blocks; A100 is sm_80, clusters begin with sm_90"),
        (("cluster", (4, 4, 17, 8)), "H100", "fp32", "clusters of 17 blocks, H100 has at most 16"),
        (("tile", (4, 4, 1, 4)), "RTX 2080 Ti", "tf32", "needs tf32; RTX 2080 Ti (sm_75) computes"),
        (("tile", (4, 4, 1, 33)), "H100", "fp16", "warps=33; expected an int from 1 to 32"),
        (("tile", (0, 4, 1, 4)), "H100", "fp16", "tile_h=0; expected an int from 1 to 256"),
        (("conv", (4, 4, 1, 4)), "H100", "fp16", "expected 'tile' or 'cluster'"),
        (("dense", (4, 4, 1, 4)), "H100", "fp16", "bias of the first stage does not reach"),
    ],
)
def test_what_cannot_run_is_rejected_with_numbers(config, device, precision, reason):
    shape = TuckerConvShape(Conv2dShape(1, 56, 56, 64, 64, (3, 3), padding=SAME, precision=precision), 192, 64, True)
    config = config_of(*config)
    assert reason in conv.reject_reason(shape, config, GPUS[device])
    with pytest.raises(TdcError, match=re.escape(reason)):
        kernel_for(shape, config, device=GPUS[device])


def test_wrong_strategy_is_rejected():
    assert "expected 'conv'" in conv.reject_reason(RESNET[0], KernelConfig("tile"), H100)


@needs_compiler
def test_products_of_four_warps_are_not_serialised(caplog):
    """ptxas makes each wait for the one before where it does not see that registers are left alone meanwhile."""
    caplog.set_level("DEBUG", "tdc_tvm.cuda_toolchain")
    functions = {}
    for precision, pool in (("fp16", False), ("tf32", False), ("fp16", True)):
        dense = Conv2dShape(1, 56, 56, 128, 128, (3, 3), padding=SAME, precision=precision, pool=pool)
        shape = TuckerConvShape(dense, 64, 32)
        for i, config in enumerate(
            [
                config_of("tile", (8 if pool else 7, 8, 1, 8, 4)),
                config_of("tile", (16, 8, 1, 12, 4)),
                config_of("cluster", (8, 8, 2, 8, 4)),
                config_of("dense", (8, 8, 2, 16, 4)),
            ]
        ):
            functions[f"{precision}_{pool}_{i}"] = kernel_for(shape, config, bias=False).func
    source = cuda_source(functions)
    find_cuda_compiler().compile(source, "sm_90")
    assert caplog.text.count("registers") >= len(functions)
    assert "serialized" not in caplog.text
    assert "injected" not in caplog.text
    unfenced = source.replace("wgmma.fence.sync.aligned;", "").replace("__shfl_sync(0xffffffffu, value, 0)", "value")
    find_cuda_compiler().compile(unfenced, "sm_90")
    assert "serialized" in caplog.text


@needs_compiler
@pytest.mark.parametrize("name", ["RTX 2080 Ti", "A100", "RTX 3090", "L4", "H100"])
def test_picks_keep_their_arrays_in_registers(tmp_path, name):
    device = GPUS[name]
    target = Target({"kind": "cuda", "arch": device.arch})
    precisions = [p for p in DTYPES if p in ("fp32", "fp16") or device.compute_capability >= 80]
    functions = {}
    for precision in precisions:
        for i, shape in enumerate([*RESNET, *POOLED]):
            func = kernel_for(shape.with_precision(precision), epilogue=Epilogue(True, 0.0), device=device).func
            functions[f"{precision}_{i}"] = func.with_attr("global_symbol", f"{precision}_{i}")
    with cuda_compiler(target):
        module = tvm.tirx.build(tvm.IRModule(functions), target=target, pipeline=TIR_PIPELINE)
    module.export_library(str(tmp_path / "kernels.so"))
    kernels = cubin_kernels(tmp_path / "kernels.so")
    assert {kernel.name.split("_kernel")[0] for kernel in kernels} == set(functions)
    assert {kernel.arch for kernel in kernels} == {device.arch}
    # A few bytes of registers that the compiler saves outside of the loops; arrays must not be among them.
    assert max(kernel.local_bytes for kernel in kernels) <= 32


@pytest.mark.parametrize("precision", DTYPES)
def test_the_input_is_scaled_shifted_and_clipped_where_it_is_read(tmp_path, precision):
    """In shared memory and on the way from global memory, of whole vectors and of others, by all units."""
    small = replace(H100, core_count=2, smem_per_block_optin_bytes=40 * 1024)
    plain = Conv2dShape(2, 9, 8, 72, 40, stride=(2, 1))
    odd = Conv2dShape(1, 7, 5, 33, 17)
    windowed = Conv2dShape(1, 9, 12, 40, 24, (3, 2), dilation=(2, 1))
    functions, data, ways = {}, {}, set()
    for shape, device in ((plain, H100), (plain, small), (odd, H100), (windowed, H100), (windowed, small)):
        shape = replace(shape, precision=precision, prologue=True)
        chosen = {}
        for config in conv.candidates(shape, device):
            parts = parts_of(shape, config, device)
            way = (parts[0].unit.name, bool(parts[0].is_staged), bool(parts[0].is_cluster), parts[0].rounds > 1)
            chosen.setdefault(way, config)
        ways.update(chosen)
        for config in chosen.values():
            name = f"case{len(functions)}"
            rng = np.random.default_rng(len(functions))
            case = gpu_check.Case(shape, PLAIN, (True,))
            weights, (x, _) = gpu_check.make_weights(case, rng), gpu_check.make_inputs(case, rng)
            scale, shift = rng.standard_normal((2, x.shape[-1])).astype(np.float32)
            prologue = Prologue(scale, shift, 0.0, 2.5)
            kernel = conv.make_kernel(case.shape, PLAIN, weights, config, device, "conv", prologue)
            prepared = np.clip(x.astype(np.float32) * scale + shift, 0.0, 2.5)
            prepared = round_to(precision, prepared).astype(np.float64)
            functions[name] = kernel.func
            data[name] = x, kernel, gpu_check.reference(case, prepared, weights, None), f"{shape} {config}"
    emulator = Emulator(functions, tmp_path)
    for name, (x, kernel, expected, text) in data.items():
        out = np.full(expected.shape, np.nan, x.dtype)
        between = [np.full(extents, np.nan, x.dtype) for extents in kernel.between]
        emulator(name, [x, *kernel.constants, out, *between])
        assert gpu_check.error_of(out, expected) <= 2 * gpu_check.tolerance(precision, 240), text
    assert {unit for unit, *_ in ways} == {unit.name for (one, _), unit in UNITS.items() if one == precision}
    assert {is_staged for _, is_staged, _, _ in ways} == {is_cluster for _, _, is_cluster, _ in ways} == {True, False}


def test_prologues_that_do_not_fit():
    shape = Conv2dShape(1, 7, 7, 16, 16, prologue=True)
    config, _ = conv.choose(shape, H100)
    channels = np.ones(24, np.float32)
    for given, prologue, message in (
        (shape, None, "found no prologue for .* with a prologue"),
        (replace(shape, prologue=False), Prologue(channels[:16], channels[:16]), "found a prologue for"),
        (shape, Prologue(channels, channels), r"found a scale of shape \(24,\) for .*, expected \(16,\)"),
    ):
        with pytest.raises(TdcError, match=message):
            conv.make_kernel(given, PLAIN, weights_for(shape), config, H100, "conv", prologue)
    for changes in ({"padding": SAME, "kernel": (3, 3)}, {"groups": 8}):
        with pytest.raises(TdcError, match="has groups or padding; only a convolution without can have a prologue"):
            replace(shape, **changes)
    with pytest.raises(TdcError, match="found prologue=1; expected True or False"):
        replace(shape, prologue=1)
    with pytest.raises(TdcError, match="a Tucker convolution has no prologue"):
        TuckerConvShape(shape, 4, 4)


def test_a_prologue_is_predicted():
    """As measured on an H100: 1.84 us without and 2.28 with one; 3.62 and 5.58."""
    for extent, channels, values, least, most in (
        (56, (128, 128), (8, 8, 2, 8, 4), 0.2, 0.7),
        (28, (512, 256), (4, 28, 8, 8, 4), 1, 3),
    ):
        shape = Conv2dShape(1, extent, extent, *channels, precision="fp16")
        config = config_of("conv", values)
        without, with_one = (
            conv.estimate(one, config, H100).latency_us for one in (shape, replace(shape, prologue=True))
        )
        assert least < with_one - without < most


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_channels_are_strips_of_wider_tensors(tmp_path, precision, pool):
    shape = Conv2dShape(2, 9, 8, 64, 32, (3, 3), (2, 1), SAME, precision=precision, pool=pool)
    # Maxima as a network's result, too.
    strips, functions, data = Tensors(96, None, 80, 16, "float32" if pool else None), {}, {}
    configs = conv.candidates(shape, H100)
    for config in configs[:: len(configs) // 12]:
        name = f"case{len(functions)}"
        rng = np.random.default_rng(len(functions))
        case = gpu_check.Case(shape, Epilogue(True, 0.0), (True,))
        weights, (x, residual) = gpu_check.make_weights(case, rng), gpu_check.make_inputs(case, rng)
        # What is not of the strips must not be looked at, or changed.
        wide = np.full((*x.shape[:3], 96), np.nan, x.dtype)
        wide[..., :64] = x
        kernel = conv.make_kernel(shape, case.epilogue, weights, config, H100, "conv", None, strips)
        functions[name] = kernel.func
        data[name] = [wide, *kernel.constants, residual], gpu_check.reference(case, x, weights, residual), str(config)
    emulator = Emulator(functions, tmp_path)
    for name, (inputs, expected, text) in data.items():
        out = np.full((*expected.shape[:3], 80), np.nan, strips.out_dtype or inputs[0].dtype)
        emulator(name, [*inputs, out])
        assert gpu_check.error_of(out[..., 16:48], expected) <= gpu_check.tolerance(precision, case.depth), text
        assert np.isnan(out[..., :16]).all()
        assert np.isnan(out[..., 48:]).all()


def test_weights_that_memory_bounds_are_stored_in_half(tmp_path):
    """TF32 multiplies by no more bits than FP16 has; small weights keep all of theirs."""
    device = replace(H100, l2_bytes=1 << 14)
    dense = Conv2dShape(1, 1, 3, 1016, 72, (1, 1), precision="tf32")
    case = gpu_check.Case(dense, Epilogue(True, 0.0), (True,))
    configs = [config_of("conv", (1, 1, split, warps, 2)) for split, warps in ((1, 4), (3, 8), (5, 2))]
    devices = [device, replace(device, smem_per_block_optin_bytes=96 * 1024)]
    runs = [(case, config, one) for config in configs for one in devices]
    parts = [part for _, config, one in runs for part in parts_of(dense, config, one)]
    assert {bool(part.placement.ring[0]) for part in parts} == {False, True}
    assert not emulate(tmp_path, runs)
    small = ConvWeights(np.full((72, 1016, 1, 1), 3e-9, np.float32), None)
    kernel = conv.make_kernel(dense, PLAIN, (small,), configs[0], device, "conv")
    assert kernel.constants[0].dtype == np.float16
    out, x = np.full((1, 1, 3, 72), np.nan, np.float32), np.ones((1, 1, 3, 1016), np.float32)
    (tmp_path / "small").mkdir()
    Emulator({"conv": kernel.func}, tmp_path / "small")("conv", [x, *kernel.constants, out])
    np.testing.assert_allclose(out, 1016 * 3e-9, rtol=1e-3)
    assert "stores weights in FP16 (group=2)" in conv.reject_reason(dense, configs[0], H100)


@pytest.mark.parametrize(("precision", "group"), [("fp32", 1), ("fp32", 4), ("fp16", 1), ("tf32", 2)])
def test_weights_that_memory_bounds_lie_in_the_order_of_their_chunks(tmp_path, precision, group):
    dense = Conv2dShape(1, 1, 3, 1016, 72, (1, 1), precision=precision)
    case = gpu_check.Case(dense, Epilogue(True, 0.0), (True,))
    configs = [config_of("conv", (1, 1, split, warps, group)) for split, warps in ((1, 4), (3, 8))]
    # With room for all weights, for a ring, and for none.
    devices = [
        replace(H100, l2_bytes=1 << 14, smem_per_block_optin_bytes=kilobytes << 10) for kilobytes in (227, 96, 16)
    ]
    runs = [(case, config, one) for config in configs for one in devices]
    parts = [part for _, config, one in runs for part in parts_of(dense, config, one)]
    assert {bool(part.is_streamed) for part in parts} == {False, True}
    assert {bool(part.placement.ring[0]) for part in parts} == {False, True}
    assert not emulate(tmp_path, runs)


@pytest.mark.parametrize("precision", DTYPES)
def test_maxima_of_2x2_are_all_that_is_stored(tmp_path, precision):
    """Of odd extents, several tiles a block, channels and depths in parts, crews, clusters and their sums."""
    small = replace(H100, core_count=2)
    dense = Conv2dShape(2, 13, 17, 40, 24, (3, 3), padding=SAME, precision=precision, pool=True)
    case = gpu_check.Case(TuckerConvShape(dense, 33, 17), Epilogue(True, 0.0), (True, True, True))
    merged = gpu_check.Case(TuckerConvShape(dense, 33, 17), Epilogue(), (False, True, False))
    conv_case = gpu_check.Case(dense, Epilogue(True, -0.5, 1.5), (True,))
    strided = replace(dense, stride=(2, 1), out_channels=19)
    odd_channels = gpu_check.Case(strided, Epilogue(), (True,))
    runs = [
        (case, config_of("tile", (4, 8, 1, 4)), H100),
        (case, config_of("tile", (6, 2, 1, 2)), small),
        (case, config_of("cluster", (4, 8, 3, 2)), small),
        (case, config_of("two", (3, 5, 1, 4), (2, 8, 2, 2), cut=1), H100),
        (case, config_of("two", (5, 4, 2, 8), (2, 6, 1, 4), cut=2), small),
        (case, config_of("three", (5, 3, 1, 2), (3, 3, 1, 4), (4, 4, 2, 1)), small),
        (case, config_of("three", (4, 4, 2, 2, 1, 1), (3, 4, 3, 4, 1, 1), (6, 4, 2, 1, 1, 1)), H100),
        (merged, config_of("dense", (4, 4, 2, 4)), H100),
        (conv_case, config_of("conv", (8, 8, 2, 4)), small),
        (conv_case, config_of("conv", (8, 8, 3, 4, 1, 1)), H100),
        (conv_case, config_of("conv", (4, 6, 3, 4, 1, 1)), small),
        (conv_case, config_of("conv", (4, 4, 1, 2, 1, 0, 3)), small),
        (odd_channels, config_of("conv", (2, 4, 1, 2)), H100),
    ]
    if precision == "fp32":
        runs.append((case, config_of("tile", (8, 8, 1, 2, 4, 0, 2)), H100))
    else:
        runs.append((case, config_of("tile", (8, 8, 1, 8, 4)), small))
        runs.append((case, config_of("cluster", (4, 8, 2, 4, 4)), H100))
        runs.append((conv_case, config_of("conv", (14, 8, 2, 8, 4, 1)), small))
        runs.append((odd_channels, config_of("conv", (4, 8, 1, 4, 4, 0, 2)), small))
    parts = [parts_of(case.shape, config, device)[-1] for case, config, device in runs]
    assert {part.rounds > 1 for part in parts} == {False, True}
    assert any(part.is_cluster and part.core.pool and part.rows_kept(0) > 1 for part in parts)
    assert any(part.group_pixels * part.split > part.tile_pixels for part in parts if part.core.pool)
    assert not emulate(tmp_path, runs)
