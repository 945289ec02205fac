"""Prompts of the shapes world: three templates like the paper's, each with 40 training and 40 held-out prompts.

    behaviour   a star wearing a red hat
    attribute   a red and striped circle
    position    the red circle above the blue square

Does not import torch: the service offers these lists as prompt sets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from dfusion.config import FusionConfig
from dfusion.shapes.scenes import COLOURS, PROPS, RELATIONS, SHAPES, TEMPLATES, TEXTURES, Scene, Template

THRESHOLD = 0.02
"""Mask threshold of every item (Eq. 4). Item words attend to their items only (`denoiser.grounding_loss`), so maps are
near 1 on the item and near 0 off it. This low threshold keeps the item's edge inside the mask."""
FUSION = FusionConfig(first_step=10)
"""The fusion settings of this world. Fusion starts later than the paper's step 2: at step 10 colours can still be
transferred, and the background is already the base's."""


@dataclass(frozen=True)
class ShapesPrompt:
    """A prompt, its items (words) with thresholds, and the named parts of a scene."""

    text: str
    template: Template
    items: tuple[str, ...]
    thresholds: tuple[float, ...]
    named: dict[str, str]


def caption(template: Template, named: dict[str, str]) -> str:
    """The prompt with these parts (keys as in `scenes.random_scene`)."""
    if template == "behaviour":
        return f"a {named['shape']} {PROPS[named['prop']]} a {named['prop_colour']} {named['prop']}"
    if template == "attribute":
        return f"a {named['colour']} and {named['texture']} {named['shape']}"

    first = f"{named['colour']} {named['shape']}"
    second = f"{named['colour2']} {named['shape2']}"
    return f"the {first} {named['relation']} the {second}"


def named_parts(scene: Scene) -> dict[str, str]:
    """The parts of `scene` that a prompt of its template names."""
    first = scene.things[0]
    if scene.template == "behaviour":
        return {"shape": first.shape, "prop": str(scene.prop), "prop_colour": str(scene.prop_colour)}
    if scene.template == "attribute":
        return {"colour": first.colour, "texture": first.texture, "shape": first.shape}

    second = scene.things[1]
    return {
        "colour": first.colour,
        "shape": first.shape,
        "relation": str(scene.relation),
        "colour2": second.colour,
        "shape2": second.shape,
    }


def _all_parts(template: Template) -> list[dict[str, str]]:
    """Every combination of the template's parts, in a fixed order. Two objects differ in colour and shape."""
    options: dict[str, Sequence[str]]
    if template == "behaviour":
        options = {"shape": SHAPES, "prop": tuple(PROPS), "prop_colour": tuple(COLOURS)}
    elif template == "attribute":
        textures = [texture for texture in TEXTURES if texture != "plain"]
        options = {"colour": tuple(COLOURS), "texture": textures, "shape": SHAPES}
    else:
        options = {
            "colour": tuple(COLOURS),
            "shape": SHAPES,
            "relation": RELATIONS,
            "colour2": tuple(COLOURS),
            "shape2": SHAPES,
        }

    combinations = [dict(zip(options, values, strict=True)) for values in product(*options.values())]
    if template != "position":
        return combinations
    return [
        parts for parts in combinations if parts["colour"] != parts["colour2"] and parts["shape"] != parts["shape2"]
    ]


@cache
def prompt_list(template: Template, split: str) -> tuple[ShapesPrompt, ...]:
    """The 40 prompts of a template's "train" or "test" list. No prompt is in both.

    Args:
        template: "behaviour", "attribute" or "position".
        split: "train", or anything else for the held-out prompts.

    Returns:
        The prompts, with their items, thresholds and parts.

    Example:
        >>> from dfusion.shapes.prompts import prompt_list
        >>> prompts = prompt_list("attribute", "train")
        >>> len(prompts), prompts[0].text, prompts[0].items
        (40, 'a yellow and dotted cross', ('cross',))
    """
    parts = _all_parts(template)
    order = np.random.default_rng(TEMPLATES.index(template)).permutation(len(parts))[:80]
    indices = order[:40] if split == "train" else order[40:]

    prompts = []
    for index in indices:
        named = parts[int(index)]
        items = {
            "behaviour": (named["shape"], named.get("prop", "")),
            "attribute": (named["shape"],),
            "position": (named["shape"], named.get("shape2", "")),
        }[template]
        prompts.append(ShapesPrompt(caption(template, named), template, items, (THRESHOLD,) * len(items), named))
    return tuple(prompts)


def write_lists(folder: Path) -> None:
    """Write the six lists as the JSON files that `dfusion.prompts` reads."""
    for template in TEMPLATES:
        for split in ("train", "test"):
            name = f"shapes-{template}-{split}"
            use = {"train": "trained on", "test": "held out of training"}[split]
            prompts = [
                {"text": p.text, "items": p.items, "thresholds": p.thresholds} for p in prompt_list(template, split)
            ]
            content = {"name": name, "description": f"Shapes world, {template}, {use}", "prompts": prompts}
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_lists(Path(__file__).parent.parent / "prompts")
