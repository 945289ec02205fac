"""The LoRA of text encoders in an adapter: merged into their weights, never trained, and kept to be saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dfusion._diffusers import peft
from dfusion.adapter_files import TEXT_MODEL, AdapterLayout


@dataclass(frozen=True)
class TextLayer:
    """A layer's part: A, (rank, in), and B, (out, rank), in float32 on the CPU. W becomes W + alpha / rank * B A."""

    alpha: float
    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        """The rank of A and B."""
        return len(self.down)


TextLayers = Mapping[str, Mapping[str, TextLayer]]
"""The parts by the encoders' names in a pipeline, and by the layers' names with "text_model."."""


def read_text_layers(layout: AdapterLayout, tensors: Mapping[str, torch.Tensor]) -> TextLayers:
    """The parts of text encoders in an adapter's file, from its tensors."""
    result: dict[str, dict[str, TextLayer]] = {}
    for encoder, layers in layout.text_encoders.items():
        result[encoder] = {}
        for name, layer in layers.items():
            down = tensors[layer.down].float().flatten(1)
            up = tensors[layer.up].float().flatten(1)
            result[encoder][name] = TextLayer(layer.alpha, down, up)
    return result


class MergedTextLayers:
    """The parts of text encoders, merged into the encoders' weights until `undo`."""

    def __init__(self, layers: TextLayers, encoders: Mapping[str, nn.Module]) -> None:
        """Merge in float32. The original weights are kept on the CPU.

        Args:
            layers: The parts; each fits its encoder.
            encoders: The text encoders by their names in a pipeline. They are changed in place.
        """
        self.layers = layers
        self._originals: list[tuple[nn.Parameter, torch.Tensor]] = []
        for encoder, of_encoder in layers.items():
            parameters = dict(encoders[encoder].named_parameters())
            for name, layer in of_encoder.items():
                own_name = name if f"{name}.weight" in parameters else name.removeprefix(TEXT_MODEL)
                self._merge(parameters[f"{own_name}.weight"], layer)

    def _merge(self, weight: nn.Parameter, layer: TextLayer) -> None:
        original = weight.detach().cpu()
        self._originals.append((weight, original.clone()))
        changed = original.float() + layer.alpha / layer.rank * (layer.up @ layer.down)
        weight.data.copy_(changed)

    def undo(self) -> None:
        """Restore the original weights."""
        for weight, original in self._originals:
            weight.data.copy_(original)


def diffusers_tensors(layers: TextLayers) -> dict[str, torch.Tensor]:
    """The parts by diffusers' keys."""
    tensors = {}
    for encoder, of_encoder in layers.items():
        for name, layer in of_encoder.items():
            tensors[f"{encoder}.{name}.lora_linear_layer.down.weight"] = layer.down
            tensors[f"{encoder}.{name}.lora_linear_layer.up.weight"] = layer.up
    return tensors


def diffusers_settings(layers: TextLayers) -> dict[str, Any]:
    """peft's settings of the parts, each with the encoder's prefix, as in diffusers' metadata."""
    settings: dict[str, Any] = {}
    for encoder, of_encoder in layers.items():
        named = {name.removeprefix(TEXT_MODEL): layer for name, layer in of_encoder.items()}
        rank = Counter(layer.rank for layer in named.values()).most_common(1)[0][0]
        alpha = Counter(layer.alpha for layer in named.values()).most_common(1)[0][0]
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=sorted(named),
            rank_pattern={name: layer.rank for name, layer in named.items() if layer.rank != rank},
            alpha_pattern={name: layer.alpha for name, layer in named.items() if layer.alpha != alpha},
        )
        for key, value in config.to_dict().items():
            settings[f"{encoder}.{key}"] = sorted(value) if isinstance(value, set) else value
    return settings
