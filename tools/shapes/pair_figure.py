"""The README's image: fused pairs with prompt, base, reference, target and mask.

`python -m tools.shapes.pair_figure` samples the prompts of a template in order. It draws up to COUNT adopted pairs, one
per row, whose base the judge rejects and whose target it accepts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dfusion.catalogue import MODELS
from dfusion.config import FusionConfig, RoundConfig, SamplingConfig
from dfusion.models import DiffusionModel
from dfusion.prompts import Prompt
from dfusion.rewards import load_scorer
from dfusion.rounds import RoundPair, make_pairs
from dfusion.shapes.judge import Judge
from dfusion.shapes.prompts import prompt_list

HEADS = (
    ("base", "poorly aligned"),
    ("reference", "well aligned, another picture"),
    ("target", "well aligned, looks like the base"),
    ("mask", "where the target reads the reference"),
)
CONFIG = RoundConfig(samples_per_prompt=6, sampling=SamplingConfig(num_steps=20), fusion=FusionConfig(first_step=10))
SIDE = 256
"""Width and height of an image in pixels."""
GAP = 24
HEAD = 84
"""Pixels above an image, for the prompt and two lines."""


def pairs_of(template: str, seed: int) -> Iterator[RoundPair]:
    """Adopted pairs of a template's training prompts whose base the judge rejects and whose target it accepts."""
    model = DiffusionModel.load(MODELS["shapes"].folder)
    judge = Judge.load()
    scorer = load_scorer("shapes-clip")
    shapes_prompts = prompt_list(template, "train")
    prompts = [Prompt(text=each.text, items=each.items, thresholds=each.thresholds) for each in shapes_prompts]

    for pairs in make_pairs(model, prompts, scorer, CONFIG, seed=seed):
        for pair in pairs:
            if pair.adopted and pair.target is not None:
                images = np.stack([pair.base.image, pair.target.image])
                if judge.accepts(images, [pair.prompt] * 2) == [False, True]:
                    yield pair


def row(pair: RoundPair) -> Image.Image:
    """A row: the prompt, and four images below their names."""
    assert pair.target is not None and pair.mask is not None
    mask = (pair.mask * 255).round().byte().cpu().numpy()
    pictures = [pair.base.image, pair.reference.image, pair.target.image, mask]

    picture = Image.new("RGB", (len(HEADS) * (SIDE + GAP) - GAP, HEAD + SIDE), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((0, 0), f"Prompt: {pair.prompt}", "black", font_size=22)
    for column, ((name, meaning), pixels) in enumerate(zip(HEADS, pictures, strict=True)):
        left = column * (SIDE + GAP)
        draw.text((left, 34), name, "black", font_size=18)
        draw.text((left, 57), meaning, (90, 90, 90), font_size=14)
        resampling = Image.Resampling.NEAREST if pixels is mask else Image.Resampling.LANCZOS
        picture.paste(Image.fromarray(pixels).resize((SIDE, SIDE), resampling), (left, HEAD))
    return picture


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", default="attribute", choices=["behaviour", "attribute", "position"])
    parser.add_argument("--skip", type=int, default=0, help="pairs to leave out")
    parser.add_argument("--count", type=int, default=1, help="pairs to draw")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/images/pair.png"))
    arguments = parser.parse_args()

    pairs = islice(pairs_of(arguments.template, arguments.seed), arguments.skip, arguments.skip + arguments.count)
    rows = [row(pair) for pair in pairs]

    sheet = Image.new("RGB", (rows[0].width, len(rows) * (rows[0].height + GAP) - GAP), "white")
    for index, picture in enumerate(rows):
        sheet.paste(picture, (0, index * (picture.height + GAP)))
    sheet.save(arguments.out)


if __name__ == "__main__":
    main()
