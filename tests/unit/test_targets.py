"""What users call targets."""

from types import SimpleNamespace

import pytest
import tvm
from tvm.target import Target

import tdc_tvm
from tdc_tvm import targets
from tdc_tvm.errors import TdcError
from tdc_tvm.targets import local_gpu, local_gpu_arch, resolve_target


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that this machine has a GPU of a compute capability, or none."""

    def pretend(version):
        device = SimpleNamespace(exist=version is not None, compute_version=version)
        monkeypatch.setattr(targets.tvm, "cuda", lambda index: device)

    return pretend


@pytest.mark.parametrize(
    ("version", "arch"), [(None, None), ("8.0", "sm_80"), ("8.6", "sm_86"), ("9.0", "sm_90a"), ("10.3", "sm_103a")]
)
def test_the_local_gpu(gpu, version, arch):
    gpu(version)
    assert local_gpu_arch() == arch
    auto = resolve_target("auto")
    if arch is None:
        assert auto.kind.name == "llvm"
        assert str(auto.attrs["mcpu"]) == tvm.target.codegen.llvm_get_system_cpu()
        with pytest.raises(TdcError, match=r"this machine's GPU, and there is none; name the architecture"):
            resolve_target("cuda")
    else:
        assert (auto.kind.name, str(auto.attrs["arch"])) == ("cuda", arch)
        assert str(resolve_target("cuda").attrs["arch"]) == arch


@pytest.mark.parametrize("driver", [False, True])
def test_cuda_is_loaded_where_there_is_a_driver(gpu, monkeypatch, driver):
    """TVM alone does not find a CUDA runtime library that pip installed."""

    def load_driver(name):
        assert name == "libcuda.so.1"
        if not driver:
            raise OSError("no such library")

    loaded = []
    gpu("9.0" if driver else None)
    monkeypatch.setattr(targets.ctypes, "CDLL", load_driver)
    monkeypatch.setattr(targets, "load_cuda_runtime", lambda: loaded.append(True))
    assert (local_gpu() is not None) == driver
    assert loaded == [True] * driver


@pytest.mark.parametrize(
    ("target", "arch"),
    [
        ("sm_80", "sm_80"),
        ("sm_90a", "sm_90a"),
        ("nvidia/nvidia-a100", "sm_80"),
        ("nvidia/nvidia-h100", "sm_90a"),
        (Target("nvidia/nvidia-h100"), "sm_90a"),
        (Target({"kind": "cuda", "arch": "sm_86"}), "sm_86"),
        (Target({"kind": "cuda", "arch": "sm_86"}, host="llvm"), "sm_86"),
    ],
)
def test_gpu_targets_get_a_host(target, arch):
    resolved = resolve_target(target)
    assert str(resolved.attrs["arch"]) == arch
    assert resolved.host.kind.name == "llvm"


def test_a_target_is_taken_as_it_is():
    target = Target({"kind": "llvm", "mcpu": "haswell"})
    assert resolve_target(target).same_as(target)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "unknown target ''.*use 'auto'"),
        ("gpu", "unknown target 'gpu'.*use 'auto'"),
        ("nvidia/nvidia-h900", "unknown target.*use 'auto'"),
        ("llvm -mcpu=skylake", "unknown target.*use 'auto'"),
        ("cuda -arch=sm_80", "unknown target.*use 'auto'"),
        ("opencl", "target kind 'opencl' is not supported; use 'auto'"),
        (Target("c"), "target kind 'c' is not supported; use 'auto'"),
        (None, "found NoneType; use 'auto'"),
        ({"kind": "llvm"}, "found dict; use 'auto'"),
    ],
)
def test_other_targets_are_refused(target, message):
    with pytest.raises(TdcError, match=message):
        resolve_target(target)


@pytest.mark.parametrize(
    "target", ["sm_", "sm_abc", "sm_20", "sm_80a", "sm_90aa", Target({"kind": "cuda", "arch": "sm_50"})]
)
def test_an_architecture_without_data_is_refused(model_path, target):
    with pytest.raises(TdcError, match=r"no device data for GPU architecture sm_.*known: .*sm_80"):
        tdc_tvm.build(model_path, target)
