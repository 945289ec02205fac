"""Reviewers as scorers: stored verdicts, looked up by image.

A scorer receives pixels and prompts only, so verdicts are stored by a key of both. The service computes the keys when
it sends the images to reviewers, and passes the mapping when it loads the scorer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dfusion.errors import NonFiniteError, ScorerError, shortened
from dfusion.rewards.checks import check_images


@dataclass(frozen=True)
class ImageVerdict:
    """A reviewer's verdict on two images of a prompt: one is better, a tie, or neither is good.

    first, second   keys of the images (`image_key`)
    """

    first: str
    second: str
    outcome: Literal["first", "second", "tie", "reject"]


def image_key(image: np.ndarray, prompt: str) -> str:
    """The key of an image (H, W, 3) uint8 and its prompt: 64 hex digits, the same on every machine."""
    check_images(image[None], [prompt])
    digest = hashlib.sha256(json.dumps([list(image.shape), prompt]).encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def win_shares(verdicts: Iterable[ImageVerdict]) -> dict[str, float]:
    """A score in [0, 1] for each image: the mean over its verdicts. A win is 1, a tie 1/2, otherwise 0."""
    points: dict[str, list[float]] = {}
    for verdict in verdicts:
        tie = 0.5 if verdict.outcome == "tie" else 0.0
        points.setdefault(verdict.first, []).append(1.0 if verdict.outcome == "first" else tie)
        points.setdefault(verdict.second, []).append(1.0 if verdict.outcome == "second" else tie)
    return {key: math.fsum(values) / len(values) for key, values in points.items()}


class VerdictScorer:
    """Scores from a mapping of `image_key` to a score. The version is a digest of the mapping."""

    def __init__(self, verdicts: Mapping[str, float], *, name: str = "verdicts") -> None:
        """Raises NonFiniteError for verdicts that are NaN or infinite."""
        if not all(math.isfinite(value) for value in verdicts.values()):
            raise NonFiniteError(f"{name}: expected finite verdicts, got NaN or infinity")
        self._verdicts = dict(verdicts)
        self.name = name
        self.version = hashlib.sha256(json.dumps(sorted(self._verdicts.items())).encode()).hexdigest()[:12]

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """The reviewers' score of each image (B, H, W, 3) uint8. Raises ScorerError for an image without a verdict."""
        check_images(images, prompts)
        keys = [image_key(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        missing = [row for row, key in enumerate(keys) if key not in self._verdicts]
        if missing:
            raise ScorerError(
                f"{self.name}: expected a verdict on every image, got none for images {shortened(missing)}"
            )
        return [float(self._verdicts[key]) for key in keys]
