"""Pooling kernels for GPUs, emulated, against PyTorch."""

import itertools

import numpy as np
import pytest
from cuda_emulator import Emulator
from test_cuda_schedules import needs_compiler

from tdc_tvm.schedules.cuda.pool import Pool2dShape, make_kernel
from tdc_tvm.schedules.device import GPUS
from tdc_tvm.schedules.kernel import Prologue, Tensors

torch = pytest.importorskip("torch")

CASES = {
    "max": (True, (2, 9, 7, 32), (3, 3), (2, 2), (1, 1), (1, 1), True),
    "max, dilated": (True, (1, 11, 12, 8), (2, 3), (1, 2), (2, 2), (0, 1), True),
    "max, odd channels": (True, (2, 5, 6, 5), (2, 2), (2, 2), (1, 1), (0, 0), True),
    "mean": (False, (2, 8, 6, 16), (2, 2), (2, 2), (1, 1), (0, 0), True),
    "mean, padding counts": (False, (1, 7, 7, 8), (3, 3), (2, 2), (1, 1), (1, 1), True),
    "mean, padding does not count": (False, (1, 7, 6, 8), (3, 3), (2, 2), (1, 1), (1, 1), False),
    "mean of a large window": (False, (1, 9, 9, 8), (5, 5), (2, 2), (1, 1), (2, 2), False),
    "mean of images": (False, (3, 7, 7, 40), (7, 7), (1, 1), (1, 1), (0, 0), True),
    "mean of images, odd channels": (False, (1, 3, 7, 3), (3, 7), (1, 1), (1, 1), (0, 0), True),
}


def shape_of(is_max, extents, kernel, stride, dilation, padding, counts, dtype):
    out = [(extents[1 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    return Pool2dShape(is_max, *extents, kernel, stride, dilation, padding, *out, counts, dtype)


def expected(shape, x, prologue):
    value = torch.from_numpy(x.astype(np.float64))
    if prologue is not None:
        value = (value * torch.from_numpy(prologue.scale) + torch.from_numpy(prologue.shift)).clamp_min(0)
    value = value.permute(0, 3, 1, 2)
    if shape.is_max:
        out = torch.nn.functional.max_pool2d(value, shape.kernel, shape.stride, shape.padding, shape.dilation)
    else:
        out = torch.nn.functional.avg_pool2d(
            value, shape.kernel, shape.stride, shape.padding, count_include_pad=shape.counts_padding
        )
    return out.permute(0, 2, 3, 1).numpy()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_pooling_is_right(case, dtype, tmp_path):
    shape = shape_of(*CASES[case], dtype)
    rng = np.random.default_rng(1)
    channels = shape.channels
    # The plain layer; and as in a DenseNet: of a wider tensor, normalised before, written to a strip of another.
    normalised = Prologue(rng.standard_normal(channels), rng.standard_normal(channels), clip_min=0.0)
    variants = {
        "plain": (None, Tensors()),
        "strip": (normalised, Tensors(in_width=channels + 8, out_width=channels + 24, out_start=16)),
        "result": (normalised, Tensors(out_dtype="float32")),
    }
    kernels = {
        f"pool{i}": make_kernel(shape, GPUS["H100"], f"pool{i}", prologue, tensors)
        for i, (prologue, tensors) in enumerate(variants.values())
    }
    emulator = Emulator({name: kernel.func for name, kernel in kernels.items()}, tmp_path)
    for (name, kernel), (prologue, tensors) in zip(kernels.items(), variants.values(), strict=True):
        extents = (shape.batch, shape.height, shape.width, tensors.in_width or channels)
        x = rng.standard_normal(extents).astype(dtype)
        out_extents = (shape.batch, shape.out_height, shape.out_width, tensors.out_width or channels)
        out = np.full(out_extents, 77, tensors.out_dtype or dtype)
        emulator(name, [x, *kernel.constants, out])
        strip = slice(tensors.out_start, tensors.out_start + channels)
        tolerance = 1e-5 if out.dtype == np.float32 else 2e-3
        np.testing.assert_allclose(
            out[..., strip], expected(shape, x[..., :channels], prologue), rtol=tolerance, atol=tolerance
        )
        others = np.delete(out, np.r_[strip], axis=3)
        assert np.all(others == 77)


@needs_compiler
@pytest.mark.parametrize("position", list(itertools.product(range(2), range(2))))
def test_a_maximum_keeps_nan(position, tmp_path):
    shape = shape_of(True, (1, 2, 2, 4), (2, 2), (2, 2), (1, 1), (0, 0), True, "float32")
    kernel = make_kernel(shape, GPUS["H100"], "pool")
    x = np.ones((1, 2, 2, 4), np.float32)
    x[(0, *position, 2)] = np.nan
    out = np.zeros((1, 1, 1, 4), np.float32)
    Emulator({"pool": kernel.func}, tmp_path)("pool", [x, out])
    np.testing.assert_array_equal(out[0, 0, 0], [1, 1, np.nan, 1])
