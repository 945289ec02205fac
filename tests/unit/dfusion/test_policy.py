import pytest
import torch

from dfusion.ddim import Schedule, log_prob, mean
from dfusion.errors import ScheduleError, ShapeMismatchError
from dfusion.policy import step_weights, transition_log_prob, transition_mean
from tests.nets import embeds, sd_scheduler, tiny_unet


def schedule_of(num_steps: int = 20, **changes: object) -> Schedule:
    return Schedule.from_scheduler(sd_scheduler(**changes), num_steps, 1.0)


def test_one_transition_dominates() -> None:
    """Stable Diffusion at T = 20: 14.7 at timestep 51, between 0.19 and 0.65 at all others."""
    schedule = schedule_of()
    weights = step_weights(schedule).tolist()
    assert schedule.timesteps[18] == 51
    assert weights[18] == pytest.approx(14.7, abs=0.05)
    assert all(0.18 < weight < 0.66 for i, weight in enumerate(weights) if i != 18)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_weights_are_the_change_of_log_p_by_a_changed_prediction(prediction_type: str) -> None:
    """log p at its maximum decreases by weight * d^2 when the prediction is off by d, for any x_t and prediction.

    Here x_t is 0, and the numbers are small enough for float32's precision.
    """
    schedule = schedule_of(prediction_type=prediction_type)
    zero = torch.zeros(1, 4, 2, 2)
    for i, weight in enumerate(step_weights(schedule).tolist()):
        best = mean(schedule, i, zero, zero)
        off = mean(schedule, i, zero, zero + 0.5)
        sigma = float(schedule.sigmas[i])
        lost = log_prob(best, best, sigma) - log_prob(best, off, sigma)
        assert lost.item() == pytest.approx(weight * 0.25, rel=1e-3, abs=1e-5)


def test_steps_without_noise_have_no_weight() -> None:
    weights = step_weights(schedule_of(4, set_alpha_to_one=True))
    assert weights[3] == 0 and (weights[:3] > 0).all()


def test_log_prob_is_that_of_the_mean() -> None:
    unet = tiny_unet()
    schedule = schedule_of(4)
    x_t, x_prev = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 3, 1])
    rest = steps, embeds(3), embeds(1, seed=2), 5.0
    with torch.no_grad():
        mu = transition_mean(unet, schedule, x_t, *rest)
        actual = transition_log_prob(unet, schedule, x_t, x_prev, *rest)

    assert mu.shape == x_t.shape
    torch.testing.assert_close(actual, log_prob(x_prev, mu, schedule.sigmas[steps]))


def test_bad_input() -> None:
    unet = tiny_unet()
    schedule = schedule_of(4, set_alpha_to_one=True)
    x = torch.zeros(2, 4, 8, 8)
    rest = embeds(2), embeds(1), 5.0

    with pytest.raises(ShapeMismatchError, match="step_indices"):
        transition_mean(unet, schedule, x, torch.tensor([0]), *rest)
    with pytest.raises(ShapeMismatchError, match="x_prev"):
        transition_log_prob(unet, schedule, x, x[:1], torch.tensor([0, 1]), *rest)
    with pytest.raises(ScheduleError, match="sigma"):
        transition_mean(unet, schedule, x, torch.tensor([0, 3]), *rest)
