"""What the GPU benchmarks share on a machine with a GPU: running and timing what `build_layers` made.

That needs NumPy, PyTorch and TVM's runtime: nothing of the package is imported here.
"""

from __future__ import annotations

import functools
import json
import lzma
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from gpu_check import load_cuda_library, read_manifest

CONSTANTS = "constants.npz"
# Exit status of a worker whose GPU context was lost after it had recorded why.
GPU_LOST = 3


def make_weights(layer: dict[str, Any], stages: str = "stages") -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Random kernels that keep the scale of the activations, and biases: the same on every machine.

    Parameters
    ----------
    layer : dict
        From `describe`.
    stages : str
        Whose weights: ``"stages"``, or ``"original"`` for the dense convolution that a Tucker layer replaces.

    Returns
    -------
    list of (kernel, bias)
        FP32; for TF32 values that it represents, so that packing rounds nothing.
    """
    rng = np.random.default_rng(layer["seed"])
    weights = []
    for stage in layer[stages]:
        kernel = rng.standard_normal(stage["weight"], dtype=np.float32) / math.sqrt(math.prod(stage["weight"][1:]))
        kernel = kernel.astype(np.float32)
        if layer["precision"] == "tf32":
            kernel = (kernel.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        bias = rng.standard_normal(stage["weight"][0], dtype=np.float32) if stage["bias"] else None
        weights.append((kernel, bias))
    return weights


def merge(weights: Sequence[tuple[np.ndarray, np.ndarray | None]], precision: str) -> list:
    """The dense convolution that a Tucker layer's stages are together; of them only the last has a bias."""
    (reduce, _), (core, _), (expand, bias) = weights
    kernel = np.einsum("no,oiyx,ic->ncyx", expand[:, :, 0, 0], core, reduce[:, :, 0, 0], optimize=True)
    kernel = np.ascontiguousarray(kernel, np.float32)
    if precision == "tf32":
        kernel = ((kernel.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)
    return [(kernel, bias)]


def weights_of(layer: dict[str, Any], strategy: str) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """What a kernel of a strategy packs."""
    weights = make_weights(layer)
    return merge(weights, layer["precision"]) if strategy == "dense" else weights


def flatten(weights: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> np.ndarray:
    """A zero, then all weights behind each other."""
    arrays = [array.ravel() for pair in weights for array in pair if array is not None]
    return np.concatenate([np.zeros(1, np.float32), *arrays])


def restore_constant(stored: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A packed constant, from what `store_constant` gave and the weights from `flatten`."""
    if stored.dtype.kind != "i":
        return stored
    return values[np.cumsum(stored.ravel(), dtype=np.int32).reshape(stored.shape)]


@dataclass(frozen=True)
class Precision:
    """PyTorch's data type, whether cuDNN may use TF32, and the error that rounding explains, by the depth."""

    dtype: str
    allow_tf32: bool
    tolerance: Callable[[int], float]


PRECISIONS = {
    "fp32": Precision("float32", False, lambda depth: 1e-6 * math.sqrt(depth)),
    "tf32": Precision("float32", True, lambda depth: 1e-3),
    "fp16": Precision("float16", False, lambda depth: 2e-3),
    "bf16": Precision("bfloat16", False, lambda depth: 1e-2),
}


@dataclass(frozen=True)
class Contender:
    """Something that computes a layer.

    Parameters
    ----------
    name : str
        What it is.
    data : sequence of torch.Tensor
        All that it reads, and writes unless it makes its output itself.
    launch : callable
        Run on such data, and return the output.
    """

    name: str
    data: Sequence[Any]
    launch: Callable[[Sequence[Any]], Any]


def gpu_state() -> dict[str, str]:
    """What the driver says of the first GPU."""
    fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return dict(zip(fields, answer.split(", "), strict=False))


class Gpu:
    """A build's kernels, and clocks and graphs of the GPU that runs them.

    Without kernels of ours, as to time cuDNN alone, a manifest's layers and precision are enough.
    """

    device = "cuda"

    def __init__(self, folder: Path, manifest: dict[str, Any] | None = None):
        import torch

        self.folder = folder
        self.manifest = read_manifest(folder) if manifest is None else manifest
        self.layers = self.manifest["layers"]
        self.precision = PRECISIONS[self.manifest["precision"]]
        self.dtype = getattr(torch, self.precision.dtype)
        torch.backends.cudnn.benchmark = True
        # No limit on the algorithms that are tried.
        torch.backends.cudnn.benchmark_limit = 0
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.precision.allow_tf32
        self.library = functools.lru_cache(maxsize=8)(self._library)

    @functools.cached_property
    def constants(self) -> Any:
        """How the kernels' constants are packed."""
        return np.load(self.folder / CONSTANTS)

    @functools.cached_property
    def l2_bytes(self) -> int:
        """Size of the L2 cache."""
        import torch

        return torch.cuda.get_device_properties(0).L2_cache_size

    def environment(self) -> dict[str, Any]:
        """The GPU, its clocks under load, and the versions behind a measurement."""
        import torch
        import tvm

        a = torch.randn(8192, 8192, device=self.device)
        for _ in range(60):
            a @ a
        state = gpu_state()
        torch.cuda.synchronize()
        return {
            "gpu": state,
            "sms": torch.cuda.get_device_properties(0).multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "cuda": torch.version.cuda,
            "tvm": tvm.__version__,
            "python": platform.python_version(),
            "command": " ".join(Path(word).name for word in sys.argv),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "built_with": self.manifest["built_with"],
            "precision": self.manifest["precision"],
        }

    def _library(self, name: str):
        import tvm

        load_cuda_library()
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, "library.so")
            path.write_bytes(lzma.decompress((self.folder / name).read_bytes()))
            return tvm.runtime.load_module(str(path))

    def function(self, kernel: dict[str, Any]) -> Callable[..., None]:
        """A kernel's function of ``(x, *constants, out)``."""
        return self.library(kernel["library"])[kernel["name"]]

    def tensor(self, array: np.ndarray, dtype: str | None = None):
        """An array on the GPU, in the build's precision unless said otherwise."""
        import torch

        wanted = self.dtype if dtype is None else getattr(torch, dtype)
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device).to(wanted)

    def input(self, layer: dict[str, Any]):
        """A layer's input, NHWC."""
        import torch

        generator = torch.Generator(self.device).manual_seed(layer["seed"])
        return torch.randn(layer["x"], generator=generator, device=self.device).to(self.dtype)

    @functools.lru_cache(maxsize=1)  # noqa: B019  (there is one of these in a process)
    def reference(self, key: str):
        """A layer's output in float64, NHWC, without cuDNN."""
        import torch

        layer = self.layers[key]
        value = self.input(layer).double().permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(enabled=False):
            for stage, (kernel, bias) in zip(layer["stages"], make_weights(layer), strict=True):
                kernel, bias = self.tensor(kernel).double(), None if bias is None else self.tensor(bias).double()
                value = torch.nn.functional.conv2d(value.contiguous(), kernel, bias, **options(stage))
        return (value.relu() if layer["relu"] else value).permute(0, 2, 3, 1)

    def check(self, key: str, contender: Contender) -> float:
        """The error of a contender's output (NHWC).

        Raises
        ------
        ArithmeticError
            If rounding does not explain it.
        """
        error, limit = (
            self.error(key, contender.launch(contender.data)),
            self.precision.tolerance(self.layers[key]["depth"]),
        )
        if not error <= limit:
            raise ArithmeticError(f"wrong result: relative error {error:.2e}, at most {limit:.2e} expected")
        return error

    def error(self, key: str, out) -> float:
        """Relative error of an output (NHWC) in the Frobenius norm; NaN if a part was not written."""
        expected = self.reference(key)
        return float((out.double() - expected).norm() / expected.norm())

    def ours(self, kernel: dict[str, Any]) -> Contender:
        """A compiled kernel; its output begins as NaN."""
        import torch

        layer = self.layers[kernel["layer"]]
        values = flatten(weights_of(layer, kernel["strategy"]))
        constants = [
            self.tensor(restore_constant(self.constants[constant["key"]], values), constant["dtype"])
            for constant in kernel["constants"]
        ]
        extents = [layer["out"], *kernel["between"]]
        written = [torch.full(one, math.nan, dtype=self.dtype, device=self.device) for one in extents]
        function = self.function(kernel)

        def launch(data: Sequence[Any]):
            function(*data)
            return data[-len(written)]

        return Contender("ours", [self.input(layer), *constants, *written], launch)

    def capture(self, contender: Contender, launches: int, cold: bool) -> tuple[Callable[[], None], int]:
        """Record launches as a CUDA graph.

        Cold ones go round copies of the data, outputs included, that exceed the L2 cache by half,
        at least once.

        Returns
        -------
        tuple of callable and int
            What replays the graph, and how many launches it has.
        """
        import torch
        import tvm_ffi

        copies = 1
        if cold:
            out = contender.launch(contender.data)
            tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*contender.data, out)}
            copies = max(2, math.ceil(1.5 * self.l2_bytes / sum(tensors.values())))
        data = [contender.data, *([tensor.clone() for tensor in contender.data] for _ in range(copies - 1))]
        launches = max(launches, copies)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with tvm_ffi.use_torch_stream(torch.cuda.stream(stream)):
            for _ in range(3):
                contender.launch(contender.data)
            torch.cuda.synchronize()
            graph.capture_begin()
            # Outputs that are kept get memory of their own; a warm launch has that of the one before.
            kept: deque = deque(maxlen=copies if cold else 0)
            for launch in range(launches):
                kept.append(contender.launch(data[launch % copies]))
            graph.capture_end()
        torch.cuda.synchronize()

        def replay() -> None:
            # The graph knows addresses only: the copies must live as long as it does.
            assert data
            graph.replay()

        return replay, launches

    def time_ms(self, replay: Callable[[], None]) -> float:
        """The time of a replay right after another one, which warms the caches and hides the launch."""
        import torch

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        replay()
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def call_us(self, contender: Contender) -> float:
        """The time of a call by the host's clock, from a GPU at rest until it is at rest again."""
        import torch

        torch.cuda.synchronize()
        begin = time.perf_counter()
        contender.launch(contender.data)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e6

    def is_alive(self) -> bool:
        """Whether the GPU still answers this process."""
        import torch

        try:
            torch.cuda.synchronize()
        except Exception:
            return False
        return True


def options(stage: dict[str, Any]) -> dict[str, Any]:
    """A convolution's options as PyTorch calls them."""
    return {name: stage[name] for name in ("stride", "padding", "dilation", "groups")}


def alternate(
    gpu: Gpu, contenders: Sequence[Contender], launches: int, seconds: float, cold: bool = False, most: int = 200
) -> dict[str, dict[str, Any]]:
    """Time contenders in turns.

    Parameters
    ----------
    launches : int
        Launches of a graph, at least.
    seconds : float
        How long to go on, about; there are at least 5 rounds.
    most : int
        Rounds at most.

    Returns
    -------
    dict
        By contender: median, 99th percentile and minimum of the replays in us for one launch, their number and all.
    """

    def clock(replay: Callable[[], None], count: int) -> Callable[[], float]:
        return lambda: gpu.time_ms(replay) * 1e3 / count

    clocks = {contender.name: clock(*gpu.capture(contender, launches, cold)) for contender in contenders}
    return take_turns(clocks, seconds, most)


def take_turns(clocks: Mapping[str, Callable[[], float]], seconds: float, most: int = 200) -> dict[str, dict[str, Any]]:
    """What `alternate` gives, of contenders by what takes the time of one in us; their first turn is not counted."""
    for clock in clocks.values():
        clock()
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    stop = time.monotonic() + seconds
    for number in range(most):
        if number >= 5 and time.monotonic() > stop:
            break
        for name, clock in clocks.items():
            samples[name].append(clock())
    return {name: summary(values) for name, values in samples.items()}


def summary(samples_us: Sequence[float]) -> dict[str, Any]:
    """Median, 99th percentile and minimum, and all samples in order."""
    median, p99 = np.percentile(samples_us, (50, 99))
    values = {"median_us": median, "p99_us": p99, "min_us": min(samples_us)}
    rounded = {name: round(float(value), 3) for name, value in values.items()}
    return rounded | {"replays": len(samples_us), "samples_us": [round(sample, 3) for sample in samples_us]}


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers; NaN of none."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def read_lines(path: Path) -> list[str]:
    """The lines of a text, packed by ``xz`` or not.

    Raises
    ------
    SystemExit
        If it cannot be read.
    """
    unpack = lzma.decompress if path.suffix == ".xz" else bytes
    try:
        return unpack(path.read_bytes()).decode().splitlines()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise SystemExit(f"cannot read {path}: {error}; give a file that `run` wrote") from error


def read_records(output: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, packed by ``xz`` or not; a line that was left unfinished is passed over.

    Raises
    ------
    SystemExit
        If the file holds anything else.
    """
    records = []
    for number, line in enumerate(read_lines(output) if output.exists() else [], 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if line.startswith("{"):
                continue
            record = None
        if not isinstance(record, dict) or not ("environment" in record or {"name", "shape"} <= record.keys()):
            raise SystemExit(
                f"{output}, line {number}: found {line[:40]!r}, expected what `run` writes; check the name"
            )
        records.append(record)
    return records


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The records of files that `run` wrote.

    Raises
    ------
    SystemExit
        If one is missing, has no kernel's record, or is there twice.
    """
    found: list[list[dict[str, Any]]] = []
    for path in paths:
        if not path.exists():
            raise SystemExit(f"there is no file {path}; give one that `run` wrote")
        records = read_records(path)
        if not any("name" in record for record in records):
            raise SystemExit(f"no kernel has a record in {path}; give a file that `run` wrote")
        if records in found:
            raise SystemExit(f"{path} is given twice, or is a copy; name each file once")
        found.append(records)
    return [record for records in found for record in records]


def append_record(output: Path, record: dict[str, Any]) -> None:
    """Add a line that is there whatever happens next."""
    partial = output.exists() and output.read_bytes()[-1:] not in (b"", b"\n")
    with output.open("a") as file:
        file.write("\n" * partial + json.dumps(record) + "\n")


def kernel_names(manifest: dict[str, Any], batches: Sequence[int] | None, groups: Sequence[str] | None) -> list[str]:
    """The kernels of some batch sizes and groups; None stands for all.

    Raises
    ------
    SystemExit
        If there are none.
    """
    layers = manifest["layers"].values()
    for what, wanted, built in (
        ("batch size", batches, {layer["x"][0] for layer in layers}),
        ("group", groups, {group for layer in layers for group in layer["groups"]}),
    ):
        for unknown in sorted(set(wanted or ()) - built):
            raise SystemExit(f"no {what} {unknown} in this build; there are: {', '.join(map(str, sorted(built)))}")
    names = []
    for kernel in manifest["kernels"]:
        layer = manifest["layers"][kernel["layer"]]
        in_group = groups is None or not set(groups).isdisjoint(layer["groups"])
        if in_group and (batches is None or layer["x"][0] in batches):
            names.append(kernel["name"])
    if not names:
        raise SystemExit("this build has no kernel of these batch sizes in these groups; ask for fewer of them")
    return names


def pending(names: Sequence[str], output: Path, manifest: dict[str, Any]) -> list[str]:
    """The kernels that have no record yet, in order; those of other builds in the same file have other layers."""
    done = {(record["name"], record["shape"]["text"]) for record in read_records(output) if "name" in record}
    texts = {kernel["name"]: manifest["layers"][kernel["layer"]]["text"] for kernel in manifest["kernels"]}
    return [name for name in names if (name, texts[name]) not in done]


def failed(names: Sequence[str], output: Path, manifest: dict[str, Any]) -> list[str]:
    """The kernels that have a record of an error."""
    errors = {
        (record["name"], record["shape"]["text"])
        for record in read_records(output)
        if "name" in record and "error" in record
    }
    texts = {kernel["name"]: manifest["layers"][kernel["layer"]]["text"] for kernel in manifest["kernels"]}
    return [name for name in names if (name, texts[name]) in errors]


def check_machine(output: Path) -> None:
    """Find out before anything is written whether kernels can run and their records be stored.

    Raises
    ------
    SystemExit
        If not.
    """
    if not output.parent.is_dir() or output.suffix == ".xz":
        raise SystemExit(f"cannot append JSON lines to {output}; name a plain file in a folder that exists")
    read_records(output)
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            f"PyTorch {torch.__version__} finds no NVIDIA GPU here; run this where nvidia-smi lists one, with a "
            f"PyTorch for CUDA and a driver that is new enough for it"
        )
    load_cuda_library()


def work(
    gpu: Gpu,
    names: Sequence[str],
    output: Path,
    deadline: float,
    measure: Callable[[Gpu, dict], dict[str, Any]],
    most: int | None = None,
) -> int:
    """Measure kernels, ``most`` at most, one after the other until a time (of `time.time`); a worker's exit status."""
    kernels = {kernel["name"]: kernel for kernel in gpu.manifest["kernels"]}
    append_record(output, {"environment": gpu.environment()})
    for name in pending(names, output, gpu.manifest)[:most]:
        if time.time() > deadline:
            break
        kernel = kernels[name]
        try:
            if "error" in kernel:
                raise RuntimeError(f"was not built: {kernel['error']}")
            result = measure(gpu, kernel)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        append_record(output, _result(kernel, gpu.layers) | result)
        print(f"{name} {gpu.layers[kernel['layer']]['text']}: {_digest(result)}", file=sys.stderr, flush=True)
        if "error" in result and not gpu.is_alive():
            return GPU_LOST
    return 0


def _result(kernel: dict[str, Any], layers: dict[str, Any]) -> dict[str, Any]:
    layer = layers[kernel["layer"]]
    kept = ("text", "kind", "groups", "macs", "precision", "x", "stages", "original", "network", "form")
    shape = {key: layer[key] for key in kept if key in layer} | {"batch": layer["x"][0]}
    return {key: value for key, value in kernel.items() if key not in ("library", "constants", "between")} | {
        "shape": shape
    }


def _digest(result: dict[str, Any]) -> str:
    times = {name: part["median_us"] for name, part in result.get("warm", {}).items()}
    return result.get("error") or ", ".join(f"{name} {median:.2f} us" for name, median in times.items())


def supervise(
    worker: Sequence[str],
    manifest: dict[str, Any],
    names: Sequence[str],
    output: Path,
    budget_s: float,
    stall_s: float,
    most: int | None = None,
) -> int:
    """Run workers until all kernels have a record or the time is over.

    A kernel can end its process or hang it.  The first kernel without a record is then to blame: it
    gets one that says so, and a new worker goes on behind it.  A worker writes its environment before it
    begins; if it does not come that far, no kernel is to blame.

    Parameters
    ----------
    worker : sequence of str
        The command; the time when to stop is added.
    manifest : dict
        The build's.
    names : sequence of str
        The kernels to measure.
    output : Path
        The records.
    budget_s, stall_s : float
        Time for everything, and time without a new record after which a worker is killed.
    most : int, optional
        Kernels that a worker measures; how it ends after that is no kernel's fault.

    Returns
    -------
    int
        Kernels without a record.

    Raises
    ------
    SystemExit
        If a worker could not begin.
    """
    kernels = {kernel["name"]: kernel for kernel in manifest["kernels"]}
    deadline = time.time() + budget_s
    while (left := pending(names, output, manifest)) and time.time() < deadline:
        size = _size(output)
        process = subprocess.Popen([*worker, "--deadline", str(deadline)])
        status = _wait(process, output, stall_s)
        done = len(left) - len(pending(names, output, manifest))
        if status in (0, GPU_LOST) or done == most:
            continue
        error = f"the process ended with status {status}" if status is not None else f"no result in {stall_s:g} s"
        if _size(output) == size:
            raise SystemExit(f"measuring could not begin: {error}; mend what stands above and run this again")
        left = pending(names, output, manifest)
        if left:
            append_record(output, _result(kernels[left[0]], manifest["layers"]) | {"error": error})
    return len(pending(names, output, manifest))


def _size(output: Path) -> int:
    return output.stat().st_size if output.exists() else 0


def _wait(process: subprocess.Popen, output: Path, stall_s: float) -> int | None:
    """Wait for a worker; None if it stalled and was killed."""
    size, since = -1, time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.1)
            now = _size(output)
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > stall_s:
                return None
        return process.returncode
    finally:
        process.kill()
        process.wait()
