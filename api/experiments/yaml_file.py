"""Reads YAML with JSON's scalars: numbers, true, false and null; everything else is text. Keys must be unique.

PyYAML implements YAML 1.1, where `1e-3` is text and `no` is false; both cause mistakes in settings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from api.experiments.errors import FormatError, MissingExtraError

_SCALARS = {
    "null": ("~|null|", ["~", "n", ""]),
    "bool": ("true|false", ["t", "f"]),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
}
"""Pattern and first characters of the scalars that are not text, by tag; earlier tags take precedence."""


def read_yaml(file: Path) -> Any:
    """Read a YAML file.

    Args:
        file: Path of the file.

    Returns:
        The content as dict, list, str, int, float, bool and None.

    Raises:
        FormatError: The file is not valid YAML, or a key occurs twice.
        MissingExtraError: PyYAML is not installed.
        OSError: The file cannot be read.
    """
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: expected text in UTF-8") from error
    return parse_yaml(text, str(file))


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML text. `name` is its name in messages. Raises FormatError, MissingExtraError."""
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("PyYAML") from error

    try:
        return yaml.load(text, _loader(yaml))
    except yaml.YAMLError as error:
        raise FormatError(f"{name} is not valid YAML: {error}") from error


def _loader(yaml: Any) -> Any:
    """Create a subclass of PyYAML's safe loader with the scalars of this module."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys: set[str] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                problem = None
                if not isinstance(key, str):
                    problem = f"expected text as a key, got {key!r}: put it in quotes"
                elif key in keys:
                    problem = f"the key {key!r} occurs twice"
                if problem is not None:
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                keys.add(key)

            return super().construct_mapping(node, deep)

    for kind, (expression, first) in _SCALARS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{expression})$"), first)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(loader.construct_scalar(node)))
    return Loader
