"""Adapters of other programs: a sweep over formats, ranks, patterns and layers, and the files that are refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from dfusion.adapter import load_adapter, lora_config, lora_layers, lora_parameters, save_adapter
from dfusion.adapter_files import read_layout
from dfusion.config import LoraConfig
from dfusion.errors import AdapterError
from dfusion.files import read_tensors
from tests.adapters import (
    ATTENTION,
    ONE,
    REFUSED,
    Lora,
    diffusers_file,
    file_of,
    kohya_file,
    merged,
    peft_file,
    random_lora,
)
from tests.nets import WIDTH, XL_POOLED, XL_WIDTH, embeds, tiny_pipeline, tiny_unet, tiny_xl_unet

Form = Literal["diffusers", "bare diffusers", "PEFT", "kohya"]
Net = Literal["sd", "xl"]
FORMS: tuple[Form, ...] = ("diffusers", "bare diffusers", "PEFT", "kohya")
NETS: tuple[Net, ...] = ("sd", "xl")
LAYERS = {
    "attention": ATTENTION,
    "transformers": (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "cross-attention": ("attn2.to_k", "attn2.to_v"),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATTERNS: Mapping[str, Callable[[int], Lora]] = {
    "alpha is rank": lambda rank: Lora(rank, rank),
    "other alpha": lambda rank: Lora(rank, 1.5),
    "rsLoRA": lambda rank: Lora(rank, 16, use_rslora=True),
    "alpha_pattern": lambda rank: Lora(rank, 3, alphas={"attn2.to_v": 6.0, "attn2.to_k": 0.5}),
    "rank_pattern": lambda rank: Lora(rank, 2, ranks={"attn2.to_k": rank + 2}),
    "both patterns, rsLoRA": lambda rank: Lora(
        rank, 4, ranks={"attn2.to_v": rank + 1}, alphas={"attn2.to_v": 1.0}, use_rslora=True
    ),
}


@dataclass(frozen=True)
class Variant:
    """One file of the sweep."""

    form: Form
    net: Net
    pattern: str
    rank: int
    layers: str
    dtype: torch.dtype
    dora: bool = False

    @property
    def name(self) -> str:
        parts = (self.form, self.net, self.pattern, f"rank {self.rank}", self.layers, str(self.dtype).split(".")[1])
        return ", ".join(parts) + (", DoRA" if self.dora else "")

    def write(self, folder: Path) -> tuple[Path, Lora]:
        """Write the file. Returns its path and what it stands for."""
        _, _, weights = network(self.net)
        lora = PATTERNS[self.pattern](self.rank)
        if self.form == "bare diffusers":  # neither alpha nor patterns: alpha is the rank
            lora = replace(lora, alpha=self.rank, alphas={end: float(rank) for end, rank in lora.ranks.items()})
            lora.use_rslora = False
        random_lora(weights, LAYERS[self.layers], lora, self.dtype, self.dora)
        match self.form:
            case "PEFT":
                return peft_file(lora, folder), lora
            case "kohya":
                return kohya_file(lora, folder, self.net == "xl"), lora
            case _:
                return diffusers_file(lora, folder, self.form == "diffusers"), lora


def sweep() -> list[Variant]:
    """144 LoRAs and 12 DoRAs. Layers and dtypes take turns."""
    turns = cycle(product(LAYERS, DTYPES))
    variants = [
        Variant(form, net, pattern, rank, *next(turns))
        for rank, pattern, net, form in product((1, 3, 8), PATTERNS, NETS, FORMS)
    ]
    doras = product(("other alpha", "rsLoRA", "rank_pattern"), NETS, FORMS[::2])
    return variants + [Variant(form, net, pattern, 2, *next(turns), True) for pattern, net, form in doras]


VARIANTS = sweep()
SHORT = VARIANTS[::17]
"""Coprime to the number of formats and nets, so that all are among them."""


@cache
def network(net: Net) -> tuple[UNet2DConditionModel, UNet2DConditionModel, dict[str, torch.Tensor]]:
    """A U-Net for adapters, another one for merged weights, and their weights."""
    unet, other = (tiny_unet(), tiny_unet()) if net == "sd" else (tiny_xl_unet(), tiny_xl_unet())
    return unet, other, {name: value.clone() for name, value in unet.state_dict().items()}


@cache
def text_encoders() -> dict[str, nn.Module]:
    return {"text_encoder": tiny_pipeline().text_encoder}


def output(unet: UNet2DConditionModel, net: Net) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    if net == "sd":
        return unet(x, 5, encoder_hidden_states=embeds(1)).sample
    states = torch.randn(1, 7, WIDTH + XL_WIDTH, generator=generator)
    added = {"text_embeds": torch.ones(1, XL_POOLED), "time_ids": torch.ones(1, 6)}
    return unet(x, 5, encoder_hidden_states=states, added_cond_kwargs=added).sample


@torch.no_grad()
def check(variant: Variant, folder: Path, saves: bool) -> None:
    """The loaded adapter gives the image of the merged weights, and so does a saved copy."""
    unet, plain, weights = network(variant.net)
    file, lora = variant.write(folder)
    load_adapter(unet, file)
    got = output(unet, variant.net)

    plain.load_state_dict(merged(weights, lora))
    expected = output(plain, variant.net)
    plain.load_state_dict(weights)
    effect = (expected - output(plain, variant.net)).abs().max()
    assert effect > 1e-3, variant.name
    assert (got - expected).abs().max() < 1e-3 * effect, variant.name

    scales = {name: layer.scale for name, layer in lora_layers(unet).items()}
    assert scales == pytest.approx({name: lora.scale_of(name) for name in lora.down}), variant.name
    assert {parameter.dtype for parameter in lora_parameters(unet).values()} == {torch.float32}

    if not saves:
        return
    save_adapter(unet, folder / "again.safetensors")
    config = lora_config(unet)
    load_adapter(unet, folder / "again.safetensors")
    assert lora_config(unet) == config and torch.equal(output(unet, variant.net), got), variant.name


@pytest.mark.slow
def test_adapters_of_other_programs_have_the_effect_of_their_merged_weights(tmp_path: Path) -> None:
    assert {(variant.form, variant.net) for variant in SHORT} == set(product(FORMS, NETS))
    assert {variant.dora for variant in SHORT} == {False, True}
    for number, variant in enumerate(SHORT):
        check(variant, tmp_path / str(number), saves=number % 4 == 0)


@pytest.mark.long
def test_all_adapters_of_the_sweep_have_the_effect_of_their_merged_weights(tmp_path: Path) -> None:
    assert len(VARIANTS) >= 120
    for number, variant in enumerate(VARIANTS):
        check(variant, tmp_path / str(number), saves=True)


# the table "Adapters" of the cases: rows by their names


def test_rslora_alpha_16_rank_4_has_scale_8(tmp_path: Path) -> None:
    unet = tiny_unet()
    lora = random_lora(unet.state_dict(), ATTENTION, Lora(4, 16, use_rslora=True))
    for write in (diffusers_file, peft_file):
        load_adapter(unet, write(lora, tmp_path))
        assert unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.scaling == {"default": 8.0}
        assert lora_config(unet) == LoraConfig(rank=4, alpha=16, use_rslora=True, init="kaiming")


def test_alpha_pattern_and_rank_pattern_are_honoured(tmp_path: Path) -> None:
    unet = tiny_unet()
    lora = Lora(2, 4, ranks={"attn2.to_k": 8}, alphas={"attn2.to_k": 24.0})
    load_adapter(unet, diffusers_file(random_lora(unet.state_dict(), ATTENTION, lora), tmp_path))
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    assert (block.attn2.to_k.r, block.attn2.to_k.scaling) == ({"default": 8}, {"default": 3.0})
    assert (block.attn1.to_k.r, block.attn1.to_k.scaling) == ({"default": 2}, {"default": 2.0})


def test_kohya_file_with_alpha_of_each_module_is_imported(tmp_path: Path) -> None:
    unet = tiny_unet()
    lora = Lora(4, 1.0, alphas={"attn1.to_q": 8.0})
    load_adapter(unet, kohya_file(random_lora(unet.state_dict(), LAYERS["transformers"], lora), tmp_path))
    attention = unet.mid_block.attentions[0]
    assert attention.transformer_blocks[0].attn1.to_q.scaling == {"default": 2.0}
    assert attention.proj_in.scaling == {"default": 0.25}


def test_peft_file_is_imported_as_file_and_as_folder(tmp_path: Path) -> None:
    unet = tiny_unet()
    file = peft_file(random_lora(unet.state_dict(), ATTENTION, Lora(2, 6)), tmp_path)
    for path in (file, tmp_path):
        load_adapter(unet, path)
        assert lora_config(unet) == LoraConfig(rank=2, alpha=6, init="kaiming")

    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config.json \(with alpha\) next to the file, got none"):
        load_adapter(unet, tmp_path)


@pytest.mark.parametrize("row", REFUSED)
def test_other_files_are_refused_by_name(row: str, tmp_path: Path) -> None:
    tensors, expected = REFUSED[row]
    unet, _, _ = network("sd")
    with pytest.raises(AdapterError, match=expected):
        load_adapter(unet, file_of(tensors, tmp_path), text_encoders())
    assert not getattr(unet, "peft_config", None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"lora_alpha": "much"}, "alpha of .* got 'much'"),
        ({"lora_alpha": 0}, "alpha of .* got 0"),
        ({"alpha_pattern": {"(": 2}}, "patterns of layers"),
        ({"alpha_pattern": [1]}, "settings of an adapter"),
        ([], "settings of an adapter"),
    ],
)
def test_other_settings_of_peft_are_refused_by_name(settings: object, expected: str, tmp_path: Path) -> None:
    unet, _, weights = network("sd")
    peft_file(random_lora(weights, ATTENTION, Lora(2, 2)), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(AdapterError, match=expected):
        load_adapter(unet, tmp_path)


def test_pickles_and_damaged_files_are_refused(tmp_path: Path) -> None:
    unet, _, weights = network("sd")
    torch.save({"a": ONE}, tmp_path / "zip.safetensors")
    torch.save({"a": ONE}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "adapter_model.bin").write_bytes(b"no pickle")
    for path in ("zip.safetensors", "old.safetensors", "plain.safetensors", "adapter_model.bin", "."):
        with pytest.raises(AdapterError, match="got a pickle"):
            load_adapter(unet, tmp_path / path)

    file = diffusers_file(random_lora(weights, ATTENTION, Lora(2, 2)), tmp_path)
    whole = file.read_bytes()
    for part in (b"", whole[:4], whole[:100], whole[: len(whole) // 2], whole[:-1]):
        file.write_bytes(part)
        with pytest.raises(AdapterError, match="complete safetensors file"):
            load_adapter(unet, file)
    with pytest.raises(AdapterError, match="No such file"):
        load_adapter(unet, tmp_path / "none.safetensors")


def test_a_layout_is_read_without_the_model(tmp_path: Path) -> None:
    _, _, weights = network("xl")
    lora = random_lora(weights, ATTENTION, Lora(2, 5))
    layout = read_layout(kohya_file(lora, tmp_path, is_xl=True))
    assert (layout.form, layout.layers.keys()) == ("kohya", lora.down.keys())
    assert {(layer.rank, layer.alpha) for layer in layout.layers.values()} == {(2, 5.0)}
    assert read_tensors(layout.file)[0].keys() == layout.tensors.keys()
