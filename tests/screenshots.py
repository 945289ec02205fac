"""`python -m tests.screenshots FOLDER`: take the pictures of pages in docs/images from the latest run in a data folder.

`make demo` prints its data folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.main import create_app
from service.settings import Settings
from tests.live_service import serving
from tests.pages import ROOT
from tests.unit.api.pages.browser import launched

IMAGES = ROOT / "docs" / "images"
_WIDTH, _HEIGHT = 1180, 760
_DRAWING_MS = 500
"""For images that are loaded after a key was pressed."""


@dataclass(frozen=True)
class Shot:
    """A picture of a page.

    Attributes:
        name: Of the file, without ".png".
        path: Of the page; {job} and {pair} are those of the latest run, the pair whose target gains most.
        keys: What is pressed before.
    """

    name: str
    path: str
    keys: str = ""


SHOTS = (
    Shot("page-run", "/jobs/{job}"),
    Shot("page-new-run", "/rounds/new?clone={job}"),
    Shot("page-pair", "/pairs/{pair}", keys="bm"),  # not blind, with the mask
)


def take(url: str, folder: Path) -> list[Path]:
    """Take the pictures from the service at this address. Returns the files."""
    files = []
    with launched() as browser:
        context = browser.new_context(base_url=url, viewport={"width": _WIDTH, "height": _HEIGHT})
        page = context.new_page()

        def listed(path: str) -> list[dict[str, Any]]:
            response = context.request.get(path, headers={"Accept": "application/json"})
            return list(response.json()["data"])

        job = listed("/jobs?kind=round&limit=1")[0]["id"]
        pairs = listed(f"/pairs?job={job}&adopted=true")
        pair = max(pairs, key=lambda each: each["target"]["score"] - each["base"]["score"])["id"]
        for shot in SHOTS:
            page.goto(shot.path.format(job=job, pair=pair))
            page.wait_for_load_state("networkidle")
            for key in shot.keys:
                page.keyboard.press(key)
            page.wait_for_timeout(_DRAWING_MS)
            files.append(folder / f"{shot.name}.png")
            page.screenshot(path=files[-1])
        context.close()
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.screenshots", description=__doc__)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="data folder of a service that is not running")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures (default: docs/images)")
    options = parser.parse_args(arguments)
    settings = Settings(data_dir=options.data, embedded_worker=False)
    with serving(create_app(settings)) as port:
        for file in take(f"http://127.0.0.1:{port}", options.out):
            sys.stdout.write(f"{file}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
