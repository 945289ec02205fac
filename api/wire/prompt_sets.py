"""Prompt sets."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel

from api.wire.common import Links


class PromptSetOut(BaseModel):
    """A prompt set in a list."""

    id: str
    name: str | None
    version: int
    description: str
    builtin: bool
    size: int
    created_at: datetime
    links: Links


class PromptSetDetail(PromptSetOut):
    """A prompt set with its prompts."""

    prompts: list[dict[str, Any]]
