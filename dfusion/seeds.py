"""Seeds as pure functions of what they are for, never counters over a batch."""

from __future__ import annotations

import hashlib
import json

_BITS = 53
"""JavaScript represents integers up to 2**53 exactly, and seeds are sent to browsers."""


def sample_seed(run_seed: int, round_number: int, prompt_index: int, prompt: str, number: int) -> int:
    """The seed of sample `number` of a prompt in a round."""
    return _seed("sample", run_seed, round_number, prompt_index, prompt, number)


def evaluation_seed(seed: int, split: str, prompt_index: int, prompt: str, number: int) -> int:
    """The seed of an evaluation's sample. It is the same in every round and for every model."""
    return _seed("evaluation", seed, split, prompt_index, prompt, number)


def training_seed(run_seed: int, round_number: int) -> int:
    """The seed of a round's training: of the order of rows and the adapter's initial weights."""
    return _seed("training", run_seed, round_number)


def dropout_seed(seed: int, update: int) -> int:
    """The seed of the dropout in an update of a training with the seed `seed`."""
    return _seed("dropout", seed, update)


def _seed(*parts: int | str) -> int:
    digest = hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _BITS)
