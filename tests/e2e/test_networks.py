"""The main job on the five CNNs of the paper: compress, export, build for the CPU and verify, build for a GPU."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import tdc_tvm
from tdc_tvm.cuda_toolchain import cubin_kernels
from tdc_tvm.plan import preset_plan

torch = pytest.importorskip("torch", reason="compressing PyTorch models needs the extra [train]")
torchvision = pytest.importorskip("torchvision", reason="the networks come from torchvision, extra [train]")

# Multiply-adds of all convolutions at 224x224, in millions, before and after: TDC's published ranks.
NETWORKS = {
    "resnet18": (1814, 786),
    "resnet50": (4087, 2581),
    "vgg16_bn": (15347, 3322),
    "densenet121": (2833, 2074),
    "densenet201": (4289, 3928),
}


def seeded(name: str) -> torch.nn.Module:
    """A network with random weights and lively batch statistics, so that no layer's output fades or explodes."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS])
def compressed(request, tmp_path_factory):
    """Name, plan and ONNX file of a compressed network."""
    from tdc_tvm.training import decompose, export_onnx

    name = request.param
    plan = preset_plan(name)
    model, report = decompose(seeded(name), plan)
    assert len(report.decomposed) == len(plan.layers)
    path = tmp_path_factory.mktemp(name) / f"{name}.onnx"
    export_onnx(model, (1, 3, 224, 224), path)
    return name, plan, path


def test_compressed_network_runs_on_the_cpu_as_in_onnxruntime(compressed, tmp_path):
    name, plan, path = compressed
    compiled = tdc_tvm.build(path, "llvm", require_full_fusion=True, atol=0, rtol=1e-4)
    report = compiled.report
    assert report.verification.status == "passed"
    assert {layer.name for layer in report.fused} == set(plan.layers)
    for layer in report.fused:
        assert layer.ranks == plan.layers[layer.name]
    assert all(layer.strategy and layer.predicted_latency_us > 0 for layer in report.layers)
    assert report.macs / 1e6 == pytest.approx(NETWORKS[name][1], abs=1)
    x = np.random.default_rng(1).standard_normal((1, 3, 224, 224)).astype(np.float32)
    compiled.export_library(tmp_path / "model.so")
    np.testing.assert_array_equal(tdc_tvm.load(tmp_path / "model.so").run(x), compiled.run(x))


def test_compressed_network_cross_compiles_to_machine_code_for_sm_90(compressed, tmp_path):
    _, plan, path = compressed
    compiled = tdc_tvm.build(path, "nvidia/nvidia-h100", require_full_fusion=True)
    assert len(compiled.report.fused) == len(plan.layers)
    compiled.export_library(tmp_path / "model.so")
    kernels = cubin_kernels(tmp_path / "model.so")
    assert {kernel.arch for kernel in kernels} == {"sm_90"}
    # Equal layers share a kernel; every distinct one must be there as machine code.
    assert sum(kernel.name.startswith("tucker_conv") for kernel in kernels) >= len(
        {(layer.shape, layer.ranks) for layer in compiled.report.fused}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_original_network_builds_and_agrees(name, tmp_path):
    from tdc_tvm.training import export_onnx

    export_onnx(seeded(name), (1, 3, 224, 224), tmp_path / "model.onnx")
    compiled = tdc_tvm.build(tmp_path / "model.onnx", "llvm", atol=0, rtol=1e-4)
    assert compiled.report.verification.status == "passed"
    assert compiled.report.macs / 1e6 == pytest.approx(NETWORKS[name][0], abs=1)


@pytest.mark.slow
def test_decomposing_at_compile_time_gives_the_same_layers_as_pytorch(tmp_path):
    from tdc_tvm.training import decompose, export_onnx

    model = seeded("resnet18")
    export_onnx(model, (1, 3, 224, 224), tmp_path / "dense.onnx")
    compiled = tdc_tvm.build(tmp_path / "dense.onnx", "llvm", decompose="resnet18", atol=0, rtol=1e-4)
    assert {layer.name for layer in compiled.report.fused} == set(preset_plan("resnet18").layers)
    # At full rank decomposition changes nothing, so both ways must give the dense network's output.
    names = ["layer4.1.conv1", "layer4.1.conv2"]
    full = tdc_tvm.DecompositionPlan({name: (512, 512) for name in names})
    x = np.random.default_rng(2).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
        torch_side = decompose(model, full)[0](torch.from_numpy(x)).numpy()
    ours = tdc_tvm.build(tmp_path / "dense.onnx", "llvm", decompose=full).run(x)
    scale = np.abs(expected).max()
    assert np.abs(torch_side - expected).max() / scale < 1e-4
    assert np.abs(ours - expected).max() / scale < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
def test_older_gpus_get_machine_code_too(arch, tmp_path):
    path = demo_model()
    compiled = tdc_tvm.build(path, arch, decompose=0.9, batch=1)
    assert "cannot run on this machine" in compiled.report.verification.detail
    compiled.export_library(tmp_path / "model.so")
    assert {kernel.arch for kernel in cubin_kernels(tmp_path / "model.so")} == {arch}


def demo_model() -> onnx.ModelProto:
    from pathlib import Path

    return onnx.load(Path(__file__).parents[2] / "scripts" / "demo" / "fashion_mnist.onnx")
