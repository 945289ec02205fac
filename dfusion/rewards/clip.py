"""The CLIP reward (section 4.1): cosine similarity of image and text embeddings.

It is the raw cosine, as in the paper (0.32 to 0.37). CLIPScore (Hessel et al., EMNLP 2021) scales it by w = 2.5 and
clips negative values, which is not done here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from dfusion.errors import ModelNotFoundError
from dfusion.rewards.checks import batches, check_images, score_in_batches
from dfusion.rewards.weights import digest, weights_file


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
        """`model` has `encode_image` and `encode_text`; it was trained with `preprocess` and `tokenize`."""
        self.name = name
        self.version = version
        self._model = model.eval().requires_grad_(False).to(device)
        self._preprocess = preprocess
        self._tokenize = tokenize
        self._device = device

    @classmethod
    def from_folder(cls, folder: Path, *, name: str = "clip", device: str = "cpu") -> ClipScorer:
        """Load model, image transform and tokenizer from an open_clip folder.

        The folder holds `open_clip_config.json`, the weights and the tokenizer. The version is a digest of the weights.
        Raises ModelNotFoundError.
        """
        weights = sorted(folder.glob("*.safetensors"))
        if not (folder / "open_clip_config.json").is_file() or not weights:
            raise ModelNotFoundError(f"expected an open_clip folder with safetensors at {folder}, got none")
        return cls._load(f"local-dir:{folder.absolute()}", None, name, digest(weights), device)

    @classmethod
    def from_file(cls, file: Path, architecture: str = "ViT-H-14", *, name: str, device: str = "cpu") -> ClipScorer:
        """Load other weights of an open_clip architecture, for example HPSv2's, from safetensors.

        The version is a digest of the weights. Raises ModelNotFoundError.
        """
        import open_clip

        weights_file(file)
        if architecture not in open_clip.list_models():
            raise ModelNotFoundError(f"open_clip has no architecture {architecture!r}")
        return cls._load(architecture, str(file), name, digest([file]), device)

    @classmethod
    def from_pretrained(
        cls,
        architecture: str = "ViT-H-14",
        weights: str = "laion2b_s32b_b79k",
        *,
        name: str | None = None,
        device: str = "cpu",
    ) -> ClipScorer:
        """Load a pretrained model of open_clip, and download it if it is not cached. The version is its weights' tag.

        Raises ModelNotFoundError.
        """
        import open_clip

        if (architecture, weights) not in open_clip.list_pretrained():
            raise ModelNotFoundError(f"open_clip has no weights {weights!r} for {architecture!r}")
        return cls._load(architecture, weights, name or f"clip-{architecture}".lower(), weights, device)

    @classmethod
    def _load(cls, identifier: str, weights: str | None, name: str, version: str, device: str) -> ClipScorer:
        import open_clip

        try:
            model, preprocess = open_clip.create_model_from_pretrained(identifier, weights, device=device)
            tokenize = open_clip.get_tokenizer(identifier)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ModelNotFoundError(f"open_clip cannot load {identifier!r}: {error}") from error
        return cls(model, preprocess, tokenize, name=name, version=version, device=device)

    @torch.no_grad()
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """Cosine of each image (B, H, W, 3) uint8 with its prompt. Raises ShapeMismatchError, NonFiniteError."""
        return score_in_batches(self.name, images, prompts, self._score)

    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        tokens = self._tokenize(prompts)
        text_embeds = self._model.encode_text(tokens.to(self._device)).float()
        return torch.cosine_similarity(self._embeds(images), text_embeds)

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Image embeddings (B, D) float32, not normalised, of images (B, H, W, 3) uint8, for `dfusion.rewards.watch`.

        Raises ShapeMismatchError.
        """
        check_images(images, [""] * len(images))
        embeds = [self._embeds(images[part]).cpu().numpy() for part in batches(len(images))]
        return np.concatenate(embeds) if embeds else np.zeros((0, 0), np.float32)

    def _embeds(self, images: np.ndarray) -> torch.Tensor:
        pixels = torch.stack([self._preprocess(Image.fromarray(image)) for image in images])
        embeds: torch.Tensor = self._model.encode_image(pixels.to(self._device)).float()
        return embeds
