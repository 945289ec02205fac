import logging
import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft import LoraConfig

from dfusion.attention.fusion import Fusion, fuse_rows
from dfusion.attention.layers import find_layers, first_up_layer, resolve_layers
from dfusion.attention.processors import (
    AttentionContext,
    BackwardProcessor,
    FuseProcessor,
    PlainProcessor,
    fast_backward,
    processors_installed,
)
from dfusion.errors import ShapeMismatchError
from tests.nets import TOKENS, XL_POOLED, tiny_unet, tiny_xl_unet


def call(unet: UNet2DConditionModel, context: AttentionContext | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    prompts = torch.randn(2, TOKENS, unet.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.ones(2, XL_POOLED), "time_ids": torch.ones(2, 6)}  # SDXL's
    kwargs = None if context is None else {"fusion": context}
    with torch.no_grad():
        return unet(x, 5, prompts, added_cond_kwargs=added, cross_attention_kwargs=kwargs).sample


def test_restored_even_on_error() -> None:
    unet = tiny_unet()
    before = dict(unet.attn_processors)
    with pytest.raises(KeyboardInterrupt), processors_installed(unet, fuse=find_layers(unet)):
        assert unet.attn_processors != before
        raise KeyboardInterrupt
    assert unet.attn_processors == before


def test_context_reaches_processors_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("diffusers").propagate = True
    unet = tiny_unet()
    layer = first_up_layer(find_layers(unet))
    context = AttentionContext(item_weights=torch.zeros(2, 7, 1))
    with caplog.at_level("WARNING"), processors_installed(unet, capture=[layer]):
        call(unet, context)
    logging.getLogger("diffusers").propagate = False
    assert len(context.captured) == len(layer.cross_attention) == 2
    assert caplog.records == []


@pytest.mark.parametrize(
    ("options", "shape", "context", "mask"),
    [
        ({}, (2, 9, 8), None, None),
        ({"cross_attention_dim": 6}, (2, 9, 8), (2, 5, 6), None),
        ({"cross_attention_dim": 6}, (2, 9, 8), (2, 5, 6), (2, 1, 5)),
        # as in AttnDownBlock2D
        ({"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0}, (2, 8, 3, 3), None, None),
        ({"cross_attention_dim": 6, "cross_attention_norm": "layer_norm"}, (2, 9, 8), (2, 5, 6), None),
        ({"qk_norm": "layer_norm"}, (2, 9, 8), None, None),
    ],
)
def test_the_plain_processor_computes_what_diffusers_does(
    options: dict[str, Any], shape: tuple[int, ...], context: tuple[int, ...] | None, mask: tuple[int, ...] | None
) -> None:
    """Bit for bit, also where attention does more than in Stable Diffusion."""
    torch.manual_seed(0)
    attention = Attention(8, heads=2, dim_head=4, **options)
    hidden_states = torch.randn(shape)
    prompts = None if context is None else torch.randn(context)
    bias = None if mask is None else torch.randn(mask)

    outputs = []
    for processor in (AttnProcessor2_0(), PlainProcessor()):
        attention.set_processor(processor)
        outputs.append(attention(hidden_states, prompts, attention_mask=bias))
    assert torch.equal(*outputs)


def test_bfloat16_on_a_cpu_uses_the_float32_backward_pass() -> None:
    """The same output, bit for bit; gradients differ by bfloat16's rounding. A float32 U-Net keeps its processors."""
    unet = tiny_unet()
    stock = dict(unet.attn_processors)
    with fast_backward(unet):
        assert unet.attn_processors == stock
    unet = unet.bfloat16()
    stock = dict(unet.attn_processors)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    prompts = torch.randn(2, TOKENS, unet.config.cross_attention_dim, generator=generator)

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        unet.zero_grad()
        output = unet(x.bfloat16(), 5, prompts.bfloat16()).sample
        output.float().square().sum().backward()
        gradients = [each.grad.flatten() for name, each in unet.named_parameters() if ".to_q." in name]
        return output.detach(), torch.cat(gradients).float()

    output, gradient = outcome()
    with fast_backward(unet):
        assert all(type(each) is BackwardProcessor for each in unet.attn_processors.values())
        same, other = outcome()
    assert unet.attn_processors == stock
    assert torch.equal(same, output)
    assert 0 < (other - gradient).norm() < 0.05 * gradient.norm()


def test_processors_without_context_change_nothing() -> None:
    unet = tiny_unet()
    plain = call(unet, None)
    layers = find_layers(unet)
    with processors_installed(unet, capture=layers, fuse=layers):
        assert torch.equal(call(unet, None), plain)
    with processors_installed(unet, fuse_cross=layers):
        assert torch.equal(call(unet, None), plain)


def test_cross_attention_is_fused_only_where_asked() -> None:
    unet = tiny_unet()
    layer = first_up_layer(find_layers(unet))
    with processors_installed(unet, fuse_cross=[layer]):
        fused = {name for name, processor in unet.attn_processors.items() if isinstance(processor, FuseProcessor)}
    assert fused == {f"{path}.processor" for path in layer.cross_attention}


def test_keys_and_values_are_selected_by_the_mask() -> None:
    values = torch.arange(12.0).reshape(3, 4, 1)
    mask = torch.tensor([[True, False, False, True]])
    fusion = Fusion(targets=torch.tensor([2]), sources=torch.tensor([0]), masks={1: mask})
    assert fuse_rows(values, fusion, 1)[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 9, 10, 3]]


@pytest.mark.parametrize("unet", [tiny_unet(), tiny_xl_unet()], ids=["sd", "sdxl"])
@pytest.mark.parametrize(("own", "cross"), [(0, None), (None, 0), (0, 0), (1, 0), (0, 1)])
def test_the_last_attention_skips_the_references(
    unet: UNet2DConditionModel, own: int | None, cross: int | None
) -> None:
    """Self-attention fused from the `own`th layer on, cross-attention from the `cross`th, given in any order."""
    layers = resolve_layers(find_layers(unet), "middle+up")[::-1]
    fused, fused_cross = (() if first is None else layers[first:] for first in (own, cross))
    masks = {layer.level: torch.ones(1, math.prod(layer.size(8, 8)), dtype=torch.bool) for layer in layers}
    left_out: list[bool] = []
    hooks = []
    with processors_installed(unet, fuse=fused, fuse_cross=fused_cross):
        for module in unet.modules():
            if isinstance(getattr(module, "processor", None), FuseProcessor):
                note = lambda _, args: left_out.append(not args[0][0].any())  # noqa: E731
                hooks.append(module.to_out[0].register_forward_pre_hook(note))
        call(unet, AttentionContext(fusion=Fusion(torch.tensor([1]), torch.tensor([0]), masks)))
    for hook in hooks:
        hook.remove()

    assert left_out == [False] * (len(left_out) - 1) + [True]


@pytest.mark.parametrize("lora", [False, True])
def test_a_full_mask_makes_keys_and_values_the_references(lora: bool) -> None:
    """The target's attention over the reference's keys and values, with the adapter's part in all projections."""
    unet = tiny_unet()
    if lora:
        names = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=names, init_lora_weights="gaussian"))
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    layer = find_layers(unet)[2]
    attention = unet.get_submodule(layer.self_attention[0])
    seen: dict[str, torch.Tensor] = {}
    attention.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    masks = torch.ones(1, 64, dtype=torch.bool)
    fusion = Fusion(targets=torch.tensor([1]), sources=torch.tensor([0]), masks={layer.level: masks})
    with processors_installed(unet, fuse=[layer]):
        call(unet, AttentionContext(fusion=fusion))
    with torch.no_grad():
        heads = [
            part.unflatten(-1, (attention.heads, -1))
            for part in (attention.to_q(seen["x"][1]), attention.to_k(seen["x"][0]), attention.to_v(seen["x"][0]))
        ]
        scores = torch.einsum("lhd,mhd->hlm", heads[0], heads[1]) / heads[0].shape[-1] ** 0.5
        mixed = torch.einsum("hlm,mhd->lhd", scores.softmax(-1), heads[2]).flatten(1)
        torch.testing.assert_close(seen["out"][1], attention.to_out[0](mixed), rtol=1e-4, atol=1e-5)


def test_masks_of_another_size_are_rejected() -> None:
    unet = tiny_unet()
    layers = resolve_layers(find_layers(unet), "middle+up")
    masks = {layer.level: torch.ones(1, 9, dtype=torch.bool) for layer in layers}
    context = AttentionContext(fusion=Fusion(torch.tensor([1]), torch.tensor([0]), masks))
    with processors_installed(unet, fuse=layers), pytest.raises(ShapeMismatchError, match="9 pixels"):
        call(unet, context)
