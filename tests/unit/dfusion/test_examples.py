"""The examples in the docstrings of the functions that users meet first."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest

import dfusion
from dfusion.shapes.prompts import prompt_list

WITH_EXAMPLES = {
    "DiffusionModel.load": dfusion.DiffusionModel.load,
    "Trainer": dfusion.Trainer,
    "fuse": dfusion.fuse,
    "load_adapter": dfusion.load_adapter,
    "load_scorer": dfusion.load_scorer,
    "make_pairs": dfusion.make_pairs,
    "prompt_list": prompt_list,
    "read_prompts": dfusion.read_prompts,
    "run_round": dfusion.run_round,
    "sample": dfusion.sample,
    "save_adapter": dfusion.save_adapter,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_example_of_a_docstring_runs_as_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    docstring = inspect.getdoc(WITH_EXAMPLES[name]) or ""
    example = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    assert example.examples
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(example)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out
