import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import UNet2DConditionModel

from dfusion.adapter import (
    attach_lora,
    detach,
    load_adapter,
    lora_config,
    lora_parameters,
    read_adapter,
    save_adapter,
)
from dfusion.config import LoraConfig
from dfusion.errors import AdapterError, CheckpointError, InvalidInputError
from dfusion.files import read_tensors, write_tensors
from tests.nets import embeds, sd_unet, tiny_pipeline, tiny_unet, tiny_xl_unet


def output(unet: UNet2DConditionModel) -> torch.Tensor:
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(x, 5, encoder_hidden_states=embeds(1)).sample


def trained(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """An adapter with rank 3 and alpha 12 that changes the output."""
    attach_lora(unet, LoraConfig(rank=3, alpha=12.0), seed=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_parameters(unet).values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return unet


def test_a_fresh_adapter_is_seeded_trainable_and_changes_nothing() -> None:
    unet = tiny_unet()
    plain = output(tiny_unet())
    torch.manual_seed(9)
    before = torch.get_rng_state()
    attach_lora(unet, LoraConfig(rank=2), seed=3)

    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(output(unet), plain)

    first = {name: value.clone() for name, value in lora_parameters(unet).items()}
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == set(first)

    attentions = sum(name.endswith("to_q") for name, _ in tiny_unet().named_modules())
    assert len(first) == attentions * 4 * 2

    attach_lora(unet, LoraConfig(rank=2), seed=3)
    again = lora_parameters(unet)

    assert again.keys() == first.keys() and all(torch.equal(again[name], value) for name, value in first.items())

    attach_lora(unet, LoraConfig(rank=2), seed=4)
    assert any(not torch.equal(value, first[name]) for name, value in lora_parameters(unet).items())


def test_detach_gives_the_base_model_back() -> None:
    unet = trained(tiny_unet())
    assert not torch.allclose(output(unet), output(tiny_unet()))
    detach(unet)
    detach(unet)
    assert torch.equal(output(unet), output(tiny_unet()))
    with pytest.raises(InvalidInputError, match="LoRA"):
        lora_parameters(unet)


def test_saved_and_loaded(tmp_path: Path) -> None:
    unet = trained(tiny_unet())
    other = tiny_unet()
    save_adapter(unet, tmp_path / "a.safetensors", {"round": "2"})
    attach_lora(other, LoraConfig(rank=8))
    assert load_adapter(other, tmp_path / "a.safetensors") == {"round": "2"}
    assert torch.equal(output(other), output(unet))
    assert all(p.requires_grad for p in lora_parameters(other).values())
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_unet, tiny_xl_unet])
def test_rank_alpha_and_bytes_survive_the_round_trip(tmp_path: Path, make: Callable[[], UNet2DConditionModel]) -> None:
    unet = trained(make())
    for number in range(8):  # safetensors would write its metadata in a random order
        save_adapter(unet, tmp_path / f"{number}.safetensors", {"round": "2", "base": "tiny"})
    other = make()
    load_adapter(other, tmp_path / "0.safetensors")
    save_adapter(other, tmp_path / "again.safetensors", {"base": "tiny", "round": "2"})

    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1

    read = read_adapter(tmp_path / "0.safetensors")
    assert read.config == LoraConfig(rank=3, alpha=12.0) and read.metadata == {"round": "2", "base": "tiny"}

    layer = other.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert (layer.r["default"], layer.scaling["default"]) == (3, 12 / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_half_precision_models_are_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    unet = trained(tiny_unet().to(dtype))
    assert unet.dtype == dtype and {p.dtype for p in lora_parameters(unet).values()} == {torch.float32}

    save_adapter(unet, tmp_path / "a.safetensors")
    again = tiny_unet().to(dtype)
    load_adapter(again, tmp_path / "a.safetensors")

    for name, value in lora_parameters(again).items():
        assert torch.equal(value, lora_parameters(unet)[name])

    with torch.no_grad():
        x = torch.ones(1, 4, 8, 8, dtype=dtype)
        conditions = embeds(1).to(dtype)
        assert again(x, 5, encoder_hidden_states=conditions).sample.dtype == dtype


def test_stock_diffusers_loads_it(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    unet = trained(tiny_unet())
    save_adapter(unet, tmp_path / "a.safetensors")
    plain = output(pipeline.unet)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    torch.testing.assert_close(output(pipeline.unet), output(unet), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(pipeline.unet), plain)


def test_invalid_files_are_rejected(tmp_path: Path) -> None:
    save_adapter(trained(tiny_unet()), tmp_path / "a.safetensors")
    unet = sd_unet(8)

    with pytest.raises(AdapterError, match="another model"):
        load_adapter(unet, tmp_path / "a.safetensors")

    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(CheckpointError):
        load_adapter(unet, tmp_path / "a.safetensors")
    with pytest.raises(InvalidInputError):
        save_adapter(tiny_unet(), tmp_path / "b.safetensors")

    (tmp_path / "a.safetensors").write_bytes(whole)
    tensors, about = read_tensors(tmp_path / "a.safetensors")
    for metadata in ('{"unet.lora_alpha": -1}', "[]", "{"):
        write_tensors(tmp_path / "a.safetensors", tensors, about | {"lora_adapter_metadata": metadata})
        with pytest.raises(CheckpointError, match="metadata"):
            load_adapter(tiny_unet(), tmp_path / "a.safetensors")


def test_gaussian_weights_have_the_standard_deviation_of_diffusers_lora_layers() -> None:
    """N(0, 1/rank) is a standard deviation of 1/rank in diffusers' LoRALinearLayer, in every layer; B is 0."""
    rank = 256
    unet = tiny_unet()
    attach_lora(unet, LoraConfig(rank=rank), seed=3)
    for name, value in lora_parameters(unet).items():
        if "lora_A" in name:
            assert value.std().item() == pytest.approx(1 / rank, rel=0.05) and abs(value.mean().item()) < 0.1 / rank
        else:
            assert not value.any()


def test_kaiming_weights_are_uniform_within_their_bound() -> None:
    """Kaiming-uniform with a = sqrt(5): the bound is 1/sqrt(in), the standard deviation that over sqrt(3)."""
    unet = tiny_unet()
    attach_lora(unet, LoraConfig(rank=256, init="kaiming"), seed=3)
    for name, value in lora_parameters(unet).items():
        if "lora_A" in name:
            bound = value.shape[1] ** -0.5
            assert value.abs().max().item() <= bound
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_the_file_contains_the_initialisation(init: Literal["gaussian", "kaiming"], tmp_path: Path) -> None:
    unet = tiny_unet()
    attach_lora(unet, LoraConfig(rank=2, init=init), seed=3)
    save_adapter(unet, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").config == lora_config(unet) == LoraConfig(rank=2, init=init)
