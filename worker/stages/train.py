"""Train: DPO on the round's pairs (Eq. 6), with checkpoints; the adapter becomes a new model."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from sqlalchemy.orm import Session

from api.core import execution
from api.core.clock import now_seconds
from api.core.errors import StorageError
from api.core.ids import IdKind, new_id
from api.core.queries import jobs, results
from api.core.seeds import training_seed
from api.core.storage import StoredObject
from api.core.tables import Model
from dfusion.adapter import attach_lora, save_adapter
from dfusion.errors import CheckpointError
from dfusion.training import STATE_FILE, Trainer
from dfusion.training_data import TrainingPair
from dfusion.training_report import SelfTest, UpdateReport
from worker.pairs import PairSamples, load_pairs, trajectory_of
from worker.task import SAFETENSORS, Record, Task

JSON = "application/json"


def run(task: Task) -> Record:
    """The model after this round; a round without pairs leaves the model as it is."""
    pairs = load_pairs(task)
    if not pairs:
        return lambda session: _note_no_pairs(session, task)
    parent, adapter = task.model_before(task.claim.round)
    seed = training_seed(task.spec.seed, task.claim.round)
    with task.bench.models.for_training(parent.base, adapter) as model:
        if adapter is None:
            attach_lora(model.unet, task.spec.training.lora, seed)
        trainer = Trainer(model, _training_pairs(task, pairs), task.spec.training, seed)
        checkpoints = _Checkpoints(task, trainer)
        checkpoints.resume()
        tested, reports = _train(task, trainer, checkpoints)
        path = task.scratch / "adapter.safetensors"
        # No ids in the file: the same training gives the same bytes. Where it came from is in the model's row.
        save_adapter(model.unet, path, {"base": parent.base, "round": str(task.claim.round)})
        file = task.store("adapter", path, SAFETENSORS)
    figures = _figures(pairs, reports, _store_log(task, tested, reports))
    row = Model(
        id=new_id(IdKind.MODEL),
        base=parent.base,
        parent_id=parent.id,
        job_id=task.claim.job_id,
        stage_id=task.claim.stage_id,
        round=task.claim.round,
        adapter_artifact_id=file,
        figures=figures,
        created_at=now_seconds(),
    )

    def record(session: Session) -> None:
        task.record_artifacts(session)
        results.add_all(session, [row])

    return record


def _note_no_pairs(session: Session, task: Task) -> None:
    message = f"round {task.claim.round} has no pairs (equal scores everywhere): nothing was trained"
    jobs.add_event(session, task.claim.job_id, "round.without_pairs", message, task.claim.stage_id)


def _training_pairs(task: Task, pairs: list[PairSamples]) -> list[TrainingPair]:
    """Preferred: the target where it was adopted, else the reference; rejected: the base."""
    sides = [side for pair in pairs for side in (pair.reference, pair.base, pair.target) if side]
    stored = task.load_trajectories({side.trajectory for side in sides})
    found = []
    for pair in pairs:
        adopted = pair.target is not None and bool(pair.row.adopted)
        preferred = pair.target if adopted and pair.target else pair.reference
        sides_of_pair = trajectory_of(preferred, stored), trajectory_of(pair.base, stored)
        found.append(TrainingPair(*sides_of_pair, pair.row.prompt, on_policy=not adopted))
    return found


def _train(task: Task, trainer: Trainer, checkpoints: _Checkpoints) -> tuple[SelfTest, list[UpdateReport]]:
    """All updates that are left. Progress counts rows: once for log pref, then once an inner epoch."""
    rows = trainer.rows_total
    task.heartbeat.plan(rows * (1 + task.spec.training.inner_epochs))
    tested = trainer.prepare(task.heartbeat.at)
    reports: list[UpdateReport] = []
    while trainer.updates_done < trainer.updates_total:
        before = rows + rows * task.spec.training.inner_epochs * trainer.updates_done // trainer.updates_total
        reports.append(trainer.step(lambda done, before=before: task.heartbeat.at(before + done)))  # type: ignore[misc]
        checkpoints.save_if_due()
    return tested, reports


class _Checkpoints:
    """Where a training goes on after its worker was lost."""

    def __init__(self, task: Task, trainer: Trainer) -> None:
        self._task, self._trainer = task, trainer
        self._last: StoredObject | None = task.claim.checkpoint
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Go on from the stage's checkpoint; where there is none that fits, say so and begin afresh."""
        if self._last is None:
            return
        bench, claim = self._task.bench, self._task.claim
        try:
            with bench.store.borrow(self._last.key, self._last.sha256) as path:
                link = self._task.scratch / STATE_FILE
                link.write_bytes(path.read_bytes())
            self._trainer.load(link.parent)
        except (StorageError, CheckpointError) as error:
            message = f"the checkpoint cannot be used, the training begins afresh: {error}"
            execution.note(bench.uow, claim, "training.restarted", message)
            return
        message = f"the training goes on after update {self._trainer.updates_done} of {self._trainer.updates_total}"
        execution.note(bench.uow, claim, "training.resumed", message)

    def save_if_due(self) -> None:
        """Store a checkpoint if the last is old; the one before it is removed."""
        task = self._task
        finished = self._trainer.updates_done == self._trainer.updates_total
        if finished or time.monotonic() - self._saved_at < task.bench.settings.checkpoint_seconds:
            return
        self._trainer.save(task.scratch)
        stored = task.bench.store.put(task.claim.job_id, task.claim.stage_id, "checkpoint", task.scratch / STATE_FILE)
        execution.checkpoint(task.bench.uow, task.claim, stored)
        if self._last is not None and self._last.key != stored.key:
            task.bench.store.remove(self._last.key)
        self._last, self._saved_at = stored, time.monotonic()


def _store_log(task: Task, tested: SelfTest, reports: list[UpdateReport]) -> str:
    path = task.scratch / "updates.json"
    path.write_text(
        json.dumps({"self_test": asdict(tested), "updates": [asdict(report) for report in reports]}), "utf-8"
    )
    return task.store("updates", path, JSON)


def _figures(pairs: list[PairSamples], reports: list[UpdateReport], log: str) -> dict[str, Any]:
    """`updates` links the report of each update (those of this attempt, where a lost worker's training went on)."""
    last = reports[-1] if reports else None
    return {
        "pairs": len(pairs),
        "adopted": sum(bool(pair.row.adopted) for pair in pairs),
        "updates": last.update if last else 0,
        "first_loss": reports[0].loss if reports else None,
        "last_loss": last.loss if last else None,
        "last_accuracy": last.accuracy if last else None,
        "last_grad_norm": last.grad_norm if last else None,
        "log": f"/artifacts/{log}",
    }
