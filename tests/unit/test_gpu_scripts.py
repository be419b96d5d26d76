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

from tdc_tvm.cuda_toolchain import cubin_kernels, find_cuda_compiler
from tdc_tvm.errors import TdcError
from tdc_tvm.relay_passes.lower_conv import ConvOp
from tdc_tvm.schedules.cuda import conv, model
from tdc_tvm.schedules.cuda.pack import merge
from tdc_tvm.schedules.device import GPUS
from tdc_tvm.schedules.kernel import ConvWeights, KernelConfig
from tdc_tvm.schedules.shape import DTYPES, Conv2dShape, Epilogue, TuckerConvShape
from tdc_tvm.targets import resolve_target
from tdc_tvm.training import TuckerConv2d, export_onnx

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_layers
import bench_models
import build_layers
import check_precision
import fit_model
import gpu_check
import gpu_layers
import network_floor
import oracle
import report_models

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
        np.testing.assert_allclose(layer.predict(fitted), layer.times_us, rtol=0.4)
        # What is far from the best counts little.
        near = layer.times_us < 1.5 * layer.times_us.min()
        np.testing.assert_allclose(layer.predict(fitted)[near], layer.times_us[near], rtol=0.1)


def network_record(ours_us=50.0, precision="fp32"):
    """What `bench_models` stores of a network, with made-up numbers."""

    def timed(us, error=1e-6):
        return {"median_us": us, "p99_us": us + 3, "error_norm": error, "peak_bytes": 7_000_000, "kernels": 31}

    shape = {"text": "resnet18 tucker, batch 8", "network": "resnet18", "form": "tucker", "batch": 8}
    others = {"tucker": 400.0, "original": 250.0, "tvm_tucker": 3000.0}
    return {
        "name": "resnet18-tucker-8",
        "shape": shape | {"precision": precision, "groups": ["resnet18"]},
        "warm": {"ours": timed(ours_us, 2e-7)} | {name: timed(us) for name, us in others.items()},
        "wall": {"ours": timed(80.0), "eager_original": timed(960.0)},
        "failed": {"compile_tucker": "RuntimeError: [/x] no C compiler"},
        "floor_us": 20.0,
        "build_seconds": 4.2,
        "baselines": {"tucker": {"build_seconds": 9.4}},
    }


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
    "layers for networks": ("bench_models", "report bench.jsonl", "not of networks"),
    "a plot nowhere": ("bench_models", "report nets.jsonl --plot nowhere/new.png", "cannot draw nowhere/new.png"),
    "a plot that is no picture": ("bench_models", "report nets.jsonl --plot new.nonsense", "cannot draw new.nonsense"),
    "a plot of nothing": ("bench_models", "report unmeasured.jsonl --plot new.png", "nothing to plot"),
    "no TVM to compare with": ("bench_models", "run built -o new.jsonl --contenders tvm", "again with --baselines tvm"),
    "TVM in FP16": ("bench_models", "build new --precision fp16 --baselines tvm", "in fp32 alone"),
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
        "nets.jsonl": json.dumps(network_record()) + "\n",
        "unmeasured.jsonl": json.dumps(network_record() | {"warm": {}, "wall": {}}).replace('"warm": {}, ', "") + "\n",
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

    def parse_and_stop(parser, *arguments):
        parse(parser, *arguments)
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


def test_the_report_of_networks(tmp_path):
    failed = {"name": "b", "shape": network_record(precision="fp16")["shape"], "error": "a wrong result"}
    # As records were before there was more than cuDNN.
    old = network_record(precision="bf16") | {"wall": {}, "failed": {}}
    for name in ("floor_us", "baselines", "wall", "failed"):
        del old[name]
    old["warm"] = {name: {"median_us": us} for name, us in (("ours", 50.0), ("tucker", 75.0))}
    for width in (120, 160):
        out = StringIO()
        report_models.report([{"environment": {}}, network_record(), failed, old], Console(file=out, width=width))
        text = out.getvalue()
        assert "…" not in text
        lines = [" ".join(line.split()) for line in text.splitlines()]
        table = lines[lines.index(next(line for line in lines if "fp32, batch 8" in line)) :]
        assert table[4:10] == [
            "resnet18 tucker ours 50.0 53.0 1.00 31 20.0 2.50 2.0e-07 7.0 4",
            "cuDNN tucker 400.0 403.0 8.00 31 1.0e-06 7.0",
            "cuDNN original 250.0 253.0 5.00 31 1.0e-06 7.0",
            "TVM tucker 3000.0 3003.0 60.00 31 1.0e-06 7.0 9",
            "ours, called 80.0 83.0 1.00 31 1.0e-06 7.0",
            "eager original, called 960.0 963.0 12.00 31 1.0e-06 7.0",
        ]
        assert "failed: resnet18 tucker, batch 8, compile tucker: RuntimeError: [/x] no C compiler" in lines
        assert "failed: resnet18 tucker, batch 8, ours: a wrong result" in lines
        assert "cuDNN tucker 75.0 1.50" in lines


def test_a_plot_of_networks_has_a_group_for_each_and_a_bar_for_what_was_timed(tmp_path, monkeypatch):
    pyplot = bench_layers.load_pyplot()
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    other = network_record(ours_us=70.0)
    other["shape"] = other["shape"] | {"network": "vgg16_bn"}
    del other["warm"]["tvm_tucker"]
    half = network_record(precision="fp16") | {"wall": {}}
    del half["warm"]["tvm_tucker"]
    report_models.plot([{"environment": {}}, half, network_record(), other], tmp_path / "new.png")
    assert (tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    first, _, second, memory = figure.axes
    assert (first.get_title(), second.get_title()) == ("fp16, batch 8", "fp32, batch 8")
    assert [text.get_text() for text in second.get_xticklabels()] == ["resnet18\ntucker", "vgg16_bn\ntucker"]
    heights = [[bar.get_height() for bar in container] for container in second.containers]
    assert [one for one in heights if one] == [[50, 70], [400] * 2, [250] * 2, [3000], [80] * 2, [960] * 2]
    lefts = [bar.get_x() for container in second.containers for bar in container]
    assert len(set(lefts)) == len(lefts) == 11
    assert sum(len(container) for container in first.containers) == 3
    sizes = [[bar.get_height() for bar in container] for container in memory.containers]
    assert sizes == [[7, 7]] * 3 + [[7]] + [[7, 7]] * 2
    (legend,) = figure.legends
    shown = {
        text.get_text(): handle.get_facecolor()
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    assert shown["TVM tucker"] == second.containers[3][0].get_facecolor()
    assert list(shown)[4:] == ["ours, called", "eager original, called"]
    pyplot.rcdefaults()


def test_contenders_take_turns_and_the_first_does_not_count():
    turns = []

    def clock(name, us):
        return lambda: turns.append(name) or (1e6 if turns.count(name) == 1 else us)

    times = gpu_layers.take_turns({"a": clock("a", 3.0), "b": clock("b", 5.0)}, seconds=0)
    assert turns == ["a", "b"] * 6
    assert [(one["median_us"], one["p99_us"], one["replays"]) for one in times.values()] == [(3, 3, 5), (5, 5, 5)]
    turns.clear()
    assert gpu_layers.take_turns({"a": clock("a", 3.0)}, seconds=60, most=2)["a"]["samples_us"] == [3, 3]


def test_a_worker_measures_as_many_as_it_may_and_the_next_goes_on(tmp_path):
    layer = build_layers.describe(DENSE, ["group"])
    kernels = [{"name": name, "layer": "layer0"} for name in "abc"]
    output, worker = tmp_path / "results.jsonl", tmp_path / "worker.py"
    manifest = {"layers": {"layer0": layer}, "kernels": kernels}

    class FakeGpu:
        layers = manifest["layers"]
        environment = dict

    FakeGpu.manifest = manifest
    assert gpu_layers.work(FakeGpu(), list("abc"), output, time.time() + 60, lambda *_: {}, most=1) == 0
    assert [record.get("name") for record in gpu_layers.read_records(output)] == [None, "a"]
    worker.write_text(
        "import json, pathlib, sys\n"
        "output = pathlib.Path(sys.argv[1])\n"
        "name = next(name for name in 'abc' if f'\"{name}\"' not in output.read_text())\n"
        "with output.open('a') as file:\n"
        "    file.write(json.dumps({'name': name, 'shape': {'text': sys.argv[2]}}) + '\\n')\n"
        "sys.exit(9 if name == 'b' else 0)\n"
    )
    command = [sys.executable, str(worker), str(output), layer["text"]]
    assert gpu_layers.supervise(command, manifest, list("abc"), output, 60, 60, most=1) == 0
    records = [record for record in gpu_layers.read_records(output) if "name" in record]
    assert [(record["name"], record.get("error")) for record in records] == [("a", None), ("b", None), ("c", None)]


def with_probe(**values):
    return replace(H100, l2_bytes=10_000_000, probe=replace(H100.probe, **values))


def test_the_floor_of_a_kernel_is_the_longest_of_launch_transfers_and_products():
    device = with_probe(
        launch_us=2.0,
        dependent_launch_us=1.0,
        l2_bytes_per_s=4e12,
        dram_bytes_per_s=1e12,
        fma_flops_per_s=50e12,
        mma_flops_per_s={"fp16": 100e12},
    )
    launches = [
        network_floor.Launch("copy", 4_000),
        network_floor.Launch("small", 4_000, is_early=True),
        network_floor.Launch("pool", 8_000_000, is_early=True),
        network_floor.Launch("conv", 4_000_000, 250_000_000, "fp16", True),
        network_floor.Launch("grouped", 4_000, 250_000_000, "fp32", True),
    ]
    for footprint, expected in ((10_000_000, [2, 1, 2, 5, 10]), (10_000_001, [2, 1, 8, 5, 10])):
        floors = network_floor.floor(launches, device, footprint)
        assert [one["floor_us"] for one in floors] == expected
        assert [one["name"] for one in floors] == ["copy", "small", "pool", "conv", "grouped"]
    assert floors[3] == {"name": "conv", "launch_us": 1, "memory_us": 4, "compute_us": 5, "floor_us": 5}


# Elements of the input, of what is between stages, of the output, and weights, by hand.
X, REDUCED, CORED, OUT, WEIGHTS = 14 * 14 * 40, 14 * 14 * 24, 7 * 7 * 16, 7 * 7 * 24, (960, 3456, 384)
MACS = (14 * 14 * 960, 7 * 7 * 3456, 7 * 7 * 384)
KERNELS = {
    "tile": ((), [X + sum(WEIGHTS) + 2 * OUT], [sum(MACS)]),
    "two": (
        (("cut", 1),),
        [X + WEIGHTS[0] + REDUCED, REDUCED + WEIGHTS[1] + WEIGHTS[2] + 2 * OUT],
        [MACS[0], MACS[1] + MACS[2]],
    ),
    "three": (
        (),
        [X + WEIGHTS[0] + REDUCED, REDUCED + WEIGHTS[1] + CORED, CORED + WEIGHTS[2] + 2 * OUT],
        list(MACS),
    ),
    "dense": ((), [X + 40 * 24 * 9 + 2 * OUT], [7 * 7 * 40 * 24 * 9]),
}


@pytest.mark.parametrize(("precision", "size"), [("fp16", 2), ("tf32", 4)])
@pytest.mark.parametrize("strategy", KERNELS)
def test_what_the_kernels_of_a_strategy_move_and_multiply(strategy, precision, size):
    parameters, elements, macs = KERNELS[strategy]
    op = ConvOp("layer", TUCKER.with_precision(precision), Epilogue(residual=True), (), (0, 1), "NHWC", None)
    launches = list(network_floor.conv_launches(op, KernelConfig(strategy, parameters), True))
    assert [launch.moved_bytes for launch in launches] == [size * count for count in elements]
    assert [launch.macs for launch in launches] == macs
    assert {launch.precision for launch in launches} == {precision}
    names = [f"layer_{number}" for number in range(len(macs))] if len(macs) > 1 else ["layer"]
    assert [launch.name for launch in launches] == names


def test_a_stride_passes_over_pixels():
    shape = Conv2dShape(1, 14, 14, 64, 128, (1, 1), (2, 2))
    op = ConvOp("layer", shape, Epilogue(), (), (0,), "NHWC", None)
    (launch,) = network_floor.conv_launches(op, KernelConfig("conv"), False)
    assert launch.moved_bytes == 4 * (7 * 7 * 64 + 64 * 128 + 7 * 7 * 128)


def test_maxima_are_what_is_written():
    shape = Conv2dShape(1, 15, 14, 64, 128, (1, 1), pool=True)
    op = ConvOp("layer", shape, Epilogue(residual=True), (), (0, 1), "NHWC", None)
    (launch,) = network_floor.conv_launches(op, KernelConfig("conv"), False)
    assert launch.moved_bytes == 4 * (15 * 14 * 64 + 64 * 128 + 15 * 14 * 128 + 7 * 7 * 128)


def test_weights_can_be_stored_in_half():
    shape = Conv2dShape(1, 1, 3, 64, 128, (1, 1), precision="tf32")
    op = ConvOp("layer", shape, Epilogue(), (), (0,), "NHWC", None)
    (launch,) = network_floor.conv_launches(op, KernelConfig("conv", (("group", 2),)), False)
    assert launch.moved_bytes == 4 * 3 * (64 + 128) + 2 * 64 * 128


class SmallNetwork(torch.nn.Sequential):
    def __init__(self):
        conv = torch.nn.Conv2d
        super().__init__(
            conv(3, 16, 8, 8),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(3, 2, 1),
            conv(16, 4, 1, bias=False),
            conv(4, 4, 3, padding=1, bias=False),
            conv(4, 16, 1),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(16, 10),
        )


def test_kernels_and_memory_of_a_network(tmp_path):
    export_onnx(SmallNetwork().eval(), (2, 3, 64, 64), tmp_path / "m.onnx")
    launches, memory = network_floor.analyse(tmp_path / "m.onnx", resolve_target("sm_90"), "fp16")
    fold, *ours = [launch for launch in launches if launch.is_early]
    assert fold.macs == 0
    assert fold.moved_bytes >= 2 * 3 * 64 * 64 * (4 + 2)
    macs = [2 * 8 * 8 * 16 * 3 * 64, 0, 2 * 4 * 4 * (64 + 144 + 64), 0, 2 * 160]
    dense = 2 * 4 * 4 * 16 * 16 * 9
    assert [launch.macs for launch in ours if launch.macs not in (macs[2], dense)] == [macs[0], 0, 0, macs[4]]
    assert len(ours) == 5
    pools = [launch.moved_bytes for launch in ours if not launch.macs]
    assert pools == [2 * 2 * 16 * (8 * 8 + 4 * 4), 2 * 2 * 16 * (4 * 4 + 1)]
    # At least all weights, the largest activations between two kernels and the output; not the input.
    least = 2 * (16 * 192 + 160) + 2 * 2 * 16 * (8 * 8 + 4 * 4) + 4 * 2 * 10
    assert least < memory < 10 * least
    wide, wide_memory = network_floor.analyse(tmp_path / "m.onnx", resolve_target("sm_90"), "fp32")
    assert sum(launch.moved_bytes for launch in wide) > 1.5 * sum(launch.moved_bytes for launch in launches)
    assert wide_memory > 1.5 * memory


def test_the_memory_of_a_function_is_its_constants_storages_and_outputs():
    from tvm import relax

    builder, weight = relax.BlockBuilder(), relax.const(np.ones((5, 7), "float16"))
    x = relax.Var("x", relax.TensorType((5, 7), "float16"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.add(x, weight))
            out = builder.emit_output(relax.op.multiply(y, weight))
        builder.emit_func_output(out)
    target = resolve_target("llvm")
    with target:
        mod = relax.get_default_pipeline(target)(builder.get())
    fused = len(list(network_floor._calls(mod, "main"))) == 1
    assert network_floor.memory_bytes(mod["main"]) == 70 * (2 if fused else 3)


def test_networks_are_built_with_their_floor_and_the_default_of_tvm(tmp_path, monkeypatch):
    try:
        find_cuda_compiler()
    except TdcError:
        pytest.skip("needs the extra [cuda] or nvcc")
    monkeypatch.setattr(bench_models, "make_model", lambda name, is_tucker: SmallNetwork().eval())
    line = ["build", str(tmp_path / "new"), "--models", "resnet18", "--batch", "2", "--baselines", "tvm"]
    monkeypatch.setattr(sys, "argv", ["bench_models.py", *line])
    assert bench_models.main() == 0
    (kernel,) = json.loads((tmp_path / "new" / "manifest.json").read_text())["kernels"]
    assert kernel["floor_us"] == pytest.approx(sum(one["floor_us"] for one in kernel["floor"]), abs=1e-3)
    assert kernel["floor_of"] == "H100"
    assert set(kernel["baselines"]) == {"tucker", "original"}
    libraries = {kernel["library"]: kernel, **{one["library"]: one for one in kernel["baselines"].values()}}
    assert len(libraries) == 3
    for name, one in libraries.items():
        assert one["peak_bytes"] > 0
        assert one["build_seconds"] > 0
        (tmp_path / "m.so").write_bytes(lzma.decompress((tmp_path / "new" / name).read_bytes()))
        assert cubin_kernels(tmp_path / "m.so")


class FakeGpu:
    """Runs on the CPU; a graph replays what it was recorded from, and takes as many us as its contender's name has."""

    device, dtype, precision = "cpu", torch.float32, gpu_layers.PRECISIONS["fp32"]

    def __init__(self, layers):
        self.layers, self.captured = layers, []

    def capture(self, contender, launches, cold):
        assert not cold
        self.captured.append((contender.name, launches))

        def replay():
            contender.launch(contender.data)

        replay.us = len(contender.name)
        return replay, launches

    def time_ms(self, replay):
        return replay.us / 1e3

    def call_us(self, contender):
        contender.launch(contender.data)
        return 10 * len(contender.name)


@pytest.fixture
def fake_gpu(monkeypatch):
    layer = {"x": (2, 3, 64, 64), "network": "resnet18", "form": "tucker"}
    torch.manual_seed(0)
    networks = {True: SmallNetwork().eval(), False: SmallNetwork().eval()}

    def make_model(name, is_tucker):
        model = SmallNetwork().eval()
        model.load_state_dict(networks[is_tucker].state_dict())
        return model

    def load_network(gpu, name, library, x):
        model = make_model(name, "original" not in library)
        return gpu_layers.Contender(name, [x], lambda data: model(data[0]))

    def compile_network(net, mode):
        def refuse(x):
            raise RuntimeError("no C compiler")

        return refuse if mode == "max-autotune" else lambda x: net(x) * 1.01

    monkeypatch.setattr(bench_models, "make_model", make_model)
    monkeypatch.setattr(bench_models, "load_network", load_network)
    monkeypatch.setattr(bench_models, "launched", lambda contender: [("kernel", 0.0, 1.0)] * len(contender.name))
    monkeypatch.setattr(torch, "compile", compile_network)
    for name, value in {"synchronize": None, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5700)
    with torch.inference_mode():
        yield FakeGpu({"layer": layer})


def test_all_contenders_are_checked_and_timed_beside_ours(fake_gpu):
    baselines = {form: {"library": f"{form}.so", "peak_bytes": 30} for form in ("tucker", "original")}
    kernel = {"layer": "layer", "library": "tucker.so", "peak_bytes": 20, "baselines": baselines}
    result = bench_models.measure(fake_gpu, kernel, 0, bench_models.CONTENDERS)
    warm, wall = result["warm"], result["wall"]
    assert set(warm) == {"ours", "tucker", "original", "tvm_tucker", "tvm_original"}
    assert set(wall) == {"ours", "eager_tucker", "eager_original", "compile_tucker", "compile_original"}
    assert {name: one["median_us"] for name, one in wall.items()} == {name: 10 * len(name) for name in wall}
    assert warm["tvm_tucker"]["median_us"] == 10 / bench_models.CALLS
    # Each against the network of its form.
    for name, one in (warm | wall).items():
        assert one["error_norm"] == pytest.approx(0.01 if "compile" in name else 0.0, abs=1e-5)
        assert one["kernels"] == len(name)
    weights = sum(4 * tensor.numel() for tensor in SmallNetwork().state_dict().values())
    assert (warm["ours"]["peak_bytes"], wall["ours"]["peak_bytes"]) == (20, 20)
    assert warm["tvm_original"]["peak_bytes"] == 30
    assert warm["tucker"]["peak_bytes"] == wall["compile_original"]["peak_bytes"] == weights + 700
    failed = {f"max-autotune_{form}": "RuntimeError: no C compiler" for form in ("tucker", "original")}
    assert result["failed"] == failed
    assert fake_gpu.captured[-1] == ("ours", 1)


def test_only_wanted_contenders_are_run(fake_gpu):
    kernel = {"layer": "layer", "library": "tucker.so", "peak_bytes": 20}
    result = bench_models.measure(fake_gpu, kernel, 0)
    assert set(result["warm"]) == {"ours", "tucker", "original"}
    assert "wall" not in result
    assert not result["failed"]


def test_a_wrong_network_is_not_timed(fake_gpu):
    kernel = {"layer": "layer", "library": "original.so", "peak_bytes": 20}
    with pytest.raises(ArithmeticError, match="wrong result"):
        bench_models.measure(fake_gpu, kernel, 0)
    assert not fake_gpu.captured


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


def test_classes_are_compared_with_labels_and_with_the_reference():
    expected = np.array([[4.0, 1.0], [1.0, 2.0], [0.5, -1.0], [0.0, 2.0]])
    logits = expected + np.array([[0.1, 0.0], [0.0, -1.5], [0.0, 0.0], [0.0, 0.0]])
    found = check_precision.compare(logits, expected, np.array([0, 1, 1, 1]))
    assert found == {"accuracy": 0.5, "same_top1": 0.75, "relative_error": 1.5 / 4.0}
