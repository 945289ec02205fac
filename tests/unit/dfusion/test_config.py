from typing import Any

import pytest
from pydantic import ValidationError

from dfusion.config import PRESETS, FusionConfig, PairingConfig, SamplingConfig, StrictModel, TrainingConfig


def test_published_defaults() -> None:
    """D3PO's beta; ddpo-pytorch's clip and advantage clip; DPOK's weights."""
    config = TrainingConfig()
    assert (config.beta, config.clip_range, config.advantage_clip) == (0.1, 1e-4, 5)
    assert (config.policy_weight, config.kl_weight) == (10, 0.01)
    assert (config.timestep_fraction, config.skip_dominant_step) == (1, False)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("dpo", {"clip_range": 0.2}),
        ("dpo", {"kl_weight": 0.1}),
        ("ddpo", {"beta": 0.2}),
        ("ddpo", {"policy_weight": 1.0}),
        ("dpok", {"beta": 0.2}),
    ],
)
def test_settings_of_another_algorithm_are_rejected(algorithm: str, settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(ValidationError, match=f"{name} is a setting of"):
        TrainingConfig(algorithm=algorithm, **settings)


@pytest.mark.parametrize("algorithm", ["dpo", "ddpo", "dpok"])
def test_json_round_trip(algorithm: str) -> None:
    config = TrainingConfig(algorithm=algorithm, inner_epochs=3)
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config


def test_unknown_keys_and_invalid_numbers_are_rejected() -> None:
    for invalid in (
        {"gamma": 1},
        {"timestep_fraction": 0},
        {"timestep_fraction": 1.5},
        {"clip_range": 1},
        {"beta": -1},
    ):
        with pytest.raises(ValidationError):
            TrainingConfig(**invalid)


def test_presets_hold_every_point_of_difference() -> None:
    """docs/decisions/006-presets.md."""
    paper = PRESETS["paper"]
    released = PRESETS["released_code"]

    assert paper.fusion == FusionConfig() and paper.pairing == PairingConfig()
    assert (paper.training, released.training) == (TrainingConfig(), TrainingConfig(ratio_clip=0.1))
    assert released.settings_of("training", "dpo") == {"ratio_clip": 0.1} and not released.settings_of(
        "training", "ddpo"
    )
    assert (released.fusion.merge, released.fusion.mask_source) == ("or", "resolution")

    pairing = released.pairing
    assert (pairing.dealing, pairing.adoption_threshold, pairing.max_mask_cover) == ("rank_order", 0, 1)

    shared = {"merge": "xor", "mask_source": "first_up"}
    assert released.fusion.model_copy(update=shared) == paper.fusion

    of_the_paper = {"dealing": "worst_first", "adoption_threshold": 1.0, "max_mask_cover": 0.7}
    assert pairing.model_copy(update=of_the_paper) == paper.pairing


def test_layers_are_numbers() -> None:
    with pytest.raises(ValidationError, match="valid integer"):
        FusionConfig.model_validate({"layers": ["1", "2"]})


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (SamplingConfig, {"guidance_scale": False}),
        (SamplingConfig, {"num_steps": "7"}),
        (FusionConfig, {"last_step": True}),
        (FusionConfig, {"layers": [True, 2]}),
        (TrainingConfig, {"lora": {"rank": "4"}}),
    ],
)
def test_values_that_are_not_numbers_are_rejected(settings: type[StrictModel], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="expected a number"):
        settings.model_validate(values)
    assert FusionConfig.model_validate({"layers": [1, 2]}).layers == (1, 2)
    assert TrainingConfig.model_validate({"gradient_checkpointing": True, "beta": 1}).beta == 1.0
