"""D-Fusion and the other attention controls of appendix B, implemented directly from their formulas.

As in the authors' released code, each step takes three U-Net calls, for the references, the bases and the targets of
some pairs, with an explicit attention matrix for each head, all heads in one batch (diffusers' `AttnProcessor`). It
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
    unguided whether a call has one row a sample, without classifier-free guidance
    parts    query, key and value of each fused layer, (rows x H, L, D), by processor name
    maps     attention matrices of mask layers, (rows, H, L, N)
    mask     (P, h_m, w_m) of 0.0 and 1.0 for P pairs
    """

    mode: str = "off"
    control: str = "masked_kv"
    unguided: bool = False
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
        own = (
            heads_as_rows(attn.to_q(hidden_states), attn.heads),
            heads_as_rows(attn.to_k(context), attn.heads),
            heads_as_rows(attn.to_v(context), attn.heads),
        )
        if self.fused and self.tape.mode == "record":
            self.tape.parts[self.name] = own

        if self.fused and self.tape.mode == "inject":
            mask = None if encoder_hidden_states is not None else self._mask(len(own[0]), own[0].shape[1])
            out = controlled(self.tape.control, own, self.tape.parts[self.name], mask)
        else:
            matrices = attention(own[0], own[1])
            if self.gives_mask and self.tape.mode == "record":
                self.tape.maps.append(matrices.unflatten(0, (-1, attn.heads)))
            out = torch.bmm(matrices, own[2])
        return attn.to_out[0](rows_as_heads(out, attn.heads))  # type: ignore[no-any-return]

    def _mask(self, rows: int, pixels: int) -> torch.Tensor:
        """(rows, L, 1): for each row of a pair's head, the nearest pixel of the pair's mask for each pixel."""
        source = self.tape.mask
        assert source is not None
        height = round(math.sqrt(pixels * self.aspect))
        width = pixels // height
        y = torch.tensor([i * source.shape[1] // height for i in range(height)], device=source.device)
        x = torch.tensor([i * source.shape[2] // width for i in range(width)], device=source.device)
        masks = source[:, y][:, :, x].flatten(1)

        # the rows are (half of guidance, pair, head)
        halves = 1 if self.tape.unguided else 2
        heads = rows // (halves * len(masks))
        return masks.repeat_interleave(heads, 0).repeat(halves, 1)[..., None]


def heads_as_rows(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(rows x H, L, D) from (rows, L, H x D)."""
    parts: torch.Tensor = x.unflatten(-1, (heads, -1))
    return parts.transpose(1, 2).flatten(0, 1)


def rows_as_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(rows, L, H x D) from (rows x H, L, D)."""
    parts: torch.Tensor = x.unflatten(0, (-1, heads))
    return parts.transpose(1, 2).flatten(2)


def attention(q: torch.Tensor, k: torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)), (rows, L, M), over the keys where `among` (rows, M) is 1; 0 without any."""
    space = torch.empty(len(q), q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(space, q, k.transpose(-1, -2), beta=0, alpha=1 / math.sqrt(q.shape[-1]))
    if among is None:
        return torch.softmax(scores, -1)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * among[:, None]
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)


def controlled(
    control: str, own: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor:
    """The output of a fused layer, (rows, L, D), where each head is a row.

    `own` and `reference` are query, key and value of the target and of the reference. `mask` (rows, L, 1) has 0.0 and
    1.0; it is None in cross-attention.
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
def plain_sample(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    *,
    prompt: torch.Tensor,
    negative: torch.Tensor,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int = 20,
    guidance: float = 5.0,
    eta: float = 1.0,
) -> torch.Tensor:
    """The states (B, T+1, C, h, w) of B samples of one prompt (1, N, C)."""
    before = install(unet, Tape(unguided=guidance == 1), size)
    noise = Noise(unet, seeds, size)
    states = [noise.next()]
    for t, stride in timesteps(scheduler, steps):
        predicted = guided(unet, states[-1], t, prompt, negative, guidance)
        states.append(step(scheduler, predicted, states[-1], t, stride, eta, noise.next()))

    unet.set_attn_processor(before)
    return torch.stack(states, 1)


@torch.no_grad()
def plain_fuse(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    *,
    prompt: torch.Tensor,
    negative: torch.Tensor,
    seeds: Sequence[tuple[int, int]],
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
    """The states (P, T+1, C, h, w) of references, bases and targets of P pairs of one prompt.

    `prompt` is (1, N, C), `seeds` are those of reference and base, and `items` are lists of token indices after BOS.
    """
    # 1. processors
    tape = Tape(control=control, unguided=guidance == 1)
    before = install(unet, tape, size, mask_source)

    # 2. x_T
    noise_of_reference = Noise(unet, [reference for reference, _ in seeds], size)
    noise_of_base = Noise(unet, [base for _, base in seeds], size)
    x_reference = noise_of_reference.next()
    x_base = noise_of_base.next()
    x_target = x_base.clone()
    states = [[x_reference], [x_base], [x_target]]

    # 3. the steps of references, bases and targets
    for i, (t, stride) in enumerate(timesteps(scheduler, steps)):
        z_reference = noise_of_reference.next()
        z_base = noise_of_base.next()
        fusing = first_step <= i <= last_step

        tape.mode = "record" if fusing else "off"
        tape.maps = []
        noise = guided(unet, x_reference, t, prompt, negative, guidance)
        x_reference = step(scheduler, noise, x_reference, t, stride, eta, z_reference)
        if fusing:
            tape.mask = make_mask(tape.maps, len(seeds), items, thresholds, size, merge).to(unet.device, unet.dtype)

        tape.mode = "off"
        noise = guided(unet, x_base, t, prompt, negative, guidance)
        x_base = step(scheduler, noise, x_base, t, stride, eta, z_base)

        tape.mode = "inject" if fusing else "off"
        noise = guided(unet, x_target, t, prompt, negative, guidance)
        x_target = step(scheduler, noise, x_target, t, stride, eta, z_base)

        for path, x in zip(states, (x_reference, x_base, x_target), strict=True):
            path.append(x)

    unet.set_attn_processor(before)
    references, bases, targets = (torch.stack(path, 1) for path in states)
    return references, bases, targets


def install(
    unet: UNet2DConditionModel, tape: Tape, size: tuple[int, int], mask_source: str = "first_up"
) -> dict[str, Any]:
    """Install processors for latents of `size`. Returns the previous ones."""
    before: dict[str, Any] = unet.attn_processors
    fused = fused_names(unet)
    giving = mask_names(unet, mask_source)
    aspect = size[0] / size[1]
    unet.set_attn_processor({n: NaiveProcessor(n, tape, n in fused, n in giving, aspect) for n in before})
    return before


class Noise:
    """Standard Gaussian noise of samples, each from a generator with the sample's seed."""

    def __init__(self, unet: UNet2DConditionModel, seeds: Sequence[int], size: tuple[int, int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape = (unet.config.in_channels, *size)
        self._device = unet.device

    def next(self) -> torch.Tensor:
        """(B, C, h, w)."""
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]).to(self._device)


def timesteps(scheduler: DDIMScheduler, steps: int) -> list[tuple[int, int]]:
    """Each step's timestep, and its distance to the next one."""
    stride = scheduler.config.num_train_timesteps // steps
    return [((steps - 1 - i) * stride + scheduler.config.steps_offset, stride) for i in range(steps)]


def guided(
    unet: UNet2DConditionModel, x: torch.Tensor, t: int, prompt: torch.Tensor, negative: torch.Tensor, guidance: float
) -> torch.Tensor:
    """uncond + g (cond - uncond), float32."""
    embeds = [prompt.expand(len(x), -1, -1)]
    if guidance != 1:
        embeds.insert(0, negative.expand(len(x), -1, -1))
    rows = torch.cat([x] * len(embeds)).to(unet.dtype)
    context = torch.cat(embeds).to(unet.device, unet.dtype)
    noise: tuple[torch.Tensor, ...] = unet(rows, t, encoder_hidden_states=context).sample.float().chunk(len(embeds))
    return noise[0] if guidance == 1 else noise[0] + guidance * (noise[1] - noise[0])


def step(
    scheduler: DDIMScheduler, noise: torch.Tensor, x: torch.Tensor, t: int, stride: int, eta: float, z: torch.Tensor
) -> torch.Tensor:
    """x_prev of Eq. 1."""
    mu, sigma = gaussian(scheduler, noise, x, t, stride, eta)
    return mu + sigma * z


def gaussian(
    scheduler: DDIMScheduler, noise: torch.Tensor, x: torch.Tensor, t: int, stride: int, eta: float
) -> tuple[torch.Tensor, float]:
    """mu and sigma of Eq. 1 with plain numbers, epsilon prediction."""
    alpha = float(scheduler.alphas_cumprod[t])
    previous = float(scheduler.alphas_cumprod[t - stride]) if t >= stride else float(scheduler.final_alpha_cumprod)
    sigma = eta * math.sqrt((1 - previous) / (1 - alpha)) * math.sqrt(1 - alpha / previous)
    clean = (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
    return math.sqrt(previous) * clean + math.sqrt(max(0.0, 1 - previous - sigma**2)) * noise, sigma


def make_mask(
    maps: Sequence[torch.Tensor],
    pairs: int,
    items: Sequence[Sequence[int]],
    thresholds: Sequence[float],
    size: tuple[int, int],
    merge: str,
) -> torch.Tensor:
    """(P, h_m, w_m) of 0.0 and 1.0 from attention matrices (rows, H, L, N), the P conditional ones last (Eq. 4)."""
    mean = torch.stack([m[-pairs:].float() for m in maps]).mean((0, 2))
    height = round(math.sqrt(mean.shape[1] * size[0] / size[1]))
    mask = torch.zeros(mean.shape[:2], dtype=torch.bool, device=mean.device)

    for tokens, threshold in zip(items, thresholds, strict=True):
        item_mask = torch.stack([mean[..., j + 1] for j in tokens]).mean(0) >= threshold
        mask = (mask | item_mask) if merge == "or" else (mask != item_mask)
    image: torch.Tensor = mask.unflatten(1, (height, -1))
    return image.float()
