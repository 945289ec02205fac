"""The U-Nets of SD 1.5, SD 2.1 and SDXL, and the names of their weights in diffusers and in the original code.

The names follow from the order in which the original code's constructor makes its layers, not from `dfusion.export`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dfusion._diffusers import UNet2DConditionModel

LAYERS_PER_BLOCK = 2
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, eq=False)
class Layout:
    """A U-Net's layout.

    depths  transformer blocks in each transformer of a level; 0: the level has no transformers
    config  the arguments of diffusers' U-Net that differ from its defaults
    """

    name: str
    depths: tuple[int, ...]
    config: Mapping[str, Any]

    def unet(self) -> UNet2DConditionModel:
        """The U-Net in its true size, without weights."""
        with torch.device("meta"):
            return UNet2DConditionModel(**self.config)


SD_15 = Layout("SD 1.5", (1, 1, 1, 0), {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8})
SD_21 = Layout(
    "SD 2.1",
    (1, 1, 1, 0),
    {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
)
SD_21_BASE = Layout("SD 2.1-base", SD_21.depths, {**SD_21.config, "sample_size": 64})
SDXL = Layout(
    "SDXL",
    (0, 2, 10),
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)
LAYOUTS = (SD_15, SD_21, SDXL)


@dataclass(frozen=True)
class Part:
    """A part of the U-Net by both names, without the last dot. `depth` counts the blocks of a transformer."""

    diffusers: str
    original: str
    kind: str
    depth: int = 0


def parts(layout: Layout) -> Iterator[Part]:
    """The parts in the order of the original constructor."""
    levels = len(layout.depths)
    lowest = levels - 1

    # 1. down: input block 0 is the first convolution
    number = 1
    for level, depth in enumerate(layout.depths):
        for layer in range(LAYERS_PER_BLOCK):
            widens = layer == 0 and 0 < level < 3  # 320 -> 640 -> 1280 -> 1280 channels
            kind = "widening resnet" if widens else "resnet"
            yield Part(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0", kind)
            if depth:
                yield Part(f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{number}.1", "transformer", depth)
            number += 1
        if level != lowest:
            yield Part(f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op", "layer")
            number += 1

    # 2. middle: its transformer is as deep as that of the lowest level that has any
    depth = layout.depths[lowest] or layout.depths[lowest - 1]
    yield Part("mid_block.resnets.0", "middle_block.0", "resnet")
    yield Part("mid_block.attentions.0", "middle_block.1", "transformer", depth)
    yield Part("mid_block.resnets.1", "middle_block.2", "resnet")

    # 3. up: skip connections widen every input; the last layer of a level upsamples
    number = 0
    for up, depth in enumerate(reversed(layout.depths)):
        for layer in range(LAYERS_PER_BLOCK + 1):
            block = f"output_blocks.{number}"
            yield Part(f"up_blocks.{up}.resnets.{layer}", f"{block}.0", "widening resnet")
            if depth:
                yield Part(f"up_blocks.{up}.attentions.{layer}", f"{block}.1", "transformer", depth)
            if layer == LAYERS_PER_BLOCK and up != lowest:
                place = 2 if depth else 1
                yield Part(f"up_blocks.{up}.upsamplers.0.conv", f"{block}.{place}.conv", "layer")
            number += 1


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
_SINGLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def transformer_layers(depth: int) -> dict[str, bool]:
    """The layers of a transformer, the same in both codes, and whether they have a bias."""
    layers = {"norm": True, "proj_in": True, "proj_out": True}
    for block in range(depth):
        prefix = f"transformer_blocks.{block}"
        for attention in ("attn1", "attn2"):
            for projection in PROJECTIONS:
                layers[f"{prefix}.{attention}.{projection}"] = projection == "to_out.0"
        for name in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"):
            layers[f"{prefix}.{name}"] = True
    return layers


@cache
def weights(layout: Layout) -> Mapping[str, str]:
    """The original name of every weight and bias, by diffusers' name."""
    layers: dict[tuple[str, str], bool] = {}
    single = _SINGLE | (_ADDED if "addition_embed_type" in layout.config else {})
    layers |= dict.fromkeys(single.items(), True)

    for part in parts(layout):
        inner: dict[str, str] = {}
        if part.kind == "layer":
            layers[part.diffusers, part.original] = True
        elif part.kind == "transformer":
            for name, has_bias in transformer_layers(part.depth).items():
                layers[f"{part.diffusers}.{name}", f"{part.original}.{name}"] = has_bias
        else:
            inner = _RESNET | ({"conv_shortcut": "skip_connection"} if part.kind == "widening resnet" else {})
        for name, original in inner.items():
            layers[f"{part.diffusers}.{name}", f"{part.original}.{original}"] = True

    named = {}
    for (diffusers, original), has_bias in layers.items():
        named[f"{diffusers}.weight"] = f"{original}.weight"
        if has_bias:
            named[f"{diffusers}.bias"] = f"{original}.bias"
    return named


def attention_projections(layout: Layout) -> list[str]:
    """The modules of the attention layers, by diffusers' names."""
    names = (name.removesuffix(".weight") for name in weights(layout))
    return [name for name in names if ".attn" in name and name.endswith(PROJECTIONS)]
