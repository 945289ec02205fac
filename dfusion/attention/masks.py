"""Eq. 4: the mask from the reference's cross-attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import torch
from torch.nn import functional

from dfusion.errors import InvalidInputError, ShapeMismatchError, shortened

Item = int | tuple[int, ...]
"""The token index of an item after BOS, or the indices of all its tokens."""


def normalise_items(items: Sequence[Sequence[Item]], num_tokens: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Items of B samples with every item as a tuple of token indices.

    `num_tokens` is N, the columns of the prompt embeddings. Raises InvalidInputError if a sample has no item, if an
    item has no token, or if an index lies outside 0 to N - 2 (index j is column j + 1).
    """
    samples = tuple(tuple(map(_tokens_of, sample)) for sample in items)
    for sample in samples:
        if not sample or not all(sample):
            got = shortened(sample)
            raise InvalidInputError(f"items: expected at least one item per sample and one token per item, got {got}")
        outside = [j for j in chain.from_iterable(sample) if not 0 <= j < num_tokens - 1]
        if outside:
            raise InvalidInputError(
                f"items: expected token indices within 0 to {num_tokens - 2}, got {shortened(outside)}"
            )
    return samples


def _tokens_of(item: Item) -> tuple[int, ...]:
    """The item's token indices. Raises InvalidInputError for anything but integers."""
    if isinstance(item, int):
        return (item,)
    if isinstance(item, str) or not all(isinstance(j, int) for j in item):
        raise InvalidInputError(
            f"items: expected token indices (see DiffusionModel.item_tokens), got {shortened(item)}"
        )
    return tuple(item)


def item_weights(items: Sequence[Sequence[tuple[int, ...]]], num_tokens: int) -> torch.Tensor:
    """(B, N, K) float32, such that attention (B, L, N) @ weights is the map of each item: the mean over its tokens.

    Samples with fewer than K items have columns of zeros.
    """
    weights = torch.zeros(len(items), num_tokens, max(len(sample) for sample in items))
    for b, sample in enumerate(items):
        for k, tokens in enumerate(sample):
            for j in tokens:
                weights[b, j + 1, k] += 1 / len(tokens)
    return weights


def merge_masks(
    item_maps: torch.Tensor, thresholds: Sequence[Sequence[float]], merge: Literal["xor", "or"] = "xor"
) -> torch.Tensor:
    """Eq. 4: M, (B, h_m, w_m) bool, from maps (B, h_m, w_m, K) in [0, 1] and a threshold per item and sample.

    m_j = 1[A_j >= tau_j], merged by exclusive or (paper) or by or (released code). Samples may have fewer than K
    thresholds; their further maps are ignored. Raises ShapeMismatchError if the numbers do not fit.
    """
    # Notation (<variable> -> <paper>): item_maps -> A_j, limits -> tau_j, counts -> sum of m_j over the items
    if item_maps.ndim != 4 or len(thresholds) != len(item_maps):
        raise ShapeMismatchError("item_maps", f"({len(thresholds)}, h_m, w_m, K)", tuple(item_maps.shape))
    if max(map(len, thresholds), default=0) > item_maps.shape[-1]:
        raise ShapeMismatchError(
            "thresholds", f"at most K = {item_maps.shape[-1]} per sample", max(map(len, thresholds))
        )

    limits = torch.full((len(thresholds), 1, 1, item_maps.shape[-1]), torch.inf)
    for b, sample in enumerate(thresholds):
        limits[b, 0, 0, : len(sample)] = torch.tensor(sample)
    counts = (item_maps >= limits.to(item_maps.device)).sum(-1)
    return counts % 2 == 1 if merge == "xor" else counts > 0


def resize_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Nearest-neighbour resize of (B, h_m, w_m) bool to (B, height, width) bool. Images need not be square."""
    return functional.interpolate(mask[:, None].float(), size=size, mode="nearest")[:, 0] > 0.5
