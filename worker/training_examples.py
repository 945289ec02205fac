"""Training examples: pairs with a better side, or samples with advantages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

import torch
from sqlalchemy.orm import Session
from torch.nn import functional

from dfusion.advantages import RewardHistory
from dfusion.config import TrainingConfig
from dfusion.spool import SpooledTrajectory
from dfusion.training_data import Example, TrainingPair, TrainingSample
from service.db.queries import results, training_pairs
from service.db.tables import Artifact, Model, Pair
from service.jobs.execution import Claim
from service.jobs.kinds import RoundSpec, TrainingJobSpec
from service.states import SampleRole, Verdict
from worker.context import StageContext
from worker.inputs import SAMPLED_ROLES, StoredSample, load_round_samples, spec_as
from worker.pairs import StoredPair, load_pairs, load_round_pairs
from worker.scoring import ScoredSamples, load_scores, score_missing

_Histories = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]
"""All scores of the policy's own samples so far, by scorer and version, then by prompt. The database keeps them across
restarts."""


@dataclass(frozen=True)
class ScoredSide:
    """A side of a pair with its score by the pair's scorer."""

    sample: StoredSample
    score: float


@dataclass(frozen=True)
class RankedPair:
    """A pair with its sides by preference."""

    pair: StoredPair
    better: ScoredSide
    worse: ScoredSide

    @property
    def sides(self) -> tuple[ScoredSide, ScoredSide]:
        """Both sides, the better one first."""
        return self.better, self.worse


@dataclass(frozen=True)
class PairSource:
    """Pairs to train on.

    Attributes:
        pairs: The pairs that have a better side.
        masks: The fusion masks as images, by pair id. Empty unless the loss is weighted by them.
        histories: The scores for computing advantages; empty if the algorithm learns from pairs.
    """

    pairs: Sequence[RankedPair]
    masks: Mapping[str, Artifact]
    histories: _Histories


@dataclass(frozen=True)
class SampleSource:
    """Samples to train on, without fusion.

    Attributes:
        samples: The round's own samples with their scores, by prompt and number.
        histories: The scores for computing advantages.
    """

    samples: ScoredSamples
    histories: _Histories


@dataclass(frozen=True)
class VerdictSource:
    """Pairs with a verdict, whose sides are trained on with the verdict as their reward."""

    pairs: Sequence[StoredPair]


Source = PairSource | SampleSource | VerdictSource


@dataclass(frozen=True)
class TrainingExamples:
    """Training examples and their counts.

    Attributes:
        examples: Pairs or samples.
        pairs: The number of pairs they come from.
        adopted: The number of those pairs whose target is the better side.
    """

    examples: list[Example]
    pairs: int
    adopted: int


_VERDICT_REWARDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {Verdict.TARGET: (1.0, -1.0), Verdict.BASE: (-1.0, 1.0), Verdict.TIE: (0.0, 0.0), Verdict.REJECT: (-1.0, -1.0)}
)
"""The rewards of a verdict for the target, or the reference of a pair without one, and for the base."""


def load_source(session: Session, claim: Claim) -> Source:
    """Load the pairs or samples of the claim's training. Raises ConflictError for jobs without a training."""
    spec = spec_as(claim, RoundSpec, TrainingJobSpec)
    if isinstance(spec, RoundSpec) and _trains_on_samples(spec):
        samples = load_scores(session, load_round_samples(session, claim.job_id, claim.round, SAMPLED_ROLES))
        return SampleSource(samples, results.score_histories(session, [claim.job_id], claim.round))

    if isinstance(spec, RoundSpec):
        pairs = load_round_pairs(session, claim)
        if spec.update_reward == "verdict":
            return VerdictSource([pair for pair in pairs if pair.row.verdict is not None])
        ranked = _rank_pairs(pairs, by_verdicts=spec.is_reviewed)
    else:
        pairs = load_pairs(session, _pairs_to_train_on(session, spec))
        ranked = _rank_pairs(pairs, by_verdicts=spec.prefer == "verdicts")

    if not spec.training.learns_from_pairs:
        return PairSource(ranked, {}, _load_histories(session, ranked))
    masks = _load_masks(session, ranked) if spec.training.credit == "mask" else {}
    return PairSource(ranked, masks, {})


def _trains_on_samples(spec: RoundSpec) -> bool:
    """Whether the round trains on all its samples, without pairs."""
    return spec.fusion is None and not spec.training.learns_from_pairs and spec.update_reward == "score"


def _pairs_to_train_on(session: Session, spec: TrainingJobSpec) -> list[Pair]:
    pairs = training_pairs.named(session, spec.pairs or (), spec.jobs or ())
    return training_pairs.with_preferred_side(pairs) if spec.prefer == "verdicts" else pairs


def _load_histories(session: Session, pairs: Sequence[RankedPair]) -> _Histories:
    """The scores of all rounds up to the newest pair's round, in the jobs that sampled the pairs' bases."""
    bases = [ranked.pair.base.row for ranked in pairs]
    newest = max((base.round for base in bases), default=0)
    return results.score_histories(session, {base.job_id for base in bases}, newest)


def _load_masks(session: Session, pairs: Sequence[RankedPair]) -> dict[str, Artifact]:
    """The mask images of the pairs that have one, by pair id."""
    mask_ids = {ranked.pair.row.id: ranked.pair.row.mask_artifact_id for ranked in pairs}
    images = results.artifacts(session, [mask_id for mask_id in mask_ids.values() if mask_id is not None])
    return {pair_id: images[mask_id] for pair_id, mask_id in mask_ids.items() if mask_id is not None}


def _rank_pairs(pairs: Sequence[StoredPair], *, by_verdicts: bool) -> list[RankedPair]:
    """Rank the pairs. Pairs without a better side are skipped."""
    ranked = (rank_pair(pair, by_verdicts=by_verdicts) for pair in pairs)
    return [pair for pair in ranked if pair is not None]


def rank_pair(pair: StoredPair, *, by_verdicts: bool) -> RankedPair | None:
    """Rank the sides by the verdict if enabled and present, otherwise by Eq. 7.

    By Eq. 7, the target if adopted, otherwise the reference, is better than the base.

    Returns:
        The ranked pair; None if the verdict prefers neither side.
    """
    row = pair.row
    base = ScoredSide(pair.base, row.base_score)
    reference = ScoredSide(pair.reference, row.reference_score)
    target = None
    if pair.target is not None and row.target_score is not None:
        target = ScoredSide(pair.target, row.target_score)

    if by_verdicts and row.verdict is not None:
        judged = target or reference
        if row.verdict == Verdict.TARGET:
            return RankedPair(pair, judged, base)
        if row.verdict == Verdict.BASE:
            return RankedPair(pair, base, judged)
        return None

    if row.adopted and target is not None:
        return RankedPair(pair, target, base)
    return RankedPair(pair, reference, base)


def training_examples(context: StageContext, source: Source, config: TrainingConfig, parent: Model) -> TrainingExamples:
    """Load the training examples.

    Args:
        context: The stage.
        source: The result of `load_source`.
        config: The training's settings.
        parent: The model to train.

    Raises:
        TrajectoryGoneError: A trajectory is no longer stored.
        StorageError: A file cannot be read.
    """
    if isinstance(source, SampleSource):
        return TrainingExamples(list(_examples_of_samples(context, source, config, parent)), 0, 0)
    if isinstance(source, VerdictSource):
        preferred = sum(pair.row.verdict == Verdict.TARGET and pair.target is not None for pair in source.pairs)
        return TrainingExamples(list(_examples_of_verdicts(context, source, parent)), len(source.pairs), preferred)

    sides = chain.from_iterable(ranked.sides for ranked in source.pairs)
    trajectories = context.spool_trajectories([side.sample for side in sides])
    examples: list[Example] = []
    if config.learns_from_pairs:
        for ranked in source.pairs:
            image = source.masks.get(ranked.pair.row.id)
            examples.append(_training_pair(context, ranked, trajectories, parent, image))
    else:
        examples += _examples_of_sides(source, trajectories, config, parent)

    adopted = sum(ranked.better.sample.row.role == SampleRole.TARGET for ranked in source.pairs)
    return TrainingExamples(examples, len(source.pairs), adopted)


def _mask(context: StageContext, image: Artifact, size: tuple[int, int]) -> torch.Tensor:
    """The mask of an image at the latents' size (h, w), float32 in [0, 1]. At the image's size, it needs 64 times more
    memory."""
    mask = torch.from_numpy(context.load_image(image)[..., 0] / 255).float()
    return functional.interpolate(mask[None, None], size=size, mode="nearest")[0, 0]


def _training_pair(
    context: StageContext,
    ranked: RankedPair,
    trajectories: Mapping[str, SpooledTrajectory],
    parent: Model,
    mask_image: Artifact | None,
) -> TrainingPair:
    better = ranked.better.sample
    worse = ranked.worse.sample
    preferred = trajectories[better.row.id]
    mask = None
    if mask_image is not None and SampleRole.TARGET in (better.row.role, worse.row.role):
        mask = _mask(context, mask_image, preferred.latent_size)
    return TrainingPair(
        preferred,
        trajectories[worse.row.id],
        ranked.pair.row.prompt,
        _is_on_policy(better, parent),
        _is_on_policy(worse, parent),
        mask,
    )


def _is_on_policy(sample: StoredSample, parent: Model) -> bool:
    """Whether `parent`, the model to train, sampled it."""
    return sample.row.role != SampleRole.TARGET and sample.row.model_id == parent.id


def _examples_of_sides(
    source: PairSource, trajectories: Mapping[str, SpooledTrajectory], config: TrainingConfig, parent: Model
) -> Iterator[TrainingSample]:
    """Both sides of each pair, with advantages relative to all scores of the prompt by the pair's scorer."""
    histories: dict[tuple[str, str], RewardHistory] = {}
    for ranked in source.pairs:
        row = ranked.pair.row
        scorer = (row.scorer, row.scorer_version)
        if scorer not in histories:
            histories[scorer] = RewardHistory().extended(source.histories.get(scorer, {}))

        scores = [side.score for side in ranked.sides]
        advantages = histories[scorer].advantages(row.prompt, scores, config.advantage_clip)
        for side, advantage in zip(ranked.sides, advantages, strict=True):
            trajectory = trajectories[side.sample.row.id]
            yield TrainingSample(trajectory, row.prompt, advantage, _is_on_policy(side.sample, parent))


def _examples_of_verdicts(context: StageContext, source: VerdictSource, parent: Model) -> Iterator[TrainingSample]:
    """Both sides of each pair, with the rewards of its verdict as advantages: they compare the sides already."""
    judged = [(pair, pair.target or pair.reference) for pair in source.pairs]
    trajectories = context.spool_trajectories([*(side for _, side in judged), *(pair.base for pair, _ in judged)])
    for pair, side in judged:
        rewards = _VERDICT_REWARDS[pair.row.verdict or ""]
        for sample, reward in zip((side, pair.base), rewards, strict=True):
            trajectory = trajectories[sample.row.id]
            yield TrainingSample(trajectory, pair.row.prompt, reward, _is_on_policy(sample, parent))


def _examples_of_samples(
    context: StageContext, source: SampleSource, config: TrainingConfig, parent: Model
) -> Iterator[TrainingSample]:
    """The round's own samples, with advantages relative to all scores of the prompt by the reward."""
    # 1. scores by this worker's version of the reward
    reward = context.load_scorer(spec_as(context.claim, RoundSpec).reward or "")
    scores = score_missing(context, reward, source.samples)
    samples = source.samples.samples

    # 2. the history, including scores that are not stored yet
    prompts = {sample.row.id: sample.row.prompt for sample in samples}
    new: dict[str, list[float]] = defaultdict(list)
    for score in scores.new:
        new[prompts[score.sample_id]].append(score.value)
    history = RewardHistory().extended(source.histories.get((reward.name, reward.version), {})).extended(new)

    # 3. the examples
    trajectories = context.spool_trajectories(samples)
    for sample in samples:
        row = sample.row
        [advantage] = history.advantages(row.prompt, [scores.by_sample[row.id]], config.advantage_clip)
        yield TrainingSample(trajectories[row.id], row.prompt, advantage, _is_on_policy(sample, parent))
