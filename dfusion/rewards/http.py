"""A scorer on an HTTP server.

Each batch is one POST request with JSON, `{"prompts": [...], "images": [...]}`. Images are base64-encoded PNG files
(lossless). The response has status 200 and the body `{"scores": [...]}`, one finite number per image in order. It may
contain the server's `"version"`, which must equal the configured one, so that scores of two versions are never mixed.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from typing import Any

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
            ScorerError: The response is not the documented one.
            ShapeMismatchError: The images have another shape or dtype.
            NonFiniteError: A score is NaN or infinite.
        """
        check_images(images, prompts)
        scores: list[float] = []
        with httpx.Client(timeout=self._config.timeout_seconds, headers=self._headers()) as client:
            for start in range(0, len(prompts), self._config.batch_size):
                part = slice(start, start + self._config.batch_size)
                body = {"prompts": list(prompts[part]), "images": [_png(image) for image in images[part]]}
                scores += self._scores_in(self._post(client, body), len(body["prompts"]))
        return scores

    def _headers(self) -> dict[str, str]:
        token = self._config.bearer_token
        return {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}

    def _post(self, client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
        """Send a request with retries. Returns the response, whose status is 200."""
        problem = ""
        for attempt in range(self._config.retries + 1):
            if attempt:
                time.sleep(min(self._config.backoff_seconds * 2 ** (attempt - 1), MAX_PAUSE_SECONDS))
            try:
                response = client.post(str(self._config.url), json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            except httpx.DecodingError as error:
                raise ScorerError(f"{self.name}: expected a decodable response, got {error}") from error
            if response.status_code == 200:
                return response
            problem = f"status {response.status_code}"
            if response.status_code not in _RETRYABLE:
                raise ScorerError(f"{self.name}: expected status 200, got {problem}: {response.text[:200]!r}")

        attempts = self._config.retries + 1
        raise ScorerUnavailableError(
            f"{self.name}: no response from {self._config.url.host} after {attempts} attempts: {problem}"
        )

    def _scores_in(self, response: httpx.Response, count: int) -> list[float]:
        try:
            body = response.json()
        except ValueError as error:
            raise ScorerError(f"{self.name}: expected JSON, got {response.text[:200]!r}") from error
        if not isinstance(body, dict):
            raise ScorerError(f"{self.name}: expected a JSON object with scores, got {type(body).__name__}")
        if body.get("version", self.version) != self.version:
            raise ScorerError(f"{self.name}: expected version {self.version!r}, got {shortened(body['version'])}")
        return checked_scores(self.name, body.get("scores"), count)


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
