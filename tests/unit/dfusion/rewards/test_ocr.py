"""The OCR reward on rendered text."""

import sys
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from dfusion.errors import InvalidInputError, ModelNotFoundError, ShapeMismatchError
from dfusion.rewards import Scorer, load_scorer
from dfusion.rewards.ocr import quoted_text, similarity
from dfusion.shapes.numbers import caption, random_number, render_number


def sign(*lines: str) -> np.ndarray:
    """Black text on white, a line each 60 pixels."""
    canvas = Image.new("RGB", (320, 160), "white")
    for row, line in enumerate(lines):
        ImageDraw.Draw(canvas).text((20, 20 + 60 * row), line, fill="black", font=ImageFont.load_default(40))
    return np.asarray(canvas)


@pytest.fixture(scope="module")
def ocr() -> Scorer:
    return load_scorer("ocr")


@pytest.mark.slow
def test_text_is_found_and_read_line_by_line(ocr: Scorer) -> None:
    images = np.stack([sign("OPEN", "DAILY"), sign()])
    assert ocr.score(images, ['a sign that says "open daily"'] * 2) == [1.0, 0.0]
    assert (ocr.name, ocr.version) == ("ocr", f"rapidocr-{version('rapidocr-onnxruntime')}")


@pytest.mark.slow
def test_numbers_of_the_shapes_world_are_read() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_number(rng) for _ in range(4)]
    images = np.stack([render_number(scene) for scene in scenes])
    match, exact = load_scorer("shapes-ocr"), load_scorer("shapes-ocr-exact")
    prompts = [caption(scene.text) for scene in scenes]
    assert match.score(images, prompts) == exact.score(images, prompts) == [1.0] * 4

    # another first digit: one of two characters differs
    others = [caption(f"{(int(scene.text[0]) + 1) % 10}{scene.text[1]}") for scene in scenes]
    assert match.score(images, others) == [0.5] * 4
    assert exact.score(images, others) == [0.0] * 4


@pytest.mark.parametrize(
    ("text", "expected", "score"),
    [
        ("", "ab", 0),
        ("ab", "ab", 1),
        ("abcd", "ab", 1 / 2),  # two insertions in four characters
        ("kitten", "sitting", 1 - 3 / 7),  # the textbook's distance 3
        ("ba", "ab", 0),  # two replacements in two characters
        ("x", "abc", 0),
    ],
)
def test_similarity_by_hand(text: str, expected: str, score: float) -> None:
    assert similarity(text, expected) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Open 24h"', "Open 24h"),
        ("ein Schild \u201cAUF\u201d", "AUF"),
        ("un panneau \u00abARR\u00caT\u00bb", "ARR\u00caT"),
        ('"left" and "right"', "left right"),
        ('the baker\'s "5"', "5"),
    ],
)
def test_quoted_text(prompt: str, text: str) -> None:
    assert quoted_text(prompt) == text


@pytest.mark.parametrize("prompt", ["a red circle", 'an empty "" sign', 'a blank "  " sign', "it's a dog's life"])
def test_a_prompt_without_quoted_text_is_refused(prompt: str) -> None:
    with pytest.raises(InvalidInputError, match="text in quotes"):
        quoted_text(prompt)


def test_other_images_and_prompts_are_refused(ocr: Scorer) -> None:
    with pytest.raises(ShapeMismatchError):
        ocr.score(sign()[None], ['"a"', '"b"'])
    with pytest.raises(InvalidInputError, match="text in quotes"):
        ocr.score(sign()[None], ["a"])


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ModelNotFoundError, match=r"scorer 'ocr': .*pip install 'dfusion\[ocr\]'"):
        load_scorer("ocr")
