"""The text-bearing template of the shapes world: two large digits, `the number "47"`.

A prompt names the digits. The colour, the position and the background are sampled independently. Text recognition
(`dfusion.rewards.ocr`) reads the digits back. Models of the other templates do not know this one: the catalogue's model
`shapes-numbers` draws numbers only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dfusion.shapes.scenes import COLOURS, IMAGE_SIZE, SUPERSAMPLING, Backdrop, backdrop_pixels, random_backdrop

FONT_SIZE = 40
STROKE = 1
"""The font size and the additional width of its strokes, in pixels."""
THRESHOLD = 0.02
"""Mask threshold of the item, as for the other templates."""


@dataclass(frozen=True)
class NumberScene:
    """One image: `text` (two digits) in a colour, centred at x and y (in pixels)."""

    text: str
    colour: str
    x: float
    y: float
    backdrop: Backdrop


@dataclass(frozen=True)
class NumberPrompt:
    """A prompt and its item, the digits."""

    text: str
    number: str

    @property
    def items(self) -> tuple[str]:
        """The item of the prompt."""
        return (self.number,)


def caption(number: str) -> str:
    """The prompt of a number."""
    return f'the number "{number}"'


def random_number(rng: np.random.Generator, number: str | None = None) -> NumberScene:
    """A random scene of a number, or of a random number."""
    text = f"{int(rng.integers(100)):02d}" if number is None else number
    colour = tuple(COLOURS)[int(rng.integers(len(COLOURS)))]
    x = 32 + rng.uniform(-3, 3)
    y = 32 + rng.uniform(-8, 8)
    return NumberScene(text, colour, float(x), float(y), random_backdrop(rng))


def render_number(scene: NumberScene) -> np.ndarray:
    """Render `scene` as (64, 64, 3) uint8 RGB, in the font that comes with Pillow."""
    pixels = backdrop_pixels(scene.backdrop).clip(0, 255).astype(np.uint8)
    size = IMAGE_SIZE * SUPERSAMPLING
    canvas = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
    ImageDraw.Draw(canvas).text(
        (scene.x * SUPERSAMPLING, scene.y * SUPERSAMPLING),
        scene.text,
        fill=COLOURS[scene.colour],
        font=_font(),
        anchor="mm",
        stroke_width=STROKE * SUPERSAMPLING,
    )
    return np.asarray(canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def digit_boxes(scene: NumberScene, size: int) -> np.ndarray:
    """The share of each cell that each digit's box covers, (2, size, size) float32. `size` must divide 64."""
    full = (IMAGE_SIZE * SUPERSAMPLING,) * 2
    centre = (scene.x * SUPERSAMPLING, scene.y * SUPERSAMPLING)
    stroke = STROKE * SUPERSAMPLING
    left, top, right, bottom = _measure().textbbox(centre, scene.text, font=_font(), anchor="mm", stroke_width=stroke)
    first, second = (_measure().textlength(digit, font=_font()) for digit in scene.text)
    split = left + (right - left) * first / (first + second)

    boxes = []
    for box in ((left, top, split, bottom), (split, top, right, bottom)):
        canvas = Image.new("L", full)
        ImageDraw.Draw(canvas).rectangle(box, fill=255)
        boxes.append(np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255)
    return np.stack(boxes)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE * SUPERSAMPLING)


@cache
def _measure() -> ImageDraw.ImageDraw:
    return ImageDraw.Draw(Image.new("L", (1, 1)))


def number_prompts(split: str) -> tuple[NumberPrompt, ...]:
    """The 40 prompts of the "train" list, or 40 others that are held out of training."""
    order = np.random.default_rng(3).permutation(100)[:80]
    indices = order[:40] if split == "train" else order[40:]
    numbers = [f"{int(index):02d}" for index in indices]
    return tuple(NumberPrompt(caption(number), number) for number in numbers)


def write_lists(folder: Path) -> None:
    """Write the two lists as the JSON files that `dfusion.prompts` reads."""
    for split, use in {"train": "trained on", "test": "held out of training"}.items():
        name = f"shapes-numbers-{split}"
        prompts = [{"text": p.text, "items": p.items, "thresholds": [THRESHOLD]} for p in number_prompts(split)]
        content = {"name": name, "description": f"Shapes world, numbers, {use}", "prompts": prompts}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_lists(Path(__file__).parent.parent / "prompts")
