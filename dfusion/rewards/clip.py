"""The CLIP reward: cosine similarity of image and text embeddings.

The raw cosine, as the paper's figures are (0.32 to 0.37): CLIPScore (Hessel et al., EMNLP 2021) scales it by
w = 2.5 and cuts negative values off, which is not done here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dfusion import _torchvision_ops  # noqa: F401

# isort: split
import open_clip

from dfusion.errors import ModelNotFoundError, NonFiniteError, ShapeMismatchError

BATCH = 64
"""Images that go through the model at once."""


class ClipScorer:
    """Raw cosine similarity of an open_clip model, in [-1, 1]; ViT-H-14 / laion2b_s32b_b79k in the paper."""

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Image.Image], torch.Tensor],
        tokenize: Callable[[list[str]], torch.Tensor],
        *,
        name: str,
        version: str = "1",
        device: str = "cpu",
    ) -> None:
        """`model` has `encode_image` and `encode_text`; `preprocess` and `tokenize` are those it was trained with."""
        self.name, self.version = name, version
        self._model = model.eval().requires_grad_(False).to(device)
        self._preprocess, self._tokenize, self._device = preprocess, tokenize, device

    @classmethod
    def from_folder(cls, folder: Path, *, name: str = "clip", device: str = "cpu") -> ClipScorer:
        """Model, image transform and tokenizer from an open_clip folder (`open_clip_config.json` beside weights and
        tokenizer). Raises ModelNotFoundError."""
        if not (folder / "open_clip_config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ModelNotFoundError(f"expected an open_clip folder with safetensors at {folder}, found none")
        return cls._load(f"local-dir:{folder.absolute()}", None, name, device)

    @classmethod
    def from_pretrained(
        cls, architecture: str = "ViT-H-14", weights: str = "laion2b_s32b_b79k", *, device: str = "cpu"
    ) -> ClipScorer:
        """A model that open_clip knows; it is downloaded if it is not cached. Raises ModelNotFoundError."""
        if (architecture, weights) not in open_clip.list_pretrained():
            raise ModelNotFoundError(f"open_clip knows no weights {weights!r} of {architecture!r}")
        return cls._load(architecture, weights, f"clip-{architecture}-{weights}".lower(), device)

    @classmethod
    def _load(cls, identifier: str, weights: str | None, name: str, device: str) -> ClipScorer:
        try:
            model, preprocess = open_clip.create_model_from_pretrained(identifier, weights, device=device)
            tokenize = open_clip.get_tokenizer(identifier)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelNotFoundError(f"open_clip cannot load {identifier!r}: {error}") from error
        return cls(model, preprocess, tokenize, name=name, device=device)

    @torch.no_grad()
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """Cosine of each image (B, H, W, 3) uint8 with its prompt. Raises ShapeMismatchError, NonFiniteError."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) != len(prompts):
            got = (tuple(images.shape), str(images.dtype))
            raise ShapeMismatchError("images", f"({len(prompts)}, H, W, 3) uint8", got)
        scores: list[float] = []
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            pixels = torch.stack([self._preprocess(Image.fromarray(image)) for image in images[part]])
            tokens = self._tokenize(list(prompts[part]))
            image_embeds = self._model.encode_image(pixels.to(self._device)).float()
            text_embeds = self._model.encode_text(tokens.to(self._device)).float()
            scores += torch.cosine_similarity(image_embeds, text_embeds).tolist()
        if not np.isfinite(scores).all():
            raise NonFiniteError(f"{self.name}: a score is NaN or infinite")
        return scores
