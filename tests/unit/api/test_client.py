"""The Python client against the real application on a real port."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

import api.client.client as client_module
from api.client import (
    ApiError,
    Client,
    ConflictError,
    DownloadError,
    InvalidError,
    NotFoundError,
    PreconditionError,
    TooManyRequestsError,
    UnauthorizedError,
    UnavailableError,
    UnreachableError,
)
from api.client.transport import Backoff
from api.examples import RESPONSES
from api.wire.jobs import EventOut
from service.jobs.kinds import RoundSpec
from service.states import JobKind
from tests.drawn_results import draw_evaluation
from tests.live_service import serving
from tests.proxy import proxy
from tests.service import round_body
from tests.unit.api.conftest import Live, add_export


def cut_after(*lengths: int) -> Callable[[bytes], bytes]:
    """Return a filter that truncates the first connections after these numbers of bytes."""
    left = list(lengths)

    def flaw(piece: bytes) -> bytes:
        if left and len(piece) > left[0]:
            return piece[: left.pop(0)]
        if left:
            left[0] -= len(piece)
        return piece

    return flaw


@pytest.mark.slow
def test_there_is_a_method_for_every_route(live: Live, tmp_path: Path) -> None:
    evaluation = draw_evaluation(live.service).job_id
    live.busy.seen.clear()
    with live.client() as client:
        job = client.job(live.done_job)
        assert client.wait(job.id).state == "succeeded"
        rounds = list(client.jobs(kind=JobKind.ROUND, state="succeeded"))
        assert job.id in {listed.id for listed in rounds} and {listed.state for listed in rounds} == {"succeeded"}
        assert len(list(client.samples(job=job.id))) == job.outputs["samples"] == 24
        since = job.created_at
        both = list(client.samples(job=job.id, role=["base", "reference"], created_after=since))
        assert len(both) == sum(len(list(client.samples(job=job.id, role=role))) for role in ("base", "reference")) > 6
        assert list(client.samples(created_before=since)) == list(client.pairs(created_before=since)) == []
        assert job.id in {listed.id for listed in client.jobs(created_after=since)}
        pairs = list(client.pairs(job=job.id))
        assert len(pairs) == job.outputs["pairs"] == 6
        assert client.pair(pairs[0].id) == pairs[0]
        assert client.sample(pairs[0].base.id).pairs == [pairs[0]]
        assert client.set_verdict(pairs[0].id, "tie", reviewer="ann").revision == pairs[0].revision + 1
        assert client.set_gold(pairs[0].id, "tie") == client.gold(pairs[0].id)
        assert [row.gold_right for row in client.agreement(job=job.id).reviewers] == [1]
        assert client.metrics(job.id).data
        assert job.id in client.report(job.id, pairs=1)
        assert [stage.state for stage in client.stages(job.id, kind="train", round=1)] == ["succeeded"]
        assert client.logs(job.id).count("\n") == len(list(client.events(job.id))) > 10
        assert client.prompt_set("paper-behaviour-train").name in {listed.name for listed in client.prompt_sets()}

        test = client.create_preference_test(evaluation, name="figure 6", questions=2)
        assert test.id in {listed.id for listed in client.preference_tests(evaluation)}
        question = client.next_preference_question(test.id, rater="ann").question
        assert question is not None
        assert client.answer_preference_question(test.id, question.number, 2, rater="ann").choice == 2
        assert client.preference_question(test.id, question.number, rater="ann").choice == 2
        assert client.preference_test(test.id).answers == client.preference_results(test.id).raters == 1
        assert client.preference_results_csv(test.id).startswith("prompt_set,")
        assert client.preference_answers_csv(test.id).splitlines()[1].startswith("ann,")
        client.delete_preference_test(test.id)

        last = job.last_model or ""
        assert last in {model.id for model in client.models(job=job.id)}
        assert client.set_alias("champion", last).aliases == ["champion"]
        assert client.model("champion").id == next(client.lineage(last)).model == last
        digest = client.download_model("champion", tmp_path / "adapter")
        adapter = client.model(last).adapter
        assert adapter is not None and digest == adapter.sha256
        client.remove_alias("champion")

        assert (client.health().status, client.ready().status) == ("ok", "ok")
        assert client.version()
        assert client.workers().data == []
        assert "dfusion_jobs" in client.prometheus()
        key = client.create_api_key("ann", ["review"])
        client.revoke_api_key(key.id)
        assert (key.id, False) in [(listed.id, listed.active) for listed in client.api_keys()]

        hook = client.create_webhook("https://example.org/hook", ["job.cancelled"])
        assert hook.secret.startswith("whsec_") and hook.id in {listed.id for listed in client.webhooks()}

        assert client.add_prompt_set("animals", [{"text": "a cat", "items": ["cat"]}], description="one").size == 1
        assert client.add_prompt_text("animals", "a [cat] on a [sofa]\n").version == 2
        client.delete_prompt_set("animals")

        created = [
            client.start_round(round_body()),
            client.start_sampling({"model": "tiny", "prompt_set": job.prompt_set}),
            client.start_fusion({"pair": pairs[0].id, "reward": "brightness"}),
            client.start_training({"jobs": [job.id]}),
            client.start_evaluation({"models": ["tiny"], "prompt_sets": [job.prompt_set], "scorers": ["constant"]}),
            client.start_export({"job": job.id, "format": "parquet"}),
            client.start_preview({"pair": pairs[0].id}),
        ]
        assert [detail.kind for detail in created] == list(JobKind)
        assert client.pause(created[0].id).state == "paused"
        assert client.resume(created[0].id).state == "queued"
        for detail in created:
            assert client.cancel(detail.id).state == "cancelled"
        with pytest.raises(ConflictError):
            client.skip_review(created[0].id)
        assert client.raise_rounds(job.id, job.rounds) == job  # has no effect
        with pytest.raises(ConflictError):
            client.raise_rounds(created[0].id, 2)
        delivery = next(client.webhook_deliveries(hook.id))
        assert client.replay_webhook_delivery(delivery.id).job == delivery.job == created[-1].id
        client.remove_webhook(hook.id)
        again = client.retry(created[1].id)
        assert (again.origin, client.cancel(again.id).state) == (created[1].id, "cancelled")
        client.delete_job(again.id)
        with pytest.raises(NotFoundError):
            client.delete_job(again.id)

        assert [*client.exports(job=job.id), *client.exports(model="tiny")] == []
        client.read(pairs[0].base.image)
        with pytest.raises(ApiError):
            client._transport.request("HEAD", pairs[0].base.image + "x")
        paths = client._transport.request("GET", "/openapi.json").json()["paths"]

    routes = {f"{method} {path}" for path, methods in paths.items() for method in methods}
    seen = set(live.busy.seen)
    assert {route for route in routes if not any(matches(route, request) for request in seen)} == set()


def matches(route: str, request: str) -> bool:
    pattern = re.sub(r"\{\w+\}", "[^/]+", route)
    return re.fullmatch(pattern, request, re.IGNORECASE) is not None


def test_lists_iterate_over_all_pages(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    with live.client() as client:
        whole = list(client.samples(job=live.done_job, role="base"))
        events = list(client.events(live.done_job))
        monkeypatch.setattr(client_module, "_MAX_PAGE_SIZE", 2)
        live.busy.seen.clear()
        assert list(client.samples(job=live.done_job, role="base")) == whole
        assert len(live.busy.seen) == -(-len(whole) // 2) > 1
        assert list(client.events(live.done_job)) == events


def test_only_set_fields_of_specs_are_sent(live: Live) -> None:
    with live.client() as client:
        spec = RoundSpec.model_validate(round_body(fusion=None, preset="released_code"))
        job = client.start_round(spec)
        client.cancel(job.id)
        assert RoundSpec.model_validate(job.spec) == spec
        estimate = client.estimate(JobKind.ROUND, spec)
        assert (estimate.images.sampled, estimate.images.fused_at_most) == (12, 0)


def test_a_lost_response_creates_no_second_job(live: Live) -> None:
    with live.client() as client:
        before = {job.id for job in client.jobs()}
        with proxy(live.port, responses=cut_after(20)) as port, live.client(port, pauses := []) as cut:
            job = cut.start_round(round_body(seed=8))
        assert len(pauses) == 1
        assert {listed.id for listed in client.jobs()} - before == {job.id}
        client.cancel(job.id)
        with proxy(live.port, responses=cut_after(20)) as port, live.client(port) as cut:
            again = cut.retry(job.id)
        assert {listed.id for listed in client.jobs()} - before == {job.id, again.id}
        client.cancel(again.id)


def test_a_custom_idempotency_key(live: Live) -> None:
    with live.client() as client:
        job = client.start_round(round_body(seed=9), idempotency_key="mine")
        assert client.start_round(round_body(seed=9), idempotency_key="mine").id == job.id
        client.cancel(job.id)
        with pytest.raises(InvalidError) as caught:
            client.start_round(round_body(seed=10), idempotency_key="mine")
    assert (caught.value.status, caught.value.code) == (422, "idempotency_key_reused")


def test_non_idempotent_requests_are_not_repeated(live: Live) -> None:
    with live.client() as client:
        job = client.pause(client.start_round(round_body()).id)
        with (
            proxy(live.port, responses=cut_after(20)) as port,
            live.client(port) as cut,
            pytest.raises(UnreachableError),
        ):
            cut.resume(job.id)
        assert client.job(job.id).state == "queued"
        client.cancel(job.id)


@pytest.mark.parametrize("status", [429, 503])
def test_429_and_503_are_retried_after_the_requested_pause(live: Live, status: int) -> None:
    with live.client(pauses=(pauses := [])) as client:
        live.busy.times, live.busy.status = 2, status  # type: ignore[assignment]
        assert client.jobs_page(1).data
        assert pauses == [7, 7]


@pytest.mark.parametrize(("status", "kind"), [(429, TooManyRequestsError), (503, UnavailableError)])
def test_429_and_503_are_errors_after_all_retries(live: Live, status: int, kind: type[ApiError]) -> None:
    with live.client(pauses=(pauses := [])) as client:
        live.busy.times, live.busy.status = 5, status  # type: ignore[assignment]
        with pytest.raises(kind, match="come back later") as caught:
            client.jobs_page(1)
    assert (live.busy.times, len(pauses), caught.value.code) == (0, 4, "too_many_jobs")


def test_pauses_double_and_end() -> None:
    seconds = [Backoff().seconds(attempt) for attempt in range(40)]
    longest = [min(0.25 * 2**attempt, 30) for attempt in range(40)]
    assert all(most / 2 <= pause <= most for pause, most in zip(seconds, longest, strict=True))
    assert [Backoff().seconds(0, retry_after) for retry_after in ("7", " 0 ", "3600")] == [7, 0, 30]
    assert Backoff().seconds(0, "Wed, 21 Oct 2026 07:28:00 GMT") <= 0.25


def test_errors_say_what_is_wrong(live: Live) -> None:
    with live.client() as client:
        with pytest.raises(InvalidError) as invalid:
            client.start_round(round_body(rounds=0, training={"beta": -1}))
        assert {error.pointer for error in invalid.value.errors} == {"/rounds", "/training/beta"}
        with pytest.raises(NotFoundError, match="expected job id of the form"):
            client.job("nothing")
        with pytest.raises(ConflictError) as conflict:
            client.retry(live.done_job)
        assert (conflict.value.status, conflict.value.code) == (409, "conflict")
        pair = next(client.pairs(job=live.done_job))
        with pytest.raises(PreconditionError):
            client.set_verdict(pair.id, "base", revision=pair.revision + 1)


def test_no_server(live: Live) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # a reserved port without a listener
        with live.client(held.getsockname()[1], pauses := []) as client, pytest.raises(UnreachableError) as caught:
            client.start_round(round_body())
    assert (len(pauses), caught.value.status, caught.value.code) == (4, None, "unreachable")


def test_invalid_addresses_and_keys() -> None:
    for url in ("localhost:1", "ftp://127.0.0.1", "127.0.0.1:1"):
        with pytest.raises(UnreachableError), Client(url, backoff=Backoff(never)) as client:
            client.health()
    with pytest.raises(UnauthorizedError):
        Client(api_key="dfk_\n")


def never(seconds: float) -> None:
    raise AssertionError(f"a pause of {seconds} seconds")


def test_the_key_is_sent(live: Live) -> None:
    seen: list[bytes] = []
    with proxy(live.port, requests=lambda piece: seen.append(piece) or piece) as port:  # type: ignore[func-returns-value]
        with Client(f"http://127.0.0.1:{port}/", "dfk_1", trust_env=False) as client:
            client.health()
    assert b"Authorization: Bearer dfk_1\r\n" in b"".join(seen)


def test_follow_yields_each_event_once_over_broken_streams(live: Live) -> None:
    with live.client() as client:
        whole = list(client.events(live.done_job))
        stream = httpx.get(f"{live.url}/jobs/{live.done_job}/events", headers={"Accept": "text/event-stream"}).text
        for cuts in ((700, 900), (len(stream) // 2,), (150,)):
            with proxy(live.port, responses=cut_after(*cuts)) as port, live.client(port, pauses := []) as cut:
                assert list(cut.follow(live.done_job)) == whole
            assert len(pauses) == len(cuts)
        assert list(client.follow(live.done_job, last_event_id=whole[3].id)) == whole[4:]


def test_follow_yields_new_events(live: Live) -> None:
    with live.client() as client:
        job = client.start_sampling({"model": "tiny", "prompts": [{"text": "a red circle"}]})
        events = client.follow(job.id)
        kinds = [next(events).kind]
        calling_off = threading.Timer(0.2, client.cancel, [job.id])
        calling_off.start()
        kinds += [event.kind for event in events]
        calling_off.join()
    assert (kinds[0], kinds[-1]) == ("job.created", "job.cancelled")


def test_follow_gives_up_after_too_long_a_silence(live: Live) -> None:
    with (
        proxy(live.port, responses=lambda piece: piece[:0]) as port,
        live.client(port, pauses := []) as client,
        pytest.raises(UnreachableError),
    ):
        list(client.follow(live.done_job, patience_seconds=0.2))
    assert pauses
    with live.client() as client, pytest.raises(NotFoundError):
        list(client.follow("job_" + "0" * 26))


class Streams:
    """An application that responds to each request with the next stream, in chunks of seven bytes."""

    def __init__(self, *streams: bytes, media_type: bytes = b"text/event-stream") -> None:
        self._streams, self._media_type = list(streams), media_type
        self.last_event_ids: list[str | None] = []

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.last_event_ids.append(Headers(scope=scope).get("last-event-id"))
        stream = self._streams.pop(0) if self._streams else b""
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", self._media_type)]})
        for start in range(0, len(stream), 7):
            await send({"type": "http.response.body", "body": stream[start : start + 7], "more_body": True})
        await send({"type": "http.response.body"})


def follow(streams: Streams, pauses: list[float], **settings: Any) -> list[EventOut]:
    with serving(streams) as port:
        backoff = Backoff(pauses.append)
        with Client(f"http://127.0.0.1:{port}", trust_env=False, backoff=backoff) as client:
            return list(client.follow("job_1", **settings))


def sent(number: int, message: str = "x") -> str:
    event = {
        "id": number,
        "created_at": "2026-01-01T00:00:00Z",
        "kind": "job.created",
        "message": message,
        "stage": None,
        "data": {},
    }
    return f"id: {number}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"


END = "event: end\ndata: {}\n\n"


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_follow_parses_event_streams_by_the_standard(line_end: str) -> None:
    odd = "a\u2028b\x85c é"  # line ends for Python's splitlines, but not in the standard
    parts = (
        ": still here\n\n" + sent(1, odd) + ": still here\n\n" + sent(2).removesuffix("\n"),
        sent(2) + sent(3)[:-8],
        sent(3) + END + sent(4),
    )
    streams = Streams(*(part.replace("\n", line_end).encode() for part in parts))
    events = follow(streams, pauses := [])
    assert [(event.id, event.message) for event in events] == [(1, odd), (2, "x"), (3, "x")]
    assert streams.last_event_ids == [None, "1", "2"]
    assert len(pauses) == 2


def test_a_keep_alive_resets_the_backoff() -> None:
    streams = Streams(*[b": still here\n\n"] * 8, END.encode())
    assert follow(streams, pauses := [], last_event_id=1) == []
    assert len(pauses) == 8
    assert max(pauses) <= 0.25  # always the first pause: pauses double only without data


def test_follow_gives_up_on_a_page_that_is_no_stream() -> None:
    streams = Streams(*[b"<p>Sign in</p>"] * 1000, media_type=b"text/html")
    with pytest.raises(UnreachableError, match="text/event-stream"):
        follow(streams, [], patience_seconds=0.2)


def test_a_broken_download_is_resumed(live: Live, tmp_path: Path) -> None:
    live.busy.seen.clear()
    with live.client() as client:
        artifact = trajectory(client, live)
        whole = client.read(artifact)
        requests: list[bytes] = []
        with (
            proxy(
                live.port,
                requests=lambda piece: requests.append(piece) or piece,  # type: ignore[func-returns-value]
                responses=cut_after(len(whole) // 2),
            ) as port,
            live.client(port) as cut,
        ):
            digest = cut.download(artifact, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == whole
    assert digest == hashlib.sha256(whole).hexdigest()
    resumed = re.search(rb"Range: bytes=(\d+)-", b"".join(requests))
    assert resumed is not None and 0 < int(resumed[1]) < len(whole)


def test_corrupted_downloads_keep_the_existing_file(live: Live, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    with live.client() as client:
        artifact = trajectory(client, live)
        inside = client.read(artifact)[-40:]
    spoilt = bytes(byte ^ 1 for byte in inside)
    with (
        proxy(live.port, responses=lambda piece: piece.replace(inside, spoilt)) as port,
        live.client(port) as client,
        pytest.raises(DownloadError, match="SHA-256"),
    ):
        client.download(artifact, tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def trajectory(client: Client, live: Live) -> str:
    reference = next(client.samples(job=live.done_job, role="base")).trajectory
    assert reference is not None
    return reference.artifact


def test_an_unexpected_response_is_an_error(live: Live) -> None:
    with (
        proxy(live.port, responses=lambda piece: piece.replace(b'"status"', b'"stat_s"')) as port,
        live.client(port) as client,
        pytest.raises(ApiError, match="HealthOut"),
    ):
        client.health()


def test_the_preview_of_an_export_is_downloaded_with_its_recipe(live: Live, tmp_path: Path) -> None:
    """Those of the newest export in the format."""
    with live.client() as client:
        model = client.model(client.job(live.done_job).last_model or "")
        image = next(client.samples(job=live.done_job)).image
        file = tmp_path / "flowers.safetensors"
        assert client.download_preview(model.id, file, format="diffusers") is None

        recipe = RESPONSES["ExportOut"]["recipe"]
        for form, seed in (("kohya", 1), ("kohya", 2), ("diffusers", 3)):
            add_export(live, model, image, recipe | {"seed": seed, "format": form})

        companions = client.download_preview(model.id, file, format="kohya")
        assert companions is not None
        assert (companions.recipe, companions.preview) == (
            tmp_path / "flowers.recipe.json",
            tmp_path / "flowers.preview.png",
        )
        assert json.loads(companions.recipe.read_text()) == recipe | {"seed": 2}
        assert companions.preview.read_bytes() == client.read(image)

        add_export(live, model, image, recipe | {"format": "merged"})
        assert client.download_preview(model.id, file, format="merged") is None  # its ZIP file has them
