"""The database's clock, in seconds since 1970 (UTC): the only clock that leases are measured by."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction


class now_seconds(GenericFunction[float]):  # noqa: N801, RUF100 - reads as the SQL function that it is
    """Now, in seconds since 1970, by the database."""

    type = Double()
    inherit_cache = True


@compiles(now_seconds, "sqlite")
def _sqlite(_element: object, _compiler: object, **_options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now_seconds, "postgresql")
def _postgresql(_element: object, _compiler: object, **_options: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"
