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
from service.jobs.specs import ExportJobSpec
from worker.examples import better_and_worse
from worker.pairs import PairSamples, StoredSample, with_samples
from worker.task import SAFETENSORS, Record, Task

_PARQUET = "application/vnd.apache.parquet"
_ZIP = "application/zip"


def run(task: Task) -> Record:
    """The export's file; done only when it was read again."""
    spec = task.spec_as(ExportJobSpec)
    file, figures = _pairs(task, spec.job, spec.prefer == "verdicts") if spec.job else _adapter(task, spec)
    with task.reading() as session:
        model_id = jobs.get(session, task.claim.job_id).model_id
    row = Export(
        id=new_id(IdKind.EXPORT),
        job_id=task.claim.job_id,
        model_id=None if spec.job else model_id,
        of_job_id=spec.job,
        format=spec.format,
        artifact_id=file,
        figures=figures,
        created_at=now_seconds(),
    )

    def record(session: Session) -> None:
        task.record_artifacts(session)
        results.add_all(session, [row])

    return record


def _adapter(task: Task, spec: ExportJobSpec) -> tuple[str, dict[str, Any]]:
    row, adapter = task.model_before(0)
    if adapter is None or spec.format == "parquet":
        raise ConflictError(f"{row.id} has no adapter to export as {spec.format}")
    source = task.bench.models.source(row.base)
    out = task.scratch / ("merged" if spec.format == "merged" else f"{spec.format}.safetensors")
    with task.bench.store.borrow(adapter.key, adapter.sha256) as file:
        report = export_adapter(source, file, out, spec.format, device=task.bench.device)
    if spec.format != "merged":
        return task.store("export", out, SAFETENSORS), asdict(report)
    packed = Path(shutil.make_archive(str(out), "zip", out))
    shutil.rmtree(out)
    return task.store("export", packed, _ZIP), asdict(report)


def _pairs(task: Task, job_id: str, by_verdicts: bool) -> tuple[str, dict[str, Any]]:
    with task.reading() as session:
        rows = results.job_pairs(session, job_id)
    pairs = with_samples(task, rows)
    task.heartbeat.plan(len(pairs))
    out = task.scratch / "pairs.parquet"
    count = write_preferences(out, _preferences(task, pairs, by_verdicts))
    return task.store("export", out, _PARQUET), {"pairs": count}


def _preferences(task: Task, pairs: list[PairSamples], by_verdicts: bool) -> Iterator[PreferencePair]:
    """The side that trains over the other; pairs without a better one are left out."""
    for pair in pairs:
        row, sides = pair.row, better_and_worse(pair, by_verdicts)
        task.heartbeat.step()
        if sides is None:
            continue
        better, worse = sides
        yield PreferencePair(
            pair_id=row.id,
            caption=row.prompt,
            images=(task.read_bytes(better.sample.image), task.read_bytes(worse.sample.image)),
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
