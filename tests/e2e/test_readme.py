"""The README's examples, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_readme_example_runs(example, tmp_path):
    if "torchvision" in example:
        pytest.importorskip("torchvision", reason="this example needs the extra [train]")
    (tmp_path / "build").mkdir()
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, timeout=600)
    assert list((tmp_path / "build").iterdir())


def test_demo_shows_what_it_promises(tmp_path):
    script = ROOT / "scripts" / "demo" / "run_demo.py"
    command = [sys.executable, str(script), "--target", "llvm", "-o", str(tmp_path)]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=600).stdout
    assert "6 of 6 Tucker layers fused" in shown
    assert "verification against ONNX Runtime passed" in shown
    # original and compressed accuracy, in per cent, on the 1,000 images
    before, after = (float(v) for v in re.search(r"test accuracy, % *│ *([\d.]+) *│ *([\d.]+)", shown).groups())
    assert before == pytest.approx(96.3, abs=0.2)
    assert before - 5 < after < before
    for name in ("original", "compressed"):
        assert (tmp_path / f"{name}.so").is_file()
