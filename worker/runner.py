"""Runs a claimed stage, and records its outcome as the state of the stage."""

from __future__ import annotations

import logging

import torch
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from dfusion.errors import DFusionError
from service import logs
from service.errors import LeaseLostError, ServiceError, StageCancelledError, StagePausedError, StageStoppedError
from service.jobs import execution
from service.jobs.execution import Claim, StageFailure
from worker.context import StageContext
from worker.heartbeat import Heartbeat
from worker.stages import STAGES
from worker.stop_flag import Stop
from worker.workbench import Workbench

_logger = logging.getLogger(__name__)


def run_stage(bench: Workbench, claim: Claim, stop: Stop) -> bool:
    """Run a stage until it succeeds, fails or stops.

    Returns:
        Whether this process can run another stage.

    Raises:
        SQLAlchemyError: The outcome cannot be written.
    """
    with logs.about(job_id=claim.job_id, stage_id=claim.stage_id):
        _logger.info("%s of round %d of %s, attempt %d", claim.kind, claim.round, claim.job_id, claim.attempt)
        try:
            return _attempt(bench, claim, stop)
        except LeaseLostError:
            _logger.warning("lost the lease on %s; this attempt is abandoned", claim.stage_id)
            return True


def _attempt(bench: Workbench, claim: Claim, stop: Stop) -> bool:
    try:
        with bench.store.scratch() as scratch:
            bench.forget_peak_memory()
            with Heartbeat(bench, claim, stop) as heartbeat:
                record = STAGES[claim.kind].run(StageContext(bench, claim, heartbeat, scratch))
            execution.finish(bench.uow, bench.settings, claim, record, heartbeat.total, bench.peak_memory())
    except LeaseLostError:
        raise
    except StageCancelledError:
        execution.cancelled(bench.uow, bench.settings, claim)
    except StagePausedError:
        execution.paused(bench.uow, bench.settings, claim)
    except StageStoppedError:
        execution.give_back(bench.uow, bench.settings, claim)
    except Exception as error:  # every failure becomes a state with a code
        _logger.exception("%s failed", claim.stage_id)
        execution.fail(bench.uow, bench.settings, claim, failure_of(error))
        return not spoils_the_device(error)
    return True


def spoils_the_device(error: Exception) -> bool:
    """Whether the error may leave CUDA unusable in this process, or its memory fragmented."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, torch.AcceleratorError)) or "CUDA error" in str(error)


def failure_of(error: Exception) -> StageFailure:
    """The code and message of an error, and whether a retry may help."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        advice = "out of GPU memory: lower training.micro_batch for a training; other stages need more free memory"
        return StageFailure("out_of_memory", advice, retryable=False)
    if isinstance(error, DFusionError):
        return StageFailure(_snake(type(error).__name__.removesuffix("Error")), str(error), error.retryable)
    if isinstance(error, ServiceError):
        return StageFailure(error.code, str(error), error.retryable)
    if isinstance(error, DBAPIError) and not isinstance(error, (IntegrityError, DataError)):
        return StageFailure("database", "database error", retryable=True)
    if isinstance(error, OSError):
        return StageFailure("input_output", f"{type(error).__name__}: {error.strerror}", retryable=True)
    return StageFailure("internal", f"{type(error).__name__}; see the worker's log", retryable=False)


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
