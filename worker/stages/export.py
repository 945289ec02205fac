"""Export: an adapter for other programs, verified by reloading it and re-rendering its preview, or a job's pairs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from dfusion.config import SamplingConfig
from dfusion.export import PreviewSettings, export_adapter
from dfusion.preference_data import PreferencePair, write_preferences
from dfusion.recipes import FOLDERS, Companions, Recipe
from service.db.clock import now_seconds
from service.db.queries import jobs, results
from service.db.tables import Export
from service.errors import ConflictError
from service.ids import IdKind, new_id
from service.jobs.execution import Claim
from service.jobs.kinds import ExportJobSpec
from worker.context import PNG, SAFETENSORS, StageContext
from worker.inputs import StoredModel, StoredSample, load_model_before, load_prompts, spec_as
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
        preview: The settings of the model's preview.
        pairs: The pairs of the requested job, round by round; empty for an export of a model.
    """

    model: StoredModel | None
    preview: PreviewSettings = PreviewSettings()
    pairs: Sequence[StoredPair] = ()


@dataclass(frozen=True)
class Outputs:
    """Outputs of an export stage: the export with the results of its verification."""

    export: Export


def load(session: Session, claim: Claim) -> Inputs:
    """Load the model with its adapter, or all pairs of a job."""
    spec = spec_as(claim, ExportJobSpec)
    if spec.job is not None:
        return Inputs(None, pairs=load_pairs(session, results.job_pairs(session, spec.job)))
    model = load_model_before(session, claim, 0)
    return Inputs(model, _preview_of(session, spec, model))


def _preview_of(session: Session, spec: ExportJobSpec, model: StoredModel) -> PreviewSettings:
    """The settings of the request, else those of the job that trained the model, else the library's defaults."""
    prompt, sampling = spec.prompt, spec.sampling
    job_id = model.row.job_id
    if job_id is not None and sampling is None:
        stored = jobs.sampling_settings(session, [job_id]).get(job_id, {})
        sampling = SamplingConfig.model_validate(stored)
    if job_id is not None and prompt is None:
        origin = jobs.origins(session, [job_id]).get(job_id)
        prompts = load_prompts(session, origin.prompt_set_id if origin else None)
        prompt = prompts[0].text if prompts else None

    defaults = PreviewSettings()
    return PreviewSettings(prompt or defaults.prompt, spec.seed, sampling or defaults.sampling)


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Write the export's file, verify it and store it. Raises ConflictError for a model without an adapter."""
    spec = spec_as(context.claim, ExportJobSpec)
    if inputs.model is None:
        files = _export_pairs(context, inputs.pairs, by_verdicts=spec.prefer == "verdicts")
    else:
        files = _export_adapter(context, spec, inputs.model, inputs.preview)

    export = Export(
        id=new_id(IdKind.EXPORT),
        job_id=context.claim.job_id,
        model_id=None if inputs.model is None else inputs.model.row.id,
        of_job_id=spec.job,
        format=spec.format,
        artifact_id=files.artifact_id,
        preview_artifact_id=files.preview_id,
        recipe=None if files.recipe is None else files.recipe.model_dump(),
        statistics=dict(files.statistics),
        created_at=now_seconds(),
    )
    return Outputs(export)


@dataclass(frozen=True)
class _Files:
    """What an export wrote: the ids of its artifacts, and what describes them."""

    artifact_id: str
    statistics: Mapping[str, Any]
    preview_id: str | None = None
    recipe: Recipe | None = None


def _export_adapter(context: StageContext, spec: ExportJobSpec, model: StoredModel, preview: PreviewSettings) -> _Files:
    """Export an adapter with its preview. A folder is stored as a ZIP file."""
    adapter = model.adapter
    if adapter is None or spec.format == "parquet":
        raise ConflictError(f"{model.row.id} has no adapter to export as {spec.format}")

    # 1. write and verify
    base = model.row.base
    source = context.bench.models.source(base)
    out = context.scratch / (spec.format if spec.format in FOLDERS else f"{spec.format}.safetensors")
    with context.bench.store.borrow(adapter.key, adapter.sha256) as file:
        report = export_adapter(source, file, out, spec.format, device=context.bench.device, preview=preview, base=base)

    # 2. store
    companions = Companions.of(out, spec.format)
    shown = context.scratch / "shown.png"
    shutil.copyfile(companions.preview, shown)
    preview_id = context.store("preview", shown, PNG)
    if out.is_dir():
        archive = Path(shutil.make_archive(str(out), "zip", out))
        shutil.rmtree(out)
        artifact_id = context.store("export", archive, _ZIP)
    else:
        artifact_id = context.store("export", out, SAFETENSORS)

    statistics = {"difference": report.difference, "effect": report.effect}
    return _Files(artifact_id, statistics, preview_id, report.recipe)


def _export_pairs(context: StageContext, pairs: Sequence[StoredPair], *, by_verdicts: bool) -> _Files:
    """Export pairs. The statistics have their number."""
    context.heartbeat.plan(len(pairs))
    out = context.scratch / "pairs.parquet"
    count = write_preferences(out, _preferences(context, pairs, by_verdicts))
    return _Files(context.store("export", out, _PARQUET), {"pairs": count})


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
