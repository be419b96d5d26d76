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
    assert max(map(len, re.findall("[│┃┏└].*", shown))) <= 80
    # Accuracy, in per cent, on the 1,000 images.
    found = {name.strip(): float(value) for name, value in re.findall(r"│ ([a-zA-Z ]+?) *│.*│ *([\d.]+)%", shown)}
    assert found["dense"] > 94
    assert 30 < found["decomposed only"] < found["dense"]
    libraries = ["decomposed.so", "dense.so"]
    if (ROOT / "scripts" / "demo" / "fashion_mnist_tucker.onnx").is_file():
        assert found["trained by ADMM"] > found["decomposed only"]
        libraries.append("trained.so")
    else:
        assert "python scripts/train_demo.py train --data FOLDER" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == libraries
