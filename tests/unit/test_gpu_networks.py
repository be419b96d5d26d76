"""Whole networks for a GPU, their kernels emulated, and what TVM schedules compiled for the CPU."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
import tvm_ffi
from cuda_emulator import Emulator
from onnx_models import ModelBuilder
from test_cuda_schedules import SAME, gpu_check, needs_compiler
from tvm import relax
from tvm.target import Target

from tdc_tvm.compiler import _graph, _prepare, build, compiling
from tdc_tvm.errors import TdcError
from tdc_tvm.relay_passes.pipeline import lowering_passes
from tdc_tvm.schedules.cuda.fold_width import Folded
from tdc_tvm.schedules.cuda.lowering import CONFIG_ATTR
from tdc_tvm.schedules.device import GPUS
from tdc_tvm.schedules.kernel import ConvWeights
from tdc_tvm.schedules.shape import Conv2dShape
from tdc_tvm.verify import reference_outputs

TOLERANCE = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 5e-3}


def network(batch=2):
    """A stem, a pool, a Tucker layer with a residual, a grouped convolution, a concatenation and two dense layers."""
    b = ModelBuilder(seed=3)
    x = b.input("x", (batch, 3, 18, 14))
    x = b.node("Relu", b.conv(x, 3, 16, 5, bias=True, strides=[2, 2], pads=[2] * 4))
    x = b.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = b.tucker(x, 16, (8, 12), 16, pads=[1] * 4, biases=(False, False, True))
    y = b.node("Relu", b.node("Add", y, x))
    z = b.conv(y, 16, 16, 3, pads=[1] * 4, group=16)
    y = b.node("Concat", y, z, axis=1)
    y = b.node("Flatten", b.node("GlobalAveragePool", y))
    y = b.node("Relu", b.node("Gemm", y, b.random((24, 32)), b.random((24,)), transB=1))
    y = b.node("Add", b.node("MatMul", y, b.random((24, 10))), b.random((10,)))
    return b.build(y)


def dense_block():
    """As in a DenseNet: what three layers give, each normalised where the next one reads it."""
    b = ModelBuilder(seed=4)
    features = b.node("MaxPool", b.conv(b.input("x", (2, 8, 7, 6)), 8, 32), kernel_shape=[1, 1])
    for layer in range(3):
        channels = 32 + 32 * layer
        y = b.node("Relu", b.batch_norm(features, channels))
        y = b.node("Relu", b.batch_norm(b.conv(y, channels, 24), 24))
        x = b.tucker(y, 24, (8, 8), 32, pads=[1] * 4)
        features = b.node("Concat", features, x, axis=1)
    y = b.node("Relu", b.batch_norm(features, 128))
    return b.build(b.node("AveragePool", b.conv(y, 128, 20), kernel_shape=[2, 2], strides=[2, 2]))


@relax.expr_functor.mutator
class _Emulated(relax.PyExprMutator):
    """Calls of our kernels become calls of packed functions."""

    def __init__(self, mod, prefix):
        super().__init__(mod)
        self.mod, self.prefix, self.kernels, self.operands = mod, prefix, {}, {}

    def visit_call_(self, call):
        call = super().visit_call_(call)
        in_place = call.op.name == "relax.call_tir_inplace"
        if not (in_place or call.op.name == "relax.call_tir"):
            return call
        if CONFIG_ATTR not in (self.mod[call.args[0]].attrs or {}):
            return call
        name = str(call.args[0].name_hint)
        types = call.ty_args[0]
        types = list(types.fields) if isinstance(types, relax.TupleType) else [types]
        self.kernels[name] = self.mod[call.args[0]]
        if in_place:
            # Emulated as a function of the tensor before: the last operand, a copy of which becomes the first result.
            self.operands[name] = len(call.args[1].fields)
        return relax.call_dps_packed(self.prefix + name, call.args[1], types)


def graph_of(model, precision):
    """A network with kernels of an H100."""
    source = _prepare(model, "sm_90", precision, None, None, None, lambda step: None)
    job = source.at(None)
    with compiling(), source.target, tvm.transform.PassContext(opt_level=3):
        return _graph(job, lambda step: None)


def emulated_outputs(model, precision, values, folder):
    """What the kernels compute."""
    graph = graph_of(model, precision)
    prefix = f"tdc_test.{folder.name}."
    emulated = _Emulated(graph, prefix)
    main = emulated.visit_expr(graph["main"])
    others = {var: func for var, func in graph.functions_items() if isinstance(func, tvm.tirx.PrimFunc)}
    kept = {var: func for var, func in others.items() if CONFIG_ATTR not in (func.attrs or {})}
    mod = tvm.IRModule({"main": main, **kept})
    emulator = Emulator(emulated.kernels, folder)

    def make(name):
        def run(*tensors):
            arrays = [tensor.numpy() for tensor in tensors]
            count = emulated.operands.get(name, 0)
            if count:
                base = arrays.pop(count - 1)
                arrays[count - 1] = base.copy()
            emulator(name, arrays)
            written = tensors[count:]
            for tensor, array in zip(written, arrays[-len(written) :], strict=True):
                tensor.copyfrom(array)

        return run

    for name in emulated.kernels:
        tvm_ffi.register_global_func(prefix + name, make(name), override=True)
    target = Target("llvm")
    with target, tvm.transform.PassContext(opt_level=3):
        mod = tvm.transform.Sequential(lowering_passes(target))(mod)
        executable = relax.build(mod, target, relax_pipeline=None, tir_pipeline="default")
    machine = relax.VirtualMachine(executable, tvm.cpu())
    outputs = machine["main"](*(tvm.runtime.tensor(value) for value in values))
    return [one.numpy() for one in (outputs if isinstance(outputs, tvm_ffi.Array) else [outputs])]


@needs_compiler
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("make", ["network", "dense_block", "classifier"])
def test_a_network_is_right_in_every_precision(make, precision, tmp_path):
    model = globals()[make]()
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (expected,) = reference_outputs(model, {"x": x})
    (have,) = emulated_outputs(model, precision, [x], tmp_path)
    assert have.dtype == expected.dtype
    error = np.linalg.norm(have - expected) / np.linalg.norm(expected)
    assert error <= TOLERANCE[precision]


def types_of(main, op):
    """The element types of the results of an operator, in order."""
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    return [str(b.var.ty.dtype) for b in bindings if isinstance(b.value, relax.Call) and b.value.op.name == op]


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_activations_stay_as_kernels_store_them(precision, dtype):
    main = graph_of(network(), precision)["main"]
    assert types_of(main, "relax.nn.max_pool2d") == types_of(main, "relax.mean") == []
    assert types_of(main, "relax.concat") == ["float32"]  # with what the grouped convolution gives
    # Of the input; for the grouped convolution; for the average behind it.  The last layer gives FP32.
    assert types_of(main, "relax.astype") == [dtype, "float32", dtype]


def test_activations_are_rounded_to_tf32_not_cut_off(tmp_path):
    """Cut off in each layer, results of positive numbers would all be too small, by 1.8e-4 a layer."""
    b = ModelBuilder(seed=8)
    x = b.input("x", (1, 3, 10, 8))
    for kernel, channels, size in ((3, 3, 24), (1, 24, 33), (1, 33, 24), (1, 24, 16), (3, 16, 16)):
        pads = [kernel // 2] * 4
        values = np.random.default_rng(size).standard_normal((size, channels, kernel, kernel))
        weight = b.weight(np.abs(values).astype(np.float32))
        x = b.node("Relu", b.node("Conv", x, weight, kernel_shape=[kernel, kernel], pads=pads))
    model = b.build(x)
    image = np.random.default_rng(0).uniform(0.5, 1.5, (1, 3, 10, 8)).astype(np.float32)
    (expected,) = reference_outputs(model, {"x": image})
    (have,) = emulated_outputs(model, "tf32", [image], tmp_path)
    assert abs((have / expected - 1).mean()) < 5e-5


def test_tf32_stores_fp32():
    main = graph_of(network(), "tf32")["main"]
    assert types_of(main, "relax.astype") == []


@needs_compiler
def test_bf16_builds():
    report = build(network(), "sm_90", "bf16", verify=False).report
    assert report.precision == "bf16"
    assert [layer.shape.rpartition(" ")[2] for layer in report.layers] == ["bf16", "bf16", "16", "bf16", "bf16"]


def test_normalisation_and_activation_before_a_convolution_are_its_prologue():
    main = graph_of(dense_block(), "fp32")["main"]
    for op in ("multiply", "add", "nn.relu"):
        assert types_of(main, f"relax.{op}") == []


def test_what_is_concatenated_is_written_where_it_will_stand():
    main = graph_of(dense_block(), "fp16")["main"]
    assert types_of(main, "relax.concat") == []
    assert types_of(main, "relax.call_tir_inplace") == ["float16"] * 3


def test_dense_layers_take_bias_and_activation_along():
    main = graph_of(network(), "fp32")["main"]
    assert types_of(main, "relax.matmul") == types_of(main, "relax.add") == types_of(main, "relax.nn.relu") == []


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("sm_75", "tf32", r"RTX 2080 Ti \(cuda\) computes in fp32 or fp16, not in tf32"),
        ("llvm", "fp16", r"\(llvm\) computes in fp32, not in fp16"),
        ("llvm", "int8", "precision 'int8' is not supported; use one of fp32, tf32, fp16, bf16"),
    ],
)
def test_precisions_that_a_device_does_not_have(target, precision, message):
    with pytest.raises(TdcError, match=message):
        build(network(), target, precision, verify=False)


def concatenation(after=lambda b, parts: b.node("Concat", *parts, axis=1), channels=32):
    """Two convolutions of what one gives, and what ``after`` makes of all three."""
    b = ModelBuilder(seed=5)
    x = b.conv(b.input("x", (1, 8, 6, 5)), 8, 32)
    parts = [x, b.conv(x, 32, channels), b.conv(x, 32, 32, 3, pads=[1] * 4)]
    return b.build(after(b, parts))


def read_besides(b, parts):
    return b.node("Concat", b.node("Sigmoid", parts[1]), b.node("Concat", *parts, axis=1), axis=1)


def begins_and_ends_with_two(b, parts):
    return b.node(
        "Concat", b.node("Concat", *parts[:2], axis=1), parts[2], b.node("Concat", *parts[:2], axis=1), axis=1
    )


def two_read_by_another_operator(b, parts):
    two = b.node("Concat", *parts[:2], axis=1)
    return b.node("Concat", b.node("Concat", two, parts[2], axis=1), b.node("Sigmoid", two), axis=1)


def one_twice(b, parts):
    return b.node("Concat", *parts, parts[1], axis=1)


def first_is_last(b, parts):
    return b.node("Concat", b.node("Sigmoid", parts[2]), parts[1], axis=1)


def of_rows(b, parts):
    return b.node("Concat", *parts, axis=2)


@needs_compiler
@pytest.mark.parametrize(
    ("model", "in_place"),
    [
        (concatenation(), 2),
        (concatenation(channels=24), 0),
        (concatenation(read_besides), 0),
        (concatenation(begins_and_ends_with_two), 1),
        (concatenation(two_read_by_another_operator), 1),
        (concatenation(one_twice), 0),
        (concatenation(first_is_last), 0),
        (concatenation(of_rows), 0),
    ],
    ids=lambda value: "" if isinstance(value, int) else None,
)
def test_concatenations_in_place_and_others(model, in_place, tmp_path):
    x = np.random.default_rng(0).standard_normal((1, 8, 6, 5)).astype(np.float32)
    (expected,) = reference_outputs(model, {"x": x})
    assert len(types_of(graph_of(model, "fp32")["main"], "relax.call_tir_inplace")) == in_place
    (have,) = emulated_outputs(model, "fp32", [x], tmp_path)
    np.testing.assert_allclose(have, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "channels", "pitch", "depth"),
    [
        # Seven pixels of four channels, and of the next pixel's to whole vectors.
        (Conv2dShape(1, 224, 224, 3, 64, (7, 7), (2, 2), (3, 3, 3, 3), precision="fp16"), 4, 8, 32),
        (Conv2dShape(1, 224, 224, 3, 64, (7, 7), (2, 2), (3, 3, 3, 3)), 4, 8, 28),
        (Conv2dShape(2, 9, 8, 3, 16, (3, 3), (1, 1), SAME, precision="fp16"), 8, 8, 24),
        (Conv2dShape(2, 9, 8, 1, 16, (2, 4), (1, 3), (0, 2, 1, 0)), 4, 12, 16),
        (Conv2dShape(1, 6, 5, 8, 16, (3, 5), (1, 1), (1, 4, 2, 3), (2, 1)), 8, 8, 40),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_nchw", [False, True])
def test_rows_of_a_window_become_channels(shape, channels, pitch, depth, is_nchw, tmp_path):
    folded = Folded.of(shape)
    assert (folded.channels, folded.pitch, folded.shape.in_channels) == (channels, pitch, depth)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((shape.batch, shape.height, shape.width, shape.in_channels)).astype(shape.dtype)
    kernel = rng.standard_normal((shape.out_channels, shape.in_channels, *shape.kernel)).astype(np.float32)
    weights = ConvWeights(kernel)
    kernel = folded.make_kernel(GPUS["H100"], "pack", is_nchw)
    packed = np.full((shape.batch, shape.height, folded.columns, pitch), np.nan, shape.dtype)
    given = np.ascontiguousarray(x.astype(np.float32).transpose(0, 3, 1, 2)) if is_nchw else x
    Emulator({"pack": kernel.func}, tmp_path)("pack", [given, packed])
    flat = packed.reshape(shape.batch, shape.height, -1)
    pixels = [flat[..., start : start + depth] for start in range(0, shape.out_width * pitch, pitch)]
    have = gpu_check.convolve(folded.shape, np.stack(pixels, axis=2), folded.weights(weights))
    np.testing.assert_allclose(have, gpu_check.convolve(shape, x, weights), atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [{"in_channels": 16}, {"groups": 2}, {"kernel": (3, 1)}, {"dilation": (1, 2), "padding": (2, 2, 2, 2)}],
    ids=str,
)
def test_convolutions_that_are_not_folded(changes):
    assert Folded.of(replace(Conv2dShape(1, 9, 9, 4, 16, (3, 3), padding=SAME), **changes)) is None


def classifier():
    """As in VGG: an average that is the identity, and a dense layer that reads all pixels of an image."""
    b = ModelBuilder(seed=6)
    x = b.node("Relu", b.conv(b.input("x", (2, 8, 6, 4)), 8, 16, 3, pads=[1] * 4, bias=True))
    x = b.node("AveragePool", b.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), kernel_shape=[1, 1])
    x = b.node("Gemm", b.node("Flatten", x), b.random((40, 16 * 6)), b.random((40,)), transB=1)
    return b.build(b.node("Relu", x))


def test_a_dense_layer_reads_images_as_they_lie():
    main = graph_of(classifier(), "fp16")["main"]
    assert not types_of(main, "relax.permute_dims")
    assert len(types_of(main, "relax.call_tir")) == 3  # folded input, convolution with maxima, dense layer


def maxima(after, size=(8, 6), **conv):
    """A convolution and what ``after`` makes of it, with maxima of 2x2 at stride 2 if it does not say otherwise."""
    b = ModelBuilder(seed=7)
    x = b.conv(b.input("x", (2, 16, *size)), 16, 32, **{"kernel": 3, "pads": [1] * 4, "bias": True} | conv)

    def pool(x, **attributes):
        return b.node("MaxPool", x, **{"kernel_shape": [2, 2], "strides": [2, 2]} | attributes)

    return b.build(*after(b, x, pool))


def with_residual(b, x, pool):
    y = b.tucker(x, 32, (8, 8), 32, biases=(True, False, True))
    return [b.node("Sigmoid", pool(b.node("Relu", b.node("Add", y, x))))]


def read_by_two(b, x, pool):
    return [b.conv(x, 32, 8), pool(x)]


def maxima_read_by_two(b, x, pool):
    y = pool(x)
    return [b.conv(y, 32, 8), b.node("Sigmoid", y)]


def concatenated(b, x, pool):
    x = b.node("Relu", b.conv(x, 32, 32))
    return [b.node("Concat", pool(b.conv(x, 32, 32)), pool(b.tucker(x, 32, (8, 8), 64)), axis=1)]


@needs_compiler
@pytest.mark.parametrize(
    ("model", "pools"),
    [
        (maxima(lambda b, x, pool: [pool(b.node("Relu", x))]), 0),
        (maxima(lambda b, x, pool: [b.node("Relu", pool(x))], (7, 9)), 0),
        (maxima(lambda b, x, pool: [pool(pool(x))]), 1),
        (maxima(lambda b, x, pool: [pool(x, ceil_mode=1)]), 0),
        (maxima(lambda b, x, pool: [pool(x, ceil_mode=1)], (7, 6)), 1),
        (maxima(lambda b, x, pool: [pool(x, kernel_shape=[3, 3])]), 1),
        (maxima(lambda b, x, pool: [pool(x, strides=[1, 2])]), 1),
        (maxima(lambda b, x, pool: [pool(x, pads=[1, 0, 1, 0])]), 1),
        (maxima(lambda b, x, pool: [pool(x, dilations=[2, 1])]), 1),
        (maxima(lambda b, x, pool: [pool(x)], group=4), 1),
        (maxima(with_residual, (9, 6)), 0),
        (maxima(read_by_two), 1),
        (maxima(maxima_read_by_two), 0),
        (maxima(concatenated), 0),
    ],
    ids=lambda value: "" if isinstance(value, int) else None,
)
def test_maxima_that_a_convolution_takes_and_others(model, pools, tmp_path):
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    kernels = [str(var.name_hint) for var in graph_of(model, "fp32").functions]
    assert sum(kernel.startswith("pool2d") for kernel in kernels) == pools
    have = emulated_outputs(model, "fp32", [x], tmp_path)
    for one, expected in zip(have, reference_outputs(model, {"x": x}), strict=True):
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-5)


def test_reshapes_are_views():
    target = Target("nvidia/nvidia-h100")
    with target:
        mod = tvm.transform.Sequential(lowering_passes(target))(graph_of(classifier(), "fp32"))
    kernels = [str(var.name_hint) for var, func in mod.functions_items() if isinstance(func, tvm.tirx.PrimFunc)]
    assert sorted(kernels) == ["conv2d", "conv2d1", "fused_transpose_fold_width"]
