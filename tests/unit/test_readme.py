"""The README's Python code runs, on fewer samples and steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_the_readmes_python_trains_an_adapter(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for written, run in (
        ("samples_per_prompt=8", "samples_per_prompt=3"),
        ("learning_rate=1e-3", "learning_rate=1e-3, timestep_fraction=0.2"),
    ):
        assert code.count(written) == 1
        code = code.replace(written, run)
    script = tmp_path / "readme.py"
    script.write_text(code, "utf-8")
    ran = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert re.fullmatch(r"base -?\d\.\d\d, reference -?\d\.\d\d, target -?\d\.\d\d\n", ran.stdout)
    assert (tmp_path / "adapter.safetensors").stat().st_size > 10_000
