"""The public names of `import dfusion`. A change of this list affects users."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dfusion

NAMES = [
    "Algorithm",
    "DFusionError",
    "DiffusionModel",
    "FusionConfig",
    "LoraConfig",
    "MODELS",
    "PairingConfig",
    "Prompt",
    "RewardHistory",
    "RoundConfig",
    "RoundPair",
    "RoundResult",
    "SamplingConfig",
    "Scorer",
    "Trainer",
    "TrainerState",
    "TrainingConfig",
    "TrainingPair",
    "TrainingSample",
    "Trajectory",
    "attach_lora",
    "check_model",
    "choose_pairs",
    "compare",
    "export_adapter",
    "fuse",
    "invert",
    "load_adapter",
    "load_scorer",
    "make_pairs",
    "read_prompts",
    "run_round",
    "sample",
    "save_adapter",
]


def printed(code: str) -> str:
    """What the code prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_public_names() -> None:
    assert dfusion.__all__ == NAMES and set(NAMES) <= set(dir(dfusion))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_that_of_its_module(name: str) -> None:
    assert getattr(dfusion, name) is getattr(import_module(dfusion._HOME[name]), name)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(dfusion.__file__).read_text("utf-8"))
    [block] = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname: node.module for node in imports for alias in node.names} == dict(dfusion._HOME)


def test_torch_is_imported_on_first_use_only() -> None:
    code = "import sys, dfusion; from dfusion import Prompt, RoundConfig, TrainingConfig; print('torch' in sys.modules)"
    assert printed(code) == "False"


def test_unknown_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="module 'dfusion' has no attribute 'nothing'"):
        dfusion.nothing  # noqa: B018
    with pytest.raises(ImportError):
        from dfusion import nothing  # noqa: F401
