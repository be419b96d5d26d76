"""Microbenchmarks of a GPU, for what datasheets do not tell: launches, barriers, caches, rates.

The halves can run on different machines: `build` needs a compiler and no GPU, `run` TVM's runtime, the
package cuda-bindings and a GPU::

    tdc env --probe                                  # both, on this machine's GPU
    python -m tdc_tvm.probe build probe.so sm_90     # no GPU needed
    python -m tdc_tvm.probe run probe.so probe.json  # TVM's runtime is enough
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from tdc_tvm.errors import TdcError

# Repetitions within a kernel: what the longer of two takes more is the cost of the difference.
SHORT, LONG = 10, 110
CHASE_STEPS = 2000
# Words of the largest buffer: 1 GB, far more than any cache; and of one that fits into the L2 cache.
DRAM_WORDS, CACHED_WORDS = 1 << 28, 1 << 21
THREADS = 1024
UNITS = ("float32", "float16", "bfloat16")
# Blocks of a cluster, and those that share a processor, which are asked for; and the kernel that is: any does.
CLUSTER_SIZES, RESIDENT = range(1, 17), (1, 2, 3)
EMPTY_KERNEL = b".version 7.8\n.target sm_90\n.address_size 64\n.visible .entry empty() { ret; }\n"


def build(arch: str) -> Any:
    """Compile the microbenchmarks for a GPU architecture, such as ``"sm_90"``.

    Returns
    -------
    tvm.runtime.Module
        To be exported, or given to `run`.

    Raises
    ------
    TdcError
        If there is no CUDA compiler, or no entry for the architecture.
    """
    import tvm
    from tvm.target import Target

    from tdc_tvm.cuda_toolchain import cuda_compiler
    from tdc_tvm.schedules.cuda.lowering import TIR_PIPELINE
    from tdc_tvm.schedules.device import DeviceSpec

    if not str(arch).startswith("sm_"):
        raise TdcError(f"found the GPU architecture {arch!r}; expected a name such as 'sm_90'")
    target = Target({"kind": "cuda", "arch": arch})
    device = DeviceSpec.from_target(target)
    functions = {
        name: func.with_attr("global_symbol", name)
        for name, func in _functions(device.core_count, device.compute_capability).items()
    }
    with cuda_compiler(target):
        return tvm.tirx.build(tvm.IRModule(functions), target=target, pipeline=TIR_PIPELINE)


def _functions(cores: int, capability: int) -> dict[str, Any]:
    """The kernels, as TensorIR."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    from tdc_tvm.schedules.cuda.intrinsics import address, barrier, call, run

    def kernel(
        body: Callable[..., None], words: int, blocks: int, threads: int, cluster: int = 1, tags: tuple[str, ...] = ()
    ) -> Any:
        with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
            T.func_attr({"tirx.is_scheduled": True, "tdc.config": "probe"})
            if tags:
                T.func_attr({"tirx.kernel_launch_params": list(tags)})
            x = T.arg("x", T.buffer((words,), "float32"))
            out = T.arg("out", T.buffer((blocks * threads,), "float32"))

            def inside(block: Any, thread: Any) -> None:
                with T.sblock("probe"):
                    T.reads(x[0:words])
                    T.writes(out[0 : blocks * threads])
                    total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    T.buffer_store(total, tirx.const(0, "float32"), [0])
                    body(x, total, block, thread)
                    T.buffer_store(out, total[0], [block * threads + thread])

            with T.thread_binding(blocks, thread="blockIdx.x") as block:
                if cluster > 1:
                    with (
                        T.thread_binding(cluster, thread="clusterCtaIdx.x"),
                        T.thread_binding(threads, thread="threadIdx.x") as thread,
                    ):
                        inside(block, thread)
                else:
                    with T.thread_binding(threads, thread="threadIdx.x") as thread:
                        inside(block, thread)
        return builder.get()

    def empty(x: Any, total: Any, block: Any, thread: Any) -> None:
        run("tdc_launch_dependents")
        run("tdc_wait_for_dependencies")

    def chase(x: Any, total: Any, block: Any, thread: Any) -> None:
        # The words of x are the places of the next ones, as integers.
        at = T.sblock_alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(at, tirx.const(0, "int32"), [0])
        with T.serial(CHASE_STEPS):
            T.buffer_store(at, T.cast(x[at[0]], "int32"), [0])
        T.buffer_store(total, T.cast(at[0], "float32"), [0])

    def read(words: int, blocks: int, passes: int) -> Callable[..., None]:
        """All blocks read a share of the buffer, several times."""
        share = words // blocks // (4 * THREADS)

        def body(x: Any, total: Any, block: Any, thread: Any) -> None:
            data = T.sblock_alloc_buffer((4,), "float32", scope="local")
            with T.serial(passes) as turn, T.serial(share, unroll=8) as i:
                # Another share each time, so that a processor's own cache does not help.
                vector = ((block + turn) % blocks * share + i) * THREADS + thread
                run("tdc_load", address(data, 0), address(x, vector * 4), _true())
                T.buffer_store(total, total[0] + data[0] + data[1] + data[2] + data[3], [0])

        return body

    def _true() -> Any:
        return tirx.const(True, "bool")

    def repeat(count: int, step: Callable[[], None]) -> Callable[..., None]:
        def body(x: Any, total: Any, block: Any, thread: Any) -> None:
            with T.serial(count):
                step()

        return body

    def fma(count: int) -> Callable[..., None]:
        def body(x: Any, total: Any, block: Any, thread: Any) -> None:
            sums = T.sblock_alloc_buffer((32,), "float32", scope="local")
            with T.serial(32, unroll=True) as i:
                T.buffer_store(sums, x[i], [i])
            with T.serial(16 * count), T.serial(32, unroll=True) as i:
                T.buffer_store(sums, sums[i] * x[0] + x[1], [i])
            with T.serial(32, unroll=True) as i:
                T.buffer_store(total, total[0] + sums[i], [0])

        return body

    def mma(count: int, dtype: str) -> Callable[..., None]:
        def body(x: Any, total: Any, block: Any, thread: Any) -> None:
            sums = T.sblock_alloc_buffer((32,), "float32", scope="local")
            operands = T.sblock_alloc_buffer((12,), "float32", scope="local")
            with T.serial(32, unroll=True) as i:
                T.buffer_store(sums, x[i], [i])
            with T.serial(12, unroll=True) as i:
                T.buffer_store(operands, x[i], [i])
            with T.serial(count), T.serial(8, unroll=True) as i:
                fragments = (address(operands, place) for place in (0, 4, 8))
                run(f"tdc_mma_{dtype}", address(sums, i * 4), address(sums, i * 4), *fragments)
            with T.serial(32, unroll=True) as i:
                T.buffer_store(total, total[0] + sums[i], [0])

        return body

    def shared(count: int) -> Callable[..., None]:
        def body(x: Any, total: Any, block: Any, thread: Any) -> None:
            memory = T.sblock_alloc_buffer((4 * THREADS,), "float32", scope="shared.dyn")
            data = T.sblock_alloc_buffer((4,), "float32", scope="local")
            T.buffer_store(memory, x[thread], [thread])
            barrier()
            with T.serial(count) as turn, T.serial(8, unroll=True) as i:
                run("tdc_move4", address(data, 0), address(memory, (thread + turn + i * 32) % THREADS * 4))
                T.buffer_store(total, total[0] + data[0] + data[1] + data[2] + data[3], [0])

        return body

    early = "tirx.use_programtic_dependent_launch"
    functions = {
        "launch": kernel(empty, 64, 1, 32),
        "chase": kernel(chase, CACHED_WORDS, 1, 32),
        "dram": kernel(read(DRAM_WORDS, 2 * cores, 1), DRAM_WORDS, 2 * cores, THREADS),
        "l2_chip": kernel(read(CACHED_WORDS * 2, 2 * cores, 32), CACHED_WORDS * 2, 2 * cores, THREADS),
        "l2_core": kernel(read(CACHED_WORDS, 1, 2), CACHED_WORDS, 1, THREADS),
    }
    for name, count in (("short", SHORT), ("long", LONG)):
        functions[f"fma_{name}"] = kernel(fma(count), 64, 4 * cores, 256)
        functions[f"shared_{name}"] = kernel(shared(count), THREADS, cores, THREADS)
        functions[f"barrier_{name}"] = kernel(repeat(count, barrier), 64, 1, 256)
        for dtype in UNITS if capability >= 80 else ("float16",):
            functions[f"mma_{dtype}_{name}"] = kernel(mma(count, dtype), 64, 2 * cores, 512)
        if capability >= 90:

            def meet() -> None:
                run("tdc_cluster_arrive")
                run("tdc_cluster_wait")

            functions[f"cluster_{name}"] = kernel(repeat(count, meet), 64, 64, 256, cluster=8)
        if capability >= 70:

            def grid(x: Any, total: Any, block: Any, thread: Any, count: int = count) -> None:
                with T.serial(count):
                    T.evaluate(call("tdc_grid_barrier", address(x, 0), cores))

            functions[f"grid_{name}"] = kernel(grid, 64, cores, 256, tags=("tirx.use_cooperative_launch",))
    if capability >= 90:
        functions["dependent_launch"] = kernel(empty, 64, 1, 32, tags=(early,))
    return functions


class Stream:
    """A CUDA stream that kernels of TVM run on, with graphs and events, by cuda-bindings."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise TdcError(f"measuring needs cuda-bindings ({error}); pip install 'tdc-tvm[cuda]'") from None
        self.cuda = runtime
        self.stream = self._ok(runtime.cudaStreamCreate())

    def _ok(self, result: tuple) -> Any:
        error, *values = result
        if int(error):
            raise TdcError(f"the GPU failed: {self.cuda.cudaGetErrorString(error)[1].decode()}")
        return values[0] if values else None

    def microseconds(self, launch: Callable[[], None], launches: int, repeat: int = 9) -> float:
        """The median time of one of ``launches`` launches within a graph."""
        return float(np.median(self.samples_us(launch, launches, repeat)))

    def samples_us(
        self, launch: Callable[[], None], launches: int, repeat: int, seconds: float = math.inf
    ) -> list[float]:
        """Times of one of ``launches`` launches, each in a replay of their graph right after another.

        Of ``repeat`` replays, or fewer, but five at least, when the seconds are over.
        """
        import tvm
        import tvm_ffi

        cuda = self.cuda
        with tvm_ffi.use_raw_stream(tvm.cuda(0), int(self.stream)):
            launch()
            self._ok(cuda.cudaStreamSynchronize(self.stream))
            self._ok(cuda.cudaStreamBeginCapture(self.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed))
            for _ in range(launches):
                launch()
            graph = self._ok(cuda.cudaStreamEndCapture(self.stream))
        executable = self._ok(cuda.cudaGraphInstantiate(graph, 0))
        begin, end = self._ok(cuda.cudaEventCreate()), self._ok(cuda.cudaEventCreate())
        samples: list[float] = []
        stop = time.monotonic() + seconds
        while len(samples) < repeat and (len(samples) < 5 or time.monotonic() < stop):
            self._ok(cuda.cudaGraphLaunch(executable, self.stream))
            self._ok(cuda.cudaEventRecord(begin, self.stream))
            self._ok(cuda.cudaGraphLaunch(executable, self.stream))
            self._ok(cuda.cudaEventRecord(end, self.stream))
            self._ok(cuda.cudaEventSynchronize(end))
            samples.append(self._ok(cuda.cudaEventElapsedTime(begin, end)) * 1e3 / launches)
        for event in (begin, end):
            self._ok(cuda.cudaEventDestroy(event))
        self._ok(cuda.cudaGraphExecDestroy(executable))
        self._ok(cuda.cudaGraphDestroy(graph))
        return samples


def run(module: Any) -> dict[str, Any]:
    """Measure this machine's GPU.

    Parameters
    ----------
    module : tvm.runtime.Module
        From `build`, for this GPU's architecture.

    Returns
    -------
    dict
        ``environment`` and, in the units that the names say, ``measured``.

    Raises
    ------
    TdcError
        If there is no GPU, or it fails.
    """
    import tvm

    device = tvm.cuda(0)
    if not device.exist:
        raise TdcError("there is no NVIDIA GPU on this machine that TVM can use; --probe measures one")
    stream, cores = Stream(), device.multi_processor_count
    threads = 4 * cores * THREADS
    ones = tvm.runtime.tensor(np.ones(DRAM_WORDS, np.float32), device)
    out = tvm.runtime.empty((threads,), "float32", device)
    zeros = tvm.runtime.tensor(np.zeros(64, np.float32), device)
    # A cycle through all lines of 128 bytes in random order.
    lines = np.random.default_rng(0).permutation(CACHED_WORDS // 32)
    chain = np.zeros(CACHED_WORDS, np.float32)
    chain[lines * 32] = np.roll(lines, -1) * 32
    chain_on_gpu = tvm.runtime.tensor(chain, device)

    def time_us(name: str, words: int, blocks: int, block_threads: int, launches: int = 1, x: Any = ones) -> float:
        function = module[name]
        arguments = (_view(x, words), _view(out, blocks * block_threads))
        return stream.microseconds(lambda: function(*arguments), launches)

    def step_us(name: str, words: int, blocks: int, block_threads: int, x: Any = ones) -> float:
        short, long = (time_us(f"{name}_{one}", words, blocks, block_threads, 4, x) for one in ("short", "long"))
        return (long - short) / (LONG - SHORT)

    measured = {
        "launch_us": time_us("launch", 64, 1, 32, 100),
        "l2_latency_us": time_us("chase", CACHED_WORDS, 1, 32, x=chain_on_gpu) / CHASE_STEPS,
        "barrier_us": step_us("barrier", 64, 1, 256),
        "dram_bytes_per_s": _rate(DRAM_WORDS, 2 * cores, 1, time_us("dram", DRAM_WORDS, 2 * cores, THREADS)),
        "l2_bytes_per_s": _rate(
            2 * CACHED_WORDS, 2 * cores, 32, time_us("l2_chip", 2 * CACHED_WORDS, 2 * cores, THREADS)
        ),
        "l2_bytes_per_s_per_core": _rate(CACHED_WORDS, 1, 2, time_us("l2_core", CACHED_WORDS, 1, THREADS)),
        "fma_flops_per_s": 2 * 16 * 32 * 4 * cores * 256 / step_us("fma", 64, 4 * cores, 256) * 1e6,
        "shared_bytes_per_s_per_core": 8 * 16 * THREADS / step_us("shared", THREADS, cores, THREADS) * 1e6,
        "grid_barrier_us": step_us("grid", 64, cores, 256, x=zeros),
    }
    for dtype in UNITS:
        try:
            us = step_us(f"mma_{dtype}", 64, 2 * cores, 512)
        except AttributeError:  # this GPU has no such tensor cores
            continue
        macs = 16 * 8 * (16 if dtype == "float32" else 32)
        measured[f"mma_{dtype}_flops_per_s"] = 2 * 8 * macs * 2 * cores * 16 / us * 1e6
    if int(str(device.compute_version).split(".")[0]) >= 9:
        measured["dependent_launch_us"] = time_us("dependent_launch", 64, 1, 32, 100)
        measured["cluster_barrier_us"] = step_us("cluster", 64, 64, 256)
    figures: dict[str, Any] = {name: float(f"{value:.4g}") for name, value in measured.items()}
    if "cluster_barrier_us" in measured:
        figures["clusters"] = _clusters()
    return {
        "environment": {
            "gpu": device.device_name,
            "cores": cores,
            "clocks": _clocks(),
            "tvm": tvm.__version__,
            "python": platform.python_version(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
        "measured": figures,
    }


def _clusters() -> list[list[int]]:
    """How many clusters run at once, by the blocks on a processor and of a cluster, as the driver tells."""
    from cuda.bindings import driver

    def ok(result: tuple) -> Any:
        error, *values = result
        if int(error):
            raise TdcError(f"the GPU failed: {driver.cuGetErrorString(error)[1].decode()}")
        return values[0] if values else None

    kernel = ok(driver.cuModuleGetFunction(ok(driver.cuModuleLoadData(EMPTY_KERNEL)), b"empty"))
    attributes, limits = driver.CUfunction_attribute, driver.CUdevice_attribute
    most = ok(driver.cuDeviceGetAttribute(limits.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 0))
    ok(driver.cuFuncSetAttribute(kernel, attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most))
    ok(driver.cuFuncSetAttribute(kernel, attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1))
    found: list[list[int]] = []
    for resident in RESIDENT:
        found.append([])
        for size in CLUSTER_SIZES:
            launch, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = size, 1, 1
            launch.gridDimX, launch.gridDimY, launch.gridDimZ = 200 * size, 1, 1
            launch.blockDimX, launch.blockDimY, launch.blockDimZ = 128, 1, 1
            # Each block takes 1 KB besides.
            launch.sharedMemBytes = (most + 1024) // resident - 1024
            launch.attrs, launch.numAttrs = [attribute], 1
            found[-1].append(int(ok(driver.cuOccupancyMaxActiveClusters(kernel, launch))))
    return found


def _rate(words: int, blocks: int, passes: int, microseconds: float) -> float:
    """Bytes per second of a kernel made by ``read``."""
    share = words // blocks // (4 * THREADS)
    return 16.0 * THREADS * share * blocks * passes / microseconds * 1e6


def _view(tensor: Any, words: int) -> Any:
    """The beginning of a tensor."""
    return tensor._create_view((words,)) if tensor.shape[0] != words else tensor


def _clocks() -> str:
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def main() -> None:
    """``build LIBRARY ARCH`` or ``run LIBRARY RESULT``; without arguments, how it is used."""
    parser = argparse.ArgumentParser("python -m tdc_tvm.probe", description="Measure a GPU by microbenchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    build_command = commands.add_parser("build", help="compile them; needs no GPU")
    run_command = commands.add_parser("run", help="measure this machine's GPU")
    for command in (build_command, run_command):
        command.add_argument("library", type=Path, help="the compiled microbenchmarks (.so)")
    build_command.add_argument("arch", help="GPU architecture, such as sm_90")
    run_command.add_argument("result", type=Path, help="the file to write (.json)")
    arguments = parser.parse_args()
    try:
        if arguments.command == "build":
            build(arguments.arch).export_library(str(arguments.library))
        else:
            _run_command(arguments.library, arguments.result)
    except TdcError as error:
        parser.exit(1, f"error: {error}\n")


def _run_command(library: Path, result: Path) -> None:
    import tvm
    from tvm import libinfo
    from tvm_ffi.libinfo import load_lib_ctypes

    # Where TVM's compiler is missing, its runtime does not load this by itself.
    try:
        load_lib_ctypes("tvm", "tvm_runtime_cuda", "RTLD_LOCAL", extra_lib_paths=libinfo.package_lib_paths())
    except OSError as error:
        raise TdcError(
            f"this machine cannot use a GPU ({error}); run this where there is one, and its driver"
        ) from None
    if not library.is_file():
        raise TdcError(f"{library} is not there; make it by: python -m tdc_tvm.probe build {library} ARCH")
    result.write_text(json.dumps(run(tvm.runtime.load_module(str(library))), indent=1) + "\n")


if __name__ == "__main__":
    main()
