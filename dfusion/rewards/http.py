"""A scorer on an HTTP server.

Each batch is one POST request with a `ScoreRequest` as JSON. The response has status 200 and a `ScoreResponse` as JSON.
Attempts, time and the length of the response are limited by `HttpScorerConfig`. A response that is not as documented is
an error, which names the image whose score is no finite number; no score is ever replaced by another.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import httpx
import numpy as np
from PIL import Image

from dfusion.errors import ScorerError, ScorerUnavailableError, shortened
from dfusion.rewards.checks import check_images, checked_scores
from dfusion.rewards.config import HttpScorerConfig

_RETRYABLE = (429, 502, 503, 504)
"""Status codes of a server that is overloaded or starting."""
MAX_PAUSE_SECONDS = 60.0
"""The longest pause before a retry."""


class ScoreRequest(TypedDict):
    """The body of a request.

    prompts   the prompt of each image
    images    base64-encoded PNG files (lossless), one per prompt
    """

    prompts: list[str]
    images: list[str]


class ScoreResponse(TypedDict):
    """The body of a response.

    scores    a finite number per image, in order
    version   must equal the configured version, so that scores of two versions are never mixed
    """

    scores: list[float]
    version: NotRequired[str]


class HttpScorer:
    """Requests scores from a server. Redirects are not followed: images go to the configured address only."""

    def __init__(self, config: HttpScorerConfig, *, name: str) -> None:
        self._config = config
        self.name = name
        self.version = config.version

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """The server's score for each image (B, H, W, 3) uint8.

        Raises:
            ScorerUnavailableError: The server cannot be reached or is overloaded, after all retries (retryable).
            ScorerError: The response is not the documented one, or too long.
            InvalidScoreError: The score of an image is null, or no number.
            ShapeMismatchError: The images have another shape or dtype.
            NonFiniteScoreError: A score is NaN or infinite.
        """
        check_images(images, prompts)
        scores: list[float] = []
        with httpx.Client(timeout=self._config.timeout_seconds, headers=self._headers()) as client:
            for start in range(0, len(prompts), self._config.batch_size):
                part = slice(start, start + self._config.batch_size)
                body = ScoreRequest(prompts=list(prompts[part]), images=[_png(image) for image in images[part]])
                response = self._parsed(self._post(client, body))
                scores += checked_scores(self.name, response.get("scores"), body["prompts"], first=start)
        return scores

    def _headers(self) -> dict[str, str]:
        token = self._config.bearer_token
        return {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}

    def _post(self, client: httpx.Client, body: ScoreRequest) -> bytes:
        """Send a request with retries. Returns the content of the response, whose status is 200."""
        problem = ""
        for attempt in range(self._config.retries + 1):
            if attempt:
                time.sleep(min(self._config.backoff_seconds * 2 ** (attempt - 1), MAX_PAUSE_SECONDS))
            try:
                with client.stream("POST", str(self._config.url), json=body) as response:
                    content = self._read(response)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            except httpx.DecodingError as error:
                raise ScorerError(f"{self.name}: expected a decodable response, got {error}") from error
            if response.status_code == 200:
                return content
            problem = f"status {response.status_code}"
            if response.status_code not in _RETRYABLE:
                raise ScorerError(f"{self.name}: expected status 200, got {problem}: {_beginning(content)}")

        attempts = self._config.retries + 1
        raise ScorerUnavailableError(
            f"{self.name}: no response from {self._config.url.host} after {attempts} attempts: {problem}"
        )

    def _read(self, response: httpx.Response) -> bytes:
        """The content of a response within the limits. Raises ReadTimeout, ScorerError."""
        deadline = time.monotonic() + self._config.deadline_seconds
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > self._config.max_response_bytes:
                expected = f"expected a response of at most {self._config.max_response_bytes} bytes"
                raise ScorerError(f"{self.name}: {expected}, got more: {_beginning(bytes(content))}")
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout(f"no complete response in {self._config.deadline_seconds:g} seconds")
        return bytes(content)

    def _parsed(self, content: bytes) -> dict[str, object]:
        """The JSON object of a response with the right version. Raises ScorerError."""
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ScorerError(f"{self.name}: expected JSON, got {_beginning(content)}") from error
        if not isinstance(body, dict):
            raise ScorerError(f"{self.name}: expected a JSON object with scores, got {type(body).__name__}")
        if body.get("version", self.version) != self.version:
            raise ScorerError(f"{self.name}: expected version {self.version!r}, got {shortened(body['version'])}")
        return body


def _beginning(content: bytes) -> str:
    return repr(content[:200].decode("utf-8", "replace"))


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
