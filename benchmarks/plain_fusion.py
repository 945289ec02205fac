"""D-Fusion written plainly from its formulas: three U-Net calls a step, explicit attention matrices.

It shares no code with `dfusion` and serves two ends: what `dfusion` computes is compared with it, and the benchmark
measures against it. Every step runs the U-Net for the reference, for the base and for the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel


@dataclass
class Tape:
    """What processors read and write during one U-Net call.

    mode     "record" keeps keys and values of fused layers and maps of mask layers; "inject" fuses; "off" neither
    keys, values  of each fused layer, by processor name
    maps     attention matrices of mask layers, (rows, H, L, N)
    mask     (h_m, w_m) of 0.0 and 1.0
    """

    mode: str = "off"
    keys: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    maps: list[torch.Tensor] = field(default_factory=list)
    mask: torch.Tensor | None = None


class NaiveProcessor:
    """softmax(Q K^T / sqrt(D)) V with every matrix in memory."""

    def __init__(self, name: str, tape: Tape, fused: bool, gives_mask: bool, aspect: float) -> None:
        self.name, self.tape, self.fused, self.gives_mask, self.aspect = name, tape, fused, gives_mask, aspect

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        if self.fused and self.tape.mode == "record":
            self.tape.keys[self.name], self.tape.values[self.name] = k, v
        if self.fused and self.tape.mode == "inject":
            mask = self._mask(k.shape[1])
            k = mask * self.tape.keys[self.name] + (1 - mask) * k
            v = mask * self.tape.values[self.name] + (1 - mask) * v
        channels = q.shape[-1]
        width = channels // attn.heads
        out = torch.zeros_like(q)
        matrices = []
        for head in range(attn.heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.einsum("rld,rmd->rlm", q[..., part], k[..., part]) / math.sqrt(width)
            matrix = torch.softmax(scores, -1)
            if self.gives_mask:
                matrices.append(matrix)
            out[..., part] = torch.einsum("rlm,rmd->rld", matrix, v[..., part])
        if self.gives_mask and self.tape.mode == "record":
            self.tape.maps.append(torch.stack(matrices, 1))
        return attn.to_out[0](out)

    def _mask(self, pixels: int) -> torch.Tensor:
        """(1, L, 1): the nearest pixel of the mask for each pixel of this layer."""
        source = self.tape.mask
        assert source is not None
        height = round(math.sqrt(pixels * self.aspect))
        width = pixels // height
        rows = [y * source.shape[0] // height for y in range(height)]
        columns = [x * source.shape[1] // width for x in range(width)]
        return source[rows][:, columns].reshape(1, pixels, 1)


def fused_names(unet: UNet2DConditionModel) -> list[str]:
    """Self-attention of the middle and of every up block."""
    return [n for n in unet.attn_processors if n.startswith(("mid_block", "up_blocks")) and ".attn1." in n]


def mask_names(unet: UNet2DConditionModel, source: str) -> list[str]:
    """Cross-attention of the first up block that has any; "resolution": and of the down block of that resolution."""
    cross = [n for n in unet.attn_processors if ".attn2." in n]
    up = min(int(n.split(".")[1]) for n in cross if n.startswith("up_blocks"))
    prefixes = [f"up_blocks.{up}."]
    if source == "resolution":
        prefixes.append(f"down_blocks.{len(unet.down_blocks) - 1 - up}.")
        prefixes += ["mid_block."] if up == 0 else []
    return [n for n in cross if n.startswith(tuple(prefixes))]


@torch.no_grad()
def plain_fuse(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    *,
    prompt: torch.Tensor,
    negative: torch.Tensor,
    seeds: tuple[int, int],
    items: Sequence[Sequence[int]],
    thresholds: Sequence[float],
    size: tuple[int, int],
    steps: int = 20,
    guidance: float = 5.0,
    eta: float = 1.0,
    first_step: int = 2,
    last_step: int = 19,
    merge: str = "xor",
    mask_source: str = "first_up",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pair: the states (T+1, C, h, w) of reference, base and target, for prompt (1, N, C) and seeds (reference,
    base). `items` are lists of token indices after BOS."""
    tape = Tape()
    before = unet.attn_processors
    fused, giving = fused_names(unet), mask_names(unet, mask_source)
    unet.set_attn_processor({n: NaiveProcessor(n, tape, n in fused, n in giving, size[0] / size[1]) for n in before})
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    shape = (unet.config.in_channels, *size)
    x_reference, x_base = (torch.randn(shape, generator=g)[None] for g in generators)
    x_target = x_base.clone()
    states = [[x_reference], [x_base], [x_target]]
    stride = scheduler.config.num_train_timesteps // steps
    for i in range(steps):
        t = (steps - 1 - i) * stride + scheduler.config.steps_offset
        z_reference, z_base = (torch.randn(shape, generator=g)[None] for g in generators)
        fusing = first_step <= i <= last_step
        tape.mode, tape.maps = "record" if fusing else "off", []
        noise = guided(unet, x_reference, t, prompt, negative, guidance)
        x_reference = step(scheduler, noise, x_reference, t, stride, eta, z_reference)
        if fusing:
            tape.mask = make_mask(tape.maps, items, thresholds, size, merge)
        tape.mode = "off"
        noise = guided(unet, x_base, t, prompt, negative, guidance)
        x_base = step(scheduler, noise, x_base, t, stride, eta, z_base)
        tape.mode = "inject" if fusing else "off"
        noise = guided(unet, x_target, t, prompt, negative, guidance)
        x_target = step(scheduler, noise, x_target, t, stride, eta, z_base)
        for path, x in zip(states, (x_reference, x_base, x_target), strict=True):
            path.append(x)
    unet.set_attn_processor(before)
    return tuple(torch.cat(path) for path in states)


def guided(
    unet: UNet2DConditionModel, x: torch.Tensor, t: int, prompt: torch.Tensor, negative: torch.Tensor, guidance: float
) -> torch.Tensor:
    """uncond + g (cond - uncond)."""
    if guidance == 1:
        return unet(x, t, encoder_hidden_states=prompt).sample
    uncond, cond = unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([negative, prompt])).sample.chunk(2)
    return uncond + guidance * (cond - uncond)


def step(
    scheduler: DDIMScheduler, noise: torch.Tensor, x: torch.Tensor, t: int, stride: int, eta: float, z: torch.Tensor
) -> torch.Tensor:
    """x_prev of Eq. 1 with plain numbers, epsilon prediction."""
    alpha = float(scheduler.alphas_cumprod[t])
    previous = float(scheduler.alphas_cumprod[t - stride]) if t >= stride else float(scheduler.final_alpha_cumprod)
    sigma = eta * math.sqrt((1 - previous) / (1 - alpha)) * math.sqrt(1 - alpha / previous)
    clean = (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
    return math.sqrt(previous) * clean + math.sqrt(max(0.0, 1 - previous - sigma**2)) * noise + sigma * z


def make_mask(
    maps: Sequence[torch.Tensor],
    items: Sequence[Sequence[int]],
    thresholds: Sequence[float],
    size: tuple[int, int],
    merge: str,
) -> torch.Tensor:
    """(h_m, w_m) of 0.0 and 1.0 from attention matrices (rows, H, L, N), the conditional one last (Eq. 4)."""
    mean = torch.stack([m[-1] for m in maps]).mean((0, 1))
    height = round(math.sqrt(mean.shape[0] * size[0] / size[1]))
    mask = torch.zeros(mean.shape[0], dtype=torch.bool)
    for tokens, threshold in zip(items, thresholds, strict=True):
        one = torch.stack([mean[:, j + 1] for j in tokens]).mean(0) >= threshold
        mask = (mask | one) if merge == "or" else (mask != one)
    return mask.reshape(height, -1).float()
