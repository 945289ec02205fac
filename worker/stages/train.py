"""Train: DPO, DDPO or DPOK (Eq. 6, 8, 9), with checkpoints; the adapter becomes a new model."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy.orm import Session

from dfusion.adapter import attach_lora, has_lora, save_adapter
from dfusion.errors import CheckpointError, PolicyMismatchError, RankLostError
from dfusion.optimizer_state import save_optimizer
from dfusion.seeds import training_seed
from dfusion.trainer_state import STATE_FILE, TrainerState
from dfusion.training import Trainer
from dfusion.training_report import SelfTest, UpdateReport, falling_preferred, rows_per_second
from service.db.clock import now_seconds
from service.db.queries import jobs, results
from service.db.tables import Artifact, Model
from service.errors import (
    RankFailedError,
    StagePausedError,
    StageStoppedError,
    StorageCorruptError,
    StorageError,
    StorageGoneError,
)
from service.ids import IdKind, new_id
from service.jobs.execution import Claim
from service.jobs.kinds import RoundSpec, TrainingJobSpec
from service.storage import StoredObject
from worker.context import SAFETENSORS, StageContext
from worker.inputs import StoredModel, load_model_before, spec_as
from worker.stages.base import Stage
from worker.training_examples import Source, TrainingExamples, load_source, training_examples
from worker.training_ranks import TrainingRanks

JSON = "application/json"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a training stage.

    Attributes:
        parent: The model to train.
        optimizer: The state of AdamW after the parent's training; None if it is not carried over or does not exist (a
            base model, an imported adapter).
        source: The pairs or samples to train on.
    """

    parent: StoredModel
    optimizer: Artifact | None
    source: Source


@dataclass(frozen=True)
class Outputs:
    """Outputs of a training stage.

    Attributes:
        model: The new model; None without training examples.
        falling: The preferred sides' mean log-ratio before and after it fell; None if it did not fall.
    """

    model: Model | None
    falling: tuple[float, float] | None = None


def load(session: Session, claim: Claim) -> Inputs:
    """Load the model to train, its optimizer's state, and the pairs or samples to train on."""
    spec = spec_as(claim, RoundSpec, TrainingJobSpec)
    parent = load_model_before(session, claim, claim.round)
    optimizer_id = parent.row.optimizer_artifact_id if spec.training.optimizer_start == "carried" else None
    optimizer = None if optimizer_id is None else results.get_artifact(session, optimizer_id)
    return Inputs(parent, optimizer, load_source(session, claim))


def compute(context: StageContext, inputs: Inputs) -> Outputs:
    """Train from the stage's checkpoint on; store the adapter, AdamW's state and the reports.

    Checkpoints and their events are written during the training, each in a transaction under the lease's epoch. The
    next attempt resumes from them. Does not read the database.
    """
    claim = context.claim
    spec = spec_as(claim, RoundSpec, TrainingJobSpec)
    parent = inputs.parent
    learned = training_examples(context, inputs.source, spec.training, parent.row)
    if not learned.examples:
        return Outputs(None)

    # 1. the remaining updates
    seed = training_seed(spec.seed, claim.round)
    with context.bench.models.for_training(parent.row.base, parent.adapter) as model:
        if not has_lora(model.unet):
            attach_lora(model.unet, spec.training.lora, seed)
        carried = None if inputs.optimizer is None else context.load_optimizer(inputs.optimizer)
        ranks = TrainingRanks(context, parent.row.base)
        trainer = Trainer(model, learned.examples, spec.training, seed, carried, context.scratch, ranks.own)
        checkpoints = _Checkpoints(context, trainer)
        checkpoints.resume()
        with ranks.running(model, trainer):
            _train(context, trainer, checkpoints, ranks)

        # 2. the adapter and AdamW's state
        path = context.scratch / "adapter.safetensors"
        # No ids in the file: the same training gives the same bytes. The model's row has its origin.
        save_adapter(model.unet, path, {"base": parent.row.base, "round": str(claim.round)})
        adapter_id = context.store("adapter", path, SAFETENSORS)
        optimizer = trainer.optimizer_state()
        save_optimizer(optimizer, path)
        optimizer_id = context.store("optimizer", path, SAFETENSORS)

    # 3. the reports
    log_id = _store_log(context, trainer.self_test, trainer.reports)
    statistics = _statistics(learned, trainer.reports, log_id)
    statistics |= {"optimizer": spec.training.optimizer, "optimizer_updates": optimizer.updates}
    row = Model(
        id=new_id(IdKind.MODEL),
        base=parent.row.base,
        parent_id=parent.row.id,
        job_id=claim.job_id,
        stage_id=claim.stage_id,
        round=claim.round,
        adapter_artifact_id=adapter_id,
        optimizer_artifact_id=optimizer_id,
        statistics=statistics,
        created_at=now_seconds(),
    )
    return Outputs(row, falling_preferred(trainer.reports))


def _train(context: StageContext, trainer: Trainer, checkpoints: _Checkpoints, ranks: TrainingRanks) -> None:
    """Run all remaining updates. Progress counts rows: those evaluated before the updates, then those of each."""
    rows = trainer.rows_by_update
    prepared = trainer.rows_to_prepare
    context.heartbeat.plan(prepared + sum(rows))

    def at(done: int) -> None:
        ranks.require_alive()
        context.heartbeat.at(done)

    try:
        trainer.prepare(at)
        while trainer.updates_done < trainer.updates_total:
            before = prepared + sum(rows[: trainer.updates_done])
            trainer.step(lambda done, before=before: at(before + done))  # type: ignore[misc]
            checkpoints.save_if_due()
    except (StagePausedError, StageStoppedError, RankLostError, RankFailedError):  # the last update is whole
        checkpoints.save()
        raise
    except PolicyMismatchError as error:
        report = {"tolerance": error.tolerance, "ratio_by_step": dict(error.ratio_by_step)}
        context.note("training.refused", str(error), **report)
        raise


class _Checkpoints:
    """The checkpoints from which a training resumes after its worker was lost."""

    def __init__(self, context: StageContext, trainer: Trainer) -> None:
        self._context = context
        self._trainer = trainer
        self._last: StoredObject | None = context.claim.checkpoint
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Resume from the stage's checkpoint. If it is missing, damaged or unsuitable, write an event and restart.

        Raises:
            StorageError: The storage is unavailable. The stage is retried.
        """
        if self._last is None:
            return
        context = self._context
        trainer = self._trainer
        try:
            with context.bench.store.borrow(self._last.key, self._last.sha256) as path:
                copy = context.scratch / STATE_FILE
                copy.write_bytes(path.read_bytes())
            trainer.load_state(TrainerState.load(copy.parent))
        except (StorageGoneError, StorageCorruptError, CheckpointError) as error:
            message = f"the checkpoint is unusable; restarting the training: {error}"
            context.note("training.restarted", message)
            return

        message = f"the training resumes after update {trainer.updates_done} of {trainer.updates_total}"
        context.note("training.resumed", message)

    def save_if_due(self) -> None:
        """Store a checkpoint if `checkpoint_seconds` have passed since the last one."""
        finished = self._trainer.updates_done == self._trainer.updates_total
        due = time.monotonic() - self._saved_at >= self._context.bench.settings.checkpoint_seconds
        if due and not finished:
            self.save()

    def save(self) -> None:
        """Store a checkpoint, unless no update is finished yet.

        If the storage is unavailable, the previous one stays and the training continues.
        """
        if self._trainer.updates_done == 0:
            return
        try:
            self._replace()
        except StorageError as error:
            if not error.retryable:
                raise
            _logger.warning("no checkpoint was stored after update %d: %s", self._trainer.updates_done, error)
        self._saved_at = time.monotonic()

    def _replace(self) -> None:
        """Store a checkpoint and remove the previous one."""
        context = self._context
        self._trainer.state().save(context.scratch)
        stored = context.put("checkpoint", context.scratch / STATE_FILE)
        context.keep_checkpoint(stored)

        previous = self._last
        self._last = stored
        if previous is not None and previous.key != stored.key:
            context.bench.store.remove(previous.key)


def _store_log(context: StageContext, self_test: SelfTest | None, reports: Sequence[UpdateReport]) -> str:
    """Store the self-test and the report of each update. Returns the id of the artifact."""
    path = context.scratch / "updates.json"
    tested = None if self_test is None else asdict(self_test)
    log = {"self_test": tested, "updates": [asdict(report) for report in reports]}
    path.write_text(json.dumps(log), "utf-8")
    return context.store("updates", path, JSON)


def _statistics(learned: TrainingExamples, reports: Sequence[UpdateReport], log_id: str) -> dict[str, Any]:
    """The statistics of the model. `log` links the self-test and the report of each update."""
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
        "rows_per_second": rows_per_second(reports),
        "peak_bytes": max((report.peak_bytes for report in reports), default=None),
        "log": f"/artifacts/{log_id}",
    }


def record(session: Session, claim: Claim, outputs: Outputs) -> None:
    """Insert the model, or write an event if there were no examples. Warn if the preferred sides fell."""
    if outputs.model is None:
        return _note_nothing_to_learn(session, claim)
    results.add_all(session, [outputs.model])
    if outputs.falling is not None:
        _warn_of_falling(session, claim, *outputs.falling)


def _note_nothing_to_learn(session: Session, claim: Claim) -> None:
    message = f"round {claim.round} has no pairs (equal scores, or no verdict for either side): nothing was trained"
    jobs.add_event(session, claim.job_id, "round.without_pairs", message, claim.stage_id)


def _warn_of_falling(session: Session, claim: Claim, before: float, after: float) -> None:
    message = (
        f"the preferred sides became less likely over the last updates: their mean log-ratio fell from {before:.3g} to"
        f" {after:.3g}; a lower learning rate or training.safeguard may help"
    )
    jobs.add_event(
        session,
        claim.job_id,
        "training.preferred_falls",
        message,
        claim.stage_id,
        before=before,
        after=after,
        round=claim.round,
    )


STAGE = Stage(load, compute, record)
