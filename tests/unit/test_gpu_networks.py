"""Whole networks for a GPU, their kernels emulated, and what TVM schedules compiled for the CPU."""

import numpy as np
import pytest
import tvm
import tvm_ffi
from cuda_emulator import Emulator
from onnx_models import ModelBuilder
from test_cuda_schedules import needs_compiler
from tvm import relax
from tvm.target import Target

from tdc_tvm.compiler import _compiling, _graph, _prepare, build
from tdc_tvm.errors import TdcError
from tdc_tvm.onnx_rewrite import simplify
from tdc_tvm.relay_passes.pipeline import lowering_passes
from tdc_tvm.schedules.cuda.lowering import CONFIG_ATTR
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
    features = b.conv(b.input("x", (2, 8, 7, 6)), 8, 16)
    for layer in range(3):
        channels = 16 + 8 * layer
        y = b.node("Relu", b.batch_norm(features, channels))
        y = b.node("Relu", b.batch_norm(b.conv(y, channels, 24), 24))
        x = b.tucker(y, 24, (8, 8), 8, pads=[1] * 4)
        features = b.node("Concat", features, x, axis=1)
    y = b.node("Relu", b.batch_norm(features, 40))
    return b.build(b.node("AveragePool", b.conv(y, 40, 20), kernel_shape=[2, 2], strides=[2, 2]))


@relax.expr_functor.mutator
class _Emulated(relax.PyExprMutator):
    """Calls of our kernels become calls of packed functions."""

    def __init__(self, mod, prefix):
        super().__init__(mod)
        self.mod, self.prefix, self.kernels = mod, prefix, {}

    def visit_call_(self, call):
        call = super().visit_call_(call)
        if call.op.name != "relax.call_tir" or CONFIG_ATTR not in (self.mod[call.args[0]].attrs or {}):
            return call
        name = str(call.args[0].name_hint)
        self.kernels[name] = self.mod[call.args[0]]
        types = call.ty_args[0]
        types = list(types.fields) if isinstance(types, relax.TupleType) else [types]
        return relax.call_dps_packed(self.prefix + name, call.args[1], types)


def graph_of(model, precision):
    """A network with kernels of an H100."""
    job = _prepare(model, "sm_90", precision, None, None, None, lambda step: None)
    simplify(job.proto)
    with _compiling(), job.target, tvm.transform.PassContext(opt_level=3):
        return _graph(job, lambda step: None)


def emulated_outputs(model, precision, values, folder):
    """What the kernels compute."""
    graph = graph_of(model, precision)
    prefix = f"tdc_test.{folder.name}."
    emulated = _Emulated(graph, prefix)
    main = emulated.visit_expr(graph["main"])
    mod = tvm.IRModule({"main": main})
    emulator = Emulator(emulated.kernels, folder)

    def make(name):
        def run(*tensors):
            arrays = [tensor.numpy() for tensor in tensors]
            emulator(name, arrays)
            for tensor, array in zip(tensors, arrays, strict=True):
                tensor.copyfrom(array)

        return run

    for name in emulated.kernels:
        tvm_ffi.register_global_func(prefix + name, make(name), override=True)
    target = Target("llvm")
    with target, tvm.transform.PassContext(opt_level=3):
        mod = tvm.transform.Sequential(lowering_passes(target))(mod)
        executable = relax.build(mod, target, relax_pipeline=None, tir_pipeline="default")
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](*(tvm.runtime.tensor(value) for value in values)).numpy()


@needs_compiler
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(("make", "shape"), [(network, (2, 3, 18, 14)), (dense_block, (2, 8, 7, 6))])
def test_a_network_is_right_in_every_precision(make, shape, precision, tmp_path):
    model = make()
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (expected,) = reference_outputs(model, {"x": x})
    have = emulated_outputs(model, precision, [x], tmp_path)
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
    assert types_of(main, "relax.nn.max_pool2d") == [dtype]
    assert types_of(main, "relax.concat") == ["float32"]  # with what the grouped convolution gives
    # The input; before and after the grouped convolution; what is averaged, in FP32; the output.
    assert types_of(main, "relax.astype") == [dtype, "float32", dtype, "float32"]
    assert types_of(main, "relax.mean") == ["float32"]


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
    assert len(types_of(main, "relax.concat")) == 3


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
