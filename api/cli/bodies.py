"""Request bodies from a file, from options and from `--set name.of.setting=value`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from dfusion.errors import TextEncodingError
from dfusion.prompts.text import decode_utf8


def build_body(file: Path | None, options: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Merge a request body; options override the file, and `settings` override both.

    Args:
        file: JSON object to start from.
        options: Values by setting name, which may contain dots; None means not given.
        settings: Arguments of `--set`, as `name=value`.

    Returns:
        The body.

    Raises:
        typer.BadParameter: The file or a setting is invalid.
    """
    body = {} if file is None else read_json_object(file)

    for name, value in options.items():
        if value is not None:
            set_nested(body, name, value)

    for setting in settings:
        name, equals, text = setting.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"expected name=value, got {setting!r}", param_hint="--set")
        set_nested(body, name, parse_value(text))

    return body


def set_nested(body: dict[str, Any], name: str, value: Any) -> None:
    """Set a value by its dotted name, such as `training.lora.rank`. Creates missing objects.

    Raises:
        typer.BadParameter: A part of the name is a value that is not an object.
    """
    *parents, last = name.split(".")
    target = body
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            raise typer.BadParameter(f"{name}: expected an object in {parent}, got {child!r}", param_hint="--set")
        target = child
    target[last] = value


def parse_value(text: str) -> Any:
    """Parse JSON (0.5, true, null, [3, 4]); other text is returned as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_text(file: Path) -> str:
    """Read a UTF-8 text file; `-` is standard input. Raises typer.BadParameter."""
    try:
        return decode_utf8(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes())
    except TextEncodingError as error:
        raise typer.BadParameter(f"{file}: {error}") from error
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises typer.BadParameter."""
    try:
        content = json.loads(read_text(file))
    except ValueError as error:
        raise typer.BadParameter(f"{file}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
