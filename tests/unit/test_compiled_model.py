"""Running models: what goes in and out, and what is refused."""

import gc
import os
import subprocess
import sys
import tempfile
import threading

import numpy as np
import onnx
import pytest
import tvm
from tvm.target import Target

import tdc_tvm
from tdc_tvm.compiled_model import random_inputs
from tdc_tvm.errors import TdcError
from tdc_tvm.onnx_model import TensorInfo
from tdc_tvm.quiet import without_chatter

LAYOUTS = {
    "as it is": lambda x: x,
    "Fortran order": np.asfortranarray,
    "channels last in memory": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "reversed": lambda x: x[:, :, ::-1].copy()[:, :, ::-1],
    "every other column": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
    "big-endian": lambda x: x.astype(">f4"),
    "one byte off": lambda x: np.frombuffer(b"\0" + x.tobytes(), np.float32, x.size, offset=1).reshape(x.shape),
    "one element off": lambda x: np.concatenate([x[:1, 0, 0, 0], x.ravel()])[1:].reshape(x.shape),
}


class DLPackOnly:
    """The least that a DLPack tensor has: no shape, no dtype."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.fixture(scope="module", params=["built", "loaded"])
def model(request, compiled, library):
    return compiled if request.param == "built" else tdc_tvm.load(library)


def same(have, want):
    np.testing.assert_allclose(have, want, atol=1e-5)


def test_positional_and_named(model, x, y):
    for result in (model.run(x), model.run(x=x)):
        assert type(result) is np.ndarray
        assert result.dtype == np.float32
        same(result, y)


@pytest.mark.parametrize("source", ["path", "text", "bytes", "proto"])
def test_a_model_is_a_path_bytes_or_a_proto(model_path, source, x, y):
    given = {
        "path": model_path,
        "text": str(model_path),
        "bytes": model_path.read_bytes(),
        "proto": onnx.load(model_path),
    }[source]
    before = given.SerializeToString() if source == "proto" else None
    result = tdc_tvm.build(given, "llvm", verify=False)
    same(result.run(x), y)
    if before:
        assert given.SerializeToString() == before
    assert result.report.verification.status == "skipped"


def test_a_lesser_cpu(model_path, library, x, y):
    lesser = tdc_tvm.build(model_path, Target({"kind": "llvm", "mcpu": "x86-64-v2"}))
    same(lesser.run(x), y)
    assert lesser.metadata.arch == "x86-64-v2"
    assert "avx2" not in lesser.metadata.cpu_features


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_a_numpy_array(compiled, x, y, layout):
    same(compiled.run(LAYOUTS[layout](x)), y)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("big-endian", "one byte off")])
def test_any_layout_of_a_dlpack_tensor(compiled, x, y, layout):
    result = compiled.run(DLPackOnly(LAYOUTS[layout](x)))
    assert type(result) is np.ndarray
    same(result, y)


def test_tvm_tensors(compiled, x, y):
    same(compiled.run(tvm.runtime.tensor(x)), y)


def test_torch_tensors(compiled, x, y):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(x.copy())
    shifted = torch.zeros(x.size + 1)[1:].view(x.shape)
    shifted.copy_(tensor)
    cases = {
        "plain": tensor,
        "requires grad": tensor.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(tensor),
        "channels last": tensor.contiguous(memory_format=torch.channels_last),
        "slice": torch.cat([tensor, tensor], dim=3)[..., :6],
        "not aligned": shifted,
        "lazily negated": torch._neg_view(-tensor),
    }
    for name, value in cases.items():
        result = compiled.run(value)
        assert type(result) is torch.Tensor, name
        assert not result.requires_grad
        same(result.numpy(), y)


@pytest.mark.parametrize("convert", ["to_sparse", "double", "half", "meta"])
def test_unfit_torch_tensors_are_refused(compiled, x, convert):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(x)
    value = tensor.to("meta") if convert == "meta" else getattr(tensor, convert)()
    with pytest.raises(TdcError, match=r"input 'x'.*(expected float32|pass a dense, contiguous tensor)"):
        compiled.run(value)


def test_results_do_not_change_afterwards(compiled, x):
    torch = pytest.importorskip("torch")
    for convert in (np.asarray, torch.from_numpy):
        first = compiled.run(convert(x))
        kept = np.asarray(first).copy()
        for seed in range(5):
            compiled.run(convert(random_inputs(compiled.inputs, seed)[0]))
        assert np.array_equal(first, kept)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"missing input\(s\) x; the model takes x: float32\[1, 8, 6, 6\]"),
        (("x", "x"), {}, "found 2 inputs, the model takes 1"),
        (("x",), {"x": "x"}, "input 'x' is given twice, by position and by name"),
        ((), {"X": "x"}, "no input 'X'; its inputs are x: float32"),
        (("x",), {"z": "x"}, "no input 'z'; its inputs are x: float32"),
    ],
)
def test_inputs_that_do_not_fit_the_signature(model, x, args, kwargs, message):
    with pytest.raises(TdcError, match=message):
        model.run(*(x for _ in args), **{name: x for name in kwargs})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x[0], r"has shape \(8, 6, 6\); the model was built for \(1, 8, 6, 6\)"),
        (lambda x: np.concatenate([x, x]), r"has shape \(2, 8, 6, 6\); the model was built for"),
        (lambda x: np.array(1, np.float32), r"has shape \(\); the model was built for"),
        (lambda x: x.astype(np.float64), r"has dtype float64; expected float32 \(convert it first\)"),
        (lambda x: x.astype(np.float16), "has dtype float16; expected float32"),
        (lambda x: x.astype(object), "has dtype object; expected float32"),
        (lambda x: DLPackOnly(x[0]), r"has shape \(8, 6, 6\); the model was built for"),
        (lambda x: DLPackOnly(x.astype(np.float64)), "has dtype float64; expected float32"),
        (lambda x: x.tolist(), "is a list; expected a NumPy array or a DLPack tensor"),
        (lambda x: {"x": x}, "is a dict; expected a NumPy array or a DLPack tensor"),
        (lambda x: None, "is a NoneType; expected a NumPy array"),
        (lambda x: 1.0, "is a float; expected a NumPy array"),
    ],
)
def test_values_that_do_not_fit(model, x, make, message):
    with pytest.raises(TdcError, match="input 'x' " + message):
        model.run(make(x))


def test_names_that_are_no_identifiers_and_several_outputs(two_inputs, tmp_path):
    a, scale = np.array([[1, -2, 3], [-4, 5, -6]], np.float32), np.array(2, np.float32)
    two_inputs.export_library(tmp_path / "m.so")
    for model in (two_inputs, tdc_tvm.load(tmp_path / "m.so")):
        for result in (model.run(a, scale), model.run(a, self=scale), model.run(**{"in/put.1": a, "self": scale})):
            assert isinstance(result, tuple)
            np.testing.assert_array_equal(result[0], 2 * a)
            np.testing.assert_array_equal(result[1], np.maximum(2 * a, 0))
    with pytest.raises(TdcError, match=r"missing input\(s\) in/put.1; the model takes in/put.1: float32\[2, 3\], self"):
        two_inputs.run(self=scale)


def test_one_torch_tensor_makes_all_outputs_torch(two_inputs):
    torch = pytest.importorskip("torch")
    results = two_inputs.run(np.ones((2, 3), np.float32), torch.tensor(3.0))
    assert [type(result) for result in results] == [torch.Tensor] * 2
    assert results[0].tolist() == [[3.0] * 3] * 2


@pytest.mark.parametrize("fresh", [False, True])
def test_threads_may_share_a_model(compiled, library, fresh):
    """With a fresh model, the threads also race to start it."""
    inputs = [random_inputs(compiled.inputs, seed)[0] for seed in range(6)]
    expected = [compiled.run(value) for value in inputs]
    code = compiled._code if fresh else None
    shared = tdc_tvm.CompiledModel(compiled.metadata, code) if fresh else tdc_tvm.load(library)
    wrong = []

    def work(value, want):
        for _ in range(100):
            if not np.array_equal(shared.run(value), want):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_replaced_file_is_loaded_anew(tucker_model, tmp_path, monkeypatch, x, y):
    """The dynamic linker hands out the code it has under a file's name, unless it is told apart."""
    monkeypatch.chdir(tmp_path)
    results = []
    for scale in (1, 3):
        tdc_tvm.build(tucker_model(scale), "llvm", verify=False).export_library("m.so")
        results.append(tdc_tvm.load("m.so"))
    same(results[0].run(x), y)
    same(results[1].run(x), 3 * y)
    with pytest.raises(
        TdcError, match=r"m\.so, which this model was loaded from, is gone or has changed since; load it"
    ):
        results[0].export_library("again.so")
    results[1].export_library("again.so")
    os.unlink("m.so")
    same(tdc_tvm.load("again.so").run(x), 3 * y)
    same(results[1].run(x), 3 * y)
    with pytest.raises(TdcError, match="is gone or has changed"):
        results[1].export_library("more.so")


def test_loading_twice_and_exporting_again(library, tmp_path, x, y):
    first, second = tdc_tvm.load(library), tdc_tvm.load(library)
    first.export_library(tmp_path / "copy.so")
    assert (tmp_path / "copy.so").read_bytes() == library.read_bytes()
    for model in (first, second, tdc_tvm.load(tmp_path / "copy.so")):
        same(model.run(x), y)
        assert model.report.layers == first.report.layers


def test_exporting_over_the_file_it_was_loaded_from(library, tmp_path, x, y):
    path = tmp_path / "m.so"
    path.write_bytes(library.read_bytes())
    model = tdc_tvm.load(path)
    model.export_library(path)
    same(model.run(x), y)
    same(tdc_tvm.load(path).run(x), y)


def test_temporary_files_go_with_the_model(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tdc_tvm.build(model_path, "llvm")
    assert len(os.listdir(tmp_path)) == 1
    del model
    gc.collect()
    assert not os.listdir(tmp_path)


def test_random_inputs_are_seeded_and_of_the_dtype():
    infos = tuple(TensorInfo(dtype, (4, 5), dtype) for dtype in ("float32", "float64", "int64", "bool", "uint8"))
    first, again, other = (random_inputs(infos, seed) for seed in (1, 1, 2))
    for info, a, b in zip(infos, first, again, strict=True):
        assert a.dtype == info.dtype
        assert a.shape == info.shape
        assert np.array_equal(a, b)
    assert not np.array_equal(first[0], other[0])


def test_chatter_is_dropped_and_the_rest_of_standard_error_kept(capfd):
    def write(text):
        os.write(2, text)

    with without_chatter():
        write(b"Warning: Scope constant is chatter\nsomething else\n")
        with without_chatter():
            write(b"inner\nWarning: Scope again\n")
    write(b"after\n")
    assert capfd.readouterr().err == "something else\ninner\nafter\n"


def run_python(code, *args):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)


def test_importing_is_quick():
    done = run_python(
        "import sys, tdc_tvm, tdc_tvm.cli; print(sorted({'tvm', 'tvm_ffi', 'torch', 'onnxruntime'} & set(sys.modules)))"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_building_and_running_need_no_torch_and_no_standard_error(model_path, tmp_path, x):
    """As in a daemon that has closed its standard error."""
    code = """
import os, sys
sys.modules["torch"] = None
os.close(2)
sys.stderr = None
import numpy as np, tdc_tvm
tdc_tvm.build(sys.argv[1], "llvm").export_library(sys.argv[2])
print(tdc_tvm.load(sys.argv[2]).run(np.zeros((1, 8, 6, 6), np.float32)).shape)
"""
    done = run_python(code, model_path, tmp_path / "m.so")
    assert done.stdout.splitlines()[-1:] == ["(1, 8, 6, 6)"]
    assert done.returncode == 0
