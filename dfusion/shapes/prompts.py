"""The shapes world's prompts: three templates like the paper's, each with 40 training and 40 held-out prompts.

    behaviour   a star wearing a red hat
    attribute   a red and striped circle
    position    the red circle above the blue square

Imports no torch: the service offers these lists as prompt sets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from dfusion.config import FusionConfig
from dfusion.shapes.scenes import COLOURS, PROPS, RELATIONS, SHAPES, TEMPLATES, TEXTURES, Scene, Template

THRESHOLD = 0.02
"""Mask threshold of every item (Eq. 4). Item words look at their items alone (`denoiser.grounding_loss`): maps are
near 1 on the item and near 0 off it, and this low threshold keeps the item's edge in the mask."""
FUSION = FusionConfig(first_step=10)
"""How this world's targets are fused: later than the paper's step 2. Here colours can still be carried then, and the
background is already the base's."""


@dataclass(frozen=True)
class ShapesPrompt:
    """A prompt, its items (words) with thresholds, and the parts of a scene that it names."""

    text: str
    template: Template
    items: tuple[str, ...]
    thresholds: tuple[float, ...]
    named: dict[str, str]


def caption(template: Template, named: dict[str, str]) -> str:
    """The prompt that names these parts (keys as in `scenes.random_scene`)."""
    if template == "behaviour":
        return f"a {named['shape']} {PROPS[named['prop']]} a {named['prop_colour']} {named['prop']}"
    if template == "attribute":
        return f"a {named['colour']} and {named['texture']} {named['shape']}"
    first, second = f"{named['colour']} {named['shape']}", f"{named['colour2']} {named['shape2']}"
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
    colours = tuple(COLOURS)
    if template == "behaviour":
        return [{"shape": s, "prop": p, "prop_colour": c} for s in SHAPES for p in PROPS for c in colours]
    if template == "attribute":
        return [
            {"colour": c, "texture": t, "shape": s} for c in colours for t in TEXTURES if t != "plain" for s in SHAPES
        ]
    return [
        {"colour": c1, "shape": s1, "relation": r, "colour2": c2, "shape2": s2}
        for c1 in colours
        for s1 in SHAPES
        for r in RELATIONS
        for c2 in colours
        for s2 in SHAPES
        if c1 != c2 and s1 != s2
    ]


@cache
def prompt_list(template: Template, split: str) -> tuple[ShapesPrompt, ...]:
    """The 40 prompts of a template's "train" or "test" list; no prompt is in both."""
    parts = _all_parts(template)
    order = np.random.default_rng(TEMPLATES.index(template)).permutation(len(parts))[:80]
    chosen = order[:40] if split == "train" else order[40:]
    prompts = []
    for index in chosen:
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
            prompts = [
                {"text": p.text, "items": p.items, "thresholds": p.thresholds} for p in prompt_list(template, split)
            ]
            described = {"train": "trained on", "test": "held out of training"}[split]
            content = {"name": name, "description": f"Shapes world, {template}, {described}", "prompts": prompts}
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_lists(Path(__file__).parent.parent / "prompts")
