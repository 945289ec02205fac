"""Metrics of a pair: how much reward the target gained, and how close it is to its base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from dfusion.attention.fusion import CONTROLS
from dfusion.attention.masks import merge_masks
from dfusion.config import FusionConfig, PairingConfig
from dfusion.errors import InvalidInputError, ShapeMismatchError
from dfusion.pairing import adopt
from dfusion.types import Trajectory

PSNR_MAX = 100.0
"""The value in decibels for identical images."""

ByPlace = Mapping[str, Mapping[str, float | None]]
"""By comparison ("target_to_base", "reference_to_base") and by region ("inside" or "outside" the mask). None if the
region is empty."""


@dataclass(frozen=True)
class Side:
    """A sample of a pair: its clean latents (C, h, w), its image (H, W, 3) uint8 and its score."""

    latents: torch.Tensor
    image: np.ndarray
    score: float


@dataclass(frozen=True)
class PairStatistics:
    """The metrics of one pair. A pixel's weight is the mask's value inside, and 1 minus it outside.

    margin           scores of target and reference minus the base's score
    mask_cover       mean of the mask, in [0, 1]
    latent_distance  root mean square of the difference of clean latents
    pixel_distance   mean absolute difference of the images, in [0, 1]
    psnr             peak signal-to-noise ratio of the images in dB, at most PSNR_MAX
    ssim             structural similarity of the images, in [-1, 1]; see `ssim`
    """

    margin: Mapping[str, float]
    mask_cover: float
    latent_distance: ByPlace
    pixel_distance: ByPlace
    psnr: ByPlace
    ssim: ByPlace


@dataclass(frozen=True)
class Adoption:
    """Whether a target is trained on, and the comparison that decided (Eq. 7) in words."""

    adopted: bool
    reason: str


def pair_statistics(reference: Side, base: Side, target: Side, mask: torch.Tensor) -> PairStatistics:
    """Measure a pair. `mask` (h_m, w_m) in [0, 1] is where the target takes content from the reference.

    Raises ShapeMismatchError if latents, images or mask do not fit, and InvalidInputError for a mask outside [0, 1].
    """
    _check(reference, base, target, mask)

    def measured(measure: Callable[[Side, Side, torch.Tensor], float | None]) -> ByPlace:
        results = {}
        for name, side in {"target_to_base": target, "reference_to_base": reference}.items():
            results[name] = {"inside": measure(side, base, mask), "outside": measure(side, base, 1 - mask)}
        return results

    return PairStatistics(
        margin={
            "target_over_base": target.score - base.score,
            "reference_over_base": reference.score - base.score,
        },
        mask_cover=float(mask.mean()),
        latent_distance=measured(_latent_distance),
        pixel_distance=measured(_pixel_distance),
        psnr=measured(_psnr),
        ssim=measured(lambda side, other, weights: ssim(side.image, other.image, weights)),
    )


def decide(
    reference: Side, base: Side, target: Side, config: PairingConfig, mask: torch.Tensor, fusion: FusionConfig
) -> Adoption:
    """Eq. 7 with its reason in words; see `dfusion.pairing.adopt`.

    Regardless of its score, a target is not adopted in two cases (decision 003):
    * It is identical to its base because its `mask` is empty. There is nothing to learn from it.
    * Its `mask` covers more of the image than `config.max_mask_cover`. Too little of the base is kept. This limit does
      not apply to controls without a mask.

    Raises NonFiniteError.
    """
    # 1. a target identical to its base
    control = CONTROLS[fusion.control]
    takes_nothing = control.mask is not None and not control.cross and not control.limited and not bool(mask.any())
    if takes_nothing or torch.equal(target.latents, base.latents):
        return Adoption(False, "target identical to base: nothing was taken from the reference")

    # 2. a target that keeps too little of its base
    cover = float(mask.mean())
    if covers_too_much(cover, config, fusion):
        limit = f"max_mask_cover is {config.max_mask_cover:g}"
        return Adoption(False, f"the mask covers {cover:.3g} of the image, {limit}: too little of the base is kept")

    # 3. Eq. 7
    adopted = adopt(target.score, base.score, reference.score, config)
    against = base.score if config.adoption_against == "base" else reference.score
    limit = f"{config.adoption_threshold:g} x {config.adoption_against} {against:.6g}"
    return Adoption(adopted, f"target {target.score:.6g} {'>=' if adopted else '<'} {limit}")


def covers_too_much(cover: float, config: PairingConfig, fusion: FusionConfig) -> bool:
    """Whether a mask with mean `cover` exceeds `max_mask_cover`. Always False for controls without a mask."""
    return CONTROLS[fusion.control].mask is not None and cover > config.max_mask_cover


def fusion_mask(reference: Trajectory, thresholds: Sequence[float], config: FusionConfig) -> torch.Tensor:
    """The share of fused steps in which each pixel was inside the mask, (h_m, w_m) float32 in [0, 1].

    `reference` is a trajectory of one sample (Eq. 4). Raises InvalidInputError if it has no item maps or no fused step,
    or if the number of thresholds is not that of its items.
    """
    if reference.item_maps is None:
        raise InvalidInputError("reference: expected item_maps, got None; give `items` when sampling the reference")

    fused = config.steps(len(reference.timesteps))
    if not fused:
        raise InvalidInputError(f"first_step: expected less than {len(reference.timesteps)}, got {config.first_step}")
    items = reference.item_maps.shape[-1] if reference.items is None else len(reference.items[0])
    if len(thresholds) != items:
        raise InvalidInputError(f"thresholds: expected {items}, one per item, got {len(thresholds)}")

    maps = reference.item_maps[0, fused.start : fused.stop]
    return merge_masks(maps, [thresholds] * len(maps), config.merge).float().mean(0)


def mask_image(mask: torch.Tensor, height: int, width: int) -> np.ndarray:
    """The mask as a greyscale image, (H, W) uint8. White pixels were taken from the reference in every fused step."""
    return (_resized(mask, height, width) * 255).round().to(torch.uint8).numpy()


def ssim(image: np.ndarray, other: np.ndarray, weights: torch.Tensor) -> float | None:
    """Structural similarity of two images (H, W, 3) uint8, weighted by `weights` (h, w) in [0, 1].

    Wang et al. 2004: Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, mean of the channels. The
    weights also apply within a window, so a pixel with weight 0 has no influence. With all weights 1 this is the usual
    index, with windows cut off at the image's edges. None if all weights are 0.
    """
    x = torch.from_numpy(image.astype(np.float64) / 255).permute(2, 0, 1)
    y = torch.from_numpy(other.astype(np.float64) / 255).permute(2, 0, 1)
    pixel_weights = _resized(weights, *x.shape[1:]).double()
    window_weights = _blurred(pixel_weights[None]).clamp(min=1e-12)

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        return _blurred(pixel_weights * values) / window_weights

    mean_x = local_mean(x)
    mean_y = local_mean(y)
    variances = local_mean(x * x) - mean_x.square() + local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    means = (2 * mean_x * mean_y + 0.01**2) / (mean_x.square() + mean_y.square() + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances + 0.03**2)
    return _weighted_mean((means * structure).mean(0), weights)


def _blurred(values: torch.Tensor) -> torch.Tensor:
    """(C, H, W) under the Gaussian window of `ssim`, with zeros beyond the edges."""
    window = (-torch.arange(-5.0, 6.0, dtype=torch.float64).square() / (2 * 1.5**2)).exp()
    window = window / window.sum()
    rows = functional.conv2d(values[:, None], window.reshape(1, 1, 11, 1), padding=(5, 0))
    return functional.conv2d(rows, window.reshape(1, 1, 1, 11), padding=(0, 5))[:, 0]


def _latent_distance(side: Side, other: Side, weights: torch.Tensor) -> float | None:
    mean = _weighted_mean((side.latents - other.latents).square().mean(0), weights)
    return None if mean is None else math.sqrt(mean)


def _pixel_distance(side: Side, other: Side, weights: torch.Tensor) -> float | None:
    return _weighted_mean(_difference(side, other).abs().mean(-1), weights)


def _psnr(side: Side, other: Side, weights: torch.Tensor) -> float | None:
    mean = _weighted_mean(_difference(side, other).square().mean(-1), weights)
    if mean is None:
        return None
    return PSNR_MAX if mean == 0 else min(PSNR_MAX, -10 * math.log10(mean))


def _difference(side: Side, other: Side) -> torch.Tensor:
    """(H, W, 3) in [-1, 1]."""
    return torch.from_numpy((side.image.astype(np.float32) - other.image.astype(np.float32)) / 255)


def _weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> float | None:
    """Mean of (h, w) values, weighted by the mask at their size. None if all weights are 0."""
    resized = _resized(weights, *values.shape)
    total = float(resized.sum())
    return float((values * resized).sum()) / total if total > 0 else None


def _resized(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return functional.interpolate(mask[None, None], size=(height, width), mode="nearest")[0, 0]


def _check(reference: Side, base: Side, target: Side, mask: torch.Tensor) -> None:
    for name, side in (("reference", reference), ("target", target)):
        if side.latents.shape != base.latents.shape:
            raise ShapeMismatchError(f"{name}.latents", tuple(base.latents.shape), tuple(side.latents.shape))
        if side.image.shape != base.image.shape:
            raise ShapeMismatchError(f"{name}.image", base.image.shape, side.image.shape)
    if mask.ndim != 2:
        raise ShapeMismatchError("mask", "(h_m, w_m)", tuple(mask.shape))
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise InvalidInputError(f"mask: expected values in [0, 1], got {float(mask.min())} to {float(mask.max())}")
