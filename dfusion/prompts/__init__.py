"""Prompt lists: prompts with their items and mask thresholds. Imports no torch.

A list is a JSON file beside this one: `{"name", "description", "prompts": [{"text", "items", "thresholds"}]}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from typing import Annotated

from pydantic import Field, model_validator

from dfusion.config import Settings
from dfusion.errors import ItemNotInPromptError

Threshold = Annotated[float, Field(gt=0, lt=1)]


class Prompt(Settings):
    """A prompt and the items whose cross-attention makes the mask (Eq. 4), with a threshold for each."""

    text: str = Field(min_length=1, max_length=500)
    items: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    thresholds: tuple[Threshold, ...]

    @model_validator(mode="after")
    def _fits(self) -> Prompt:
        if len(self.thresholds) != len(self.items):
            raise ValueError(f"expected {len(self.items)} thresholds, one an item, got {len(self.thresholds)}")
        words = self.text.lower().split()
        for item in self.items:
            phrase = item.lower().split()
            if not phrase or not any(words[i : i + len(phrase)] == phrase for i in range(len(words))):
                raise ValueError(str(ItemNotInPromptError(item, self.text)))
        return self


class PromptList(Settings):
    """A named list of prompts."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    description: str = ""
    prompts: tuple[Prompt, ...] = Field(min_length=1)


def builtin_lists() -> Mapping[str, PromptList]:
    """The lists that come with dfusion, by name."""
    found = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda f: f.name):
        if re.fullmatch(r"[a-z0-9-]+\.json", file.name):
            loaded = PromptList.model_validate_json(file.read_text("utf-8"))
            found[loaded.name] = loaded
    return found
