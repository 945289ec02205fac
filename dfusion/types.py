"""What the method's functions hand to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dfusion.config import SamplingConfig
from dfusion.errors import ShapeMismatchError


@dataclass(frozen=True)
class Trajectory:
    """B denoising trajectories of T steps, as they were sampled (Eq. 1).

    latents     (B, T+1, C, h, w) float32; [:, 0] is x_T, [:, T] the clean latent
    timesteps   (T,) int64, the scheduler's values in denoising order
    log_probs   (B, T) float32, mean over C*h*w of the Gaussian's log-density at each stored transition
    seeds       B sample seeds
    config      the settings that it was sampled with
    item_maps   (B, T, h_m, w_m, K) float32 in [0, 1] or None: cross-attention maps of the K item tokens at the mask
                layer, conditional half, mean over heads and blocks; samples with fewer items are padded with zeros
    items       for each sample the token indices of its items (a tuple of tokens an item), or None
    mask_source whose cross-attention `item_maps` are (see FusionConfig), or None
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    log_probs: torch.Tensor
    seeds: tuple[int, ...]
    config: SamplingConfig
    item_maps: torch.Tensor | None = None
    items: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    mask_source: Literal["first_up", "resolution"] | None = None

    def __post_init__(self) -> None:
        batch, steps = len(self.seeds), len(self.timesteps)
        if self.latents.ndim != 5 or self.latents.shape[:2] != (batch, steps + 1):
            raise ShapeMismatchError("latents", f"({batch}, {steps + 1}, C, h, w)", tuple(self.latents.shape))
        if self.log_probs.shape != (batch, steps):
            raise ShapeMismatchError("log_probs", (batch, steps), tuple(self.log_probs.shape))

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def final(self) -> torch.Tensor:
        """The clean latents, (B, C, h, w)."""
        return self.latents[:, -1]

    def select(self, indices: Sequence[int]) -> Trajectory:
        """The samples at `indices`, in that order; an index may come twice."""
        chosen = list(indices)
        return replace(
            self,
            latents=self.latents[chosen],
            log_probs=self.log_probs[chosen],
            seeds=tuple(self.seeds[i] for i in chosen),
            item_maps=None if self.item_maps is None else self.item_maps[chosen],
            items=None if self.items is None else tuple(self.items[i] for i in chosen),
        )
