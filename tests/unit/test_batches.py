"""Several batch sizes in one library: what runs where, what is filled up, and what is refused."""

import json
import re
import warnings

import numpy as np
import pytest
import tvm
from onnx_models import ModelBuilder
from test_compiled_model import LAYOUTS, DLPackOnly
from tvm import relax

import tdc_tvm
from tdc_tvm.artifact import read_metadata
from tdc_tvm.compiler import _graph, _prepare, compiling, plan_build
from tdc_tvm.errors import TdcError
from tdc_tvm.relay_passes.link_entries import link_entries
from tdc_tvm.relay_passes.pipeline import lowering_passes
from tdc_tvm.report import BuildReport
from tdc_tvm.verify import reference_outputs, verify


def two_inputs():
    """Two inputs with a batch, one without; outputs with a batch."""
    b = ModelBuilder()
    x, y, scale = b.input("x", ("n", 3, 5)), b.input("y", ("n", 5)), b.input("scale", (5,))
    x = b.node("Add", x, b.node("Unsqueeze", y, b.weight(np.array([1]))))
    return b.build(b.node("Mul", x, scale), b.node("Relu", y))


def averaged():
    """An output without a batch."""
    b = ModelBuilder()
    x = b.input("x", ("n", 4))
    return b.build(b.node("ReduceMean", x, axes=[0]), b.node("Relu", x))


@pytest.fixture(scope="module")
def open_model(tucker_model):
    return tucker_model(batch="n")


@pytest.fixture(scope="module")
def built(open_model):
    return tdc_tvm.build(open_model, "llvm", batch=[4, 1])


@pytest.fixture(scope="module")
def library(built, tmp_path_factory):
    path = tmp_path_factory.mktemp("batches") / "m.so"
    built.export_library(path)
    return path


@pytest.fixture
def model(library):
    """One that has said nothing yet."""
    return tdc_tvm.load(library)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(5).standard_normal((5, 8, 6, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(open_model, images):
    return reference_outputs(open_model, {"x": images})[0]


def centered():
    """Images whose results depend on all of a batch."""
    b = ModelBuilder()
    x = b.input("x", ("n", 4))
    return b.build(b.node("Sub", b.node("Exp", x), b.node("ReduceMean", b.node("Exp", x), axes=[0])))


def test_verification_fills_a_batch_up_too(built, open_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detail = verify(built, open_model).detail
    assert re.search(r"batch 4: .*; batch 1: .*; batch 3, filled up: y differs by \S+ at magnitude", detail), detail


def test_a_batch_that_cannot_be_filled_up_rightly_is_told():
    with pytest.warns(UserWarning, match=r"a batch of 3, filled up .* is not right: .* differs .* depend on other"):
        built = tdc_tvm.build(centered(), "llvm", batch=[1, 4])
    assert built.report.verification.status == "passed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "filled up" not in verify(tdc_tvm.build(averaged(), "llvm", batch=[1, 4]), averaged()).detail


def test_the_sizes_that_were_built_run_as_they_are(model, images, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (1, 4, 1):
            y = model.run(images[:size])
            assert y.shape == (size, 8, 6, 6)
            np.testing.assert_allclose(y, expected[:size], atol=1e-5)


def test_a_size_between_is_filled_up_and_that_is_said_once(model, images, expected):
    model.run(np.full_like(images[:4], np.nan))  # what a call leaves must not reach the next one
    for size in (3, 2):
        with pytest.warns(UserWarning, match="a batch of") as said:
            results = [model.run(images[:size]) for _ in range(2)]
        (warning,) = said
        assert warning.filename == __file__
        assert str(warning.message).startswith(
            f"a batch of {size} runs as one of 4, filled up with zeros; the model was built for batches of 1, 4."
        )
        for y in results:
            assert y.shape == (size, 8, 6, 6)
            np.testing.assert_allclose(y, expected[:size], atol=1e-5)


@pytest.mark.filterwarnings("ignore:a batch of")
def test_any_tensor_is_filled_up(built, images, expected):
    cases = {name: change(images[:3]) for name, change in LAYOUTS.items()}
    cases |= {"DLPack": DLPackOnly(images[:3]), "TVM": tvm.runtime.tensor(images[:3])}
    for name, value in cases.items():
        np.testing.assert_allclose(built.run(value), expected[:3], atol=1e-5, err_msg=name)
    torch = pytest.importorskip("torch")
    y = built.run(torch.from_numpy(images[:3]))
    assert type(y) is torch.Tensor
    np.testing.assert_allclose(y.numpy(), expected[:3], atol=1e-5)


@pytest.mark.parametrize("size", [0, 5])
def test_other_sizes_are_refused(built, images, size):
    with pytest.raises(TdcError, match=f"found a batch of {size}; the model was built for batches of 1, 4: pass at le"):
        built.run(images[:size])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x[0], r"has shape \(8, 6, 6\); the model was built for \(4, 8, 6, 6\) or \(1, 8, 6, 6\)"),
        (lambda x: x[:2, :7], r"has shape \(2, 7, 6, 6\); the model was built for \(4, 8"),
        (lambda x: x[:2].astype(np.float64), "has dtype float64; expected float32"),
    ],
)
def test_values_that_do_not_fit(built, images, make, message):
    with pytest.raises(TdcError, match="input 'x' " + message):
        built.run(make(images))


@pytest.mark.filterwarnings("ignore:a batch of")
def test_inputs_without_a_batch_stay_as_they_are(tmp_path):
    model = two_inputs()
    built = tdc_tvm.build(model, "llvm", batch=(2, 5))
    rng = np.random.default_rng(0)
    for size in (2, 3, 5):
        values = {"x": (size, 3, 5), "y": (size, 5), "scale": (5,)}
        values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in values.items()}
        for have, want in zip(built.run(**values), reference_outputs(model, values), strict=True):
            np.testing.assert_allclose(have, want, atol=1e-6)
    with pytest.raises(TdcError, match=r"the inputs' batches differ \(x 5, y 3\); pass as many images in each"):
        built.run(values["x"], values["y"][:3], values["scale"])
    with pytest.raises(TdcError, match=r"input 'scale' has shape \(4,\); the model was built for \(5,\)$"):
        built.run(values["x"], values["y"], values["scale"][:4])


def test_an_output_without_a_batch_is_not_filled_up():
    model = averaged()
    built = tdc_tvm.build(model, "llvm", batch=[1, 3])
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    for size in (1, 3):
        for have, want in zip(built.run(x[:size]), reference_outputs(model, {"x": x[:size]}), strict=True):
            np.testing.assert_allclose(have, want)
    with pytest.raises(TdcError, match=r"found a batch of 2; .* batches of 1, 3\. It cannot be filled up to 3, as"):
        built.run(x[:2])


def test_a_single_size_is_as_before_and_not_filled_up(open_model, images, expected):
    built = tdc_tvm.build(open_model, "llvm", batch=4)
    (entry,) = built.entries
    assert (entry.function, entry.batch) == ("main", 4)
    assert "batch" not in built.report.verification.detail
    np.testing.assert_allclose(built.run(images[:4]), expected[:4], atol=1e-5)
    with pytest.raises(TdcError, match=r"a batch of 3; .* Pass 4 images, .* such as batch=\[3, 4\]"):
        built.run(images[:3])
    with pytest.raises(TdcError, match="built for batches of 4"):
        built.run(images)


def test_shapes_that_nobody_asked_for_are_not_filled_up(compiled, images):
    assert compiled.entry().batch is None
    with pytest.raises(TdcError, match=r"has shape \(0, 8, 6, 6\); the model was built for \(1, 8, 6, 6\)"):
        compiled.run(images[:0])
    with pytest.raises(TdcError, match="found batch=1; the model's shapes are fixed; leave batch"):
        compiled.benchmark(batch=1)


def test_the_first_size_is_main(built, library, images, expected):
    entries = read_metadata(library).entries
    assert entries == built.entries
    assert [(entry.function, entry.batch) for entry in entries] == [("main", 4), ("main_1", 1)]
    assert [entry.inputs[0].shape for entry in entries] == [(4, 8, 6, 6), (1, 8, 6, 6)]
    assert [entry.outputs[0].shape for entry in entries] == [(4, 8, 6, 6), (1, 8, 6, 6)]
    assert (built.inputs, built.outputs) == (entries[0].inputs, entries[0].outputs)
    y = built.machine["main_1"](tvm.runtime.tensor(images[:1])).numpy()
    np.testing.assert_allclose(y, expected[:1], atol=1e-5)
    assert "x[4, 8, 6, 6], x[1, 8, 6, 6]" in repr(built)


def test_every_size_is_measured_and_compared(built, open_model, tucker_model):
    assert built.benchmark(batch=1, warmup=0, repeat=2).shape == (2,)
    with pytest.raises(TdcError, match="found batch=2; the model was built for batches of 1, 4; leave batch"):
        built.benchmark(batch=2)
    detail = built.report.verification.detail
    assert "batch 4: y differs by" in detail
    assert "batch 1: y differs by" in detail
    assert verify(built, open_model, seed=3).status == "passed"
    with pytest.raises(TdcError, match="'x' is declared as"):
        verify(built, tucker_model())


def test_the_report_has_the_layers_of_every_size(built, open_model):
    report = built.report
    assert [r.batch for r in (report, *report.further)] == [4, 1]
    assert [r.layers[0].shape for r in (report, *report.further)] == ["4x6x6x8 -> 8, 3x3", "1x6x6x8 -> 8, 3x3"]
    assert report.macs == 4 * report.further[0].macs
    assert BuildReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert "1 layer on " in str(report)
    for line in ("fp32 at batch 4", "batch 4: ", "batch 1: ", " us predicted for all layers"):
        assert line in str(report)
    assert "model at batch 1, us:" in str(report.predictions())
    plan = plan_build(open_model, "llvm", batch=[4, 1])
    assert (plan.layers, plan.further[0].layers) == (report.layers, report.further[0].layers)


@pytest.mark.parametrize("batch", [[], [1, 1], 0, [1, 0], -1, "1", 1.5, [1, 2.5], [None], True])
def test_what_is_no_batch(batch):
    for make in (tdc_tvm.build, plan_build):
        with pytest.raises(TdcError, match=r"batch is .*; expected a whole number from 1 on, such as 1, or several"):
            make("absent.onnx", "llvm", batch=batch)


def test_a_model_of_one_size_is_built_for_no_other(tucker_model):
    with pytest.raises(TdcError, match="batch=8 fits no input, the model's shapes are fixed"):
        tdc_tvm.build(tucker_model(), "llvm", batch=[1, 8])


def test_equal_weights_are_stored_once(tmp_path):
    b = ModelBuilder()
    x = b.input("x", ("n", 500))
    model = b.build(b.node("MatMul", x, b.random((500, 400))))
    sizes = {}
    for batch in (1, [1, 2, 3]):
        tdc_tvm.build(model, "llvm", batch=batch).export_library(tmp_path / "m.so")
        sizes[str(batch)] = (tmp_path / "m.so").stat().st_size
    assert sizes["[1, 2, 3]"] < 1.5 * sizes["1"]


@pytest.mark.parametrize("target", ["llvm", "sm_90"])
def test_linking_changes_no_entry(open_model, target):
    """The memory of each is planned as if it were alone, and equal kernels are shared."""
    source = _prepare(open_model, target, "fp32", None, None, 4, lambda step: None)

    def lowered(mod):
        return tvm.transform.Sequential(lowering_passes(source.target))(mod)

    def calls(function):
        text = function.script(show_meta=False)
        return {op: text.count(op) for op in ("alloc_storage", "alloc_tensor", "kill_object", "vm.builtin.reshape")}

    with compiling(), source.target, tvm.transform.PassContext(opt_level=3):
        graphs = {
            name: _graph(source.at(size), lambda step: None) for name, size in (("main", 4), ("main_1", 1), ("same", 4))
        }
        linked = lowered(link_entries(graphs))
        alone = {name: lowered(mod) for name, mod in graphs.items()}
    suffixes = ("", "_with_storage") if target == "sm_90" else ("",)
    functions = {var.name_hint: f for var, f in linked.functions_items() if isinstance(f, relax.Function)}
    assert set(functions) == {name + suffix for name in graphs for suffix in suffixes}
    for name, mod in alone.items():
        for suffix in suffixes:
            assert calls(functions[name + suffix]) == calls(mod["main" + suffix])
    kernels = {name: len(mod.functions) - len(suffixes) for name, mod in alone.items()}
    assert len(linked.functions) - len(functions) <= kernels["main"] + kernels["main_1"]
    names = {str(f.attrs["global_symbol"]) for f in linked.functions.values()}
    assert names == {var.name_hint for var in linked.get_global_vars()}


def test_one_graph_stays_as_it_is(open_model):
    source = _prepare(open_model, "llvm", "fp32", None, None, 4, lambda step: None)
    with source.target:
        mod = _graph(source.at(4), lambda step: None)
    assert link_entries({"main": mod}).same_as(mod)
