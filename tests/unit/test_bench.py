"""Measuring: turns, counts and figures; no test looks at a clock."""

from types import SimpleNamespace

import numpy as np
import pytest
import tvm
import tvm.runtime.vm

from tdc_tvm.bench import Contender, Latency, build_default, measure, onnxruntime_contender, tvm_contender
from tdc_tvm.compiled_model import random_inputs
from tdc_tvm.errors import TdcError
from tdc_tvm.onnx_model import freeze_shapes, load_onnx
from tdc_tvm.schedules.device import cpu_threads
from tdc_tvm.targets import resolve_target


def test_contenders_take_turns():
    calls = []
    contenders = [Contender(name, lambda name=name: calls.append(name)) for name in "ab"]
    results = measure(contenders, warmup=2, repeat=3, advance=lambda: calls.append("|"))
    assert "".join(calls) == "aabb|" * 5
    assert [(result.name, len(result.samples_ms)) for result in results] == [("a", 3), ("b", 3)]
    assert all(sample >= 0 for result in results for sample in result.samples_ms)


def test_figures():
    latency = Latency("m", (4.0, 1.0, 2.0, 3.0, 100.0))
    assert (latency.min_ms, latency.median_ms) == (1.0, 3.0)
    assert latency.p99_ms == pytest.approx(np.percentile([1, 2, 3, 4, 100], 99))
    assert latency.to_dict() == {
        "name": "m",
        "median_ms": 3.0,
        "p99_ms": latency.p99_ms,
        "min_ms": 1.0,
        "samples_ms": [4.0, 1.0, 2.0, 3.0, 100.0],
    }


def test_a_compiled_model_beside_onnx_runtime(compiled, model_path):
    contenders = [Contender.of("ours", compiled), onnxruntime_contender("reference", model_path, compiled)]
    results = measure(contenders, warmup=1, repeat=2)
    assert [result.name for result in results] == ["ours", "reference"]
    assert all(result.min_ms > 0 for result in results)


def test_tvm_by_itself_computes_the_same(compiled, model_path):
    proto = load_onnx(model_path)
    freeze_shapes(proto, {info.name: info.shape for info in compiled.inputs})
    executable, _ = build_default(proto, resolve_target("llvm"))
    (x,) = random_inputs(compiled.inputs, 0)
    machine = tvm.runtime.vm.VirtualMachine(executable, tvm.cpu())
    np.testing.assert_allclose(machine["main"](tvm.runtime.tensor(x)).numpy(), compiled.run(x), rtol=1e-4, atol=1e-5)
    results = measure([tvm_contender("by itself", model_path, compiled)], warmup=0, repeat=2)
    assert [len(result.samples_ms) for result in results] == [2]


def test_both_get_the_same_input_and_threads(compiled, model_path, monkeypatch):
    seen = {}

    class Binding:
        def bind_ortvalue_input(self, name, value):
            seen[name] = value.numpy()

        def bind_output(self, name, device):
            seen["device"] = device

        def synchronize_outputs(self):
            pass

    class Session:
        io_binding = Binding

        def get_outputs(self):
            return [SimpleNamespace(name="y")]

        def run_with_iobinding(self, binding):
            seen["ran"] = True

    def session(model, threads, device):
        seen["threads"] = threads
        return Session()

    monkeypatch.setattr("tdc_tvm.bench.reference_session", session)
    onnxruntime_contender("reference", model_path, compiled, seed=5).call()
    assert (seen["threads"], seen["device"], seen["ran"]) == (cpu_threads(), "cpu", True)
    np.testing.assert_array_equal(seen["x"], np.random.default_rng(5).standard_normal((1, 8, 6, 6)).astype(np.float32))


def test_benchmark_gives_one_sample_per_call(compiled):
    samples = compiled.benchmark(warmup=1, repeat=4)
    assert samples.shape == (4,)
    assert (samples > 0).all()


def test_a_reference_that_does_not_fit_is_refused(compiled, two_inputs, model_path):
    with pytest.raises(TdcError, match="but the model's inputs are \\['x'\\]"):
        onnxruntime_contender("reference", model_path, two_inputs)
