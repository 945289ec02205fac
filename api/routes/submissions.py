"""Routes that submit jobs: rounds, samplings, fusions, trainings, evaluations and exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response, status
from pydantic import BaseModel

from api.access import require_scope
from api.converters.estimates import estimate_out
from api.deps import CallerDep, IdempotencyKey, Parameters, ServiceDep
from api.openapi import SUBMISSION
from api.routes.jobs import RETRY_AFTER_SECONDS, view_job
from service.jobs.kinds import KINDS, JobSpec, Kind
from service.service import Service, create_and_read, estimate_job


class SubmissionParameters(Parameters):
    """`dry_run`: check the request and estimate its cost without creating a job."""

    dry_run: bool = False


@dataclass(frozen=True)
class Submission:
    """The context of a request for a job: its caller, its key and its mode."""

    service: Service
    api_key_id: str | None
    idempotency_key: str | None
    dry_run: bool

    def respond(self, spec: JobSpec) -> Response:
        """Create the job and return it; with `dry_run` return its estimate."""
        if self.dry_run:
            return _json(status.HTTP_200_OK, estimate_out(*estimate_job(self.service, spec), spec))

        job = create_and_read(self.service, spec, view_job, self.idempotency_key, self.api_key_id)
        headers = {"Location": f"/jobs/{job.id}", "Retry-After": str(RETRY_AFTER_SECONDS)}
        return _json(status.HTTP_202_ACCEPTED, job, headers)


# returns a Response because SUBMISSION documents the body of each status and FastAPI would validate it again
def _json(status_code: int, body: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body.model_dump_json(), status_code, headers, media_type="application/json")


async def _submission(
    service: ServiceDep,
    caller: CallerDep,
    parameters: Annotated[SubmissionParameters, Query()],
    idempotency_key: IdempotencyKey = None,
) -> Submission:
    return Submission(service, caller.key_id, idempotency_key, parameters.dry_run)


SubmissionDep = Annotated[Submission, Depends(_submission)]
router = APIRouter(
    tags=["submissions"],
    dependencies=[require_scope("submit")],
    responses=SUBMISSION,
)


def _endpoint(kind: Kind[Any]) -> Callable[..., Response]:
    def start(spec: JobSpec, submission: SubmissionDep) -> Response:
        return submission.respond(spec)

    # FastAPI reads the body's schema and the operation's name from the function
    start.__annotations__["spec"] = kind.spec
    start.__name__ = kind.operation
    return start


for _kind in KINDS.values():
    router.post(_kind.path, status_code=status.HTTP_202_ACCEPTED, description=_kind.description)(_endpoint(_kind))
