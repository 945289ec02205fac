"""Conversion of samples and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from api.converters.common import utc
from api.converters.pairs import pair_out
from api.wire.samples import SampleDetail, SampleOut, ScoreOut, TrajectoryOut
from service.db.tables import Pair, PairVerdict, Sample, Score


def score_out(row: Score) -> ScoreOut:
    return ScoreOut(scorer=row.scorer, version=row.version, value=row.value)


def sample_out(row: Sample, scores: Sequence[Score]) -> SampleOut:
    return SampleOut(**_sample_fields(row, scores))


def _sample_fields(row: Sample, scores: Sequence[Score]) -> dict[str, Any]:
    trajectory = None
    if row.trajectory_artifact_id is not None and row.trajectory_row is not None:
        trajectory = TrajectoryOut(artifact=f"/artifacts/{row.trajectory_artifact_id}", row=row.trajectory_row)

    return {
        "id": row.id,
        "job": row.job_id,
        "round": row.round,
        "role": row.role,
        "split": row.split,
        "prompt": row.prompt,
        "prompt_index": row.prompt_index,
        "number": row.number,
        "seed": row.seed,
        "model": row.model_id,
        "scores": [score_out(score) for score in scores],
        "image": f"/artifacts/{row.image_artifact_id}",
        "trajectory": trajectory,
        "created_at": utc(row.created_at),
        "links": {"self": f"/samples/{row.id}", "job": f"/jobs/{row.job_id}", "model": f"/models/{row.model_id}"},
    }


def sample_detail(
    row: Sample,
    scores: Sequence[Score],
    pairs: Sequence[Pair],
    samples: Mapping[str, Sample],
    verdicts: Mapping[str, Sequence[PairVerdict]],
) -> SampleDetail:
    of_sample = [pair_out(pair, samples, verdicts) for pair in pairs]
    return SampleDetail(**_sample_fields(row, scores), pairs=of_sample)
