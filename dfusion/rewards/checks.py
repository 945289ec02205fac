"""Checks of a scorer's input images and of its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dfusion.errors import NonFiniteError, ScorerError, ShapeMismatchError, shortened


def check_images(images: np.ndarray, prompts: Sequence[str]) -> None:
    """Raise ShapeMismatchError unless images are (B, H, W, 3) uint8 with one prompt each."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) != len(prompts):
        got = (tuple(images.shape), str(images.dtype))
        raise ShapeMismatchError("images", f"({len(prompts)}, H, W, 3) uint8", got)


def checked_scores(name: str, scores: object, count: int) -> list[float]:
    """Convert `scores`, a list or an array, to `count` finite floats. Raises ScorerError, NonFiniteError."""
    if isinstance(scores, np.ndarray):
        scores = scores.tolist()
    if not isinstance(scores, list) or len(scores) != count:
        got = f"{len(scores)}" if isinstance(scores, list) else type(scores).__name__
        raise ScorerError(f"{name}: expected {count} scores, one per image, got {got}")

    for score in scores:
        if isinstance(score, (bool, np.bool_)) or not isinstance(score, (int, float, np.integer, np.floating)):
            raise ScorerError(f"{name}: expected scores that are numbers, got {shortened(score)}")
        if not math.isfinite(score):
            raise NonFiniteError(f"{name}: expected finite scores, got NaN or infinity")
    return [float(score) for score in scores]
