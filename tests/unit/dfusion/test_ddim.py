import math

import pytest
import torch

from dfusion.ddim import Schedule, log_prob, mean, recorded_log_prob
from dfusion.errors import ScheduleError
from tests.nets import sd_scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_step_equals_diffusers(prediction_type: str, eta: float, spacing: str) -> None:
    scheduler = sd_scheduler(prediction_type=prediction_type, timestep_spacing=spacing, steps_offset=0)
    schedule = Schedule.from_scheduler(scheduler, 20, eta)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    for i, timestep in enumerate(scheduler.timesteps):
        x, predicted, z = torch.randn(3, 2, 4, 8, 8, generator=generator)
        ours = mean(schedule, i, x, predicted) + schedule.sigmas[i] * z
        theirs = scheduler.step(predicted, timestep, x, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_clipping_of_the_scheduler_is_kept() -> None:
    scheduler = sd_scheduler(clip_sample=True)
    schedule = Schedule.from_scheduler(scheduler, 20, 1.0)
    scheduler.set_timesteps(20)
    x = 9 * torch.ones(1, 4, 2, 2)
    z = torch.zeros(1, 4, 2, 2)
    theirs = scheduler.step(z, scheduler.timesteps[0], x, eta=1.0, variance_noise=z).prev_sample
    torch.testing.assert_close(mean(schedule, 0, x, z), theirs)


def test_stable_diffusion_schedule_by_hand() -> None:
    schedule = Schedule.from_scheduler(sd_scheduler(), 20, 1.0)
    assert schedule.timesteps.tolist() == list(range(951, 0, -50))
    assert schedule.trainable_steps == tuple(range(20))
    betas = [(math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * k / 999) ** 2 for k in range(1000)]
    alpha_0 = 1 - betas[0]
    alpha_1 = (1 - betas[0]) * (1 - betas[1])
    sigma = math.sqrt((1 - alpha_0) / (1 - alpha_1) * (1 - alpha_1 / alpha_0))
    assert schedule.sigmas[19].item() == pytest.approx(sigma, rel=1e-4)  # scheduler's alphas are float32
    assert schedule.sigmas[18].item() == pytest.approx(0.041, abs=5e-4)  # the figure that method.md gives


def test_previous_step_is_the_next_entry_not_a_stride() -> None:
    """1000 is no multiple of 7: a stride of 1000 // 7 is wrong at every step of trailing spacing."""
    schedule = Schedule.from_scheduler(sd_scheduler(timestep_spacing="trailing", steps_offset=0), 7, 1.0)
    torch.testing.assert_close(schedule.prev_alphas[:-1], schedule.alphas[1:])


def test_the_given_scheduler_is_not_modified() -> None:
    scheduler = sd_scheduler()
    before = scheduler.timesteps.clone()
    Schedule.from_scheduler(scheduler, 20, 1.0)
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None


def test_log_prob_is_the_mean_of_gaussian_log_densities() -> None:
    x, mu = torch.randn(2, 3, 4, 2, 5, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 1.7, 0.04])
    expected = torch.distributions.Normal(mu, sigma.view(3, 1, 1, 1)).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(x, mu, sigma), expected)
    torch.testing.assert_close(log_prob(x, mu, 0.3)[0], expected[0])


def test_last_step_without_noise_is_left_out() -> None:
    schedule = Schedule.from_scheduler(sd_scheduler(set_alpha_to_one=True), 20, 1.0)
    x = torch.ones(2, 4, 2, 2)

    assert schedule.sigmas[19] == 0
    assert schedule.trainable_steps == tuple(range(19))
    assert recorded_log_prob(schedule, 19, x, x).tolist() == [0, 0]

    schedule.require_trainable(18)
    with pytest.raises(ScheduleError, match=r"\[19\]"):
        schedule.require_trainable(torch.tensor([3, 19]))
    with pytest.raises(ScheduleError):
        log_prob(x, x, 0.0)


@pytest.mark.parametrize("steps", [0, 1001, 1000])
def test_invalid_numbers_of_steps_are_rejected(steps: int) -> None:
    with pytest.raises(ScheduleError):  # with steps_offset 1, the first of 1000 timesteps is 1000
        Schedule.from_scheduler(sd_scheduler(), steps, 1.0)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_single_step_at_the_clean_end_is_rejected_with_the_minimum_number(spacing: str, prediction_type: str) -> None:
    """One leading step is timestep 0 (+ offset 1), alpha-bar 0.998; two start at 501, alpha-bar 0.275."""
    scheduler = sd_scheduler(timestep_spacing=spacing, prediction_type=prediction_type)
    with pytest.raises(ScheduleError, match=rf"num_steps: expected at least 2 with {spacing} spacing, got 1"):
        Schedule.from_scheduler(scheduler, 1, 1.0)
    assert len(Schedule.from_scheduler(scheduler, 2, 1.0)) == 2


def test_the_minimum_number_is_accepted_by_the_schedule() -> None:
    """Four betas of 0 and two of 0.9: alpha-bar is 1, 1, 1, 1, 0.1, 0.01. The first leading timestep of T steps is
    (T - 1) * (6 // T): 0, 3, 4 for T = 1, 2, 3."""
    scheduler = sd_scheduler(num_train_timesteps=6, trained_betas=[0.0, 0, 0, 0, 0.9, 0.9], steps_offset=0)
    with pytest.raises(ScheduleError, match=r"at least 3 .*, got 2: .* timestep 3, .*alpha-bar 1"):
        Schedule.from_scheduler(scheduler, 2, 1.0)


def test_one_trailing_step_starts_at_noise() -> None:
    trailing = sd_scheduler(timestep_spacing="trailing", steps_offset=0)
    assert Schedule.from_scheduler(trailing, 1, 1.0).timesteps.tolist() == [999]


def test_zero_terminal_snr_needs_another_prediction_type() -> None:
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 0}
    with pytest.raises(ScheduleError, match="alpha-bar"):
        Schedule.from_scheduler(sd_scheduler(**settings), 20, 1.0)
    Schedule.from_scheduler(sd_scheduler(**settings, prediction_type="v_prediction"), 20, 1.0)


def test_rows_of_mixed_steps_equal_single_steps() -> None:
    schedule = Schedule.from_scheduler(sd_scheduler(), 20, 1.0)
    x, predicted = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    mixed = mean(schedule, torch.tensor([4, 17]), x, predicted)
    assert torch.equal(mixed[1], mean(schedule, 17, x, predicted)[1])
    assert torch.equal(mixed[0], mean(schedule, 4, x, predicted)[0])
