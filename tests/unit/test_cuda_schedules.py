"""The CUDA schedules: choices, structure, what ptxas makes of them, and numbers (emulated on the CPU)."""

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tvm
from cuda_emulator import Emulator, cuda_source, launch_of
from tvm.target import Target

from tdc_tvm.cuda_toolchain import cubin_kernels, cuda_compiler, find_cuda_compiler
from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.cuda import conv
from tdc_tvm.schedules.device import GPUS
from tdc_tvm.schedules.kernel import ConvWeights, KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, Epilogue, TuckerConvShape

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
    config = config or conv.choose(shape, device)[0]
    return conv.make_kernel(shape, epilogue, weights_for(shape, bias), config, device, "conv")


def emulate(tmp_path, runs):
    """Run (case, config, device) triples; the errors and their limits."""
    functions, data = {}, {}
    for index, (case, config, device) in enumerate(runs):
        rng = np.random.default_rng(index)
        weights, (x, residual) = gpu_check.make_weights(case, rng), gpu_check.make_inputs(case, rng)
        kernel = conv.make_kernel(case.shape, case.epilogue, weights, config, device, "conv")
        functions[f"case{index}"] = kernel.func
        inputs = [x, *kernel.constants, *([] if residual is None else [residual])]
        data[f"case{index}"] = inputs, gpu_check.reference(case, x, weights, residual), case, config
    emulator = Emulator(functions, tmp_path)
    failures = []
    for name, (inputs, expected, case, config) in data.items():
        out = np.full(expected.shape, np.nan, np.float32)
        emulator(name, [*inputs, out])
        error = gpu_check.error_of(out, expected)
        if not error <= gpu_check.tolerance(case.depth):
            failures.append(f"{name}: {error:.2e}; {case}; {config}")
    return failures


def test_random_shapes_are_right_with_the_chosen_configuration(tmp_path):
    cases = gpu_check.random_cases(24, seed=1, largest=9)
    assert not emulate(tmp_path, [(case, conv.choose(case.shape, H100)[0], H100) for case in cases])


@pytest.mark.parametrize("seed", [2, 3])
def test_random_shapes_are_right_with_random_configurations(tmp_path, seed):
    rng = np.random.default_rng(seed)
    runs = []
    for case in gpu_check.random_cases(24, seed=seed, largest=9):
        configs = conv.candidates(case.shape, H100)
        runs.append((case, configs[rng.integers(len(configs))], H100))
    assert not emulate(tmp_path, runs)


def test_padding_is_zero_after_the_first_bias(tmp_path):
    shape = TuckerConvShape(Conv2dShape(1, 3, 3, 4, 5, (3, 3), padding=(2, 1, 0, 2)), 6, 3)
    case = gpu_check.Case(shape, Epilogue(), (True, False, False))
    assert not emulate(tmp_path, [(case, config, H100) for config in conv.candidates(shape, H100)[:6]])


@pytest.mark.parametrize("threads", [64, 96])
@pytest.mark.parametrize("chunk", [1, 4, 5, 16])
def test_the_first_rank_can_be_chunked(tmp_path, chunk, threads):
    shape = TuckerConvShape(Conv2dShape(1, 7, 6, 8, 9, (3, 3), (2, 1), padding=SAME), 16, 12)
    case = gpu_check.Case(shape, Epilogue(True, 0.0), (True, True, True))
    config = KernelConfig("tile", (("tile_h", 2), ("tile_w", 3), ("threads", threads), ("chunk", chunk)))
    assert not emulate(tmp_path, [(case, config, H100)])


@pytest.mark.parametrize("chunk", [5, 13])
@pytest.mark.parametrize("threads", [32, 256])
def test_no_barrier_parts_a_pragma_from_its_loop(chunk, threads):
    shape = TuckerConvShape(Conv2dShape(1, 8, 8, 32, 80, padding=(0, 0, 0, 0)), 13, 32)
    config = KernelConfig("tile", (("tile_h", 4), ("tile_w", 4), ("threads", threads), ("chunk", chunk)))
    lines = [line.strip() for line in cuda_source({"k": kernel_for(shape, config).func}).splitlines()]
    assert lines.count("__syncthreads();") >= 2
    assert not [after for line, after in pairwise(lines) if line.startswith("#pragma") and not after.startswith("for")]


def test_outside_pixels_do_not_spread_nan(tmp_path):
    """A NaN in the input must reach only the outputs that depend on it."""
    shape = TuckerConvShape(Conv2dShape(1, 8, 8, 4, 4, (3, 3), padding=SAME), 4, 4)
    kernel = kernel_for(shape)
    x = np.ones((1, 8, 8, 4), np.float32)
    x[0, 0, 0] = np.nan
    out = np.zeros((1, 8, 8, 4), np.float32)
    Emulator({"k": kernel.func}, tmp_path)("k", [x, *kernel.constants, out])
    expected = np.zeros((8, 8), bool)
    expected[:2, :2] = True
    np.testing.assert_array_equal(np.isnan(out[0, :, :, 0]), expected)


@pytest.mark.parametrize("shape", RESNET, ids=str)
def test_function_is_marked_as_scheduled(shape):
    config, _ = conv.choose(shape, H100)
    func = kernel_for(shape, config).func
    assert func.attrs["tirx.is_scheduled"]
    assert func.attrs["op_pattern"] == 8
    assert func.attrs["tdc.config"] == str(config)
    assert "global_symbol" not in func.attrs


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_input_constants_residual_output(bias, residual):
    shape = TuckerConvShape(Conv2dShape(1, 8, 8, 4, 4, (3, 3), padding=SAME), 4, 4)
    kernel = kernel_for(shape, epilogue=Epilogue(residual), bias=bias)
    names = [param.name for param in kernel.func.params]
    biases = ["reduce_bias", "core_bias", "expand_bias"] if bias else []
    assert names == ["x", "reduce", "core", "expand", *biases, *(["residual"] if residual else []), "out"]
    assert len(kernel.constants) == 3 + len(biases)
    assert all(constant.dtype == np.float32 and constant.flags.c_contiguous for constant in kernel.constants)


@pytest.mark.parametrize("shape", RESNET[1:], ids=str)
def test_most_processors_get_a_block(shape):
    blocks, _ = launch_of(kernel_for(shape).func)
    pixels = shape.out_pixels if isinstance(shape, Conv2dShape) else shape.dense.out_pixels
    assert blocks >= min(H100.core_count // 2, pixels)


@pytest.mark.parametrize("device", list(GPUS.values()), ids=lambda device: device.name)
@pytest.mark.parametrize("shape", RESNET, ids=str)
def test_candidates_run_and_the_cheapest_is_chosen(shape, device):
    configs = conv.candidates(shape, device)
    assert configs
    assert not any(conv.reject_reason(shape, config, device) for config in configs)
    config, estimate = conv.choose(shape, device)
    assert estimate.latency_us == min(conv.estimate(shape, c, device).latency_us for c in configs)
    assert conv.choose(shape, device) == (config, estimate)
    assert estimate.latency_us > device.launch_us


def test_too_large_a_tile_is_rejected_with_numbers():
    shape = TuckerConvShape(Conv2dShape(1, 56, 56, 64, 64, (3, 3), padding=SAME), 192, 64)
    config = KernelConfig("tile", (("tile_h", 16), ("tile_w", 16), ("threads", 256), ("chunk", 192)))
    assert conv.reject_reason(shape, config, GPUS["RTX 2080 Ti"]).endswith("KB of shared memory, RTX 2080 Ti has 64 KB")
    with pytest.raises(TdcError, match="shared memory"):
        kernel_for(shape, config)


def test_wrong_strategy_is_rejected():
    assert "expected 'direct'" in conv.reject_reason(RESNET[0], KernelConfig("tile"), H100)
    assert "expected 'tile'" in conv.reject_reason(RESNET[-1], KernelConfig("direct"), H100)


def test_ranks_beyond_shared_memory_are_an_error_of_the_user():
    shape = TuckerConvShape(Conv2dShape(1, 2, 2, 4, 4, (3, 3), padding=SAME), 4, 100_000)
    with pytest.raises(TdcError, match="lower the ranks"):
        conv.choose(shape, H100)


@needs_compiler
@pytest.mark.parametrize("name", ["RTX 2080 Ti", "A100", "RTX 3090", "L4", "H100"])
def test_compiles_without_spills(tmp_path, name):
    device = GPUS[name]
    target = Target({"kind": "cuda", "arch": device.arch})
    functions = {
        f"k{i}": kernel_for(shape, epilogue=Epilogue(True, 0.0), device=device).func.with_attr("global_symbol", f"k{i}")
        for i, shape in enumerate(RESNET)
    }
    with cuda_compiler(target):
        module = tvm.tirx.build(tvm.IRModule(functions), target=target)
    module.export_library(str(tmp_path / "kernels.so"))
    kernels = cubin_kernels(tmp_path / "kernels.so")
    assert [kernel.name for kernel in kernels] == [f"{name}_kernel" for name in functions]
    assert {kernel.arch for kernel in kernels} == {device.arch}
    assert all(kernel.local_bytes == 0 for kernel in kernels)
