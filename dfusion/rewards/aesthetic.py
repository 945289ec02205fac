"""LAION's aesthetic predictor: linear layers on CLIP's image embedding, trained on people's ratings from 1 to 10.

https://github.com/christophschuhmann/improved-aesthetic-predictor. The prompt does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfusion.errors import ModelNotFoundError
from dfusion.rewards.checks import score_in_batches
from dfusion.rewards.weights import (
    digest,
    folder_digest,
    load_head,
    load_pretrained,
    load_processor,
    weights_folder,
)


class AestheticScorer:
    """The predicted rating of an image."""

    def __init__(self, source: str, head: Path, *, name: str = "aesthetic", device: str = "cpu") -> None:
        """Load the CLIP model and the head.

        Args:
            source: A CLIP model of transformers (OpenAI's ViT-L/14): its folder, or "owner/name@commit".
            head: The linear layers, a file of safetensors.
            name: The name of the scorer.
            device: The device of the model.

        Raises:
            ModelNotFoundError: There is no such model or head, they do not fit together, or one is a pickle.
        """
        from transformers import CLIPImageProcessor, CLIPModel

        self._head = load_head(head).to(device)
        folder = weights_folder(source)
        self.name = name
        self.version = f"{folder_digest(folder)}+{digest([head])}"
        self._model = load_pretrained(CLIPModel, folder, device)
        self._processor = load_processor(CLIPImageProcessor, folder)
        self._device = device

        width = self._model.config.projection_dim
        if self._head[0].in_features != width:  # type: ignore[index]
            got = self._head[0].in_features  # type: ignore[index]
            raise ModelNotFoundError(f"{head}: expected a head for embeddings of {width} numbers, got one for {got}")

    @torch.no_grad()
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """The rating of each image (B, H, W, 3) uint8. Raises ShapeMismatchError, NonFiniteError."""
        return score_in_batches(self.name, images, prompts, self._score)

    def _score(self, images: np.ndarray, _prompts: list[str]) -> torch.Tensor:
        pictures = [Image.fromarray(image) for image in images]
        pixels = self._processor(images=pictures, return_tensors="pt").pixel_values.to(self._device)
        embeds = self._model.get_image_features(pixel_values=pixels).pooler_output
        ratings: torch.Tensor = self._head(torch.nn.functional.normalize(embeds, dim=-1))
        return ratings[:, 0]
