"""Scores of images by one or several scorers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from PIL import Image
from sqlalchemy.orm import Session

from dfusion.errors import InvalidScoreError
from dfusion.rewards import Scorer
from dfusion.rewards.checks import checked_scores
from dfusion.rewards.watch import diversity
from dfusion.rewards.weighted import PartScale, RunningScale, WeightedScorer
from service.db.queries import results, stages
from service.db.tables import Sample, Score
from service.jobs.execution import Claim
from service.jobs.kinds import ScorerRef
from service.states import StageKind
from worker.context import StageContext, batches
from worker.inputs import StoredSample

_THUMBNAIL = 32
"""Side of the thumbnails whose pixels are an image's features if no scorer has features."""
_PIXELS = "pixels"


@dataclass(frozen=True)
class ImageScores:
    """The scores of N images by S scorers.

    Attributes:
        values: (S, N).
        features: (N, ...) float32, one row per image.
        features_name: The scorer of the features with its version; "pixels" if no scorer has features.
    """

    values: list[list[float]]
    features: np.ndarray
    features_name: str

    def diversity(self, prompts: Sequence[int]) -> list[float]:
        """The diversity of each prompt that has two images or more, in order.

        Args:
            prompts: The index of each image's prompt.
        """
        if len(set(prompts)) == len(prompts):
            return []
        metric: Literal["rms", "cosine"] = "rms" if self.features_name == _PIXELS else "cosine"
        return list(diversity(self.features, list(map(str, prompts)), metric).prompts.values())


@dataclass(frozen=True)
class ScorerVersion:
    """A version of a scorer, as it is recorded with every score."""

    name: str
    version: str

    @classmethod
    def of(cls, scorer: Scorer) -> ScorerVersion:
        """The version of a loaded scorer."""
        return cls(scorer.name, scorer.version)


@dataclass(frozen=True)
class ScoringSummary:
    """The summary of a shard that scores, for the stage that joins all shards and loads no scorer.

    Attributes:
        scorers: The versions of the job's scorers, in the order of its request.
        features: The name of the features that the diversity is measured with.
        diversity: The diversity of each prompt of the shard, in order.
    """

    scorers: tuple[ScorerVersion, ...]
    features: str = _PIXELS
    diversity: tuple[float, ...] = ()

    @classmethod
    def of(cls, scorers: Sequence[Scorer]) -> ScoringSummary:
        """The summary of a stage without diversity."""
        return cls(tuple(map(ScorerVersion.of, scorers)))


def load_summaries(session: Session, claim: Claim, kind: StageKind) -> list[ScoringSummary]:
    """The summaries of the claim's round by shard; empty if a shard has none (an earlier version ran it)."""
    stored = stages.summaries(session, claim.job_id, claim.round, kind)
    summaries = []
    for summary in stored:
        if summary is None:
            return []
        scorers = tuple(ScorerVersion(**scorer) for scorer in summary["scorers"])
        summaries.append(ScoringSummary(scorers, summary["features"], tuple(summary["diversity"])))
    return summaries


def record_summary(session: Session, claim: Claim, summary: ScoringSummary) -> None:
    """Store the summary of a stage, for the stage that joins all shards."""
    stages.set_summary(session, claim.stage_id, asdict(summary))


def score_images(context: StageContext, scorers: Sequence[Scorer], samples: Sequence[StoredSample]) -> ImageScores:
    """Score stored samples. Each image is read once and counts as one step.

    Args:
        context: The stage. This function plans its steps.
        scorers: S scorers.
        samples: N stored samples.

    Returns:
        The scores and features, in the order of the samples.

    Raises:
        ScorerError, NonFiniteError, StorageError: An image cannot be scored or read.
    """
    context.heartbeat.plan(len(samples))
    values: list[list[float]] = [[] for _ in scorers]
    features = []
    with_features = next((scorer for scorer in scorers if hasattr(scorer, "features")), None)

    for batch in batches(samples, context.bench.settings.batch_size):
        pixels = np.stack(context.load_images([sample.image for sample in batch]))
        rows = [sample.row for sample in batch]
        for scorer_values, batch_values in zip(values, _score_batch(context, scorers, pixels, rows), strict=True):
            scorer_values += batch_values
        features.append(_thumbnails(pixels) if with_features is None else _features(context, with_features, pixels))
        context.heartbeat.step(len(batch))

    name = _PIXELS if with_features is None else f"{with_features.name}@{with_features.version}"
    return ImageScores(values, np.concatenate(features) if features else np.empty((0, 1), np.float32), name)


def _score_batch(
    context: StageContext, scorers: Sequence[Scorer], pixels: np.ndarray, samples: Sequence[Sample]
) -> list[list[float]]:
    """The scores by each scorer. A sum whose parts are among the scorers is computed from their scores."""
    by_scorer = {}
    for scorer in scorers:
        if not _parts_among(scorer, scorers):
            by_scorer[id(scorer)] = score_pixels(context, scorer, pixels, samples)

    values = []
    for scorer in scorers:
        if isinstance(scorer, WeightedScorer) and id(scorer) not in by_scorer:
            part_scores = [by_scorer[id(part)] for _, part in scorer.parts]
            prompts = [sample.prompt for sample in samples]
            values.append(checked_scores(scorer.name, scorer.combined(part_scores), prompts))
        else:
            values.append(by_scorer[id(scorer)])
    return values


def _parts_among(scorer: Scorer, scorers: Sequence[Scorer]) -> bool:
    known = {id(other) for other in scorers if not isinstance(other, WeightedScorer)}
    return isinstance(scorer, WeightedScorer) and all(id(part) in known for _, part in scorer.parts)


@dataclass(frozen=True)
class ScoredSamples:
    """Samples with all their stored scores.

    Attributes:
        samples: The samples.
        scores: Their scores by sample id, of any scorer and version.
    """

    samples: Sequence[StoredSample]
    scores: Mapping[str, Sequence[Score]]


def load_scores(session: Session, samples: Sequence[StoredSample]) -> ScoredSamples:
    """These samples with all their stored scores."""
    return ScoredSamples(samples, results.scores(session, [sample.row.id for sample in samples]))


@dataclass(frozen=True)
class CompleteScores:
    """The scores of samples by one version of a scorer.

    Attributes:
        scorer: The version of the scorer.
        by_sample: The score of every sample, by sample id.
        new: The scores that are not stored yet.
    """

    scorer: ScorerVersion
    by_sample: Mapping[str, float]
    new: Sequence[Score] = ()


def join_scores(
    context: StageContext, scorer_refs: Sequence[ScorerRef], known: ScoredSamples, summaries: Sequence[ScoringSummary]
) -> list[CompleteScores]:
    """The scores of samples that several shards have scored.

    A scorer is loaded only if the shards used different versions of it, to complete the scores with this worker's.

    Args:
        context: The stage.
        scorer_refs: The job's scorers.
        known: The samples with their stored scores.
        summaries: The summaries of the shards.
    """
    joined = []
    for position, scorer_ref in enumerate(scorer_refs):
        # a shard that an earlier version scored has no parts of a sum
        versions = {summary.scorers[position] for summary in summaries if position < len(summary.scorers)}
        stored = _stored_scores(known, versions.pop()) if len(versions) == 1 else None
        if stored is None or len(stored.by_sample) < len(known.samples):
            joined.append(score_missing(context, context.load_scorer(scorer_ref), known))
        else:
            joined.append(stored)
    return joined


ScalesByVersion = Mapping[ScorerVersion, PartScale]
"""The scale of the run's stored scores, for each version of the parts of a normalised sum."""


def load_scales(session: Session, claim: Claim, names: Sequence[str]) -> ScalesByVersion:
    """The scales of the scores of the job's samples up to the claim's round, by these scorers. Targets do not count.

    The stored scores are the state of the scale, so a retried stage and a continued job have the same.
    """
    rows = results.score_scales(session, claim.job_id, claim.round, names)
    return {ScorerVersion(name, version): PartScale(count, mean, std) for name, version, count, mean, std in rows}


def scaled_sum(reward: WeightedScorer, scales: ScalesByVersion, new: Sequence[CompleteScores] = ()) -> WeightedScorer:
    """The normalised sum with the run's scale.

    Args:
        reward: The sum.
        scales: The scales of the stored scores.
        new: Scores of the parts, of which some are not stored yet.
    """
    parts = [ScorerVersion.of(scorer) for _, scorer in reward.parts]
    scale = RunningScale({part.name: scales[part] for part in parts if part in scales})
    unstored = {scores.scorer.name: [score.value for score in scores.new] for scores in new if scores.scorer in parts}
    return reward.scaled(scale.extended(unstored))


def score_missing(context: StageContext, scorer: Scorer, known: ScoredSamples) -> CompleteScores:
    """Complete the scores of samples: score those that this version of the scorer has not scored yet."""
    stored = _stored_scores(known, ScorerVersion.of(scorer))
    missing = [sample for sample in known.samples if sample.row.id not in stored.by_sample]
    if not missing:
        return stored

    scored = score_images(context, [scorer], missing)
    new = score_rows([scorer], [sample.row.id for sample in missing], scored.values)
    values = {score.sample_id: score.value for score in new}
    return CompleteScores(stored.scorer, {**stored.by_sample, **values}, new)


def _stored_scores(known: ScoredSamples, scorer: ScorerVersion) -> CompleteScores:
    stored = {}
    for scores in known.scores.values():
        for score in scores:
            if (score.scorer, score.version) == (scorer.name, scorer.version):
                stored[score.sample_id] = score.value
    return CompleteScores(scorer, stored)


def score_rows(scorers: Sequence[Scorer], sample_ids: Sequence[str], values: Sequence[Sequence[float]]) -> list[Score]:
    """Rows of the values (S, N) of S scorers for N samples, scorer by scorer."""
    rows = []
    for scorer, scorer_values in zip(scorers, values, strict=True):
        for sample_id, value in zip(sample_ids, scorer_values, strict=True):
            rows.append(Score(sample_id=sample_id, scorer=scorer.name, version=scorer.version, value=value))
    return rows


def score_pixels(context: StageContext, scorer: Scorer, images: np.ndarray, samples: Sequence[Sample]) -> list[float]:
    """The scores of images (B, H, W, 3) uint8 of these samples, in batches that fit into memory.

    Raises ScorerError, NonFiniteError. If one image has no valid score, the message names its sample.
    """

    def score(batch: Sequence[int]) -> list[float]:
        context.heartbeat.check()
        return _scores(scorer, images[list(batch)], [samples[i] for i in batch])

    return list(chain.from_iterable(context.in_batches(range(len(samples)), score)))


def _scores(scorer: Scorer, images: np.ndarray, samples: Sequence[Sample]) -> list[float]:
    prompts = [sample.prompt for sample in samples]
    try:
        return checked_scores(scorer.name, scorer.score(images, prompts), prompts)
    except InvalidScoreError as error:
        sample = samples[error.row]
        message = f"{error}: sample {sample.id}, prompt {sample.prompt_index}, seed {sample.seed}"
        raise type(error)(message, error.row) from error


def _features(context: StageContext, scorer: Any, images: np.ndarray) -> np.ndarray:
    """The features of images (B, H, W, 3) uint8 by a scorer that has them, (B, D)."""
    batches_of_features = context.in_batches(range(len(images)), lambda batch: scorer.features(images[list(batch)]))
    return np.concatenate(list(batches_of_features))


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """(B, 32, 32, 3) float32 in [0, 1]."""
    size = (_THUMBNAIL, _THUMBNAIL)
    thumbnails = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images]
    return np.stack(thumbnails).astype(np.float32) / 255
