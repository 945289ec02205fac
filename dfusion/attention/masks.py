"""Eq. 4: from the reference's cross-attention maps to the mask of what is taken over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional

from dfusion.errors import InvalidInputError, ShapeMismatchError

Item = int | tuple[int, ...]
"""The token index of an item after BOS, or the indices of its several tokens."""


def normalise_items(items: Sequence[Sequence[Item]], num_tokens: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Items of B samples with every item as a tuple of token indices.

    `num_tokens` is N, the columns of the prompt embeddings. Raises InvalidInputError where a sample has no item, an
    item no token, or an index lies outside 0 to N - 2 (index j is column j + 1).
    """
    for item in (item for sample in items for item in sample):
        if isinstance(item, str) or not all(isinstance(j, int) for j in ([item] if isinstance(item, int) else item)):
            raise InvalidInputError(f"items: expected token indices (see DiffusionModel.item_tokens), got {item!r}")
    result = tuple(tuple((item,) if isinstance(item, int) else tuple(item) for item in sample) for sample in items)
    for sample in result:
        if not sample or not all(sample):
            raise InvalidInputError(f"items: expected at least one item a sample and one token an item, got {sample}")
        outside = [j for item in sample for j in item if not 0 <= j < num_tokens - 1]
        if outside:
            raise InvalidInputError(f"items: expected token indices within 0 to {num_tokens - 2}, got {outside}")
    return result


def item_weights(items: Sequence[Sequence[tuple[int, ...]]], num_tokens: int) -> torch.Tensor:
    """(B, N, K) float32 such that attention (B, L, N) @ weights is each item's map: the mean over its tokens.

    Samples with fewer than K items get columns of zeros.
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
    """Eq. 4: (B, h_m, w_m) bool from maps (B, h_m, w_m, K) in [0, 1] and a threshold for each item of each sample.

    m_j = 1[A_j >= tau_j]; merged by exclusive or (paper) or by or (released code). Samples may have fewer than K
    thresholds; their further maps do not count. Raises ShapeMismatchError where the numbers do not fit.
    """
    if item_maps.ndim != 4 or len(thresholds) != len(item_maps):
        raise ShapeMismatchError("item_maps", f"({len(thresholds)}, h_m, w_m, K)", tuple(item_maps.shape))
    if max(map(len, thresholds), default=0) > item_maps.shape[-1]:
        raise ShapeMismatchError("thresholds", f"at most K = {item_maps.shape[-1]} a sample", thresholds)
    limits = torch.full((len(thresholds), 1, 1, item_maps.shape[-1]), torch.inf)
    for b, sample in enumerate(thresholds):
        limits[b, 0, 0, : len(sample)] = torch.tensor(sample)
    counts = (item_maps >= limits.to(item_maps.device)).sum(-1)
    return counts % 2 == 1 if merge == "xor" else counts > 0


def resize_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Nearest-neighbour resize of (B, h_m, w_m) bool to (B, height, width) bool; images need not be square."""
    return functional.interpolate(mask[:, None].float(), size=size, mode="nearest")[:, 0] > 0.5
