"""Score: what the job's scorers give its samples, how different these are, and a warning where a reward misleads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sqlalchemy.orm import Session

from dfusion.rewards import Scorer
from dfusion.rewards.watch import falling_figures
from service.db.clock import now_seconds
from service.db.queries import jobs, results
from service.db.tables import Metric
from service.errors import ConflictError
from service.jobs.kinds import FusionJobSpec, RoundSpec, SamplingJobSpec, ScorerRef
from service.states import DIVERSITY, SampleRole, Split
from worker.context import Record, StageContext
from worker.scoring import Scored, score_images, score_rows, scores_by
from worker.sources import samples_to_fuse


def run(context: StageContext) -> Record:
    """Scores of the samples that this job made, or that a fusion is to pair."""
    if isinstance(context.spec, FusionJobSpec):
        with context.reading() as session:
            samples = samples_to_fuse(session, context.spec)
        found = scores_by(context, context.bench.scorer(context.spec.reward or ""), samples).found
        return lambda session: results.add_scores(session, found)
    scorers = [context.bench.scorer(ref) for ref in _scorers(context)]
    with context.reading() as session:
        made = results.round_images(session, context.claim.job_id, context.claim.round, [SampleRole.PLAIN])
    prompts = [sample.prompt for sample, _ in made]
    scored = score_images(context, scorers, [artifact for _, artifact in made], prompts)
    rows = score_rows(scorers, [sample.id for sample, _ in made], scored.values)
    metrics = _metrics(context, made[0][0].model_id, prompts, scorers, scored) if made else []

    def record(session: Session) -> None:
        results.add_all(session, [*rows, *metrics])
        if isinstance(context.spec, RoundSpec):
            _warn(session, context, scorers)

    return record


def _scorers(context: StageContext) -> Sequence[ScorerRef]:
    match context.spec:
        case RoundSpec(reward=reward, watch=watch) if reward is not None:
            return [reward] if watch in (None, reward) else [reward, watch]
        case SamplingJobSpec(scorers=scorers):
            return scorers or ()
        case spec:
            raise ConflictError(f"nothing is scored for a {type(spec).__name__}")


def _metrics(
    context: StageContext, model_id: str, prompts: Sequence[str], scorers: Sequence[Scorer], scored: Scored
) -> list[Metric]:
    """The round's means by each scorer, and its diversity."""
    found = [
        (scorer.name, scorer.version, values) for scorer, values in zip(scorers, scored.values, strict=True) if values
    ]
    spread = scored.diversity(prompts)
    if spread is not None:
        found.append((DIVERSITY, scored.features_of, list(spread.prompts.values())))
    return [
        Metric(
            job_id=context.claim.job_id,
            round=context.claim.round,
            split=Split.ROLLOUT,
            scorer=name,
            version=version,
            model_id=model_id,
            count=len(values),
            mean=statistics.fmean(values),
            std=statistics.pstdev(values),
            created_at=now_seconds(),
        )
        for name, version, values in found
    ]


def _warn(session: Session, context: StageContext, scorers: Sequence[Scorer]) -> None:
    """Say so in the job's events where the reward rises over the last rounds and other figures fall."""
    series: dict[tuple[str, str], list[float]] = {}
    for row in results.metrics(session, context.claim.job_id):
        if row.split == Split.ROLLOUT and row.round <= context.claim.round:
            series.setdefault((row.scorer, row.version), []).append(row.mean)
    reward = series.pop((scorers[0].name, scorers[0].version), [])
    others = {name: values for (name, _), values in series.items() if len(values) == len(reward)}
    falling = falling_figures(reward, others)
    if falling:
        message = f"the reward {scorers[0].name} rises while {' and '.join(falling)} fall: is it being gamed?"
        jobs.add_event(
            session,
            context.claim.job_id,
            "round.reward_misleads",
            message,
            context.claim.stage_id,
            falling=list(falling),
        )
