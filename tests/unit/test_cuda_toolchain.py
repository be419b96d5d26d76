"""Compiling CUDA on a machine without a GPU."""

import os
import subprocess
import sys

import pytest
import tvm
import tvm_ffi
from tvm.script import tirx as T
from tvm.target import Target

from tdc_tvm import cuda_toolchain
from tdc_tvm.cuda_toolchain import CudaCompiler, cubin_kernels, cuda_compiler, find_cuda_compiler
from tdc_tvm.errors import TdcError

CALLBACK = "tvm_callback_cuda_compile"


def can(name):
    """Whether a compiler is installed."""
    try:
        if name == "nvrtc":
            return find_cuda_compiler().name == "nvrtc"
        return any(os.access(root / "bin" / "nvcc", os.X_OK) for root in cuda_toolchain._cuda_roots())
    except TdcError:
        return False


NVRTC = pytest.param("nvrtc", marks=pytest.mark.skipif(not can("nvrtc"), reason="needs the extra [cuda]"))
NVCC = pytest.param("nvcc", marks=pytest.mark.skipif(not can("nvcc"), reason="needs nvcc"))


@T.prim_func(s_tir=True)
def scale_exp(a: T.Buffer((256,), "float32"), b: T.Buffer((256,), "float32")):
    T.func_attr({"global_symbol": "scale_exp"})
    for i in T.thread_binding(2, thread="blockIdx.x"):
        for j in T.thread_binding(128, thread="threadIdx.x"):
            with T.sblock("b"):
                v = T.axis.spatial(256, i * 128 + j)
                b[v] = T.max(T.exp(a[v]) / a[v], T.min_value("float32"))


def use_only(monkeypatch, name):
    if name == "nvcc":
        monkeypatch.setattr(cuda_toolchain, "_nvrtc_loads", lambda: False)


def build(arch):
    target = Target({"kind": "cuda", "arch": arch})
    with cuda_compiler(target):
        return tvm.tirx.build(tvm.IRModule({"scale_exp": scale_exp}), target=target)


@pytest.mark.parametrize("compiler", [NVRTC, NVCC])
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a"])
def test_exported_library_carries_machine_code(tmp_path, monkeypatch, compiler, arch):
    use_only(monkeypatch, compiler)
    build(arch).export_library(str(tmp_path / "k.so"))
    (kernel,) = cubin_kernels(tmp_path / "k.so")
    assert kernel.name == "scale_exp_kernel"
    assert kernel.arch == arch.rstrip("a")
    assert 0 < kernel.registers < 256
    assert kernel.local_bytes == 0


@pytest.mark.parametrize("compiler", [NVRTC, NVCC])
def test_fast_math_is_off(monkeypatch, compiler):
    """Exact division has a slow path with a call; the approximate one is a few instructions."""
    use_only(monkeypatch, compiler)
    code = 'extern "C" __global__ void k(float* a, float* b) { a[threadIdx.x] = a[threadIdx.x] / b[threadIdx.x]; }'
    exact = find_cuda_compiler().compile(code, "sm_90")
    approximate = find_cuda_compiler().compile(
        code.replace("a[threadIdx.x] / b", "__fdividef(a[threadIdx.x], b").replace("]; }", "]); }"), "sm_90"
    )
    assert len(cuda_toolchain._read_cubin(exact)) == 1
    assert len(exact) > len(approximate) + 512


@pytest.mark.parametrize("compiler", [NVRTC, NVCC])
def test_rejected_source_shows_the_log(monkeypatch, compiler):
    use_only(monkeypatch, compiler)
    with pytest.raises(RuntimeError, match="no_such_thing"):
        find_cuda_compiler().compile("__global__ void k() { no_such_thing(); }", "sm_90")


@pytest.mark.skipif(not can("nvrtc"), reason="needs the extra [cuda]")
def test_everything_is_put_back():
    environment, callback = dict(os.environ), tvm_ffi.get_global_func(CALLBACK)

    def fail():
        with cuda_compiler(Target({"kind": "cuda", "arch": "sm_80"})):
            assert str(Target.current().attrs["arch"]) == "sm_80"
            assert not tvm_ffi.get_global_func(CALLBACK).same_as(callback)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert Target.current(allow_none=True) is None
    assert tvm_ffi.get_global_func(CALLBACK).same_as(callback)
    assert dict(os.environ) == environment


def test_source_in_a_library_is_an_error(tmp_path):
    """As TVM exports it where its CUDA library did not load."""
    code = """
import sys, tvm
from tvm.target import Target
sys.path.insert(0, sys.argv[1])
from test_cuda_toolchain import scale_exp
target = Target({"kind": "cuda", "arch": "sm_90"})
with target:
    tvm.tirx.build(tvm.IRModule({"scale_exp": scale_exp}), target=target).export_library(sys.argv[2])
"""
    if tvm.cuda(0).exist:
        pytest.skip("TVM's CUDA library loads by itself on this machine")
    path = tmp_path / "k.so"
    subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__), str(path)], check=True)
    with pytest.raises(TdcError, match=r"'cuda', expected 'cubin'"):
        cubin_kernels(path)


def test_cpu_library_has_no_kernels(tmp_path):
    path = tmp_path / "k.so"
    path.write_bytes(b"\x7fELF no CUDA module")
    assert cubin_kernels(path) == ()


def test_cpu_target_is_an_error():
    with pytest.raises(TdcError, match="expected 'cuda'"), cuda_compiler(Target("llvm")):
        pass


def test_missing_compilers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_toolchain, "_cuda_roots", lambda: [tmp_path])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TdcError, match=r"no CUDA compiler found.*pip install 'tdc-tvm\[cuda\]'"):
        find_cuda_compiler()


def test_nvcc_serves_where_nvrtc_is_missing(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    monkeypatch.setattr(cuda_toolchain, "_nvrtc_loads", lambda: False)
    monkeypatch.setattr(cuda_toolchain, "_cuda_roots", lambda: [tmp_path])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_cuda_compiler() == CudaCompiler("nvcc", nvcc)


@pytest.mark.skipif(not can("nvrtc"), reason="needs the extra [cuda]")
def test_torch_still_works_beside_the_stub():
    code = """
from tdc_tvm.cuda_toolchain import load_cuda_runtime
load_cuda_runtime()
import torch, tvm
assert torch.cuda.is_available() == tvm.cuda(0).exist
print(torch.ones(3).sum().item())
"""
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3.0"]
