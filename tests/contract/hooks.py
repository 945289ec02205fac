"""Hooks that schemathesis runs before and after each request (`tests/contract/generated.py`)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
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


@schemathesis.hook
def after_call(
    context: schemathesis.HookContext,  # noqa: ARG001
    case: schemathesis.Case,
    response: schemathesis.Response,
) -> None:
    """Record the status and the duration of each request."""
    entry = [f"{case.method} {case.path}", response.status_code, response.elapsed]
    with Path(os.environ["CONTRACT_RESPONSES"]).open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(entry)}\n")
