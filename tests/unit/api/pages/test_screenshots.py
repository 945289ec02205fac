"""The pictures of pages in the docs can be taken again."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.drawn_results import draw_run
from tests.screenshots import IMAGES, take
from tests.unit.api.pages.browser import live

pytestmark = pytest.mark.slow


def test_every_picture_of_a_page_is_taken_again(tmp_path: Path) -> None:
    with live(tmp_path / "data") as site:
        draw_run(site.service)
        files = take(site.url, tmp_path)
    assert {file.name for file in files} == {file.name for file in IMAGES.glob("page-*.png")}
    for file in files:
        with Image.open(file) as taken, Image.open(IMAGES / file.name) as kept:
            assert taken.size == kept.size
            assert len(taken.getcolors(taken.width * taken.height) or []) > 100  # more than an empty page
