"""Which previews a request for them needs, and which of them exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from dfusion.config import FusionConfig
from service.db.queries import collection, jobs, previews, results
from service.db.tables import Pair, Preview
from service.jobs.kinds import FusionJobSpec, PreviewJobSpec, RoundSpec, spec_of

MaskSettings = dict[str, Any]
"""The thresholds and the settings of a fusion that its masks depend on, as JSON."""
_SETTINGS = ("first_step", "last_step", "merge")


def mask_settings(thresholds: Sequence[float], fusion: FusionConfig) -> MaskSettings:
    """The settings of masks with these thresholds in this fusion."""
    return {"thresholds": list(thresholds), **fusion.model_dump(include=set(_SETTINGS))}


def fusion_of(settings: MaskSettings) -> FusionConfig:
    """A fusion with these masks."""
    return FusionConfig.model_validate({name: settings[name] for name in _SETTINGS})


def masks_of(session: Session, pairs: Sequence[Pair]) -> dict[str, MaskSettings]:
    """The settings of the masks of these pairs, by their references. Pairs without thresholds have none."""
    masks = {}
    owners = jobs.by_ids(session, {pair.job_id for pair in pairs})
    for pair in pairs:
        job = owners.get(pair.job_id)
        spec = None if job is None else spec_of(job.kind, job.spec)
        fusion = spec.fusion if isinstance(spec, (RoundSpec, FusionJobSpec)) else None
        if fusion is not None and pair.thresholds:
            masks[pair.reference_id] = mask_settings(pair.thresholds, fusion)
    return masks


def requested(session: Session, spec: PreviewJobSpec) -> dict[str, MaskSettings | None]:
    """The samples of a request, each with the settings of its masks; None for samples without masks.

    Samples that do not exist are left out.
    """
    if spec.pair is not None:
        pairs = results.pairs(session, [spec.pair])
        sample_ids = results.sides_of(pairs)
    else:
        sample_ids = set(results.samples(session, spec.samples or ()))
        pairs = previews.newest_fused(session, sample_ids)

    masks = masks_of(session, pairs)
    return {sample_id: masks.get(sample_id) for sample_id in sorted(sample_ids)}


def missing(session: Session, spec: PreviewJobSpec) -> dict[str, MaskSettings | None]:
    """The samples of a request that have no such preview yet."""
    samples = requested(session, spec)
    existing = previews.of_samples(session, samples)
    return {sample_id: masks for sample_id, masks in samples.items() if newest(existing[sample_id], masks) is None}


def newest(rows: Sequence[Preview], masks: MaskSettings | None) -> Preview | None:
    """The newest of a sample's previews that has these masks; any masks or none for None."""
    return next((row for row in rows if masks is None or row.mask_settings == masks), None)


def job_with_previews(session: Session, spec: PreviewJobSpec) -> str | None:
    """The job that has made all previews of a request, or will make them. None if a new job is needed."""
    # 1. a job that has not ended
    samples = set(spec.samples or ())
    if spec.pair is not None:
        sources = collection.jobs_of_pairs(session, [spec.pair]) | jobs.owners(session, [spec.pair])
    else:
        sources = collection.jobs_of_samples(session, samples)
    for job in previews.unfinished(session, sources):
        other = spec_of(job.kind, job.spec)
        if isinstance(other, PreviewJobSpec) and other.pair == spec.pair and samples <= set(other.samples or ()):
            return job.id

    # 2. existing previews
    needed = requested(session, spec)
    existing = previews.of_samples(session, needed)
    rows = [newest(existing[sample_id], masks) for sample_id, masks in needed.items()]
    made_by = {row.job_id for row in rows if row is not None}
    is_complete = bool(rows) and None not in rows and samples <= needed.keys()
    return max(made_by) if is_complete else None
