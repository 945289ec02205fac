"""What is measured on a pair: how much the target gained, and how close it stayed to its base."""

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
"""Decibels that stand for images without any difference."""

ByPlace = Mapping[str, Mapping[str, float | None]]
"""By comparison ("target_to_base", "reference_to_base") and by place ("inside" or "outside" the mask); None where the
mask leaves no such place."""


@dataclass(frozen=True)
class Side:
    """One of a pair's samples: its clean latents (C, h, w), its image (H, W, 3) uint8 and its score."""

    latents: torch.Tensor
    image: np.ndarray
    score: float


@dataclass(frozen=True)
class PairFigures:
    """One pair in numbers. A place counts inside as far as the mask says, and outside with what is left of 1.

    margin           score of the target and of the reference above the base's
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
    """Whether a target takes part in training, and the comparison that decided (Eq. 7) in words."""

    adopted: bool
    why: str


def pair_figures(reference: Side, base: Side, target: Side, mask: torch.Tensor) -> PairFigures:
    """Figures of a pair; `mask` (h_m, w_m) in [0, 1] says where the target takes from the reference.

    Raises ShapeMismatchError where latents, images or mask do not fit, InvalidInputError for a mask beyond [0, 1].
    """
    _check(reference, base, target, mask)
    sides = {"target_to_base": target, "reference_to_base": reference}

    def measured(measure: Callable[[Side, Side, torch.Tensor], float | None]) -> ByPlace:
        places = {"inside": mask, "outside": 1 - mask}
        return {
            name: {place: measure(side, base, weights) for place, weights in places.items()}
            for name, side in sides.items()
        }

    return PairFigures(
        margin={
            "target_over_base": target.score - base.score,
            "reference_over_base": reference.score - base.score,
        },
        mask_cover=float(mask.mean()),
        latent_distance=measured(_latent_distance),
        pixel_distance=measured(_pixel_distance),
        psnr=measured(_psnr),
        ssim=measured(lambda one, other, weights: ssim(one.image, other.image, weights)),
    )


def decide(
    reference: Side, base: Side, target: Side, config: PairingConfig, mask: torch.Tensor, fusion: FusionConfig
) -> Adoption:
    """Eq. 7 with its reason in words; see `dfusion.pairing.adopt`.

    Whatever it scores, a target is not adopted (decision 003)
    * that is identical to its base, since its `mask` is empty: it teaches nothing
    * whose `mask` covers more of the image than `config.max_mask_cover`: it keeps too little of its base. Controls that
      use no mask are not limited by it

    Raises NonFiniteError.
    """
    control = CONTROLS[fusion.control]
    takes_nothing = control.mask is not None and not control.cross and not control.limited and not bool(mask.any())
    if takes_nothing or torch.equal(target.latents, base.latents):
        return Adoption(False, "the target is its base over again: nothing was taken from the reference")
    cover = float(mask.mean())
    if covers_too_much(cover, config, fusion):
        limit = f"max_mask_cover is {config.max_mask_cover:g}"
        return Adoption(False, f"the mask covers {cover:.3g} of the image, {limit}: too little of the base is kept")

    target_score, base_score, reference_score = target.score, base.score, reference.score
    adopted = adopt(target_score, base_score, reference_score, config)
    against = base_score if config.adoption_against == "base" else reference_score
    limit = f"{config.adoption_threshold:g} x {config.adoption_against} {against:.6g}"
    return Adoption(adopted, f"target {target_score:.6g} {'>=' if adopted else '<'} {limit}")


def covers_too_much(cover: float, config: PairingConfig, fusion: FusionConfig) -> bool:
    """Whether a mask of that mean covers more of the image than a target may take; never with controls without one."""
    return CONTROLS[fusion.control].mask is not None and cover > config.max_mask_cover


def fusion_mask(reference: Trajectory, thresholds: Sequence[float], config: FusionConfig) -> torch.Tensor:
    """In how many of the fused steps each place was taken from the reference, (h_m, w_m) float32 in [0, 1].

    `reference` is a trajectory of one sample (Eq. 4). Raises InvalidInputError if it has no item maps, no step of it is
    fused, or thresholds are not as many as its items.
    """
    if reference.item_maps is None:
        raise InvalidInputError("reference: expected item_maps, got None; give `items` when sampling the reference")
    fused = config.steps(len(reference.timesteps))
    if not fused:
        raise InvalidInputError(f"first_step: expected less than {len(reference.timesteps)}, got {config.first_step}")
    items = reference.item_maps.shape[-1] if reference.items is None else len(reference.items[0])
    if len(thresholds) != items:
        raise InvalidInputError(f"thresholds: expected {items}, one an item, got {len(thresholds)}")
    maps = reference.item_maps[0, fused.start : fused.stop]
    return merge_masks(maps, [thresholds] * len(maps), config.merge).float().mean(0)


def mask_image(mask: torch.Tensor, height: int, width: int) -> np.ndarray:
    """The mask in grey at the image's size, (H, W) uint8; white is taken from the reference at every step."""
    return (_resized(mask, height, width) * 255).round().to(torch.uint8).numpy()


def ssim(one: np.ndarray, other: np.ndarray, weights: torch.Tensor) -> float | None:
    """Structural similarity of two images (H, W, 3) uint8 where `weights` (h, w) in [0, 1] say so; None if nowhere.

    Wang et al. 2004: Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, mean of the channels. In
    the windows, too, a pixel counts by its weight, so what weighs nothing has no influence. With all weights 1 this is
    the usual index with windows cut off at the image's edges.
    """
    x, y = (torch.from_numpy(image.astype(np.float64) / 255).permute(2, 0, 1) for image in (one, other))
    pixel_weights = _resized(weights, *x.shape[1:]).double()
    window_weights = _blurred(pixel_weights[None]).clamp(min=1e-12)

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        return _blurred(pixel_weights * values) / window_weights

    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = local_mean(x * x) - mean_x.square() + local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    means = (2 * mean_x * mean_y + 0.01**2) / (mean_x.square() + mean_y.square() + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances + 0.03**2)
    return _weighted_mean((means * structure).mean(0), weights)


def _blurred(values: torch.Tensor) -> torch.Tensor:
    """(C, H, W) under the Gaussian window of `ssim`; nothing comes in over the edges."""
    window = (-torch.arange(-5.0, 6.0, dtype=torch.float64).square() / (2 * 1.5**2)).exp()
    window = window / window.sum()
    rows = functional.conv2d(values[:, None], window.reshape(1, 1, 11, 1), padding=(5, 0))
    return functional.conv2d(rows, window.reshape(1, 1, 1, 11), padding=(0, 5))[:, 0]


def _latent_distance(one: Side, other: Side, weights: torch.Tensor) -> float | None:
    mean = _weighted_mean((one.latents - other.latents).square().mean(0), weights)
    return None if mean is None else math.sqrt(mean)


def _pixel_distance(one: Side, other: Side, weights: torch.Tensor) -> float | None:
    return _weighted_mean(_difference(one, other).abs().mean(-1), weights)


def _psnr(one: Side, other: Side, weights: torch.Tensor) -> float | None:
    mean = _weighted_mean(_difference(one, other).square().mean(-1), weights)
    if mean is None:
        return None
    return PSNR_MAX if mean == 0 else min(PSNR_MAX, -10 * math.log10(mean))


def _difference(one: Side, other: Side) -> torch.Tensor:
    """(H, W, 3) in [-1, 1]."""
    return torch.from_numpy((one.image.astype(np.float32) - other.image.astype(np.float32)) / 255)


def _weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> float | None:
    """Mean of (h, w) values with the mask's weights at their size; None where all weights are 0."""
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
