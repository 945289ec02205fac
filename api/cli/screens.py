"""Terminal output: tables that never break ids, and consistent formats of numbers and times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from service.ids import kind_of

if TYPE_CHECKING:
    from api.wire.prompt_sets import PromptWarning

STYLES = {
    "succeeded": "green",
    "recorded": "green",
    "ok": "green",
    "failed": "red",
    "cancelled": "yellow",
    "warning": "yellow",
    "waiting": "yellow",
    "paused": "yellow",
    "running": "cyan",
}


def clock(seconds: float | None) -> str:
    """Format a duration as hours, minutes and seconds; a dash if it is unknown."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def local_time(time: datetime | None) -> str:
    """Format a time in this machine's time zone; a dash for None."""
    return "-" if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def figure(value: Any) -> str:
    """Format a number with four decimals; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def yes_or_no(value: bool | None) -> str:
    """Format a truth value; a dash if it is unknown."""
    return "-" if value is None else "yes" if value else "no"


def size(count: float | None) -> str:
    """Format a number of bytes in the largest unit that fits; a dash for None."""
    if count is None:
        return "-"
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def state(text: str) -> str:
    """Format a state in its colour, as rich markup."""
    style = STYLES.get(text)
    return f"[{style}]{text}[/]" if style else text


def listing(headings: Sequence[str], rows: Iterable[Sequence[Any]], more: bool = False) -> Table:
    """Render a list as a table. The first column and columns of ids are not wrapped.

    Args:
        headings: Column headings; a heading that ends in `>` belongs to a right-aligned column of numbers.
        rows: Cells of each row.
        more: Whether the list has more entries than the rows.

    Returns:
        The table.
    """
    caption = "more entries exist; raise --limit" if more else None
    table = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")

    cells = [list(map(_cell, row)) for row in rows]
    for column, heading in enumerate(headings):
        no_wrap = column == 0 or any(kind_of(row[column]) for row in cells)
        justify: JustifyMethod = "right" if heading.endswith(">") else "left"
        table.add_column(heading.rstrip(">"), no_wrap=no_wrap, overflow="fold", justify=justify)
    for row in cells:
        table.add_row(*row)

    return table


def warning_lines(warnings: Iterable[PromptWarning]) -> list[Text]:
    """Render warnings about prompts, each on its line."""
    return [Text(f"warning: {warning.prompt}: {warning.message}", style="yellow") for warning in warnings]


def sheet(fields: Mapping[str, Any]) -> Table:
    """Render the fields of one resource as names and values. Leaves out fields that are None."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if value is not None:
            table.add_row(name, _cell(value))
    return table


class _Markup(str):
    """Text that is already rich markup and must not be escaped."""


def _cell(value: Any) -> str:
    return value if isinstance(value, _Markup) else escape(str(value))


def styled_state(text: str) -> str:
    """Format a state in its colour, as a cell of `listing` or `sheet`."""
    return _Markup(state(text))
