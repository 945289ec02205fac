"""The shapes world's U-Net, text encoder and schedule, and the supervision of the U-Net's attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dfusion._diffusers import DDIMScheduler, UNet2DConditionModel
from dfusion.shapes.scenes import Template
from tools.shapes.captions import MAX_TOKENS

TEXT_WIDTH = 128
TEXT_LAYERS = 3


def new_unet() -> Any:
    """A U-Net of two levels with cross-attention, at 16x16 and 8x8.

    It has two transformer layers per block and narrow convolutions, so that attention determines the objects. Fusion
    acts on attention only.
    """
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
    """A CLIP text model with the weights of our open_clip model's text tower, as Stable Diffusion uses OpenAI's."""
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

    # embeddings and the final norm
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    weights = {ours: clip[theirs] for ours, theirs in names.items()}

    # the layers
    parts = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for layer in range(TEXT_LAYERS):
        ours = f"encoder.layers.{layer}"
        theirs = f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            projections = clip[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
            weights |= {f"{ours}.self_attn.{n}_proj.{kind}": x for n, x in zip("qkv", projections, strict=True)}
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
    """Explicit attention, which stores the cross-attention maps for the grounding loss.

    On CPUs its backward pass takes half the time of `scaled_dot_product_attention`'s.
    """

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
        projected = (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)

        probabilities = (query * attn.scale @ key.transpose(-1, -2)).softmax(-1)
        if encoder_hidden_states is not None:
            self.maps.append(probabilities.mean(1))
        output: torch.Tensor = attn.to_out[0]((probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2))
        return output


def grounding_loss(maps: Sequence[torch.Tensor], masks: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The share of the item words' cross-attention outside the items; TokenCompose (CVPR 2024), equations 3 and 4.

    Args:
        maps: Per layer, attention probabilities (B, L, N), mean over heads.
        masks: (B, K, 16, 16) in [0, 1], the area of each item.
        columns: (B, K), the item word's column, or -1 without an item.
    """
    present = (columns >= 0).float()

    losses = []
    for probabilities in maps:
        side = math.isqrt(probabilities.shape[1])
        inside = nn.functional.adaptive_avg_pool2d(masks, side).flatten(2)
        index = columns.clamp(min=0)[:, None].expand(-1, probabilities.shape[1], -1)
        item_maps = probabilities.float().gather(2, index).transpose(1, 2)

        token = (1 - (item_maps * inside).sum(2) / item_maps.sum(2).clamp(min=1e-6)).square()
        pixel = nn.functional.binary_cross_entropy(item_maps.clamp(1e-6, 1 - 1e-6), inside, reduction="none").mean(2)
        losses.append(((token + pixel) * present).sum() / present.sum().clamp(min=1))
    return torch.stack(losses).mean()


def item_columns(template: Template, named: dict[str, str], text: str) -> list[int]:
    """The columns of the prompt embeddings of the items' words. Each word is one token."""
    names = {"behaviour": ("shape", "prop"), "attribute": ("shape",), "position": ("shape", "shape2")}[template]
    return [text.split().index(named[name]) + 1 for name in names]


def noisy_timesteps(templates: Sequence[Template], generator: torch.Generator) -> torch.Tensor:
    """A random timestep for each image. It is uniform for one object.

    For two objects the density grows with the noise, because high noise determines their relative position.
    """
    uniform = torch.rand(len(templates), generator=generator)
    two_objects = torch.tensor([template == "position" for template in templates])
    return (torch.where(two_objects, uniform.sqrt(), uniform) * 1000).long()
