"""What can be measured on a pair: how much the target gained, and how close it stayed to its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from dfusion.attention.masks import merge_masks
from dfusion.config import FusionConfig
from dfusion.types import Trajectory


@dataclass(frozen=True)
class Side:
    """One of a pair's samples: its clean latents (C, h, w), its image (H, W, 3) uint8 and its score."""

    latents: torch.Tensor
    image: np.ndarray
    score: float


def fusion_mask(reference: Trajectory, thresholds: Sequence[float], config: FusionConfig) -> torch.Tensor:
    """In how many of the fused steps each place was taken from the reference, (h_m, w_m) float32 in [0, 1].

    `reference` is a trajectory of one sample with item maps (Eq. 4).
    """
    if reference.item_maps is None:
        return torch.zeros(1, 1)
    maps = reference.item_maps[0, config.first_step : config.last_step + 1]
    return merge_masks(maps, [thresholds] * len(maps), config.merge).float().mean(0)


def pair_figures(reference: Side, base: Side, target: Side, mask: torch.Tensor) -> dict[str, Any]:
    """Margins of the scores, the mask's cover, and distances to the base inside and outside the mask.

    Latent distances are root mean squares; pixel distances are mean absolute differences in [0, 1]. Both weigh each
    place by the mask (inside) or by 1 - mask (outside); None where there is no weight.
    """
    return {
        "margin": {
            "target_over_base": target.score - base.score,
            "reference_over_base": reference.score - base.score,
        },
        "mask_cover": float(mask.mean()),
        "latent_distance": {
            "target_to_base": _latent_distance(target, base, mask),
            "reference_to_base": _latent_distance(reference, base, mask),
        },
        "pixel_distance": {
            "target_to_base": _pixel_distance(target, base, mask),
            "reference_to_base": _pixel_distance(reference, base, mask),
        },
    }


def mask_image(mask: torch.Tensor, height: int, width: int) -> np.ndarray:
    """The mask in grey at the image's size, (H, W) uint8; white is taken from the reference at every step."""
    return (_resized(mask, height, width) * 255).round().to(torch.uint8).numpy()


def _latent_distance(one: Side, other: Side, mask: torch.Tensor) -> dict[str, float | None]:
    squares = (one.latents - other.latents).square().mean(0)
    found = _inside_outside(squares, mask)
    return {place: None if value is None else value**0.5 for place, value in found.items()}


def _pixel_distance(one: Side, other: Side, mask: torch.Tensor) -> dict[str, float | None]:
    difference = one.image.astype(np.float32) - other.image.astype(np.float32)
    return _inside_outside(torch.from_numpy(np.abs(difference).mean(-1) / 255), mask)


def _inside_outside(values: torch.Tensor, mask: torch.Tensor) -> dict[str, float | None]:
    """Means of (h, w) values, weighted by the mask and by what is left of 1."""
    weights = _resized(mask, *values.shape)
    return {"inside": _weighted_mean(values, weights), "outside": _weighted_mean(values, 1 - weights)}


def _weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> float | None:
    total = float(weights.sum())
    return float((values * weights).sum()) / total if total > 0 else None


def _resized(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return functional.interpolate(mask[None, None], size=(height, width), mode="nearest")[0, 0]
