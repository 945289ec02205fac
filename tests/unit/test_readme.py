"""The README's Python code runs, on fewer samples and steps."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_the_readmes_python_trains_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for written, run in (
        ("samples_per_prompt=8", "samples_per_prompt=3"),
        ("learning_rate=1e-3", "learning_rate=1e-3, timestep_fraction=0.2"),
    ):
        assert code.count(written) == 1
        code = code.replace(written, run)
    script = tmp_path / "readme.py"
    script.write_text(code, "utf-8")

    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    output = capsys.readouterr().out
    assert re.fullmatch(r"base -?\d\.\d\d, reference -?\d\.\d\d, target -?\d\.\d\d\n", output)
    assert (tmp_path / "adapter.safetensors").stat().st_size > 10_000
