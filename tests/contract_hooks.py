"""Hooks that schemathesis runs before each request (`tests/acceptance/test_contract.py`)."""

from __future__ import annotations

import re
from typing import Any

import schemathesis

_LONGEST_WAIT = 60
_SHORT_WAIT = 0.01


@schemathesis.hook
def before_call(
    context: schemathesis.HookContext,  # noqa: ARG001 - schemathesis calls it with these
    case: schemathesis.Case,
    kwargs: dict[str, Any],  # noqa: ARG001
) -> None:
    """Shorten valid waits of long polls. Invalid values are sent unchanged."""
    if re.fullmatch(r"\d+(\.\d+)?", wait := str(case.query.get("wait"))) and 0 < float(wait) <= _LONGEST_WAIT:
        case.query["wait"] = _SHORT_WAIT
