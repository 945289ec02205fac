"""Every error that the service raises on purpose.

ServiceError
  InvalidRequestError       the request is well-formed but asks for something that cannot be
  NotFoundError             there is nothing of that id
  ConflictError             what was asked does not fit the present state
  PreconditionError         what was to be changed has changed since it was read
  ForbiddenError            the caller's key has not the scope that it takes
  IdempotencyError          the key was used with another request
  OverloadError             not now: try again later
    TooManyJobsError        as many jobs are queued as may be
    LowDiskError            the disk has too little room to begin work
  StageError                a stage cannot go on
    LeaseLostError          another worker has the stage, or it is over
    StageCancelledError     a cancel was asked for
    StagePausedError        a pause was asked for
    StageStoppedError       this worker is asked to stop
  OutcomeUnknownError       the database went away at a commit, and nobody knows whether it took place
  TransferError             an exported project cannot be taken in
  StorageError              an artifact could not be written or read
    StorageCorruptError     an artifact's bytes are not those that were stored
  TrajectoryGoneError       a trajectory is needed that is not kept
  StartError                the service may not start
    AlreadyRunningError     another service has the data folder
    UnknownRevisionError    the database was made by another version
    ProgramError            a program of the local stack cannot be run
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldProblem:
    """A field of a request and what is wrong with it; `pointer` is a JSON pointer (RFC 6901)."""

    pointer: str
    message: str


def json_pointer(parts: Iterable[object]) -> str:
    """The JSON pointer (RFC 6901) of a place in a document."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


class ServiceError(Exception):
    """Root of the service's errors. `code` is for programs, the message for people."""

    code = "service_error"
    retryable = False


class InvalidRequestError(ServiceError):
    """The request is well-formed but asks for something that cannot be."""

    code = "invalid_request"

    def __init__(self, message: str, *problems: FieldProblem, code: str | None = None) -> None:
        super().__init__(message)
        self.problems = problems
        if code is not None:
            self.code = code

    @classmethod
    def at(cls, pointer: str, message: str, code: str | None = None) -> InvalidRequestError:
        """One field is wrong."""
        return cls(message, FieldProblem(pointer, message), code=code)


class NotFoundError(ServiceError):
    """There is nothing of that id."""

    code = "not_found"


class ConflictError(ServiceError):
    """What was asked does not fit the present state."""

    code = "conflict"


class PreconditionError(ServiceError):
    """What was to be changed has changed since it was read (If-Match)."""

    code = "changed_meanwhile"


class ForbiddenError(ServiceError):
    """The caller's key has not the scope that it takes."""

    code = "forbidden"

    def __init__(self, scope: str) -> None:
        super().__init__(f"this takes a key with the scope {scope}")
        self.scope = scope


class OverloadError(ServiceError):
    """Not now: try again in `retry_after_seconds`."""

    code = "overload"
    retryable = True
    retry_after_seconds = 30


class TooManyJobsError(OverloadError):
    """As many jobs are queued as may be."""

    code = "too_many_jobs"


class LowDiskError(OverloadError):
    """The disk has too little room to begin work."""

    code = "low_disk"
    retry_after_seconds = 60


class IdempotencyError(ServiceError):
    """The Idempotency-Key was used with another request before."""

    code = "idempotency_key_reused"


class StageError(ServiceError):
    """A stage cannot go on."""

    code = "stage_error"


class LeaseLostError(StageError):
    """Another worker has the stage, or it is over: nothing of this attempt may be written."""

    code = "lease_lost"


class StageCancelledError(StageError):
    """A cancel was asked for."""

    code = "cancelled"


class StagePausedError(StageError):
    """A pause was asked for; the stage is held until its job is resumed."""

    code = "paused"


class StageStoppedError(StageError):
    """This worker is asked to stop; the stage goes back to the queue."""

    code = "stopped"


class OutcomeUnknownError(ServiceError):
    """The database went away at a commit, and nobody knows whether it took place."""

    code = "outcome_unknown"
    retryable = True


class TransferError(ServiceError):
    """An exported project cannot be taken in: its file is damaged, of another version, or does not fit what is here."""

    code = "transfer"


class StorageError(ServiceError):
    """An artifact could not be written or read."""

    code = "storage"
    retryable = True


class TrajectoryGoneError(ServiceError):
    """A trajectory is needed that the installation does not keep."""

    code = "trajectory_gone"


class StorageGoneError(StorageError):
    """An artifact's bytes are not there: gone, or not to be seen yet."""

    code = "storage_gone"


class StorageCorruptError(StorageError):
    """An artifact's bytes are not those that were stored."""

    code = "storage_corrupt"
    retryable = False


class StartError(ServiceError):
    """The service may not start."""

    code = "cannot_start"


class AlreadyRunningError(StartError):
    """Another service has the data folder."""


class UnknownRevisionError(StartError):
    """The database was made by another version of the service."""


class ProgramError(StartError):
    """A program of the local stack (`api.stack`) cannot be run."""
