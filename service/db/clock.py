"""The clock of the database, in seconds since 1970 (UTC). Leases are measured only by this clock."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Double, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
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


MAX_SKEW_SECONDS = 30.0
"""Ids sort by the clock of the machine that creates them, and S3 refuses requests that are 15 minutes off."""


def clock_problem(session: Session) -> str | None:
    """A difference between the clock of this machine and that of the database; None if it is small."""
    before = time.time()
    of_database = session.scalars(select(now_seconds())).one()
    seconds = max(before - of_database, of_database - time.time())
    if seconds <= MAX_SKEW_SECONDS:
        return None
    direction = "ahead of" if before > of_database else "behind"
    return f"the clock of this machine is {seconds:.0f} s {direction} that of the database: synchronise both (NTP)"
