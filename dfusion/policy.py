"""Eq. 1 replayed: log-densities of stored transitions under the current network, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dfusion._diffusers import DDIMScheduler, UNet2DConditionModel
from dfusion.ddim import Schedule, log_prob, mean
from dfusion.errors import ScheduleError, ShapeMismatchError
from dfusion.guidance import check_embeds, placement, predict
from dfusion.types import Prompts, Trajectory


def transition_mean(
    unet: UNet2DConditionModel,
    schedule: Schedule,
    x_t: torch.Tensor,
    step_indices: torch.Tensor,
    prompt_embeds: Prompts,
    negative_prompt_embeds: Prompts | None,
    guidance_scale: float,
) -> torch.Tensor:
    """mu of Eq. 1 for rows of mixed steps, (B, C, h, w) float32 on the U-Net's device.

    Gradients flow into the U-Net unless the caller disables them.

    Args:
        unet: The denoiser.
        schedule: The sampler's schedule.
        x_t: (B, C, h, w) float32.
        step_indices: (B,) int64.
        prompt_embeds: (B, N, C), or the Conditioning of B rows.
        negative_prompt_embeds: The same, or a single row.
        guidance_scale: Of classifier-free guidance.

    Raises:
        ScheduleError: A row's step has no noise.
        ShapeMismatchError: Shapes that do not fit.
    """
    if step_indices.shape != x_t.shape[:1]:
        raise ShapeMismatchError("step_indices", tuple(x_t.shape[:1]), tuple(step_indices.shape))
    schedule.require_trainable(step_indices)
    negative = check_embeds(prompt_embeds, negative_prompt_embeds, len(x_t), guidance_scale)

    x_t = x_t.to(placement(unet)[0])
    timesteps = schedule.timesteps[step_indices.cpu()]
    noise_pred = predict(unet, x_t, timesteps, prompt_embeds, negative, guidance_scale)
    return mean(schedule, step_indices, x_t, noise_pred)


def transition_log_prob(
    unet: UNet2DConditionModel,
    schedule: Schedule,
    x_t: torch.Tensor,
    x_prev: torch.Tensor,
    step_indices: torch.Tensor,
    prompt_embeds: Prompts,
    negative_prompt_embeds: Prompts | None,
    guidance_scale: float,
) -> torch.Tensor:
    """log p(x_prev | x_t) of Eq. 1 for rows of mixed steps, (B,) float32 on the U-Net's device, mean over C*h*w.

    x_prev is (B, C, h, w) float32. The other arguments and the errors are those of `transition_mean`.
    """
    if x_t.shape != x_prev.shape:
        raise ShapeMismatchError("x_prev", tuple(x_t.shape), tuple(x_prev.shape))
    mu = transition_mean(unet, schedule, x_t, step_indices, prompt_embeds, negative_prompt_embeds, guidance_scale)
    return log_prob(x_prev.to(mu.device), mu, schedule.sigmas[step_indices.cpu()].to(mu.device))


def step_weights(schedule: Schedule) -> torch.Tensor:
    """(d mu / d prediction)^2 / (2 sigma^2) of each step, (T,) float32; 0 for steps without noise.

    It measures how strongly a step's log p depends on the U-Net's prediction. Of Stable Diffusion's 20 steps,
    step_index 18 (timestep 51) has 14.7, and every other step less than 1.
    """
    steps = torch.arange(len(schedule))
    zero = torch.zeros(len(schedule), 1, 1, 1)
    unclipped = replace(schedule, clip_range=None)  # without clipping, mu is linear in the prediction
    slope = mean(unclipped, steps, zero, zero + 1).flatten()
    variance = schedule.sigmas.square()
    return torch.where(variance > 0, slope.square() / (2 * variance), 0.0)


def log_probs(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    trajectory: Trajectory,
    prompt_embeds: Prompts,
    negative_prompt_embeds: Prompts | None,
    step_indices: Sequence[int] | None = None,
) -> torch.Tensor:
    """log p of the trajectory's stored transitions under the plain `unet`, (B, S) for the S requested steps.

    Steps, guidance and eta are those of `trajectory.config`. With `step_indices` None, all steps with noise are
    evaluated. Directly after sampling in float32, exp(replayed - recorded) is 1 to 1e-5; decision 016 covers other
    precisions. Raises as `transition_log_prob` does.
    """
    schedule = Schedule.from_scheduler(scheduler, trajectory.config.num_steps, trajectory.config.eta)
    if not torch.equal(schedule.timesteps, trajectory.timesteps):
        raise ScheduleError(
            f"scheduler: expected the trajectory's timesteps {trajectory.timesteps.tolist()}, got "
            f"{schedule.timesteps.tolist()}"
        )

    steps = schedule.trainable_steps if step_indices is None else tuple(step_indices)
    columns = [
        transition_log_prob(
            unet,
            schedule,
            trajectory.latents[:, i],
            trajectory.latents[:, i + 1],
            torch.full((len(trajectory),), i),
            prompt_embeds,
            negative_prompt_embeds,
            trajectory.config.guidance_scale,
        )
        for i in steps
    ]
    return torch.stack(columns, 1)
