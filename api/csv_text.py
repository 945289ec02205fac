"""Tables as CSV (RFC 4180). Spreadsheets must not take a text of a user for a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from fastapi.responses import PlainTextResponse

CSV = "text/csv"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How cells start that spreadsheets run as formulas."""


class CsvResponse(PlainTextResponse):
    """The class of responses with CSV, for the OpenAPI document."""

    media_type = CSV


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """The rows as CSV. None is an empty cell. A text that a spreadsheet would run gets an apostrophe in front."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows([_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
