"""What the GPU benchmarks do without a GPU: packing, sampling, supervising, fitting."""

import argparse
import importlib
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from rich.console import Console

from tdc_tvm.schedules.cuda import conv, model
from tdc_tvm.schedules.cuda.pack import merge
from tdc_tvm.schedules.device import GPUS
from tdc_tvm.schedules.kernel import ConvWeights
from tdc_tvm.schedules.shape import DTYPES, Conv2dShape, Epilogue, TuckerConvShape
from tdc_tvm.training import TuckerConv2d

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_layers
import bench_models
import build_layers
import fit_model
import gpu_check
import gpu_layers
import oracle

ROOT = Path(__file__).parents[2]
H100 = GPUS["H100"]
DENSE = Conv2dShape(1, 14, 14, 40, 24, (3, 3), (2, 2), (1, 1, 1, 1))
TUCKER = TuckerConvShape(DENSE, 24, 16)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("shape", [DENSE, TUCKER], ids=["conv", "tucker"])
def test_weights_are_packed_alike_on_both_machines(shape, precision):
    shape = shape.with_precision(precision)
    layer = json.loads(json.dumps(build_layers.describe(shape, ["group"])))
    assert build_layers.shape_of(layer) == shape
    config = next(config for config in conv.candidates(shape, H100) if config.strategy in ("tile", "conv"))
    packed = []

    def pack(weights):
        packed.append(conv.make_kernel(shape, Epilogue(), weights, config, H100, "conv").constants)
        return packed[-1]

    weights = gpu_layers.weights_of(layer, config.strategy)
    positions = build_layers.find_packing(pack, weights)
    values = gpu_layers.flatten(weights)
    for expected, position in zip(packed[0], positions, strict=True):
        assert position.dtype == np.int32
        restored = gpu_layers.restore_constant(build_layers.store_constant(position), values)
        np.testing.assert_array_equal(restored.astype(expected.dtype), expected)


def test_merged_weights_are_the_product_of_the_stages():
    layer = build_layers.describe(TUCKER, ["group"])
    stages = gpu_layers.make_weights(layer)
    merged = merge(tuple(ConvWeights(*one) for one in stages))
    ((kernel, bias),) = gpu_layers.weights_of(layer, "dense")
    np.testing.assert_allclose(kernel, merged.kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(bias, merged.bias)

    def convolve(x, shape, kernel, bias):
        bias = None if bias is None else torch.from_numpy(bias).double()
        weight = torch.from_numpy(kernel).double()
        return torch.nn.functional.conv2d(x, weight, bias, shape.stride, shape.padding[:2], shape.dilation)

    x = expected = torch.randn(1, DENSE.in_channels, 9, 9, dtype=torch.float64)
    for shape, one in zip(TUCKER.stages, stages, strict=True):
        expected = convolve(expected, shape, *one)
    torch.testing.assert_close(convolve(x, DENSE, merged.kernel, merged.bias), expected, rtol=1e-5, atol=1e-6)


def test_a_sample_holds_the_pick_and_is_always_the_same():
    pick, _ = conv.choose(TUCKER, H100)
    chosen = oracle.sample(TUCKER, H100, 20, 0)
    assert chosen == oracle.sample(TUCKER, H100, 20, 0)
    assert chosen != oracle.sample(TUCKER, H100, 20, 1)
    assert [config for config, is_pick in chosen if is_pick] == [pick]
    assert len({config for config, _ in chosen}) == 20
    everything = oracle.sample(TUCKER, H100, 0, 0)
    assert {config for config, _ in everything} == set(conv.candidates(TUCKER, H100))


def test_the_fastest_and_the_favourites_are_measured_again():
    def timed(text, config, time_us):
        values = {"strategy": config.strategy, "config": dict(config.parameters)}
        return {"shape": {"text": text}, "warm": {"ours": {"median_us": time_us}}} | values

    by_model = sorted(conv.candidates(TUCKER, H100), key=lambda c: conv.estimate(TUCKER, c, H100).latency_us)
    slow = by_model[-4:]
    records = [timed(str(TUCKER), config, 9.0 - i) for i, config in enumerate(slow)]
    records += [timed("another layer", by_model[-9], 1.0), {"shape": {"text": str(TUCKER)}, "error": "hung"}]
    chosen = oracle.again(TUCKER, H100, 6, records)
    pick, _ = conv.choose(TUCKER, H100)
    assert [config for config, is_pick in chosen if is_pick] == [pick]
    assert {config for config, _ in chosen} == {pick, *by_model[:3], *slow[1:]}


def test_kernels_that_kill_or_hang_their_process_are_named_and_passed_over(tmp_path):
    layer = build_layers.describe(DENSE, ["group"])
    kernels = [{"name": name, "layer": "layer0", "library": "", "constants": [], "between": []} for name in "abcd"]
    output = tmp_path / "results.jsonl"
    gpu_layers.append_record(output, {"name": "d", "shape": {"text": "of another build"}})
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, pathlib, sys, time\n"
        "output = pathlib.Path(sys.argv[1])\n"
        "done = [line for line in output.read_text().splitlines() if sys.argv[2] in line]\n"
        "with output.open('a') as file: file.write(json.dumps({'environment': {}}) + '\\n')\n"
        "for name in 'abcd':\n"
        "    if f'\"{name}\"' in ''.join(done): continue\n"
        "    if name == 'b': os._exit(9)\n"
        "    if name == 'c': time.sleep(60)\n"
        "    with output.open('a') as file:\n"
        "        file.write(json.dumps({'name': name, 'shape': {'text': sys.argv[2]}}) + '\\n')\n"
    )
    manifest = {"layers": {"layer0": layer}, "kernels": kernels}
    command = [sys.executable, str(worker), str(output), layer["text"]]
    left = gpu_layers.supervise(command, manifest, list("abcd"), output, 60, 1.5)
    records = {
        record["name"]: record.get("error", "") for record in gpu_layers.read_records(output)[1:] if "name" in record
    }
    packed = tmp_path / "results.jsonl.xz"
    packed.write_bytes(lzma.compress(output.read_bytes()))
    assert gpu_layers.read_records(packed) == gpu_layers.read_records(output)
    assert left == 0
    assert gpu_layers.failed(list("abcd"), output, manifest) == ["b", "c"]
    assert records == {"a": "", "b": "the process ended with status 9", "c": "no result in 1.5 s", "d": ""}


def test_the_fit_finds_constants_that_pick_as_the_true_ones_do():
    """Measurements made by the model itself, with other constants."""
    stored = model.constants()["fp16"]
    changed = {"launch_us": 2, "wait_cycles": 3, "handover_cycles": 2}
    true = replace(stored, **{name: factor * getattr(stored, name) for name, factor in changed.items()})
    records = []
    for extent, channels in ((28, 64), (14, 128), (7, 256)):
        dense = Conv2dShape(1, extent, extent, channels, channels, (3, 3), padding=(1, 1, 1, 1), precision="fp16")
        shape = TuckerConvShape(dense, channels // 2, channels // 4)
        layer = build_layers.describe(shape, ["group"])
        for config, is_pick in oracle.sample(shape, H100, 60, 0):
            parts = conv.parts_of(shape, config, H100)
            time_us = float(sum(model.latency_us(part, len(parts) == 1, true) for part in parts))
            records.append(
                {
                    "name": "k",
                    "strategy": config.strategy,
                    "config": dict(config.parameters),
                    "is_pick": is_pick,
                    "shape": layer,
                    "warm": {"ours": {"median_us": time_us}},
                }
            )
    layers = fit_model.read_measured(records, H100)
    fitted = fit_model.fit_constants(layers, stored)
    for layer in layers:
        np.testing.assert_allclose(layer.predict(true), layer.times_us)
        assert layer.loss(fitted) < 1.02
        np.testing.assert_allclose(layer.predict(fitted), layer.times_us, rtol=0.1)


RECORD = '{"name": "k0", "shape": {"text": "a layer"}, "warm": {"ours": {"median_us": 1.0}}}\n'
MISTAKES = {
    "no GPU": ("bench_layers", "run built -o new.jsonl", "finds no NVIDIA GPU"),
    "no GPU for the oracle": ("oracle", "run built -o new.jsonl", "finds no NVIDIA GPU"),
    "no GPU for the check": ("gpu_check", "run built", "GPU"),
    "no build": ("bench_layers", "run nowhere -o new.jsonl", "found no nowhere/manifest.json"),
    "no build to check": ("gpu_check", "run nowhere", "found no nowhere/manifest.json"),
    "a broken build": ("bench_layers", "run broken -o new.jsonl", "cannot read broken/manifest.json"),
    "an unknown group": ("bench_layers", "run built -o new.jsonl --shapes nonsense", "no group nonsense"),
    "an unknown batch": ("bench_layers", "run built -o new.jsonl --batch 7", "no batch size 7 .* there are: 1"),
    "an output nowhere": ("bench_layers", "run built -o nowhere/new.jsonl", "in a folder that exists"),
    "a packed output": ("bench_layers", "run built -o new.jsonl.xz", "name a plain file"),
    "an output that is none": ("bench_layers", "run built -o text.jsonl", "text.jsonl, line 1: found 'hello'"),
    "an unknown arch": ("bench_layers", "build new --arch sm_99", "'sm_99' in the table; there are: sm_75"),
    "no arch": ("oracle", "build new --arch nonsense", "'nonsense' in the table"),
    "an unknown arch to check": ("gpu_check", "build new --arch sm_99", "'sm_99' in the table"),
    "a file for a folder": ("bench_layers", "build text.jsonl --shapes core", "cannot build in text.jsonl"),
    "batch 0": ("bench_layers", "build new --batch 0", "--batch: found 0, expected 1 or more"),
    "no jobs": ("bench_layers", "build new --jobs 0", "--jobs: found 0"),
    "a batch of words": ("bench_layers", "build new --batch two", "--batch: invalid int value: 'two'"),
    "a negative sample": ("oracle", "build new --sample -1", "--sample: found -1"),
    "negative time": ("bench_layers", "run built -o new.jsonl --seconds -1", "--seconds: found -1"),
    "no results": ("bench_layers", "report nowhere.jsonl", "no file nowhere.jsonl"),
    "empty results": ("bench_layers", "report empty.jsonl", "no kernel has a record in empty.jsonl"),
    "garbage": ("bench_layers", "report text.jsonl", "text.jsonl, line 1"),
    "packed garbage": ("oracle", "report text.xz", "cannot read text.xz"),
    "other JSON": ("oracle", "report broken/other.json", "other.json, line 1"),
    "a folder": ("oracle", "report built", "cannot read built"),
    "the oracle's results": ("bench_layers", "report oracle.jsonl", "oracle.py report"),
    "the same twice": ("oracle", "report oracle.jsonl ./oracle.jsonl", "given twice"),
    "plots in a file": ("bench_layers", "report bench.jsonl --plots text.jsonl", "cannot draw plots in text.jsonl"),
    "no networks": ("bench_models", "report nowhere.jsonl", "no file nowhere.jsonl"),
    "an unknown arch for networks": ("bench_models", "build new --arch sm_99", "'sm_99' in the table"),
    "nothing to fit": ("fit_model", "nowhere.jsonl --write", "no file nowhere.jsonl"),
    "empty files to fit": ("fit_model", "empty.jsonl --write", "no kernel has a record"),
    "failures to fit": ("fit_model", "failed.jsonl --write", "no kernel was timed"),
    "cuDNN to fit": ("fit_model", "bench.jsonl --write", "of bench_layers.py; fit to those of oracle.py"),
    "another GPU's to fit": (
        "fit_model",
        "of_h100.jsonl --gpu H200 --write",
        "NVIDIA H100 80GB HBM3; say so with --gpu",
    ),
}


@pytest.mark.parametrize(("script", "line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(script, line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *line.split()])
    if line.startswith("run built") and script == "gpu_check" and tvm.cuda(0).exist:
        pytest.skip("there is a GPU")
    kernel = {"name": "k0", "layer": "layer0", "library": "", "constants": [], "between": []}
    manifest = {"layers": {"layer0": build_layers.describe(DENSE, ["group"])}, "kernels": [kernel], "cases": []}
    files = {
        "built/manifest.json": json.dumps(manifest),
        "broken/manifest.json": "{",
        "broken/other.json": "[1, 2]",
        "empty.jsonl": "",
        "text.jsonl": "hello\n",
        "text.xz": "hello\n",
        "oracle.jsonl": RECORD,
        "bench.jsonl": RECORD.replace('"warm"', '"cold": {}, "warm"'),
        "failed.jsonl": RECORD.replace("warm", "error"),
        "of_h100.jsonl": '{"environment": {"gpu": {"name": "NVIDIA H100 80GB HBM3"}}}\n' + RECORD,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    captured = capsys.readouterr()
    said = captured.err.splitlines()[-1] if ended.value.code == 2 else ended.value.code
    assert re.search(message, said)
    assert "\n" not in said
    assert not captured.out
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(files)
    assert all((tmp_path / name).read_text() == text for name, text in files.items())


def test_what_the_package_refuses_is_one_line(capsys, monkeypatch, tmp_path):
    line = [f"{tmp_path}/new", "--gpu", "RTX 2080 Ti", "--precision", "tf32", "--shapes", "core"]
    monkeypatch.setattr(sys, "argv", ["bench_layers.py", "build", *line])
    assert gpu_check.exit_status(bench_layers.main) == 1
    assert re.fullmatch(r"no CUDA schedule for .*computes convolutions in fp32 or fp16 only\n", capsys.readouterr().err)


COMMANDS = re.findall(r"^python scripts/(\w+)\.py ([^#\n]*)", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("script", "line"), COMMANDS)
def test_the_commands_of_the_readme_are_understood(script, line, monkeypatch):
    class UnderstoodError(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser):
        parse(parser)
        raise UnderstoodError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *line.split()])
    with pytest.raises(UnderstoodError):
        importlib.import_module(script).main()


def test_a_worker_that_cannot_begin_blames_no_kernel(tmp_path):
    layer = build_layers.describe(DENSE, ["group"])
    manifest = {"layers": {"layer0": layer}, "kernels": [{"name": "k0", "layer": "layer0"}]}
    output = tmp_path / "results.jsonl"
    with pytest.raises(SystemExit, match="could not begin: the process ended with status 5"):
        gpu_layers.supervise([sys.executable, "-c", "raise SystemExit(5)"], manifest, ["k0"], output, 60, 60)
    assert not output.exists()


def test_run_fails_if_a_kernel_did(tmp_path, monkeypatch, capsys):
    layer = build_layers.describe(DENSE, ["group"])
    kernels = [{"name": name, "layer": "layer0"} for name in "ab"]
    (tmp_path / "manifest.json").write_text(json.dumps({"layers": {"layer0": layer}, "kernels": kernels}))
    output = tmp_path / "results.jsonl"
    monkeypatch.setattr(gpu_layers, "check_machine", lambda output: None)
    monkeypatch.setattr(sys, "argv", ["bench_layers.py", "run", str(tmp_path), "-o", str(output)])
    for name, more, status in (("a", {}, 0), ("b", {"error": "no result in 5 s"}, 1)):
        monkeypatch.setattr(gpu_layers, "kernel_names", lambda *given, name=name: [name])
        gpu_layers.append_record(output, {"name": name, "shape": {"text": layer["text"]}} | more)
        assert bench_layers.main() == status
        assert f"1 of 1 kernels have a record in {output}, {status} of an error" in capsys.readouterr().out


def test_an_interrupted_build_ends_at_once_and_is_no_build(tmp_path):
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "oracle.py"),
        "build",
        str(tmp_path),
        "--shapes",
        "core",
        "--jobs",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so do the tests then, and what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while manifest.exists() and process.poll() is None:
        time.sleep(0.1)
    # Once its processes have begun.
    while not list(tmp_path.glob("tmp*")) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=120)[1].splitlines()[-1] == "interrupted"
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


def test_networks_to_compare_are_the_same_everywhere():
    first, second = (bench_models.make_model("resnet18", True) for _ in range(2))
    assert sum(isinstance(module, TuckerConv2d) for module in first.modules()) == 16
    assert all(torch.equal(first.state_dict()[key], value) for key, value in second.state_dict().items())
    with torch.no_grad():
        out = first(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert out.isfinite().all()
    assert not torch.allclose(out[0], out[1], rtol=0.01)


def test_the_report_of_networks(capsys):
    shape = {"text": "resnet18 tucker, batch 1", "precision": "fp16", "groups": ["resnet18"]}
    times = {name: {"median_us": us} for name, us in (("ours", 50.0), ("tucker", 400.0), ("original", 250.0))}
    record = {"name": "a", "shape": shape, "warm": times, "kernels": [["k", 1.0]] * 28, "error_norm": 0.002}
    bench_models.report(
        [{"environment": {}}, record | {"build_seconds": 4.2}, {"name": "b", "shape": shape, "error": "no"}]
    )
    text = " ".join(capsys.readouterr().out.split())
    assert "resnet18 tucker, batch 1 fp16 50.0 400.0 250.0 8.00 5.00 28 2.0e-03 4" in text
    assert "failed: resnet18 tucker, batch 1: no" in text


def test_a_narrow_report_cuts_no_number():
    shape = {"text": "32x224x224x64 -> 128, 3x3/2 at ranks (64, 32)", "groups": ["net"]}
    shape |= {"precision": "fp32", "batch": 32}
    times = {"ours": 1234.56, "triplet": 9876.54, "original": 5432.1}
    times = {name: {"median_us": us, "p99_us": us} for name, us in times.items()}
    good = {"name": "k0", "shape": shape, "warm": times, "cold": times, "predicted_us": 4321.09}
    bad = {"name": "k1", "shape": shape, "error": "RuntimeError: [/x] of a kernel"}
    out = StringIO()
    bench_layers.report([good, bad], Console(file=out, width=80))
    words = out.getvalue().split()
    for word in ("1234.6", "9876.5", "5432.1", "8.00", "4.40", "4321.1", "failed", "[/x]"):
        assert word in words
    assert "…" not in out.getvalue()


def test_a_report_keeps_precisions_apart_and_draws_bars(tmp_path):
    def record(precision, ours, triplet):
        shape = {"text": "a layer", "groups": ["net"], "precision": precision, "batch": 1}
        times = {name: {"median_us": us, "p99_us": us} for name, us in (("ours", ours), ("triplet", triplet))}
        return {"name": "k0", "shape": shape, "warm": times, "cold": times, "predicted_us": ours}

    records = [record("fp16", 2.0, 8.0), record("fp32", 4.0, 6.0)]
    out = StringIO()
    bench_layers.report(records, Console(file=out, width=200))
    summary = out.getvalue().split("Geometric means")[1]
    for precision, ratio in (("fp16", "4.00"), ("fp32", "1.50")):
        (line,) = [line for line in summary.splitlines() if precision in line]
        assert ratio in line
        assert "-" in line, "nothing was measured of the original"
    paths = bench_layers.plot(records, tmp_path)
    assert [path.name for path in paths] == ["net_fp16_batch1.png", "net_fp32_batch1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
