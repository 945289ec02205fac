"""DDIM inversion: estimate the deterministic trajectory that ends at given clean latents (section 4.4).

One step of the inversion is Eq. 1 with eta = 0 solved for x_t:

    x_t = sqrt(alpha_t) * x0(x_prev, e) + sqrt(1 - alpha_t) * e,    e = eps(x_prev, t) in place of eps(x_t, t)

It is a denoising step from the noise level of x_prev to that of x_t. Both levels come from the schedule that is
inverted, so they are correct for every spacing and number of steps. diffusers' DDIMInverseScheduler assumes the level
of `timestep - num_train_timesteps // num_steps` for x_prev and supports two of the three spacings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dfusion._diffusers import DDIMScheduler, UNet2DConditionModel
from dfusion.config import SamplingConfig
from dfusion.ddim import Schedule, mean, recorded_log_prob
from dfusion.errors import NonFiniteError, ShapeMismatchError
from dfusion.guidance import check_negative, placement, predict
from dfusion.sampling import OnStep
from dfusion.types import Prompts, Trajectory


@dataclass(frozen=True)
class Inversion:
    """Inverted trajectories, and the error of the assumption behind them.

    trajectory    B trajectories of T steps that end with the given latents; [:, 0] is the estimate of x_T. Their
                  log-probs are those of the plain policy with the noise of `trajectory.config` (Eq. 1)
    noise_errors  (B, T) float32: ||e - eps|| / ||eps|| at each step, of the estimate e = eps(x_prev, t) that the step
                  used and the network's prediction eps = eps(x_t, t) at the resulting state
    """

    trajectory: Trajectory
    noise_errors: torch.Tensor


@dataclass(frozen=True)
class InversionReport:
    """Inverted trajectories against the true ones of the same latents. All errors are ||got - true|| / ||true||.

    inverted               the inverted trajectories
    denoised               (B, C, h, w), the clean latents from denoising their x_T
    noise_errors           (B, T), see Inversion
    state_errors           (B, T+1), inverted against true states; [:, 0] is x_T, the noise; [:, T] is 0
    reconstruction_errors  (B,), `denoised` against the true clean latents
    """

    inverted: Trajectory
    denoised: torch.Tensor
    noise_errors: torch.Tensor
    state_errors: torch.Tensor
    reconstruction_errors: torch.Tensor


@torch.no_grad()
def invert(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    prompt_embeds: Prompts,
    negative_prompt_embeds: Prompts | None,
    *,
    seeds: Sequence[int],
    config: SamplingConfig = SamplingConfig(),
    on_step: OnStep | None = None,
) -> Inversion:
    """Invert clean latents by DDIM, with the guidance and the steps of `config` (section 4.4).

    A step takes two U-Net calls. The second one gives the log-prob and `noise_errors`.

    Args:
        unet: The denoiser.
        scheduler: The model's DDIM scheduler. It is not modified.
        latents: (B, C, h, w), clean.
        prompt_embeds: (B, N, C), or the Conditioning of B rows.
        negative_prompt_embeds: The same, or a single row for all samples. Not needed at guidance_scale 1.
        seeds: The seeds to record with the B trajectories. The inversion itself uses no randomness.
        config: Number of steps, guidance scale, and the eta of the log-probs.
        on_step: Called as on_step(step, num_steps) before each step, from the last step_index down. It may raise.

    Returns:
        The inverted trajectories; their tensors are float32 on the CPU.

    Raises:
        ShapeMismatchError, InvalidInputError, ScheduleError: Arguments that do not fit the model or each other.
        NonFiniteError: The latents became NaN or infinite. The message names the step.
    """
    if latents.ndim != 4 or len(latents) != len(seeds):
        raise ShapeMismatchError("latents", f"({len(seeds)}, C, h, w)", tuple(latents.shape))
    negative = check_negative(prompt_embeds, negative_prompt_embeds, len(latents), config)
    embeds = (prompt_embeds, negative)
    schedule = Schedule.from_scheduler(scheduler, config.num_steps, config.eta)
    steps = len(schedule)
    x_t = _finite(latents.to(placement(unet)[0], torch.float32), "in the input")
    backward = replace(
        schedule, alphas=schedule.prev_alphas, prev_alphas=schedule.alphas, sigmas=torch.zeros_like(schedule.sigmas)
    )

    states = [x_t]
    log_probs = []
    errors = []
    for i in reversed(range(steps)):
        if on_step is not None:
            on_step(steps - 1 - i, steps)

        # 1. step from x_prev back to x_t
        x_prev = x_t
        timestep = schedule.timesteps[i]
        estimate = predict(unet, x_prev, timestep, *embeds, config.guidance_scale)
        x_t = _finite(mean(backward, i, x_prev, estimate), f"at step_index {i}")

        # 2. compare with the prediction at x_t
        noise_pred = predict(unet, x_t, timestep, *embeds, config.guidance_scale)
        states.append(x_t)
        log_probs.append(recorded_log_prob(schedule, i, x_prev, mean(schedule, i, x_t, noise_pred)))
        errors.append(_relative_errors(estimate, noise_pred))

    trajectory = Trajectory(
        latents=torch.stack(states[::-1], 1).cpu(),
        timesteps=schedule.timesteps,
        log_probs=torch.stack(log_probs[::-1], 1).cpu(),
        seeds=tuple(seeds),
        config=config,
    )
    return Inversion(trajectory, torch.stack(errors[::-1], 1).cpu())


@torch.no_grad()
def denoise(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    x_t: torch.Tensor,
    prompt_embeds: Prompts,
    negative_prompt_embeds: Prompts | None,
    *,
    config: SamplingConfig = SamplingConfig(),
) -> torch.Tensor:
    """Clean latents (B, C, h, w) float32 on the CPU from x_T of the same shape: Eq. 1 with eta = 0 (not config's).

    Raises ShapeMismatchError, InvalidInputError and ScheduleError, and NonFiniteError naming the step.
    """
    negative = check_negative(prompt_embeds, negative_prompt_embeds, len(x_t), config)
    embeds = (prompt_embeds, negative)
    schedule = Schedule.from_scheduler(scheduler, config.num_steps, eta=0.0)

    x_t = _finite(x_t.to(placement(unet)[0], torch.float32), "in the input")
    for i in range(len(schedule)):
        noise_pred = predict(unet, x_t, schedule.timesteps[i], *embeds, config.guidance_scale)
        x_t = _finite(mean(schedule, i, x_t, noise_pred), f"at step_index {i}")
    return x_t.cpu()


def report_inversion(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    trajectory: Trajectory,
    prompt_embeds: Prompts,
    negative_prompt_embeds: Prompts | None,
) -> InversionReport:
    """Measure how far DDIM inversion of the clean latents of `trajectory` is from that trajectory.

    The paper finds (section 4.4) that the noise estimates are wrong, and that denoising from them does not reproduce
    the image. Raises as `invert` does.
    """
    embeds = (prompt_embeds, negative_prompt_embeds)
    inversion = invert(unet, scheduler, trajectory.final, *embeds, seeds=trajectory.seeds, config=trajectory.config)
    inverted = inversion.trajectory
    denoised = denoise(unet, scheduler, inverted.latents[:, 0], *embeds, config=trajectory.config)
    return InversionReport(
        inverted=inverted,
        denoised=denoised,
        noise_errors=inversion.noise_errors,
        state_errors=_relative_errors(inverted.latents, trajectory.latents, dims=2),
        reconstruction_errors=_relative_errors(denoised, trajectory.final),
    )


def _relative_errors(got: torch.Tensor, true: torch.Tensor, dims: int = 1) -> torch.Tensor:
    """||got - true|| / ||true|| over all but the first `dims` dimensions."""
    errors: torch.Tensor = (got - true).flatten(dims).norm(dim=-1) / true.flatten(dims).norm(dim=-1)
    return errors


def _finite(latents: torch.Tensor, which: str) -> torch.Tensor:
    if not bool(torch.isfinite(latents).all()):
        raise NonFiniteError(f"latents {which}: expected finite numbers, got NaN or infinity")
    return latents
