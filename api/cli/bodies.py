"""Bodies of requests: from a file, from options, and from `--set name.of.setting=value`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer


def body_of(file: Path | None, options: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The body: what the file says, over it the options that were given (names may have dots), over it `settings`."""
    body = {} if file is None else read_json_object(file)
    for name, value in options.items():
        if value is not None:
            put(body, name, value)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"expected name=value, got {setting!r}", param_hint="--set")
        put(body, name, value_of(text))
    return body


def put(body: dict[str, Any], name: str, value: Any) -> None:
    """Set `training.lora.rank` and the like."""
    *outer, last = name.split(".")
    place = body
    for part in outer:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise typer.BadParameter(f"{name}: {part} is {inner!r}, nothing can be set in it", param_hint="--set")
        place = inner
    place[last] = value


def value_of(text: str) -> Any:
    """JSON where it is JSON (0.5, true, null, [3, 4]), otherwise the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_text(file: Path) -> str:
    """The file's text; `-` is standard input."""
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is no text in UTF-8") from error
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from error


def read_json(file: Path) -> Any:
    """The file's JSON."""
    try:
        return json.loads(read_text(file))
    except ValueError as error:
        raise typer.BadParameter(f"{file} is no JSON: {error}") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """The file's JSON, which is an object."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found
