"""Scores of images, by one scorer or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dfusion.rewards import Scorer
from dfusion.rewards.checks import checked_scores
from dfusion.rewards.watch import Diversity, diversity
from service.db.queries import results
from service.db.tables import Artifact, Sample, Score
from worker.context import StageContext, batches

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


def score_images(
    context: StageContext, scorers: Sequence[Scorer], images: Sequence[Artifact], prompts: Sequence[str]
) -> Scored:
    """Stored images by all scorers; each image is read once. Counts a step an image."""
    context.heartbeat.plan(len(images))
    values: list[list[float]] = [[] for _ in scorers]
    with_features = next((scorer for scorer in scorers if hasattr(scorer, "features")), None)
    features = []
    for part in batches(list(zip(images, prompts, strict=True)), context.bench.settings.batch_size):
        pixels = np.stack([context.load_image(artifact) for artifact, _ in part])
        for found, scorer in zip(values, scorers, strict=True):
            found += score_pixels(scorer, pixels, [prompt for _, prompt in part])
        features.append(_thumbnails(pixels) if with_features is None else with_features.features(pixels))
        context.heartbeat.step(len(part))
    name = "pixels" if with_features is None else f"{with_features.name}@{with_features.version}"
    return Scored(values, np.concatenate(features) if features else np.empty((0, 1), np.float32), name)


@dataclass(frozen=True)
class KnownScores:
    """Scores by sample; `found` are those among them that are in no table yet."""

    by_sample: Mapping[str, float]
    found: list[Score]


def scores_by(context: StageContext, scorer: Scorer, samples: Sequence[Sample]) -> KnownScores:
    """What this version of the scorer gives the samples: those that it has not scored yet, it scores now."""
    with context.reading() as session:
        rows = results.scores(session, [sample.id for sample in samples])
        stored = [row for of_sample in rows.values() for row in of_sample]
        known = {row.sample_id: row.value for row in stored if (row.scorer, row.version) == _identity(scorer)}
        lacking = [sample for sample in samples if sample.id not in known]
        images = results.artifacts(session, [sample.image_artifact_id for sample in lacking])
    if not lacking:
        return KnownScores(known, [])
    pictures = [images[sample.image_artifact_id] for sample in lacking]
    scored = score_images(context, [scorer], pictures, [sample.prompt for sample in lacking])
    found = score_rows([scorer], [sample.id for sample in lacking], scored.values)
    return KnownScores(known | {row.sample_id: row.value for row in found}, found)


def score_rows(scorers: Sequence[Scorer], sample_ids: Sequence[str], values: Sequence[Sequence[float]]) -> list[Score]:
    """Values (scorers, N) as rows, scorer by scorer."""
    return [
        Score(sample_id=sample_id, scorer=scorer.name, version=scorer.version, value=value)
        for scorer, of_scorer in zip(scorers, values, strict=True)
        for sample_id, value in zip(sample_ids, of_scorer, strict=True)
    ]


def _identity(scorer: Scorer) -> tuple[str, str]:
    return scorer.name, scorer.version


def score_pixels(scorer: Scorer, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    """The scores of images (B, H, W, 3) uint8. Raises ScorerError, NonFiniteError."""
    return checked_scores(scorer.name, scorer.score(images, prompts), len(prompts))


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """(B, 32, 32, 3) float32 in [0, 1]."""
    size = (_THUMBNAIL, _THUMBNAIL)
    small = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images]
    return np.stack(small).astype(np.float32) / 255
