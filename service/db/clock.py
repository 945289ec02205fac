"""The clock of the database, in seconds since 1970 (UTC). Leases are measured by this clock alone."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction


class now_seconds(GenericFunction[float]):  # noqa: N801, RUF100 - named like an SQL function
    """The current time of the database, in seconds since 1970."""

    type = Double()
    inherit_cache = True


@compiles(now_seconds, "sqlite")
def _sqlite(_element: object, _compiler: object, **_options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now_seconds, "postgresql")
def _postgresql(_element: object, _compiler: object, **_options: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"
