"""Metrics of a pair: how much reward the target gained, and how close it is to its base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch.nn import functional

from dfusion.attention.fusion import CONTROLS
from dfusion.attention.masks import merge_masks
from dfusion.config import FusionConfig, PairingConfig
from dfusion.errors import InvalidInputError, ShapeMismatchError
from dfusion.pairing import adopt
from dfusion.ssim import ssim
from dfusion.types import Trajectory

PSNR_MAX = 100.0
"""The value in decibels for identical images."""

_BATCH_PIXELS = 2**20
"""Pixels of the bases that are measured together: the memory does not grow with the number of pairs."""

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
class PairSides:
    """The sides of a pair, and the `mask` (h_m, w_m) in [0, 1] where the target takes content from the reference."""

    reference: Side
    base: Side
    target: Side
    mask: torch.Tensor


@dataclass(frozen=True)
class PairStatistics:
    """The metrics of one pair. A pixel's weight is the mask's value inside, and 1 minus it outside.

    margin           scores of target and reference minus the base's score
    mask_cover       mean of the mask, in [0, 1]
    latent_distance  root mean square of the difference of clean latents
    pixel_distance   mean absolute difference of the images, in [0, 1]
    psnr             peak signal-to-noise ratio of the images in dB, at most PSNR_MAX
    ssim             structural similarity of the images, in [-1, 1]; see `dfusion.ssim`
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


def pair_statistics(pairs: Sequence[PairSides], device: str = "cpu") -> list[PairStatistics]:
    """Measure pairs on a device, in batches of bounded size.

    Raises ShapeMismatchError if latents, images or mask of a pair do not fit, and InvalidInputError for a mask outside
    [0, 1].
    """
    for pair in pairs:
        _check(pair)

    statistics: list[PairStatistics] = []
    for (image_shape, _, _), group in groupby(pairs, key=_shapes):
        same_size = list(group)
        at_once = max(1, _BATCH_PIXELS // math.prod(image_shape[:2]))
        for start in range(0, len(same_size), at_once):
            statistics += _measured(same_size[start : start + at_once], device)
    return statistics


def decide(
    reference: Side, base: Side, target: Side, config: PairingConfig, mask: torch.Tensor, fusion: FusionConfig
) -> Adoption:
    """Eq. 7 with its reason in words; see `dfusion.pairing.adopt`.

    Regardless of its score, a target is not adopted in two cases (decision 003):
    * It is identical to its base, for example because its `mask` is empty. There is nothing to learn from it.
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
    return (_resized(mask[None, None], height, width)[0, 0] * 255).round().to(torch.uint8).numpy()


def _measured(pairs: Sequence[PairSides], device: str) -> list[PairStatistics]:
    """The statistics of B pairs of the same size."""
    # 1. the tensors, with sides s = target, reference and regions r = inside, outside
    masks = torch.stack([pair.mask for pair in pairs]).to(device)
    regions = torch.stack([masks, 1 - masks], 1)
    bases = _planes([pair.base for pair in pairs], device)
    targets = _planes([pair.target for pair in pairs], device)
    references = _planes([pair.reference for pair in pairs], device)
    others = torch.stack([targets, references], 1)

    # 2. the metrics, (B, s, r)
    latents = torch.stack([torch.stack([pair.target.latents, pair.reference.latents]) for pair in pairs])
    base_latents = torch.stack([pair.base.latents for pair in pairs])
    latent_errors = (latents.to(device) - base_latents.to(device)[:, None]).square().mean(2)
    latent_distance = _weighted_means(latent_errors, _resized(regions, *latent_errors.shape[-2:])).sqrt()

    weights = _resized(regions, *bases.shape[-2:])
    differences = (others.float() - bases[:, None].float()) / 255
    pixel_distance = _weighted_means(differences.abs().mean(2), weights)
    squared_error = _weighted_means(differences.square().mean(2), weights)
    psnr = (-10 * squared_error.log10()).clamp(max=PSNR_MAX)
    similarity = ssim(bases, others, weights)

    # 3. the statistics of each pair
    metrics = torch.stack([latent_distance, pixel_distance, psnr, similarity], 1).cpu()
    statistics = []
    for pair, values in zip(pairs, metrics, strict=True):
        base_score = pair.base.score
        margin = {
            "target_over_base": pair.target.score - base_score,
            "reference_over_base": pair.reference.score - base_score,
        }
        by_place = map(_by_place, values.tolist())
        statistics.append(PairStatistics(margin, float(pair.mask.mean()), *by_place))
    return statistics


def _planes(sides: Sequence[Side], device: str) -> torch.Tensor:
    """The images of B sides, (B, 3, H, W) uint8."""
    images = torch.from_numpy(np.stack([side.image for side in sides]))
    return images.to(device).permute(0, 3, 1, 2).contiguous()


def _by_place(values: Sequence[Sequence[float]]) -> ByPlace:
    """Values (s, r) by comparison and region; None for NaN, the value of an empty region."""
    results = {}
    for name, row in zip(("target_to_base", "reference_to_base"), values, strict=True):
        inside, outside = (None if math.isnan(value) else value for value in row)
        results[name] = {"inside": inside, "outside": outside}
    return results


def _weighted_means(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Means of (B, s, h, w) values under weights (B, r, h, w): (B, s, r) float64, NaN if all weights are 0."""
    pixel_weights = weights.flatten(2).double()
    sums = values.flatten(2).double() @ pixel_weights.transpose(1, 2)
    return sums / pixel_weights.sum(-1)[:, None]


def _resized(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, height, width) of masks (B, C, h, w)."""
    return functional.interpolate(masks, size=(height, width), mode="nearest")


def _shapes(pair: PairSides) -> tuple[tuple[int, ...], ...]:
    """The shapes of image, latents and mask."""
    return pair.base.image.shape, tuple(pair.base.latents.shape), tuple(pair.mask.shape)


def _check(pair: PairSides) -> None:
    base = pair.base
    mask = pair.mask
    for name, side in (("reference", pair.reference), ("target", pair.target)):
        if side.latents.shape != base.latents.shape:
            raise ShapeMismatchError(f"{name}.latents", tuple(base.latents.shape), tuple(side.latents.shape))
        if side.image.shape != base.image.shape:
            raise ShapeMismatchError(f"{name}.image", base.image.shape, side.image.shape)
    if mask.ndim != 2:
        raise ShapeMismatchError("mask", "(h_m, w_m)", tuple(mask.shape))
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise InvalidInputError(f"mask: expected values in [0, 1], got {float(mask.min())} to {float(mask.max())}")
