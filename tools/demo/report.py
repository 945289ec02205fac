"""The demo's results as a self-contained HTML file."""

from __future__ import annotations

import base64
import io

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from tools.demo.changes import HEADINGS
from tools.demo.results import Results


def html_report(results: Results) -> str:
    """The page: the changes, the same prompts before and after, and fused pairs."""
    pages = Environment(loader=PackageLoader("tools", "demo"), autoescape=select_autoescape())
    pages.filters["inline"] = _inline
    return pages.get_template("report.html").render(results=results, headings=HEADINGS)


def _inline(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
