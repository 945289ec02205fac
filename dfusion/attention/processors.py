"""Attention processors for stock diffusers U-Nets, and context managers that install them.

A U-Net call passes one explicit object to its processors, which says what to capture or fuse:
`unet(..., cross_attention_kwargs={"fusion": context})`. `Attention.forward` passes only keywords that a processor's
`__call__` names, so every processor here names `fusion`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from dfusion._diffusers import Attention, AttnProcessor2_0, UNet2DConditionModel
from dfusion.attention.fusion import Attend, Fusion, cross_attention, self_attention
from dfusion.attention.layers import Layer
from dfusion.errors import ShapeMismatchError


@dataclass
class AttentionContext:
    """The captured maps and the fusion of one U-Net call. Create a new context for each call.

    item_weights  (B, N, K): capture the item maps of the last B rows (the conditional half); None captures nothing.
                  Not together with `fusion`: the last fused layer skips rows other than targets'
    captured      filled by the call: (B, L, K) float32 for each attention module of the mask layers
    fusion        the fused rows and their control (Eq. 5, appendix B); None fuses nothing
    """

    item_weights: torch.Tensor | None = None
    fusion: Fusion | None = None
    captured: list[torch.Tensor] = field(default_factory=list)

    def item_maps(self, size: tuple[int, int]) -> torch.Tensor:
        """The captured maps, mean over heads and blocks, (B, h_m, w_m, K). Raises ShapeMismatchError."""
        if not self.captured or self.captured[0].shape[1] != size[0] * size[1]:
            got = [tuple(maps.shape) for maps in self.captured]
            raise ShapeMismatchError("captured cross-attention", f"L = {size[0]} x {size[1]} pixels", got)
        maps: torch.Tensor = torch.stack(self.captured).mean(0)
        return maps.reshape(len(maps), *size, -1)


class PlainProcessor(AttnProcessor2_0):  # type: ignore[misc]
    """diffusers' own attention (`scaled_dot_product_attention`), which accepts `fusion` without a warning.

    In a transformer block it leaves out diffusers' division of the output by 1. The result is the same, bit for bit.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        fusion: AttentionContext | None = None,  # noqa: ARG002  (named for diffusers' filter)
    ) -> torch.Tensor:
        if attention_mask is not None or not _is_of_a_transformer_block(attn):
            output: torch.Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return output
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        output = _attend(attn, attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context), None)
        return attn.to_out[1](attn.to_out[0](output))  # type: ignore[no-any-return]


class BackwardProcessor:
    """Attention with the plain forward pass, bit for bit, and a backward pass in float32."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,  # noqa: ARG002  (an argument of diffusers' processors)
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_q(hidden_states)
        key = attn.to_k(context)
        value = attn.to_v(context)

        output = _attend(attn, query, key, value, attention_mask, attention_with_float32_backward)
        return attn.to_out[1](attn.to_out[0](output))  # type: ignore[no-any-return]


class _Float32Backward(torch.autograd.Function):
    """`scaled_dot_product_attention` of (B, heads, L, channels), without dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.attn_mask = attn_mask
        ctx.scale = scale
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = [part.detach().float().requires_grad_() for part in ctx.saved_tensors]
        mask = ctx.attn_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.float()

        with torch.enable_grad():
            query, key, value = parts
            output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=ctx.scale)
        gradients = torch.autograd.grad(output, parts, gradient.float())
        return *(part.to(gradient.dtype) for part in gradients), None, None


def attention_with_float32_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """`scaled_dot_product_attention` of (B, heads, L, channels), without dropout, with its backward pass in float32.

    The mask is a constant: no gradient flows into it.
    """
    return _Float32Backward.apply(query, key, value, attn_mask, scale)  # type: ignore[no-any-return, no-untyped-call]


class CaptureProcessor(PlainProcessor):
    """Cross-attention of a mask layer, which also computes the item maps.

    Its output is the plain one, bit for bit, so a sample does not depend on whether its maps are captured.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        fusion: AttentionContext | None = None,
    ) -> torch.Tensor:
        if fusion is not None and fusion.item_weights is not None and encoder_hidden_states is not None:
            rows = slice(-len(fusion.item_weights), None)
            probabilities = _mean_attention(attn, hidden_states[rows], encoder_hidden_states[rows])
            fusion.captured.append(probabilities @ fusion.item_weights)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class FuseProcessor(PlainProcessor):
    """Attention of a fused layer: targets take from their reference what `Fusion.control` says (Eq. 5, appendix B).

    The `last` processor of a U-Net call attends for the targets only, since no later layer reads the references' rows.
    """

    def __init__(self, level: int, last: bool) -> None:
        super().__init__()
        self.level = level
        self.last = last

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        fusion: AttentionContext | None = None,
    ) -> torch.Tensor:
        if fusion is None or fusion.fusion is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        attend: Attend = partial(_attend, attn)
        if self.last:
            attend = partial(_attend_for, fusion.fusion.targets, attend)

        if encoder_hidden_states is None:
            _check_pixels(fusion.fusion, self.level, hidden_states)
            output = self_attention(attend, *parts, fusion.fusion, self.level)
        else:
            output = cross_attention(attend, *parts, fusion.fusion)
        return attn.to_out[1](attn.to_out[0](output))  # type: ignore[no-any-return]


def _is_of_a_transformer_block(attn: Attention) -> bool:
    """Whether the module only projects and attends. Those of `AttnDownBlock2D` and the like do more."""
    norms = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
    return all(norm is None for norm in norms) and not attn.residual_connection and attn.rescale_output_factor == 1


def _attend(
    attn: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    attention: Callable[..., torch.Tensor] = functional.scaled_dot_product_attention,
) -> torch.Tensor:
    """Multi-head attention of projected rows; see `dfusion.attention.fusion.Attend`."""
    query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
    output = attention(query, key, value, attn_mask=allowed, scale=attn.scale)
    return output.transpose(1, 2).flatten(2)


def _attend_for(
    rows: torch.Tensor,
    attend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    """`attend` for these rows, and zeros in all other rows."""
    output = attend(query[rows], key[rows], value[rows], None if allowed is None else allowed[rows])
    return torch.zeros_like(query).index_copy(0, rows, output)


def _check_pixels(fusion: Fusion, level: int, hidden_states: torch.Tensor) -> None:
    if fusion.masks[level].shape[1] != hidden_states.shape[1]:
        expected = f"{fusion.masks[level].shape[1]} pixels, as the mask of this level"
        raise ShapeMismatchError("hidden states of a fused layer", expected, hidden_states.shape[1])


def _mean_attention(attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
    """Cross-attention probabilities, mean over heads: (B, L, N) float32 from (B, L, C) and (B, N, C')."""
    projections = (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states))
    query, key = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float() for x in projections)
    probabilities: torch.Tensor = (query @ key.transpose(-1, -2) * attn.scale).softmax(-1)
    return probabilities.mean(1)


def _fused_paths(layer: Layer, fuse: Sequence[Layer], fuse_cross: Sequence[Layer]) -> tuple[str, ...]:
    """The layer's fused attention modules, in the order in which the U-Net calls them."""
    return (layer.self_attention if layer in fuse else ()) + (layer.cross_attention if layer in fuse_cross else ())


@contextmanager
def fast_backward(unet: UNet2DConditionModel) -> Iterator[None]:
    """Compute attention's backward pass in float32 within the context, for a bfloat16 U-Net on a CPU.

    It takes at most half the time of torch's own backward pass (`python -m benchmarks.attention_backward`). Other
    U-Nets are unchanged.
    """
    if unet.device.type != "cpu" or unet.dtype != torch.bfloat16:
        yield
        return
    before: dict[str, Any] = dict(unet.attn_processors)
    unet.set_attn_processor({name: BackwardProcessor() for name in before})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


@contextmanager
def processors_installed(
    unet: UNet2DConditionModel,
    *,
    capture: Sequence[Layer] = (),
    fuse: Sequence[Layer] = (),
    fuse_cross: Sequence[Layer] = (),
) -> Iterator[None]:
    """Install attention processors within the context: capturing, fusing, and plain ones everywhere else.

    Cross-attention of the `capture` layers is captured. Self-attention of the `fuse` layers and cross-attention of the
    `fuse_cross` layers is fused. Without any layer nothing is installed. The previous processors are restored on exit,
    also after an error.
    """
    if not capture and not fuse and not fuse_cross:
        yield
        return

    # 1. capturing processors
    before: dict[str, Any] = dict(unet.attn_processors)
    installed: dict[str, Any] = {name: PlainProcessor() for name in before}
    for layer in capture:
        installed |= {f"{path}.processor": CaptureProcessor() for path in layer.cross_attention}

    # 2. fusing processors; the last one in forward order skips the references' rows
    fused: list[tuple[str, int]] = []
    for layer in sorted({*fuse, *fuse_cross}, key=lambda layer: layer.index):
        fused += [(path, layer.level) for path in _fused_paths(layer, fuse, fuse_cross)]
    for path, level in fused:
        installed[f"{path}.processor"] = FuseProcessor(level, last=path == fused[-1][0])

    # 3. installation
    unet.set_attn_processor(installed)
    try:
        yield
    finally:
        unet.set_attn_processor(before)
