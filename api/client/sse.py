"""Server-sent events out of a stream of bytes (WHATWG HTML, 9.2.6)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")
"""A \\r that nothing follows yet may be half of \\r\\n. Other characters that Python takes for the end of a line, such
as U+2028, may stand in the data."""


@dataclass(frozen=True)
class ServerEvent:
    """An event as it came."""

    name: str
    data: str


def parse(pieces: Iterable[bytes]) -> Iterator[ServerEvent]:
    """The events of a stream, each as soon as it is whole; one that is cut off at the end is none."""
    name, data = "message", list[str]()
    for line in _lines(pieces):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif not line:
            if data:
                yield ServerEvent(name, "\n".join(data))
            name, data = "message", []


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for piece in pieces:
        *lines, rest = _LINE_END.split(rest + piece)
        yield from (line.decode("utf-8") for line in lines)
