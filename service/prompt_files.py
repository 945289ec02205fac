"""Parsers for prompt sets: JSON, lines, CSV, and the files of the released D-Fusion code.

Errors list all problems at once. This module stores nothing.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from dfusion.config import StrictModel
from dfusion.errors import FieldsError
from dfusion.prompts import Prompt, Threshold
from dfusion.prompts.files import MAX_PROMPTS
from dfusion.prompts.items import names_no_thing
from dfusion.prompts.text import clean, prompt_lines, split_lines
from service.errors import FieldProblem, InvalidRequestError, json_pointer

SetName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
Description = Annotated[str, StringConstraints(max_length=2000)]
_COLUMNS = ("text", "items", "thresholds")
_FILES_EXPECTED = (
    "the released D-Fusion code's files are expected as "
    '{"name", "prompt_file": ["a cat", …], "item_idx_file": {"a cat": [1], …}, "mask_thr_file": {"a cat": [0.02], …}}'
)


class PromptSetSpec(StrictModel):
    """A named prompt set: `prompts`, `text` with one prompt per line, or the files of the released D-Fusion code.

    The released code's files give an item by the index of its word in the prompt, from 0. In "a cat eating a sandwich",
    [1, 4] are cat and sandwich.
    """

    name: SetName
    description: Description = ""
    prompts: tuple[Prompt, ...] | None = Field(None, min_length=1, max_length=MAX_PROMPTS)
    text: str | None = Field(
        None, description='One prompt per line, items marked as in "a [cat]"; blank lines and # lines are skipped'
    )
    prompt_file: tuple[str, ...] | None = Field(None, description="Prompts of the released code")
    item_idx_file: dict[str, tuple[int, ...]] | None = Field(None, description="Indices of the items' words, by prompt")
    mask_thr_file: dict[str, tuple[Threshold, ...]] | None = Field(
        None, description="Thresholds, one per item, by prompt"
    )

    @classmethod
    def of_json(cls, body: object, query: Mapping[str, str]) -> Self:
        """Parse the JSON body of a request.

        Args:
            body: A document with the fields of this class, or a list, which is a `prompt_file` of the released code.
            query: Fields from the query of the request.

        Raises:
            ValidationError: A field is invalid.
            InvalidRequestError: The body is another file of the released code, or a field is also in the query.
        """
        if isinstance(body, list):
            return cls.model_validate({"prompt_file": body, **query})
        if not isinstance(body, dict):
            return cls.model_validate(body)

        if body and not set(body) & set(cls.model_fields):
            raise InvalidRequestError.at("", _FILES_EXPECTED)
        for name in query:
            if name in body:
                raise InvalidRequestError.at(f"/{name}", "expected this field in the body or in the query, got both")
        return cls.model_validate({**query, **body})

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [name for name in ("prompts", "text", "prompt_file") if getattr(self, name) is not None]
        if len(sources) != 1:
            got = ", ".join(sources) or "none"
            message = f"expected exactly one of prompts, text, prompt_file, got {got}; {_FILES_EXPECTED}"
            raise FieldsError(message, *(sources or ("prompts", "text", "prompt_file")))
        if self.prompt_file is None and (self.item_idx_file is not None or self.mask_thr_file is not None):
            message = f"expected prompt_file with item_idx_file and mask_thr_file, got none; {_FILES_EXPECTED}"
            raise FieldsError(message, "prompt_file")
        return self

    def read(self) -> tuple[Prompt, ...]:
        """The prompts. Raises InvalidRequestError that lists all problems."""
        if self.prompts is not None:
            return self.prompts
        if self.text is not None:
            return from_lines(self.text)
        return from_released(self.prompt_file or (), self.item_idx_file, self.mask_thr_file)


@dataclass(frozen=True)
class _Entry:
    """The fields of a prompt, and the JSON pointer of their location."""

    pointer: str
    fields: Mapping[str, object]


def from_lines(text: str) -> tuple[Prompt, ...]:
    """Parse one prompt per line, items marked as in "a [cat] eating a [sandwich]".

    Blank lines and lines that start with # are skipped.

    Raises:
        InvalidRequestError: The pointer "/lines/17" is line 17.
    """
    return _validated([_Entry(f"/lines/{number}", {"text": prompt}) for number, prompt in prompt_lines(text)])


def from_csv(text: str) -> tuple[Prompt, ...]:
    """Parse CSV with a header row: `text`, and optionally `items` and `thresholds`, each separated by ";" in its cell.

    Raises:
        InvalidRequestError: The pointer "/lines/17" is the row that starts on line 17.
    """
    problems: list[FieldProblem] = []
    rows = _rows(text, problems)
    header = _header(*next(rows, (1, [])))

    entries = []
    for line, cells in rows:
        try:
            entries.append(_Entry(f"/lines/{line}", _of_cells(header, cells)))
        except ValueError as error:
            problems.append(FieldProblem(f"/lines/{line}", str(error)))
    return _validated(entries, problems)


def _rows(text: str, problems: list[FieldProblem]) -> Iterator[tuple[int, list[str]]]:
    """The first line and the cells of each row that is not empty. A syntax error ends them and is added to problems."""
    reader = csv.reader([line + "\n" for line in split_lines(text)], strict=True)
    first_line = 1
    try:
        for row in reader:
            cells = [" ".join(clean(cell).split()) for cell in row]
            if any(cells):
                yield first_line, cells
            first_line = reader.line_num + 1
    except csv.Error as error:
        problems.append(FieldProblem(f"/lines/{first_line}", f"expected CSV: {error}"))


def _header(line: int, cells: Sequence[str]) -> list[str]:
    names = [cell.lower() for cell in cells]
    if "text" not in names or set(names) - set(_COLUMNS) or len(set(names)) < len(names):
        message = f"expected a header row text[,items][,thresholds], got {_shortened(','.join(cells))}"
        raise InvalidRequestError.at(f"/lines/{line}", message)
    return names


def _of_cells(header: Sequence[str], cells: Sequence[str]) -> dict[str, object]:
    """The fields of a prompt. Empty cells are left out. Raises ValueError."""
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
    """Parse `prompt_file`, `item_idx_file` and `mask_thr_file` of the released code.

    Entries for other prompts are ignored.

    Args:
        prompts: The prompts.
        items: Indices of the items' words, by prompt; they count words, not CLIP tokens. None: find items in the text.
        thresholds: Thresholds, one per item, by prompt. They require `items`.

    Raises:
        InvalidRequestError: Lists all problems.
    """
    problems: list[FieldProblem] = []
    entries = []
    for n, text in enumerate(prompts):
        fields: dict[str, object] = {"text": text}
        entry_problems = []
        for name, by_prompt in (("item_idx_file", items), ("mask_thr_file", thresholds)):
            if by_prompt is not None and text not in by_prompt:
                entry_problems.append(FieldProblem(f"/prompt_file/{n}", f"expected an entry in {name}, got none"))

        if items is not None and text in items:
            fields["items"], item_problems = _words_at(text, items[text])
            entry_problems += item_problems
        if thresholds is not None:
            fields["thresholds"] = thresholds.get(text)

        problems += entry_problems
        if not entry_problems:
            entries.append(_Entry(f"/prompt_file/{n}", fields))
    return _validated(entries, problems)


def _words_at(text: str, indices: Sequence[int]) -> tuple[list[str], list[FieldProblem]]:
    """The words at these indices, and problems for indices of words that cannot be items."""
    words = [word.strip(".,;:!?\"'()") for word in text.split()]
    counts = Counter(word.casefold() for word in words)
    items = []
    problems = []
    for k, index in enumerate(indices):
        word = words[index] if 0 <= index < len(words) else ""
        message = None
        if not word:
            message = f"expected a word index within 0 to {len(words) - 1}, got {index}"
        elif names_no_thing(word):
            message = f"expected the index of an item's word, counted from 0; {index} is {_shortened(word)}"
        elif counts[word.casefold()] > 1:
            message = f"{_shortened(word)} occurs more than once, and an item covers all its occurrences"

        if message is not None:
            problems.append(FieldProblem(json_pointer(("item_idx_file", text, k)), message))
        items.append(word)
    return items, problems


def _validated(entries: Sequence[_Entry], problems: Sequence[FieldProblem] = ()) -> tuple[Prompt, ...]:
    """The prompts of the entries. Raises InvalidRequestError for `problems` and all problems of the entries."""
    if len(entries) + len(problems) > MAX_PROMPTS:
        raise InvalidRequestError.at("", f"expected at most {MAX_PROMPTS} prompts, got {len(entries) + len(problems)}")

    prompts = []
    all_problems = list(problems)
    for entry in entries:
        try:
            prompts.append(Prompt.model_validate(entry.fields))
        except ValidationError as error:
            all_problems += [_problem(entry.pointer, detail["loc"], detail["msg"]) for detail in error.errors()]

    if all_problems:
        summary = "; ".join(f"{problem.pointer}: {problem.message}" for problem in all_problems[:5])
        raise InvalidRequestError(summary, *all_problems)
    if not prompts:
        raise InvalidRequestError.at("", "expected at least one prompt", "empty_prompt_set")
    return tuple(prompts)


def _problem(pointer: str, location: Sequence[object], message: str) -> FieldProblem:
    return FieldProblem(pointer + json_pointer(location), message.removeprefix("Value error, "))


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "…")
