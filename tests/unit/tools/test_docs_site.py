"""The documentation site builds, and broken links are errors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools.docs_site import ROOT, ROOT_PAGES, DocsError, build

CONFIG = """
[project]
site_name = "test"
docs_dir = "pages"
site_dir = "site"
nav = [{ "Start" = "README.md" }, { "Page" = "docs/page.md" }]
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with pages that link to each other."""
    root = tmp_path / "repository"
    (root / "docs" / "records").mkdir(parents=True)
    for name in ROOT_PAGES:
        (root / name).write_text(f"# {name}\n", "utf-8")
    (root / "README.md").write_text("\n".join(f"[{name}]({name})" for name in ROOT_PAGES), "utf-8")
    (root / "docs" / "zensical.toml").write_text(CONFIG, "utf-8")
    (root / "docs" / "page.md").write_text("# Page\n\n[source](../source.py), [records](records)\n", "utf-8")
    (root / "docs" / "records" / "README.md").write_text("# Records\n\n## The first\n", "utf-8")
    (root / "source.py").write_text("", "utf-8")
    return root


def add(root: Path, text: str) -> None:
    with (root / "docs" / "page.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{text}\n")


@pytest.mark.slow
def test_the_docs_are_a_site(tmp_path: Path) -> None:
    """Each page of the repository becomes one of the site; a broken link or heading would be an error."""
    site = build(ROOT, tmp_path / "docs")
    pages = {file.relative_to(site).parent.as_posix() for file in site.rglob("index.html")}
    names = {file.relative_to(ROOT).with_suffix("").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    assert {name.removesuffix("/index").removesuffix("/README") for name in names} <= pages


def test_links_within_the_site_stay_and_others_become_text(repository: Path, tmp_path: Path) -> None:
    add(repository, "[first](records/README.md#the-first)\n\n```\n[code](nowhere.md)\n```")
    site = build(repository, tmp_path / "site")
    page = (site / "docs" / "page" / "index.html").read_text("utf-8")
    assert '<a href="../records/">records</a>' in page and '<a href="../records/#the-first">first</a>' in page
    assert "source, <a" in page and "source.py" not in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x](nowhere.md)", "docs/page.md: nowhere.md does not exist"),
        ("![x](images/nothing.png)", "docs/page.md: images/nothing.png does not exist"),
        ("[x](../../outside)", "docs/page.md: ../../outside does not exist"),
        ("[x](../README.md#no-such-heading)", "anchor does not exist"),
        ("[x](#no-such-heading)", "anchor does not exist"),
    ],
)
def test_links_to_nothing_are_errors(repository: Path, tmp_path: Path, text: str, message: str) -> None:
    add(repository, text)
    with pytest.raises(DocsError, match=message):
        build(repository, tmp_path / "site")


def test_links_to_files_that_git_ignores_are_errors(repository: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(repository)], check=True)
    (repository / ".gitignore").write_text("*.png\n!kept.png\n", "utf-8")
    (repository / "docs" / "figür.png").write_bytes(b"")
    (repository / "docs" / "kept.png").write_bytes(b"")
    add(repository, "![x](figür.png) ![y](kept.png)")
    with pytest.raises(DocsError, match=r"^docs/page\.md: docs/figür\.png is ignored by git$"):
        build(repository, tmp_path / "site")


def test_a_page_that_nothing_leads_to_is_an_error(repository: Path, tmp_path: Path) -> None:
    (repository / "docs" / "lost.md").write_text("# Lost\n", "utf-8")
    with pytest.raises(DocsError, match=r"^docs/lost\.md: neither in docs/zensical\.toml nor linked from a page$"):
        build(repository, tmp_path / "site")
