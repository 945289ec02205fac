"""Ids: a prefix that names the kind, then 26 letters and digits that sort by the time of making."""

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
    """What an id is of; the value is its prefix."""

    JOB = "job"
    STAGE = "stg"
    SAMPLE = "smp"
    PAIR = "pair"
    MODEL = "mdl"
    ARTIFACT = "art"
    PROMPT_SET = "set"
    EXPORT = "exp"
    API_KEY = "key"


NAMES = {
    IdKind.JOB: "a job",
    IdKind.STAGE: "a stage",
    IdKind.SAMPLE: "a sample",
    IdKind.PAIR: "a pair",
    IdKind.MODEL: "a model",
    IdKind.ARTIFACT: "an artifact",
    IdKind.PROMPT_SET: "a prompt set",
    IdKind.EXPORT: "an export",
    IdKind.API_KEY: "an API key",
}
_PATTERN = re.compile(rf"({'|'.join(IdKind)})_[{_ALPHABET}]{{26}}")


class _Clock:
    """Numbers that never repeat and never go back within this process: milliseconds, then random bits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        fresh = (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        with self._lock:
            self._last = fresh if fresh >> _RANDOM_BITS > self._last >> _RANDOM_BITS else self._last + 1
            return self._last


_clock = _Clock()


def new_id(kind: IdKind) -> str:
    """A fresh id; ids of one process sort in the order in which they were made."""
    number = _clock.next()
    return f"{kind}_" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def kind_of(text: str) -> IdKind | None:
    """What `text` is an id of, None if it is no id."""
    found = _PATTERN.fullmatch(text)
    return IdKind(found[1]) if found else None


def expect(kind: IdKind, text: str) -> str:
    """`text`, if it is an id of that kind; raises NotFoundError otherwise."""
    found = kind_of(text)
    if found is None:
        raise NotFoundError(f"{text!r} is no id; expected one like {kind}_…")
    if found is not kind:
        raise NotFoundError(f"{text} is the id of {NAMES[found]}; expected that of {NAMES[kind]} ({kind}_…)")
    return text
