"""What a training learns from: pairs with a better side, or samples with advantages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dfusion.advantages import RewardHistory
from dfusion.config import TrainingConfig
from dfusion.training_data import Example, TrainingPair, TrainingSample
from dfusion.types import Trajectory
from service.db.queries import results
from service.db.tables import Model
from service.jobs.kinds import RoundSpec, TrainingJobSpec
from service.states import SampleRole, Verdict
from worker.context import StageContext
from worker.pairs import PairSamples, StoredSample, load_pairs, stored_samples, trajectory_of, with_samples
from worker.scoring import scores_by
from worker.sources import pairs_to_train_on


@dataclass(frozen=True)
class TrainingExamples:
    """Examples, how many pairs are behind them, and in how many of those the target is the better side."""

    examples: list[Example]
    pairs: int
    adopted: int


@dataclass(frozen=True)
class ScoredSide:
    """One side of a pair with its score by the pair's scorer."""

    sample: StoredSample
    score: float


def training_examples(context: StageContext, config: TrainingConfig, parent: Model) -> TrainingExamples:
    """All that the stage's training is to learn from, to be trained on `parent`."""
    spec = context.spec_as(RoundSpec, TrainingJobSpec)
    if isinstance(spec, RoundSpec) and spec.fusion is None and not config.learns_from_pairs:
        samples = _plain_samples(context, config, spec, parent)
        return TrainingExamples(list(samples), 0, 0)
    if isinstance(spec, RoundSpec):
        pairs = load_pairs(context)
    else:
        with context.reading() as session:
            rows = pairs_to_train_on(session, spec)
        pairs = with_samples(context, rows)
    decided = [(pair, *sides) for pair in pairs if (sides := _sides(pair, spec)) is not None]
    stored = context.load_trajectories({s.sample.trajectory for _, *sides in decided for s in sides})
    if config.learns_from_pairs:
        masks = _masks(context, [pair for pair, *_ in decided]) if config.credit == "mask" else {}
        examples: Iterable[Example] = (
            _pair(pair, better, worse, stored, parent, masks.get(pair.row.id)) for pair, better, worse in decided
        )
    else:
        examples = _pair_samples(context, decided, stored, config, parent)
    adopted = sum(better.sample.row.role == SampleRole.TARGET for _, better, _ in decided)
    return TrainingExamples(list(examples), len(decided), adopted)


def _sides(pair: PairSamples, spec: RoundSpec | TrainingJobSpec) -> tuple[ScoredSide, ScoredSide] | None:
    asks = spec.review if isinstance(spec, RoundSpec) else spec.prefer == "verdicts"
    return better_and_worse(pair, asks)


def better_and_worse(pair: PairSamples, by_verdicts: bool) -> tuple[ScoredSide, ScoredSide] | None:
    """The better and the worse side: as people said, where they are asked and did, or by Eq. 7: the target where it
    was adopted, else the reference, over the base. None where people see no better one."""
    row = pair.row
    base, reference = ScoredSide(pair.base, row.base_score), ScoredSide(pair.reference, row.reference_score)
    target = ScoredSide(pair.target, row.target_score) if pair.target and row.target_score is not None else None
    if by_verdicts and row.verdict is not None:
        better = target or reference
        if row.verdict == Verdict.TARGET:
            return better, base
        return (base, better) if row.verdict == Verdict.BASE else None
    if row.adopted and target is not None:
        return target, base
    return reference, base


def _masks(context: StageContext, pairs: Sequence[PairSamples]) -> dict[str, torch.Tensor]:
    """Where each pair's target took from the reference, by the pair's id: its mask image, (H, W) in [0, 1]."""
    with context.reading() as session:
        images = results.artifacts(session, [pair.row.mask_artifact_id for pair in pairs if pair.row.mask_artifact_id])
    return {
        pair.row.id: torch.from_numpy(context.load_image(images[pair.row.mask_artifact_id])[..., 0] / 255).float()
        for pair in pairs
        if pair.row.mask_artifact_id is not None
    }


def _pair(
    pair: PairSamples,
    better: ScoredSide,
    worse: ScoredSide,
    stored: Mapping[str, Trajectory],
    parent: Model,
    mask: torch.Tensor | None,
) -> TrainingPair:
    sides = (better.sample.row.role, worse.sample.row.role)
    return TrainingPair(
        trajectory_of(better.sample, stored),
        trajectory_of(worse.sample, stored),
        pair.row.prompt,
        _drawn_by(better.sample, parent),
        _drawn_by(worse.sample, parent),
        mask if SampleRole.TARGET in sides else None,
    )


def _drawn_by(sample: StoredSample, parent: Model) -> bool:
    return sample.row.role != SampleRole.TARGET and sample.row.model_id == parent.id


def _pair_samples(
    context: StageContext,
    decided: Sequence[tuple[PairSamples, ScoredSide, ScoredSide]],
    stored: Mapping[str, Trajectory],
    config: TrainingConfig,
    parent: Model,
) -> Iterable[TrainingSample]:
    """Both sides of each pair, measured against all that the scorer gave the prompt's own samples up to their round."""
    jobs = {pair.base.row.job_id for pair, *_ in decided}
    newest = max((pair.base.row.round for pair, *_ in decided), default=0)
    histories: dict[tuple[str, str], RewardHistory] = {}
    for pair, better, worse in decided:
        row = pair.row
        scorer = (row.scorer, row.scorer_version)
        if scorer not in histories:
            histories[scorer] = _history(context, jobs, *scorer, newest)
        scores = [better.score, worse.score]
        advantages = histories[scorer].advantages(row.prompt, scores, config.advantage_clip)
        for side, advantage in zip((better, worse), advantages, strict=True):
            trajectory = trajectory_of(side.sample, stored)
            yield TrainingSample(trajectory, row.prompt, advantage, _drawn_by(side.sample, parent))


def _plain_samples(
    context: StageContext, config: TrainingConfig, spec: RoundSpec, parent: Model
) -> Iterable[TrainingSample]:
    """The round's own samples, for an algorithm that learns from samples without fusion."""
    scorer = context.bench.scorer(spec.reward or "")
    with context.reading() as session:
        roles = (SampleRole.PLAIN, SampleRole.REFERENCE, SampleRole.BASE)
        rows = [row for row, _ in results.round_images(session, context.claim.job_id, context.claim.round, roles)]
    known = scores_by(context, scorer, rows)
    found = stored_samples(context, rows)
    stored = context.load_trajectories({sample.trajectory for sample in found.values()})
    history = _history(context, {context.claim.job_id}, scorer.name, scorer.version, context.claim.round)
    prompts = {row.id: row.prompt for row in rows}
    for late in known.found:  # scored just now, since this worker's scorer is of another version
        history = history.extended({prompts[late.sample_id]: [late.value]})
    for row in rows:
        advantage = history.advantages(row.prompt, [known.by_sample[row.id]], config.advantage_clip)[0]
        sample = found[row.id]
        yield TrainingSample(trajectory_of(sample, stored), row.prompt, advantage, _drawn_by(sample, parent))


def _history(context: StageContext, jobs: Iterable[str], scorer: str, version: str, newest: int) -> RewardHistory:
    """Every score of the round `newest` and all earlier ones. It is read from the database, so a restart loses nothing
    of it."""
    with context.reading() as session:
        return RewardHistory().extended(results.score_history(session, jobs, scorer, version, newest))
