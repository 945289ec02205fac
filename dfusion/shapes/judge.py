"""The judge: decides from pixels whether an image matches its prompt, part by part.

It is a small convolutional network trained on renders only. It shares no weights and no training run with the CLIP
model of the reward, so it reveals a model that exploits the reward. "B below A" and "A above B" are the same image.
Therefore the judge names the upper or left object first, and prompts are converted to that form.
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
    """The same parts with the upper or left object first."""
    return mirrored_parts(named) if named.get("relation") in ("below", "on the right of") else named


def mirrored_parts(named: dict[str, str]) -> dict[str, str]:
    """The same image described from the other object's side."""
    return {
        "colour": named["colour2"],
        "shape": named["shape2"],
        "relation": MIRRORED[named["relation"]],
        "colour2": named["colour"],
        "shape2": named["shape"],
    }


def read_prompt(text: str) -> tuple[Template, dict[str, str]]:
    """Template and canonical parts of a prompt. Raises InvalidInputError if it is not a prompt of the shapes world."""
    for template, pattern in _patterns().items():
        if match := pattern.fullmatch(text.strip().lower()):
            return template, canonical_parts(match.groupdict())
    raise InvalidInputError(f"expected a prompt of the shapes world, got {text!r}")


@cache
def _patterns() -> dict[Template, re.Pattern[str]]:
    def group(name: str, options: Sequence[str]) -> str:
        return f"(?P<{name}>{'|'.join(options)})"

    colours = tuple(COLOURS)
    shape = group("shape", SHAPES)
    colour = group("colour", colours)
    verbs = "|".join(PROPS.values())
    second = f"{group('colour2', colours)} {group('shape2', SHAPES)}"

    sentences: dict[Template, str] = {
        "behaviour": f"a {shape} (?:{verbs}) a {group('prop_colour', colours)} {group('prop', tuple(PROPS))}",
        "attribute": f"a {colour} and {group('texture', TEXTURES)} {shape}",
        "position": f"the {colour} {shape} {group('relation', tuple(MIRRORED))} the {second}",
    }
    return {template: re.compile(sentence) for template, sentence in sentences.items()}


class JudgeNet(nn.Module):
    """From images (B, 3, 64, 64) in [-1, 1] to the logits of the template and of each part of each template."""

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
    """Judges images of the shapes world."""

    def __init__(self, net: JudgeNet) -> None:
        self.net = net.eval()

    @classmethod
    def load(cls, file: Path = MODELS / "judge.safetensors") -> Judge:
        """Load the judge that comes with dfusion. Raises ModelNotFoundError if its file is missing."""
        if not file.is_file():
            raise ModelNotFoundError(f"expected the judge's weights at {file}, got no such file")
        net = JudgeNet()
        net.load_state_dict({key: value.float() for key, value in load_file(file).items()})
        return cls(net)

    @torch.no_grad()
    def verdicts(self, images: np.ndarray, prompts: Sequence[str]) -> list[dict[str, bool]]:
        """For each image, which parts of its prompt it shows ("template": whether it has that template).

        images is (B, 64, 64, 3) uint8. Raises ShapeMismatchError for other sizes and InvalidInputError for other
        prompts.
        """
        expected = (len(prompts), IMAGE_SIZE, IMAGE_SIZE, 3)
        if images.shape != expected or images.dtype != np.uint8:
            raise ShapeMismatchError("images", f"{expected} uint8", f"{images.shape} {images.dtype}")

        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        predictions = {name: logits.argmax(1).tolist() for name, logits in self.net(pixels).items()}

        verdicts = []
        for row, prompt in enumerate(prompts):
            template, named = read_prompt(prompt)
            verdict = {"template": TEMPLATES[predictions["template"][row]] == template}
            for part, options in PARTS[template].items():
                verdict[part] = options[predictions[f"{template}_{part}"][row]] == named[part]
            verdicts.append(verdict)
        return verdicts

    def accepts(self, images: np.ndarray, prompts: Sequence[str]) -> list[bool]:
        """Whether each image shows every part of its prompt."""
        return [all(verdict.values()) for verdict in self.verdicts(images, prompts)]


class JudgeScorer:
    """The judge as a scorer: 1.0 if it accepts the image, otherwise 0.0."""

    name = "shapes-judge"
    version = "1"

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @classmethod
    def load(cls) -> JudgeScorer:
        """Load the judge that comes with dfusion."""
        return cls(Judge.load())

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """1.0 or 0.0 for each image. Raises as `Judge.verdicts` does."""
        return [float(accepted) for accepted in self.judge.accepts(images, prompts)]
