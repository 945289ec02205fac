"""The shapes world's U-Net, text encoder and schedule, and how the U-Net's attention is led while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dfusion._diffusers import DDIMScheduler, UNet2DConditionModel
from dfusion.shapes.scenes import Template
from tools.shapes.captions import MAX_TOKENS

TEXT_WIDTH, TEXT_LAYERS = 128, 3


def new_unet() -> Any:
    """Two levels with cross-attention at 16x16 and 8x8. Two transformer layers a block and narrow convolutions:
    objects are carried by attention, which is what fusion can reach."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 128),
        layers_per_block=1,
        transformer_layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def new_text_encoder(clip: dict[str, torch.Tensor]) -> Any:
    """A CLIP text model with the weights of our open_clip model's text tower, as Stable Diffusion has OpenAI's."""
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = len(clip["token_embedding.weight"])
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="gelu",
            pad_token_id=0,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        )
    )
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    weights = {ours: clip[theirs] for ours, theirs in names.items()}
    parts = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for layer in range(TEXT_LAYERS):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            together = clip[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
            weights |= {f"{ours}.self_attn.{n}_proj.{kind}": x for n, x in zip("qkv", together, strict=True)}
            weights |= {f"{ours}.{n}.{kind}": clip[f"{theirs}.{m}.{kind}"] for n, m in parts.items()}
    encoder.load_state_dict({name: value.float() for name, value in weights.items()})
    return encoder


def new_scheduler() -> Any:
    """DDIM as Stable Diffusion configures it."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


class TrainingAttention:
    """Attention written out: on CPUs its backward pass takes half the time of the fused one. Keeps what cross-attention
    saw, for the grounding loss."""

    def __init__(self) -> None:
        self.maps: list[torch.Tensor] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        probabilities = (query * attn.scale @ key.transpose(-1, -2)).softmax(-1)
        if encoder_hidden_states is not None:
            self.maps.append(probabilities.mean(1))
        output: torch.Tensor = attn.to_out[0]((probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2))
        return output


def grounding_loss(maps: Sequence[torch.Tensor], masks: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """How far the item words' cross-attention lies off the items; TokenCompose (CVPR 2024), equations 3 and 4.

    maps     of each layer (B, L, N): attention probabilities, mean over heads
    masks    (B, K, 16, 16) in [0, 1]: where each item is
    columns  (B, K): the item word's column, or -1 where there is no item
    """
    losses = []
    present = (columns >= 0).float()
    for probabilities in maps:
        side = math.isqrt(probabilities.shape[1])
        inside = nn.functional.adaptive_avg_pool2d(masks, side).flatten(2)
        index = columns.clamp(min=0)[:, None].expand(-1, probabilities.shape[1], -1)
        seen = probabilities.float().gather(2, index).transpose(1, 2)
        token = (1 - (seen * inside).sum(2) / seen.sum(2).clamp(min=1e-6)).square()
        pixel = nn.functional.binary_cross_entropy(seen.clamp(1e-6, 1 - 1e-6), inside, reduction="none").mean(2)
        losses.append(((token + pixel) * present).sum() / present.sum().clamp(min=1))
    return torch.stack(losses).mean()


def item_columns(template: Template, named: dict[str, str], text: str) -> list[int]:
    """The columns of the prompt embeddings that hold the items' words; each word is one token."""
    names = {"behaviour": ("shape", "prop"), "attribute": ("shape",), "position": ("shape", "shape2")}[template]
    return [text.split().index(named[name]) + 1 for name in names]


def noisy_timesteps(templates: Sequence[Template], generator: torch.Generator) -> torch.Tensor:
    """A timestep for each picture: uniform, but of two things with a density that grows with the noise, because
    which of them stands where is decided where noise is strong."""
    drawn = torch.rand(len(templates), generator=generator)
    two = torch.tensor([template == "position" for template in templates])
    return (torch.where(two, drawn.sqrt(), drawn) * 1000).long()
