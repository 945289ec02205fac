"""What a request may hold."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from api.core.specs import ScorerRef
from dfusion.rewards.config import ScorerConfig


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "http", "url": "http://169.254.169.254/"},
        {"kind": "open_clip", "folder": "/etc"},
        {"kind": "entry_point", "entry_point": "red"},
        {"kind": "verdicts"},
    ],
)
def test_a_client_names_no_address_file_or_code(settings: dict[str, str]) -> None:
    TypeAdapter[Any](ScorerConfig).validate_python(settings)
    with pytest.raises(ValidationError, match="kind"):
        TypeAdapter[Any](ScorerRef).validate_python(settings)
