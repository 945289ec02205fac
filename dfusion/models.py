"""A text-to-image model as the method needs it: U-Net, scheduler, VAE, text encoder and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfusion import _torchvision_ops  # noqa: F401

# isort: split
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from dfusion.errors import InvalidInputError, ItemNotInPromptError, ModelNotFoundError, ShapeMismatchError
from dfusion.sampling import latent_shape


@dataclass(frozen=True)
class DiffusionModel:
    """The parts of a Stable Diffusion pipeline, all on one device in float32. The scheduler is DDIM (Eq. 1)."""

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    vae: AutoencoderKL
    text_encoder: Any
    tokenizer: Any
    device: str = "cpu"

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> DiffusionModel:
        """From a folder in diffusers' layout, or a name on the model hub; safetensors only, no safety checker.

        Raises ModelNotFoundError if there is no such model, or parts of it are missing or damaged.
        """
        if isinstance(folder, Path) and not (folder / "model_index.json").is_file():
            raise ModelNotFoundError(f"expected a diffusers pipeline at {folder}, found no model_index.json")
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                str(folder), dtype=torch.float32, use_safetensors=True, safety_checker=None
            )
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"no usable Stable Diffusion pipeline at {folder}: {error}") from error
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False).eval().to(device)
        # what DDIM would clip, or leave without noise, where another scheduler's settings say nothing of it
        unsaid = {"clip_sample": False, "set_alpha_to_one": False}
        scheduler = DDIMScheduler.from_config({**unsaid, **pipeline.scheduler.config})
        return cls(pipeline.unet, scheduler, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents that the U-Net was made for."""
        return latent_shape(self.unet)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> torch.Tensor:
        """(B, N, C) float32 embeddings of B texts, padded to the tokenizer's N. "" gives the negative embedding.

        Raises InvalidInputError for a text with more than N - 2 tokens: it is not cut off silently.
        """
        for text in texts:
            self._token_ids(text)
        length = self.tokenizer.model_max_length
        encoded = self.tokenizer(list(texts), padding="max_length", max_length=length, return_tensors="pt")
        mask = encoded.attention_mask.to(self.device) if self._uses_attention_mask() else None
        embeds: torch.Tensor = self.text_encoder(encoded.input_ids.to(self.device), attention_mask=mask)[0]
        return embeds.float()

    def _uses_attention_mask(self) -> bool:
        return bool(getattr(self.text_encoder.config, "use_attention_mask", False))

    def item_tokens(self, text: str, items: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token indices of each item of a prompt, counted after BOS (Eq. 4); an item may be several words.

        Where an item's words come several times in the prompt, all of them count. Raises ItemNotInPromptError, and
        InvalidInputError for prompts that are too long.
        """
        tokens = self._token_ids(text)
        found: list[tuple[int, ...]] = []
        for item in items:
            wanted = self._token_ids(item)
            starts = [i for i in self._word_starts(tokens) if tokens[i : i + len(wanted)] == wanted]
            if not wanted or not starts:
                raise ItemNotInPromptError(item, text)
            found.append(tuple(i + k for i in starts for k in range(len(wanted))))
        return tuple(found)

    def _word_starts(self, tokens: list[int]) -> list[int]:
        """Where words begin; everywhere for tokenizers that do not mark the end of words as CLIP's does."""
        pieces: list[str] = self.tokenizer.convert_ids_to_tokens(tokens)
        marked = any(piece.endswith("</w>") for piece in pieces)
        return [i for i in range(len(pieces)) if i == 0 or not marked or pieces[i - 1].endswith("</w>")]

    def _token_ids(self, text: str) -> list[int]:
        """Token ids without BOS and EOS. Raises InvalidInputError where they do not fit beside these two."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        room = self.tokenizer.model_max_length - 2
        if len(tokens) > room:
            raise InvalidInputError(f"prompt: expected at most {room} tokens, got {len(tokens)}: {text!r}")
        return tokens

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images (B, H, W, 3) uint8 of clean latents (B, C, h, w)."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_shape[0]:
            raise ShapeMismatchError("latents", f"(B, {self.latent_shape[0]}, h, w)", tuple(latents.shape))
        scaled = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor
        scaled = scaled + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        pixels = (self.vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1)
        return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # type: ignore[no-any-return]
