"""The U-Net's prediction with classifier-free guidance, the same way for sampling, fusion and training."""

from __future__ import annotations

import torch

from dfusion import _torchvision_ops  # noqa: F401

# isort: split
from diffusers import UNet2DConditionModel

from dfusion.attention.processors import AttentionContext
from dfusion.errors import InvalidInputError, ShapeMismatchError


def check_embeds(
    prompt_embeds: torch.Tensor, negative_prompt_embeds: torch.Tensor | None, batch: int, guidance_scale: float
) -> torch.Tensor | None:
    """The negative embeddings as (B, N, C), a single one repeated; None where guidance_scale is 1 (one pass).

    Raises ShapeMismatchError where shapes do not fit, InvalidInputError where guidance lacks negative embeddings.
    """
    if prompt_embeds.ndim != 3 or len(prompt_embeds) != batch:
        raise ShapeMismatchError("prompt_embeds", f"({batch}, N, C)", tuple(prompt_embeds.shape))
    if guidance_scale == 1:
        return None
    if negative_prompt_embeds is None:
        raise InvalidInputError(f"guidance_scale {guidance_scale} needs negative_prompt_embeds, got None")
    shape = negative_prompt_embeds.shape
    if negative_prompt_embeds.ndim != 3 or shape[0] not in (1, batch) or shape[1:] != prompt_embeds.shape[1:]:
        raise ShapeMismatchError("negative_prompt_embeds", tuple(prompt_embeds.shape), tuple(shape))
    return negative_prompt_embeds.expand(batch, -1, -1)


def predict(
    unet: UNet2DConditionModel,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
    guidance_scale: float,
    context: AttentionContext | None = None,
) -> torch.Tensor:
    """uncond + g * (cond - uncond), (B, C, h, w) float32, for x_t (B, C, h, w) and timesteps () or (B,).

    One U-Net call on 2B rows, the unconditional half first; on B rows where `negative_prompt_embeds` is None. The
    U-Net computes in its own dtype, guidance is float32. `context` goes to the attention processors, which must be
    installed then.
    """
    halves = 1 if negative_prompt_embeds is None else 2
    embeds = prompt_embeds if negative_prompt_embeds is None else torch.cat([negative_prompt_embeds, prompt_embeds])
    output = unet(
        torch.cat([x_t] * halves).to(unet.device, unet.dtype),
        timesteps.to(unet.device).expand(len(x_t)).repeat(halves),
        encoder_hidden_states=embeds.to(unet.device, unet.dtype),
        cross_attention_kwargs=None if context is None else {"fusion": context},
        return_dict=False,
    )[0].float()
    if halves == 1:
        return output  # type: ignore[no-any-return]
    unconditional, conditional = output.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)  # type: ignore[no-any-return]
