"""Eq. 1: the stochastic DDIM step as a Gaussian policy. Arithmetic is float32; coefficients are computed in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch

from dfusion._diffusers import DDIMScheduler
from dfusion.config import MOST_INITIAL_SIGNAL
from dfusion.errors import ScheduleError, shortened

PredictionType = Literal["epsilon", "v_prediction", "sample"]
StepIndices = int | torch.Tensor
"""One step_index for all rows, or an int64 tensor (B,) with one per row."""


@dataclass(frozen=True)
class Schedule:
    """The T steps of a sampler: alpha-bar of each step and of the one after it, and sigma.

    timesteps    (T,) int64, the scheduler's values in denoising order
    alphas       (T,) float32, alpha-bar at each timestep
    prev_alphas  (T,) float32, alpha-bar at the next entry of `timesteps`; the last: `final_alpha_cumprod`
    sigmas       (T,) float32, standard deviation of each step's noise; 0 where the step is deterministic
    prediction_type  what the U-Net predicts
    clip_range   the scheduler clips x0 to [-clip_range, clip_range]; None: no clipping (SD)
    """

    timesteps: torch.Tensor
    alphas: torch.Tensor
    prev_alphas: torch.Tensor
    sigmas: torch.Tensor
    prediction_type: PredictionType
    clip_range: float | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def trainable_steps(self) -> tuple[int, ...]:
        """The step indices with noise, hence with a log-density: all of them without `set_alpha_to_one` (SD)."""
        return tuple(i for i, sigma in enumerate(self.sigmas.tolist()) if sigma > 0)

    def require_trainable(self, steps: StepIndices) -> None:
        """Raise ScheduleError if one of `steps` has sigma = 0, so that log p is infinite."""
        indices = [steps] if isinstance(steps, int) else steps.tolist()
        without_noise = sorted(set(indices) - set(self.trainable_steps))
        if without_noise:
            expected = f"steps with noise (step_index in {shortened(self.trainable_steps)})"
            raise ScheduleError(
                f"expected {expected}, got {shortened(without_noise)}: sigma is 0 or the step does not exist; leave"
                " them out, or use set_alpha_to_one=False and eta > 0"
            )

    @classmethod
    def from_scheduler(cls, scheduler: DDIMScheduler, num_steps: int, eta: float) -> Schedule:
        """The schedule of `num_steps` steps with noise weight `eta` (Eq. 1). The scheduler is not modified.

        Raises:
            ScheduleError: A scheduler other than DDIM, or dynamic thresholding; more steps than the scheduler has; too
                few steps to start at a noisy timestep (the message names the smallest number); timesteps that do not
                decrease or lie outside the training range; a first alpha-bar of 0 with epsilon prediction, where x0 is
                undefined.
        """
        if not isinstance(scheduler, DDIMScheduler):
            raise ScheduleError(f"scheduler: expected a DDIMScheduler, got {type(scheduler).__name__}")
        if scheduler.config.thresholding:
            raise ScheduleError("scheduler: expected thresholding=False (Eq. 1 has no dynamic thresholding), got True")
        timesteps = _timesteps(scheduler, num_steps)
        _require_noisy_start(scheduler, timesteps)

        alphas = scheduler.alphas_cumprod.double().cpu()[timesteps]
        final = torch.as_tensor(scheduler.final_alpha_cumprod).double().cpu().reshape(1)
        prev_alphas = torch.cat([alphas[1:], final])
        variances = (1 - prev_alphas) / (1 - alphas) * (1 - alphas / prev_alphas)
        prediction_type = scheduler.config.prediction_type
        if not torch.isfinite(variances).all() or (prediction_type == "epsilon" and alphas.min() <= 0):
            raise ScheduleError(
                f"expected alpha-bar in (0, 1) at every step, got {alphas.min():g} to {alphas.max():g}"
                " (zero-terminal-SNR betas work with v-prediction and trailing spacing)"
            )

        return cls(
            timesteps=timesteps,
            alphas=alphas.float(),
            prev_alphas=prev_alphas.float(),
            sigmas=(eta * variances.clamp(min=0).sqrt()).float(),
            prediction_type=prediction_type,
            clip_range=scheduler.config.clip_sample_range if scheduler.config.clip_sample else None,
        )


def _timesteps(scheduler: DDIMScheduler, num_steps: int) -> torch.Tensor:
    """The (T,) int64 timesteps of a copy of the scheduler, checked."""
    total = scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise ScheduleError(f"num_steps: expected 1 to {total}, got {num_steps}")

    own = copy.deepcopy(scheduler)
    own.set_timesteps(num_steps)
    timesteps = torch.as_tensor(own.timesteps).to("cpu", torch.int64)

    inside = int(timesteps.min()) >= 0 and int(timesteps.max()) < len(scheduler.alphas_cumprod)
    if not inside or bool((timesteps.diff() >= 0).any()):
        raise ScheduleError(
            f"expected timesteps that decrease within 0 to {total - 1}, got {shortened(timesteps.tolist())}"
        )
    return timesteps


def _require_noisy_start(scheduler: DDIMScheduler, timesteps: torch.Tensor) -> None:
    """Raise ScheduleError if the first timestep has too little noise for x_T and more steps would start noisier."""
    alphas = scheduler.alphas_cumprod
    first = float(alphas[timesteps[0]])
    if first <= MOST_INITIAL_SIGNAL or float(alphas.min()) > MOST_INITIAL_SIGNAL:
        return

    minimum = len(timesteps) + 1
    while float(alphas[_timesteps(scheduler, minimum)[0]]) > MOST_INITIAL_SIGNAL:
        minimum += 1
    spacing = scheduler.config.timestep_spacing
    raise ScheduleError(
        f"num_steps: expected at least {minimum} with {spacing} spacing, got {len(timesteps)}: sampling would start at"
        f" timestep {int(timesteps[0])}, where images are nearly clean (alpha-bar {first:.3g}), and give noise"
    )


def _at(values: torch.Tensor, steps: StepIndices, like: torch.Tensor) -> torch.Tensor:
    """`values[steps]`, shaped to broadcast over (B, C, h, w).

    The value of one step is a number on the CPU. It combines with tensors on a GPU without a transfer.
    """
    if isinstance(steps, int):
        return values[steps]
    return values[steps.to(values.device)].to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def mean(schedule: Schedule, steps: StepIndices, x_t: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
    """mu of Eq. 1, (B, C, h, w) float32, from x_t and the guided prediction, both (B, C, h, w).

    `noise_pred` is the U-Net's output: epsilon, v or x0, according to the schedule's `prediction_type`.
    """
    # Notation (<variable> -> <paper>): alpha -> alpha-bar_t, prev_alpha -> alpha-bar_{t-1}, sigma -> sigma_t,
    #   x_0 -> predicted clean latents, epsilon -> predicted noise, direction -> coefficient of epsilon
    x_t = x_t.float()
    predicted = noise_pred.float()
    alpha = _at(schedule.alphas, steps, x_t)
    prev_alpha = _at(schedule.prev_alphas, steps, x_t)
    sigma = _at(schedule.sigmas, steps, x_t)

    # 1. x_0 and epsilon from the network's output
    if schedule.prediction_type == "epsilon":
        x_0 = (x_t - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
        epsilon = predicted
    elif schedule.prediction_type == "v_prediction":
        x_0 = alpha.sqrt() * x_t - (1 - alpha).sqrt() * predicted
        epsilon = alpha.sqrt() * predicted + (1 - alpha).sqrt() * x_t
    else:
        x_0 = predicted
        epsilon = (x_t - alpha.sqrt() * predicted) / (1 - alpha).sqrt()
    if schedule.clip_range is not None:
        x_0 = x_0.clamp(-schedule.clip_range, schedule.clip_range)

    # 2. mu
    direction = (1 - prev_alpha - sigma.square()).clamp(min=0).sqrt()
    return prev_alpha.sqrt() * x_0 + direction * epsilon


def log_prob(
    x_prev: torch.Tensor, mean: torch.Tensor, sigma: torch.Tensor | float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """log p of Eq. 1: the Gaussian's log-density, mean over C*h*w.

    Args:
        x_prev: (B, C, h, w).
        mean: (B, C, h, w), mu.
        sigma: A number, or (B,). On the CPU, it is checked without waiting for a GPU.
        weights: (B, h, w), for a weighted mean over h*w and a plain one over C. Not negative, and not all 0 in any row.

    Returns:
        (B,) float32.

    Raises:
        ScheduleError: A sigma of 0.
    """
    scale = torch.as_tensor(sigma, dtype=torch.float32)
    if bool((scale <= 0).any()):
        raise ScheduleError("sigma: expected a positive standard deviation, got 0; log p is infinite there")
    return log_density(x_prev, mean, scale, weights)


def log_density(
    x_prev: torch.Tensor, mean: torch.Tensor, sigma: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """`log_prob` without the check of sigma, a float32 tensor. It does not wait for the device."""
    scale = sigma if sigma.ndim == 0 else sigma.to(mean.device).reshape(-1, *[1] * (mean.ndim - 1))
    squared = ((x_prev.float() - mean.float()) / scale).square()
    densities = -0.5 * squared - scale.log() - 0.5 * math.log(2 * math.pi)
    if weights is None:
        return densities.flatten(1).mean(1)
    return (densities.mean(1) * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)


def recorded_log_prob(schedule: Schedule, step_index: int, x_prev: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """`log_prob` of one step as trajectories record it, (B,). It is 0 if the step has no noise, never infinite."""
    sigma = float(schedule.sigmas[step_index])
    return log_prob(x_prev, mean, sigma) if sigma > 0 else x_prev.new_zeros(len(x_prev), dtype=torch.float32)
