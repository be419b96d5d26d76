"""What the GPU benchmarks do without a GPU: packing, sampling, supervising, fitting."""

import json
import lzma
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tdc_tvm.schedules.cuda import conv, model
from tdc_tvm.schedules.cuda.pack import merge
from tdc_tvm.schedules.device import GPUS
from tdc_tvm.schedules.kernel import ConvWeights
from tdc_tvm.schedules.shape import DTYPES, Conv2dShape, Epilogue, TuckerConvShape

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_layers
import build_layers
import fit_model
import gpu_layers
import oracle

H100 = GPUS["H100"]
DENSE = Conv2dShape(1, 14, 14, 40, 24, (3, 3), (2, 2), (1, 1, 1, 1))
TUCKER = TuckerConvShape(DENSE, 24, 16)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("shape", [DENSE, TUCKER], ids=["conv", "tucker"])
def test_weights_are_packed_alike_on_both_machines(shape, precision):
    shape = bench_layers.with_precision(shape, precision)
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
    true = replace(stored, launch_us=2 * stored.launch_us, wait_cycles=3 * stored.wait_cycles, handover_cycles=1500.0)
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
        assert np.mean(np.abs(layer.predict(fitted) / layer.times_us - 1)) < 0.03


def test_a_report_keeps_precisions_apart_and_draws_bars(tmp_path):
    from io import StringIO

    from rich.console import Console

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
