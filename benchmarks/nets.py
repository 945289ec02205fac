"""Random models for measurements. The cost of a call does not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from dfusion._diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from dfusion.adapter import attach_lora, lora_parameters
from dfusion.catalogue import MODELS
from dfusion.config import Precision
from dfusion.models import DiffusionModel
from tests.unet_layouts import SD_21_BASE, SDXL
from tools.shapes.captions import new_tokenizer

UNETS: dict[str, dict[str, Any]] = {
    "small": {
        "sample_size": 64,
        "block_out_channels": (16, 16, 32, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 1,
        "norm_num_groups": 8,
    },
    "sd-2.1-base": dict(SD_21_BASE.config),
    "sdxl": dict(SDXL.config),
}
"""Stable Diffusion's layout on 64x64 latents with few channels for a CPU; the paper's model, and SDXL, in full size."""
SD_LAYOUTS = ("small", "sd-2.1-base")
TOKENS = {"small": 7, "sd-2.1-base": 77, "sdxl": 77}
_POOLED = 1280
"""Width of SDXL's second text encoder and of its pooled output."""


def random_unet(name: str, device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The U-Net of that name, without gradients. On one device, every call gives the same weights."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**UNETS[name])
    return _frozen(unet, device, dtype)


def attach_random_lora(unet: UNet2DConditionModel) -> None:
    """Attach an adapter that has an effect, as after some updates: B is random instead of 0."""
    attach_lora(unet, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in sorted(lora_parameters(unet).items()):
        if "lora_B" in name:
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


def _frozen(part: Any, device: str, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(part, device, dtype).eval().requires_grad_(False)  # diffusers' own method warns


def sd_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def random_model(name: str, device: str, dtype: torch.dtype) -> DiffusionModel:
    """The U-Net of that name, with shallow text encoders of matching widths, and a VAE: small, or in full size."""
    tokenizer = new_tokenizer()
    tokenizer.model_max_length = max(TOKENS[name], tokenizer.model_max_length)
    unet = random_unet(name, device, dtype)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **({"block_out_channels": (8,) * 4, "norm_num_groups": 4} if name == "small" else _FULL_VAE),
    )
    parts = {"unet": unet, "scheduler": sd_scheduler(), "tokenizer": tokenizer, "vae": _frozen(vae, device, dtype)}

    width = unet.config.cross_attention_dim
    if name != "sdxl":
        encoder = transformers.CLIPTextModel(_text_config(tokenizer, width))
        parts["text_encoder"] = _frozen(encoder, device, dtype)
        return DiffusionModel.from_pipeline(stock_pipeline(**parts), device)

    encoder = transformers.CLIPTextModel(_text_config(tokenizer, width - _POOLED))
    second = transformers.CLIPTextModelWithProjection(_text_config(tokenizer, _POOLED, projection_dim=_POOLED))
    parts |= {"text_encoder": _frozen(encoder, device, dtype), "text_encoder_2": _frozen(second, device, dtype)}
    pipeline = StableDiffusionXLPipeline(tokenizer_2=tokenizer, add_watermarker=False, **parts)
    return DiffusionModel.from_pipeline(pipeline, device)


def stock_pipeline(**parts: Any) -> StableDiffusionPipeline:
    """diffusers' own pipeline of these parts."""
    optional = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **optional)


def model_of(name: str, device: str, dtype: Precision) -> DiffusionModel:
    """The model of the shapes world, or a random one (`random_model`)."""
    if name == "shapes":
        return DiffusionModel.load(MODELS["shapes"].folder, device, dtype)
    return random_model(name, device, getattr(torch, dtype))


_FULL_VAE: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}


def _text_config(tokenizer: transformers.CLIPTokenizer, width: int, **more: int) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
