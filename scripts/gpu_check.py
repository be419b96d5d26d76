"""Check the CUDA schedules' numbers on a GPU, against float64 NumPy.

The halves can run on different machines::

    python scripts/gpu_check.py build OUTDIR --arch sm_90    # no GPU needed
    python scripts/gpu_check.py run OUTDIR                   # NumPy and TVM's runtime are enough
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tdc_tvm.schedules.cuda.pool import Pool2dShape
    from tdc_tvm.schedules.device import DeviceSpec
    from tdc_tvm.schedules.kernel import ConvWeights, Kernel, Prologue
    from tdc_tvm.schedules.shape import Conv2dShape, ConvShape, Epilogue

BATCH = 32
RANDOM_CASES = 200
MANIFEST = "manifest.json"
ARCH_HELP = "stands for the first GPU of the package's table that has it, such as H100 for sm_90, RTX 4090 for sm_89"


@dataclass(frozen=True)
class Case:
    """A convolution with what follows it, and which stages have a bias."""

    shape: ConvShape
    epilogue: Epilogue
    biases: tuple[bool, ...]

    def __post_init__(self) -> None:
        if hasattr(self.shape, "stages"):
            object.__setattr__(self, "shape", replace(self.shape, reduce_bias=self.biases[0]))

    @property
    def precision(self) -> str:
        """Arithmetic and storage."""
        return self.stages[0].precision

    @property
    def stages(self) -> tuple[Conv2dShape, ...]:
        """The convolutions it consists of."""
        return getattr(self.shape, "stages", None) or (self.shape,)

    @property
    def depth(self) -> int:
        """Length of the longest chain of additions behind one output."""
        return sum(stage.weight_count // stage.out_channels for stage in self.stages)

    def __str__(self) -> str:
        return f"{self.shape}, biases {self.biases}, epilogue {self.epilogue}"


@dataclass(frozen=True)
class PoolCase:
    """A pooling layer, and whether its input is normalised before."""

    shape: Pool2dShape
    precision: str
    has_prologue: bool


@dataclass(frozen=True)
class Made:
    """A kernel to run: what it is given, what it should give, and how far it may be from that."""

    kernel: Kernel
    inputs: list[np.ndarray]
    expected: np.ndarray
    limit: float
    text: str


def table_cases() -> list[Case]:
    """One case for each thing that has gone wrong in convolutions before."""
    from tdc_tvm.schedules.shape import DTYPES, Epilogue, TuckerConvShape
    from tdc_tvm.schedules.shape import Conv2dShape as Conv

    none, relu, all_of_it = Epilogue(), Epilogue(clip_min=0.0), Epilogue(True, 0.0, 6.0)
    same = (1, 1, 1, 1)
    direct = [
        (Conv(1, 56, 56, 64, 64, (3, 3), padding=same), relu),
        (Conv(1, 30, 30, 3, 64, (7, 7), (2, 2), (3, 3, 3, 3)), relu),
        (Conv(1, 14, 14, 64, 128, (1, 1), (2, 2)), none),
        (Conv(2, 7, 7, 130, 34), all_of_it),
        (Conv(1, 9, 8, 6, 6, (3, 3), padding=same, groups=6), relu),
        (Conv(1, 9, 8, 4, 12, (3, 3), padding=same, groups=4), none),
        (Conv(1, 11, 10, 24, 40, (3, 3), padding=same, groups=8), all_of_it),
        (Conv(1, 12, 9, 5, 7, (3, 2), (2, 3), (0, 1, 2, 1), (2, 1)), none),
        (Conv(1, 1, 1, 33, 1), none),
        (Conv(1, 56, 56, 64, 128, (3, 3), padding=same, pool=True), relu),
        (Conv(1, 14, 14, 512, 96, (3, 3), padding=same, pool=True), none),
        (Conv(2, 13, 9, 130, 34, pool=True), all_of_it),
    ]
    tucker = [
        (TuckerConvShape(Conv(1, 56, 56, 64, 64, (3, 3), padding=same), 32, 32), relu),
        (TuckerConvShape(Conv(1, 14, 14, 256, 256, (3, 3), padding=same), 128, 96), all_of_it),
        (TuckerConvShape(Conv(1, 7, 7, 512, 512, (3, 3), padding=same), 192, 160), relu),
        (TuckerConvShape(Conv(1, 28, 28, 64, 128, (3, 3), (2, 2), same), 33, 17), none),
        (TuckerConvShape(Conv(3, 9, 7, 5, 3, (3, 2), (1, 2), (2, 0, 1, 1), (1, 2)), 6, 10), all_of_it),
        (TuckerConvShape(Conv(1, 12, 12, 16, 16, (7, 7), padding=(3, 3, 3, 3)), 1300, 8), none),
        (TuckerConvShape(Conv(1, 1, 1, 1, 1), 1, 1), none),
        (TuckerConvShape(Conv(1, 56, 56, 64, 128, (3, 3), padding=same, pool=True), 32, 64), relu),
        (TuckerConvShape(Conv(2, 14, 14, 512, 512, (3, 3), padding=same, pool=True), 96, 192), relu),
        (TuckerConvShape(Conv(3, 15, 9, 40, 72, (3, 3), padding=same, pool=True), 33, 17), all_of_it),
    ]
    cases = []
    for precision in DTYPES:
        for shape, epilogue in direct:
            if shape.groups == 1 or precision == "fp32":
                cases.append(Case(replace(shape, precision=precision), epilogue, (True,)))
        for shape, epilogue in tucker:
            dense = replace(shape.dense, precision=precision)
            cases.append(Case(replace(shape, dense=dense), epilogue, (True, True, True)))
        for shape in (Conv(1, 14, 14, 256, 128), Conv(2, 7, 9, 130, 34, stride=(2, 1)), Conv(1, 28, 28, 1000, 24)):
            cases.append(Case(replace(shape, precision=precision, prologue=True), relu, (True,)))
    return cases


def pool_cases() -> list[PoolCase]:
    """Windows that overlap, reach out of the image, are the image; whole vectors of channels, and not."""
    from tdc_tvm.schedules.cuda.pool import Pool2dShape
    from tdc_tvm.schedules.shape import DTYPES

    layers = [
        (True, (1, 112, 112, 64), (3, 3), (2, 2), (1, 1), (56, 56)),
        (True, (2, 9, 7, 5), (2, 2), (2, 2), (0, 0), (4, 3)),
        (False, (1, 56, 56, 128), (2, 2), (2, 2), (0, 0), (28, 28)),
        (False, (3, 7, 7, 512), (7, 7), (7, 7), (0, 0), (1, 1)),
        (False, (2, 9, 11, 24), (5, 5), (2, 3), (2, 2), (5, 4)),
    ]
    cases = []
    for precision in DTYPES:
        for number, (is_max, extents, kernel, stride, padding, out) in enumerate(layers):
            shape = Pool2dShape(is_max, *extents, kernel, stride, (1, 1), padding, *out, False, DTYPES[precision])
            cases.append(PoolCase(shape, precision, number % 2 == 0))
    return cases


def random_cases(count: int = RANDOM_CASES, seed: int = 0, largest: int = 24) -> list[Case]:
    """Cases of both operators that hypothesis draws, always the same; extents and channels up to about ``largest``."""
    import hypothesis
    from hypothesis import strategies as st

    from tdc_tvm.errors import TdcError
    from tdc_tvm.schedules.shape import DTYPES, Conv2dShape, Epilogue, TuckerConvShape

    def pair(*values: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.sampled_from(values), st.sampled_from(values))

    @st.composite
    def a_case(draw: st.DrawFn) -> Case:
        tucker = draw(st.booleans())
        groups = 1 if tucker else draw(st.sampled_from((1, 1, 1, 2, 5)))
        channels = st.integers(1, 2 * largest)
        inputs, outputs = groups * draw(channels), groups * draw(channels)
        if not tucker and draw(st.sampled_from((False, False, False, True))):
            groups = inputs = draw(channels)
            outputs = groups * draw(st.sampled_from((1, 2)))
        shape: ConvShape
        try:
            shape = Conv2dShape(
                draw(st.sampled_from((1, 1, 2, 3))),
                draw(st.integers(1, largest)),
                draw(st.integers(1, largest)),
                inputs,
                outputs,
                kernel=draw(pair(1, 2, 3, 5)),
                stride=draw(pair(1, 2, 3)),
                padding=(*draw(pair(0, 1, 2)), *draw(pair(0, 1, 2))),
                dilation=draw(pair(1, 2)),
                groups=groups,
                precision=draw(st.sampled_from(list(DTYPES))) if groups == 1 else "fp32",
            )
        except TdcError:
            hypothesis.reject()
        if tucker:
            shape = TuckerConvShape(shape, draw(st.integers(1, 3 * largest)), draw(st.integers(1, 3 * largest)))
        clip = draw(st.sampled_from(((0.0, None), (None, None), (-0.5, 1.5))))
        biases = draw(st.tuples(*[st.booleans()] * (3 if tucker else 1)))
        return Case(shape, Epilogue(draw(st.booleans()), *clip), biases)

    cases: list[Case] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=2 * count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(a_case())
    def collect(case: Case) -> None:
        cases.append(case)

    collect()
    return [pooled(case) if index % 3 == 2 else case for index, case in enumerate(dict.fromkeys(cases))][:count]


def pooled(case: Case) -> Case:
    """The case with maxima of 2x2, if it can have them."""
    shape, last = case.shape, case.stages[-1]
    if last.groups > 1 or min(last.out_height, last.out_width) < 2:
        return case
    with_maxima = replace(getattr(shape, "dense", shape), pool=True)
    return replace(case, shape=replace(shape, dense=with_maxima) if hasattr(shape, "dense") else with_maxima)


def make_weights(case: Case, rng: np.random.Generator) -> tuple[ConvWeights, ...]:
    """Random weights that keep the scale of the activations, and biases of about their size.

    They are representable in the precision that they are multiplied in.
    """
    from tdc_tvm.schedules.cuda.pack import round_to
    from tdc_tvm.schedules.kernel import ConvWeights

    weights = []
    for stage, has_bias in zip(case.stages, case.biases, strict=True):
        shape = (stage.out_channels, stage.in_channels // stage.groups, *stage.kernel)
        kernel = rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
        bias = rng.standard_normal(stage.out_channels).astype(np.float32) if has_bias else None
        kernel = round_to(case.precision, kernel).astype(np.float32)
        weights.append(ConvWeights(kernel, bias))
    return tuple(weights)


def make_inputs(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """A random input, and a residual if the epilogue adds one; both NHWC, in the type that is stored."""
    from tdc_tvm.schedules.cuda.pack import round_to

    first, last = case.stages[0], case.stages[-1]
    x = rng.standard_normal((first.batch, first.height, first.width, first.in_channels))
    x = round_to(case.precision, x)
    if not case.epilogue.residual:
        return x, None
    out_shape = (last.batch, last.out_height, last.out_width, last.out_channels)
    return x, round_to(case.precision, rng.standard_normal(out_shape))


def convolve(shape: Conv2dShape, x: np.ndarray, weights: ConvWeights) -> np.ndarray:
    """One convolution in float64, tap by tap."""
    (top, left, bottom, right), groups = shape.padding, shape.groups
    padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    kernel = weights.kernel.astype(np.float64).reshape(groups, shape.out_channels // groups, -1, *shape.kernel)
    out = np.zeros((shape.batch, shape.out_height, shape.out_width, groups, kernel.shape[1]))
    for r in range(shape.kernel[0]):
        for s in range(shape.kernel[1]):
            y, z = r * shape.dilation[0], s * shape.dilation[1]
            rows = slice(y, y + (shape.out_height - 1) * shape.stride[0] + 1, shape.stride[0])
            columns = slice(z, z + (shape.out_width - 1) * shape.stride[1] + 1, shape.stride[1])
            window = padded[:, rows, columns].reshape(*out.shape[:3], groups, -1)
            out += np.einsum("bhwgc,gnc->bhwgn", window, kernel[..., r, s], optimize=True)
    out = out.reshape(*out.shape[:3], shape.out_channels)
    return out if weights.bias is None else out + weights.bias


def reference(case: Case, x: np.ndarray, weights: tuple[ConvWeights, ...], residual: np.ndarray | None) -> np.ndarray:
    """What the kernel should compute, in float64."""
    value = x
    for stage, stage_weights in zip(case.stages, weights, strict=True):
        value = convolve(stage, value, stage_weights)
    if residual is not None:
        value = value + residual.astype(np.float64)
    if case.epilogue.clip_min is not None or case.epilogue.clip_max is not None:
        value = np.clip(value, case.epilogue.clip_min, case.epilogue.clip_max)
    if not case.stages[-1].pool:
        return value
    batch, height, width, channels = case.stages[-1].stored_extents
    windows = value[:, : 2 * height, : 2 * width].reshape(batch, height, 2, width, 2, channels)
    return windows.max(axis=(2, 4))


def error_of(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative error in the Frobenius norm; NaN if an output was not written."""
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(actual.astype(np.float64) - expected)) / (norm or 1.0)


def tolerance(precision: str, depth: int) -> float:
    """The relative error that rounding explains; for FP32 1e-6 times the root of the reduction's length."""
    return {"fp32": 1e-6 * math.sqrt(depth), "tf32": 1e-3, "fp16": 2e-3, "bf16": 1e-2}[precision]


def pool(shape: Pool2dShape, x: np.ndarray) -> np.ndarray:
    """One pooling layer in float64, tap by tap; padding counts neither as a maximum nor in a mean."""
    ends = [
        max(0, (out - 1) * stride + kernel - extent - before)
        for out, stride, kernel, extent, before in zip(
            (shape.out_height, shape.out_width), shape.stride, shape.kernel, x.shape[1:3], shape.padding, strict=True
        )
    ]
    border = ((0, 0), *zip(shape.padding, ends, strict=True), (0, 0))
    padded = np.pad(x.astype(np.float64), border, constant_values=np.nan)
    taps = [
        padded[:, r:, s:][:, :: shape.stride[0], :: shape.stride[1]][:, : shape.out_height, : shape.out_width]
        for r in range(shape.kernel[0])
        for s in range(shape.kernel[1])
    ]
    return (np.nanmax if shape.is_max else np.nanmean)(np.stack(taps), axis=0)


def normalised(
    x: np.ndarray, has_prologue: bool, precision: str, rng: np.random.Generator
) -> tuple[np.ndarray, Prologue | None]:
    """A random normalisation with a ReLU, if there is one, and what it makes of an input."""
    from tdc_tvm.schedules.cuda.pack import round_to
    from tdc_tvm.schedules.kernel import Prologue

    if not has_prologue:
        return x, None
    scale, shift = (rng.standard_normal(x.shape[-1]).astype(np.float32) for _ in range(2))
    return round_to(precision, np.maximum(x.astype(np.float32) * scale + shift, 0)), Prologue(scale, shift, 0.0)


def make(case: Case | PoolCase, device: DeviceSpec, index: int) -> Made:
    """The kernel of a case, its inputs and what it should give."""
    from tdc_tvm.schedules.cuda import conv
    from tdc_tvm.schedules.cuda import pool as pooling
    from tdc_tvm.schedules.cuda.pack import round_to

    rng = np.random.default_rng(index)
    if isinstance(case, PoolCase):
        shape = case.shape
        x = rng.standard_normal((shape.batch, shape.height, shape.width, shape.channels))
        x = round_to(case.precision, x)
        prepared, prologue = normalised(x, case.has_prologue, case.precision, rng)
        kernel = pooling.make_kernel(shape, device, "pool", prologue)
        return Made(kernel, [x, *kernel.constants], pool(shape, prepared), tolerance(case.precision, 1), str(case))
    weights, (x, residual) = make_weights(case, rng), make_inputs(case, rng)
    configs = conv.candidates(case.shape, device)
    # The model's pick for half of the cases; any configuration must be right.
    config = configs[rng.integers(len(configs))] if index % 2 else conv.choose(case.shape, device)[0]
    prepared, prologue = normalised(x, case.stages[0].prologue, case.precision, rng)
    kernel = conv.make_kernel(case.shape, case.epilogue, weights, config, device, "conv", prologue)
    inputs = [x, *kernel.constants, *([] if residual is None else [residual])]
    text = f"{case}, {config.strategy}: {config}"
    # Where it is normalised the input is rounded once more.
    limit = tolerance(case.precision, case.depth) * (1 + case.stages[0].prologue)
    return Made(kernel, inputs, reference(case, prepared, weights, residual), limit, text)


def build(folder: Path, arch: str, cases: Sequence[Case | PoolCase]) -> None:
    """Compile the cases into libraries of 32 kernels, and store their inputs and expected outputs."""
    import tvm
    from tvm.target import Target

    from tdc_tvm.cuda_toolchain import cubin_kernels, cuda_compiler
    from tdc_tvm.schedules.cuda.lowering import TIR_PIPELINE

    device = device_of(arch)
    target = Target({"kind": "cuda", "arch": arch})
    begin_build(folder)
    records = []
    for start in range(0, len(cases), BATCH):
        functions, arrays = {}, {}
        library = f"batch{start // BATCH}"
        for index, case in enumerate(cases[start : start + BATCH], start):
            made = make(case, device, index)
            name = f"case{index}"
            functions[name] = made.kernel.func.with_attr("global_symbol", name)
            # NumPy's files know no BF16: its bits are stored.
            types = [str(array.dtype) for array in made.inputs]
            for position, array in enumerate(made.inputs):
                arrays[f"{name}.{position}"] = array.view(np.uint16) if types[position] == "bfloat16" else array
            arrays[f"{name}.expected"] = made.expected.astype(np.float32)
            records.append(
                {
                    "name": name,
                    "library": library,
                    "types": types,
                    "limit": made.limit,
                    "text": made.text,
                    "between": made.kernel.between,
                }
            )
        with cuda_compiler(target):
            module = tvm.tirx.build(tvm.IRModule(functions), target=target, pipeline=TIR_PIPELINE)
        module.export_library(str(folder / f"{library}.so"))
        kernels = cubin_kernels(folder / f"{library}.so")
        assert len(kernels) >= len(functions), f"{library}: {len(kernels)} kernels for {len(functions)} functions"
        np.savez(folder / f"{library}.npz", **arrays)
    end_build(folder, {"arch": arch, "cases": records})


def begin_build(folder: Path) -> None:
    """Make the folder, and remove the manifest of a build before: interrupted, this one is none.

    Raises
    ------
    SystemExit
        If that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise SystemExit(f"cannot build in {folder}: {error.strerror}; choose another folder") from error


def end_build(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, all at once."""
    from tdc_tvm.files import write_atomic

    with write_atomic(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))


def device_of(arch: str) -> DeviceSpec:
    """The first GPU of the package's table that has an architecture.

    Raises
    ------
    SystemExit
        If there is none.
    """
    from tvm.target import Target

    from tdc_tvm.errors import TdcError
    from tdc_tvm.schedules.device import GPUS, DeviceSpec

    try:
        return DeviceSpec.from_target(Target({"kind": "cuda", "arch": arch}))
    except (TdcError, ValueError) as error:
        known = ", ".join(sorted({spec.arch for spec in GPUS.values()}))
        raise SystemExit(f"no GPU of architecture {arch!r} in the table; there are: {known}") from error


def exit_status(main: Callable[[], int]) -> int:
    """Run a command line; a user's mistake ends it with its message, Ctrl-C with status 130, without a traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # On a machine that only runs kernels the package need not be there.
        if type(error).__name__ != "TdcError":
            raise
        print(error, file=sys.stderr)
        return 1


def load_cuda_library() -> None:
    """Load TVM's CUDA library, which its runtime does not load by itself; again does nothing.

    Raises
    ------
    SystemExit
        If the library does not load, as without a driver, or finds no GPU.
    """
    import tvm
    import tvm_ffi
    from tvm import libinfo
    from tvm_ffi.libinfo import load_lib_ctypes

    advice = "run this on a machine where nvidia-smi lists a GPU"
    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is None:
        try:
            load_lib_ctypes("tvm", "tvm_runtime_cuda", "RTLD_LOCAL", extra_lib_paths=libinfo.package_lib_paths())
        except (OSError, RuntimeError) as error:
            raise SystemExit(f"TVM's CUDA library does not load: {error}; {advice}") from error
    if not tvm.cuda(0).exist:
        raise SystemExit(f"TVM finds no NVIDIA GPU here; {advice}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``build`` wrote.

    Raises
    ------
    SystemExit
        If it is not there or broken.
    """
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as missing:
        message = f"found no {path}, which `build {folder}` writes when all is compiled; run that first"
        raise SystemExit(message) from missing
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot read {path}: {error}; run `build {folder}` again") from error


def run(folder: Path) -> list[str]:
    """Run what was built on this machine's GPU, twice: the same input must give the same bits.

    Returns
    -------
    list[str]
        A line for each case that is wrong.
    """
    import tvm

    cases = read_manifest(folder)["cases"]
    load_cuda_library()
    device = tvm.cuda(0)
    failures = []
    libraries: dict[str, tuple] = {}
    for record in cases:
        library, name = record["library"], record["name"]
        if library not in libraries:
            module = tvm.runtime.load_module(str(folder / f"{library}.so"))
            libraries[library] = module, np.load(folder / f"{library}.npz")
        module, arrays = libraries[library]
        inputs = [
            tvm.runtime.tensor(_typed(arrays[f"{name}.{position}"], dtype), device)
            for position, dtype in enumerate(record["types"])
        ]
        expected = arrays[f"{name}.expected"]
        outs = []
        for _ in range(2):
            nan = [_typed(np.full(shape, np.nan), record["types"][0]) for shape in (expected.shape, *record["between"])]
            written = [tvm.runtime.tensor(array, device) for array in nan]
            module[name](*inputs, *written)
            outs.append(written[0].numpy())
        error, limit = error_of(outs[0], expected), record["limit"]
        if not error <= limit:
            failures.append(f"{name}: relative error {error:.2e}, at most {limit:.2e} expected; {record['text']}")
        if outs[0].tobytes() != outs[1].tobytes():
            failures.append(f"{name}: a second run gives other bits; {record['text']}")
    return failures


def _typed(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array in a type by name; BF16 also from its bits."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    import ml_dtypes

    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array.astype(ml_dtypes.bfloat16)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build_command = commands.add_parser("build", help="compile; needs no GPU")
    build_command.add_argument("--arch", default="sm_90", help=ARCH_HELP)
    run_command = commands.add_parser("run", help="run and compare")
    for command in (build_command, run_command):
        command.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "build":
        device_of(arguments.arch)
        cases = [*table_cases(), *pool_cases(), *random_cases()]
        build(arguments.folder, arguments.arch, cases)
        print(f"built {len(cases)} cases for {arguments.arch} in {arguments.folder}")
        return 0
    failures = run(arguments.folder)
    print("\n".join(failures) or "all cases agree")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
