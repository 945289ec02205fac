"""Every error that the service raises deliberately.

ServiceError
  InvalidRequestError       the request is well-formed but cannot be fulfilled
  NotFoundError             no row with this id exists
  ConflictError             the request conflicts with the current state
    InUseError              it is still used, so it cannot be deleted
      JobInUseError         other jobs, aliases or preference tests use the job
      PromptSetInUseError   jobs use the prompt set
    SourceDeletedError      a job that the request names was deleted concurrently
  PreconditionError         the row has changed since the client read it
  ForbiddenError            the caller's key lacks the required scope
  IdempotencyError          the Idempotency-Key was used with another request
  OverloadError             the service is overloaded; retry later
    TooManyJobsError        the limit of queued jobs is reached
    LowDiskError            the disk has too little free space to start work
  StageError                a stage cannot continue
    LeaseLostError          another worker holds the stage, or it has ended
    StageCancelledError     a cancel was requested
    StagePausedError        a pause was requested
    RankFailedError         another process of a training has failed
    StageStoppedError       this worker is shutting down
  OutcomeUnknownError       the connection was lost during a commit, so its outcome is unknown
  AddressRefusedError       a URL of a user does not lead to the public internet
  OutgoingError             a request to a URL of a user failed
  TransferError             an exported project cannot be imported
  StorageError              an artifact cannot be written or read
    StorageGoneError        the object of an artifact does not exist
    StorageCorruptError     the bytes of an artifact's object differ from those stored
  TrajectoryGoneError       a required trajectory is no longer stored
  StartError                the service cannot start
    AlreadyRunningError     another process uses the data folder
    UnknownRevisionError    the database has a revision that this version does not know
    ProgramError            a program of the local stack cannot be run
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldProblem:
    """A problem with one field of a request. `pointer` is a JSON pointer (RFC 6901)."""

    pointer: str
    message: str


def json_pointer(parts: Iterable[object]) -> str:
    """The JSON pointer (RFC 6901) of a location in a document."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


class ServiceError(Exception):
    """Root of the service's errors. `code` is for programs, the message for people."""

    code = "service_error"
    retryable = False


MAX_PROBLEMS = 100
"""Problems that an error of a request lists."""


class InvalidRequestError(ServiceError):
    """The request is well-formed but cannot be fulfilled."""

    code = "invalid_request"

    def __init__(self, message: str, *problems: FieldProblem, code: str | None = None) -> None:
        super().__init__(message)
        self.problems = problems
        if code is not None:
            self.code = code

    @classmethod
    def at(cls, pointer: str, message: str, code: str | None = None) -> InvalidRequestError:
        """The error of a single field."""
        return cls(message, FieldProblem(pointer, message), code=code)


class NotFoundError(ServiceError):
    """No row with this id exists."""

    code = "not_found"


class ConflictError(ServiceError):
    """The request conflicts with the current state."""

    code = "conflict"


class InUseError(ConflictError):
    """The row is still used, so it cannot be deleted. `problems` lists its first users."""

    def __init__(self, message: str, *problems: FieldProblem) -> None:
        super().__init__(message)
        self.problems = problems


class JobInUseError(InUseError):
    """Other jobs, aliases or preference tests use the job."""

    code = "job_in_use"


class PromptSetInUseError(InUseError):
    """Jobs use the prompt set."""

    code = "prompt_set_in_use"


class SourceDeletedError(ConflictError):
    """A job that the request names was deleted concurrently."""


class PreconditionError(ServiceError):
    """The row has changed since the client read it (If-Match)."""

    code = "changed_meanwhile"


class ForbiddenError(ServiceError):
    """The caller's key lacks the required scope."""

    code = "forbidden"

    def __init__(self, scope: str) -> None:
        super().__init__(f"expected an API key with the scope {scope}")
        self.scope = scope


class OverloadError(ServiceError):
    """The service is overloaded. Retry after `retry_after_seconds`."""

    code = "overload"
    retryable = True
    retry_after_seconds = 30


class TooManyJobsError(OverloadError):
    """The limit of queued jobs is reached."""

    code = "too_many_jobs"


class LowDiskError(OverloadError):
    """The disk has too little free space to start work."""

    code = "low_disk"
    retry_after_seconds = 60


class IdempotencyError(ServiceError):
    """The Idempotency-Key was used with another request."""

    code = "idempotency_key_reused"


class StageError(ServiceError):
    """A stage cannot continue."""

    code = "stage_error"


class LeaseLostError(StageError):
    """Another worker holds the stage, or it has ended. This attempt must write nothing more."""

    code = "lease_lost"


class StageCancelledError(StageError):
    """A cancel was requested."""

    code = "cancelled"


class StagePausedError(StageError):
    """A pause was requested. The stage is held until its job is resumed."""

    code = "paused"


class RankFailedError(StageError):
    """Another process of a training has failed. The code is that of its error, such as out_of_memory."""

    def __init__(self, message: str, code: str, retryable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


class StageStoppedError(StageError):
    """This worker is shutting down. The stage returns to the queue."""

    code = "stopped"


class OutcomeUnknownError(ServiceError):
    """The connection to the database was lost during a commit, so its outcome is unknown."""

    code = "outcome_unknown"
    retryable = True


class AddressRefusedError(ServiceError):
    """A URL that a user named is malformed, or does not lead to the public internet."""

    code = "address_refused"


class OutgoingError(ServiceError):
    """A request to a URL that a user named failed."""

    code = "outgoing"
    retryable = True


class TransferError(ServiceError):
    """An exported project cannot be imported.

    The archive is damaged, has another version, or conflicts with existing rows.
    """

    code = "transfer"


class StorageError(ServiceError):
    """An artifact cannot be written or read."""

    code = "storage"
    retryable = True


class TrajectoryGoneError(ServiceError):
    """A required trajectory is no longer stored."""

    code = "trajectory_gone"


class StorageGoneError(StorageError):
    """The object of an artifact does not exist: it was removed, or is not visible yet."""

    code = "storage_gone"


class StorageCorruptError(StorageError):
    """The bytes of an artifact's object differ from those stored."""

    code = "storage_corrupt"
    retryable = False


class StartError(ServiceError):
    """The service cannot start."""

    code = "cannot_start"


class AlreadyRunningError(StartError):
    """Another process uses the data folder."""


class UnknownRevisionError(StartError):
    """The database has a revision that this version of the service does not know."""


class ProgramError(StartError):
    """A program of the local stack (`api.stack`) cannot be run."""
