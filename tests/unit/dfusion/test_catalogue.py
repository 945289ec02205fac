import subprocess
import sys

import pytest

from dfusion.catalogue import MODELS, SCORERS
from dfusion.errors import ModelNotFoundError
from dfusion.rewards import load_scorer


def test_modules_of_the_service_import_no_torch() -> None:
    modules = (
        "dfusion.catalogue, dfusion.config, dfusion.errors, dfusion.evaluation, dfusion.prompts, "
        "dfusion.rewards.config, dfusion.rewards.http, dfusion.rewards.plugins, dfusion.rewards.verdicts, "
        "dfusion.rewards.watch, dfusion.rewards.weighted"
    )
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_names_are_consistent() -> None:
    for name, entry in MODELS.items():
        assert entry.name == name and entry.reward in entry.scorers
        assert set(entry.scorers) <= set(SCORERS)
        assert entry.watch in (*entry.scorers, None) and entry.watch != entry.reward


def test_unknown_scorer() -> None:
    with pytest.raises(ModelNotFoundError, match="'nobody'"):
        load_scorer("nobody")
