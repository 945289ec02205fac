"""Scorers: how well an image fits its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dfusion.catalogue import SCORERS, SHAPES_CLIP_FOLDER
from dfusion.errors import ModelNotFoundError


class Scorer(Protocol):
    """Scores images by their prompts; higher is better. `name` and `version` are recorded with every score."""

    name: str
    version: str

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """A score for each image: images (B, H, W, 3) uint8, one prompt for each."""
        ...


def load_scorer(name: str, device: str = "cpu") -> Scorer:
    """The built-in scorer of that name. Raises ModelNotFoundError if there is none or its files are missing."""
    if name == "shapes-clip":
        from dfusion.rewards.clip import ClipScorer

        return ClipScorer.from_folder(SHAPES_CLIP_FOLDER, name=name, device=device)
    if name == "shapes-judge":
        from dfusion.shapes.judge import JudgeScorer

        return JudgeScorer.load()
    raise ModelNotFoundError(f"scorer: expected one of {sorted(SCORERS)}, got {name!r}")
