"""The CUDA schedules' numbers on a real GPU, against float64 NumPy."""

import importlib.util
import sys
from pathlib import Path

import pytest
import tvm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tvm.cuda(0).exist, reason="needs an NVIDIA GPU and its driver"),
]

_spec = importlib.util.spec_from_file_location("gpu_check", Path(__file__).parents[2] / "scripts" / "gpu_check.py")
gpu_check = sys.modules["gpu_check"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_check)


@pytest.mark.parametrize("name", ["table_cases", "pool_cases", "random_cases"])
def test_kernels_agree_with_float64(tmp_path, name):
    arch = "sm_" + tvm.cuda(0).compute_version.replace(".", "")
    gpu_check.build(tmp_path, arch, getattr(gpu_check, name)())
    assert not gpu_check.run(tmp_path)
