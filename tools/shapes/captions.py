"""The tokenizer of the shapes world, and the wrong captions that make its Stable Diffusion imperfect.

Stable Diffusion misses prompts because web captions are noisy. The shapes world's pipeline is trained in the same way:
in a fixed share of captions, the word for a colour or a texture is wrong. The images are clean, so the model learns to
draw clean objects whose attributes do not always match the prompt.
"""

from __future__ import annotations

import string
from collections import Counter
from itertools import chain, pairwise
from typing import Any

import numpy as np

from dfusion.shapes.scenes import COLOURS, PROPS, SHAPES, TEXTURES, Template

MAX_TOKENS = 16
"""Length of a tokenized prompt, including BOS and EOS."""

WRONG_SHARE: dict[str, float] = {
    "prop_colour": 0.57,
    "colour": 0.50,
    "texture": 0.25,
    "swapped colours": 0.30,
    "one colour": 0.30,
}
"""The share of captions with a wrong part. Shapes, props and relations are never wrong: the initial noise determines
an object's position and outline, and fusion cannot transfer them."""


def wrong_parts(template: Template, named: dict[str, str], rng: np.random.Generator) -> dict[str, str]:
    """`named` with random mistakes, at the rates of `WRONG_SHARE`."""

    def other(options: tuple[str, ...], *but: str) -> str:
        left = [o for o in options if o not in but]
        return left[int(rng.integers(len(left)))]

    parts = dict(named)
    colours = tuple(COLOURS)
    if template == "behaviour":
        if rng.random() < WRONG_SHARE["prop_colour"]:
            parts["prop_colour"] = other(colours, named["prop_colour"])
    elif template == "attribute":
        if rng.random() < WRONG_SHARE["colour"]:
            parts["colour"] = other(colours, named["colour"])
        if rng.random() < WRONG_SHARE["texture"]:
            parts["texture"] = other(TEXTURES, named["texture"])
    else:
        chance = rng.random()
        if chance < WRONG_SHARE["swapped colours"]:
            parts["colour"] = named["colour2"]
            parts["colour2"] = named["colour"]
        elif chance < WRONG_SHARE["swapped colours"] + WRONG_SHARE["one colour"]:
            which = ("colour", "colour2")[int(rng.integers(2))]
            parts[which] = other(colours, named["colour"], named["colour2"])
    return parts


def words() -> list[str]:
    """All words that a prompt can contain."""
    small = ["a", "and", "the", "above", "below", "on", "left", "right", "of"]
    return sorted({*small, *COLOURS, *SHAPES, *TEXTURES, *PROPS, *PROPS.values()})


def _merges(known: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges learned on `known` until every word is one token, the most frequent pair first."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in known}

    merges = []
    while pairs := Counter(chain.from_iterable(map(pairwise, split.values()))):
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append(best)
        for parts in split.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def new_tokenizer() -> Any:
    """A CLIPTokenizer with one token for each of `words`. Other words become letters. EOS has the largest id."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    merges = _merges(words())

    tokens = ["<|pad|>", *letters]
    tokens += [letter + "</w>" for letter in letters]
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token="<|pad|>", model_max_length=MAX_TOKENS)
