"""How things look on a terminal: tables that leave ids whole, and figures in the same digits everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

from service.ids import kind_of

STYLES = {
    "succeeded": "green",
    "recorded": "green",
    "ok": "green",
    "failed": "red",
    "wrong": "red",
    "cancelled": "yellow",
    "warning": "yellow",
    "waiting": "yellow",
    "paused": "yellow",
    "running": "cyan",
}


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds, or a dash where nothing is known yet."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def moment(at: datetime | None) -> str:
    """A time in this machine's zone."""
    return "-" if at is None else at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def figure(value: Any) -> str:
    """A score; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def yes_or_no(value: bool | None) -> str:
    """A dash where it is not known yet."""
    return "-" if value is None else "yes" if value else "no"


def size(count: float | None) -> str:
    """Bytes in the unit that fits."""
    if count is None:
        return "-"
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def state(text: str) -> str:
    """A state in its colour."""
    style = STYLES.get(text)
    return f"[{style}]{text}[/]" if style else text


def listing(headings: Sequence[str], rows: Iterable[Sequence[Any]], more: bool = False) -> Table:
    """A list. Ids are not broken, others give way to them; a heading that ends in `>` is that of numbers."""
    cells = [[cell if isinstance(cell, _Styled) else escape(str(cell)) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, caption="there are more: --limit" if more else None, caption_justify="left")
    for place, heading in enumerate(headings):
        whole = place == 0 or any(kind_of(row[place]) for row in cells)
        justify: JustifyMethod = "right" if heading.endswith(">") else "left"
        table.add_column(heading.rstrip(">"), no_wrap=whole, overflow="fold", justify=justify)
    for row in cells:
        table.add_row(*row)
    return table


def sheet(fields: Mapping[str, Any]) -> Table:
    """One thing: names and values; what is None is left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if value is not None:
            table.add_row(name, value if isinstance(value, _Styled) else escape(str(value)))
    return table


class _Styled(str):
    """Text that is rich's markup already."""


def styled_state(text: str) -> str:
    """A state in its colour, for a cell."""
    return _Styled(state(text))
