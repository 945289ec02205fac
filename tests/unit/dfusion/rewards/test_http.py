"""The HTTP scorer against a real server on this machine."""

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dfusion.errors import InvalidScoreError, NonFiniteError, ScorerError, ScorerUnavailableError, ShapeMismatchError
from dfusion.rewards.config import HttpScorerConfig
from dfusion.rewards.http import HttpScorer

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
PROMPTS = ["a cat", "a dog", "ein Käfer"]


class Server:
    """Responds with the next of `responses` (status, body, headers); afterwards with the images' brightness."""

    def __init__(self) -> None:
        self.responses: list[tuple[int, bytes, dict[str, str]]] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.silent = threading.Event()
        self.drip = False
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.headers.append(dict(self.headers))
                if outer.silent.is_set():
                    outer.released.wait(5)
                    return
                if outer.drip:
                    self.send_response(200)
                    self.end_headers()
                    while not outer.released.wait(0.02):
                        self.wfile.write(b" ")
                    return
                status, content, headers = outer.responses.pop(0) if outer.responses else (200, outer.scores(body), {})
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"

    @staticmethod
    def scores(body: dict[str, Any]) -> bytes:
        pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in body["images"]]
        return json.dumps({"scores": [float(picture.mean()) for picture in pictures]}).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def scorer(server: Server, **changes: Any) -> HttpScorer:
    settings = {"url": server.url, "version": "9", "retries": 2, "backoff_seconds": 0, "timeout_seconds": 5}
    return HttpScorer(HttpScorerConfig(**(settings | changes)), name="remote")


def test_images_and_prompts_are_sent_and_scores_returned_in_order(server: Server) -> None:
    remote = scorer(server, batch_size=2, bearer_token="secret")
    assert remote.score(IMAGES, PROMPTS) == pytest.approx([float(image.mean()) for image in IMAGES])
    assert (remote.name, remote.version) == ("remote", "9")
    assert [request["prompts"] for request in server.requests] == [PROMPTS[:2], PROMPTS[2:]]
    received = [image for request in server.requests for image in request["images"]]
    for image, sent in zip(received, IMAGES, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))), sent)
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_nothing_is_sent_for_no_images(server: Server) -> None:
    assert scorer(server).score(IMAGES[:0], []) == []
    assert server.requests == []


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_requests_to_an_overloaded_server_are_retried(server: Server, status: int) -> None:
    server.responses = [(status, b"", {}), (status, b"", {})]
    assert len(scorer(server).score(IMAGES, PROMPTS)) == 3
    assert len(server.requests) == 3


def test_a_server_that_stays_overloaded_is_unavailable(server: Server) -> None:
    server.responses = [(503, b"", {})] * 9
    with pytest.raises(ScorerUnavailableError, match="after 3 attempts: status 503"):
        scorer(server).score(IMAGES, PROMPTS)
    assert len(server.requests) == 3
    assert ScorerUnavailableError.retryable and not ScorerError.retryable


def test_a_silent_server_is_unavailable_after_the_timeout(server: Server) -> None:
    server.silent.set()
    with pytest.raises(ScorerUnavailableError, match="ReadTimeout"):
        scorer(server, timeout_seconds=0.1, retries=0).score(IMAGES, PROMPTS)


def test_a_missing_server_is_unavailable(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ScorerUnavailableError, match="ConnectError"):
        scorer(server, url=f"http://127.0.0.1:{port}/").score(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("status", "content", "headers", "error", "message"),
    [
        (500, b"broken", {}, ScorerError, "status 500: 'broken'"),
        (404, b"", {}, ScorerError, "status 404"),
        (204, b"", {}, ScorerError, "status 204"),
        (307, b"", {"Location": "/elsewhere"}, ScorerError, "status 307"),
        (200, b"<html>", {}, ScorerError, "expected JSON"),
        (200, b"\xff\xfe\xff", {}, ScorerError, "expected JSON"),
        (200, b"squeezed", {"Content-Encoding": "gzip"}, ScorerError, "decodable"),
        (200, b"[1, 2, 3]", {}, ScorerError, "JSON object"),
        (200, b"{}", {}, ScorerError, "expected 3 scores"),
        (200, b'{"scores": [1, 2]}', {}, ScorerError, "expected 3 scores, one per image, got 2"),
        (200, b'{"scores": null}', {}, ScorerError, "expected 3 scores, one per image, got NoneType"),
        (200, b'{"scores": {"0": 1}}', {}, ScorerError, "got dict"),
        (200, b'{"scores": [1, 2, 3, 4]}', {}, ScorerError, "expected 3 scores, one per image, got 4"),
        (200, b'{"scores": [1, 2, "3"]}', {}, InvalidScoreError, r"image 2 \('ein Käfer'\).* a number, got '3'"),
        (200, b'{"scores": [1, null, 3]}', {}, InvalidScoreError, r"image 1 \('a dog'\).* a number, got None"),
        (200, b'{"scores": [true, 2, 3]}', {}, InvalidScoreError, r"image 0 \('a cat'\).* a number, got True"),
        (200, b'{"scores": [1, [2], 3]}', {}, InvalidScoreError, r"image 1 .* got \[2\]"),
        (200, b'{"scores": [1, 2, NaN]}', {}, NonFiniteError, r"image 2 .* finite score, got nan"),
        (200, b'{"scores": [1, -Infinity, 3]}', {}, InvalidScoreError, r"image 1 .* finite score, got -inf"),
        (200, b'{"scores": [1e400, 2, 3]}', {}, NonFiniteError, r"image 0 .* finite score, got inf"),
        (200, b'{"scores": [1, 2, 1' + b"0" * 400 + b"]}", {}, NonFiniteError, "image 2 .* finite score"),
        (200, b"[" * 200_000, {}, ScorerError, "expected JSON"),
        (200, b'{"scores": [1, 2, 3], "version": "8"}', {}, ScorerError, "expected version '9', got '8'"),
    ],
)
def test_invalid_responses_are_errors(
    server: Server, status: int, content: bytes, headers: dict[str, str], error: type[Exception], message: str
) -> None:
    server.responses = [(status, content, headers)]
    with pytest.raises(error, match=message):
        scorer(server).score(IMAGES, PROMPTS)
    assert len(server.requests) == 1


def test_the_image_is_counted_over_all_requests(server: Server) -> None:
    server.responses = [(200, b'{"scores": [1, 2]}', {}), (200, b'{"scores": [null]}', {})]
    with pytest.raises(InvalidScoreError, match="image 2") as raised:
        scorer(server, batch_size=2).score(IMAGES, PROMPTS)
    assert raised.value.row == 2


def test_a_response_above_the_limit_is_an_error(server: Server) -> None:
    content = b'{"scores": [1, 2, 3]}'
    server.responses = [(200, content, {}), (200, content + b" ", {}), (503, b"x" * 30, {})]
    limited = scorer(server, max_response_bytes=len(content))
    assert limited.score(IMAGES, PROMPTS) == [1.0, 2.0, 3.0]
    for _ in range(2):
        with pytest.raises(ScorerError, match=f"at most {len(content)} bytes"):
            limited.score(IMAGES, PROMPTS)
    assert len(server.requests) == 3


def test_a_response_that_never_ends_is_unavailable(server: Server) -> None:
    """Each piece comes in time; together they take longer than the deadline."""
    server.drip = True
    with pytest.raises(ScorerUnavailableError, match=r"no complete response in 0\.2 seconds"):
        scorer(server, deadline_seconds=0.2, retries=0).score(IMAGES, PROMPTS)


def test_a_response_may_contain_the_version(server: Server) -> None:
    server.responses = [(200, b'{"scores": [1, 2, 3], "version": "9"}', {})]
    assert scorer(server).score(IMAGES, PROMPTS) == [1.0, 2.0, 3.0]


def test_invalid_images_are_not_sent(server: Server) -> None:
    with pytest.raises(ShapeMismatchError):
        scorer(server).score(IMAGES, PROMPTS[:2])
    assert server.requests == []
