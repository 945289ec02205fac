"""docs/paper-map.md names functions and tests that exist, and the defaults are the paper's."""

import importlib
import re
from pathlib import Path

import pytest

from dfusion.config import FusionConfig, PairingConfig, RoundConfig, SamplingConfig, TrainingConfig

ROOT = Path(__file__).parents[2]
MAP = (ROOT / "docs" / "paper-map.md").read_text("utf-8")
FUNCTIONS = re.findall(r"`((?:dfusion|tools)(?:\.\w+)+)`", MAP)
TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", MAP)
LINKS = re.findall(r"\]\(([\w/.-]+\.md)\)", MAP)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_named_functions_exist(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize(("file", "test"), TESTS)
def test_named_tests_exist(file, test):
    assert f"def {test}(" in (ROOT / file).read_text("utf-8")


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere(link):
    assert (ROOT / "docs" / link).is_file()


def test_every_row_names_a_function_and_a_test():
    equations, _, _ = MAP.partition("## Table 3")
    rows = [line for line in equations.splitlines() if line.startswith("| ") and not line.startswith("| Paper")]
    assert len(rows) > 10
    assert all(re.search(r"`(dfusion|tools)\.", row) and "`tests/" in row for row in rows)


def test_every_row_of_table_3_names_settings_that_there_are():
    _, _, table = MAP.partition("## Table 3")
    names = re.findall(r"`((?:sampling|fusion|pairing|training)\.\w+)`", table)
    assert len(names) > 10
    for name in names:
        part, _, field = name.partition(".")
        assert field in type(getattr(RoundConfig(), part)).model_fields


def test_defaults_are_those_of_table_3():
    sampling, fusion, training = SamplingConfig(), FusionConfig(), TrainingConfig()
    assert (sampling.num_steps, sampling.eta, sampling.guidance_scale) == (20, 1.0, 5.0)
    # the paper's t = 18 ... 1 of T = 20
    fused = fusion.steps(sampling.num_steps)
    assert (sampling.num_steps - fused[0], sampling.num_steps - fused[-1]) == (18, 1)
    assert PairingConfig().adoption_threshold == 1.0
    assert (training.learning_rate, training.weight_decay, training.adam_epsilon) == (1e-4, 1e-4, 1e-8)
    assert (training.adam_beta1, training.adam_beta2, training.max_grad_norm) == (0.9, 0.999, 1.0)
    assert (training.examples_per_update, training.inner_epochs) == (320, 2)
