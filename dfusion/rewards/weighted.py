"""A weighted sum of scorers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dfusion.errors import InvalidInputError
from dfusion.rewards import Scorer
from dfusion.rewards.checks import check_images, checked_scores


class WeightedScorer:
    """The sum of weight * score over scorers, on their raw scores. Its version names its parts with their weights."""

    def __init__(self, parts: Sequence[tuple[float, Scorer]], *, name: str | None = None) -> None:
        """`parts` are (weight, scorer). Raises InvalidInputError if there are none."""
        if not parts:
            raise InvalidInputError("parts: expected at least one scorer, got none")

        self._parts = tuple(parts)
        self.version = _short("+".join(f"{weight!r}*{scorer.name}@{scorer.version}" for weight, scorer in parts), 200)
        self.name = name or _short("+".join(f"{weight!r}*{scorer.name}" for weight, scorer in parts), 100)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """The weighted sum for each image (B, H, W, 3) uint8. Raises as the parts do."""
        check_images(images, prompts)
        totals = np.zeros(len(prompts))
        for weight, scorer in self._parts:
            totals += weight * np.array(checked_scores(scorer.name, scorer.score(images, prompts), prompts))
        return checked_scores(self.name, totals.tolist(), prompts)


def _short(text: str, max_length: int) -> str:
    """Shorten a long text to its beginning and a digest, because the columns of names and versions are limited."""
    if len(text) <= max_length:
        return text
    return f"{text[: max_length - 13]}~{hashlib.sha256(text.encode()).hexdigest()[:12]}"
