"""Scores of stored images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from api.core.tables import Artifact
from dfusion.errors import NonFiniteError
from dfusion.rewards import Scorer
from worker.task import Task, batches


def score_images(task: Task, scorer: Scorer, images: Sequence[Artifact], prompts: Sequence[str]) -> list[float]:
    """A finite score for each stored image. Counts a step an image."""
    task.heartbeat.plan(len(images))
    values: list[float] = []
    for part in batches(list(zip(images, prompts, strict=True)), task.bench.settings.batch_size):
        pixels = np.stack([task.load_image(artifact) for artifact, _ in part])
        values += score_pixels(scorer, pixels, [prompt for _, prompt in part])
        task.heartbeat.step(len(part))
    return values


def score_pixels(scorer: Scorer, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    """The scores of images (B, H, W, 3) uint8. Raises NonFiniteError."""
    values = [float(value) for value in scorer.score(images, prompts)]
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(f"{scorer.name}: a score is NaN or infinite")
    return values
