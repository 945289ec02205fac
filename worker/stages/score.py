"""Score: what the job's scorers give its samples, how different these are, and a warning where a reward misleads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sqlalchemy.orm import Session

from api.core.clock import now_seconds
from api.core.errors import ConflictError
from api.core.queries import jobs, results
from api.core.specs import FusionJobSpec, RoundSpec, SamplingJobSpec, ScorerRef
from api.core.states import SampleRole, Split
from api.core.tables import Metric, Score
from dfusion.errors import DFusionError
from dfusion.rewards import Scorer
from dfusion.rewards.watch import falling_figures
from worker.scoring import Scored, score_images
from worker.sources import samples_to_fuse
from worker.task import Record, Task

DIVERSITY = "diversity"
"""The name under which diversity stands among the metrics."""


def run(task: Task) -> Record:
    """Scores of the samples that this job made, or that a fusion is to pair."""
    if isinstance(task.spec, FusionJobSpec):
        return _score_missing(task, task.spec)
    scorers = [task.bench.scorer(ref) for ref in _scorers(task)]
    with task.reading() as session:
        found = results.round_images(session, task.claim.job_id, task.claim.round, [SampleRole.PLAIN])
    prompts = [sample.prompt for sample, _ in found]
    scored = score_images(task, scorers, [artifact for _, artifact in found], prompts)
    rows = _rows(scorers, [sample.id for sample, _ in found], scored)
    metrics = _metrics(task, found[0][0].model_id, prompts, scorers, scored) if found else []

    def record(session: Session) -> None:
        results.add_all(session, [*rows, *metrics])
        if isinstance(task.spec, RoundSpec):
            _warn(session, task, scorers)

    return record


def _scorers(task: Task) -> Sequence[ScorerRef]:
    match task.spec:
        case RoundSpec(reward=reward, watch=watch) if reward is not None:
            return [reward] if watch in (None, reward) else [reward, watch]
        case SamplingJobSpec(scorers=scorers):
            return scorers or ()
        case spec:
            raise ConflictError(f"nothing is scored for a {type(spec).__name__}")


def _score_missing(task: Task, spec: FusionJobSpec) -> Record:
    """By the fusion's reward, those samples that it has not scored yet."""
    scorer = task.bench.scorer(spec.reward or "")
    with task.reading() as session:
        samples = samples_to_fuse(session, spec)
        known = results.scores(session, [sample.id for sample in samples])
        by = (scorer.name, scorer.version)
        lacking = [s for s in samples if all((one.scorer, one.version) != by for one in known[s.id])]
        images = results.artifacts(session, [sample.image_artifact_id for sample in lacking])
    artifacts = [images[sample.image_artifact_id] for sample in lacking]
    scored = score_images(task, [scorer], artifacts, [sample.prompt for sample in lacking])
    rows = _rows([scorer], [sample.id for sample in lacking], scored)
    return lambda session: results.add_scores(session, rows)


def _rows(scorers: Sequence[Scorer], sample_ids: Sequence[str], scored: Scored) -> list[Score]:
    return [
        Score(sample_id=sample_id, scorer=scorer.name, version=scorer.version, value=value)
        for scorer, values in zip(scorers, scored.values, strict=True)
        for sample_id, value in zip(sample_ids, values, strict=True)
    ]


def _metrics(
    task: Task, model_id: str, prompts: Sequence[str], scorers: Sequence[Scorer], scored: Scored
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
            job_id=task.claim.job_id,
            round=task.claim.round,
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


def _warn(session: Session, task: Task, scorers: Sequence[Scorer]) -> None:
    """Say so in the job's events where the reward rises over the last rounds and other figures fall."""
    series: dict[str, list[float]] = {}
    for row in results.metrics(session, task.claim.job_id):
        if row.split == Split.ROLLOUT and row.round <= task.claim.round:
            series.setdefault(row.scorer, []).append(row.mean)
    reward = series.pop(scorers[0].name, [])
    others = {name: values for name, values in series.items() if len(values) == len(reward)}
    try:
        falling = falling_figures(reward, others)
    except DFusionError:  # too few rounds for a trend
        return
    if falling:
        message = f"the reward {scorers[0].name} rises while {' and '.join(falling)} fall: is it being gamed?"
        jobs.add_event(
            session, task.claim.job_id, "round.reward_misleads", message, task.claim.stage_id, falling=list(falling)
        )
