"""Export: an adapter for other programs, loaded again and checked by its image, or a job's pairs as a data set."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from dfusion.export import export_adapter
from dfusion.preference_data import PreferencePair, write_preferences
from service.db.clock import now_seconds
from service.db.queries import jobs, results
from service.db.tables import Export
from service.errors import ConflictError
from service.ids import IdKind, new_id
from service.jobs.kinds import ExportJobSpec
from worker.context import SAFETENSORS, Record, StageContext
from worker.pairs import PairSamples, StoredSample, with_samples
from worker.training_examples import better_and_worse

_PARQUET = "application/vnd.apache.parquet"
_ZIP = "application/zip"


def run(context: StageContext) -> Record:
    """The export's file; done only when it was read again."""
    spec = context.spec_as(ExportJobSpec)
    file, figures = _pairs(context, spec.job, spec.prefer == "verdicts") if spec.job else _adapter(context, spec)
    with context.reading() as session:
        model_id = jobs.get(session, context.claim.job_id).model_id
    row = Export(
        id=new_id(IdKind.EXPORT),
        job_id=context.claim.job_id,
        model_id=None if spec.job else model_id,
        of_job_id=spec.job,
        format=spec.format,
        artifact_id=file,
        figures=figures,
        created_at=now_seconds(),
    )

    def record(session: Session) -> None:
        context.record_artifacts(session)
        results.add_all(session, [row])

    return record


def _adapter(context: StageContext, spec: ExportJobSpec) -> tuple[str, dict[str, Any]]:
    row, adapter = context.model_before(0)
    if adapter is None or spec.format == "parquet":
        raise ConflictError(f"{row.id} has no adapter to export as {spec.format}")
    source = context.bench.models.source(row.base)
    out = context.scratch / ("merged" if spec.format == "merged" else f"{spec.format}.safetensors")
    with context.bench.store.borrow(adapter.key, adapter.sha256) as file:
        report = export_adapter(source, file, out, spec.format, device=context.bench.device)
    if spec.format != "merged":
        return context.store("export", out, SAFETENSORS), asdict(report)
    packed = Path(shutil.make_archive(str(out), "zip", out))
    shutil.rmtree(out)
    return context.store("export", packed, _ZIP), asdict(report)


def _pairs(context: StageContext, job_id: str, by_verdicts: bool) -> tuple[str, dict[str, Any]]:
    with context.reading() as session:
        rows = results.job_pairs(session, job_id)
    pairs = with_samples(context, rows)
    context.heartbeat.plan(len(pairs))
    out = context.scratch / "pairs.parquet"
    count = write_preferences(out, _preferences(context, pairs, by_verdicts))
    return context.store("export", out, _PARQUET), {"pairs": count}


def _preferences(context: StageContext, pairs: list[PairSamples], by_verdicts: bool) -> Iterator[PreferencePair]:
    """The side that trains over the other; pairs without a better one are left out."""
    for pair in pairs:
        row, sides = pair.row, better_and_worse(pair, by_verdicts)
        context.heartbeat.step()
        if sides is None:
            continue
        better, worse = sides
        yield PreferencePair(
            pair_id=row.id,
            caption=row.prompt,
            images=(context.read_bytes(better.sample.image), context.read_bytes(worse.sample.image)),
            roles=(_role(pair, better.sample), _role(pair, worse.sample)),
            seeds=(better.sample.row.seed, worse.sample.row.seed),
            scores=(better.score, worse.score),
            scorer=f"{row.scorer}@{row.scorer_version}",
            round=row.round,
            adopted=None if pair.target is None else bool(row.adopted),
            mask_cover=row.figures.get("mask_cover"),
            figures=_flat(row.figures),
        )


def _role(pair: PairSamples, sample: StoredSample) -> str:
    """What the sample is in this pair; it may be something else in another."""
    names = {pair.reference.row.id: "reference", pair.base.row.id: "base"}
    return names.get(sample.row.id, "target")


def _flat(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures by joined names; those that are None are left out."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}_")
        elif isinstance(value, int | float):
            found[prefix + name] = float(value)
    return found
