"""Compiling CUDA kernels to machine code on any Linux machine: no GPU, driver or set-up by the user is needed.

TVM needs help three times.  Its CUDA library does not load without a driver, and TVM then quietly
exports CUDA *source*, to be compiled on the user's machine: here a stand-in driver lets the library
load.  NVRTC's headers from pip lie where TVM does not look: here the compiler is called directly.
TVM compiles with fast math, which replaces ``exp`` and division by approximations: here it is off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import logging
import mmap
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tvm_ffi
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection
from tvm.base import _LOADED_LIBS
from tvm.support import cc, nvcc  # noqa: F401  (importing nvcc registers the callback that is replaced here)
from tvm.target import Target

from tdc_tvm.errors import TdcError

# What ptxas makes of kernels (registers, spills, products that it serialises): level DEBUG.
_LOG = logging.getLogger(__name__)

_CALLBACK = "tvm_callback_cuda_compile"
_INSTALL = "install them with: pip install 'tdc-tvm[cuda]'"
_HEADERS = ("cuda_fp16.h", "crt/host_defines.h", "cuda/std/cstdint")
_NVRTC_PREAMBLE = """\
#include <cuda/std/limits>
#ifndef INFINITY
#define INFINITY (::cuda::std::numeric_limits<float>::infinity())
#endif
"""

# TVM serialises a module as its kind, the size of the rest, and the rest, which for CUDA begins
# with the format; strings come after their length, and numbers have eight bytes.
_CUDA_MODULE = re.compile(rb"\x04\0{7}cuda(?P<size>.{8})[\x03-\x06]\0{7}(?P<format>cuda|ptx|cubin|fatbin)", re.DOTALL)
# Attributes of .nv.info: format 4 (value with a size), code, size 8, symbol index, value.
_REGISTER_COUNT, _FRAME_SIZE = 0x2F, 0x11


@dataclass(frozen=True)
class CudaCompiler:
    """A compiler from CUDA source to machine code.

    Parameters
    ----------
    name : str
        ``"nvrtc"`` or ``"nvcc"``.
    path : pathlib.Path
        The root of NVRTC's headers, or the nvcc executable.
    """

    name: str
    path: Path

    def compile(self, source: str, arch: str) -> bytes:
        """Compile to a cubin.

        Parameters
        ----------
        source : str
            CUDA C++.
        arch : str
            A real architecture such as ``"sm_90"``.

        Raises
        ------
        RuntimeError
            With the compiler's log, if it rejects the source.
        """
        compile_source = _compile_nvrtc if self.name == "nvrtc" else _compile_nvcc
        # What groups of warps do is not in "sm_90", which would run nowhere else either.
        return compile_source(source, "sm_90a" if arch == "sm_90" else arch, self.path)


def find_cuda_compiler() -> CudaCompiler:
    """Find NVRTC (quicker, and installable with pip), else nvcc.

    Headers are looked for in the pip packages, in ``CUDA_PATH`` or ``CUDA_HOME``, beside nvcc, and
    in ``/usr/local/cuda``.

    Raises
    ------
    TdcError
        If neither compiler is there.
    """
    roots = _cuda_roots()
    missing = "the package cuda-bindings with libnvrtc is missing"
    if _nvrtc_loads():
        for root in roots:
            if _include_dirs(root) is not None:
                return CudaCompiler("nvrtc", root)
        missing = f"NVRTC's headers ({', '.join(_HEADERS)}) are missing"
    for path in (shutil.which("nvcc"), *(root / "bin" / "nvcc" for root in roots)):
        if path is not None and os.access(path, os.X_OK):
            return CudaCompiler("nvcc", Path(path))
    raise TdcError(f"no CUDA compiler found: {missing}, and there is no nvcc; {_INSTALL}")


def cuda_version() -> str:
    """Of the compiler that is used, such as ``"nvrtc 13.0"``.

    Raises
    ------
    TdcError
        If there is none.
    """
    compiler = find_cuda_compiler()
    if compiler.name == "nvrtc":
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
        return f"nvrtc {major}.{minor}"
    found = re.search(r"release ([\d.]+)", _run([str(compiler.path), "--version"]))
    return f"nvcc {found[1]}" if found else "nvcc"


@contextlib.contextmanager
def cuda_compiler(target: Target) -> Iterator[CudaCompiler]:
    """Make every CUDA build within the block compile to machine code of ``target``.

    The target is the current one within the block, and TVM's own compile callback is put back
    at its end; no environment variable is read by the build or changed.

    Parameters
    ----------
    target : tvm.target.Target
        A ``cuda`` target with its ``arch``.

    Yields
    ------
    CudaCompiler
        The compiler that is used.

    Raises
    ------
    TdcError
        If the target is not a CUDA target, or a compiler or library is missing.

    Examples
    --------
    >>> target = Target({"kind": "cuda", "arch": "sm_90"})      # doctest: +SKIP
    >>> with cuda_compiler(target):                             # doctest: +SKIP
    ...     tvm.compile(module, target=target).export_library("model.so")
    """
    if target.kind.name != "cuda":
        raise TdcError(f"cannot compile CUDA for target kind {target.kind.name!r}; expected 'cuda'")
    arch = str(target.attrs["arch"])
    compiler = find_cuda_compiler()
    load_cuda_runtime()
    original = tvm_ffi.get_global_func(_CALLBACK)

    def compile_source(source: str) -> bytes:
        return compiler.compile(source, arch)

    tvm_ffi.register_global_func(_CALLBACK, compile_source, override=True)
    try:
        with target:
            yield compiler
    finally:
        tvm_ffi.register_global_func(_CALLBACK, original, override=True)


@dataclass(frozen=True, order=True)
class CubinKernel:
    """One kernel of an exported library, as machine code.

    Parameters
    ----------
    name : str
        Its symbol.
    arch : str
        What it runs on, such as ``"sm_90"``; a trailing ``a`` is not recorded.
    registers : int
        Registers of a thread.
    local_bytes : int
        Stack of a thread: spilled registers and arrays that did not fit into registers.
    static_smem_bytes : int
        Shared memory of a block that is known before the launch.
    """

    name: str
    arch: str
    registers: int
    local_bytes: int
    static_smem_bytes: int


def cubin_kernels(library: str | Path) -> tuple[CubinKernel, ...]:
    """The CUDA kernels of an exported library, which must all be machine code.

    Parameters
    ----------
    library : str or pathlib.Path
        What ``export_library`` wrote.

    Returns
    -------
    tuple[CubinKernel, ...]
        In alphabetical order; empty if the library has no CUDA module.

    Raises
    ------
    TdcError
        If a CUDA module holds source or PTX, which would be compiled when the library is loaded.
    """
    kernels: list[CubinKernel] = []
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for record in _CUDA_MODULE.finditer(data):
            form = record["format"].decode()
            if form != "cubin":
                raise TdcError(
                    f"{library} carries a CUDA module as {form!r}, expected 'cubin' (machine code); "
                    "build it within cuda_toolchain.cuda_compiler(target)"
                )
            (size,) = struct.unpack("<Q", record["size"])
            module = data[record.start("format") : record.end("size") + size]
            kernels += _read_cubin(module[module.index(b"\x7fELF") :])
    return tuple(sorted(kernels))


def load_cuda_runtime() -> None:
    """Load TVM's CUDA library, with a stand-in for the driver where there is none.

    The stand-in answers every call with "no device", so that ``tvm.cuda(0).exist`` is False; it
    stays for the life of the process.  Calling this again does nothing.

    Raises
    ------
    TdcError
        If libcudart or a C compiler is missing.
    """
    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    library = Path(_LOADED_LIBS["tvm_runtime"]._name).resolve().with_name("libtvm_runtime_cuda.so")
    if not library.exists():
        raise TdcError(f"this TVM cannot build for CUDA: {library} is missing; reinstall apache-tvm")
    _load_cudart()
    if not _loads("libcuda.so.1"):
        _load_stub_driver(library)
    _LOADED_LIBS["tvm_runtime_cuda"] = ctypes.CDLL(str(library), ctypes.RTLD_LOCAL)


def _read_cubin(image: bytes) -> list[CubinKernel]:
    """The kernels of a cubin, an ELF file with a ``.text.<name>`` section for each."""
    elf = ELFFile(io.BytesIO(image))
    arch = f"sm_{elf['e_flags'] >> 8 & 0xFF}"
    sections = {section.name: section for section in elf.iter_sections()}
    symbols = sections[".symtab"]
    assert isinstance(symbols, SymbolTableSection), "a cubin has symbols"
    values: dict[tuple[int, str], int] = {}
    for code in (_REGISTER_COUNT, _FRAME_SIZE):
        for entry in re.finditer(struct.pack("<BBH", 4, code, 8) + b"(.{8})", sections[".nv.info"].data(), re.DOTALL):
            index, value = struct.unpack("<II", entry[1])
            values[code, symbols.get_symbol(index).name] = value
    names = [name.removeprefix(".text.") for name in sections if name.startswith(".text.")]
    return [
        CubinKernel(
            name,
            arch,
            values[_REGISTER_COUNT, name],
            values[_FRAME_SIZE, name],
            sections[f".nv.shared.{name}"]["sh_size"] if f".nv.shared.{name}" in sections else 0,
        )
        for name in names
    ]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library, ctypes.RTLD_LOCAL)
    except OSError:
        return False
    return True


def _load_cudart() -> None:
    name = "libcudart.so.13"
    places = [str(root / folder / name) for root in _cuda_roots() for folder in ("lib", "lib64")]
    if not any(_loads(place) for place in (name, *places)):
        raise TdcError(f"{name} (the CUDA 13 runtime library) was not found; {_INSTALL}")


def _load_stub_driver(library: Path) -> None:
    """Build and load a libcuda.so.1 that has just the functions ``library`` refers to.

    The dynamic linker knows a loaded library by its soname, so the library's dependency on the
    driver is met by the stub although it lies in no search path.
    """
    compiler = cc.get_cc()
    if compiler is None:
        raise TdcError("no C compiler found (set CXX, or install gcc): exporting a compiled model needs one")
    with library.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".dynsym")
        assert isinstance(table, SymbolTableSection), f"{library} has no dynamic symbols"
        missing = [symbol.name for symbol in table.iter_symbols() if symbol["st_shndx"] == "SHN_UNDEF"]
    names = [name for name in missing if name.startswith("cu") and not name.startswith("cuda")]
    no_device = "(void) { return 100; }"
    say = '(int code, const char** text) { *text = "no CUDA driver on this machine"; return 0; }'
    functions = [f"int {name}{say if name.startswith('cuGetError') else no_device}" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        source, stub = Path(folder, "stub.cc"), Path(folder, "libcuda.so.1")
        source.write_text("\n".join(['extern "C" {', *functions, "}\n"]))
        _run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stub), str(source)])
        ctypes.CDLL(str(stub), ctypes.RTLD_LOCAL)


def _cuda_roots() -> list[Path]:
    """Folders that may hold ``include``, ``lib`` and ``bin``, best first."""
    spec = importlib.util.find_spec("nvidia")
    packages = list(spec.submodule_search_locations or ()) if spec is not None else []
    roots = [Path(package, "cu13") for package in packages]
    roots += [Path(os.environ[name]) for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        roots.append(Path(on_path).resolve().parent.parent)
    return [*roots, Path("/usr/local/cuda")]


def _include_dirs(root: Path) -> list[str] | None:
    """Where the headers are below ``root``, or None if one of them is not."""
    folders = [root / "include", root / "include" / "cccl"]
    if all(any((folder / header).is_file() for folder in folders) for header in _HEADERS):
        return [str(folder) for folder in folders]
    return None


@functools.lru_cache(maxsize=1)
def _nvrtc_loads() -> bool:
    try:
        from cuda.bindings import nvrtc

        return nvrtc.nvrtcVersion()[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS
    except (ImportError, RuntimeError):
        return False


def _compile_nvrtc(source: str, arch: str, root: Path) -> bytes:
    from cuda.bindings import nvrtc

    def check(result: tuple):
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC failed: {result[0].name}")
        return result[1] if len(result) > 1 else None

    include_dirs = _include_dirs(root) or []
    options = [f"--gpu-architecture={arch}", "-default-device", "--device-int128", "--ptxas-options=-v"]
    options += [f"-I{folder}" for folder in include_dirs]
    encoded = [option.encode() for option in options]
    program = check(nvrtc.nvrtcCreateProgram((_NVRTC_PREAMBLE + source).encode(), b"kernels.cu", 0, None, None))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = bytearray(check(nvrtc.nvrtcGetProgramLogSize(program)))
        check(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC failed for {arch}: {status.name}\n{text}")
        _LOG.debug("%s", text)
        cubin = bytearray(check(nvrtc.nvrtcGetCUBINSize(program)))
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _compile_nvcc(source: str, arch: str, path: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        cu, cubin = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        cu.write_text(source)
        options = ["-cubin", f"-arch={arch}", "-O3", "-std=c++17", "-Xptxas", "-v"]
        _LOG.debug("%s", _run([str(path), *options, "-o", str(cubin), str(cu)]))
        return cubin.read_bytes()


def _run(command: list[str]) -> str:
    """What a command prints on both streams."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
