"""The U-Net's prediction with classifier-free guidance, shared by sampling, fusion and training."""

from __future__ import annotations

import torch

from dfusion._diffusers import UNet2DConditionModel
from dfusion.attention.processors import AttentionContext
from dfusion.config import SamplingConfig
from dfusion.errors import InvalidInputError, ShapeMismatchError, shortened
from dfusion.types import Conditioning, Prompts


def check_negative(
    prompt_embeds: Prompts, negative_prompt_embeds: Prompts | None, batch: int, config: SamplingConfig
) -> Prompts | None:
    """`check_embeds` with the guidance scale of `config`, whose negative prompt must be the one that was encoded.

    Raises:
        ShapeMismatchError, InvalidInputError: As `check_embeds`, and for embeddings of another negative prompt.
    """
    texts = negative_prompt_embeds.texts if isinstance(negative_prompt_embeds, Conditioning) else None
    if texts is not None and config.guidance_scale != 1 and set(texts) != {config.negative_prompt}:
        raise InvalidInputError(
            f"negative_prompt_embeds: expected embeddings of config.negative_prompt, {config.negative_prompt!r}, got "
            f"embeddings of {shortened(list(texts))}"
        )
    return check_embeds(prompt_embeds, negative_prompt_embeds, batch, config.guidance_scale)


def check_embeds(
    prompt_embeds: Prompts, negative_prompt_embeds: Prompts | None, batch: int, guidance_scale: float
) -> Prompts | None:
    """The negative embeddings with B rows; a single row is repeated. None if guidance_scale is 1 (one pass).

    The type is that of the argument: a Conditioning, or its plain tensor (B, N, C).

    Raises:
        ShapeMismatchError: Shapes that do not fit.
        InvalidInputError: Guidance without negative embeddings.
    """
    shapes = _shapes(prompt_embeds)
    if len(prompt_embeds) != batch:
        raise ShapeMismatchError("prompt_embeds", f"({batch}, N, C)", shapes[0])
    if guidance_scale == 1:
        return None

    if negative_prompt_embeds is None:
        raise InvalidInputError(f"guidance_scale {guidance_scale} needs negative_prompt_embeds, got None")
    got = _shapes(negative_prompt_embeds)
    same_model = len(got) == len(shapes) and all(a[1:] == b[1:] for a, b in zip(got, shapes, strict=True))
    if len(negative_prompt_embeds) not in (1, batch) or not same_model:
        raise ShapeMismatchError("negative_prompt_embeds", shapes, got)
    return negative_prompt_embeds.expand(batch, -1, -1)


def _shapes(value: Prompts) -> list[tuple[int, ...]]:
    """The shapes of the parts of a conditioning, the embeddings first."""
    return [tuple(part.shape) for part in Conditioning.of(value).tensors]


def placement(unet: UNet2DConditionModel) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the U-Net's first parameter.

    `unet.device` and `unet.dtype` search all modules for diffusers' offloading and casting hooks, which takes
    milliseconds each. U-Nets with such hooks are not supported here.
    """
    first = next(unet.parameters())
    return first.device, first.dtype


def predict(
    unet: UNet2DConditionModel,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: Prompts,
    negative_prompt_embeds: Prompts | None,
    guidance_scale: float,
    context: AttentionContext | None = None,
) -> torch.Tensor:
    """uncond + g * (cond - uncond), (B, C, h, w) float32, for x_t (B, C, h, w) and timesteps () or (B,).

    One U-Net call on 2B rows, the unconditional half first. Without `negative_prompt_embeds` it has B rows. The U-Net
    computes in its own dtype; guidance is float32. `context` is passed to the attention processors, which must be
    installed. Raises ShapeMismatchError or InvalidInputError for a conditioning that does not fit this U-Net.
    """
    # 1. the rows of both guidance halves
    conditioning = Conditioning.of(prompt_embeds)
    halves = 1 if negative_prompt_embeds is None else 2
    if negative_prompt_embeds is not None:
        conditioning = Conditioning.cat([Conditioning.of(negative_prompt_embeds), conditioning])

    # 2. the U-Net call
    device, dtype = placement(unet)
    output = unet(
        torch.cat([x_t] * halves).to(device, dtype),
        timesteps.to(device).expand(len(x_t)).repeat(halves),
        encoder_hidden_states=_checked(unet, conditioning).embeds.to(device, dtype),
        added_cond_kwargs=_added(conditioning, device, dtype),
        cross_attention_kwargs=None if context is None else {"fusion": context},
        return_dict=False,
    )[0].float()

    # 3. guidance
    if halves == 1:
        return output  # type: ignore[no-any-return]
    unconditional, conditional = output.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)  # type: ignore[no-any-return]


def _checked(unet: UNet2DConditionModel, conditioning: Conditioning) -> Conditioning:
    """`conditioning`, after a check that it fits `unet`: with pooled embeddings and time ids for SDXL only."""
    wants_added = unet.config.addition_embed_type == "text_time"
    if wants_added != (conditioning.pooled is not None):
        kinds = {
            True: "pooled embeddings and time ids (SDXL)",
            False: "neither pooled embeddings nor time ids (SD 1.x, 2.x)",
        }
        raise InvalidInputError(f"prompt_embeds: expected {kinds[wants_added]}, got {kinds[not wants_added]}")
    width = unet.config.cross_attention_dim
    if isinstance(width, int) and conditioning.embeds.shape[-1] != width:
        raise ShapeMismatchError("prompt_embeds", f"(B, N, {width})", tuple(conditioning.embeds.shape))
    return conditioning


def _added(conditioning: Conditioning, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """SDXL's added conditions. Time ids stay float32, since bfloat16 cannot represent every size."""
    if conditioning.pooled is None or conditioning.time_ids is None:
        return None
    return {
        "text_embeds": conditioning.pooled.to(device, dtype),
        "time_ids": conditioning.time_ids.to(device, torch.float32),
    }
