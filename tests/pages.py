"""The code of documentation pages."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    """Return the unchanged code blocks of a page in one language.

    Args:
        page: Path from the repository's root.
        language: What follows the three backticks.
    """
    text = (ROOT / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def replaced(code: str, changes: dict[str, str]) -> str:
    """Replace parts of the code. Each part must occur once."""
    for part, instead in changes.items():
        assert code.count(part) == 1, part
        code = code.replace(part, instead)
    return code


def apply_diff(diff: str, root: Path) -> None:
    """Apply a diff: a first line "# PATH", then lines that start with a space, + or -."""
    header, *lines = diff.splitlines()
    file = root / header.removeprefix("# ")
    old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    file.write_text(replaced(file.read_text("utf-8"), {old: new}), "utf-8")
