"""CPU schedules: right against float64 for every kind of convolution, and the pass for everything else."""

from __future__ import annotations

import itertools
import platform

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, s_tir, tirx
from tvm.script import tirx as T
from tvm.target import Target

from tdc_tvm.errors import TdcError
from tdc_tvm.relay_passes.keep_nan import KEEP_NAN
from tdc_tvm.schedules.cpu import conv
from tdc_tvm.schedules.cpu.generic import ScheduleGenericCpu, schedule_function
from tdc_tvm.schedules.device import GPUS, DeviceSpec
from tdc_tvm.schedules.kernel import ConvWeights, KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, ConvShape, Epilogue, TuckerConvShape

HOST = Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
DEVICE = DeviceSpec.from_target(HOST)
SAME = (1, 1, 1, 1)
PLAIN, FULL = Epilogue(), Epilogue(residual=True, clip_min=0.0, clip_max=1.5)


def stages_of(shape: ConvShape) -> tuple[Conv2dShape, ...]:
    return shape.stages if isinstance(shape, TuckerConvShape) else (shape,)


def reference_conv(x: np.ndarray, shape: Conv2dShape, weights: ConvWeights) -> np.ndarray:
    """NHWC convolution in float64, one window position at a time."""
    top, left, bottom, right = shape.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    per_in, per_out = shape.in_channels // shape.groups, shape.out_channels // shape.groups
    out = np.zeros((shape.batch, shape.out_height, shape.out_width, shape.out_channels))
    for r, s in itertools.product(range(shape.kernel[0]), range(shape.kernel[1])):
        y, z = r * shape.dilation[0], s * shape.dilation[1]
        taps = padded[:, y : y + (shape.out_height - 1) * shape.stride[0] + 1 : shape.stride[0]]
        taps = taps[:, :, z : z + (shape.out_width - 1) * shape.stride[1] + 1 : shape.stride[1]]
        for g in range(shape.groups):
            kernel = weights.kernel[g * per_out : (g + 1) * per_out, :, r, s].astype("float64")
            out[..., g * per_out : (g + 1) * per_out] += taps[..., g * per_in : (g + 1) * per_in] @ kernel.T
    return out if weights.bias is None else out + weights.bias


def relative_error(
    shape: ConvShape,
    config: KernelConfig | None = None,
    epilogue: Epilogue = PLAIN,
    biases: tuple[bool, ...] = (True, True, True),
    target: Target = HOST,
) -> float:
    """Build, run on poisoned outputs and compare; a fraction of the tolerance 1e-6 * sqrt(terms)."""
    rng = np.random.default_rng(7)
    stages = stages_of(shape)
    weights = tuple(
        ConvWeights(
            rng.standard_normal((s.out_channels, s.in_channels // s.groups, *s.kernel)).astype("float32"),
            rng.standard_normal(s.out_channels).astype("float32") if bias else None,
        )
        for s, bias in zip(stages, biases, strict=False)
    )
    device = DeviceSpec.from_target(target)
    config = config or conv.choose(shape, device)[0]
    kernel = conv.make_kernel(shape, epilogue, weights, config, device, "kernel")
    first, last = stages[0], stages[-1]
    x = rng.standard_normal((first.batch, first.height, first.width, first.in_channels)).astype("float32")
    extents = (last.batch, last.out_height, last.out_width, last.out_channels)
    residual = rng.standard_normal(extents).astype("float32")
    out = tvm.runtime.tensor(np.full(extents, np.nan, "float32"))
    with target:
        library = tvm.compile(tvm.IRModule({"kernel": kernel.func.with_attr("global_symbol", "kernel")}), target=target)
    extra = [residual] if epilogue.residual else []
    library["kernel"](*(tvm.runtime.tensor(array) for array in (x, *kernel.constants, *extra)), out)
    expected = x.astype("float64")
    for stage, w in zip(stages, weights, strict=True):
        expected = reference_conv(expected, stage, w)
    if epilogue.residual:
        expected = expected + residual
    if epilogue.clip_min is not None or epilogue.clip_max is not None:
        expected = np.clip(expected, epilogue.clip_min, epilogue.clip_max)
    terms = sum(stage.weight_count // stage.out_channels for stage in stages)
    found = out.numpy()
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-9) / (1e-6 * np.sqrt(terms)))


CONVOLUTIONS = {
    "3x3": Conv2dShape(1, 28, 28, 32, 64, (3, 3), (1, 1), SAME),
    "few pixels, many channels": Conv2dShape(1, 7, 7, 96, 160, (3, 3), (1, 1), SAME),
    "stem": Conv2dShape(1, 33, 31, 3, 24, (7, 7), (2, 2), (3, 3, 3, 3)),
    "pointwise": Conv2dShape(2, 9, 9, 40, 56),
    "strided pointwise": Conv2dShape(1, 15, 14, 24, 33, (1, 1), (2, 2)),
    "asymmetric, rectangular, dilated": Conv2dShape(2, 11, 9, 13, 19, (3, 2), (2, 1), (0, 1, 2, 3), (2, 2)),
    "one output channel": Conv2dShape(1, 8, 8, 5, 1, (3, 3), (1, 1), SAME),
    "one pixel": Conv2dShape(1, 1, 1, 17, 31),
    "row of pixels": Conv2dShape(1, 1, 97, 8, 16, (1, 5), (1, 1), (0, 2, 0, 2)),
    "stride larger than the window": Conv2dShape(1, 13, 13, 4, 8, (2, 2), (3, 3)),
    "padding wider than the image": Conv2dShape(1, 2, 2, 3, 5, (5, 5), (1, 1), (4, 4, 4, 4)),
    "grouped": Conv2dShape(1, 10, 10, 24, 40, (3, 3), (1, 1), SAME, groups=4),
    "grouped, full vectors": Conv2dShape(1, 9, 9, 64, 64, (3, 3), (2, 2), SAME, groups=2),
    "depthwise": Conv2dShape(2, 12, 13, 32, 32, (3, 3), (1, 1), SAME, groups=32),
    "depthwise, odd": Conv2dShape(1, 9, 9, 21, 21, (5, 5), (2, 2), (2, 2, 2, 2), groups=21),
    "depthwise, few channels": Conv2dShape(1, 9, 9, 3, 3, (3, 3), (1, 1), SAME, (2, 2), groups=3),
    "depthwise with multiplier": Conv2dShape(1, 6, 6, 4, 12, (3, 3), (1, 1), SAME, groups=4),
}

TUCKER = {
    "square": TuckerConvShape(Conv2dShape(1, 14, 14, 32, 48, (3, 3), (1, 1), SAME), 16, 32),
    "strided": TuckerConvShape(Conv2dShape(2, 9, 11, 20, 30, (3, 3), (2, 2), SAME), 7, 9),
    "few pixels": TuckerConvShape(Conv2dShape(1, 7, 7, 96, 96, (3, 3), (1, 1), SAME), 48, 40),
    "asymmetric": TuckerConvShape(Conv2dShape(1, 11, 13, 12, 17, (3, 5), (2, 1), (3, 0, 1, 2), (2, 1)), 5, 33),
    "no padding": TuckerConvShape(Conv2dShape(1, 9, 9, 8, 8, (3, 3)), 8, 8),
}


@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.parametrize("epilogue", [PLAIN, FULL], ids=str)
def test_convolution_matches_float64(shape: Conv2dShape, epilogue: Epilogue) -> None:
    assert relative_error(shape, epilogue=epilogue) < 1


@pytest.mark.parametrize("name", ["3x3", "asymmetric, rectangular, dilated", "pointwise", "grouped", "depthwise, odd"])
def test_every_candidate_is_right(name: str) -> None:
    shape = CONVOLUTIONS[name]
    for config in conv.candidates(shape, DEVICE)[::3]:
        assert conv.reject_reason(shape, config, DEVICE) == ""
        assert relative_error(shape, config) < 1, config


@pytest.mark.parametrize("shape", TUCKER.values(), ids=TUCKER.keys())
def test_every_tucker_candidate_is_right(shape: TuckerConvShape) -> None:
    configs = conv.candidates(shape, DEVICE)
    assert {config.strategy for config in configs} == {"fused_tile", "staged"}
    for config in configs:
        assert relative_error(shape, config, FULL) < 1, config


@pytest.mark.parametrize("biases", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("strategy", ["fused_tile", "staged"])
def test_tucker_pads_with_zeros_after_any_bias(biases: tuple[bool, ...], strategy: str) -> None:
    shape = TUCKER["strided"]
    config = next(config for config in conv.candidates(shape, DEVICE) if config.strategy == strategy)
    assert relative_error(shape, config, biases=biases) < 1


@pytest.mark.parametrize(
    "epilogue",
    [
        Epilogue(residual=True),
        Epilogue(clip_min=0.0),
        Epilogue(clip_max=0.5),
        Epilogue(True, 0.0),
        Epilogue(False, 0.0, 6.0),
    ],
    ids=str,
)
def test_tucker_epilogues(epilogue: Epilogue) -> None:
    assert relative_error(TUCKER["square"], epilogue=epilogue) < 1


@st.composite
def random_shapes(draw: st.DrawFn) -> Conv2dShape:
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    height = draw(st.integers(dilation[0] * (kernel[0] - 1) + 1, 17))
    width = draw(st.integers(dilation[1] * (kernel[1] - 1) + 1, 17))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = draw(st.integers(1, 20))
    return Conv2dShape(
        draw(st.integers(1, 2)),
        height,
        width,
        groups * channels,
        groups * draw(st.sampled_from([1, channels, 16, 37])),
        kernel,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding,
        dilation,
        groups,
    )


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(random_shapes())
def test_random_convolutions(shape: Conv2dShape) -> None:
    assert relative_error(shape, epilogue=FULL) < 1


@settings(max_examples=10, derandomize=True, deadline=None, database=None)
@given(random_shapes().filter(lambda shape: shape.groups == 1), st.integers(1, 20), st.integers(1, 40))
def test_random_tucker_convolutions(shape: Conv2dShape, rank_in: int, rank_out: int) -> None:
    assert relative_error(TuckerConvShape(shape, rank_in, rank_out)) < 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs code for other x86-64 processors")
@pytest.mark.parametrize("mcpu", ["haswell", "x86-64"])
@pytest.mark.parametrize("shape", [CONVOLUTIONS["3x3"], CONVOLUTIONS["depthwise"], TUCKER["square"]], ids=str)
def test_other_processors(shape: ConvShape, mcpu: str) -> None:
    assert relative_error(shape, epilogue=FULL, target=Target({"kind": "llvm", "mcpu": mcpu})) < 1


def test_choice_is_the_cheapest_candidate_and_repeats() -> None:
    for shape in (*CONVOLUTIONS.values(), *TUCKER.values()):
        config, estimate = conv.choose(shape, DEVICE)
        assert conv.choose(shape, DEVICE) == (config, estimate)
        costs = [conv.estimate(shape, candidate, DEVICE).latency_us for candidate in conv.candidates(shape, DEVICE)]
        assert estimate.latency_us == min(costs) > 0


@pytest.mark.parametrize(
    ("name", "parallel_over"),
    [("large image", "strips"), ("few pixels", "channels"), ("tiny", "nothing")],
)
def test_threads_share_what_there_is(name: str, parallel_over: str) -> None:
    shape = {
        "large image": Conv2dShape(1, 56, 56, 64, 64, (3, 3), (1, 1), SAME),
        "few pixels": Conv2dShape(1, 7, 7, 512, 512, (3, 3), (1, 1), SAME),
        "tiny": Conv2dShape(1, 4, 4, 8, 8),
    }[name]
    config, _ = conv.choose(shape, DEVICE)
    assert (config["strip"] < shape.out_height) == (parallel_over == "strips")
    assert (config["chunks"] > 1) == (parallel_over == "channels")


def test_kernel_is_private_marked_and_names_its_configuration() -> None:
    shape = TUCKER["square"]
    weights = tuple(ConvWeights(np.zeros((s.out_channels, s.in_channels, *s.kernel), "float32")) for s in shape.stages)
    config, _ = conv.choose(shape, DEVICE)
    func = conv.make_kernel(shape, PLAIN, weights, config, DEVICE, "kernel").func
    assert func.attrs["tirx.is_scheduled"]
    assert func.attrs["op_pattern"] == 8
    assert func.attrs["tdc.config"] == f"{config.strategy} {config}"
    assert "global_symbol" not in func.attrs


def test_what_cannot_run_is_refused_with_a_reason() -> None:
    shape = CONVOLUTIONS["3x3"]
    config, _ = conv.choose(shape, DEVICE)
    assert "'cuda'" in conv.reject_reason(shape, config, GPUS["H100"])
    assert "expected direct" in conv.reject_reason(shape, KernelConfig("fused_tile"), DEVICE)
    huge = Conv2dShape(1, 70000, 70000, 1, 1, (3, 3))
    with pytest.raises(TdcError, match="4,900,000,000 elements, 32-bit indices reach"):
        conv.choose(huge, DEVICE)


op = relax.op
OPERATORS = {
    "max pool": ([(1, 13, 13, 64)], lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), SAME, layout="NHWC")),
    "max pool, odd channels": ([(1, 9, 9, 5)], lambda x: op.nn.max_pool2d(x, (2, 2), (2, 2), layout="NHWC")),
    "average pool": ([(1, 28, 28, 32)], lambda x: op.nn.avg_pool2d(x, (2, 2), (2, 2), layout="NHWC")),
    "global pool": ([(1, 7, 7, 512)], lambda x: op.nn.adaptive_avg_pool2d(x, (1, 1), layout="NHWC")),
    "adaptive pool": ([(1, 7, 7, 64)], lambda x: op.nn.adaptive_avg_pool2d(x, (3, 2), layout="NHWC")),
    "mean": ([(2, 7, 7, 96)], lambda x: op.mean(x, [1, 2])),
    "mean along channels": ([(4, 50, 96)], lambda x: op.mean(x, [2])),
    "concat": ([(1, 14, 14, 64), (1, 14, 14, 32)], lambda a, b: op.concat([a, b], 3)),
    "concat, odd": ([(1, 9, 9, 13), (1, 9, 9, 7)], lambda a, b: op.concat([a, b], 3)),
    "concat of many": ([(1, 6, 6, 8)] * 7, lambda *parts: op.nn.relu(op.concat(parts, 3))),
    "concat, too few rows to share": ([(1, 1, 1, 40000), (1, 1, 1, 24)], lambda a, b: op.concat([a, b], 3)),
    "batch norm and relu": ([(1, 28, 28, 40), (40,), (40,)], lambda x, s, t: op.nn.relu(op.add(op.multiply(x, s), t))),
    "dense": ([(1, 512), (512, 1000), (1000,)], lambda x, w, b: op.nn.relu(op.add(op.matmul(x, w), b))),
    "dense, odd": ([(3, 101), (101, 37), (37,)], lambda x, w, b: op.add(op.matmul(x, w), b)),
    "dense, transposed weights": ([(1, 128), (96, 128)], lambda x, w: op.matmul(x, op.permute_dims(w))),
    "batched product": ([(2, 3, 20, 32), (2, 3, 32, 24)], op.matmul),
    "softmax": ([(5, 300)], lambda x: op.nn.softmax(x, -1)),
    "layer norm": ([(2, 40, 96), (96,), (96,)], lambda x, g, b: op.nn.layer_norm(x, g, b, [-1])),
    "to channels last": ([(1, 64, 20, 20)], lambda x: op.permute_dims(x, [0, 2, 3, 1])),
    "resize": ([(1, 7, 7, 64)], lambda x: op.image.resize2d(x, (14, 14), layout="NHWC", method="linear")),
    "argmax": ([(3, 100)], lambda x: op.argmax(x, 1)),
    "cumulative sum": ([(3, 100)], lambda x: op.cumsum(x, 1)),
    "pad": ([(1, 30, 30, 5)], lambda x: op.nn.pad(x, [0, 0, 1, 2, 1, 2, 0, 0])),
    "one element": ([(1,)], op.exp),
}


def relax_module(shapes: list[tuple[int, ...]], body) -> tvm.IRModule:  # type: ignore[no-untyped-def]
    builder = relax.BlockBuilder()
    params = [relax.Var(f"p{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit_output(body(*params))
        builder.emit_func_output(result)
    passes = [
        relax.transform.LegalizeOps(KEEP_NAN),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    with HOST:
        return tvm.transform.Sequential(passes)(builder.get())


def run(mod: tvm.IRModule, arrays: list[np.ndarray]) -> np.ndarray:
    with HOST:
        executable = tvm.compile(mod, target=HOST)
    vm = relax.VirtualMachine(executable, tvm.cpu())
    return vm["main"](*map(tvm.runtime.tensor, arrays)).numpy()


@pytest.mark.parametrize(("shapes", "body"), OPERATORS.values(), ids=OPERATORS.keys())
def test_generic_schedules_keep_the_result(shapes: list[tuple[int, ...]], body) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    mod = relax_module(shapes, body)
    with HOST:
        scheduled = ScheduleGenericCpu()(mod)
    for func in scheduled.functions.values():
        assert not isinstance(func, tirx.PrimFunc) or func.attrs["tirx.is_scheduled"]
    np.testing.assert_allclose(run(scheduled, arrays), run(mod, arrays), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dense", ["T.parallel", "T.vectorized", "T.unroll"]), ("max pool", ["T.vectorized"]), ("concat", ["T.parallel"])],
)
def test_generic_schedules_use_threads_and_lanes(name: str, expected: list[str]) -> None:
    mod = relax_module(*OPERATORS[name])
    (func,) = [func for func in mod.functions.values() if isinstance(func, tirx.PrimFunc)]
    text = schedule_function(func, DEVICE).script()
    assert all(word in text for word in expected)


def test_concatenation_asks_no_element_where_it_comes_from() -> None:
    mod = relax_module(*OPERATORS["concat of many"])
    (func,) = [func for func in mod.functions.values() if isinstance(func, tirx.PrimFunc)]
    lower = tvm.transform.Sequential(
        [
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
            s_tir.transform.ConvertBlocksToOpaque(),
            s_tir.transform.LowerOpaqueBlock(),
            s_tir.transform.StmtSimplify(),
        ]
    )
    assert "if_then_else" in lower(tvm.IRModule({"f": func})).script()
    assert "if_then_else" not in lower(tvm.IRModule({"f": schedule_function(func, DEVICE)})).script()


@T.prim_func(private=True, s_tir=True)
def opaque(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")) -> None:
    T.evaluate(T.call_packed("someone.elses", 1))
    for i in range(4):
        y[i] = x[3 - i]


@T.prim_func(private=True, s_tir=True)
def symbolic(a: T.handle, b: T.handle) -> None:
    n = T.int64()
    x = T.match_buffer(a, (n, 8))
    y = T.match_buffer(b, (n, 8))
    for i, j in T.grid(n, 8):
        with T.sblock("double"):
            v_i, v_j = T.axis.remap("SS", [i, j])
            y[v_i, v_j] = x[v_i, v_j] * T.float32(2)


@pytest.mark.parametrize("func", [opaque, symbolic], ids=["opaque", "symbolic"])
def test_strange_functions_pass_through_marked(func: tirx.PrimFunc) -> None:
    with HOST:
        mod = ScheduleGenericCpu()(tvm.IRModule({"f": func}))
    assert mod["f"].attrs["tirx.is_scheduled"]


def test_scheduled_functions_are_left_alone() -> None:
    func = symbolic.with_attr("tirx.is_scheduled", True)
    with HOST:
        mod = ScheduleGenericCpu()(tvm.IRModule({"f": func}))
    tvm.ir.assert_structural_equal(mod["f"], func)
