"""Select: references and bases, prompt by prompt."""

from __future__ import annotations

import statistics
from itertools import groupby

from sqlalchemy.orm import Session

from api.core.clock import now_seconds
from api.core.ids import IdKind, new_id
from api.core.queries import jobs, results
from api.core.states import SampleRole, Split
from api.core.tables import Metric, Pair, Sample
from dfusion.pairing import choose_pairs
from worker.task import Record, Task


def run(task: Task) -> Record:
    """The round's pairs, the roles of their samples, and the round's mean reward."""
    claim, scorer = task.claim, task.bench.scorer(task.reward)
    with task.reading() as session:
        found = results.round_images(session, claim.job_id, claim.round, [SampleRole.PLAIN])
        values = results.round_scores(session, claim.job_id, claim.round, scorer.name)
    samples = [sample for sample, _ in found]
    pairs: list[Pair] = []
    for _, group in groupby(samples, key=lambda sample: sample.prompt_index):
        pairs += _pairs_of_prompt(task, list(group), values, first=len(pairs))
    metric = _reward_metric(task, samples, [values[sample.id] for sample in samples])

    def record(session: Session) -> None:
        results.add_all(session, [*pairs, metric])
        results.mark_paired(session, claim.job_id, claim.round)
        message = f"{len(pairs)} pairs from {len(samples)} samples"
        jobs.add_event(session, claim.job_id, "round.paired", message, claim.stage_id, round=claim.round)

    return record


def _pairs_of_prompt(task: Task, samples: list[Sample], values: dict[str, float], first: int) -> list[Pair]:
    chosen = choose_pairs([values[sample.id] for sample in samples], task.spec.pairing)
    return [
        Pair(
            id=new_id(IdKind.PAIR),
            job_id=task.claim.job_id,
            stage_id=task.claim.stage_id,
            round=task.claim.round,
            number=first + place,
            prompt_set_id=samples[one.base].prompt_set_id,
            prompt_index=samples[one.base].prompt_index,
            prompt=samples[one.base].prompt,
            reference_id=samples[one.reference].id,
            base_id=samples[one.base].id,
            scorer=task.reward,
            reference_score=values[samples[one.reference].id],
            base_score=values[samples[one.base].id],
            figures={},
            created_at=now_seconds(),
        )
        for place, one in enumerate(chosen)
    ]


def _reward_metric(task: Task, samples: list[Sample], values: list[float]) -> Metric:
    scorer = task.bench.scorer(task.reward)
    return Metric(
        job_id=task.claim.job_id,
        round=task.claim.round,
        split=Split.ROLLOUT,
        scorer=scorer.name,
        version=scorer.version,
        model_id=samples[0].model_id,
        count=len(values),
        mean=statistics.fmean(values),
        std=statistics.pstdev(values),
        created_at=now_seconds(),
    )
