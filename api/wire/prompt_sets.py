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


class PromptWarning(BaseModel):
    """Syntax of other programs in a prompt, such as weights, which is read as plain text."""

    prompt: str
    message: str


class PromptSetDetail(PromptSetOut):
    """A prompt set with its prompts, and the first 100 warnings about them."""

    prompts: list[dict[str, Any]]
    warnings: list[PromptWarning]
