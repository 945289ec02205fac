"""Small random networks and inputs for tests."""

from __future__ import annotations

import torch
import transformers

from dfusion._diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from dfusion.models import DiffusionModel
from tools.shapes.captions import new_tokenizer

TOKENS = 7
WIDTH = 16
XL_WIDTH = 24
XL_POOLED = 12


def sd_unet(sample_size: int = 64, seed: int = 0, transformer_layers: int = 1, heads: int = 2) -> UNet2DConditionModel:
    """A U-Net with Stable Diffusion's four levels, few channels and `sharpened` attention."""
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
    return sharpened(unet)


def sharpened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The U-Net, with cross-attention that is sharper than a random net's, so that item maps vary over the image, and
    stronger self-attention, so that fusion shows."""
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                parameter.mul_(4)
            if "attn1.to_out" in name:
                parameter.mul_(3)
    return unet


def tiny_unet(seed: int = 0, has_middle: bool = True) -> UNet2DConditionModel:
    """The smallest U-Net with all kinds of layers: 8x8 latents and two levels, with or without a middle block, which
    has the same kinds."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        mid_block_type="UNetMidBlock2DCrossAttn" if has_middle else None,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def tiny_xl_unet(seed: int = 0) -> UNet2DConditionModel:
    """SDXL's layout with few channels: cross-attention on the two lower levels only, several transformer layers in a
    block, linear projections, and added conditions."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=WIDTH + XL_WIDTH,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + XL_POOLED,
    ).eval()


SD_SCHEDULE: dict[str, object] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def sd_scheduler(**changes: object) -> DDIMScheduler:
    """Stable Diffusion's schedule as a DDIM scheduler: sigma is positive at the last step."""
    return DDIMScheduler(**(SD_SCHEDULE | changes))


def embeds(batch: int, seed: int = 1) -> torch.Tensor:
    """Prompt embeddings (batch, N, C)."""
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return float((got - expected).norm() / expected.norm())


def tiny_pipeline(has_middle: bool = True, **scheduler_changes: object) -> StableDiffusionPipeline:
    """A random pipeline of 8x8 latents and 16x16 pixels, with the shapes world's tokenizer."""
    tokenizer = new_tokenizer()
    torch.manual_seed(3)
    text_encoder = transformers.CLIPTextModel(_text_config(tokenizer, WIDTH))
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=tiny_unet(has_middle=has_middle),
        scheduler=sd_scheduler(**scheduler_changes),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def overflowing_pipeline() -> StableDiffusionPipeline:
    """`tiny_pipeline` whose VAE overflows in float16: the decoder's input is far above 65,504, and the norm behind it
    makes ordinary pixels of it in float32."""
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.vae.post_quant_conv.weight.mul_(30_000)
        pipeline.vae.decoder.conv_in.weight.mul_(1_000)
    return pipeline


def tiny_xl_pipeline(force_zeros: bool = True) -> StableDiffusionXLPipeline:
    """The same of SDXL's layout, with two text encoders."""
    tokenizer = new_tokenizer()
    torch.manual_seed(3)
    text_encoder = transformers.CLIPTextModel(_text_config(tokenizer, WIDTH))
    text_encoder_2 = transformers.CLIPTextModelWithProjection(
        _text_config(tokenizer, XL_WIDTH, projection_dim=XL_POOLED)
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=new_tokenizer(),
        unet=tiny_xl_unet(),
        scheduler=sd_scheduler(),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


def _text_config(tokenizer: transformers.CLIPTokenizer, width: int, **more: int) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def tiny_model(has_middle: bool = False) -> DiffusionModel:
    """The parts of `tiny_pipeline`. Without a middle block, a forward pass takes a quarter less time."""
    return DiffusionModel.from_pipeline(tiny_pipeline(has_middle))


def tiny_xl_model() -> DiffusionModel:
    """The parts of `tiny_xl_pipeline`."""
    return DiffusionModel.from_pipeline(tiny_xl_pipeline())
