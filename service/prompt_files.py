"""Prompt sets as clients send them: JSON, lines, CSV, and the files of the released D-Fusion code.

Everything that is wrong is named at once. Nothing is stored here.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from dfusion.config import StrictModel
from dfusion.prompts import Prompt, Threshold
from dfusion.prompts.items import names_no_thing
from service.errors import FieldProblem, InvalidRequestError, json_pointer

MOST_PROMPTS = 10_000
SetName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
Description = Annotated[str, StringConstraints(max_length=2000)]
_COLUMNS = ("text", "items", "thresholds")
_LINE_END = re.compile(r"\r\n|\r|\n")
_FILES_EXPECTED = (
    "to send the released D-Fusion code's files, expected "
    '{"name", "prompt_file": ["a cat", …], "item_idx_file": {"a cat": [1], …}, "mask_thr_file": {"a cat": [0.02], …}}'
)


class PromptSetSpec(StrictModel):
    """Prompts under a name: `prompts`, or `text` with one a line, or what the files of the released D-Fusion code hold.

    The released code's files give an item by the number of its word in the prompt, from 0: [1, 4] in "a cat eating a
    sandwich" are cat and sandwich.
    """

    name: SetName
    description: Description = ""
    prompts: tuple[Prompt, ...] | None = Field(None, min_length=1, max_length=MOST_PROMPTS)
    text: str | None = Field(
        None, description='One prompt a line, items marked as in "a [cat]"; blank lines and # lines are skipped'
    )
    prompt_file: tuple[str, ...] | None = Field(None, description="The released code's prompts")
    item_idx_file: dict[str, tuple[int, ...]] | None = Field(None, description="By prompt the numbers of items' words")
    mask_thr_file: dict[str, tuple[Threshold, ...]] | None = Field(None, description="By prompt a threshold an item")

    @classmethod
    def of_json(cls, given: object, named: Mapping[str, str]) -> Self:
        """From a document, or a list that is the released code's `prompt_file`, and what is said beside it.

        Raises pydantic's ValidationError; InvalidRequestError for other files of the released code, which name no set,
        and where a thing is said twice.
        """
        if isinstance(given, list):
            return cls.model_validate({"prompt_file": given, **named})
        if not isinstance(given, dict):
            return cls.model_validate(given)
        if given and not set(given) & set(cls.model_fields):
            raise InvalidRequestError.at("", _FILES_EXPECTED)
        for name in named:
            if name in given:
                raise InvalidRequestError.at(f"/{name}", "expected it in the body or in the query, got both")
        return cls.model_validate({**named, **given})

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("prompts", "text", "prompt_file") if getattr(self, name) is not None]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            raise ValueError(f"expected exactly one of prompts, text, prompt_file, got {got}; {_FILES_EXPECTED}")
        if self.prompt_file is None and (self.item_idx_file is not None or self.mask_thr_file is not None):
            raise ValueError(f"item_idx_file and mask_thr_file go with prompt_file; {_FILES_EXPECTED}")
        return self

    def read(self) -> tuple[Prompt, ...]:
        """The prompts. Raises InvalidRequestError with all that is wrong."""
        if self.prompts is not None:
            return self.prompts
        if self.text is not None:
            return from_lines(self.text)
        return from_released(self.prompt_file or (), self.item_idx_file, self.mask_thr_file)


@dataclass(frozen=True)
class _Entry:
    """A prompt's fields, and the JSON pointer of where they were."""

    pointer: str
    fields: Mapping[str, object]


def from_lines(text: str) -> tuple[Prompt, ...]:
    """One prompt a line, items marked as in "a [cat] eating a [sandwich]"; blank lines and # lines are skipped.

    Raises InvalidRequestError; "/lines/17" is the seventeenth line.
    """
    lines = enumerate((line.strip() for line in _LINE_END.split(text)), start=1)
    return _checked([_Entry(f"/lines/{n}", {"text": line}) for n, line in lines if line and not line.startswith("#")])


def from_csv(text: str) -> tuple[Prompt, ...]:
    """A header row with `text` and perhaps `items` and `thresholds`, which are separated by ";" within their cells.

    Raises InvalidRequestError; "/lines/17" is the row that begins on the seventeenth line.
    """
    problems: list[FieldProblem] = []
    entries = []
    rows = _rows(text, problems)
    header = _header(*next(rows, (1, [])))
    for line, cells in rows:
        try:
            entries.append(_Entry(f"/lines/{line}", _of_cells(header, cells)))
        except ValueError as error:
            problems.append(FieldProblem(f"/lines/{line}", str(error)))
    return _checked(entries, problems)


def _rows(text: str, problems: list[FieldProblem]) -> Iterator[tuple[int, list[str]]]:
    """Rows' cells, each with the line that it begins on; empty rows are left out, and where it is no CSV they end."""
    reader = csv.reader([line + "\n" for line in _LINE_END.split(text)], strict=True)
    begins = 1
    try:
        for row in reader:
            line, begins = begins, reader.line_num + 1
            cells = [" ".join(cell.split()) for cell in row]
            if any(cells):
                yield line, cells
    except csv.Error as error:
        problems.append(FieldProblem(f"/lines/{begins}", f"expected CSV: {error}"))


def _header(line: int, cells: Sequence[str]) -> list[str]:
    names = [cell.lower() for cell in cells]
    if "text" not in names or set(names) - set(_COLUMNS) or len(set(names)) < len(names):
        message = f"expected a header row text[,items][,thresholds], got {_shortened(','.join(cells))}"
        raise InvalidRequestError.at(f"/lines/{line}", message)
    return names


def _of_cells(header: Sequence[str], cells: Sequence[str]) -> dict[str, object]:
    """A prompt's fields; empty cells say nothing. Raises ValueError."""
    if len(cells) > len(header):
        raise ValueError(f"expected {len(header)} cells as in the header, got {len(cells)}; quote text with commas")
    row = dict(zip(header, cells, strict=False))
    fields: dict[str, object] = {"text": row.get("text", "")}
    if items := row.get("items"):
        fields["items"] = [item.strip() for item in items.split(";")]
    if thresholds := row.get("thresholds"):
        try:
            fields["thresholds"] = [float(number) for number in thresholds.split(";")]
        except ValueError:
            message = f'thresholds: expected numbers separated by ";", got {_shortened(thresholds)}'
            raise ValueError(message) from None
    return fields


def from_released(
    prompts: Sequence[str],
    items: Mapping[str, Sequence[int]] | None,
    thresholds: Mapping[str, Sequence[float]] | None,
) -> tuple[Prompt, ...]:
    """What the released code's `prompt_file`, `item_idx_file` and `mask_thr_file` hold.

    An index is that of a word: the files are made so, also where CLIP has several tokens for a word before it. Without
    indices the items are found in the prompts, and there can be no thresholds; entries for other prompts are left out.
    Raises InvalidRequestError.
    """
    problems: list[FieldProblem] = []
    entries = []
    for n, text in enumerate(prompts):
        fields: dict[str, object] = {"text": text}
        wrong = []
        for name, by_prompt in (("item_idx_file", items), ("mask_thr_file", thresholds)):
            if by_prompt is not None and text not in by_prompt:
                wrong.append(FieldProblem(f"/prompt_file/{n}", f"expected an entry in {name}, found none"))
        if items is not None and text in items:
            fields["items"], wrong_items = _words_at(text, items[text])
            wrong += wrong_items
        if thresholds is not None:
            fields["thresholds"] = thresholds.get(text)
        problems += wrong
        if not wrong:
            entries.append(_Entry(f"/prompt_file/{n}", fields))
    return _checked(entries, problems)


def _words_at(text: str, indices: Sequence[int]) -> tuple[list[str], list[FieldProblem]]:
    """The words of these numbers, and which numbers cannot be those of items."""
    words = [word.strip(".,;:!?\"'()") for word in text.split()]
    found, problems = [], []
    for k, index in enumerate(indices):
        word = words[index] if 0 <= index < len(words) else ""
        message = None
        if not word:
            message = f"expected the number of a word within 0 to {len(words) - 1}, got {index}"
        elif names_no_thing(word):
            message = f"expected the number of an item's word, counted from 0; {index} is {_shortened(word)}"
        elif [other.casefold() for other in words].count(word.casefold()) > 1:
            message = f"{_shortened(word)} is there more than once, and an item takes all its occurrences"
        if message is not None:
            problems.append(FieldProblem(json_pointer(("item_idx_file", text, k)), message))
        found.append(word)
    return found, problems


def _checked(entries: Sequence[_Entry], problems: Sequence[FieldProblem] = ()) -> tuple[Prompt, ...]:
    """The prompts. Raises InvalidRequestError for these problems and all that is wrong with the entries."""
    if len(entries) + len(problems) > MOST_PROMPTS:
        raise InvalidRequestError.at("", f"expected at most {MOST_PROMPTS} prompts, got {len(entries) + len(problems)}")
    prompts, found = [], list(problems)
    for entry in entries:
        try:
            prompts.append(Prompt.model_validate(entry.fields))
        except ValidationError as error:
            found += [_problem(entry.pointer, one["loc"], one["msg"]) for one in error.errors()]
    if found:
        first = "; ".join(f"{one.pointer}: {one.message}" for one in found[:5])
        raise InvalidRequestError(first, *found)
    if not prompts:
        raise InvalidRequestError.at("", "expected at least one prompt", "empty_prompt_set")
    return tuple(prompts)


def _problem(pointer: str, location: Sequence[object], message: str) -> FieldProblem:
    return FieldProblem(pointer + json_pointer(location), message.removeprefix("Value error, "))


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "…")
