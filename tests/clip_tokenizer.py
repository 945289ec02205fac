"""CLIP's real tokenizer, from the vocabulary that open_clip carries."""

from __future__ import annotations

import gzip
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from dfusion import _torchvision_ops  # noqa: F401  (open_clip imports torchvision)

import open_clip  # isort: skip

VOCABULARY_SIZE = 49_408
MERGES = VOCABULARY_SIZE - 512 - 2
"""The file has more merges than CLIP uses; 512 tokens are bytes, two are the start and the end of a text."""


@cache
def clip_tokenizer() -> Any:
    """The tokenizer of Stable Diffusion 1.5 and of CLIP: transformers' class with OpenAI's vocabulary, 77 tokens."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        merges = [(first, second) for first, second in (line.split() for line in islice(lines, 1, MERGES + 1))]

    letters = list(bytes_to_unicode().values())
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
