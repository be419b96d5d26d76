"""Run CUDA kernels on the CPU: generated source is compiled as C++, and a block's threads become fibers.

A fiber runs until its next barrier, so a missing barrier shows as a wrong result, and a barrier
that only some threads reach as an error.  Shared memory starts as NaN in each block.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx
from tvm.support import cc
from tvm.target import Target

CALLBACK = "tvm_callback_cuda_compile"
SHARED_BYTES = 228 * 1024

PRELUDE = """
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <ucontext.h>
#include <vector>
using std::max;
using std::min;
#define __global__
#define __launch_bounds__(n)
struct alignas(16) float4 { float x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { int x; };
static Index blockIdx, threadIdx;
alignas(64) static float shared_memory[SHARED_BYTES / 4];
static ucontext_t scheduler;
struct Fiber { ucontext_t context; std::vector<char> stack; bool done = false; };
static std::vector<Fiber> fibers;
static void (*body)(float**);
static float** arguments;

static void __syncthreads() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }
static void enter() {
  body(arguments);
  fibers[threadIdx.x].done = true;
}
static int run(void (*kernel)(float**), float** args, int blocks, int threads) {
  body = kernel;
  arguments = args;
  for (int block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    std::fill_n(shared_memory, SHARED_BYTES / 4, std::numeric_limits<float>::quiet_NaN());
    fibers.resize(threads);
    for (Fiber& fiber : fibers) {
      fiber.done = false;
      fiber.stack.resize(64 * 1024);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, enter, 0);
    }
    for (int finished = 0; finished == 0;) {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
        swapcontext(&scheduler, &fibers[threadIdx.x].context);
        finished += fibers[threadIdx.x].done;
      }
      if (finished != 0 && finished != threads) return 1;
    }
  }
  return 0;
}
"""


def launch_of(func: tirx.PrimFunc) -> tuple[int, int]:
    """Blocks and threads that a scheduled function is launched with."""
    blocks = func.body.block.body
    threads = blocks.body
    assert [loop.thread_binding.thread_tag for loop in (blocks, threads)] == ["blockIdx.x", "threadIdx.x"]
    return int(blocks.extent), int(threads.extent)


def cuda_source(functions: dict[str, tirx.PrimFunc], arch: str = "sm_90") -> str:
    """The CUDA that TVM generates; no CUDA compiler is needed."""
    target = Target({"kind": "cuda", "arch": arch})
    original = tvm_ffi.get_global_func(CALLBACK)
    tvm_ffi.register_global_func(CALLBACK, lambda source: b"not compiled", override=True)
    try:
        module = {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
        with target:
            built = tvm.tirx.build(tvm.IRModule(module), target=target)
    finally:
        tvm_ffi.register_global_func(CALLBACK, original, override=True)
    return built.imports[0].inspect_source()


class Emulator:
    """Kernels that can be called with NumPy arrays."""

    def __init__(self, functions: dict[str, tirx.PrimFunc], folder: Path):
        source = cuda_source(functions).replace("#include <cuda.h>", "")
        source = re.sub(r"extern __shared__ __align__\(64\) float (\w+)\[\];", r"float* \1 = shared_memory;", source)
        entries, self.params, self.launches = [], {}, {}
        for name, func in functions.items():
            signature = re.search(rf"void\s+(?:__launch_bounds__\(\d+\)\s+)?{name}_kernel\(([^)]*)\)\s*{{", source)
            assert signature is not None, source
            self.params[name] = re.findall(r"float\* __restrict__ (\w+?)_ptr\b", signature[1])
            self.launches[name] = launch_of(func)
            values = ", ".join(f"args[{i}]" for i in range(len(self.params[name])))
            entries.append(
                f'extern "C" int run_{name}(float** args, int blocks, int threads) {{\n'
                f"  return run([](float** args) {{ {name}_kernel({values}); }}, args, blocks, threads);\n}}"
            )
        path, library = folder / "kernels.cc", folder / "kernels.so"
        prelude = PRELUDE.replace("SHARED_BYTES", str(SHARED_BYTES))
        path.write_text("\n".join([prelude, source, *entries]))
        command = [
            cc.get_cc(),
            "-std=c++17",
            "-O1",
            "-w",
            "-fno-strict-aliasing",
            "-shared",
            "-fPIC",
            "-o",
            str(library),
            str(path),
        ]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(library))
        self.names = {name: [param.name for param in func.params] for name, func in functions.items()}

    def __call__(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Run a kernel on contiguous FP32 arrays, in the order of its function's parameters."""
        by_name = dict(zip(self.names[name], arrays, strict=True))
        pointers = [by_name[param].ctypes.data_as(ctypes.c_void_p) for param in self.params[name]]
        diverged = self.library[f"run_{name}"]((ctypes.c_void_p * len(pointers))(*pointers), *self.launches[name])
        assert not diverged, f"{name}: some threads of a block do not reach a barrier"
