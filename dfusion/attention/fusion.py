"""Eq. 5: self-attention of the target in which keys and values inside the mask are the reference's."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fusion:
    """Which rows of a U-Net batch are fused, and from which rows of the same batch they read.

    targets  (R,) int64, rows of the targets, one for each of their guidance halves
    sources  (R,) int64, for each of them the row of its reference, same half
    masks    for each level of the U-Net that is fused, (R, L) bool: the pixels that come from the reference
    """

    targets: torch.Tensor
    sources: torch.Tensor
    masks: dict[int, torch.Tensor]


def fuse_rows(values: torch.Tensor, fusion: Fusion, level: int) -> torch.Tensor:
    """K* or V* of Eq. 5 for the whole batch, (B, L, H*D): M' * reference + (1 - M') * target in target rows.

    `values` (B, L, H*D) are the keys or the values of all rows. The reference's rows stay as they are. The mask is
    binary, so that the sum of Eq. 5 is a choice.
    """
    mask = fusion.masks[level][:, :, None]
    mixed = torch.where(mask, values[fusion.sources], values[fusion.targets])
    return values.index_copy(0, fusion.targets, mixed)
