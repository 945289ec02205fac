"""Random models for measurements. The cost of a call does not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from dfusion._diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from dfusion.models import DiffusionModel
from tools.shapes.captions import new_tokenizer

UNETS: dict[str, dict[str, Any]] = {
    "small": {
        "block_out_channels": (16, 16, 32, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 1,
        "norm_num_groups": 8,
    },
    "sd-2.1-base": {
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
}
"""Stable Diffusion's layout on 64x64 latents: with few channels for a CPU, and the paper's model in full size."""
TOKENS = {"small": 7, "sd-2.1-base": 77}


def random_unet(name: str, device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The U-Net of that name, without gradients. On one device, every call gives the same weights."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            **UNETS[name],
        )
    return _frozen(unet, device, dtype)


def _frozen(part: Any, device: str, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(part, device, dtype).eval().requires_grad_(False)  # diffusers' own method warns


def sd_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def random_model(name: str, device: str, dtype: torch.dtype) -> DiffusionModel:
    """The U-Net of that name, with a shallow text encoder and VAE of matching sizes."""
    unet = random_unet(name, device, dtype)
    tokenizer = new_tokenizer()
    tokenizer.model_max_length = max(TOKENS[name], tokenizer.model_max_length)

    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=unet.config.cross_attention_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
    )

    encoder = _frozen(transformers.CLIPTextModel(text), device, dtype)
    return DiffusionModel(unet, sd_scheduler(), _frozen(vae, device, dtype), encoder, tokenizer, device)
