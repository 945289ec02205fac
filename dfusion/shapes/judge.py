"""The judge: says from pixels alone whether a picture fulfils its prompt, part by part.

A small convolutional network trained on renders only. It shares no weights and no training run with the CLIP model
that gives the reward, so a model that learns to please the reward alone is found out. "B below A" and "A above B" are
one picture, so the judge names the upper or left thing first and prompts are brought to that form before comparing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from dfusion.errors import InvalidInputError, ModelNotFoundError, ShapeMismatchError
from dfusion.shapes.scenes import COLOURS, IMAGE_SIZE, MIRRORED, PROPS, SHAPES, TEMPLATES, TEXTURES, Template

MODELS = Path(__file__).parent / "models"
PARTS: dict[Template, dict[str, tuple[str, ...]]] = {
    "behaviour": {"shape": SHAPES, "prop": tuple(PROPS), "prop_colour": tuple(COLOURS)},
    "attribute": {"colour": tuple(COLOURS), "texture": TEXTURES, "shape": SHAPES},
    "position": {
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "relation": ("above", "on the left of"),
        "colour2": tuple(COLOURS),
        "shape2": SHAPES,
    },
}
"""The parts that each template's prompts name, in canonical form."""


def canonical_parts(named: dict[str, str]) -> dict[str, str]:
    """The same parts with the upper or left thing first."""
    return mirrored_parts(named) if named.get("relation") in ("below", "on the right of") else named


def mirrored_parts(named: dict[str, str]) -> dict[str, str]:
    """The same picture told from the other thing's side."""
    return {
        "colour": named["colour2"],
        "shape": named["shape2"],
        "relation": MIRRORED[named["relation"]],
        "colour2": named["colour"],
        "shape2": named["shape"],
    }


def read_prompt(text: str) -> tuple[Template, dict[str, str]]:
    """Template and canonical parts of a prompt; InvalidInputError if it is not one of the shapes world's."""
    for template, pattern in _patterns().items():
        if found := pattern.fullmatch(text.strip().lower()):
            return template, canonical_parts(found.groupdict())
    raise InvalidInputError(f"expected a prompt of the shapes world, got {text!r}")


@cache
def _patterns() -> dict[Template, re.Pattern[str]]:
    def one(name: str, options: Sequence[str]) -> str:
        return f"(?P<{name}>{'|'.join(options)})"

    colours = tuple(COLOURS)
    shape, colour = one("shape", SHAPES), one("colour", colours)
    verbs = "|".join(PROPS.values())
    second = f"{one('colour2', colours)} {one('shape2', SHAPES)}"
    sentences: dict[Template, str] = {
        "behaviour": f"a {shape} (?:{verbs}) a {one('prop_colour', colours)} {one('prop', tuple(PROPS))}",
        "attribute": f"a {colour} and {one('texture', TEXTURES)} {shape}",
        "position": f"the {colour} {shape} {one('relation', tuple(MIRRORED))} the {second}",
    }
    return {template: re.compile(sentence) for template, sentence in sentences.items()}


class JudgeNet(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] to a logit vector for "which template" and for each part of each template."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 96), (96, 128)):
            layers += [nn.Conv2d(inputs, outputs, 5 if inputs == 3 else 3, stride=2, padding=2 if inputs == 3 else 1)]
            layers += [nn.GroupNorm(8, outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU())
        sizes = {"template": len(TEMPLATES)}
        for template, parts in PARTS.items():
            sizes |= {f"{template}_{part}": len(options) for part, options in parts.items()}
        self.heads = nn.ModuleDict({name: nn.Linear(256, size) for name, size in sizes.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits by head name."""
        features = self.body(images)
        return {name: head(features) for name, head in self.heads.items()}


class Judge:
    """Verdicts on pictures of the shapes world."""

    def __init__(self, net: JudgeNet) -> None:
        self.net = net.eval()

    @classmethod
    def load(cls, file: Path = MODELS / "judge.safetensors") -> Judge:
        """The shipped judge; ModelNotFoundError if its file is missing."""
        if not file.is_file():
            raise ModelNotFoundError(f"expected the judge's weights at {file}")
        net = JudgeNet()
        net.load_state_dict({key: value.float() for key, value in load_file(file).items()})
        return cls(net)

    @torch.no_grad()
    def verdicts(self, images: np.ndarray, prompts: Sequence[str]) -> list[dict[str, bool]]:
        """For each picture: which parts of its prompt it fulfils ("template": it is a picture of that kind at all).

        images (B, 64, 64, 3) uint8. ShapeMismatchError for other sizes, InvalidInputError for other prompts.
        """
        expected = (len(prompts), IMAGE_SIZE, IMAGE_SIZE, 3)
        if images.shape != expected or images.dtype != np.uint8:
            raise ShapeMismatchError("images", f"{expected} uint8", f"{images.shape} {images.dtype}")
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        seen = {name: logits.argmax(1).tolist() for name, logits in self.net(pixels).items()}
        verdicts = []
        for row, prompt in enumerate(prompts):
            template, named = read_prompt(prompt)
            verdict = {"template": TEMPLATES[seen["template"][row]] == template}
            for part, options in PARTS[template].items():
                verdict[part] = options[seen[f"{template}_{part}"][row]] == named[part]
            verdicts.append(verdict)
        return verdicts

    def accepts(self, images: np.ndarray, prompts: Sequence[str]) -> list[bool]:
        """Whether each picture fulfils every part of its prompt."""
        return [all(verdict.values()) for verdict in self.verdicts(images, prompts)]


class JudgeScorer:
    """The judge as a scorer: 1.0 where it accepts, 0.0 where it does not."""

    name, version = "shapes-judge", "1"

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @classmethod
    def load(cls) -> JudgeScorer:
        """The shipped judge."""
        return cls(Judge.load())

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """1.0 or 0.0 for each picture; see `Judge.verdicts` for what it raises."""
        return [float(accepted) for accepted in self.judge.accepts(images, prompts)]
