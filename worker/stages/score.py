"""Score: the reward of each of the round's samples."""

from __future__ import annotations

from sqlalchemy.orm import Session

from api.core.queries import results
from api.core.states import SampleRole
from api.core.tables import Score
from worker.scoring import score_images
from worker.task import Record, Task


def run(task: Task) -> Record:
    """Scores of the round's plain samples by the reward."""
    with task.reading() as session:
        found = results.round_images(session, task.claim.job_id, task.claim.round, [SampleRole.PLAIN])
    scorer = task.bench.scorer(task.reward)
    values = score_images(task, scorer, [artifact for _, artifact in found], [sample.prompt for sample, _ in found])
    rows = [
        Score(sample_id=sample.id, scorer=scorer.name, version=scorer.version, value=value)
        for (sample, _), value in zip(found, values, strict=True)
    ]

    def record(session: Session) -> None:
        results.add_all(session, rows)

    return record
