"""Export: an adapter for other programs, verified by reloading it and re-rendering an image, or a job's pairs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from dfusion.export import export_adapter
from dfusion.preference_data import PreferencePair, write_preferences
from service.db.clock import now_seconds
from service.db.queries import results
from service.db.tables import Export
from service.errors import ConflictError
from service.ids import IdKind, new_id
from service.jobs.execution import Claim
from service.jobs.kinds import ExportJobSpec
from worker.context import SAFETENSORS, StageContext
from worker.inputs import StoredModel, StoredSample, load_model_before, spec_as
from worker.pairs import StoredPair, load_pairs
from worker.stages.base import Stage
from worker.training_examples import RankedPair, rank_pair

_PARQUET = "application/vnd.apache.parquet"
_ZIP = "application/zip"


@dataclass(frozen=True)
class Inputs:
    """Inputs of an export stage.

    Attributes:
        model: The model whose adapter is exported; None for an export of pairs.
        pairs: The pairs of the requested job, round by round; empty for an export of a model.
    """

    model: StoredModel | None
    pairs: Sequence[StoredPair] = ()


@dataclass(frozen=True)
class Outputs:
    """Outputs of an export stage: the export with the results of its verification."""

    export: Export


def load(session: Session, claim: Claim) -> Inputs:
    """Load the model with its adapter, or all pairs of a job."""
    spec = spec_as(claim, ExportJobSpec)
    if spec.job is not None:
        return Inputs(None, load_pairs(session, results.job_pairs(session, spec.job)))
    return Inputs(load_model_before(session, claim, 0))


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Write the export's file, verify it and store it. Raises ConflictError for a model without an adapter."""
    spec = spec_as(context.claim, ExportJobSpec)
    if inputs.model is None:
        file_id, statistics = _export_pairs(context, inputs.pairs, by_verdicts=spec.prefer == "verdicts")
    else:
        file_id, statistics = _export_adapter(context, spec, inputs.model)

    export = Export(
        id=new_id(IdKind.EXPORT),
        job_id=context.claim.job_id,
        model_id=None if inputs.model is None else inputs.model.row.id,
        of_job_id=spec.job,
        format=spec.format,
        artifact_id=file_id,
        statistics=statistics,
        created_at=now_seconds(),
    )
    return Outputs(export)


def _export_adapter(context: StageContext, spec: ExportJobSpec, model: StoredModel) -> tuple[str, dict[str, Any]]:
    """Export an adapter. Returns the id of the file's artifact and the results of the verification."""
    adapter = model.adapter
    if adapter is None or spec.format == "parquet":
        raise ConflictError(f"{model.row.id} has no adapter to export as {spec.format}")

    source = context.bench.models.source(model.row.base)
    out = context.scratch / ("merged" if spec.format == "merged" else f"{spec.format}.safetensors")
    with context.bench.store.borrow(adapter.key, adapter.sha256) as file:
        report = export_adapter(source, file, out, spec.format, device=context.bench.device)

    if spec.format != "merged":
        return context.store("export", out, SAFETENSORS), asdict(report)
    archive = Path(shutil.make_archive(str(out), "zip", out))
    shutil.rmtree(out)
    return context.store("export", archive, _ZIP), asdict(report)


def _export_pairs(
    context: StageContext, pairs: Sequence[StoredPair], *, by_verdicts: bool
) -> tuple[str, dict[str, Any]]:
    """Export pairs. Returns the id of the file's artifact and the number of its pairs."""
    context.heartbeat.plan(len(pairs))
    out = context.scratch / "pairs.parquet"
    count = write_preferences(out, _preferences(context, pairs, by_verdicts))
    return context.store("export", out, _PARQUET), {"pairs": count}


def _preferences(context: StageContext, pairs: Sequence[StoredPair], by_verdicts: bool) -> Iterator[PreferencePair]:
    """The pairs that have a better side. Each pair counts as one step."""
    for pair in pairs:
        ranked = rank_pair(pair, by_verdicts=by_verdicts)
        context.heartbeat.step()
        if ranked is not None:
            yield _preference(context, ranked)


def _preference(context: StageContext, ranked: RankedPair) -> PreferencePair:
    pair = ranked.pair
    row = pair.row
    better = ranked.better.sample
    worse = ranked.worse.sample
    return PreferencePair(
        pair_id=row.id,
        caption=row.prompt,
        images=(context.read_bytes(better.image), context.read_bytes(worse.image)),
        roles=(_role(pair, better), _role(pair, worse)),
        seeds=(better.row.seed, worse.row.seed),
        scores=(ranked.better.score, ranked.worse.score),
        scorer=f"{row.scorer}@{row.scorer_version}",
        round=row.round,
        adopted=None if pair.target is None else bool(row.adopted),
        mask_cover=row.statistics.get("mask_cover"),
        statistics=_flatten(row.statistics),
    )


def _role(pair: StoredPair, sample: StoredSample) -> str:
    """The sample's role in this pair. It can have another role in another pair."""
    names = {pair.reference.row.id: "reference", pair.base.row.id: "base"}
    return names.get(sample.row.id, "target")


def _flatten(statistics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested statistics by joining their names. None values are skipped."""
    flat: dict[str, float] = {}
    for name, value in statistics.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}_")
        elif isinstance(value, int | float):
            flat[prefix + name] = float(value)
    return flat


def record(session: Session, _claim: Claim, outputs: Outputs) -> None:
    """Insert the export."""
    results.add_all(session, [outputs.export])


STAGE = Stage(load, compute, record)
