"""Eq. 5, and the other ways of appendix B to let a target's attention take over what is the reference's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from dfusion.config import AttentionControl

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""attend(query, key, value, allowed): softmax(Q K^T / sqrt(D)) V for (B, L, H*D), (B, M, H*D) and (B, M, H*D), heads
apart; `allowed` (B, 1, L, M) bool says which pixel reads which, None: all. Gives (B, L, H*D)."""


@dataclass(frozen=True)
class Control:
    """What a target takes from its reference, and where (appendix B; docs/decisions/007-attention-control.md).

    own      those of "q", "k", "v" of self-attention that are the reference's
    cross    those of cross-attention that are the reference's, at all pixels
    mask     where `own` holds: at all pixels (None), at pixels inside the mask only ("parts"), or at all pixels of
             an attention whose output is taken inside the mask only ("output")
    limited  pixels inside the mask read only pixels inside it, pixels outside only pixels outside
    """

    own: str = ""
    cross: str = ""
    mask: Literal["parts", "output"] | None = None
    limited: bool = False


CONTROLS: Mapping[AttentionControl, Control] = {
    "masked_kv": Control(own="kv", mask="parts"),
    "kv": Control(own="kv"),
    "self_attention_maps": Control(own="qk"),
    "cross_attention_maps": Control(cross="qk"),
    "self_and_cross_attention_maps": Control(own="qk", cross="qk"),
    "kv_and_cross_attention_maps": Control(own="kv", cross="qk"),
    "qkv_and_cross_attention_maps": Control(own="qkv", cross="qk"),
    "masactrl_maps": Control(own="k", mask="parts", limited=True),
    "masactrl_features": Control(own="kv", mask="output"),
    "masactrl": Control(own="kv", mask="parts", limited=True),
}
"""The first is D-Fusion (Eq. 5), the others are the variants of figure 8. Attention maps are softmax(Q K^T), so taking
Q and K takes the maps. In "masactrl" pixels read the keys and values of Eq. 5, but never across the mask's edge."""


@dataclass(frozen=True)
class Fusion:
    """Which rows of a U-Net batch are fused, from which rows of the same batch they read, and how.

    The U-Net's output holds for the targets alone: other rows are there to be read from, and the last fused attention
    leaves them out.

    targets  (R,) int64, rows of the targets, one for each of their guidance halves
    sources  (R,) int64, for each of them the row of its reference, same half
    masks    for each level of the U-Net that is fused, (R, L) bool: the pixels that come from the reference
    control  what is taken over
    """

    targets: torch.Tensor
    sources: torch.Tensor
    masks: dict[int, torch.Tensor]
    control: Control = CONTROLS["masked_kv"]


def self_attention(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fusion: Fusion, level: int
) -> torch.Tensor:
    """Output of self-attention under `fusion.control`, (B, L, H*D), from (B, L, H*D) each.

    The references' rows are their own, as far as `attend` does not leave them out.
    """
    control, parts = fusion.control, {"q": query, "k": key, "v": value}
    for name in control.own:
        taken = fuse_rows(parts[name], fusion, level) if control.mask == "parts" else take_rows(parts[name], fusion)
        parts[name] = taken
    allowed = _same_side(fusion, level, len(query)) if control.limited else None
    output = attend(parts["q"], parts["k"], parts["v"], allowed)
    if control.mask != "output":
        return output
    plain = attend(query, key, value, None)
    mask = fusion.masks[level][:, :, None]
    return plain.index_copy(0, fusion.targets, torch.where(mask, output[fusion.targets], plain[fusion.targets]))


def cross_attention(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fusion: Fusion
) -> torch.Tensor:
    """Output of cross-attention under `fusion.control`, (B, L, H*D), from (B, L, H*D), (B, N, H*D), (B, N, H*D).

    Reference and target share a prompt, so their keys are equal and the reference's queries bring its maps.
    """
    parts = {"q": query, "k": key, "v": value}
    parts |= {name: take_rows(parts[name], fusion) for name in fusion.control.cross}
    return attend(parts["q"], parts["k"], parts["v"], None)


def fuse_rows(values: torch.Tensor, fusion: Fusion, level: int) -> torch.Tensor:
    """K* or V* of Eq. 5 for the whole batch, (B, L, H*D): M' * reference + (1 - M') * target in target rows.

    `values` (B, L, H*D) are the keys or the values of all rows. The reference's rows stay as they are. The mask is
    binary, so that the sum of Eq. 5 is a choice.
    """
    mask = fusion.masks[level][:, :, None]
    mixed = torch.where(mask, values[fusion.sources], values[fusion.targets])
    return values.index_copy(0, fusion.targets, mixed)


def take_rows(values: torch.Tensor, fusion: Fusion) -> torch.Tensor:
    """`values` (B, L, H*D) with the references' rows in the targets' places."""
    return values.index_copy(0, fusion.targets, values[fusion.sources])


def _same_side(fusion: Fusion, level: int, rows: int) -> torch.Tensor:
    """(B, 1, L, L) bool: which pixels lie on one side of the mask; everything in rows that are no targets."""
    mask = fusion.masks[level]
    allowed = mask.new_ones(rows, 1, mask.shape[1], mask.shape[1])
    allowed[fusion.targets, 0] = mask[:, :, None] == mask[:, None, :]
    return allowed
