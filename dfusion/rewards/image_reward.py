"""ImageReward (Xu et al., NeurIPS 2023, arXiv 2304.05977): BLIP with a head, trained on people's rankings.

The published weights are a pickle in BLIP's own layout. Converted to safetensors, they are loaded into transformers'
BLIP, whose modules compute the same with other names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dfusion.errors import ModelNotFoundError
from dfusion.rewards.checks import score_in_batches
from dfusion.rewards.weights import folder_digest, linear_head, load_processor, load_tensors, weights_folder

MEAN = 0.16717362830052426
STD = 1.0333394966054072
"""Mean and standard deviation of the head's output on ImageReward's validation set."""
MAX_TOKENS = 35
_PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
_PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTH = 64
"""Width of an attention head of BLIP's ViT."""
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)
"""From names of BLIP's vision transformer to those of transformers."""


class ImageRewardScorer:
    """(head - MEAN) / STD, about -2 to 2."""

    def __init__(self, source: str, *, name: str = "image-reward", device: str = "cpu") -> None:
        """Load ImageReward.

        Args:
            source: A folder, or "owner/name@commit", with the converted weights as the only file of safetensors,
                `med_config.json`, and the tokenizer of bert-base-uncased.
            name: The name of the scorer.
            device: The device of the model.

        Raises:
            ModelNotFoundError: There is no such model, or it is a pickle.
        """
        from transformers import BertTokenizerFast

        folder = weights_folder(source)
        self.name = name
        self.version = folder_digest(folder)
        self._vision, self._text, self._head = _load_blip(folder, device)
        self._tokenizer = load_processor(BertTokenizerFast, folder)
        self._device = device

    @torch.no_grad()
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """The score of each image (B, H, W, 3) uint8. Raises ShapeMismatchError, NonFiniteError."""
        return score_in_batches(self.name, images, prompts, self._score)

    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        image_embeds = self._vision(self._pixels(images)).last_hidden_state
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self._device)
        states = self._text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=image_embeds
        ).last_hidden_state
        ratings: torch.Tensor = self._head(states[:, 0])[:, 0]
        return (ratings - MEAN) / STD

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        """Resize the shorter side, crop the centre, normalise: (B, 3, S, S) float32."""
        size = self._vision.config.image_size
        pixels = []
        for image in images:
            picture = Image.fromarray(image)
            scale = size / min(picture.size)
            wide, high = (max(size, int(side * scale)) for side in picture.size)
            picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
            left = round((wide - size) / 2)
            top = round((high - size) / 2)
            pixels.append(np.asarray(picture.crop((left, top, left + size, top + size)), np.float32) / 255)
        normal = (np.stack(pixels) - np.array(_PIXEL_MEAN)) / np.array(_PIXEL_STD)
        return torch.from_numpy(normal).float().permute(0, 3, 1, 2).to(self._device)


def _load_blip(folder: Path, device: str) -> tuple[Any, Any, Any]:
    """BLIP's vision and text models, and the head."""
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    files = list(folder.glob("*.safetensors"))
    if len(files) != 1 or not (folder / "med_config.json").is_file():
        raise ModelNotFoundError(f"{folder}: expected one file of safetensors and med_config.json")
    tensors = load_tensors(files[0])
    weights = {key: value.float() for key, value in tensors.items() if not key.endswith("position_ids")}
    vision_weights = {_vision_name(key): value for key, value in _part(weights, "blip.visual_encoder.").items()}

    try:
        vision = BlipVisionModel(_vision_config(vision_weights))
        vision.load_state_dict(vision_weights)
        text = BlipTextModel(_text_config(folder / "med_config.json"), add_pooling_layer=False)
        text.load_state_dict(_part(weights, "blip.text_encoder."))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelNotFoundError(f"{files[0]}: expected the weights of ImageReward: {error}") from error
    head = linear_head(_part(weights, "mlp."), str(files[0]))
    return tuple(part.eval().requires_grad_(False).to(device) for part in (vision, text, head))  # type: ignore[return-value]


def _part(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _vision_name(key: str) -> str:
    for pattern, replacement in _VISION_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _vision_config(weights: Mapping[str, torch.Tensor]) -> Any:
    """The settings of the vision transformer, from the shapes of its weights."""
    from transformers import BlipVisionConfig

    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    patches = weights["embeddings.position_embedding"].shape[1] - 1
    layers = {key.split(".")[2] for key in weights if key.startswith("encoder.layers.")}
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(file: Path) -> Any:
    """The settings of the text model: `med_config.json` has BERT's names for most."""
    from transformers import BlipTextConfig

    med = json.loads(file.read_text("utf-8"))
    return BlipTextConfig(
        vocab_size=med["vocab_size"],
        hidden_size=med["hidden_size"],
        encoder_hidden_size=med["encoder_width"],
        intermediate_size=med["intermediate_size"],
        num_hidden_layers=med["num_hidden_layers"],
        num_attention_heads=med["num_attention_heads"],
        max_position_embeddings=med["max_position_embeddings"],
        layer_norm_eps=med["layer_norm_eps"],
        hidden_act=med["hidden_act"],
        hidden_dropout_prob=med["hidden_dropout_prob"],
        attention_probs_dropout_prob=med["attention_probs_dropout_prob"],
        is_decoder=True,  # creates the cross-attention; attention over the text stays bidirectional
    )
