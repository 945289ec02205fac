import pytest
import torch

from dfusion.attention import processors
from dfusion.attention.layers import find_layers
from dfusion.attention.processors import CaptureProcessor, WrittenOutProcessor, attention_written_out
from dfusion.attention.processors import processors_installed as installed
from tests.nets import embeds, relative_error, sd_unet


def call(unet: torch.nn.Module, context: torch.Tensor) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return unet(x, 5, encoder_hidden_states=context).sample


def test_output_and_gradients_are_those_of_the_fused_kernel() -> None:
    unet = sd_unet(sample_size=8)
    results = []
    for written_out in (False, True):
        context = embeds(2).requires_grad_()
        unet.zero_grad()
        if written_out:
            with attention_written_out(unet):
                output = call(unet, context)
                output.square().sum().backward()
        else:
            output = call(unet, context)
            output.square().sum().backward()
        results.append((output.detach(), context.grad, unet.conv_in.weight.grad.clone()))
    assert all(relative_error(*pair) < 1e-5 for pair in zip(*results, strict=True))


def test_installed_on_plain_attentions_for_a_while() -> None:
    unet = sd_unet(sample_size=8)
    layers = find_layers(unet)
    before = dict(unet.attn_processors)
    with pytest.raises(KeyboardInterrupt), attention_written_out(unet):
        assert {type(processor) for processor in unet.attn_processors.values()} == {WrittenOutProcessor}
        raise KeyboardInterrupt
    assert unet.attn_processors == before
    with installed(unet, capture=layers[:1]), attention_written_out(unet):
        kinds = [type(processor) for processor in unet.attn_processors.values()]
        assert kinds.count(CaptureProcessor) == len(layers[0].cross_attention)
        assert set(kinds) == {CaptureProcessor, WrittenOutProcessor}


def test_large_attentions_and_half_precision_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(processors, "_WRITTEN_OUT", lambda *args: used.append(args[1].shape[1]) or args[1])
    monkeypatch.setattr(processors, "LARGEST_WRITTEN_OUT", 16 * 16)
    unet = sd_unet(sample_size=8)
    with torch.no_grad(), attention_written_out(unet):
        call(unet, embeds(2))
        assert used and max(used) == 16  # of 64, 16, 4 and 1 pixels; 64 x 7 tokens are more than 256 entries, too
        used.clear()
        unet.bfloat16()
        x = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
        unet(x, 5, encoder_hidden_states=embeds(2).bfloat16())
    assert used == []
