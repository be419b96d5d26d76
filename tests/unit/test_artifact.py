"""Libraries that must not be loaded, and files that must not be damaged."""

import errno
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tvm
from tvm.support import cc
from tvm.target import Target

import tdc_tvm
from tdc_tvm import artifact
from tdc_tvm.artifact import check_runs_here, cxx_compiler, read_metadata
from tdc_tvm.errors import TdcError

ROOT = Path(__file__).parents[2]
EM_AARCH64 = 183


def swap(old, new):
    """An edit of a library's bytes that keeps its length."""

    def edit(data):
        assert data.count(old) == 1
        assert len(old) == len(new)
        return data.replace(old, new)

    return edit


def set_machine(number):
    return lambda data: data[:18] + struct.pack("<H", number) + data[20:]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_machine(EM_AARCH64), "holds code for aarch64 machines and a description for x86_64.*copy it again"),
        (swap(b'"format_version": 2', b'"format_version": 1'), "has format version 1; this release reads 2; build it"),
        (swap(b'"format_version": 2', b'"format_versiom": 2'), "description in .* is damaged"),
        (swap(b'"inputs"', b'"inputz"'), "description in .* is damaged"),
        (swap(b'"entries"', b'"entriez"'), "description in .* is damaged"),
        (swap(b'"report"', b'"rep\\u0"'), "description in .* is damaged"),
        (swap(b'"tvm_version": "0.27', b'"tvm_version": "0.31'), r"built with TVM 0\.31.*installed is 0\.27.*install"),
        (swap(b'"kind": "llvm"', b'"kind": "cuda"'), "was built for GPU architecture .*no usable GPU.*build it for"),
        (lambda data: data[:4] + b"\x01" + data[5:], "damaged or truncated.*copy or build it again"),
        (lambda data: data[: len(data) // 2], "damaged or truncated.*copy or build it again"),
        (lambda data: data[:-1], "damaged or truncated|is truncated.*copy"),
        (lambda data: data[:10], "damaged or truncated"),
        (lambda data: b"", "is empty; expected a .so written by"),
        (lambda data: b"not a library\n", "is not a shared library; expected a .so written by"),
    ],
)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the edits are of an x86-64 library")
def test_faulty_libraries_are_refused_before_their_code_runs(library, tmp_path, monkeypatch, edit, message):
    monkeypatch.setattr("tdc_tvm.compiled_model.load_module", lambda path: pytest.fail("its code was loaded"))
    if b'"kind": "cuda"' in edit(library.read_bytes()) and tvm.cuda(0).exist:
        pytest.skip("this machine has a GPU")
    path = tmp_path / "faulty.so"
    path.write_bytes(edit(library.read_bytes()))
    with pytest.raises(TdcError, match=message):
        tdc_tvm.load(path)


def test_every_truncation_is_noticed(library, tmp_path):
    data, path = library.read_bytes(), tmp_path / "short.so"
    for size in range(0, len(data), len(data) // 50):
        path.write_bytes(data[:size])
        with pytest.raises(TdcError, match=r"short\.so"):
            read_metadata(path)


def test_a_library_of_others_is_refused(tmp_path):
    source, path = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text("int f(void) { return 1; }\n")
    cc.create_shared(str(path), [str(source)])
    with pytest.raises(TdcError, match=r"was not built by tdc_tvm.*build one with 'tdc build"):
        tdc_tvm.load(path)


@pytest.mark.parametrize(("path", "message"), [("absent.so", "No such file"), (".", "Is a directory")])
def test_what_cannot_be_read_is_named(tmp_path, path, message):
    with pytest.raises(TdcError, match=f"cannot read .*{message}"):
        tdc_tvm.load(tmp_path / path)


def test_the_dynamic_linkers_refusal_is_an_error_of_ours(library, tmp_path):
    """A library whose description is right and that has no program headers."""
    path = tmp_path / "faulty.so"
    data = library.read_bytes()
    path.write_bytes(data[:56] + struct.pack("<H", 0) + data[58:])
    with pytest.raises(TdcError, match=r"cannot be loaded; build it again on this machine: ") as caught:
        tdc_tvm.load(path)
    assert str(path) in str(caught.value)


def test_missing_instruction_sets_are_named(compiled, monkeypatch):
    monkeypatch.setattr(artifact, "local_cpu_features", lambda: ("fma",))
    needy = replace(compiled.metadata, cpu_features=("avx2", "fma", "vaes"))
    with pytest.raises(
        TdcError, match=r"m\.so .*needs avx2, vaes, which this CPU lacks; build it with a lesser target"
    ):
        check_runs_here(needy, "m.so")


def test_another_machine_is_named(compiled):
    with pytest.raises(TdcError, match=r"built for riscv64 machines, this one is .*build it for this machine"):
        check_runs_here(replace(compiled.metadata, machine="riscv64"), "m.so")


@pytest.mark.parametrize(
    ("arch", "here", "fits"),
    [
        ("sm_80", "8.0", True),
        ("sm_80", "8.6", True),
        ("sm_86", "8.0", False),
        ("sm_80", "9.0", False),
        ("sm_90", "8.9", False),
        ("sm_90", "9.0", True),
        ("sm_90a", "9.0", True),
        ("sm_90a", "10.0", False),
        ("sm_100", "10.3", True),
        ("sm_100a", "10.3", False),
    ],
)
def test_gpu_machine_code_runs_on_its_own_generation(compiled, monkeypatch, arch, here, fits):
    device = SimpleNamespace(exist=True, compute_version=here)
    monkeypatch.setattr(artifact, "local_gpu", lambda: device)
    metadata = replace(compiled.metadata, kind="cuda", arch=arch)
    if fits:
        check_runs_here(metadata, "m.so")
    else:
        with pytest.raises(TdcError, match=f"built for GPU architecture {arch}, this machine's GPU is sm_"):
            check_runs_here(metadata, "m.so")


def test_the_description_tells_everything(library, compiled):
    metadata = read_metadata(library)
    assert metadata == replace(compiled.metadata, report=json.loads(json.dumps(compiled.metadata.report)))
    (entry,) = metadata.entries
    assert (entry.function, entry.batch) == ("main", None)
    assert [(t.name, t.shape, t.dtype) for t in entry.inputs] == [("x", (1, 8, 6, 6), "float32")]
    assert [(t.name, t.shape, t.dtype) for t in entry.outputs] == [("y", (1, 8, 6, 6), "float32")]
    assert metadata.tvm_version == tvm.__version__
    assert metadata.report["verification"]["status"] == "passed"


def fail_to_link(*_, **__):
    raise RuntimeError("ld: out of luck")


def fill_the_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("failure", "message"), [(fail_to_link, "linking .*failed: ld: out of luck"), (fill_the_disk, "no space left in")]
)
def test_a_failed_export_leaves_the_old_file(compiled, tmp_path, monkeypatch, failure, message):
    monkeypatch.setattr(artifact.cc, "create_shared", failure)
    path = tmp_path / "m.so"
    path.write_text("old")
    with pytest.raises(TdcError, match=message):
        compiled.export_library(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["m.so"]


def test_a_failed_copy_of_a_loaded_model_leaves_the_old_file(library, tmp_path, monkeypatch):
    model = tdc_tvm.load(library)
    monkeypatch.setattr("shutil.copyfile", fill_the_disk)
    path = tmp_path / "m.so"
    path.write_text("old")
    with pytest.raises(TdcError, match="no space left in"):
        model.export_library(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["m.so"]


def test_an_unwritable_directory_is_named(compiled, tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("tdc_tvm.files.os.open", refuse)
    with pytest.raises(TdcError, match=r"no permission to write in .*choose another directory"):
        compiled.export_library(tmp_path / "m.so")


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("name", "message"), [("m", r"ends in \.so; found"), ("m.dll", r"ends in \.so"), ("absent/m.so", "create it first")]
)
def test_bad_names_are_refused(compiled, library, tmp_path, loaded, name, message):
    model = tdc_tvm.load(library) if loaded else compiled
    with pytest.raises(TdcError, match=message):
        model.export_library(tmp_path / name)
    assert not os.listdir(tmp_path)


def test_strange_paths_work(compiled, tmp_path, monkeypatch, x, y):
    folder = tmp_path / 'a "ß" [b] c'
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.chdir(folder)
    compiled.export_library("modèle 1.so")
    np.testing.assert_allclose(tdc_tvm.load("modèle 1.so").run(x), y, atol=1e-5)


def test_no_cxx_compiler_says_what_to_install(model_path, monkeypatch, tmp_path):
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TdcError, match=r"no C\+\+ compiler found.*install g\+\+"):
        tdc_tvm.build(model_path, "llvm")


def test_a_compiler_that_is_no_program_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    with pytest.raises(TdcError, match=r"'/nowhere/g\+\+ -m64' \(from CXX or CC\) is not a program; set CXX"):
        cxx_compiler()


def test_no_cuda_compiler_says_what_to_install(model_path, monkeypatch, tmp_path):
    monkeypatch.setattr("tdc_tvm.cuda_toolchain._nvrtc_loads", lambda: False)
    monkeypatch.setattr("tdc_tvm.cuda_toolchain._cuda_roots", lambda: [tmp_path])
    monkeypatch.setattr("tdc_tvm.cuda_toolchain.shutil.which", lambda name: None)
    monkeypatch.setattr("tdc_tvm.compiler.cxx_compiler", lambda: "g++")
    with pytest.raises(TdcError, match=r"no CUDA compiler found.*pip install 'tdc-tvm\[cuda\]'"):
        tdc_tvm.build(model_path, "sm_90")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_cuda_library_carries_machine_code(model_path, tmp_path, arch):
    from tdc_tvm.cuda_toolchain import cubin_kernels, find_cuda_compiler

    try:
        find_cuda_compiler()
    except TdcError:
        pytest.skip("needs the extra [cuda] or nvcc")
    path = tmp_path / "m.so"
    model = tdc_tvm.build(model_path, arch)
    model.export_library(path)
    kernels = cubin_kernels(path)
    assert kernels
    assert {kernel.arch for kernel in kernels} == {arch}
    assert read_metadata(path).arch == arch
    if not tvm.cuda(0).exist:
        assert model.report.verification.status == "skipped"
        assert "no usable GPU" in model.report.verification.detail
        for call in (
            lambda: tdc_tvm.load(path),
            lambda: model.run(np.zeros((1, 8, 6, 6), np.float32)),
            model.benchmark,
        ):
            with pytest.raises(TdcError, match="no usable GPU; build it for 'llvm'"):
                call()


@pytest.mark.parametrize("path", [None, 3, b"m.so"])
def test_what_is_no_path(path):
    with pytest.raises(TdcError, match=f"a library is given by its path; found {type(path).__name__}"):
        tdc_tvm.load(path)


def test_linking_for_another_machine_asks_for_a_cross_compiler(tucker_model, tmp_path):
    if os.uname().machine == "aarch64":
        pytest.skip("needs a machine that is not aarch64")
    model = tdc_tvm.build(tucker_model(), Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu"}))
    assert model.report.verification.status == "skipped"
    with pytest.raises(TdcError, match="built for aarch64 machines"):
        model.run(np.zeros((1, 8, 6, 6), np.float32))
    with pytest.raises(TdcError, match=r"linking .* failed; for aarch64 set CXX to a cross compiler"):
        model.export_library(tmp_path / "m.so")
    assert not os.listdir(tmp_path)


def test_the_wheel_holds_every_module_and_nothing_else(tmp_path):
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs the source tree")
    tree = tmp_path / "tree"
    tree.mkdir()
    # A copy, because setuptools takes what an earlier build left in the source tree.
    packages = ("tdc_tvm", "relay_passes", "schedules", "training")
    for name in ("pyproject.toml", "README.md", "LICENSE", *packages):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tree)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, check=True, cwd=tree, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for package in packages:
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                name = file.relative_to(ROOT).as_posix()
                expected.add(name if package == "tdc_tvm" else f"tdc_tvm/{name}")
    assert held == expected
    assert {"tdc_tvm/presets.py", "tdc_tvm/relay_passes/pipeline.py", "tdc_tvm/schedules/cpu/conv.py"} <= held
    assert not [name for name in held if re.search("tests|scripts", name)]
