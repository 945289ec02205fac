"""PickScore (Kirstain et al., NeurIPS 2023, arXiv 2305.01569): a CLIP model trained on people's choices of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from dfusion.rewards.checks import score_in_batches
from dfusion.rewards.weights import folder_digest, load_pretrained, load_processor, weights_folder


class PickScorer:
    """s * cos(image, text), with the model's learned scale s = exp(logit_scale); about 20 for PickScore_v1."""

    def __init__(
        self, source: str, *, name: str = "pickscore", processor: str | None = None, device: str = "cpu"
    ) -> None:
        """Load a CLIP model of transformers.

        Args:
            source: Its folder, or "owner/name@commit".
            name: The name of the scorer.
            processor: The source of its image transform and tokenizer; by default that of the model.
            device: The device of the model.

        Raises:
            ModelNotFoundError: There is no such model, or it is a pickle.
        """
        from transformers import CLIPModel, CLIPProcessor

        folder = weights_folder(source)
        self.name = name
        self.version = folder_digest(folder)
        self._model = load_pretrained(CLIPModel, folder, device)
        self._processor = load_processor(CLIPProcessor, folder if processor is None else weights_folder(processor))
        self._device = device

    @torch.no_grad()
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """The score of each image (B, H, W, 3) uint8. Raises ShapeMismatchError, NonFiniteError."""
        return score_in_batches(self.name, images, prompts, self._score)

    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        pictures = [Image.fromarray(image) for image in images]
        inputs = self._processor(images=pictures, text=prompts, padding=True, truncation=True, return_tensors="pt").to(
            self._device
        )
        output = self._model(**inputs)
        cosines = torch.cosine_similarity(output.image_embeds, output.text_embeds)
        scores: torch.Tensor = self._model.logit_scale.exp() * cosines
        return scores
