"""Small random networks and inputs for tests."""

from __future__ import annotations

import torch

from dfusion import _torchvision_ops  # noqa: F401

# isort: split
from diffusers import DDIMScheduler, UNet2DConditionModel

TOKENS = 7
WIDTH = 16


def sd_unet(sample_size: int = 64, seed: int = 0, transformer_layers: int = 1, heads: int = 2) -> UNet2DConditionModel:
    """A U-Net with Stable Diffusion's four levels and few channels. Cross-attention is made sharper than a random
    net's, so that item maps vary over the image, and self-attention stronger, so that fusion shows."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=heads,  # diffusers takes it for the number of heads
        norm_num_groups=8,
        transformer_layers_per_block=transformer_layers,
    ).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                parameter.mul_(4)
            if "attn1.to_out" in name:
                parameter.mul_(3)
    return unet


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """The smallest U-Net with all kinds of layers: 8x8 latents, two levels."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def sd_scheduler(**changes: object) -> DDIMScheduler:
    """Stable Diffusion's schedule as a DDIM scheduler: sigma is positive at the last step."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**(settings | changes))


def embeds(batch: int, seed: int = 1) -> torch.Tensor:
    """Prompt embeddings (batch, N, C)."""
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return float((got - expected).norm() / expected.norm())
