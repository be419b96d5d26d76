"""Shapes, configurations, weights and devices that cannot be are refused, with what was found and what is expected."""

import re
from dataclasses import replace

import numpy as np
import pytest
from tvm.target import Target

from tdc_tvm.errors import TdcError
from tdc_tvm.schedules import backend
from tdc_tvm.schedules.device import GPUS, DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, KernelConfig
from tdc_tvm.schedules.shape import MAX_ELEMENTS, Conv2dShape, Epilogue, TuckerConvShape, oversize_reason

SAME = (1, 1, 1, 1)
DENSE = Conv2dShape(1, 14, 14, 32, 64, (3, 3), padding=SAME)
TUCKER = TuckerConvShape(DENSE, 16, 24)
GROUPED = replace(DENSE, groups=8)
HUGE = replace(DENSE, batch=343_000)
H100, RTX_2080_TI = GPUS["H100"], GPUS["RTX 2080 Ti"]
CPU = DeviceSpec.from_target(Target("llvm"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"padding": (1, 1)}, "found padding=(1, 1); expected a tuple of 4 ints, padding=(top, left, bottom, right)"),
        ({"kernel": 3}, "found kernel=3; expected a tuple of 2 ints"),
        ({"kernel": (3, 3, 3)}, "found kernel=(3, 3, 3); expected a tuple of 2 ints"),
        ({"kernel": [3, 3]}, "found kernel=[3, 3]; expected a tuple of 2 ints"),
        ({"stride": (1.0, 1)}, "found stride=(1.0, 1); expected a tuple of 2 ints"),
        ({"dilation": None}, "found dilation=None; expected a tuple of 2 ints"),
        ({"height": 14.0}, "found height=14.0; expected an int"),
        ({"groups": True}, "found groups=True; expected an int"),
        ({"precision": "int8"}, "unknown precision 'int8'; use one of fp32"),
        ({"precision": ["fp32"]}, "unknown precision ['fp32']; use one of fp32"),
        ({"out_channels": 0}, "extents must be positive"),
        ({"pool": 1}, "found pool=1; expected True or False"),
        ({"pool": True, "groups": 8}, "maxima of 2x2 of 14x14 outputs in 8 group(s); there must be 2x2 or more, and"),
        ({"pool": True, "stride": (14, 1)}, "maxima of 2x2 of 1x14 outputs in 1 group(s)"),
    ],
)
def test_impossible_convolutions(fields, message):
    with pytest.raises(TdcError, match=re.escape(message)):
        replace(DENSE, **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TuckerConvShape(DENSE, 1.5, 2), "found rank_in=1.5; expected an int"),
        (lambda: TuckerConvShape(DENSE, 1, None), "found rank_out=None; expected an int"),
        (lambda: TuckerConvShape(TUCKER, 1, 1), "expected the Conv2dShape"),
        (lambda: Epilogue(clip_min=6.0, clip_max=0.0), "found clip_min=6.0 above clip_max=0.0"),
        (lambda: replace(H100, kind="rocm"), "unknown kind of device 'rocm'; use 'cpu' or 'cuda'"),
        (lambda: replace(H100, probe=None), "the GPU H100 has no probe"),
        (lambda: backend("rocm"), "found the device 'rocm'; expected a DeviceSpec of kind 'cpu' or 'cuda'"),
    ],
)
def test_other_impossible_values(make, message):
    with pytest.raises(TdcError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (DENSE, "1x14x14x32 -> 64, 3x3"),
        (replace(DENSE, kernel=(1, 1), padding=(0, 0, 0, 0)), "1x14x14x32 -> 64, 1x1"),
        (replace(DENSE, kernel=(5, 3), padding=(4, 1, 4, 1), dilation=(2, 1)), "1x14x14x32 -> 64, 5x3 dilation 2x1"),
        (replace(DENSE, padding=(0, 0, 0, 0)), "1x14x14x32 -> 64, 3x3 padding 0"),
        (replace(DENSE, padding=(1, 0, 1, 2), groups=2), "1x14x14x32 -> 64, 3x3 padding 1x0x1x2 groups 2"),
        (TUCKER, "1x14x14x32 -> 64, 3x3 at ranks (16, 24)"),
        (replace(TUCKER, reduce_bias=True), "1x14x14x32 -> 64, 3x3 at ranks (16, 24) with a bias of the first stage"),
        (replace(DENSE, precision="fp16", pool=True), "1x14x14x32 -> 64, 3x3 fp16 + 2x2 max"),
        (replace(TUCKER, dense=replace(DENSE, pool=True)), "1x14x14x32 -> 64, 3x3 + 2x2 max at ranks (16, 24)"),
    ],
)
def test_texts_tell_shapes_apart(shape, text):
    assert str(shape) == text


def test_the_largest_tensor_that_32_bit_indices_reach():
    plain = Conv2dShape(1, 1, MAX_ELEMENTS, 1, 1)
    assert oversize_reason((plain,)) == ""
    assert "the input of" in oversize_reason((replace(plain, width=MAX_ELEMENTS + 1),))
    assert "the output of" in oversize_reason((replace(plain, width=2**30, out_channels=2),))
    assert "the weights of" in oversize_reason((replace(plain, width=1, in_channels=2**16, out_channels=2**15),))
    assert "2,147,483,648 elements, 32-bit indices reach 2,147,483,647" in oversize_reason(
        (Conv2dShape(1, 1, 2**31, 1, 1),)
    )


@pytest.mark.parametrize(
    ("shape", "device", "message"),
    [
        (HUGE, H100, "input of 343000x14x14x32 -> 64, 3x3 would have 2,809,856,000 elements"),
        (replace(HUGE, groups=32), H100, "would have 2,809,856,000 elements"),
        (TuckerConvShape(replace(HUGE, batch=150_000), 4, 100), H100, "output of 150000x14x14x4 -> 100, 3x3"),
        (HUGE, CPU, "would have 2,809,856,000 elements"),
        (replace(DENSE, precision="tf32"), RTX_2080_TI, "RTX 2080 Ti (sm_75) computes convolutions in fp32 or fp16"),
        (replace(DENSE, precision="bf16"), RTX_2080_TI, "needs bf16; RTX 2080 Ti (sm_75)"),
        (replace(GROUPED, precision="bf16"), RTX_2080_TI, "computes grouped convolutions in fp32 only"),
        (replace(GROUPED, precision="fp16"), H100, "H100 (sm_90) computes grouped convolutions in fp32 only"),
        (replace(DENSE, precision="tf32"), CPU, "needs tf32; CPUs compute in fp32 only"),
        (replace(DENSE, pool=True), CPU, "stores maxima of 2x2, which only CUDA schedules do"),
        (TuckerConvShape(replace(DENSE, precision="fp16"), 16, 24), CPU, "needs fp16; CPUs compute in fp32 only"),
    ],
)
def test_what_no_configuration_can_compute(shape, device, message):
    schedules = backend(device)
    plain = TUCKER if isinstance(shape, TuckerConvShape) else replace(DENSE, groups=shape.groups, out_channels=64)
    config, _ = schedules.choose(plain, device)
    assert message in schedules.reject_reason(shape, config, device)
    for call in (
        lambda: schedules.candidates(shape, device),
        lambda: schedules.choose(shape, device),
        lambda: schedules.estimate(shape, config, device),
        lambda: schedules.make_kernel(shape, Epilogue(), (), config, device, "k"),
    ):
        with pytest.raises(TdcError, match=re.escape(message)):
            call()


def test_what_lies_between_kernels_is_filled_up_to_whole_vectors():
    shape = TuckerConvShape(Conv2dShape(70, 2048, 2048, 3, 3, (3, 3), padding=SAME, precision="fp16"), 1, 1)
    assert backend(H100).reject_reason(shape, config_with("tile"), H100) == ""
    reason = backend(H100).reject_reason(shape, config_with("two"), H100)
    assert reason == "needs a tensor of 2,348,810,240 elements, 32-bit indices reach 2,147,483,647"


@pytest.mark.parametrize("reduce_bias", [False, True])
def test_the_choice_is_the_best_of_all_candidates(reduce_bias):
    # Ranks that are no whole vectors: what lies between kernels is wider.
    shape = TuckerConvShape(
        Conv2dShape(32, 28, 28, 256, 128, (3, 3), padding=SAME, precision="fp16"), 21, 14, reduce_bias
    )
    _, chosen = backend(H100).choose(shape, H100)
    candidates = backend(H100).candidates(shape, H100)
    assert chosen.latency_us == min(backend(H100).estimate(shape, one, H100).latency_us for one in candidates)


def test_packed_weights_that_no_index_reaches():
    with pytest.raises(TdcError, match="32-bit indices reach 2,147,483,647 elements of packed weights"):
        backend(H100).candidates(Conv2dShape(1, 1, 1, 2**28, 1), H100)


@pytest.mark.parametrize(("shape", "device"), [(None, H100), (DENSE, "H100")])
def test_arguments_of_other_types(shape, device):
    from tdc_tvm.schedules.cuda import conv

    with pytest.raises(TdcError, match="expected a Conv2dShape or TuckerConvShape and a DeviceSpec"):
        conv.choose(shape, device)


def test_a_layer_whose_merged_weights_are_too_many_is_not_merged():
    shape = TuckerConvShape(Conv2dShape(1, 7, 7, 20_000, 20_000, (3, 3), padding=SAME), 64, 64)
    assert "dense" not in {config.strategy for config in backend(H100).candidates(shape, H100)}
    config = KernelConfig("dense", backend(H100).choose(DENSE, H100)[0].parameters)
    assert "the weights of" in backend(H100).reject_reason(shape, config, H100)


def config_with(strategy, drop=(), **changes):
    """A configuration of a CUDA strategy that runs, changed."""
    fields = {"tile_h": 4, "tile_w": 4, "split": 1, "deep": 0, "warps": 4, "crews": 1, "group": 1}
    if strategy == "direct":
        fields = {"threads": 64, "lanes": 32, "pixels": 1, "columns": 1, "splits": 1}
    if strategy == "two":
        fields |= {f"{name}1": value for name, value in fields.items()} | {"cut": 1}
    fields |= changes
    return KernelConfig(strategy, tuple((name, value) for name, value in fields.items() if name not in drop))


@pytest.mark.parametrize(
    ("shape", "config", "reason"),
    [
        (DENSE, config_with("conv"), ""),
        (TUCKER, config_with("two"), ""),
        (GROUPED, config_with("direct"), ""),
        (DENSE, config_with("spiral"), "strategy 'spiral' is not for"),
        (
            DENSE,
            config_with("conv", drop=("warps",)),
            "deep, crews, group; expected tile_h, tile_w, split, deep, warps, crews, group",
        ),
        (DENSE, config_with("conv", fast=1), "group, fast; expected tile_h"),
        (DENSE, KernelConfig("conv", (*config_with("conv").parameters, ("warps", 8))), "group, warps; expected tile_h"),
        (TUCKER, config_with("two", drop=("cut",)), "group1; expected tile_h"),
        (TUCKER, config_with("two", cut=0), "has cut=0; expected 1 or 2"),
        (TUCKER, config_with("two", cut=3), "has cut=3; expected 1 or 2"),
        (TUCKER, config_with("two", cut=-1), "has cut=-1; expected 1 or 2"),
        (TUCKER, config_with("tile", deep=1), "divides the depth of a single stage (deep=1), and has 3 stages"),
        (TUCKER, config_with("tile", group=4), ""),
        (TUCKER, config_with("tile", group=2), "has group=2; expected 1 or 4"),
        (replace(DENSE, precision="fp16"), config_with("conv", tile_w=8, group=2), "has group=2; expected 1 or 4"),
        (DENSE, config_with("conv", tile_h=224, tile_w=224), "tiles of 224x224 = 50176 pixels; at most 256"),
        (replace(DENSE, pool=True), config_with("conv", tile_h=3), "even height and width for maxima of 2x2; has"),
        (replace(TUCKER, dense=replace(DENSE, pool=True)), config_with("two", tile_w1=3, tile_w=7), "has tiles of 4x3"),
        (DENSE, config_with("conv", split=1000), "has split=1000; expected an int from 1 to 256"),
        (DENSE, config_with("conv", deep=9), "has deep=9; expected 0 or 1"),
        (DENSE, config_with("conv", tile_h=4.0), "has tile_h=4.0; expected an int from 1 to 256"),
        (DENSE, config_with("conv", crews=2), ""),
        (DENSE, config_with("conv", crews=5), "has crews=5; expected an int from 1 to 4"),
        (DENSE, config_with("conv", warps=16, crews=3), "needs 3 crews of 16 warps, 1536 threads; at most 1024"),
        (TUCKER, config_with("cluster", split=2, crews=2), "has 2 crews, which share neither a cluster nor a ring"),
        (DENSE, config_with("conv", warps="4"), "has warps='4'; expected an int from 1 to 32"),
        (GROUPED, config_with("direct", drop=("lanes",)), "splits; expected threads, lanes"),
        (
            GROUPED,
            config_with("direct", threads=220),
            "has threads=220; expected an int from 32 to 1024 in steps of 32",
        ),
        (GROUPED, config_with("direct", lanes=3), "has lanes=3; expected 1 or 2 or 4"),
    ],
)
def test_configurations_for_a_gpu(shape, config, reason):
    schedules = backend(H100)
    found = schedules.reject_reason(shape, config, H100)
    assert reason in found
    assert bool(reason) == bool(found)
    if reason:
        with pytest.raises(TdcError, match=re.escape(reason)):
            schedules.estimate(shape, config, H100)
    else:
        assert schedules.estimate(shape, config, H100).latency_us > 0


@pytest.mark.parametrize("shape", [DENSE, replace(DENSE, in_channels=64, groups=64), GROUPED, TUCKER], ids=str)
def test_configurations_for_a_cpu(shape):
    schedules = backend(CPU)
    for config in schedules.candidates(shape, CPU):
        assert schedules.reject_reason(shape, config, CPU) == ""
        names = [name for name, _ in config.parameters]
        for changed, reason in (
            (config.parameters[1:], f"expected {', '.join(names)}"),
            ((*config.parameters, ("fast", 1)), f", fast; expected {', '.join(names)}"),
            (tuple((name, 1.5) for name in names), f"has {names[0]}=1.5; expected"),
            (tuple((name, 0) for name in names), f"has {names[0]}=0; expected"),
        ):
            wrong = KernelConfig(config.strategy, changed)
            assert reason in schedules.reject_reason(shape, wrong, CPU)
            with pytest.raises(TdcError, match=re.escape(reason)):
                schedules.estimate(shape, wrong, CPU)


def test_strips_of_a_cpu_are_whole_tiles():
    schedules, wide = backend(CPU), Conv2dShape(1, 97, 1, 32, 64)
    config = next(c for c in schedules.candidates(wide, CPU) if c["strip"] > 1)
    parameters = dict(config.parameters) | {"strip": 1}
    reason = schedules.reject_reason(wide, KernelConfig(config.strategy, tuple(parameters.items())), CPU)
    assert "has strips of 1 rows, which are not whole tiles of" in reason


@pytest.mark.parametrize("device", [H100, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize(
    ("shape", "kernels", "biases", "message"),
    [
        (DENSE, [(64, 31, 3, 3)], [None], "found a kernel of shape (64, 31, 3, 3) for 1x14x14x32 -> 64, 3x3, expected"),
        (DENSE, [(64, 32, 3, 3)], [3], "found a bias of shape (3,) for 1x14x14x32 -> 64, 3x3, expected (64,)"),
        (DENSE, [(64, 32, 3, 3)] * 3, [None] * 3, "found weights for 3 stages, expected 1"),
        (GROUPED, [(64, 32, 3, 3)], [None], "expected (64, 4, 3, 3)"),
        (TUCKER, [(64, 32, 3, 3)], [None], "found weights for 1 stages, expected 3"),
        (TUCKER, [(16, 32, 1, 1), (24, 16, 3, 3), (64, 16, 1, 1)], [None] * 3, "expected (64, 24, 1, 1)"),
    ],
)
def test_weights_of_other_shapes(device, shape, kernels, biases, message):
    weights = tuple(
        ConvWeights(np.zeros(kernel, np.float32), None if bias is None else np.zeros(bias, np.float32))
        for kernel, bias in zip(kernels, biases, strict=True)
    )
    config, _ = backend(device).choose(shape, device)
    with pytest.raises(TdcError, match=re.escape(message)):
        backend(device).make_kernel(shape, Epilogue(), weights, config, device, "k")
