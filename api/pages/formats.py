"""Filters of the templates: numbers, times and prompts as people read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from markupsafe import Markup, escape

_MINUTE = 60
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR
_UNITS = ("B", "kB", "MB", "GB", "TB")
MISSING = "\N{EN DASH}"


def duration(seconds: float | None) -> str:
    """A duration with its two largest units, such as "3 min 20 s"."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"

    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def number(value: float | None, digits: int = 4) -> str:
    """A number with this many significant digits."""
    return MISSING if value is None else f"{value:,.{digits}g}"


def score(value: float | None) -> str:
    """A score with three decimals, so that columns align."""
    return MISSING if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference with its sign and three decimals."""
    return MISSING if value is None else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def size(count: int) -> str:
    """A number of bytes with its unit."""
    value = float(count)
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def moment(at: datetime | None) -> Markup | str:
    """A time as an element that scripts show in the reader's time zone; in UTC without scripts."""
    if at is None:
        return MISSING
    at = at.astimezone(UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(
        at.isoformat(timespec="seconds"), at.strftime("%Y-%m-%d %H:%M")
    )


def clock(at: float) -> Markup:
    """A time in seconds since 1970, as `moment` shows it."""
    return Markup("{}").format(moment(datetime.fromtimestamp(at, UTC)))


def marked(prompt: str, items: Iterable[str]) -> Markup:
    """The prompt with its items as `<mark>` elements."""
    words = sorted({item for item in items if item}, key=len, reverse=True)
    if not words:
        return escape(prompt)

    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
    parts = pattern.split(prompt)
    pieces = [escape(part) if n % 2 == 0 else Markup("<mark>{}</mark>").format(part) for n, part in enumerate(parts)]
    return Markup("").join(pieces)


def short_id(row_id: str) -> str:
    """The last characters of an id, which differ most."""
    return f"…{row_id[-6:]}"


FILTERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "duration": duration,
        "number": number,
        "score": score,
        "signed": signed,
        "size": size,
        "moment": moment,
        "clock": clock,
        "marked": marked,
        "short_id": short_id,
    }
)
