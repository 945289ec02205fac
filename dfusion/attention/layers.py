"""The U-Net's layers, as the paper counts them: blocks with cross-attention, in forward order.

SD 1.x and 2.x: 0, 1, 2 down; 3 middle; 4, 5, 6 up. SDXL: 0, 1 down; 2 middle; 3, 4 up. Other U-Nets are counted the
same way, without a table of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dfusion._diffusers import Attention, Transformer2DModel, UNet2DConditionModel
from dfusion.errors import LayerNotFoundError, shortened

MaskSource = Literal["first_up", "resolution"]


@dataclass(frozen=True)
class Layer:
    """A U-Net block with cross-attention.

    index   its number in forward order, counting only blocks with cross-attention
    part    its position in the U-Net
    name    its path in the U-Net, for example "up_blocks.1"
    level   number of times the latent was halved before it: its maps are (h, w) / 2**level, rounded up
    self_attention, cross_attention  paths of its attention modules
    """

    index: int
    part: Literal["down", "middle", "up"]
    name: str
    level: int
    self_attention: tuple[str, ...]
    cross_attention: tuple[str, ...]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the block's maps for latents of height x width pixels."""
        for _ in range(self.level):
            height = (height + 1) // 2
            width = (width + 1) // 2
        return height, width


def find_layers(unet: UNet2DConditionModel) -> tuple[Layer, ...]:
    """The blocks of `unet` with cross-attention, in forward order. Raises LayerNotFoundError if there are none."""
    layers: list[Layer] = []
    for part, name, level, block in _blocks(unet):
        own, cross = _attention_paths(name, block)
        if cross:
            layers.append(Layer(len(layers), part, name, level, own, cross))
    if not layers:
        raise LayerNotFoundError("the U-Net has no block with cross-attention")
    return tuple(layers)


def _blocks(unet: UNet2DConditionModel) -> Iterator[tuple[Literal["down", "middle", "up"], str, int, nn.Module]]:
    """Every block in forward order with its part, path and level."""
    deepest = len(unet.down_blocks) - 1
    for i, block in enumerate(unet.down_blocks):
        yield "down", f"down_blocks.{i}", i, block
    if unet.mid_block is not None:
        yield "middle", "mid_block", deepest, unet.mid_block
    for i, block in enumerate(unet.up_blocks):
        yield "up", f"up_blocks.{i}", deepest - i, block


def _attention_paths(name: str, block: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the self- and cross-attention modules in the block's transformers, in forward order."""
    own: list[str] = []
    cross: list[str] = []
    for transformer_path, transformer in block.named_modules():
        if isinstance(transformer, Transformer2DModel):
            for path, module in transformer.named_modules():
                if isinstance(module, Attention):
                    (cross if module.is_cross_attention else own).append(f"{name}.{transformer_path}.{path}")
    return tuple(own), tuple(cross)


def resolve_layers(layers: Sequence[Layer], requested: Literal["middle+up"] | Sequence[int]) -> tuple[Layer, ...]:
    """The layers to fuse: "middle+up" (3-6 of SD, table 3), or those of the given indices.

    Raises LayerNotFoundError for an index that the U-Net does not have, or if it has neither middle nor up layers.
    """
    if requested == "middle+up":
        middle_and_up = tuple(layer for layer in layers if layer.part != "down")
        if not middle_and_up:
            raise LayerNotFoundError("the U-Net has no middle or up block with cross-attention")
        return middle_and_up

    missing = sorted(set(requested) - {layer.index for layer in layers})
    if missing or not requested:
        raise LayerNotFoundError(
            f"layers: expected indices within 0 to {len(layers) - 1}, got {shortened(list(requested))}"
        )
    return tuple(layers[int(i)] for i in sorted(set(requested)))


def first_up_layer(layers: Sequence[Layer]) -> Layer:
    """The first up layer with cross-attention (layer 4 of SD), which gives the mask. Raises LayerNotFoundError."""
    for layer in layers:
        if layer.part == "up":
            return layer
    raise LayerNotFoundError("the U-Net has no up block with cross-attention")


def mask_layers(layers: Sequence[Layer], source: MaskSource) -> tuple[Layer, ...]:
    """The layers whose cross-attention gives the mask (Eq. 4).

    "first_up" is the first up layer (paper). "resolution" is every layer of its resolution, including the down path
    (released code). Raises LayerNotFoundError.
    """
    first = first_up_layer(layers)
    return (first,) if source == "first_up" else tuple(layer for layer in layers if layer.level == first.level)
