"""Schedules read from files agree with those of the loaded scheduler."""

from typing import Any

import numpy as np
import pytest
import torch

from dfusion.ddim import Schedule
from dfusion.errors import ScheduleError
from dfusion.noise_schedules import alpha_bars, step_problem
from tests.nets import sd_scheduler


def config_of(**changes: Any) -> dict[str, Any]:
    return dict(sd_scheduler(**changes).config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.01, 0.2, 0.3], "num_train_timesteps": 3},
        {"rescale_betas_zero_snr": True},
    ],
)
def test_alpha_bars_are_those_of_diffusers(changes: dict[str, Any]) -> None:
    scheduler = sd_scheduler(**changes)
    alphas = alpha_bars(dict(scheduler.config))
    np.testing.assert_allclose(alphas, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-7)  # theirs are float32


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("beta_end", [0.012, 0.002, 0.0001])
def test_the_minimum_number_of_steps_is_accepted_by_a_schedule(
    spacing: str, beta_schedule: str, beta_end: float
) -> None:
    """It is the first without a problem.

    With little noise, alpha-bar is above 0.5 at every timestep, and any number of steps is accepted.
    """
    changes = {"timestep_spacing": spacing, "beta_schedule": beta_schedule, "beta_end": beta_end, "steps_offset": 0}
    scheduler = sd_scheduler(**{"beta_start": 0.00005} | changes)
    config = dict(scheduler.config)
    fewest = next(n for n in range(1, 1000) if step_problem(config, n) is None)
    Schedule.from_scheduler(scheduler, fewest, 1.0)
    if fewest > 1:
        with pytest.raises(ScheduleError, match=f"at least {fewest} "):
            Schedule.from_scheduler(scheduler, fewest - 1, 1.0)


def test_steps_beyond_the_training_range_are_refused_as_by_a_schedule() -> None:
    scheduler = sd_scheduler(num_train_timesteps=10, beta_start=0.3, beta_end=0.4)  # offset 1
    for steps, allowed in ((9, True), (10, False), (11, False)):
        assert (step_problem(dict(scheduler.config), steps) is None) is allowed
        if not allowed:
            with pytest.raises(ScheduleError):
                Schedule.from_scheduler(scheduler, steps, 1.0)
    assert step_problem(dict(scheduler.config), 10) == (
        "expected fewer steps: the first timestep would be 10, and the scheduler's last is 9"
    )


def test_old_scheduler_files_without_spacing_are_leading() -> None:
    """As in the files of SD 1.x; diffusers has the same default."""
    config = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    assert step_problem(config, 1) == "expected at least 2 with this scheduler, got 1"
    assert step_problem(config, 2) is None


def test_zero_terminal_snr_is_sampled_with_v_prediction() -> None:
    """The first alpha-bar is 0, and x0 = -v there (by hand: sqrt(0) x - sqrt(1) v)."""
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = Schedule.from_scheduler(sd_scheduler(prediction_type="v_prediction", **zero_snr), 4, 1.0)
    assert float(schedule.alphas[0]) == 0 and bool(torch.isfinite(schedule.sigmas).all())
    with pytest.raises(ScheduleError, match="v-prediction and trailing spacing"):
        Schedule.from_scheduler(sd_scheduler(**zero_snr), 4, 1.0)
