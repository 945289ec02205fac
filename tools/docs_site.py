"""`make docs`: README.md and docs/ as a site. A broken link to a file, page or heading is an error.

So is a link to a file that git ignores: it exists here, but not in another checkout.

Pages keep their paths, so links work on the site as in the repository. Links to files outside the site, such as source
code, become plain text.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")

_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?P<text>[^\]\[]*)\]\((?P<path>[^)\s#:]+)(?P<heading>#[^)\s]*)?\)")


class DocsError(Exception):
    """The site cannot be built."""


def build(root: Path, folder: Path) -> Path:
    """Build the site.

    Args:
        root: The repository's root.
        folder: The output folder. Its content is replaced by `pages/`, the input of the site generator, and `site/`.

    Returns:
        The site's folder.

    Raises:
        DocsError: A link is broken, or a page cannot be reached.
    """
    if folder.exists():
        shutil.rmtree(folder)
    _write_pages(root, folder / "pages")
    config = shutil.copy(root / "docs" / "zensical.toml", folder)

    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(config)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        raise DocsError(built.stdout + built.stderr)
    return folder / "site"


def _write_pages(root: Path, folder: Path) -> None:
    shutil.copytree(root / "docs", folder / "docs", ignore=shutil.ignore_patterns("*.toml"))
    pages = [root / name for name in ROOT_PAGES] + sorted((root / "docs").rglob("*.md"))
    problems: list[str] = []
    reached = set(re.findall(r'"([^"]+\.md)"', (root / "docs" / "zensical.toml").read_text("utf-8")))
    targets: dict[str, str] = {}

    for page in pages:
        parts = _CODE.split(page.read_text("utf-8"))
        link = _link_of(page, root, problems, reached, targets)
        parts[::2] = [_LINK.sub(link, part) for part in parts[::2]]
        (folder / page.relative_to(root)).write_text("".join(parts), "utf-8")

    unreachable = sorted({str(page.relative_to(root)) for page in pages} - reached)
    problems += [f"{page}: neither in docs/zensical.toml nor linked from a page" for page in unreachable]
    problems += [f"{targets[name]}: {name} is ignored by git" for name in _ignored(root, list(targets))]
    if problems:
        raise DocsError("\n".join(problems))


def _link_of(
    page: Path, root: Path, problems: list[str], reached: set[str], targets: dict[str, str]
) -> Callable[[re.Match[str]], str]:
    """A function that converts the page's links for the site.

    It records broken links, reached pages, and each target with the page that links to it.
    """

    def link(match: re.Match[str]) -> str:
        target = (page.parent / match["path"]).resolve()
        if not target.is_relative_to(root) or not target.exists():
            problems.append(f"{page.relative_to(root)}: {match['path']} does not exist")
            return match[0]
        name = target.relative_to(root).as_posix()
        targets[name] = str(page.relative_to(root))

        if (target / "README.md").is_file() and name.startswith("docs/"):
            reached.add(f"{name}/README.md")
            return f"[{match['text']}]({match['path']}/README.md{match['heading'] or ''})"
        if target.is_file() and (name.startswith("docs/") or name in ROOT_PAGES):
            reached.add(name)
            return match[0]
        return match["text"]

    return link


def _ignored(root: Path, names: list[str]) -> list[str]:
    """Those of the files that git ignores; none outside a git checkout or without git."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return []
    command = ["git", "-C", str(root), "check-ignore", "-z", "--stdin"]
    answer = subprocess.run(command, input="\0".join(names), capture_output=True, text=True)
    if answer.returncode not in (0, 1):  # some are ignored, none is
        raise DocsError(f"git check-ignore: {answer.stderr}")
    return answer.stdout.split("\0")[:-1]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs_site", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="output folder, which is replaced")
    try:
        site = build(ROOT, parser.parse_args().out)
    except DocsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{site / 'index.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
