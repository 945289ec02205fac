"""The client: a typed method for each operation of the REST API. Responses are parsed into the models of `api.wire`."""

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

from api.client import DEFAULT_URL
from api.client.downloads import download, fetch
from api.client.errors import ApiError, NotFoundError, TooManyRequestsError, UnavailableError, UnreachableError
from api.client.transport import Backoff, OnRetry, Transport
from api.wire.api_keys import ApiKeyCreated, ApiKeyOut
from api.wire.common import ListOut
from api.wire.estimates import EstimateOut
from api.wire.health import HealthOut, ReadyOut
from api.wire.jobs import EventOut, JobDetail, JobOut, MetricsOut, StageOut
from api.wire.models import AncestorOut, ExportOut, ModelDetail, ModelOut
from api.wire.pairs import AgreementOut, GoldOut, PairOut
from api.wire.preference_tests import (
    NextQuestionOut,
    PreferenceQuestionOut,
    PreferenceResultsOut,
    PreferenceTestOut,
)
from api.wire.prompt_sets import PromptSetDetail, PromptSetOut
from api.wire.samples import SampleDetail, SampleOut
from api.wire.webhooks import DeliveryOut, WebhookCreated, WebhookOut
from api.wire.workers import WorkersOut
from dfusion.recipes import FOLDERS, Companions, ExportFormat
from dfusion.rewards.signs import SignName
from service.jobs.kinds import (
    KINDS,
    EvaluationJobSpec,
    ExportJobSpec,
    FusionJobSpec,
    PreviewJobSpec,
    RoundSpec,
    SamplingJobSpec,
    TrainingJobSpec,
)
from service.states import JobKind, JobState, KeyScope, SampleRole, StageKind, StageState, Verdict, WebhookEvent

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Body = Mapping[str, Any]

PATHS: Mapping[JobKind, str] = MappingProxyType({name: kind.path for name, kind in KINDS.items()})
"""The path to which each kind of job is submitted."""
_MAX_PAGE_SIZE = 200
"""The maximum page size of the service."""
_MAX_WAIT_SECONDS = 30.0
_WAITING_POLL_SECONDS = 2.0
"""Pause between two requests for a job that waits for verdicts."""
_EVENT_TIMEOUT_SECONDS = 45.0
"""Read timeout of event streams. The service sends events or keep-alive comments every 15 seconds."""


class TimeFilters(TypedDict, total=False):
    """The period in which results or jobs were created; `created_before` is the first time after it."""

    created_after: datetime | str | None
    created_before: datetime | str | None


class ScoreFilters(TimeFilters, total=False):
    """Filters by prompts and scores. The bounds need a scorer; of pairs, they are those of the target's score."""

    prompt: str | Sequence[str] | None
    scorer: str | None
    score_min: float | None
    score_max: float | None


class JobFilters(TimeFilters, total=False):
    """Filters of jobs. `origin` is the id of the job that a job retries. Several states or kinds match any of them."""

    state: JobState | str | Sequence[JobState | str] | None
    kind: JobKind | str | Sequence[JobKind | str] | None
    prompt_set: str | None
    origin: str | None


class StageFilters(TypedDict, total=False):
    """Which stages of a job; `with_error`: only those whose last attempt has failed."""

    state: StageState | str | Sequence[StageState | str] | None
    kind: StageKind | str | Sequence[StageKind | str] | None
    round: int | None
    with_error: bool


class SampleFilters(ScoreFilters, total=False):
    """Filters of samples. Several roles or prompts match any of them."""

    job: str | None
    role: SampleRole | str | Sequence[SampleRole | str] | None
    round: int | None
    prompt_set: str | None


class PairFilters(ScoreFilters, total=False):
    """Filters of pairs. Several prompts match any of them.

    `judged` tells whether a pair has a verdict, and `judged_by_me` whether it has one of `reviewer`; with API keys, of
    the name of the key. `reviewers_below` matches pairs that fewer reviewers have judged, and `in_review` those that a
    review of their round waits for. `gold` needs the scope admin.
    """

    job: str | None
    round: int | None
    adopted: bool | None
    judged: bool | None
    judged_by_me: bool | None
    reviewer: str | None
    reviewers_below: int | None
    in_review: bool | None
    gold: bool | None
    prompt_set: str | None


class ModelFilters(TypedDict, total=False):
    """Filters of models."""

    job: str | None


class ExportFilters(TypedDict, total=False):
    """Filters of exports: those of a job's pairs, those of a model."""

    job: str | None
    model: str | None


class Client:
    """A client of one service. Use it in a `with` block, or call `close`.

    Requests are retried after connection errors and after the statuses 429 and 503. Requests that create jobs carry an
    Idempotency-Key, so that a retry never creates a second job.

    Args:
        base_url: The address of the service.
        api_key: The API key, if the service requires one.
        timeout: Seconds to wait for a response.
        retries: The maximum number of retries per request.
        trust_env: Whether httpx reads proxies, certificates and credentials from the environment (HTTP_PROXY, NO_PROXY,
            SSL_CERT_FILE, .netrc).
        on_retry: Called before each retry with the reason and the seconds until the retry.
        backoff: The pauses between retries; by default exponential with jitter.

    Raises:
        ApiError: Any method raises it, or a subclass, if the request fails.

    Example:
        >>> with Client("http://127.0.0.1:8000") as client:
        ...     job = client.start_sampling({"model": "shapes", "prompts": [{"text": "a red circle"}]})
        ...     client.wait(job.id).state
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
        """Close the connections."""
        self._transport.close()

    @property
    def base_url(self) -> str:
        """The address of the service."""
        return self._transport.base_url

    # starting jobs

    def start_round(self, spec: RoundSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Start a round job: train a model online, on pairs of its own samples."""
        return self.submit(JobKind.ROUND, spec, idempotency_key=idempotency_key)

    def start_sampling(self, spec: SamplingJobSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Start a sampling job: generate images for prompts."""
        return self.submit(JobKind.SAMPLING, spec, idempotency_key=idempotency_key)

    def start_fusion(self, spec: FusionJobSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Start a fusion job: fuse stored samples."""
        return self.submit(JobKind.FUSION, spec, idempotency_key=idempotency_key)

    def start_training(self, spec: TrainingJobSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Start a training job: train a model on stored pairs."""
        return self.submit(JobKind.TRAINING, spec, idempotency_key=idempotency_key)

    def start_evaluation(self, spec: EvaluationJobSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Start an evaluation job: compare models on the same prompts and seeds."""
        return self.submit(JobKind.EVALUATION, spec, idempotency_key=idempotency_key)

    def start_export(self, spec: ExportJobSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Start an export job: convert an adapter, or the pairs of a job, to a format that other programs read."""
        return self.submit(JobKind.EXPORT, spec, idempotency_key=idempotency_key)

    def start_preview(self, spec: PreviewJobSpec | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Start a preview job: small images of the denoising of samples. Existing ones are not made again."""
        return self.submit(JobKind.PREVIEW, spec, idempotency_key=idempotency_key)

    def submit(self, kind: JobKind, spec: BaseModel | Body, *, idempotency_key: str | None = None) -> JobDetail:
        """Create a job. A repeated request with the same Idempotency-Key returns the first request's job."""
        return self._create(PATHS[kind], JobDetail, idempotency_key, json=_body(spec))

    def estimate(self, kind: JobKind, spec: BaseModel | Body) -> EstimateOut:
        """Estimate the work of a job without creating it."""
        response = self._transport.request("POST", PATHS[kind], params={"dry_run": True}, json=_body(spec))
        return _read(EstimateOut, response.content)

    def _create(self, path: str, model: type[M], key: str | None, **options: Any) -> M:
        headers = {**options.pop("headers", {}), "Idempotency-Key": key or uuid.uuid4().hex}
        response = self._transport.request("POST", path, headers=headers, **options)
        return _read(model, response.content)

    # jobs

    def jobs(self, **filters: Unpack[JobFilters]) -> Iterator[JobOut]:
        """Iterate over jobs, newest first."""
        return _all(lambda cursor: self.jobs_page(_MAX_PAGE_SIZE, cursor, **filters))

    def jobs_page(self, limit: int = 50, cursor: str | None = None, **filters: Unpack[JobFilters]) -> ListOut[JobOut]:
        """Return one page of jobs."""
        return self._get("/jobs", ListOut[JobOut], limit=limit, cursor=cursor, **filters)

    def job(self, job_id: str, *, wait: float = 0) -> JobDetail:
        """Return a job. With `wait`, returns when it has ended or waits for verdicts, or after that many seconds."""
        return self._get(f"/jobs/{_segment(job_id)}", JobDetail, wait_seconds=wait)

    def wait(self, job_id: str, *, timeout: float | None = None) -> JobDetail:
        """Wait until a job has ended. Raises TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _MAX_WAIT_SECONDS if deadline is None else deadline - time.monotonic()
            job = self.job(job_id, wait=max(0.0, min(left, _MAX_WAIT_SECONDS)))
            if job.state.is_final:
                return job
            if left <= 0:
                raise TimeoutError(f"{job_id} is still {job.state}")
            if job.state is JobState.WAITING:  # the service responds immediately
                time.sleep(_WAITING_POLL_SECONDS)

    def cancel(self, job_id: str) -> JobDetail:
        """Cancel a job. Has no effect if the job has ended."""
        return self._act(job_id, "cancel", idempotent=True)

    def delete_job(self, job_id: str) -> None:
        """Delete a job that has ended, with its results.

        Raises:
            ConflictError: The job has not ended, or other jobs, aliases or preference tests use its results; `errors`
                lists them.
        """
        self._transport.request("DELETE", f"/jobs/{_segment(job_id)}", idempotent=False)

    def pause(self, job_id: str) -> JobDetail:
        """Pause a job until it is resumed. Raises ConflictError if the job has ended."""
        return self._act(job_id, "pause", idempotent=True)

    def resume(self, job_id: str) -> JobDetail:
        """Resume a paused job. Raises ConflictError for other states."""
        return self._act(job_id, "resume", idempotent=False)

    def skip_review(self, job_id: str) -> JobDetail:
        """Let a job that waits for verdicts continue without the missing ones. Raises ConflictError for others."""
        return self._act(job_id, "skip-review", idempotent=False)

    def retry(self, job_id: str, *, idempotency_key: str | None = None) -> JobDetail:
        """Create a job with the request of a failed or cancelled one. Raises ConflictError for other states."""
        return self._create(f"/jobs/{_segment(job_id)}/retry", JobDetail, idempotency_key)

    def continue_job(self, job_id: str) -> JobDetail:
        """Continue a failed or cancelled job with the stages that have not succeeded.

        The other stages keep their results. Raises ConflictError for other states.
        """
        path = f"/jobs/{_segment(job_id)}/retry"
        response = self._transport.request("POST", path, params={"from": "failed"}, idempotent=False)
        return _read(JobDetail, response.content)

    def raise_rounds(self, job_id: str, rounds: int, stop_when: Sequence[SignName] | None = None) -> JobDetail:
        """Raise the number of all rounds of a round job, which continues with the round after its last one.

        Has no effect if the job has this number of rounds. Raises ConflictError if it has not succeeded, and
        InvalidError for a smaller number.

        Args:
            job_id: The job.
            rounds: The number of all its rounds.
            stop_when: The warning signs that end it before them: none if empty, as before if None.
        """
        body = {"rounds": rounds} | ({} if stop_when is None else {"stop_when": list(stop_when)})
        response = self._transport.request("PATCH", f"/jobs/{_segment(job_id)}", json=body)
        return _read(JobDetail, response.content)

    def _act(self, job_id: str, action: str, *, idempotent: bool) -> JobDetail:
        response = self._transport.request("POST", f"/jobs/{_segment(job_id)}/{action}", idempotent=idempotent)
        return _read(JobDetail, response.content)

    def stages(self, job_id: str, **filters: Unpack[StageFilters]) -> Iterator[StageOut]:
        """Iterate over the stages of a job, in order."""
        return _all(lambda cursor: self.stages_page(job_id, _MAX_PAGE_SIZE, cursor, **filters))

    def stages_page(
        self, job_id: str, limit: int = 50, cursor: str | None = None, **filters: Unpack[StageFilters]
    ) -> ListOut[StageOut]:
        """Return one page of stages."""
        return self._get(f"/jobs/{_segment(job_id)}/stages", ListOut[StageOut], limit=limit, cursor=cursor, **filters)

    def events(self, job_id: str) -> Iterator[EventOut]:
        """Iterate over the events of a job so far, oldest first."""
        return _all(lambda cursor: self.events_page(job_id, _MAX_PAGE_SIZE, cursor))

    def events_page(
        self, job_id: str, limit: int = 50, cursor: str | None = None, *, wait: float = 0
    ) -> ListOut[EventOut]:
        """Return one page of events. With `wait`, waits up to that many seconds for an event after the cursor."""
        path = f"/jobs/{_segment(job_id)}/events"
        return self._get(path, ListOut[EventOut], wait_seconds=wait, limit=limit, cursor=cursor)

    def follow(
        self, job_id: str, *, last_event_id: int | None = None, patience_seconds: float = 120
    ) -> Iterator[EventOut]:
        """Stream the events of a job until it has ended.

        If the connection breaks, the stream is resumed after the last event received.

        Args:
            job_id: The job.
            last_event_id: Skip events up to this id; None starts with the first event.
            patience_seconds: Give up after this time without data from the service.

        Raises:
            UnreachableError: The service did not respond for `patience_seconds`.
            ApiError: The service refused the request, or was unavailable for `patience_seconds`.
        """
        path = f"/jobs/{_segment(job_id)}/events"
        after = last_event_id
        attempt = 0
        lost_at = 0.0

        while True:
            headers = {"Accept": "text/event-stream"}
            if after is not None:
                headers["Last-Event-ID"] = str(after)
            problem: ApiError = UnreachableError(f"{self.base_url} closed the stream of events of {job_id}")
            try:
                with self._transport.stream(path, headers, _EVENT_TIMEOUT_SECONDS) as response:
                    if response.status_code == HTTPStatus.NO_CONTENT:  # the job has ended, and all events were received
                        return
                    try:
                        for message in EventSource(response).iter_sse():
                            if message.event == "end":
                                return
                            if message.data:  # httpx-sse yields keep-alive comments as empty messages
                                event = _read(EventOut, message.data)
                                after = event.id
                                yield event
                    finally:
                        attempt = 0 if response.num_bytes_downloaded else attempt
            except httpx.TransportError as error:
                problem = self._transport.unreachable(error)
            except (UnavailableError, TooManyRequestsError) as error:
                problem = error

            # retry, with growing pauses until data arrive
            lost_at = time.monotonic() if attempt == 0 else lost_at
            if time.monotonic() - lost_at > patience_seconds:
                raise problem
            self._transport.pause_before_retry(problem.detail, attempt)
            attempt += 1

    def logs(self, job_id: str) -> str:
        """Return the log of a job as text, one line per event."""
        return self._transport.request("GET", f"/jobs/{_segment(job_id)}/logs", headers={"Accept": "text/plain"}).text

    def report(self, job_id: str, *, pairs: int = 12, prompts: int = 8) -> str:
        """Return the report of a job, an HTML page that needs no other file.

        Args:
            job_id: The job.
            pairs: The number of pairs to show.
            prompts: The number of prompts whose images before and after training are shown.
        """
        path = f"/jobs/{_segment(job_id)}/report"
        parameters = {"pairs": pairs, "prompts": prompts}
        return self._transport.request("GET", path, params=parameters, headers={"Accept": "text/html"}).text

    def metrics(self, job_id: str) -> MetricsOut:
        """Return mean scores by round, split, scorer and model, of all rounds."""
        path = f"/jobs/{_segment(job_id)}/metrics"
        metrics = self._get(path, MetricsOut, limit=_MAX_PAGE_SIZE)
        page = metrics
        while page.next_cursor is not None:
            page = self._get(path, MetricsOut, limit=_MAX_PAGE_SIZE, cursor=page.next_cursor)
            metrics.data.extend(page.data)
            metrics.pairings.extend(page.pairings)
            metrics.trainings.extend(page.trainings)
        return metrics.model_copy(update={"has_more": False, "next_cursor": None})

    # results of jobs

    def samples(self, **filters: Unpack[SampleFilters]) -> Iterator[SampleOut]:
        """Iterate over samples, oldest first."""
        return _all(lambda cursor: self.samples_page(_MAX_PAGE_SIZE, cursor, **filters))

    def samples_page(
        self, limit: int = 50, cursor: str | None = None, **filters: Unpack[SampleFilters]
    ) -> ListOut[SampleOut]:
        """Return one page of samples."""
        return self._get("/samples", ListOut[SampleOut], limit=limit, cursor=cursor, **filters)

    def sample(self, sample_id: str) -> SampleDetail:
        """Return a sample, with the pairs that contain it."""
        return self._get(f"/samples/{_segment(sample_id)}", SampleDetail)

    def pairs(self, **filters: Unpack[PairFilters]) -> Iterator[PairOut]:
        """Iterate over pairs, oldest first."""
        return _all(lambda cursor: self.pairs_page(_MAX_PAGE_SIZE, cursor, **filters))

    def pairs_page(
        self, limit: int = 50, cursor: str | None = None, **filters: Unpack[PairFilters]
    ) -> ListOut[PairOut]:
        """Return one page of pairs."""
        return self._get("/pairs", ListOut[PairOut], limit=limit, cursor=cursor, **filters)

    def pair(self, pair_id: str) -> PairOut:
        """Return a pair with its base, reference and target."""
        return self._get(f"/pairs/{_segment(pair_id)}", PairOut)

    def set_verdict(
        self,
        pair_id: str,
        prefer: Verdict | str | None,
        *,
        reviewer: str | None = None,
        revision: int | None = None,
    ) -> PairOut:
        """Set the reviewer's verdict on a pair: which side is better. Verdicts of other reviewers do not change.

        Args:
            pair_id: The pair.
            prefer: The better side; None removes the verdict.
            reviewer: The name of the reviewer. With API keys it is the name of the key, and no other is accepted.
            revision: The revision of the pair that the reviewer saw. It prevents overwriting a newer verdict of theirs.

        Raises:
            PreconditionError: The reviewer's verdict has changed since this revision.
        """
        response = self._transport.request(
            "PUT",
            f"/pairs/{_segment(pair_id)}/verdict",
            json={"prefer": prefer, "reviewer": reviewer},
            headers={} if revision is None else {"If-Match": f'"{revision}"'},
            idempotent=revision is None,
        )
        return _read(PairOut, response.content)

    def agreement(self, *, job: str | None = None, prompt_set: str | None = None) -> AgreementOut:
        """Return how well reviewers agree on the pairs of a job, of a prompt set, or on all pairs."""
        return self._get("/verdicts/agreement", AgreementOut, job=job, prompt_set=prompt_set)

    def gold(self, pair_id: str) -> GoldOut:
        """Return the expected verdict of a gold pair. Needs the scope `admin`."""
        return self._get(f"/pairs/{_segment(pair_id)}/gold", GoldOut)

    def set_gold(self, pair_id: str, expected: Verdict | str | None) -> GoldOut:
        """Make a pair a gold pair with this expected verdict; None makes it an ordinary one."""
        path = f"/pairs/{_segment(pair_id)}/gold"
        response = self._transport.request("PUT", path, json={"expected": expected}, idempotent=True)
        return _read(GoldOut, response.content)

    def models(self, **filters: Unpack[ModelFilters]) -> Iterator[ModelOut]:
        """Iterate over models, newest first."""
        return _all(lambda cursor: self.models_page(_MAX_PAGE_SIZE, cursor, **filters))

    def models_page(
        self, limit: int = 50, cursor: str | None = None, **filters: Unpack[ModelFilters]
    ) -> ListOut[ModelOut]:
        """Return one page of models."""
        return self._get("/models", ListOut[ModelOut], limit=limit, cursor=cursor, **filters)

    def model(self, model: str) -> ModelDetail:
        """Return a model by its id, name or alias."""
        return self._get(f"/models/{_segment(model)}", ModelDetail)

    def lineage(self, model: str) -> Iterator[AncestorOut]:
        """Iterate over a model and its ancestors, down to the base model."""
        return _all(lambda cursor: self.lineage_page(model, _MAX_PAGE_SIZE, cursor))

    def lineage_page(self, model: str, limit: int = 50, cursor: str | None = None) -> ListOut[AncestorOut]:
        """Return one page of a model and its ancestors."""
        path = f"/models/{_segment(model)}/lineage"
        return self._get(path, ListOut[AncestorOut], limit=limit, cursor=cursor)

    def set_alias(self, name: str, model: str) -> ModelDetail:
        """Set an alias of a model, such as "champion". An alias can be moved to another model."""
        response = self._transport.request("PUT", f"/aliases/{_segment(name)}", json={"model": model})
        return _read(ModelDetail, response.content)

    def remove_alias(self, name: str) -> None:
        """Remove an alias."""
        self._transport.request("DELETE", f"/aliases/{_segment(name)}", idempotent=False)

    def exports(self, **filters: Unpack[ExportFilters]) -> Iterator[ExportOut]:
        """Iterate over exports of models and of the pairs of jobs, newest first."""
        return _all(lambda cursor: self.exports_page(_MAX_PAGE_SIZE, cursor, **filters))

    def exports_page(
        self, limit: int = 50, cursor: str | None = None, **filters: Unpack[ExportFilters]
    ) -> ListOut[ExportOut]:
        """Return one page of exports."""
        return self._get("/exports", ListOut[ExportOut], limit=limit, cursor=cursor, **filters)

    # preference tests

    def create_preference_test(
        self,
        evaluation: str,
        *,
        name: str | None = None,
        models: Sequence[str] | None = None,
        prompt_sets: Sequence[str] | None = None,
        questions: int | None = None,
    ) -> PreferenceTestOut:
        """Create a human preference test from the images of an evaluation.

        Args:
            evaluation: The evaluation job, which has succeeded.
            name: Display name.
            models: Ids, names or aliases of 2 to 8 of its models; None for all.
            prompt_sets: Some of its prompt sets; None for all.
            questions: The number of questions, drawn at random; None for all prompts and seeds.
        """
        given = {"name": name, "models": models, "prompt_sets": prompt_sets, "questions": questions}
        body = {"evaluation": evaluation} | {field: value for field, value in given.items() if value is not None}
        response = self._transport.request("POST", "/preference-tests", json=body, idempotent=False)
        return _read(PreferenceTestOut, response.content)

    def preference_tests(self, evaluation: str | None = None) -> Iterator[PreferenceTestOut]:
        """Iterate over preference tests, newest first; optionally of one evaluation."""
        return _all(lambda cursor: self.preference_tests_page(evaluation, _MAX_PAGE_SIZE, cursor))

    def preference_tests_page(
        self, evaluation: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> ListOut[PreferenceTestOut]:
        """Return one page of preference tests."""
        path = "/preference-tests"
        return self._get(path, ListOut[PreferenceTestOut], evaluation=evaluation, limit=limit, cursor=cursor)

    def preference_test(self, test_id: str) -> PreferenceTestOut:
        """Return a preference test."""
        return self._get(f"/preference-tests/{_segment(test_id)}", PreferenceTestOut)

    def delete_preference_test(self, test_id: str) -> None:
        """Delete a preference test with all its answers."""
        self._transport.request("DELETE", f"/preference-tests/{_segment(test_id)}", idempotent=False)

    def next_preference_question(self, test_id: str, *, rater: str | None = None) -> NextQuestionOut:
        """Return the rater's next question without an answer. With API keys, the rater is the name of the key."""
        return self._get(f"/preference-tests/{_segment(test_id)}/next", NextQuestionOut, rater=rater)

    def preference_question(self, test_id: str, number: int, *, rater: str | None = None) -> PreferenceQuestionOut:
        """Return a question with the rater's answer."""
        path = f"/preference-tests/{_segment(test_id)}/questions/{number}"
        return self._get(path, PreferenceQuestionOut, rater=rater)

    def answer_preference_question(
        self, test_id: str, number: int, choice: int | Literal["none"] | None, *, rater: str | None = None
    ) -> PreferenceQuestionOut:
        """Answer a question, change the answer or remove it.

        Args:
            test_id: The test.
            number: The number of the question.
            choice: The position of the best image, from 1; "none" if none is better than all others; None removes the
                answer.
            rater: The name of the rater. With API keys it is the name of the key, and no other is accepted.
        """
        path = f"/preference-tests/{_segment(test_id)}/questions/{number}/answer"
        response = self._transport.request("PUT", path, json={"choice": choice, "rater": rater})
        return _read(PreferenceQuestionOut, response.content)

    def preference_results(self, test_id: str, *, confidence: float = 0.95) -> PreferenceResultsOut:
        """Return how often each model was chosen, with Wilson intervals."""
        return self._get(f"/preference-tests/{_segment(test_id)}/results", PreferenceResultsOut, confidence=confidence)

    def preference_results_csv(self, test_id: str, *, confidence: float = 0.95) -> str:
        """Return the results of a preference test as CSV."""
        return self._csv(f"/preference-tests/{_segment(test_id)}/results.csv", confidence=confidence)

    def preference_answers_csv(self, test_id: str) -> str:
        """Return all answers of a preference test as CSV."""
        return self._csv(f"/preference-tests/{_segment(test_id)}/answers.csv")

    def _csv(self, path: str, **params: Any) -> str:
        return self._transport.request("GET", path, params=params, headers={"Accept": "text/csv"}).text

    # files

    def download(self, artifact: str, file: str | Path) -> str:
        """Download an artifact to a file. The file appears only if the download is complete and verified.

        Args:
            artifact: The id of the artifact, or its path on the service.
            file: The file to write.

        Returns:
            The SHA-256 of the file.

        Raises:
            DownloadError: The SHA-256 is not the one that the service declares.
            OSError: The file cannot be written.
        """
        return download(self._transport, _artifact_path(artifact), Path(file), self._retries)

    def read(self, artifact: str) -> bytes:
        """Return the bytes of a small artifact. Raises DownloadError, as `download` does."""
        buffer = BytesIO()
        fetch(self._transport, _artifact_path(artifact), buffer, self._retries)
        return buffer.getvalue()

    def download_model(self, model: str, file: str | Path, *, format: ExportFormat = "diffusers") -> str:
        """Download a model's adapter to a file. Returns its SHA-256. Folders come as ZIP files.

        Raises:
            ConflictError: The model has not been exported in that format.
        """
        path = f"/models/{_segment(model)}/download"
        response = self._transport.request("GET", path, params={"format": format})
        if "location" not in response.headers:
            raise NotFoundError(f"{path}: expected a redirect to the file, got none")
        return self.download(httpx.URL(response.headers["location"]).path, file)

    def download_preview(
        self, model: str, file: str | Path, *, format: ExportFormat = "diffusers"
    ) -> Companions | None:
        """Download the preview of a model's newest export in this format, and its recipe, next to `file`.

        Returns:
            The files. None if there is nothing to download: no such export, or a folder, whose ZIP file has them.
        """
        of_model = self.exports(model=model) if format not in FOLDERS else iter(())
        export = next((export for export in of_model if export.format == format), None)
        if export is None or export.recipe is None or export.preview is None:
            return None

        companions = Companions.of(Path(file), format)
        companions.recipe.write_text(export.recipe.to_json(), "utf-8")
        self.download(export.preview, companions.preview)
        return companions

    # prompt sets

    def prompt_sets(self) -> Iterator[PromptSetOut]:
        """Iterate over the newest versions of all named prompt sets."""
        return _all(lambda cursor: self.prompt_sets_page(_MAX_PAGE_SIZE, cursor))

    def prompt_sets_page(self, limit: int = 50, cursor: str | None = None) -> ListOut[PromptSetOut]:
        """Return one page of prompt sets."""
        return self._get("/prompt-sets", ListOut[PromptSetOut], limit=limit, cursor=cursor)

    def prompt_set(self, name_or_id: str) -> PromptSetDetail:
        """Return a prompt set with its prompts, by its name (newest version) or id."""
        return self._get(f"/prompt-sets/{_segment(name_or_id)}", PromptSetDetail)

    def add_prompt_set(
        self,
        name: str,
        prompts: Sequence[BaseModel | Body],
        *,
        description: str | None = None,
        idempotency_key: str | None = None,
    ) -> PromptSetDetail:
        """Create a prompt set, or the next version if the name exists."""
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
        """Create a prompt set from CSV, or from text: one prompt per line, items in brackets as in "a [cat]"."""
        return self._create(
            "/prompt-sets",
            PromptSetDetail,
            idempotency_key,
            params={"name": name, "description": description},
            content=text.encode("utf-8"),
            headers={"Content-Type": f"{media_type}; charset=utf-8"},
        )

    def delete_prompt_set(self, name_or_id: str) -> None:
        """Delete all versions of a prompt set by its name, or one version by its id.

        Raises:
            ConflictError: A job uses it, or it is a built-in list.
        """
        self._transport.request("DELETE", f"/prompt-sets/{_segment(name_or_id)}", idempotent=False)

    # service

    def health(self) -> HealthOut:
        """Return the health of the API process."""
        return self._get("/healthz", HealthOut)

    def ready(self) -> ReadyOut:
        """Return whether the service is ready, with the results of its checks."""
        response = self._transport.request(
            "GET", "/readyz", allowed_statuses=frozenset({HTTPStatus.SERVICE_UNAVAILABLE})
        )
        return _read(ReadyOut, response.content)

    def version(self) -> str:
        """Return the version of the service."""
        document = self._transport.request("GET", "/openapi.json").json()
        return str(document["info"]["version"])

    def workers(self) -> WorkersOut:
        """Return the workers of the last day, with their current stages."""
        return self._get("/workers", WorkersOut)

    def prometheus(self) -> str:
        """Return the metrics of the service in the text format of Prometheus."""
        return self._transport.request("GET", "/metrics", headers={"Accept": "text/plain"}).text

    def create_api_key(
        self, name: str, scopes: Sequence[KeyScope | str], *, expires_at: datetime | None = None
    ) -> ApiKeyCreated:
        """Create an API key. The key itself is only in this response; the service stores a hash."""
        body = {"name": name, "scopes": list(scopes), "expires_at": expires_at and expires_at.isoformat()}
        response = self._transport.request("POST", "/api-keys", json=body, idempotent=False)
        return _read(ApiKeyCreated, response.content)

    def api_keys(self) -> Iterator[ApiKeyOut]:
        """Iterate over all API keys, newest first, including revoked and expired ones."""
        return _all(lambda cursor: self.api_keys_page(_MAX_PAGE_SIZE, cursor))

    def api_keys_page(self, limit: int = 50, cursor: str | None = None) -> ListOut[ApiKeyOut]:
        """Return one page of API keys."""
        return self._get("/api-keys", ListOut[ApiKeyOut], limit=limit, cursor=cursor)

    def revoke_api_key(self, key_id: str) -> None:
        """Revoke an API key. Has no effect if it is already revoked."""
        self._transport.request("DELETE", f"/api-keys/{_segment(key_id)}")

    def create_webhook(self, url: str, events: Sequence[WebhookEvent | str] = tuple(WebhookEvent)) -> WebhookCreated:
        """Create a webhook. Its secret is only in this response."""
        body = {"url": url, "events": list(events)}
        response = self._transport.request("POST", "/webhooks", json=body, idempotent=False)
        return _read(WebhookCreated, response.content)

    def webhooks(self) -> Iterator[WebhookOut]:
        """Iterate over all webhooks, newest first, including disabled ones."""
        return _all(lambda cursor: self.webhooks_page(_MAX_PAGE_SIZE, cursor))

    def webhooks_page(self, limit: int = 50, cursor: str | None = None) -> ListOut[WebhookOut]:
        """Return one page of webhooks."""
        return self._get("/webhooks", ListOut[WebhookOut], limit=limit, cursor=cursor)

    def remove_webhook(self, webhook_id: str) -> None:
        """Disable a webhook permanently. Has no effect if it is already disabled."""
        self._transport.request("DELETE", f"/webhooks/{_segment(webhook_id)}")

    def webhook_deliveries(self, webhook_id: str | None = None) -> Iterator[DeliveryOut]:
        """Iterate over the deliveries of the last 30 days, newest first; optionally of one webhook."""
        return _all(lambda cursor: self.webhook_deliveries_page(webhook_id, _MAX_PAGE_SIZE, cursor))

    def webhook_deliveries_page(
        self, webhook_id: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> ListOut[DeliveryOut]:
        """Return one page of deliveries."""
        filters: dict[str, Any] = {"webhook": webhook_id, "limit": limit, "cursor": cursor}
        return self._get("/webhook-deliveries", ListOut[DeliveryOut], **filters)

    def replay_webhook_delivery(self, delivery_id: str) -> DeliveryOut:
        """Send a delivery again, with the same id."""
        response = self._transport.request("POST", f"/webhook-deliveries/{_segment(delivery_id)}/replay")
        return _read(DeliveryOut, response.content)

    def _get(self, path: str, model: type[M], /, *, wait_seconds: float = 0, **params: Any) -> M:
        if wait_seconds:
            params["wait"] = wait_seconds
        response = self._transport.request("GET", path, params=params, wait_seconds=wait_seconds)
        return _read(model, response.content)


def _all(fetch_page: Callable[[str | None], ListOut[T]]) -> Iterator[T]:
    """Iterate over the entries of all pages."""
    cursor: str | None = None
    while True:
        page = fetch_page(cursor)
        yield from page.data
        if not page.has_more:
            return
        cursor = page.next_cursor


def _body(spec: BaseModel | Body) -> Any:
    """Return the request body of a spec: only explicitly set fields. The service applies its defaults to the others."""
    return spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, BaseModel) else dict(spec)


def _read(model: type[M], content: bytes | str) -> M:
    """Parse the content of a response. Raises ApiError if it does not fit the model."""
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        detail = f"the response is not a valid {model.__name__}; client and service may have different versions"
        raise ApiError(detail, code="unexpected_response") from error


def _artifact_path(artifact: str) -> str:
    return artifact if artifact.startswith("/") else f"/artifacts/{_segment(artifact)}"


def _segment(text: str) -> str:
    """Quote `text` as one segment of a path."""
    return quote(text, safe="")
