"""The wheel, and virtual environments with some of this environment's distributions. Needs no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deployment import ROOT


def copy_checkout(folder: Path) -> Path:
    """Copy the files of the checkout that .dockerignore admits to `folder`."""
    rules = (ROOT / ".dockerignore").read_text("utf-8").split()
    assert rules[0] == "*"
    folder.mkdir()

    for name in [rule[1:] for rule in rules if rule.startswith("!")]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(checkout: Path, folder: Path, *, editable: bool = False) -> Path:
    """Build the wheel of the checkout as pip does, or that of an editable install."""
    hook = "build_editable" if editable else "build_wheel"
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", code, folder], cwd=checkout, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def closure(requirements: Iterable[str]) -> set[str]:
    """Return the canonical names of all direct and indirect requirements, from this environment's metadata."""
    todo = [Requirement(line) for line in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()

    while todo:
        requirement = todo.pop()
        extras = frozenset(requirement.extras)
        key = (canonicalize_name(requirement.name), extras)
        if key in seen:
            continue
        seen.add(key)
        for line in distribution(requirement.name).requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                todo.append(needed)
    return {name for name, _ in seen}


def clean_environment(folder: Path, names: set[str], wheel: Path) -> Path:
    """Create a virtual environment with only the wheel and links to the named distributions. Returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)

    links = folder / "dependencies"
    links.mkdir()
    site = Path(sysconfig.get_path("purelib"))
    for name in top_level(names):
        (links / name).symlink_to(site / name)
    [packages] = (folder / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{links}\n", "utf-8")
    return python


def top_level(names: set[str]) -> set[str]:
    """Return the entries of site-packages that belong to the named distributions."""
    return {entry for dist in distributions() if canonicalize_name(dist.name) in names for entry in _entries(dist)}


def outsiders(names: set[str]) -> set[str]:
    """Return the modules of this environment that belong only to other distributions."""
    others = {canonicalize_name(dist.name) for dist in distributions()} - names - {"dfusion"}
    modules = {entry.removesuffix(".py") for entry in top_level(others) - top_level(names)}
    return {name for name in modules if name.isidentifier()}


def _entries(dist: Distribution) -> set[str]:
    first = {file.parts[0] for file in dist.files or ()}
    return {name for name in first if name not in ("..", "__pycache__") and not name.endswith(".pth")}


def run(python: Path, folder: Path, *arguments: str) -> str:
    """Run a program of the environment outside the source tree. Returns its output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DFUSION_", "PYTHON"))}
    done = subprocess.run(
        [python, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()
