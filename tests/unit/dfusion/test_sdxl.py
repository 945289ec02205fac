"""The whole method on SDXL's layout: two text encoders, added conditions, another number of layers."""

import pytest
import torch

from dfusion.adapter import attach_lora, lora_parameters
from dfusion.config import FusionConfig, SamplingConfig, TrainingConfig
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.policy import log_probs
from dfusion.sampling import sample
from dfusion.training import Trainer
from dfusion.training_data import TrainingPair
from dfusion.types import Trajectory
from tests.nets import relative_error, tiny_xl_model

PROMPT = "a red circle"
FOUR = SamplingConfig(num_steps=4)
EVERYWHERE = 1e-6
NOWHERE = 1 - 1e-6


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return tiny_xl_model()


def sampled(model: DiffusionModel, seeds: list[int]) -> Trajectory:
    prompts = model.encode_prompts([PROMPT] * len(seeds))
    items = model.item_tokens(PROMPT, ["red", "circle"])
    negative = model.encode_prompts([""])
    return sample(model.unet, model.scheduler, prompts, negative, seeds, items=[items] * len(seeds), config=FOUR)


def fused(model: DiffusionModel, base: Trajectory, reference: Trajectory, threshold: float) -> Trajectory:
    prompts = model.encode_prompts([PROMPT] * len(base))
    negative = model.encode_prompts([""])
    thresholds = [[threshold, NOWHERE]] * len(base)
    config = FusionConfig(first_step=1, last_step=3)
    return fuse(model.unet, model.scheduler, base, reference, prompts, negative, thresholds=thresholds, config=config)


def test_maps_are_those_of_the_lowest_level(model: DiffusionModel) -> None:
    """SDXL's first up layer with cross-attention is at a quarter of the latents' resolution: 8 / 4 = 2."""
    maps = sampled(model, [1]).item_maps
    assert maps is not None and maps.shape == (1, 4, 2, 2, 2) and 0 < float(maps.min()) < float(maps.max()) < 1


def test_targets_use_the_reference_inside_the_mask(model: DiffusionModel) -> None:
    base = sampled(model, [1, 2])
    reference = sampled(model, [3, 4])
    nothing, all_of_it = (fused(model, base, reference, threshold) for threshold in (NOWHERE, EVERYWHERE))
    assert relative_error(nothing.latents, base.latents) < 1e-5  # rows of a larger batch
    assert torch.equal(all_of_it.latents[:, :2], base.latents[:, :2])
    assert relative_error(all_of_it.final, base.final) > 1e-3


@pytest.mark.slow
def test_replay_and_an_update(model: DiffusionModel) -> None:
    attach_lora(model.unet, seed=1)
    base = sampled(model, [1])
    target = sampled(model, [2])
    with torch.no_grad():
        prompts = model.encode_prompts([PROMPT])
        negative = model.encode_prompts([""])
        replayed = log_probs(model.unet, model.scheduler, base, prompts, negative)

    assert (replayed - base.log_probs).abs().max() < 1e-5

    before = {name: value.clone() for name, value in lora_parameters(model.unet).items()}
    trainer = Trainer(model, [TrainingPair(target, base, PROMPT)], TrainingConfig(), seed=0)
    report = trainer.step()

    assert report.loss == pytest.approx(0.693147, abs=1e-4) and report.grad_norm > 0  # ln 2 before the first update
    assert any(not torch.equal(value, before[name]) for name, value in lora_parameters(model.unet).items())
