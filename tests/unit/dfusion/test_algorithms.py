"""The registry of algorithms. An algorithm needs only its entry and its loss: the guide's example."""

from __future__ import annotations

import subprocess
import sys
from pkgutil import resolve_name
from types import ModuleType

import pytest
from pydantic import ValidationError

from dfusion import algorithms
from dfusion.adapter import attach_lora
from dfusion.algorithms import ALGORITHMS, Algorithm
from dfusion.config import PRESETS, SamplingConfig, TrainingConfig
from dfusion.errors import InvalidInputError
from dfusion.sampling import sample
from dfusion.training import Trainer
from dfusion.training_data import TrainingPair, TrainingSample
from tests.nets import tiny_model
from tests.pages import blocks


@pytest.fixture
def hinge(monkeypatch: pytest.MonkeyPatch) -> Algorithm:
    """The guide's algorithm, added as the guide describes."""
    loss, description = blocks("docs/how-to/add-an-algorithm.md", "python")
    module = ModuleType("dfusion.losses.hinge")
    exec(loss, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    namespace = dict(vars(algorithms))
    exec(description, namespace)
    added: Algorithm = namespace["HINGE"]
    monkeypatch.setitem(ALGORITHMS, added.name, added)
    return added


def test_config_and_registry_import_no_torch() -> None:
    code = "import sys, dfusion.algorithms, dfusion.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_descriptions_name_what_there_is(algorithm: Algorithm) -> None:
    assert callable(resolve_name(algorithm.losses))
    assert set(algorithm.settings) <= TrainingConfig.model_fields.keys()
    assert algorithm.weight is None or algorithm.weight in algorithm.settings


def test_unknown_algorithms_are_rejected_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match="Input should be 'dpo', 'ddpo' or 'dpok'"):
        TrainingConfig(algorithm="ppo")


def test_settings_follow_the_registry(hinge: Algorithm) -> None:
    config = TrainingConfig(algorithm="hinge", beta=4.0)
    assert (config.learns_from_pairs, config.loss_weight) == (True, 4.0)
    with pytest.raises(ValidationError, match="ratio_clip is a setting of dpo, not of hinge"):
        TrainingConfig(algorithm="hinge", ratio_clip=0.1)
    with pytest.raises(ValidationError, match="beta is a setting of dpo and hinge, not of ddpo"):
        TrainingConfig(algorithm="ddpo", beta=4.0)
    assert "hinge" in TrainingConfig.model_json_schema()["properties"]["algorithm"]["enum"]
    assert PRESETS["released_code"].settings_of("training", hinge.name) == {}  # ratio_clip is DPO's


@pytest.mark.usefixtures("hinge")
def test_an_added_algorithm_trains() -> None:
    """Initially each margin is 0 and each loss 1; a small step along the gradient reduces it."""
    model = tiny_model()
    attach_lora(model.unet, seed=1)
    prompts = ["a red circle"] * 2
    embeds = model.encode_prompts(prompts)
    negative = model.encode_prompts([""])
    trajectory = sample(model.unet, model.scheduler, embeds, negative, [1, 2], config=SamplingConfig(num_steps=4))
    pair = TrainingPair(trajectory.select([0]), trajectory.select([1]), prompts[0])
    config = TrainingConfig(algorithm="hinge", beta=2.0, learning_rate=1e-3)

    trainer = Trainer(model, [pair], config, seed=0)
    first = trainer.step()
    second = trainer.step()

    assert first.loss == pytest.approx(1, abs=1e-4)
    assert second.loss < first.loss - 1e-4 and second.margin is not None and second.margin > 0
    with pytest.raises(InvalidInputError, match="hinge learns from TrainingPair, got TrainingSample"):
        Trainer(model, [TrainingSample(trajectory.select([0]), prompts[0], 1.0)], config, seed=0)
