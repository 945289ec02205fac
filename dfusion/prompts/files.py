"""Rows of prompt files: lines, JSON, JSON lines, parquet, and data sets of Hugging Face on disk. Does not import torch.

A JSON file is a list of prompts (texts or objects), or an object with `prompts`, or with `templates` and `lists`:
`{"templates": ["a [{animal}] {activity}"], "lists": {"animal": ["cat", "dog"], "activity": ["eating", "asleep"]}}` has
four prompts. Of JSON lines, parquet and data sets, the columns `text` (or `prompt`, or `caption`), `items` and
`thresholds` are read; others are ignored. A data set is a folder that `save_to_disk` wrote. Parquet and data sets need
pyarrow.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfusion.errors import InvalidInputError, shortened
from dfusion.prompts.text import decode_utf8, prompt_lines, split_lines

MAX_PROMPTS = 10_000
"""The prompts of a file of rows."""
_TEXT_COLUMNS = ("text", "prompt", "caption")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class PromptRow:
    """The fields of a prompt that is not validated yet, and its place in the file."""

    place: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class PromptRows:
    """The rows of a file and its description, if it has one."""

    rows: Sequence[PromptRow]
    description: str | None = None


def prompt_rows(path: Path) -> PromptRows:
    """Read the rows of a prompt file; the module describes the formats.

    Raises:
        InvalidInputError: The file has another form, or more than 10,000 prompts.
        OSError: It cannot be read.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return PromptRows(_limited(_of_table(_arrow_rows(path), "row")))
    if suffix == ".parquet":
        return PromptRows(_limited(_of_table(_parquet_rows(path), "row")))

    text = decode_utf8(path.read_bytes())
    if suffix == ".json":
        return _of_json(text)
    if suffix in (".jsonl", ".ndjson"):
        return PromptRows(_limited(_of_table(_json_lines(text), "line")))
    return PromptRows([PromptRow(f"line {number}", {"text": line}) for number, line in prompt_lines(text)])


def is_row_file(path: Path) -> bool:
    """Whether `prompt_rows` reads the file as rows, not as lines of text."""
    return path.is_dir() or path.suffix.lower() in (".json", ".jsonl", ".ndjson", ".parquet")


def expand(template: str, lists: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The texts of a template: every combination of the values of the lists that it names in braces.

    Args:
        template: As in "a [{animal}] {activity}". A list that it names twice has the same value in both places.
        lists: The values by name.

    Raises:
        InvalidInputError: The template names a list that does not exist or has no values.
    """
    names = list(dict.fromkeys(_PLACEHOLDER.findall(template)))
    for name in names:
        if not lists.get(name):
            known = ", ".join(lists) or "none"
            raise InvalidInputError(f"template {template!r}: expected a list of values {name!r}, got the lists {known}")

    for values in itertools.product(*(lists[name] for name in names)):
        by_name = dict(zip(names, values, strict=True))
        yield _PLACEHOLDER.sub(lambda match, by_name=by_name: by_name[match[1]], template)  # type: ignore[misc]


def _limited(rows: Iterable[PromptRow]) -> list[PromptRow]:
    limited = list(itertools.islice(rows, MAX_PROMPTS + 1))
    if len(limited) > MAX_PROMPTS:
        raise InvalidInputError(f"expected at most {MAX_PROMPTS} prompts, got more")
    return limited


def _of_json(text: str) -> PromptRows:
    content = _parsed(text, "")
    body = content if isinstance(content, dict) else {"prompts": content}
    unknown = body.keys() - {"name", "description", "prompts", "templates", "lists"}
    has_prompts = "prompts" in body
    if unknown or has_prompts == ("templates" in body) or (has_prompts and not isinstance(body["prompts"], list)):
        raise InvalidInputError(
            "expected a list of prompts, or an object with the list in `prompts`, or with `templates` and `lists`; "
            f"got {shortened(content)}"
        )

    if has_prompts:
        prompts = enumerate(body["prompts"], start=1)
        rows: Iterable[PromptRow] = (PromptRow(f"prompt {n}", _fields(prompt)) for n, prompt in prompts)
    else:
        texts = _expanded(body["templates"], body.get("lists", {}))
        rows = (PromptRow(f"prompt {n}", {"text": text}) for n, text in enumerate(texts, start=1))
    return PromptRows(_limited(rows), body.get("description"))


def _expanded(templates: Any, lists: Any) -> Iterator[str]:
    if not _are_texts(templates):
        raise InvalidInputError(f"templates: expected a list of texts, got {shortened(templates)}")
    if not isinstance(lists, dict) or not all(_are_texts(values) for values in lists.values()):
        raise InvalidInputError(f"lists: expected an object of lists of texts, got {shortened(lists)}")
    for template in templates:
        yield from expand(template, lists)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _fields(prompt: Any) -> Mapping[str, Any]:
    if not isinstance(prompt, dict | str):
        raise InvalidInputError(f"expected a list of prompts, texts or objects; got {shortened(prompt)} in it")
    return {"text": prompt} if isinstance(prompt, str) else prompt


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(split_lines(text), start=1):
        if line.strip():
            yield number, _parsed(line, f"line {number}: ")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{place}expected JSON: {error}") from error


def _of_table(rows: Iterable[tuple[int, Any]], unit: str) -> Iterator[PromptRow]:
    """The rows of a table, from the columns of a prompt; empty cells are left out."""
    for number, row in rows:
        place = f"{unit} {number}"
        if isinstance(row, str):
            yield PromptRow(place, {"text": row})
            continue
        if not isinstance(row, dict):
            raise InvalidInputError(f"{place}: expected a text or an object, got {shortened(row)}")

        columns = {name.lower(): value for name, value in row.items() if value is not None}
        text = next((columns[name] for name in _TEXT_COLUMNS if name in columns), None)
        if text is None:
            raise InvalidInputError(f"{place}: expected {' or '.join(_TEXT_COLUMNS)}, got {shortened(list(row))}")
        optional = {name: columns[name] for name in ("items", "thresholds") if columns.get(name)}
        yield PromptRow(place, {"text": text, **optional})


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    _require_pyarrow()
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(columns=_prompt_columns(file.schema_arrow.names))
            yield from _numbered(batches)
    except pyarrow.ArrowInvalid as error:
        raise InvalidInputError(f"expected a parquet file: {error}") from error


def _arrow_rows(folder: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a data set that `save_to_disk` of Hugging Face wrote."""
    _require_pyarrow()
    import pyarrow

    if (folder / "dataset_dict.json").is_file():
        raise InvalidInputError("expected the folder of one split, got a folder of splits: name one of its folders")
    if not (folder / "state.json").is_file():
        raise InvalidInputError("expected a file, or a data set folder with state.json, got a folder without it")

    state = _parsed(decode_utf8((folder / "state.json").read_bytes()), "state.json: ")
    try:
        names = [Path(entry["filename"]).name for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise InvalidInputError(f"state.json: expected _data_files with file names, got {shortened(state)}") from error
    if state.get("_indices_data_files"):
        raise InvalidInputError("expected a data set without a separate index: call flatten_indices before saving it")

    first = 1
    for name in names:
        try:
            with pyarrow.memory_map(str(folder / name)) as source, pyarrow.ipc.open_stream(source) as stream:
                columns = _prompt_columns(stream.schema.names)
                for number, row in _numbered((batch.select(columns) for batch in stream), first):
                    yield number, row
                    first = number + 1
        except pyarrow.ArrowInvalid as error:
            raise InvalidInputError(f"expected an Arrow stream in {name}: {error}") from error


def _require_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InvalidInputError("this format needs pyarrow: pip install pyarrow") from error


def _prompt_columns(names: Sequence[str]) -> list[str]:
    """The columns to read. Raises InvalidInputError if none is a text."""
    columns = [name for name in names if name.lower() in (*_TEXT_COLUMNS, "items", "thresholds")]
    if not any(name.lower() in _TEXT_COLUMNS for name in columns):
        raise InvalidInputError(f"expected a column {' or '.join(_TEXT_COLUMNS)}, got {shortened(list(names))}")
    return columns


def _numbered(batches: Iterable[Any], first: int = 1) -> Iterator[tuple[int, Any]]:
    number = first
    for batch in batches:
        for row in batch.to_pylist():
            yield number, row
            number += 1
