"""Ids: a prefix that names the kind, then 26 letters and digits that sort by creation time."""

from __future__ import annotations

import re
import secrets
import threading
import time
from enum import StrEnum

from service.errors import NotFoundError

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_RANDOM_BITS = 80


class IdKind(StrEnum):
    """The kind of row that an id names. The value is the prefix of the id."""

    JOB = "job"
    STAGE = "stg"
    SAMPLE = "smp"
    PAIR = "pair"
    MODEL = "mdl"
    ARTIFACT = "art"
    PROMPT_SET = "set"
    EXPORT = "exp"
    PREFERENCE_TEST = "prf"
    API_KEY = "key"
    WEBHOOK = "whk"
    WEBHOOK_DELIVERY = "dlv"

    @property
    def noun(self) -> str:
        """The kind in messages, such as "prompt set"."""
        return "API key" if self is IdKind.API_KEY else self.name.lower().replace("_", " ")


_PAIRS = tuple(first + second for first in _ALPHABET for second in _ALPHABET)
"""Two characters, 10 bits: a job can need thousands of ids."""
_SHIFTS = tuple(range(120, -1, -10))
_PATTERN = re.compile(rf"({'|'.join(IdKind)})_[{_ALPHABET}]{{26}}")


class _MonotonicClock:
    """Numbers that strictly increase within this process: milliseconds since 1970, then random bits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        """The next number."""
        now = (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        with self._lock:
            self._last = now if now >> _RANDOM_BITS > self._last >> _RANDOM_BITS else self._last + 1
            return self._last


_clock = _MonotonicClock()


def new_id(kind: IdKind) -> str:
    """A new id. Ids of one process sort by creation."""
    number = _clock.next()
    return f"{kind}_" + "".join([_PAIRS[number >> shift & 1023] for shift in _SHIFTS])


def kind_of(text: str) -> IdKind | None:
    """The kind of the id `text`, or None if `text` is not an id."""
    match = _PATTERN.fullmatch(text)
    return IdKind(match[1]) if match else None


def ids_in(text: str) -> set[str]:
    """All ids that occur in a text, such as a request as JSON."""
    return {match[0] for match in _PATTERN.finditer(text)}


def expect(kind: IdKind, text: str) -> str:
    """Return `text` if it is an id of this kind.

    Raises:
        NotFoundError: `text` is not an id, or an id of another kind.
    """
    if kind_of(text) is not kind:
        raise NotFoundError(f"expected {kind.noun} id of the form {kind}_…, got {text!r}")
    return text
