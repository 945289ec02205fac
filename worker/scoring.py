"""Scores of images, by one scorer or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from api.core.tables import Artifact
from dfusion.errors import NonFiniteError
from dfusion.rewards import Scorer
from dfusion.rewards.watch import Diversity, diversity
from worker.task import Task, batches

_THUMBNAIL = 32
"""Side of the pictures whose pixels stand for an image where no scorer has features."""


@dataclass(frozen=True)
class Scored:
    """The scores of N images by each scorer, (scorers, N), and features of the images, (N, …) float32."""

    values: list[list[float]]
    features: np.ndarray
    features_of: str
    """Whose features they are."""

    def diversity(self, prompts: Sequence[str]) -> Diversity | None:
        """How different the images of each prompt are; None where no prompt has two."""
        if len(set(prompts)) == len(prompts):
            return None
        return diversity(self.features, prompts, "rms" if self.features_of == "pixels" else "cosine")


def score_images(task: Task, scorers: Sequence[Scorer], images: Sequence[Artifact], prompts: Sequence[str]) -> Scored:
    """Stored images by all scorers; each image is read once. Counts a step an image."""
    task.heartbeat.plan(len(images))
    values: list[list[float]] = [[] for _ in scorers]
    with_features = next((scorer for scorer in scorers if hasattr(scorer, "features")), None)
    features = []
    for part in batches(list(zip(images, prompts, strict=True)), task.bench.settings.batch_size):
        pixels = np.stack([task.load_image(artifact) for artifact, _ in part])
        for found, scorer in zip(values, scorers, strict=True):
            found += score_pixels(scorer, pixels, [prompt for _, prompt in part])
        features.append(_thumbnails(pixels) if with_features is None else with_features.features(pixels))
        task.heartbeat.step(len(part))
    name = "pixels" if with_features is None else f"{with_features.name}@{with_features.version}"
    return Scored(values, np.concatenate(features) if features else np.empty((0, 1), np.float32), name)


def score_pixels(scorer: Scorer, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    """The scores of images (B, H, W, 3) uint8. Raises NonFiniteError."""
    values = [float(value) for value in scorer.score(images, prompts)]
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(f"{scorer.name}: a score is NaN or infinite")
    return values


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """(B, 32, 32, 3) float32 in [0, 1]."""
    size = (_THUMBNAIL, _THUMBNAIL)
    small = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images]
    return np.stack(small).astype(np.float32) / 255
