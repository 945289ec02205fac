"""Checks of a scorer's input images and of its scores, and the batches of a model call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dfusion.errors import (
    InvalidScoreError,
    NonFiniteScoreError,
    ScorerError,
    ShapeMismatchError,
    shortened,
)

BATCH = 64
"""Images in one model call."""


def check_images(images: np.ndarray, prompts: Sequence[str]) -> None:
    """Raise ShapeMismatchError unless images are (B, H, W, 3) uint8 with one prompt each."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) != len(prompts):
        got = (tuple(images.shape), str(images.dtype))
        raise ShapeMismatchError("images", f"({len(prompts)}, H, W, 3) uint8", got)


def checked_scores(name: str, scores: object, prompts: Sequence[str], *, first: int = 0) -> list[float]:
    """Convert `scores`, a list or an array, to one finite float per prompt.

    Args:
        name: The scorer's name.
        scores: What the scorer returned.
        prompts: The prompts of the images.
        first: The index of the first image, if the scorer received only a part of the images.

    Raises:
        ScorerError: Not a list, or not one score per image.
        InvalidScoreError: A score is not a number, for example None. The message names the image.
        NonFiniteScoreError: A score is NaN or infinite. The message names the image.
    """
    if isinstance(scores, np.ndarray):
        scores = scores.tolist()
    if not isinstance(scores, list) or len(scores) != len(prompts):
        got = f"{len(scores)}" if isinstance(scores, list) else type(scores).__name__
        raise ScorerError(f"{name}: expected {len(prompts)} scores, one per image, got {got}")

    for row, (score, prompt) in enumerate(zip(scores, prompts, strict=True), start=first):
        image = f"{name}: image {row} ({shortened(prompt)})"
        if isinstance(score, (bool, np.bool_)) or not isinstance(score, (int, float, np.integer, np.floating)):
            raise InvalidScoreError(f"{image}: expected a score that is a number, got {shortened(score)}", row)
        if not _is_finite(score):
            raise NonFiniteScoreError(f"{image}: expected a finite score, got {shortened(score)}", row)
    return [float(score) for score in scores]


def _is_finite(score: int | float | np.number[Any]) -> bool:
    try:
        return math.isfinite(float(score))
    except OverflowError:  # an integer above the largest float
        return False


def score_in_batches(
    name: str, images: np.ndarray, prompts: Sequence[str], score: Callable[[np.ndarray, list[str]], Any]
) -> list[float]:
    """Score images (B, H, W, 3) uint8 in calls of at most `BATCH`.

    Args:
        name: The scorer's name.
        images: The images.
        prompts: Their prompts.
        score: Scores the images and prompts of a call. It returns a tensor (B,).

    Raises:
        ShapeMismatchError: Other images, or another number of prompts.
        NonFiniteScoreError: A score is NaN or infinite.
    """
    check_images(images, prompts)
    scores: list[float] = []
    for part in batches(len(images)):
        scores += score(images[part], list(prompts[part])).tolist()
    return checked_scores(name, scores, prompts)


def batches(count: int) -> Iterator[slice]:
    """The slices of `count` images, in calls of at most `BATCH`."""
    for start in range(0, count, BATCH):
        yield slice(start, start + BATCH)
