"""Eq. 5 and the attention controls of appendix B: how a target's attention takes over parts of the reference's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from dfusion.config import AttentionControl

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""attend(query, key, value, allowed): multi-head softmax(Q K^T / sqrt(D)) V, (B, L, H*D).

query is (B, L, H*D), key and value are (B, M, H*D). allowed (B, 1, L, M) bool selects which pixel reads which; None
allows all."""


@dataclass(frozen=True)
class Control:
    """The attention that a target takes from its reference (appendix B; docs/decisions/007-attention-control.md).

    own      which of "q", "k", "v" of self-attention are the reference's
    cross    which of "q", "k", "v" of cross-attention are the reference's, at all pixels
    mask     the pixels at which `own` applies: all pixels (None), pixels inside the mask ("parts"), or all pixels
             of an attention whose output is used inside the mask only ("output")
    limited  pixels inside the mask read only pixels inside it, and pixels outside only pixels outside
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
"""The first is D-Fusion (Eq. 5), the others are the variants of figure 8. Attention maps are softmax(Q K^T), so a
control takes the maps by taking Q and K. In "masactrl" pixels read the keys and values of Eq. 5, but never across the
mask's edge."""


@dataclass(frozen=True)
class Fusion:
    """The fused rows of a U-Net batch, and the rows of the same batch that they read.

    The U-Net's output is valid for the targets only. The other rows exist to be read from, and the last fused attention
    skips them.

    targets  (R,) int64, rows of the targets, one per guidance half
    sources  (R,) int64, for each target's row the row of its reference, in the same half
    masks    for each fused level of the U-Net, (R, L) bool: the pixels taken from the reference
    control  the attention control
    """

    targets: torch.Tensor
    sources: torch.Tensor
    masks: dict[int, torch.Tensor]
    control: Control = CONTROLS["masked_kv"]


def self_attention(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fusion: Fusion, level: int
) -> torch.Tensor:
    """Output of self-attention under `fusion.control`, (B, L, H*D), from query, key and value (B, L, H*D).

    The references' rows attend to themselves, unless `attend` skips them.
    """
    control = fusion.control

    # 1. the reference's Q, K or V in the targets' rows
    parts = {"q": query, "k": key, "v": value}
    for name in control.own:
        masked = control.mask == "parts"
        parts[name] = fuse_rows(parts[name], fusion, level) if masked else take_rows(parts[name], fusion)

    # 2. attention
    allowed = _same_side(fusion, level, len(query)) if control.limited else None
    output = attend(parts["q"], parts["k"], parts["v"], allowed)
    if control.mask != "output":
        return output

    # 3. plain output outside the mask
    plain = attend(query, key, value, None)
    mask = fusion.masks[level][:, :, None]
    return plain.index_copy(0, fusion.targets, torch.where(mask, output[fusion.targets], plain[fusion.targets]))


def cross_attention(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fusion: Fusion
) -> torch.Tensor:
    """Output of cross-attention under `fusion.control`, (B, L, H*D), from (B, L, H*D), (B, N, H*D), (B, N, H*D).

    Reference and target share a prompt and therefore their keys. The reference's queries alone give its maps.
    """
    parts = {"q": query, "k": key, "v": value}
    parts |= {name: take_rows(parts[name], fusion) for name in fusion.control.cross}
    return attend(parts["q"], parts["k"], parts["v"], None)


def fuse_rows(values: torch.Tensor, fusion: Fusion, level: int) -> torch.Tensor:
    """K* or V* of Eq. 5 for the whole batch, (B, L, H*D): M' * reference + (1 - M') * target in the targets' rows.

    `values` (B, L, H*D) are the keys or the values of all rows. The references' rows are unchanged. Since the mask is
    binary, the sum of Eq. 5 is a selection.
    """
    # Notation (<variable> -> <paper>): mask -> M', values[sources] -> K_ref or V_ref, values[targets] -> K_tgt or V_tgt
    mask = fusion.masks[level][:, :, None]
    mixed = torch.where(mask, values[fusion.sources], values[fusion.targets])
    return values.index_copy(0, fusion.targets, mixed)


def take_rows(values: torch.Tensor, fusion: Fusion) -> torch.Tensor:
    """`values` (B, L, H*D) with the references' rows in the targets' places."""
    return values.index_copy(0, fusion.targets, values[fusion.sources])


def _same_side(fusion: Fusion, level: int, rows: int) -> torch.Tensor:
    """(B, 1, L, L) bool: whether two pixels lie on the same side of the mask. All True in rows other than targets'."""
    mask = fusion.masks[level]
    allowed = mask.new_ones(rows, 1, mask.shape[1], mask.shape[1])
    allowed[fusion.targets, 0] = mask[:, :, None] == mask[:, None, :]
    return allowed
