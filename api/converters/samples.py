"""Conversion of samples and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from api.converters.common import artifact_path, utc
from api.converters.pairs import pair_out
from api.wire.samples import MaskPreviewOut, PreviewOut, SampleDetail, SampleOut, ScoreOut, TrajectoryOut
from service.db.tables import Pair, PairVerdict, Preview, Sample, Score


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
    preview: Preview | None,
) -> SampleDetail:
    fields = _sample_fields(row, scores)
    fields["links"] |= {"previews": "/previews"}
    of_sample = [pair_out(pair, samples, verdicts) for pair in pairs]
    previews = None if preview is None else preview_out(preview)
    return SampleDetail(**fields, pairs=of_sample, previews=previews)


def preview_out(row: Preview) -> PreviewOut:
    settings = row.mask_settings
    image = artifact_path(row.mask_artifact_id)
    return PreviewOut(
        job=row.job_id,
        num_steps=row.num_steps,
        steps=row.steps,
        strip=f"/artifacts/{row.strip_artifact_id}",
        mask=None if settings is None or image is None else MaskPreviewOut(image=image, **settings),
        created_at=utc(row.created_at),
    )
