"""Train: DPO, DDPO or DPOK (Eq. 6, 8, 9), with checkpoints; the adapter becomes a new model."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from sqlalchemy.orm import Session

from dfusion.adapter import attach_lora, save_adapter
from dfusion.errors import CheckpointError, PolicyMismatchError
from dfusion.optimizer_state import save_optimizer
from dfusion.seeds import training_seed
from dfusion.trainer_state import STATE_FILE, TrainerState
from dfusion.training import Trainer
from dfusion.training_report import SelfTest, UpdateReport, falling_preferred
from service.db.clock import now_seconds
from service.db.queries import jobs, results
from service.db.tables import Model
from service.errors import StagePausedError, StageStoppedError, StorageCorruptError, StorageGoneError
from service.ids import IdKind, new_id
from service.jobs import execution
from service.jobs.kinds import RoundSpec, TrainingJobSpec
from service.storage import StoredObject
from worker.context import SAFETENSORS, Record, StageContext
from worker.training_examples import TrainingExamples, training_examples

JSON = "application/json"


def run(context: StageContext) -> Record:
    """The model after this round, or of a training alone; without anything to learn from there is no new model."""
    spec = context.spec_as(RoundSpec, TrainingJobSpec)
    parent, adapter = context.model_before(context.claim.round)
    learned = training_examples(context, spec.training, parent)
    if not learned.examples:
        return lambda session: _note_nothing_to_learn(session, context)
    seed = training_seed(spec.seed, context.claim.round)
    with context.bench.models.for_training(parent.base, adapter) as model:
        if adapter is None:
            attach_lora(model.unet, spec.training.lora, seed)
        carried = context.optimizer_of(parent) if spec.training.optimizer_start == "carried" else None
        trainer = Trainer(model, learned.examples, spec.training, seed, carried)
        checkpoints = _Checkpoints(context, trainer)
        checkpoints.resume()
        tested = _train(context, trainer, checkpoints)
        path = context.scratch / "adapter.safetensors"
        # No ids in the file: the same training gives the same bytes. Where it came from is in the model's row.
        save_adapter(model.unet, path, {"base": parent.base, "round": str(context.claim.round)})
        file = context.store("adapter", path, SAFETENSORS)
        optimizer = trainer.optimizer_state()
        save_optimizer(optimizer, path)
        optimizer_file = context.store("optimizer", path, SAFETENSORS)
    log = _store_log(context, tested, trainer.reports)
    figures = _figures(learned, trainer.reports, log) | {"optimizer_updates": optimizer.updates}
    falling = falling_preferred(trainer.reports)
    row = Model(
        id=new_id(IdKind.MODEL),
        base=parent.base,
        parent_id=parent.id,
        job_id=context.claim.job_id,
        stage_id=context.claim.stage_id,
        round=context.claim.round,
        adapter_artifact_id=file,
        optimizer_artifact_id=optimizer_file,
        figures=figures,
        created_at=now_seconds(),
    )

    def record(session: Session) -> None:
        context.record_artifacts(session)
        results.add_all(session, [row])
        if falling is not None:
            _warn_of_falling(session, context, *falling)

    return record


def _warn_of_falling(session: Session, context: StageContext, before: float, after: float) -> None:
    message = (
        f"the preferred sides became less likely over the last updates: their mean log-ratio fell from {before:.3g} to"
        f" {after:.3g}; a lower learning rate or training.safeguard may help"
    )
    jobs.add_event(
        session,
        context.claim.job_id,
        "training.preferred_falls",
        message,
        context.claim.stage_id,
        before=before,
        after=after,
        round=context.claim.round,
    )


def _note_nothing_to_learn(session: Session, context: StageContext) -> None:
    message = (
        f"round {context.claim.round} has no pairs (equal scores, or no verdict for either side): nothing was trained"
    )
    jobs.add_event(session, context.claim.job_id, "round.without_pairs", message, context.claim.stage_id)


def _train(context: StageContext, trainer: Trainer, checkpoints: _Checkpoints) -> SelfTest:
    """All updates that are left. Progress counts rows: once for log pref, then those of each update."""
    rows = trainer.rows_by_update
    context.heartbeat.plan(trainer.rows_total + sum(rows))
    try:
        tested = trainer.prepare(context.heartbeat.at)
        while trainer.updates_done < trainer.updates_total:
            before = trainer.rows_total + sum(rows[: trainer.updates_done])
            trainer.step(lambda done, before=before: context.heartbeat.at(before + done))  # type: ignore[misc]
            checkpoints.save_if_due()
    except (StagePausedError, StageStoppedError):  # raised between micro-batches: the last update is whole
        checkpoints.save()
        raise
    except PolicyMismatchError as error:
        report = {"tolerance": error.tolerance, "ratio_by_step": dict(error.ratio_by_step)}
        execution.note(context.bench.uow, context.claim, "training.refused", str(error), **report)
        raise
    return tested


class _Checkpoints:
    """Where a training goes on after its worker was lost."""

    def __init__(self, context: StageContext, trainer: Trainer) -> None:
        self._context, self._trainer = context, trainer
        self._last: StoredObject | None = context.claim.checkpoint
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Go on from the stage's checkpoint; where it is gone or does not fit, say so and begin afresh. Raises
        StorageError where it cannot be read just now."""
        if self._last is None:
            return
        bench, claim = self._context.bench, self._context.claim
        try:
            with bench.store.borrow(self._last.key, self._last.sha256) as path:
                link = self._context.scratch / STATE_FILE
                link.write_bytes(path.read_bytes())
            self._trainer.load_state(TrainerState.load(link.parent))
        except (StorageGoneError, StorageCorruptError, CheckpointError) as error:
            message = f"the checkpoint cannot be used, the training begins afresh: {error}"
            execution.note(bench.uow, claim, "training.restarted", message)
            return
        message = f"the training goes on after update {self._trainer.updates_done} of {self._trainer.updates_total}"
        execution.note(bench.uow, claim, "training.resumed", message)

    def save_if_due(self) -> None:
        """Store a checkpoint if the last is old."""
        finished = self._trainer.updates_done == self._trainer.updates_total
        due = time.monotonic() - self._saved_at >= self._context.bench.settings.checkpoint_seconds
        if due and not finished:
            self.save()

    def save(self) -> None:
        """Store a checkpoint, unless nothing was learned yet; the one before it is removed."""
        if self._trainer.updates_done == 0:
            return
        context = self._context
        self._trainer.state().save(context.scratch)
        stored = context.bench.store.put(
            context.claim.job_id, context.claim.stage_id, "checkpoint", context.scratch / STATE_FILE
        )
        execution.checkpoint(context.bench.uow, context.claim, stored)
        if self._last is not None and self._last.key != stored.key:
            context.bench.store.remove(self._last.key)
        self._last, self._saved_at = stored, time.monotonic()


def _store_log(context: StageContext, tested: SelfTest, reports: list[UpdateReport]) -> str:
    path = context.scratch / "updates.json"
    path.write_text(
        json.dumps({"self_test": asdict(tested), "updates": [asdict(report) for report in reports]}), "utf-8"
    )
    return context.store("updates", path, JSON)


def _figures(learned: TrainingExamples, reports: list[UpdateReport], log: str) -> dict[str, Any]:
    """`log` links the self-test and the report of each update."""
    last = reports[-1] if reports else None
    return {
        "examples": len(learned.examples),
        "pairs": learned.pairs,
        "adopted": learned.adopted,
        "updates": last.update if last else 0,
        "first_loss": reports[0].loss if reports else None,
        "last_loss": last.loss if last else None,
        "last_accuracy": last.accuracy if last else None,
        "last_log_ratio_preferred": last.log_ratio_preferred if last else None,
        "last_log_ratio_rejected": last.log_ratio_rejected if last else None,
        "last_below_epsilon": last.below_epsilon if last else None,
        "last_grad_norm": last.grad_norm if last else None,
        "log": f"/artifacts/{log}",
    }
