"""Microbenchmarks and the device table."""

import json
from pathlib import Path

import pytest
from cuda_emulator import cuda_source
from tvm.target import Target
from typer.testing import CliRunner

from tdc_tvm import cli, probe
from tdc_tvm.errors import TdcError
from tdc_tvm.schedules import device as device_module
from tdc_tvm.schedules.device import GPUS, DeviceSpec
from tdc_tvm.schedules.shape import DTYPES
from tdc_tvm.targets import local_gpu_arch

MEASURED = json.loads(Path(device_module.__file__).with_name("h100_probe.json").read_text())["measured"]


def test_the_h100_is_as_it_was_measured():
    h100 = GPUS["H100"].probe
    assert h100.dependent_launch_us == MEASURED["dependent_launch_us"]
    assert h100.l2_bytes_per_s == MEASURED["l2_bytes_per_s"]
    assert h100.mma_flops_per_s["tf32"] == MEASURED["mma_float32_flops_per_s"]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_what_is_measured_or_scaled_stays_below_the_datasheet(gpu):
    assert gpu.probe.fma_flops_per_s <= gpu.fp32_flops_per_s
    assert gpu.probe.dram_bytes_per_s <= gpu.dram_bytes_per_s
    assert gpu.probe.mma_flops_per_s.keys() == gpu.tensor_flops_per_s.keys()
    assert all(rate <= gpu.tensor_flops_per_s[name] for name, rate in gpu.probe.mma_flops_per_s.items())
    assert gpu.probe.launch_us > gpu.probe.dependent_launch_us > gpu.probe.barrier_us
    # 128 bytes of shared memory in a cycle, on all of these GPUs.
    assert 0.9 < gpu.probe.shared_bytes_per_s_per_core / (128 * gpu.clock_hz) <= 1


def test_clusters_fit_to_processors():
    for gpu in GPUS.values():
        assert bool(gpu.probe.clusters) == (gpu.arch == "sm_90")
        for resident, counts in enumerate(gpu.probe.clusters, 1):
            assert counts[0] == resident * gpu.core_count
            assert len(counts) == 16
            assert all(size * count <= resident * gpu.core_count for size, count in enumerate(counts, 1))


def test_peak_rates_fit_to_processors_and_clocks():
    """64 or 128 fused multiply-adds of a processor in a cycle."""
    for gpu in GPUS.values():
        per_cycle = gpu.fp32_flops_per_s / 2 / gpu.core_count / gpu.clock_hz
        assert min(abs(per_cycle - lanes) for lanes in (64, 128)) < 1


def test_a_gpu_that_is_not_in_the_table_is_an_error_that_names_those_that_are():
    with pytest.raises(TdcError, match="no device data for GPU architecture sm_70; known: sm_75"):
        DeviceSpec.from_target(Target({"kind": "cuda", "arch": "sm_70"}))


def test_the_readme_lists_the_table():
    rows: dict[tuple[str, str], list[str]] = {}
    for gpu in GPUS.values():
        targets = [name for name in (gpu.arch, f"{gpu.arch}a") if name == gpu.arch or gpu.compute_capability >= 90]
        precisions = ["fp32", *(name for name in DTYPES if name in gpu.tensor_flops_per_s)]
        key = ", ".join(f"`{name}`" for name in targets), ", ".join(map(str.upper, precisions))
        rows.setdefault(key, []).append(gpu.name)
    readme = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    listed = readme[readme.index("| GPU | target | kernels compute in |") + 2 :]
    listed = listed[: listed.index("")]
    assert sorted(listed) == sorted(f"| {', '.join(names)} | {' | '.join(key)} |" for key, names in rows.items())


@pytest.mark.parametrize("name", ["RTX 2080 Ti", "A100", "H100"])
def test_microbenchmarks_are_made_for_what_a_gpu_can_do(name):
    gpu = GPUS[name]
    functions = probe._functions(gpu.core_count, gpu.compute_capability)
    assert ("cluster_long" in functions) == (name == "H100")
    assert ("mma_float32_long" in functions) == (name != "RTX 2080 Ti")
    source = cuda_source(functions, gpu.arch)
    for function in functions:
        assert f"{function}_kernel" in source


def test_an_architecture_that_is_none_is_refused():
    with pytest.raises(TdcError, match="found the GPU architecture None; expected a name such as 'sm_90'"):
        probe.build(None)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "usage: python -m tdc_tvm.probe"),
        (["build", "p.so"], 2, "required: arch"),
        (["build", "p.so", "sm_80a"], 1, "error: no device data for GPU architecture sm_80a"),
    ],
)
def test_mistakes_on_the_command_line_are_one_message(monkeypatch, capsys, arguments, status, message):
    monkeypatch.setattr("sys.argv", ["probe", *arguments])
    with pytest.raises(SystemExit) as stopped:
        probe.main()
    assert stopped.value.code == status
    assert message in capsys.readouterr().err


@pytest.mark.skipif(local_gpu_arch() is not None, reason="shows what happens on a machine without a GPU")
def test_probing_without_a_gpu_is_one_message():
    result = CliRunner().invoke(cli.main, ["env", "--probe"])
    assert isinstance(result.exception, TdcError)
    assert "no NVIDIA GPU" in str(result.exception)
