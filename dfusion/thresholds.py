"""Automatic mask thresholds (tau of Eq. 4) from the item maps of a few samples.

The paper sets thresholds by hand, after inspecting the masks of a few samples of each prompt (appendix G). Here they
are Otsu's: the number that best separates an item's attention into two classes, on and off the item (decision 008).
"""

from __future__ import annotations

import torch

from dfusion.config import FusionConfig
from dfusion.errors import InvalidInputError, NonFiniteError, ShapeMismatchError, shortened
from dfusion.types import Trajectory


def otsu_threshold(values: torch.Tensor) -> float:
    """The number that best separates `values` (any shape, n numbers) into two classes.

    It maximises Otsu's between-class variance w0 * w1 * (mean1 - mean0)**2 (N. Otsu, "A threshold selection method
    from gray-level histograms", 1979). All n - 1 splits of the sorted numbers are considered, instead of a histogram's
    bins, and the threshold lies midway between the two classes. Raises InvalidInputError if all numbers are equal, and
    NonFiniteError.
    """
    ordered = values.detach().flatten().double().cpu().sort().values
    if not bool(torch.isfinite(ordered).all()):
        raise NonFiniteError("values: expected finite numbers, got NaN or infinity")
    count = len(ordered)
    if count == 0 or ordered[0] == ordered[-1]:
        raise InvalidInputError(f"values: expected at least two different numbers, got {count} equal ones")

    # the between-class variance of every split
    lower = torch.arange(1, count, dtype=torch.float64)  # size of the lower class
    sums = ordered.cumsum(0)
    distance = (sums[-1] - sums[:-1]) / (count - lower) - sums[:-1] / lower
    variance = lower * (count - lower) * distance.square()
    best = int(variance.argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)


def auto_thresholds(item_maps: torch.Tensor) -> tuple[float, ...]:
    """A threshold in (0, 1) for each of the K items of a prompt, from the maps of a few of its samples.

    The maps of all samples and steps are pooled, so B of 4 or more is enough. Otsu's method is applied to their square
    roots. Attention varies more where it is stronger, which would raise the threshold; the root compensates for that.

    Args:
        item_maps: (B, T, h_m, w_m, K) in [0, 1], as in `Trajectory.item_maps`: B samples of one prompt, at the T steps
            that will be fused.

    Raises:
        ShapeMismatchError: Maps of another shape.
        InvalidInputError: An item with a constant map. The message names it.
        NonFiniteError: A map that is NaN or infinite.
    """
    if item_maps.ndim != 5 or item_maps.shape[-1] == 0:
        raise ShapeMismatchError("item_maps", "(B, T, h_m, w_m, K) with K >= 1", tuple(item_maps.shape))

    thresholds = []
    for number, maps in enumerate(item_maps.unbind(-1)):
        try:
            thresholds.append(otsu_threshold(maps.sqrt()) ** 2)
        except InvalidInputError as error:
            raise InvalidInputError(f"item_maps: no threshold for item {number}: {error}") from error
    return tuple(thresholds)


def thresholds_of(trajectory: Trajectory, config: FusionConfig = FusionConfig()) -> tuple[float, ...]:
    """The automatic thresholds of the prompt that all samples of `trajectory` share, for fusion with `config`.

    Raises InvalidInputError if samples have no items or different ones, or if no step will be fused.
    """
    if trajectory.item_maps is None or not trajectory.items:
        raise InvalidInputError("trajectory: expected item_maps, got None; give `items` when sampling")
    items = trajectory.items[0]
    if any(other != items for other in trajectory.items):
        raise InvalidInputError(
            f"trajectory: expected samples of one prompt, got items {shortened(sorted(set(trajectory.items)))}"
        )

    steps = len(trajectory.timesteps)
    fused = config.steps(steps)
    if not fused:
        raise InvalidInputError(f"first_step: expected less than {steps} steps, got {config.first_step}")
    return auto_thresholds(trajectory.item_maps[:, fused.start : fused.stop, ..., : len(items)])


def mask_iou(item_maps: torch.Tensor, thresholds: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Intersection over union of thresholded maps and true items, (..., K) float64 in [0, 1].

    item_maps is (..., h_m, w_m, K) in [0, 1], thresholds (K,), and truth (..., h_m, w_m, K) bool, broadcastable to the
    maps. Two empty masks have 1. Raises ShapeMismatchError.
    """
    if thresholds.shape != item_maps.shape[-1:] or item_maps.ndim < 3:
        raise ShapeMismatchError("thresholds", f"(K,) for maps {tuple(item_maps.shape)}", tuple(thresholds.shape))
    if truth.dtype != torch.bool or truth.shape[-3:] != item_maps.shape[-3:]:
        expected = f"(..., {', '.join(map(str, item_maps.shape[-3:]))}) bool"
        raise ShapeMismatchError("truth", expected, (tuple(truth.shape), truth.dtype))

    masks = item_maps >= thresholds
    intersection = (masks & truth).sum((-3, -2)).double()
    union = (masks | truth).sum((-3, -2)).double()
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
