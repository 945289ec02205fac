"""Commands on the pages exist: targets of make, modules of Python and their options, files.

`dfusion` lines are checked in tests/unit/api/test_cli.py. The lines of docs/curl.md are run in
tests/acceptance/test_curl.py, and the README's requests in tests/unit/api/test_readme.py.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "how-to").glob("*.md"),
    *(ROOT / "docs" / "decisions").glob("*.md"),
]


def commands(program: str) -> Iterator[tuple[str, str]]:
    """(page, command) of every code line and code span that starts with the program."""
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        lines = re.findall(rf"^(?: {{4}})?((?:[A-Z_]+=\S+ )*{program} [^`\n]+)$", text, re.MULTILINE)
        spans = re.findall(rf"(?<!`)`((?:[A-Z_]+=\S+ )*{program} [^`]+)`(?!`)", text)
        for command in [*lines, *spans]:
            yield str(page.relative_to(ROOT)), " ".join(command.split())


def words(command: str) -> list[str]:
    """Split a command into words, without comments and leading assignments."""
    return [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]


@pytest.mark.parametrize(("page", "command"), sorted(set(commands("make"))))
def test_make_knows_its_target(page: str, command: str) -> None:
    for target in words(command)[1:]:
        run = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, f"{page}: {command}: {run.stderr}"


@pytest.mark.parametrize(("page", "command"), sorted(set(commands("python -m"))))
def test_python_finds_its_module_and_options(page: str, command: str) -> None:
    name, *arguments = words(command)[2:]
    if name in ("venv", "pip", "pytest"):
        return
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{page}: {command}"
    if spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    assert spec is not None and spec.origin is not None, f"{page}: {command}"

    folder = Path(spec.origin).parent
    sources = "".join(file.read_text("utf-8") for file in folder.glob("*.py"))
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert f'"{option.partition("=")[0]}"' in sources, f"{page}: {command}: {option}"


def test_commands_are_seen() -> None:
    """The expressions match lines and spans of both programs; otherwise nothing would be checked."""
    seen = {command for program in ("make", "python -m") for _, command in commands(program)}
    assert any(command.startswith("make demo #") for command in seen)
    assert "make results" in seen
    assert any(command.startswith("python -m service.transfer import") for command in seen)
