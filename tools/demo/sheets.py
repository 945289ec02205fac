"""The demo's results as images: blocks of equal width, stacked vertically."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

from api.score_changes import HEADINGS
from tools.demo.results import PICTURE, BeforeAfter, Picture, Results

MARGIN = 20
GAP = 16
COLUMNS = 4
WIDTH = 2 * MARGIN + COLUMNS * PICTURE + (COLUMNS - 1) * GAP
_FRAME = 3
_GREEN = (30, 140, 60)
_RED = (200, 50, 40)
_GREY = (90, 90, 90)
_PALE = (215, 215, 215)
_LINE = 19
"""Height of a line of text in pixels."""
_SIZE = 14
"""Font size of captions and tables."""
_COLUMNS = (("la", 0), ("la", 80), ("ra", 242), ("ra", 312), ("ra", 392), ("ra", WIDTH - 2 * MARGIN))
"""Text anchor and position of each column in the table of changes, in pixels from the left margin."""


def before_after_sheet(results: Results) -> Image.Image:
    """The table of changes, and images of the same prompts and seeds before and after training."""
    return _stacked([_changes_block(results), *_before_after_blocks(results)])


def contact_sheet(results: Results) -> Image.Image:
    """The before-after sheet, with the fused pairs that the model was trained on below."""
    return _stacked([_changes_block(results), *_before_after_blocks(results), *_fused_blocks(results)])


def _changes_block(results: Results) -> Image.Image:
    sentence = textwrap.wrap(results.headline, 70)
    table_top = MARGIN + 28 + len(sentence) * (_LINE + 2) + 14
    block, draw = _block(table_top + (len(results.changes) + 1) * (_LINE + 4) + 6)

    draw.text((MARGIN, MARGIN), "D-Fusion: before and after training", "black", font_size=20)
    draw.multiline_text((MARGIN, MARGIN + 32), "\n".join(sentence), "black", font_size=16, spacing=5)
    for row, cells in enumerate([HEADINGS, *(change.cells for change in results.changes)]):
        top = table_top + row * (_LINE + 4)
        for text, (anchor, x) in zip(cells, _COLUMNS, strict=True):
            draw.text((MARGIN + x, top), text, "black" if row else _GREY, font_size=_SIZE, anchor=anchor)
        draw.line((MARGIN, top + _LINE, WIDTH - MARGIN, top + _LINE), _PALE)
    return block


def _before_after_blocks(results: Results) -> list[Image.Image]:
    """A heading, followed by rows of two prompts."""
    rows = [results.shown[start : start + 2] for start in range(0, len(results.shown), 2)]
    return [_heading("Before and after: same prompts, same seeds", results.shown_rule), *map(_before_after_row, rows)]


def _before_after_row(row: Sequence[BeforeAfter]) -> Image.Image:
    prompts = [_lines(shown.prompt, 2) for shown in row]
    pictures = [picture for shown in row for picture in (shown.before, shown.after)]
    return _pictures_row(prompts, pictures, ["before", "after"] * len(row))


def _fused_blocks(results: Results) -> list[Image.Image]:
    """A heading, followed by one row per pair."""
    heads = ["base", "reference", "target (preferred)", "mask"]
    rows = [
        _pictures_row([_lines(pair.prompt, 4)], [pair.base, pair.reference, pair.target, pair.mask], heads)
        for pair in results.fused
    ]
    return [_heading("Fused pairs that the model was trained on", results.fused_rule), *rows]


def _pictures_row(prompts: Sequence[list[str]], pictures: Sequence[Picture], heads: Sequence[str]) -> Image.Image:
    """A row of images with heads above and captions below. The prompts are above equal shares of the row."""
    head_top = max(map(len, prompts)) * _LINE
    picture_top = head_top + _LINE + 4
    block, draw = _block(picture_top + PICTURE + _LINE + GAP)

    for index, lines in enumerate(prompts):
        left = _left(index * len(pictures) // len(prompts))
        draw.multiline_text((left, 0), "\n".join(lines), "black", font_size=_SIZE + 1)
    for column, (picture, head) in enumerate(zip(pictures, heads, strict=True)):
        left = _left(column)
        colour = {True: _GREEN, False: _RED, None: _GREY}[picture.accepted]
        draw.text((left, head_top), head, _GREY, font_size=_SIZE)
        block.paste(picture.image, (left, picture_top))
        if picture.accepted is not None:
            box = (left - _FRAME, picture_top - _FRAME, left + PICTURE + _FRAME - 1, picture_top + PICTURE + _FRAME - 1)
            draw.rectangle(box, outline=colour, width=_FRAME)
        draw.text((left, picture_top + PICTURE + 4), picture.caption, colour, font_size=_SIZE)
    return block


def _heading(title: str, text: str) -> Image.Image:
    lines = textwrap.wrap(text, 84)
    block, draw = _block(GAP + 30 + len(lines) * _LINE + 10)
    draw.text((MARGIN, GAP), title, "black", font_size=18)
    draw.multiline_text((MARGIN, GAP + 28), "\n".join(lines), _GREY, font_size=_SIZE)
    return block


def _left(column: int) -> int:
    return MARGIN + column * (PICTURE + GAP)


def _lines(prompt: str, columns: int) -> list[str]:
    """A prompt wrapped to the width of `columns` columns, and truncated after two lines."""
    return textwrap.wrap(prompt, 19 * columns, max_lines=2, placeholder=" ...")


def _block(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    block = Image.new("RGB", (WIDTH, height), "white")
    return block, ImageDraw.Draw(block)


def _stacked(blocks: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (WIDTH, sum(block.height for block in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet
