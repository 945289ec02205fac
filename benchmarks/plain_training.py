"""The gradient of Eq. 6 in D3PO's way, implemented directly from its formula.

Each row takes four U-Net calls: the policy and the policy before the update, for each side. The latter is a second
network, and it is evaluated again in every inner epoch. Each row has its own backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.nn import functional

from benchmarks.plain_fusion import gaussian, guided, timesteps


def add_gradients(
    unet: UNet2DConditionModel,
    reference: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    prompt: torch.Tensor,
    negative: torch.Tensor,
    beta: float,
    guidance: float = 5.0,
    eta: float = 1.0,
) -> None:
    """Add the mean gradient of all rows to the adapter's parameters.

    `pairs` are the states (T+1, C, h, w) of the preferred and the rejected side; `prompt` and `negative` are (1, N, C).
    """
    steps = len(pairs[0][0]) - 1
    rows = len(pairs) * steps
    for pair in pairs:
        for i, (t, stride) in enumerate(timesteps(scheduler, steps)):
            log_ratios = []
            for states in pair:
                x = states[i : i + 1].to(unet.device)
                x_prev = states[i + 1 : i + 2].to(unet.device)
                with torch.no_grad():
                    noise = guided(reference, x, t, prompt, negative, guidance)
                    old = log_prob(scheduler, noise, x, x_prev, t, stride, eta)
                noise = guided(unet, x, t, prompt, negative, guidance)
                log_ratios.append(log_prob(scheduler, noise, x, x_prev, t, stride, eta) - old)

            loss = -functional.logsigmoid(beta * (log_ratios[0] - log_ratios[1]))
            (loss / rows).backward()


def log_prob(
    scheduler: DDIMScheduler,
    noise: torch.Tensor,
    x: torch.Tensor,
    x_prev: torch.Tensor,
    t: int,
    stride: int,
    eta: float,
) -> torch.Tensor:
    """log p of Eq. 1, the mean over all elements of one row."""
    mu, sigma = gaussian(scheduler, noise, x, t, stride, eta)
    return (-((x_prev - mu) ** 2) / (2 * sigma**2) - math.log(sigma) - math.log(2 * math.pi) / 2).mean()
