"""Contact sheets: images of equal size in rows, with names of columns and rows, and titles above groups of images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

GAP = 2
"""Pixels right of and below each image."""
MARGIN = 130
"""Pixels left of the images, for names of rows."""
LINE = 18
"""Height of a line of text in pixels."""
_SIZE = 14
"""Font size."""
_GREEN = (0, 200, 0)
_RED = (230, 0, 0)


def framed(picture: np.ndarray, good: bool) -> np.ndarray:
    """The image, (H, W, 3) uint8, in a green (good) or red frame."""
    picture = picture.copy()
    for edge in (np.s_[:2], np.s_[-2:], np.s_[:, :2], np.s_[:, -2:]):
        picture[edge] = _GREEN if good else _RED
    return picture


def sheet(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    titles: Sequence[Sequence[str]] = (),
    scale: int = 2,
) -> Image.Image:
    """Images in rows, with their labels.

    Args:
        rows: Images of equal size, (H, W, 3) uint8. Rows may have different lengths.
        columns: A name above each column.
        names: A name left of each row.
        titles: For each row, the titles above its groups of images. All groups have the same width.
        scale: The factor by which images are enlarged.
    """
    # 1. sizes
    height, width = (side * scale + GAP for side in rows[0][0].shape[:2])
    heads = [_broken(name, width) for name in columns]
    left = MARGIN if names else 0
    header = max((head.count("\n") + 1 for head in heads), default=0) * LINE
    above = LINE if titles else 0
    tops = [header + above + row * (above + height) for row in range(len(rows))]
    canvas = Image.new("RGB", (left + max(map(len, rows)) * width, tops[-1] + height), "white")

    # 2. labels
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        draw.multiline_text((left + column * width + 2, 0), head, "black", font_size=_SIZE)
    for top, name in zip(tops, names, strict=False):
        draw.multiline_text((2, top), _broken(name, MARGIN), "black", font_size=_SIZE)
    for top, texts in zip(tops, titles, strict=False):
        for group, text in enumerate(texts):
            x = left + group * (canvas.width - left) // len(texts) + 2
            draw.text((x, top - LINE), text, "black", font_size=_SIZE)

    # 3. images
    for top, pictures in zip(tops, rows, strict=True):
        for column, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture.repeat(scale, 0).repeat(scale, 1))
            canvas.paste(enlarged, (left + column * width, top))
    return canvas


def _broken(text: str, width: int) -> str:
    """`text` in lines that fit `width` pixels."""
    return "\n".join(textwrap.wrap(text, width // 8))
