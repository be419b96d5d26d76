"""The deployable library: a .so with kernels, weights and a section that describes them.

The description lies in an ELF section of its own, so that it is read and checked before any code
of the file runs: on a machine of another architecture, without a GPU, or from a truncated copy.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import tvm
import tvm_ffi
from elftools.elf.elffile import ELFFile
from tvm.support import cc
from tvm.target import Target

from tdc_tvm.errors import TdcError
from tdc_tvm.files import check_output, write_atomic
from tdc_tvm.onnx_model import TensorInfo
from tdc_tvm.quiet import without_chatter
from tdc_tvm.targets import local_gpu

SECTION = ".tdc.metadata"
FORMAT_VERSION = 2
# Instruction sets whose names are the same in LLVM and in Linux's /proc/cpuinfo.
_CPU_FEATURES = (
    "avx", "avx2", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vbmi",
    "bmi1", "bmi2", "f16c", "fma", "gfni", "vaes",
)  # fmt: skip
# From ELF's names of processors to those of platform.machine().
_MACHINES = {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}


@dataclass(frozen=True)
class Entry:
    """The model at one batch size: a function of the library.

    Parameters
    ----------
    function : str
        ``"main"`` for the first, ``"main_8"`` for a further batch of 8.
    batch : int or None
        The batch size that was asked for; None if the model's own shapes were built.
    inputs, outputs : tuple[TensorInfo, ...]
        In the model's order.
    """

    function: str
    batch: int | None
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Metadata:
    """What a library was built from and for.

    Parameters
    ----------
    entries : tuple[Entry, ...]
        One for each batch size, in the order that they were asked for.
    kind : str
        ``"llvm"`` or ``"cuda"``.
    arch : str
        GPU architecture, or LLVM's name of the processor.
    machine : str
        Host architecture, as in ``platform.machine()``.
    cpu_features : tuple[str, ...]
        Instruction sets that the host must have.
    tvm_version : str
        The runtime that the library needs.
    source_sha256 : str
        Of the ONNX model.
    report : dict
        `BuildReport.to_dict`.
    """

    entries: tuple[Entry, ...]
    kind: str
    arch: str
    machine: str
    cpu_features: tuple[str, ...]
    tvm_version: str
    source_sha256: str
    report: dict
    format_version: int = FORMAT_VERSION


def host_features(target: Target) -> tuple[str, ...]:
    """The instruction sets that code for ``target`` may use on the host."""
    host = target if target.kind.name == "llvm" else target.host
    llvm = {str(name) for name in tvm.target.codegen.llvm_get_cpu_features(host)}
    return tuple(name for name in _CPU_FEATURES if name in llvm or name.replace("bmi1", "bmi") in llvm)


def cxx_compiler() -> str:
    """The C++ compiler that links libraries.

    Raises
    ------
    TdcError
        If there is none.
    """
    path = cc.get_cc()
    if not path:
        raise TdcError(
            "no C++ compiler found; linking a model needs one: install g++ (Debian, Ubuntu: apt install g++) or set CXX"
        )
    if shutil.which(path) is None:
        raise TdcError(f"the C++ compiler {path!r} (from CXX or CC) is not a program; set CXX to one, such as g++")
    return path


def check_library_path(path: str | os.PathLike) -> None:
    """Refuse a path that no library can be written to, before the work is done.

    Raises
    ------
    TdcError
        If the name does not end in .so, or no file can be made there.
    """
    check_output(path, "a library", (".so",))


class ObjectFiles:
    """An executable's machine code in a temporary folder, linked once to run here and once more for each export.

    Parameters
    ----------
    executable : tvm.runtime.Executable
        What ``relax.build`` returns; its code is generated now.
    """

    def __init__(self, executable: tvm.runtime.Executable) -> None:
        self._folder = tempfile.mkdtemp(prefix="tdc-")
        # Unlike a TemporaryDirectory, which warns of what nobody closed.
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files: list[str] = []
        self._options: list[str] | None = None
        with without_chatter():
            executable.export_library("model.so", fcompile=self._keep_files(), workspace_dir=self._folder)

    def _keep_files(self) -> Callable:
        def keep(output: str, files: list[str], options: list[str] | None = None) -> None:
            self._files, self._options = list(files), options

        keep.object_format = "o"  # type: ignore[attr-defined]
        return keep

    def link(self, metadata: Metadata, path: str | os.PathLike) -> None:
        """Write the shared library with its description.

        Raises
        ------
        TdcError
            If the path cannot be written, or linking fails.  An existing file survives.
        """
        check_library_path(path)
        blob, source = Path(self._folder, "metadata.json"), Path(self._folder, "metadata.s")
        with write_atomic(path) as temporary:
            blob.write_text(json.dumps(asdict(metadata)))
            source.write_text(f'.section {SECTION},"a"\n.incbin "{blob}"\n.section .note.GNU-stack,"",@progbits\n')
            try:
                cc.create_shared(str(temporary), [*self._files, str(source)], self._options, cc=cxx_compiler())
            except RuntimeError as error:
                hint = f"; for {metadata.machine} set CXX to a cross compiler" if _is_foreign(metadata) else ""
                raise TdcError(f"linking {path} failed{hint}: {error}") from None

    def load(self, metadata: Metadata) -> tvm.runtime.Module:
        """Link into the temporary folder and load."""
        path = Path(self._folder, "here.so")
        self.link(metadata, path)
        return load_module(path)


def load_module(path: str | os.PathLike) -> tvm.runtime.Module:
    """Load a library's code.

    Raises
    ------
    TdcError
        If the dynamic linker or TVM refuses it.
    """
    # The dynamic linker knows loaded libraries by name, and would give the old code for a file that
    # has been replaced since; by a name that is used once, it looks at the file itself.
    with tempfile.TemporaryDirectory(prefix="tdc-") as folder, without_chatter():
        link = Path(folder, "model.so")
        link.symlink_to(os.path.abspath(path))
        try:
            return tvm_ffi.load_module(link)  # TVM's own load_module resolves links
        except RuntimeError as error:
            reason = str(error).strip().replace(str(link), str(path))
            raise TdcError(f"{path} cannot be loaded; build it again on this machine: {reason}") from None


def read_metadata(path: str | os.PathLike) -> Metadata:
    """Read a library's description without running any of its code.

    Raises
    ------
    TdcError
        If the file is missing, not a library of this project, truncated, or of another format version.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TdcError(f"a library is given by its path; found {type(path).__name__}")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            elf = ELFFile(file)
            section = elf.get_section_by_name(SECTION)
            data = section.data() if section is not None else None
            machine = _MACHINES.get(elf.header["e_machine"], str(elf.header["e_machine"]))
            truncated = (
                elf.header["e_shoff"] + elf.header["e_shnum"] * elf.header["e_shentsize"]
                > os.fstat(file.fileno()).st_size
            )
    except OSError as error:
        raise TdcError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged header makes the parser fail in any way
        if magic == b"\x7fELF":
            raise TdcError(f"{path} is damaged or truncated ({error}); copy or build it again") from None
        what = "not a shared library" if magic else "empty"
        raise TdcError(f"{path} is {what}; expected a .so written by export_library or 'tdc build'") from None
    if truncated:
        raise TdcError(f"{path} is truncated; copy it again")
    if data is None:
        raise TdcError(
            f"{path} ({machine}) was not built by tdc_tvm: it has no {SECTION} section;"
            " build one with 'tdc build MODEL -o out.so'"
        )
    try:
        fields = json.loads(data)
        version = fields["format_version"]
    except (ValueError, KeyError, TypeError):
        raise TdcError(f"the description in {path} is damaged; build or copy the library again") from None
    if version != FORMAT_VERSION:
        raise TdcError(f"{path} has format version {version}; this release reads {FORMAT_VERSION}; build it again")
    try:
        entries = tuple(
            Entry(entry["function"], entry["batch"], _tensors(entry["inputs"]), _tensors(entry["outputs"]))
            for entry in fields["entries"]
        )
        result = Metadata(**{**fields, "entries": entries, "cpu_features": tuple(fields["cpu_features"])})
    except (KeyError, TypeError):
        raise TdcError(f"the description in {path} is damaged; build or copy the library again") from None
    if machine != result.machine:
        raise TdcError(
            f"{path} holds code for {machine} machines and a description for {result.machine};"
            " it is damaged: build or copy it again"
        )
    return result


def _tensors(fields: list[dict]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(tensor["name"], tuple(tensor["shape"]), tensor["dtype"]) for tensor in fields)


def check_runs_here(metadata: Metadata, path: str | os.PathLike) -> None:
    """Refuse a library that this machine cannot run.

    Raises
    ------
    TdcError
        Naming what the library needs and what is here.
    """
    if _is_foreign(metadata):
        raise TdcError(
            f"{path} was built for {metadata.machine} machines, this one is {platform.machine()};"
            " build it for this machine"
        )
    if metadata.tvm_version != tvm.__version__:
        raise TdcError(
            f"{path} was built with TVM {metadata.tvm_version}, installed is {tvm.__version__};"
            f" install apache-tvm=={metadata.tvm_version} or build it again"
        )
    missing = sorted(set(metadata.cpu_features) - set(local_cpu_features()))
    if missing:
        raise TdcError(
            f"{path} was built for {metadata.arch} and needs {', '.join(missing)}, which this CPU lacks;"
            " build it with a lesser target, such as Target({'kind': 'llvm', 'mcpu': 'x86-64-v2'})"
        )
    if metadata.kind == "cuda":
        _check_gpu(metadata.arch, path)


def _is_foreign(metadata: Metadata) -> bool:
    return metadata.machine != platform.machine()


def local_cpu_features() -> tuple[str, ...]:
    """The instruction sets of this machine's CPU, by Linux's names."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return tuple(line.split(":", 1)[1].split())
    return ()


def _check_gpu(arch: str, path: str | os.PathLike) -> None:
    device = local_gpu()
    if device is None:
        raise TdcError(
            f"{path} was built for GPU architecture {arch}, and this machine has no usable GPU; build it for 'llvm'"
        )
    major, minor = (int(part) for part in str(device.compute_version).split("."))
    here = 10 * major + minor
    number = int("".join(c for c in arch if c.isdigit()))
    exact = not arch[-1].isdigit()
    if (here != number) if exact else (here // 10 != number // 10 or here < number):
        raise TdcError(
            f"{path} was built for GPU architecture {arch}, this machine's GPU is sm_{here}; build it for sm_{here}"
        )
