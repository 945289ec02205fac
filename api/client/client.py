"""Everything that the REST API does, as typed methods. Answers are the models of api.wire."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel, ValidationError

from api.client.downloads import download, fetch
from api.client.errors import ApiError, NotFoundError, TooManyRequestsError, UnavailableError, UnreachableError
from api.client.transport import Backoff, OnRetry, Transport
from api.wire.api_keys import ApiKeyCreated, ApiKeyOut
from api.wire.common import ListOut
from api.wire.estimates import EstimateOut
from api.wire.health import HealthOut, ReadyOut
from api.wire.jobs import EventOut, JobDetail, JobOut, MetricsOut
from api.wire.models import ExportOut, LineageOut, ModelDetail, ModelOut
from api.wire.pairs import PairOut
from api.wire.prompt_sets import PromptSetDetail, PromptSetOut
from api.wire.samples import SampleDetail, SampleOut
from api.wire.workers import WorkersOut
from service.jobs.kinds import (
    KINDS,
    EvaluationJobSpec,
    ExportJobSpec,
    FusionJobSpec,
    RoundSpec,
    SamplingJobSpec,
    TrainingJobSpec,
)
from service.states import JobKind, JobState, KeyScope, SampleRole, Verdict

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Body = Mapping[str, Any]
AdapterFormat = Literal["diffusers", "kohya", "merged"]

PATHS: Mapping[JobKind, str] = MappingProxyType({name: kind.path for name, kind in KINDS.items()})
"""Where each kind of job is asked for."""
DEFAULT_URL = "http://127.0.0.1:8000"
_MOST = 200
"""The longest page that the service gives."""
_LONGEST_WAIT_SECONDS = 30.0
_SILENCE_SECONDS = 45.0
"""An event stream says something every 15 seconds; one that is silent for so long is dead."""


class JobFilters(TypedDict, total=False):
    """Which jobs; `parent` is the job that they are retries of."""

    state: JobState | str | None
    kind: JobKind | str | None
    prompt_set: str | None
    parent: str | None


class SampleFilters(TypedDict, total=False):
    """Which samples."""

    job: str | None
    role: SampleRole | str | None
    round: int | None
    prompt_set: str | None


class PairFilters(TypedDict, total=False):
    """Which pairs; `judged`: whether a person has given a verdict."""

    job: str | None
    round: int | None
    adopted: bool | None
    judged: bool | None
    prompt_set: str | None


class ModelFilters(TypedDict, total=False):
    """Which models."""

    job: str | None


class Client:
    """A client of one service; to be used in a `with` block, or closed.

    A request is sent again, up to `retries` times, when no answer came or the service says "not now" (429 and 503,
    after as long as it asks). Work that is asked for carries an Idempotency-Key, so that this makes no job twice.
    Proxies and certificates come from the environment as httpx reads it (HTTP_PROXY, NO_PROXY, SSL_CERT_FILE, .netrc)
    unless `trust_env` is false. Every method raises ApiError, and nothing else of its own.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        timeout: float = 30.0,
        *,
        retries: int = 4,
        trust_env: bool = True,
        on_retry: OnRetry | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self._retries = retries
        self._transport = Transport(
            base_url, api_key, timeout, retries=retries, trust_env=trust_env, on_retry=on_retry, backoff=backoff
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._transport.close()

    @property
    def base_url(self) -> str:
        """Where the service is."""
        return self._transport.base_url

    # asking for work

    def start_round(self, spec: RoundSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Train a model online, for some rounds, on pairs of its own samples."""
        return self.submit(JobKind.ROUND, spec, idempotency_key=idempotency_key)

    def start_sampling(self, spec: SamplingJobSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Sample a model on prompts."""
        return self.submit(JobKind.SAMPLING, spec, idempotency_key=idempotency_key)

    def start_fusion(self, spec: FusionJobSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Fuse stored samples."""
        return self.submit(JobKind.FUSION, spec, idempotency_key=idempotency_key)

    def start_training(self, spec: TrainingJobSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Train on stored pairs."""
        return self.submit(JobKind.TRAINING, spec, idempotency_key=idempotency_key)

    def start_evaluation(self, spec: EvaluationJobSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Measure models on the same prompts and seeds."""
        return self.submit(JobKind.EVALUATION, spec, idempotency_key=idempotency_key)

    def start_export(self, spec: ExportJobSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Write an adapter, or a job's pairs, in a form that other programs read."""
        return self.submit(JobKind.EXPORT, spec, idempotency_key=idempotency_key)

    def submit(self, kind: JobKind, spec: BaseModel | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """A new job of that kind, or the one that the same request made under the same key."""
        return self._create(PATHS[kind], JobDetail, idempotency_key, json=_body(spec))

    def estimate(self, kind: JobKind, spec: BaseModel | Body) -> EstimateOut:
        """What a job of that kind would take; nothing is made."""
        path, params = PATHS[kind], {"dry_run": True}
        answer = self._transport.request("POST", path, params=params, json=_body(spec))
        return _read(EstimateOut, answer.content)

    def _create(self, path: str, model: type[M], key: str | None, **sent: Any) -> M:
        headers = {**sent.pop("headers", {}), "Idempotency-Key": key or uuid.uuid4().hex}
        answer = self._transport.request("POST", path, headers=headers, **sent)
        return _read(model, answer.content)

    # jobs

    def jobs(self, **filters: Unpack[JobFilters]) -> Iterator[JobOut]:
        """Jobs, newest first."""
        return _all(lambda cursor: self.jobs_page(_MOST, cursor, **filters))

    def jobs_page(self, limit: int = 50, cursor: str | None = None, **filters: Unpack[JobFilters]) -> ListOut[JobOut]:
        """A page of them."""
        return self._get("/jobs", ListOut[JobOut], limit=limit, cursor=cursor, **filters)

    def job(self, job_id: str, *, wait: float = 0) -> JobDetail:
        """A job, at once or when it has ended; after at most `wait` seconds."""
        return self._get(f"/jobs/{_part(job_id)}", JobDetail, wait_seconds=wait)

    def wait(self, job_id: str, *, timeout: float | None = None) -> JobDetail:
        """The job when it has ended. Raises TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _LONGEST_WAIT_SECONDS if deadline is None else deadline - time.monotonic()
            job = self.job(job_id, wait=max(0.0, min(left, _LONGEST_WAIT_SECONDS)))
            if job.state.is_final:
                return job
            if left <= 0:
                raise TimeoutError(f"{job_id} is still {job.state}")

    def cancel(self, job_id: str) -> JobDetail:
        """Call a job off; one that has ended stays as it is."""
        return self._act(job_id, "cancel", repeatable=True)

    def pause(self, job_id: str) -> JobDetail:
        """Stop a job until it is resumed. Raises ConflictError for one that has ended."""
        return self._act(job_id, "pause", repeatable=True)

    def resume(self, job_id: str) -> JobDetail:
        """Go on with a job that is paused, or that waits for verdicts. Raises ConflictError for others."""
        return self._act(job_id, "resume", repeatable=False)

    def retry(self, job_id: str, *, idempotency_key: str | None = None) -> JobDetail:
        """A new job with the request of one that failed or was cancelled. Raises ConflictError for others."""
        return self._create(f"/jobs/{_part(job_id)}/retry", JobDetail, idempotency_key)

    def _act(self, job_id: str, action: str, *, repeatable: bool) -> JobDetail:
        answer = self._transport.request("POST", f"/jobs/{_part(job_id)}/{action}", repeatable=repeatable)
        return _read(JobDetail, answer.content)

    def events(self, job_id: str) -> Iterator[EventOut]:
        """What has happened to a job so far, in order."""
        return _all(lambda cursor: self.events_page(job_id, _MOST, cursor))

    def events_page(
        self, job_id: str, limit: int = 50, cursor: str | None = None, *, wait: float = 0
    ) -> ListOut[EventOut]:
        """A page of them; with `wait`, when there is one after the cursor, or after that many seconds."""
        path = f"/jobs/{_part(job_id)}/events"
        return self._get(path, ListOut[EventOut], wait_seconds=wait, limit=limit, cursor=cursor)

    def follow(
        self, job_id: str, *, last_event_id: int | None = None, patience_seconds: float = 120
    ) -> Iterator[EventOut]:
        """What happens to a job, as it happens, from its first event or after `last_event_id`, until it has ended.

        A stream that breaks is taken up again after the last event that came. Raises UnreachableError, or what the
        service says, once nothing has come for `patience_seconds` of trying.
        """
        path, after = f"/jobs/{_part(job_id)}/events", last_event_id
        attempt, lost_at = 0, 0.0

        while True:
            headers = {"Accept": "text/event-stream"}
            if after is not None:
                headers["Last-Event-ID"] = str(after)
            problem: ApiError = UnreachableError(f"{self.base_url} closed the stream of events of {job_id}")
            try:
                with self._transport.stream(path, headers, _SILENCE_SECONDS) as answer:
                    try:
                        for message in EventSource(answer).iter_sse():
                            if message.event == "end":
                                return
                            if message.data:  # httpx-sse makes an empty message of a keep-alive comment
                                event = _read(EventOut, message.data)
                                after = event.id
                                yield event
                    finally:
                        attempt = 0 if answer.num_bytes_downloaded else attempt
            except httpx.TransportError as error:
                problem = self._transport.unreachable(error)
            except (UnavailableError, TooManyRequestsError) as error:
                problem = error
            lost_at = time.monotonic() if attempt == 0 else lost_at
            if time.monotonic() - lost_at > patience_seconds:
                raise problem
            self._transport.again(problem.detail, attempt)
            attempt += 1

    def logs(self, job_id: str) -> str:
        """The job's log as text, a line an event."""
        return self._transport.request("GET", f"/jobs/{_part(job_id)}/logs", headers={"Accept": "text/plain"}).text

    def metrics(self, job_id: str) -> MetricsOut:
        """Mean scores by round, split, scorer and model."""
        return self._get(f"/jobs/{_part(job_id)}/metrics", MetricsOut)

    # what jobs made

    def samples(self, **filters: Unpack[SampleFilters]) -> Iterator[SampleOut]:
        """Samples, oldest first."""
        return _all(lambda cursor: self.samples_page(_MOST, cursor, **filters))

    def samples_page(
        self, limit: int = 50, cursor: str | None = None, **filters: Unpack[SampleFilters]
    ) -> ListOut[SampleOut]:
        """A page of them."""
        return self._get("/samples", ListOut[SampleOut], limit=limit, cursor=cursor, **filters)

    def sample(self, sample_id: str) -> SampleDetail:
        """A sample, with the pairs that it is in."""
        return self._get(f"/samples/{_part(sample_id)}", SampleDetail)

    def pairs(self, **filters: Unpack[PairFilters]) -> Iterator[PairOut]:
        """Pairs, oldest first."""
        return _all(lambda cursor: self.pairs_page(_MOST, cursor, **filters))

    def pairs_page(
        self, limit: int = 50, cursor: str | None = None, **filters: Unpack[PairFilters]
    ) -> ListOut[PairOut]:
        """A page of them."""
        return self._get("/pairs", ListOut[PairOut], limit=limit, cursor=cursor, **filters)

    def pair(self, pair_id: str) -> PairOut:
        """A pair: base, reference and target side by side."""
        return self._get(f"/pairs/{_part(pair_id)}", PairOut)

    def set_verdict(
        self,
        pair_id: str,
        prefer: Verdict | str | None,
        *,
        reviewer: str | None = None,
        revision: int | None = None,
    ) -> PairOut:
        """Say which side of a pair is better; None takes it back. With the `revision` that was looked at, another
        reviewer's verdict is not overwritten unseen: PreconditionError."""
        answer = self._transport.request(
            "PUT",
            f"/pairs/{_part(pair_id)}/verdict",
            json={"prefer": prefer, "reviewer": reviewer},
            headers={} if revision is None else {"If-Match": f'"{revision}"'},
            repeatable=revision is None,
        )
        return _read(PairOut, answer.content)

    def models(self, **filters: Unpack[ModelFilters]) -> Iterator[ModelOut]:
        """Models, newest first."""
        return _all(lambda cursor: self.models_page(_MOST, cursor, **filters))

    def models_page(
        self, limit: int = 50, cursor: str | None = None, **filters: Unpack[ModelFilters]
    ) -> ListOut[ModelOut]:
        """A page of them."""
        return self._get("/models", ListOut[ModelOut], limit=limit, cursor=cursor, **filters)

    def model(self, model: str) -> ModelDetail:
        """A model by its id, its name or an alias."""
        return self._get(f"/models/{_part(model)}", ModelDetail)

    def lineage(self, model: str) -> LineageOut:
        """Where a model came from, down to the base model."""
        return self._get(f"/models/{_part(model)}/lineage", LineageOut)

    def set_alias(self, name: str, model_id: str) -> ModelDetail:
        """Let a name, such as "champion", mean a model; it can move to another."""
        answer = self._transport.request("PUT", f"/aliases/{_part(name)}", json={"model": model_id})
        return _read(ModelDetail, answer.content)

    def remove_alias(self, name: str) -> None:
        """Let a name mean nothing any more."""
        self._transport.request("DELETE", f"/aliases/{_part(name)}", repeatable=False)

    def exports(self, job_id: str) -> ListOut[ExportOut]:
        """The data sets that were made of a job's pairs, newest first."""
        return self._get("/exports", ListOut[ExportOut], job=job_id)

    # files

    def download(self, artifact: str, file: str | Path) -> str:
        """Write an artifact, named by its id or its path here, to a file; the SHA-256 of its bytes.

        The file appears when all bytes are there and their SHA-256 is the service's; otherwise DownloadError.
        """
        return download(self._transport, _artifact_path(artifact), Path(file), self._retries)

    def read(self, artifact: str) -> bytes:
        """An artifact's bytes; as `download`, for those that are small."""
        found = BytesIO()
        fetch(self._transport, _artifact_path(artifact), found, self._retries)
        return found.getvalue()

    def download_model(self, model: str, file: str | Path, *, format: AdapterFormat = "diffusers") -> str:
        """Write a model's adapter to a file. Raises ConflictError if it is not exported in that format yet."""
        path = f"/models/{_part(model)}/download"
        answer = self._transport.request("GET", path, params={"format": format})
        if "location" not in answer.headers:
            raise NotFoundError(f"{path} does not say where the file is")
        return self.download(httpx.URL(answer.headers["location"]).path, file)

    # prompt sets

    def prompt_sets(self) -> Iterator[PromptSetOut]:
        """Prompt sets that have a name, in their newest versions."""
        return _all(lambda cursor: self.prompt_sets_page(_MOST, cursor))

    def prompt_sets_page(self, limit: int = 50, cursor: str | None = None) -> ListOut[PromptSetOut]:
        """A page of them."""
        return self._get("/prompt-sets", ListOut[PromptSetOut], limit=limit, cursor=cursor)

    def prompt_set(self, name_or_id: str) -> PromptSetDetail:
        """A prompt set by its name (newest version) or id, with its prompts."""
        return self._get(f"/prompt-sets/{_part(name_or_id)}", PromptSetDetail)

    def add_prompt_set(
        self,
        name: str,
        prompts: Sequence[BaseModel | Body],
        *,
        description: str | None = None,
        idempotency_key: str | None = None,
    ) -> PromptSetDetail:
        """A new prompt set; under a name that is there already, its next version."""
        body: dict[str, Any] = {"name": name, "prompts": [_body(prompt) for prompt in prompts]}
        if description is not None:
            body["description"] = description
        return self._create("/prompt-sets", PromptSetDetail, idempotency_key, json=body)

    def add_prompt_text(
        self,
        name: str,
        text: str,
        *,
        media_type: Literal["text/plain", "text/csv"] = "text/plain",
        description: str | None = None,
        idempotency_key: str | None = None,
    ) -> PromptSetDetail:
        """A new prompt set from text: a prompt a line, items in brackets, "a [cat] eating a [sandwich]"; or CSV."""
        return self._create(
            "/prompt-sets",
            PromptSetDetail,
            idempotency_key,
            params={"name": name, "description": description},
            content=text.encode("utf-8"),
            headers={"Content-Type": f"{media_type}; charset=utf-8"},
        )

    # the service itself

    def health(self) -> HealthOut:
        """Whether the service answers."""
        return self._get("/healthz", HealthOut)

    def ready(self) -> ReadyOut:
        """Whether the service can work, and what it found when it looked."""
        answer = self._transport.request("GET", "/readyz", also=frozenset({HTTPStatus.SERVICE_UNAVAILABLE}))
        return _read(ReadyOut, answer.content)

    def version(self) -> str:
        """The service's version."""
        document = self._transport.request("GET", "/openapi.json").json()
        return str(document["info"]["version"])

    def workers(self) -> WorkersOut:
        """The workers that were seen within a day, and what they do."""
        return self._get("/workers", WorkersOut)

    def prometheus(self) -> str:
        """Figures of the service in Prometheus' text format."""
        return self._transport.request("GET", "/metrics", headers={"Accept": "text/plain"}).text

    def make_api_key(
        self, name: str, scopes: Sequence[KeyScope | str], *, expires_at: datetime | None = None
    ) -> ApiKeyCreated:
        """Make an API key. The answer is the only place where it is ever shown."""
        body = {"name": name, "scopes": list(scopes), "expires_at": expires_at and expires_at.isoformat()}
        answer = self._transport.request("POST", "/api-keys", json=body, repeatable=False)
        return _read(ApiKeyCreated, answer.content)

    def api_keys(self) -> Iterator[ApiKeyOut]:
        """API keys, newest first, revoked and expired ones too."""
        return _all(lambda cursor: self.api_keys_page(_MOST, cursor))

    def api_keys_page(self, limit: int = 50, cursor: str | None = None) -> ListOut[ApiKeyOut]:
        """A page of them."""
        return self._get("/api-keys", ListOut[ApiKeyOut], limit=limit, cursor=cursor)

    def revoke_api_key(self, key_id: str) -> None:
        """Revoke an API key; one that is revoked stays so."""
        self._transport.request("DELETE", f"/api-keys/{_part(key_id)}")

    def _get(self, path: str, model: type[M], *, wait_seconds: float = 0, **params: Any) -> M:
        if wait_seconds:
            params["wait"] = wait_seconds
        answer = self._transport.request("GET", path, params=params, wait_seconds=wait_seconds)
        return _read(model, answer.content)


def _all(page: Callable[[str | None], ListOut[T]]) -> Iterator[T]:
    """What is on all pages."""
    cursor: str | None = None
    while True:
        found = page(cursor)
        yield from found.data
        if not found.has_more:
            return
        cursor = found.next_cursor


def _body(spec: BaseModel | Body) -> Any:
    """What is sent for a spec: what was set in it, so that the service's defaults hold for the rest."""
    return spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, BaseModel) else dict(spec)


def _read(model: type[M], answer: bytes | str) -> M:
    """`answer` as that model. Raises ApiError for one of a service of another make or version."""
    try:
        return model.model_validate_json(answer)
    except ValidationError as error:
        detail = f"the service's answer is no {model.__name__}: is it of this client's version?"
        raise ApiError(detail, code="unexpected_answer") from error


def _artifact_path(artifact: str) -> str:
    return artifact if artifact.startswith("/") else f"/artifacts/{_part(artifact)}"


def _part(text: str) -> str:
    """`text` as one part of a path."""
    return quote(text, safe="")
