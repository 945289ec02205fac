"""Prompt lists: prompts with their items and mask thresholds. Does not import torch.

A list is a JSON file in this folder: `{"name", "description", "prompts": [{"text", "items", "thresholds"}]}`. The lists
`paper-*` are tables 4, 5 and 6 of the paper. The lists `shapes-*` belong to the shapes world.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from dfusion.config import StrictModel
from dfusion.errors import InvalidInputError, ItemNotInPromptError, PromptItemsError, shortened
from dfusion.prompts.files import PromptRow, prompt_rows
from dfusion.prompts.items import find_items, parse_marked
from dfusion.prompts.text import adapter_syntax, clean, prompt_warnings

MAX_LENGTH = 500
"""The characters of a prompt."""
Threshold = Annotated[float, Field(gt=0, lt=1)]


class Prompt(StrictModel):
    """A prompt and the items whose cross-attention gives the mask (Eq. 4), with a threshold for each.

    If `items` is not given, the items are those marked in the text, "a [cat] eating a [sandwich]" (the brackets are
    removed from `text`). Without marks, they are the nouns of the text (`dfusion.prompts.items`). Without `thresholds`
    (None), they are computed from samples (`dfusion.thresholds`).
    """

    text: str = Field(min_length=1, max_length=MAX_LENGTH)
    items: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), min_length=1, max_length=64, description="Words of the text; marked in the text or detected if not given"
    )
    thresholds: tuple[Threshold, ...] | None = Field(
        None, description="One per item; computed from samples if not given"
    )

    @model_validator(mode="before")
    @classmethod
    def _items_of_the_text(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not isinstance(given.get("text"), str):
            return given

        cleaned = {**given, "text": clean(given["text"])}
        if given.get("items") is not None:
            if isinstance(given["items"], list | tuple):
                cleaned["items"] = [clean(item) if isinstance(item, str) else item for item in given["items"]]
            return cleaned

        try:
            text, items = parse_marked(cleaned["text"])
            if len(text) > MAX_LENGTH:
                return {**cleaned, "text": text}  # the field is refused
            _refuse_adapters(text)
            if text and not items:
                items = find_items(text)
                if given.get("thresholds") is not None:
                    raise PromptItemsError("thresholds: expected items, given or marked, for them, got none")
        except PromptItemsError as error:
            raise ValueError(str(error)) from error
        return {**cleaned, "text": text, "items": items}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.thresholds is not None and len(self.thresholds) != len(self.items):
            raise ValueError(f"expected {len(self.items)} thresholds, one per item, got {len(self.thresholds)}")
        for item in self.items:
            if not _occurs(item, self.text):
                raise ValueError(str(ItemNotInPromptError(item, self.text)))
        if len({item.casefold() for item in self.items}) != len(self.items):
            raise ValueError(
                f"expected each item once (all its occurrences make one map), got {shortened(list(self.items))}"
            )
        return self

    @property
    def warnings(self) -> tuple[str, ...]:
        """Syntax of other programs in the text, such as weights, which is read as plain text."""
        return prompt_warnings(self.text)


def _refuse_adapters(text: str) -> None:
    adapter = adapter_syntax(text)
    if adapter is not None:
        raise PromptItemsError(f"expected the text of a prompt, got {adapter!r}, which loads nothing here: remove it")


def _occurs(item: str, text: str) -> bool:
    """Whether the item's words occur in the text consecutively, as whole words."""
    # without a regular expression: compiling one for each item would take most of the time of a large file
    phrase = " ".join(item.lower().split())
    words = f" {' '.join(text.lower().split())} "
    start = words.find(phrase) if phrase else -1
    while start >= 0:
        before = words[start - 1]
        after = words[start + len(phrase)]
        if not (before.isalnum() or before == "_" or after.isalnum() or after == "_"):
            return True
        start = words.find(phrase, start + 1)
    return False


class PromptList(StrictModel):
    """A named list of prompts."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    description: str = ""
    prompts: tuple[Prompt, ...] = Field(min_length=1)


@cache
def builtin_lists() -> Mapping[str, PromptList]:
    """The lists that come with dfusion, by name."""
    lists = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda f: f.name):
        if re.fullmatch(r"[a-z0-9-]+\.json", file.name):
            prompt_list = PromptList.model_validate_json(file.read_text("utf-8"))
            lists[prompt_list.name] = prompt_list
    return MappingProxyType(lists)


def read_prompts(source: str) -> tuple[Prompt, ...]:
    """Read the prompts of a built-in list or of a file.

    Prompts with syntax that is read as plain text, such as weights, are warned about.

    Args:
        source: The name of a built-in list, or the path of a file: JSON, JSON lines, parquet or a data set that
            Hugging Face's `save_to_disk` wrote (`dfusion.prompts.files`). Any other file has one prompt per line, with
            or without marked items. Lines that begin with # are comments.

    Returns:
        The prompts.

    Raises:
        InvalidInputError: The list or file does not exist, is invalid, or has no prompts.

    Example:
        >>> from dfusion import read_prompts
        >>> prompts = read_prompts("shapes-attribute-train")
        >>> len(prompts), prompts[0].text
        (40, 'a yellow and dotted cross')
    """
    known = builtin_lists()
    if source in known:
        return known[source].prompts

    try:
        prompts = tuple(_validated(row) for row in prompt_rows(Path(source)).rows)
    except (OSError, ValueError, InvalidInputError) as error:
        names = ", ".join(known)
        raise InvalidInputError(f"prompts: expected a file, or one of {names}; got {source!r}: {error}") from error

    if not prompts:
        raise InvalidInputError(f"prompts: expected at least one in {source}, got none")
    for prompt in prompts:
        for warning in prompt.warnings:
            warnings.warn(f"{source}: {prompt.text!r}: {warning}", stacklevel=2)
    return prompts


def _validated(row: PromptRow) -> Prompt:
    try:
        return Prompt.model_validate(row.fields)
    except ValidationError as error:
        problems = [": ".join([*map(str, detail["loc"]), detail["msg"]]) for detail in error.errors()]
        raise InvalidInputError(f"{row.place}: {'; '.join(problems)}") from error
