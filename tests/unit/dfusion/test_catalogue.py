import subprocess
import sys

import pytest

from dfusion.catalogue import MODELS, SCORERS
from dfusion.errors import ModelNotFoundError
from dfusion.rewards import load_scorer


def test_the_catalogue_imports_no_torch() -> None:
    code = (
        "import sys, dfusion.catalogue, dfusion.config, dfusion.errors, dfusion.prompts; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_names_fit_each_other() -> None:
    for name, entry in MODELS.items():
        assert entry.name == name and entry.default_reward in entry.scorers
        assert set(entry.scorers) <= set(SCORERS)


def test_unknown_scorer() -> None:
    with pytest.raises(ModelNotFoundError, match="'nobody'"):
        load_scorer("nobody")
