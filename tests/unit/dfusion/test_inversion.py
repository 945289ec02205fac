"""DDIM inversion against diffusers' inverse scheduler, and on networks with a known solution."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler, UNet2DConditionModel

from dfusion.config import SamplingConfig
from dfusion.errors import NonFiniteError, ShapeMismatchError
from dfusion.guidance import predict
from dfusion.inversion import denoise, invert, report_inversion
from dfusion.policy import log_probs
from dfusion.sampling import sample
from tests.nets import SD_SCHEDULE, embeds, relative_error, sd_scheduler, tiny_unet

FIVE = SamplingConfig(num_steps=5)
PROMPT = embeds(2)
NEGATIVE = embeds(1, seed=2)


def clean_latents(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def constant_unet() -> UNet2DConditionModel:
    """A U-Net that predicts the same noise for every input."""
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.copy_(torch.tensor([0.5, -1.0, 0.25, 2.0]))
    return unet


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_states_are_those_of_diffusers_inverse_scheduler(prediction_type: str) -> None:
    unet = tiny_unet()
    scheduler = sd_scheduler(prediction_type=prediction_type)
    actual = invert(unet, scheduler, clean_latents(), PROMPT, NEGATIVE, seeds=[1, 2], config=FIVE).trajectory
    inverse = DDIMInverseScheduler(**SD_SCHEDULE, prediction_type=prediction_type)
    inverse.set_timesteps(5)
    x = clean_latents()
    states = [x]
    for timestep in inverse.timesteps:
        with torch.no_grad():
            noise_pred = predict(unet, x, timestep, PROMPT, NEGATIVE.expand(2, -1, -1), FIVE.guidance_scale)
        x = inverse.step(noise_pred, int(timestep), x).prev_sample
        states.append(x)

    assert actual.timesteps.tolist() == inverse.timesteps.tolist()[::-1]
    assert relative_error(actual.latents, torch.stack(states[::-1], 1)) < 1e-6


def test_the_trajectory_ends_with_the_given_latents_and_can_be_replayed() -> None:
    unet = tiny_unet()
    latents = clean_latents()
    actual = invert(unet, sd_scheduler(), latents, PROMPT, NEGATIVE, seeds=[1, 2], config=FIVE).trajectory
    assert torch.equal(actual.final, latents) and actual.latents.shape == (2, 6, 4, 8, 8)
    assert (actual.seeds, actual.config) == ((1, 2), FIVE)
    with torch.no_grad():
        replayed = log_probs(unet, sd_scheduler(), actual, PROMPT, NEGATIVE)
    torch.testing.assert_close(actual.log_probs, replayed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_constant_network_is_inverted_exactly(spacing: str, set_alpha_to_one: bool) -> None:
    """Then eps(x_prev, t) = eps(x_t, t). Seven steps: the spacings do not divide the 1000 training steps evenly."""
    unet = constant_unet()
    scheduler = sd_scheduler(timestep_spacing=spacing, set_alpha_to_one=set_alpha_to_one)
    config = SamplingConfig(num_steps=7)
    arguments = (PROMPT, NEGATIVE)
    inversion = invert(unet, scheduler, clean_latents(), *arguments, seeds=[1, 2], config=config)
    again = denoise(unet, scheduler, inversion.trajectory.latents[:, 0], *arguments, config=config)
    assert torch.equal(inversion.noise_errors, torch.zeros(2, 7))
    assert relative_error(again, clean_latents()) < 1e-5


def test_noise_estimates_of_a_true_network_are_wrong() -> None:
    """Section 4.4: the estimates differ from the network's own (least at the last step).

    Denoising does not reproduce the latents.
    """
    unet = tiny_unet()
    scheduler = sd_scheduler()
    sampled = sample(unet, scheduler, PROMPT, NEGATIVE, [1, 2], config=FIVE)
    report = report_inversion(unet, scheduler, sampled, PROMPT, NEGATIVE)
    assert report.noise_errors.shape == (2, 5) and report.state_errors.shape == (2, 6)
    assert (report.noise_errors[:, :-1] > 0.05).all() and (report.reconstruction_errors > 0.1).all()
    assert (report.state_errors[:, 0] > 0.1).all() and (report.state_errors[:, -1] == 0).all()


@pytest.mark.slow
def test_the_report_by_hand() -> None:
    unet = tiny_unet()
    scheduler = sd_scheduler()
    sampled = sample(unet, scheduler, PROMPT, NEGATIVE, [1, 2], config=FIVE)
    report = report_inversion(unet, scheduler, sampled, PROMPT, NEGATIVE)
    inverted = invert(unet, scheduler, sampled.final, PROMPT, NEGATIVE, seeds=[1, 2], config=FIVE).trajectory
    again = denoise(unet, scheduler, inverted.latents[:, 0], PROMPT, NEGATIVE, config=FIVE)
    for b in range(2):
        error = relative_error(again[b], sampled.final[b])
        assert float(report.reconstruction_errors[b]) == pytest.approx(error, rel=1e-5)
        for i in range(5):
            state = relative_error(inverted.latents[b, i], sampled.latents[b, i])
            assert float(report.state_errors[b, i]) == pytest.approx(state, rel=1e-5)
            x_t = inverted.latents[b : b + 1, i]
            x_prev = inverted.latents[b : b + 1, i + 1]
            with torch.no_grad():
                used, true = (
                    predict(unet, x, sampled.timesteps[i], PROMPT[b : b + 1], NEGATIVE, FIVE.guidance_scale)
                    for x in (x_prev, x_t)
                )
            assert float(report.noise_errors[b, i]) == pytest.approx(relative_error(used, true), rel=1e-3)


def test_on_step_can_cancel_every_step() -> None:
    calls: list[tuple[int, int]] = []
    arguments = (tiny_unet(), sd_scheduler(), clean_latents(), PROMPT, NEGATIVE)
    invert(*arguments, seeds=[1, 2], config=FIVE, on_step=lambda step, steps: calls.append((step, steps)))
    assert calls == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5)]


def test_invalid_latents_are_rejected() -> None:
    unet = tiny_unet()
    scheduler = sd_scheduler()

    with pytest.raises(ShapeMismatchError, match="latents"):
        invert(unet, scheduler, clean_latents()[0], PROMPT, NEGATIVE, seeds=[1, 2], config=FIVE)
    with pytest.raises(ShapeMismatchError, match="latents"):
        invert(unet, scheduler, clean_latents(), PROMPT, NEGATIVE, seeds=[1], config=FIVE)
    with pytest.raises(ShapeMismatchError, match="prompt_embeds"):
        invert(unet, scheduler, clean_latents(), PROMPT[:1], NEGATIVE, seeds=[1, 2], config=FIVE)
    with pytest.raises(NonFiniteError, match="in the input"):
        invert(unet, scheduler, clean_latents() * torch.nan, PROMPT, NEGATIVE, seeds=[1, 2], config=FIVE)
    with pytest.raises(NonFiniteError, match="in the input"):
        denoise(unet, scheduler, clean_latents() * torch.inf, PROMPT, NEGATIVE, config=FIVE)

    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.nan)

    with pytest.raises(NonFiniteError, match="step_index 4"):
        invert(unet, scheduler, clean_latents(), PROMPT, NEGATIVE, seeds=[1, 2], config=FIVE)
