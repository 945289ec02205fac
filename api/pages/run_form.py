"""The form that starts a run. Its fields are generated from the model of the request, so that none is missing.

A form is a map of texts by the name of a setting, such as `training.beta`. An optional part of the request, such as
`fusion`, has a separate field with the values "on" and "off".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from dfusion.algorithms import readers
from service.errors import FieldProblem
from service.jobs.kinds import RoundSpec

Json = dict[str, Any]
Texts = Mapping[str, str]
EVERYDAY = (
    "prompt_set",
    "prompts",
    "held_out_prompt_set",
    "model",
    "training.algorithm",
    "fusion",
    "rounds",
    "samples_per_prompt",
    "reward",
    "review",
    "review_pairs",
    "seed",
    "label",
)
"""The settings that are shown first. All others follow in groups."""
_HIDDEN = frozenset({"preset"})
"""A preset fills the form, whose values are all explicit."""
_GENERAL = "general"
_ON = "on"
_OFF = "off"
_WORDS = {"true": "yes", "false": "no"}


@dataclass(frozen=True)
class Field:
    """A field of the form.

    Attributes:
        name: The names of the setting and of the parts that contain it, joined by dots.
        schema: The JSON schema of its values, without null.
        note: What it means.
        control: "switch", "choice", "lines", "number" or "text".
        default: The text of its default.
        is_optional: Whether it may be null, which an empty field means.
        algorithms: The algorithms that use it; empty for all.
    """

    name: str
    schema: Json
    note: str
    control: str
    default: str
    is_optional: bool
    algorithms: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its name in words."""
        words = self.name.rpartition(".")[2].replace("_", " ")
        return words[0].upper() + words[1:]

    @property
    def part(self) -> str:
        """The part of the request that contains it; "" for none."""
        return self.name.rpartition(".")[0]

    @property
    def options(self) -> list[tuple[str, str]]:
        """The values of a choice, and how they are shown."""
        values = [text_of(value) for value in self.schema.get("enum", [])]
        return [(value, _WORDS.get(value, value.replace("_", " "))) for value in values]


@dataclass(frozen=True)
class Group:
    """Fields that are shown together.

    Attributes:
        name: The part of the request that they set.
        fields: The fields.
        switch: The field that turns the part off; "" if it cannot be off.
    """

    name: str
    fields: tuple[Field, ...]
    switch: str

    @property
    def title(self) -> str:
        """Its name as a heading."""
        return self.name.capitalize()


@cache
def fields() -> dict[str, Field]:
    """All fields by name."""
    schema = RoundSpec.model_json_schema()
    return {field.name: field for field in _fields(schema, schema.get("$defs", {}), "")}


def _fields(schema: Json, parts: Json, prefix: str) -> Iterator[Field]:
    for name, given in schema["properties"].items():
        if prefix + name in _HIDDEN:
            continue
        value, is_optional = _without_null(given)
        part = parts[value["$ref"].rpartition("/")[2]] if "$ref" in value else value
        note = given.get("description", "")
        if "properties" not in part:
            algorithms = readers(name) if prefix == "training." else ()
            default = text_of(given.get("default"))
            note = note.replace("null", "empty") if is_optional else note
            yield Field(prefix + name, _choice(part), note, _control(part), default, is_optional, algorithms)
            continue

        if is_optional:
            default = _OFF if given.get("default") is None else _ON
            yield Field(prefix + name, {"enum": [_ON, _OFF]}, note.replace("null", _OFF), "switch", default, False)
        yield from _fields(part, parts, f"{prefix}{name}.")


def _without_null(schema: Json) -> tuple[Json, bool]:
    """The schema of the values other than null, and whether null is one."""
    alternatives = schema.get("anyOf", [schema])
    others = [alternative for alternative in alternatives if alternative.get("type") != "null"]
    value = others[0] if len(others) == 1 else {"anyOf": others}
    return value, len(others) < len(alternatives)


def _choice(schema: Json) -> Json:
    return schema | {"enum": [True, False]} if schema.get("type") == "boolean" else schema


def _control(schema: Json) -> str:
    if "enum" in schema or schema.get("type") == "boolean":
        return "choice"
    if schema.get("type") in ("integer", "number"):
        return "number"
    return "lines" if "$ref" in schema.get("items", {}) else "text"


@cache
def groups() -> tuple[Group, ...]:
    """The fields that are not shown first, by the part of the request."""
    by_name: dict[str, list[Field]] = {}
    for field in fields().values():
        if field.name not in EVERYDAY:
            by_name.setdefault(field.part.partition(".")[0] or _GENERAL, []).append(field)
    by_name[_GENERAL] = by_name.pop(_GENERAL, [])  # at the end
    switches = {name for name in by_name if name in fields()}
    return tuple(Group(name, tuple(of_it), name if name in switches else "") for name, of_it in by_name.items())


def texts_of(request: Mapping[str, Any]) -> dict[str, str]:
    """The form of a request, of which all parts have their values. The fields of a part that is off have defaults."""
    return {field.name: text_in(field, request) for field in fields().values()}


def text_in(field: Field, request: Mapping[str, Any]) -> str:
    """The text of a field for a request; its default if the request lacks the part of the field."""
    *parts, name = field.name.split(".")
    place: Any = request
    for part in parts:
        place = place.get(part)
        if place is None:
            return field.default

    value = place.get(name)
    if field.control == "switch":
        return _OFF if value is None else _ON
    return _lines(value) if field.control == "lines" else text_of(value)


def _lines(prompts: Iterable[Mapping[str, Any]] | None) -> str:
    """Prompts as JSON with one prompt in a line, which keeps their thresholds."""
    lines = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts or ()]
    return "[" + ",\n".join(lines) + "]" if lines else ""


def text_of(value: Any) -> str:
    """A setting as a person enters it; "" for none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and not any(isinstance(item, Mapping) for item in value):
        return ", ".join(map(text_of, value))
    if isinstance(value, list | Mapping):
        return json.dumps(value, ensure_ascii=False)
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def request_of(form: Texts) -> Json:
    """The body of the request that a form describes. What is no valid value stays a text, which the API refuses."""
    request: Json = {}
    for field in fields().values():
        *parts, name = field.name.split(".")
        if field.name not in form or any(form.get(part) == _OFF for part in parts):
            continue

        place = request
        for part in parts:
            place = place.setdefault(part, {})
        text = form[field.name].strip()
        if field.control == "switch":
            place[name] = {} if text == _ON else None
        elif text or field.is_optional:  # another field that is empty has its default
            place[name] = _value_of(field, text)
    return request


def _value_of(field: Field, text: str) -> Any:
    if text == "":
        return None
    if field.control != "lines":
        return _value(field.schema, text)
    prompts = _json_of(text)
    lines = [line.strip() for line in text.splitlines()]
    return prompts if isinstance(prompts, list) else [{"text": line} for line in lines if line]


def _value(schema: Json, text: str) -> Any:
    """The value that a text means in a place with this schema."""
    alternatives = schema.get("anyOf", [schema])
    types = {alternative.get("type", "object") for alternative in alternatives}
    if any(text == alternative.get("const") for alternative in alternatives):
        return text
    if "boolean" in types:
        return {"true": True, "false": False}.get(text, text)
    if types & {"integer", "number"}:
        return _number(text)
    if types & {"array", "object"} and text[0] in "[{":
        parsed = _json_of(text)
        return text if parsed is None else parsed
    if "array" in types:
        items = next(alternative["items"] for alternative in alternatives if alternative.get("type") == "array")
        return [_value(items, item.strip()) for item in text.split(",") if item.strip()]
    return text


def _number(text: str) -> int | float | str:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _json_of(text: str) -> Any:
    """The value of a JSON text; None for another text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Problems:
    """The problems of a form.

    Attributes:
        by_field: The messages by field.
        others: The messages that belong to no field.
    """

    by_field: Mapping[str, str]
    others: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.by_field or self.others)


def problems_of(problems: Iterable[FieldProblem]) -> Problems:
    """The problems of a request by the fields of the form that set the values of their pointers."""
    by_field: dict[str, str] = {}
    others = []
    for problem in problems:
        parts = problem.pointer.split("/")[1:]
        names = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
        name = next((name for name in names if name in fields()), None)
        if name is None:
            others.append(f"{problem.pointer.removeprefix('/')}: {problem.message}".removeprefix(": "))
            continue
        within = "/".join(parts[len(name.split(".")) :])
        message = f"{within}: {problem.message}" if within else problem.message
        by_field[name] = f"{by_field[name]}; {message}" if name in by_field else message
    return Problems(by_field, tuple(others))
