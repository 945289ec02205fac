"""D-Fusion and the other attention controls of appendix B, implemented directly from their formulas.

Each step takes three U-Net calls, for the reference, the base and the target, with explicit attention matrices. It
shares no code with `dfusion`. Tests compare `dfusion` with it, and the benchmark measures against it.
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
    """The state that processors read and write during one U-Net call.

    mode     "record" stores queries, keys and values of fused layers and maps of mask layers; "inject" fuses; "off"
             does neither
    control  how "inject" fuses, a name of `controlled`
    parts    query, key and value of each fused layer, by processor name
    maps     attention matrices of mask layers, (rows, H, L, N)
    mask     (h_m, w_m) of 0.0 and 1.0
    """

    mode: str = "off"
    control: str = "masked_kv"
    parts: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    maps: list[torch.Tensor] = field(default_factory=list)
    mask: torch.Tensor | None = None


class NaiveProcessor:
    """softmax(Q K^T / sqrt(D)) V with every matrix in memory."""

    def __init__(self, name: str, tape: Tape, fused: bool, gives_mask: bool, aspect: float) -> None:
        self.name = name
        self.tape = tape
        self.fused = fused
        self.gives_mask = gives_mask
        self.aspect = aspect

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        own = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        if self.fused and self.tape.mode == "record":
            self.tape.parts[self.name] = own

        # attention, head by head
        width = own[0].shape[-1] // attn.heads
        out = torch.zeros_like(own[0])
        matrices = []
        for head in range(attn.heads):
            part = slice(head * width, (head + 1) * width)
            q, k, v = (x[..., part] for x in own)
            if self.fused and self.tape.mode == "inject":
                reference = [x[..., part] for x in self.tape.parts[self.name]]
                mask = None if encoder_hidden_states is not None else self._mask(q.shape[1])
                out[..., part] = controlled(self.tape.control, (q, k, v), reference, mask)
                continue
            matrix = attention(q, k)
            if self.gives_mask:
                matrices.append(matrix)
            out[..., part] = matrix @ v

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


def attention(q: torch.Tensor, k: torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) of one head, (rows, L, M), over the keys where `among` (1, M) is 1; 0 without any."""
    scores = torch.einsum("rld,rmd->rlm", q / math.sqrt(q.shape[-1]), k)
    if among is None:
        return torch.softmax(scores, -1)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * among
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)


def controlled(
    control: str, own: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor:
    """One head's output in a fused layer, (rows, L, D).

    `own` and `reference` are query, key and value of the target and of the reference. `mask` (1, L, 1) has 0.0 and 1.0;
    it is None in cross-attention.
    """
    q, k, v = own
    q_ref, k_ref, v_ref = reference
    if mask is None:
        return attention(q_ref, k_ref) @ v if "cross" in control else attention(q, k) @ v

    inside = mask[..., 0]
    outside = 1 - mask[..., 0]
    if control == "masked_kv":
        return attention(q, mask * k_ref + (1 - mask) * k) @ (mask * v_ref + (1 - mask) * v)
    if control in ("kv", "kv_and_cross_attention_maps"):
        return attention(q, k_ref) @ v_ref
    if control in ("self_attention_maps", "self_and_cross_attention_maps"):
        return attention(q_ref, k_ref) @ v
    if control == "qkv_and_cross_attention_maps":
        return attention(q_ref, k_ref) @ v_ref
    if control == "cross_attention_maps":
        return attention(q, k) @ v
    if control == "masactrl_maps":
        return (mask * attention(q, k_ref, inside) + (1 - mask) * attention(q, k, outside)) @ v
    if control == "masactrl_features":
        return mask * (attention(q, k_ref) @ v_ref) + (1 - mask) * (attention(q, k) @ v)
    if control == "masactrl":
        return mask * (attention(q, k_ref, inside) @ v_ref) + (1 - mask) * (attention(q, k, outside) @ v)
    raise ValueError(control)


def fused_names(unet: UNet2DConditionModel) -> list[str]:
    """Attention of the middle and of every up block."""
    return [n for n in unet.attn_processors if n.startswith(("mid_block", "up_blocks"))]


def mask_names(unet: UNet2DConditionModel, source: str) -> list[str]:
    """Cross-attention of the first up block that has any. "resolution" adds the down block of that resolution."""
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
    control: str = "masked_kv",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The states (T+1, C, h, w) of reference, base and target of one pair.

    `prompt` is (1, N, C), `seeds` are those of reference and base, and `items` are lists of token indices after BOS.
    """
    # 1. processors
    tape = Tape(control=control)
    before = unet.attn_processors
    fused = fused_names(unet)
    giving = mask_names(unet, mask_source)
    unet.set_attn_processor({n: NaiveProcessor(n, tape, n in fused, n in giving, size[0] / size[1]) for n in before})

    # 2. x_T
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    shape = (unet.config.in_channels, *size)
    x_reference, x_base = (torch.randn(shape, generator=g)[None].to(unet.device) for g in generators)
    x_target = x_base.clone()
    states = [[x_reference], [x_base], [x_target]]

    # 3. the steps of reference, base and target
    stride = scheduler.config.num_train_timesteps // steps
    for i in range(steps):
        t = (steps - 1 - i) * stride + scheduler.config.steps_offset
        z_reference, z_base = (torch.randn(shape, generator=g)[None].to(unet.device) for g in generators)
        fusing = first_step <= i <= last_step

        tape.mode = "record" if fusing else "off"
        tape.maps = []
        noise = guided(unet, x_reference, t, prompt, negative, guidance)
        x_reference = step(scheduler, noise, x_reference, t, stride, eta, z_reference)
        if fusing:
            tape.mask = make_mask(tape.maps, items, thresholds, size, merge).to(unet.device, unet.dtype)

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
    """uncond + g (cond - uncond), float32."""
    embeds = [prompt] if guidance == 1 else [negative, prompt]
    rows = torch.cat([x] * len(embeds)).to(unet.dtype)
    context = torch.cat(embeds).to(unet.device, unet.dtype)
    noise = unet(rows, t, encoder_hidden_states=context).sample.float().chunk(len(embeds))
    return noise[0] if guidance == 1 else noise[0] + guidance * (noise[1] - noise[0])


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
    mean = torch.stack([m[-1].float() for m in maps]).mean((0, 1)).cpu()
    height = round(math.sqrt(mean.shape[0] * size[0] / size[1]))
    mask = torch.zeros(mean.shape[0], dtype=torch.bool)

    for tokens, threshold in zip(items, thresholds, strict=True):
        item_mask = torch.stack([mean[:, j + 1] for j in tokens]).mean(0) >= threshold
        mask = (mask | item_mask) if merge == "or" else (mask != item_mask)
    return mask.reshape(height, -1).float()
