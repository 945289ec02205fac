"""Adapter files as other programs write them, built key by key, and the weights that they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

XL_BLOCKS = {
    "down_blocks.1.attentions.0": "input_blocks_4_1",
    "down_blocks.1.attentions.1": "input_blocks_5_1",
    "down_blocks.2.attentions.0": "input_blocks_7_1",
    "down_blocks.2.attentions.1": "input_blocks_8_1",
    "mid_block.attentions.0": "middle_block_1",
    "up_blocks.0.attentions.0": "output_blocks_0_1",
    "up_blocks.0.attentions.1": "output_blocks_1_1",
    "up_blocks.0.attentions.2": "output_blocks_2_1",
    "up_blocks.1.attentions.0": "output_blocks_3_1",
    "up_blocks.1.attentions.1": "output_blocks_4_1",
    "up_blocks.1.attentions.2": "output_blocks_5_1",
}
"""The names of SDXL's transformers in diffusers and in kohya's files, as kohya's trainer writes them."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass
class Lora:
    """An adapter: A (rank, in, …) and B (out, rank, …) of each layer, and what gives its scale.

    rank and alpha are those of most layers; `ranks` and `alphas` those of some layers by the ends of their names.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    down: dict[str, torch.Tensor] = field(default_factory=dict)
    up: dict[str, torch.Tensor] = field(default_factory=dict)
    magnitude: dict[str, torch.Tensor] = field(default_factory=dict)

    def alpha_of(self, layer: str) -> float:
        return next((alpha for end, alpha in self.alphas.items() if layer.endswith(end)), self.alpha)

    def scale_of(self, layer: str) -> float:
        rank = len(self.down[layer])
        return self.alpha_of(layer) / (math.sqrt(rank) if self.use_rslora else rank)


def random_lora(
    weights: Mapping[str, torch.Tensor],
    ends: tuple[str, ...],
    lora: Lora,
    dtype: torch.dtype = torch.float32,
    dora: bool = False,
) -> Lora:
    """Fill an adapter of the layers with these ends with random matrices that `dtype` can hold."""
    generator = torch.Generator().manual_seed(7)
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer == name or not layer.endswith(ends) or weight.dim() < 2:
            continue
        rank = next((rank for end, rank in lora.ranks.items() if layer.endswith(end)), lora.rank)
        out, width, *kernel = weight.shape
        scale = 0.3 / math.sqrt(rank)
        lora.down[layer] = (scale * torch.randn(rank, width, *kernel, generator=generator)).to(dtype)
        lora.up[layer] = (scale * torch.randn(out, rank, *([1] * len(kernel)), generator=generator)).to(dtype)
        if dora:
            shape = (1, out, 1, 1) if kernel else (out,)
            lora.magnitude[layer] = (1 + torch.rand(shape, generator=generator)).to(dtype)
    return lora


def merged(weights: Mapping[str, torch.Tensor], lora: Lora) -> dict[str, torch.Tensor]:
    """W + scale B A of each layer, in float64; with DoRA, its rows at the length of the magnitude."""
    result = dict(weights)
    for layer, down in lora.down.items():
        weight = weights[f"{layer}.weight"].double()
        product = lora.up[layer].double().flatten(1) @ down.double().flatten(1)
        changed = weight + lora.scale_of(layer) * product.reshape(weight.shape)
        if layer in lora.magnitude:
            lengths = changed.flatten(1).norm(dim=1)
            factors = lora.magnitude[layer].double().flatten() / lengths
            changed = changed * factors.reshape(-1, *([1] * (weight.dim() - 1)))
        result[f"{layer}.weight"] = changed.to(weights[f"{layer}.weight"].dtype)
    return result


Text = Mapping[str, Lora]
"""Adapters of text encoders, by the names of the encoders in a pipeline."""


def diffusers_file(lora: Lora, folder: Path, with_metadata: bool = True, text: Text | None = None) -> Path:
    """A file of diffusers' training scripts, with the settings in its metadata in versions since 0.34."""
    tensors = {}
    for layer in lora.down:
        tensors[f"unet.{layer}.lora.down.weight"] = lora.down[layer]
        tensors[f"unet.{layer}.lora.up.weight"] = lora.up[layer]
        if layer in lora.magnitude:
            tensors[f"unet.{layer}.lora_magnitude_vector"] = lora.magnitude[layer]
    settings = {f"unet.{name}": value for name, value in _settings(lora).items()}
    for encoder, part in (text or {}).items():
        settings |= {f"{encoder}.{name}": value for name, value in _settings(part).items()}
        for layer in part.down:
            name = f"{encoder}.text_model.{layer.removeprefix('text_model.')}.lora_linear_layer"
            tensors |= {f"{name}.down.weight": part.down[layer], f"{name}.up.weight": part.up[layer]}
    about = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(settings)} if with_metadata else {})
    return _saved(tensors, folder / "pytorch_lora_weights.safetensors", about)


def peft_file(lora: Lora, folder: Path) -> Path:
    """A folder of PEFT's save_pretrained. Returns its weights."""
    tensors = {}
    for layer in lora.down:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = lora.down[layer]
        tensors[f"base_model.model.{layer}.lora_B.weight"] = lora.up[layer]
        if layer in lora.magnitude:
            tensors[f"base_model.model.{layer}.lora_magnitude_vector"] = lora.magnitude[layer]
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "bias": "none", **_settings(lora)}
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    return _saved(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _settings(lora: Lora) -> dict[str, object]:
    return {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": dict(lora.ranks),
        "alpha_pattern": dict(lora.alphas),
        "use_rslora": lora.use_rslora,
        "use_dora": bool(lora.magnitude),
        "target_modules": sorted(lora.down),
    }


def kohya_file(lora: Lora, folder: Path, is_xl: bool = False, text: Text | None = None) -> Path:
    """A file of kohya's trainer: an alpha for each layer. It has no rsLoRA, whose factor goes into alpha."""
    tensors = {}
    names = [(kohya_name(layer, is_xl), layer, lora) for layer in lora.down]
    prefixes = {"text_encoder": "lora_te1_" if is_xl else "lora_te_", "text_encoder_2": "lora_te2_"}
    for encoder, part in (text or {}).items():
        for layer in part.down:
            name = f"text_model_{layer.removeprefix('text_model.').replace('.', '_')}"
            names.append((prefixes[encoder] + name, layer, part))
    for name, layer, of_network in names:
        down = of_network.down[layer]
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = of_network.up[layer]
        tensors[f"{name}.alpha"] = torch.tensor(of_network.scale_of(layer) * len(down))
    return _saved(tensors, folder / "kohya.safetensors", {"ss_network_module": "networks.lora"})


def kohya_name(layer: str, is_xl: bool = False) -> str:
    """kohya's name of a layer; SDXL's transformers by `XL_BLOCKS`."""
    if is_xl:
        block, attentions, rest = layer.partition(".attentions.")
        number, _, end = rest.partition(".")
        layer = f"{XL_BLOCKS[block + attentions + number]}.{end}"
    return "lora_unet_" + layer.replace(".", "_")


def _saved(tensors: Mapping[str, torch.Tensor], file: Path, about: Mapping[str, str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, dict(about))
    return file


def _layer() -> dict[str, torch.Tensor]:
    """The tensors of a kohya file of one layer."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    return {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)}


def _pair(name: str, width: int, out: int) -> dict[str, torch.Tensor]:
    """Both matrices of a layer in a kohya file."""
    return {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(out, 2)}


_TEXT = "lora_te_text_model_encoder_layers_0"
_LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
_KOHYA = "lora_unet_" + _LAYER.replace(".", "_")
_PEFT = f"base_model.model.{_LAYER}"
ONE = torch.ones(1)
_NAN = torch.tensor([[1.0, float("nan")]])
REFUSED: Mapping[str, tuple[Mapping[str, torch.Tensor], str]] = {
    # text encoders, beside the U-Net's layers
    "text encoder alone, kohya": (_pair(f"{_TEXT}_mlp_fc1", 16, 32), "layers of the U-Net, got only .*text encoder"),
    "text encoder alone, diffusers": (
        {
            "text_encoder_2.text_model.x.fc1.lora.up.weight": ONE[None],
            "text_encoder_2.x.fc1.lora.down.weight": ONE[None],
        },
        "layers of the U-Net, got only .*text encoder",
    ),
    "text encoder, PEFT": ({"base_model.model.text_model.encoder.x.lora_A.weight": ONE}, "text encoder"),
    "text encoder, another width": (
        _layer() | _pair(f"{_TEXT}_self_attn_q_proj", 768, 768),
        r"another model.*lora_te_.*q_proj.* of shape \(2, 16\), got \(2, 768\)",
    ),
    "text encoder, another height": (
        _layer() | _pair(f"{_TEXT}_mlp_fc1", 16, 8),
        r"another model.*lora_te_.*fc1.* of shape \(32, 2\), got \(8, 2\)",
    ),
    "text encoder, no such layer": (
        _layer() | _pair("lora_te_text_model_encoder_layers_11_mlp_fc1", 16, 32),
        "text_encoder has no layer text_model.encoder.layers.11.mlp.fc1",
    ),
    "text encoder, one matrix": (_layer() | {f"{_TEXT}_mlp_fc1.alpha": ONE}, "no down matrix"),
    "text encoder, embeddings": (
        _layer() | _pair("lora_te_text_model_embeddings_token_embedding", 16, 600),
        "attention and MLP .*got lora_te_text_model_embeddings",
    ),
    "text encoder, LoHa": (_layer() | {f"{_TEXT}_mlp_fc1.hada_w1_a": ONE}, r"LoHa \(lora_te_"),
    "text encoder, DoRA": (
        {f"unet.{_LAYER}.lora.{part}.weight": torch.ones(size) for part, size in (("down", (2, 16)), ("up", (16, 2)))}
        | {
            "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 16),
            "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight": torch.ones(32, 2),
            "text_encoder.encoder.layers.0.mlp.fc1.lora_magnitude_vector": torch.ones(32),
        },
        "LoRA of the text encoder, got a DoRA .*magnitude",
    ),
    "text encoder twice": (
        _layer() | _pair(f"{_TEXT}_mlp_fc1", 16, 32) | _pair(f"{_TEXT.replace('te', 'te1', 1)}_mlp_fc1", 16, 32),
        "one down matrix",
    ),
    "a second text encoder": (
        _layer() | _pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 16, 32),
        "another model.*lora_te2_.* no text_encoder_2",
    ),
    # other kinds
    "LoHa": ({f"{_KOHYA}.hada_w1_a": ONE, f"{_KOHYA}.alpha": ONE}, "LoHa"),
    "LoHa, PEFT": ({f"{_PEFT}.hada_w1_a": ONE}, "LoHa"),
    "LoHa, Tucker": ({f"{_KOHYA}.hada_t1": ONE}, "LoHa"),
    "LoKr": ({f"{_KOHYA}.lokr_w1": ONE, f"{_KOHYA}.lokr_w2_a": ONE}, "LoKr"),
    "LoKr, PEFT": ({f"{_PEFT}.lokr_w1": ONE}, "LoKr"),
    "DoRA": (_layer() | {f"{_KOHYA}.dora_scale": ONE}, "DoRA"),
    "(IA)3": ({f"{_PEFT}.ia3_l": ONE}, r"\(IA\)3"),
    "(IA)3, LyCORIS": ({f"{_KOHYA}.weight": ONE, f"{_KOHYA}.on_input": ONE}, r"\(IA\)3|keys of a LoRA"),
    "OFT": ({f"{_KOHYA}.oft_blocks": ONE}, "OFT"),
    "OFT, PEFT": ({f"{_PEFT}.oft_R.weight": ONE}, "OFT"),
    "BOFT": ({f"{_PEFT}.boft_R": ONE}, "BOFT"),
    "VeRA": ({f"{_PEFT}.vera_lambda_b": ONE}, "VeRA"),
    "HRA": ({f"{_PEFT}.hra_u": ONE}, "HRA"),
    "GLoRA": ({f"{_KOHYA}.a1.weight": ONE}, "GLoRA"),
    "full weights": ({f"{_KOHYA}.diff": ONE}, "full weights"),
    "full biases": (_layer() | {f"{_KOHYA}.diff_b": ONE}, "full weights"),
    "trained norms": (_layer() | {"lora_unet_mid_block_resnets_0_norm1.w_norm": ONE}, "trained norms"),
    "LoCon, Tucker": (_layer() | {f"{_KOHYA}.lora_mid.weight": ONE}, "LoCon"),
    "LoCon of SDXL": ({"lora_unet_input_blocks_1_0_in_layers_2.alpha": ONE}, "LoCon"),
    "LoRA with biases": ({f"{_PEFT}.lora_B.bias": ONE}, "biases"),
    "LoRA of embeddings": ({f"{_PEFT}.lora_embedding_A": ONE}, "embeddings"),
    "textual inversion": ({"emb_params": ONE}, "textual inversion"),
    # numbers
    "NaN in the weights": (_layer() | {f"{_KOHYA}.lora_up.weight": _NAN.expand(16, 2)}, "NaN or infinity in .*lora_up"),
    "NaN, bfloat16": (_layer() | {f"{_KOHYA}.lora_up.weight": _NAN.expand(16, 2).bfloat16()}, "NaN .*lora_up"),
    "infinity": (
        _layer() | {f"{_KOHYA}.lora_up.weight": torch.full((16, 2), torch.inf).half()},
        "infinity in .*lora_up",
    ),
    "integers": (_layer() | {f"{_KOHYA}.lora_up.weight": torch.ones(16, 2, dtype=torch.int8)}, "got I8 in .*lora_up"),
    "negative alpha": (_layer() | {f"{_KOHYA}.alpha": -ONE}, "alpha of .* > 0, got -1"),
    "infinite alpha": (_layer() | {f"{_KOHYA}.alpha": ONE * torch.inf}, "alpha of .* > 0, got inf"),
    "several alphas": (_layer() | {f"{_KOHYA}.alpha": torch.ones(2)}, "one number in .*alpha"),
    # another model, or parts of it
    "another width": (
        _layer() | {f"{_KOHYA}.lora_down.weight": torch.ones(2, 320)},
        r"another model.*\(2, 16\), got \(2, 320\)",
    ),
    "another height": (_layer() | {f"{_KOHYA}.lora_up.weight": torch.ones(320, 2)}, r"another model.*got \(320, 2\)"),
    "no such layer": (
        {
            f"{_KOHYA.replace('mid_block', 'down_blocks_7')}.lora_{part}.weight": torch.ones(4, 4)
            for part in ("down", "up")
        },
        "no layer down_blocks.7",
    ),
    "Flux": (
        {f"lora_unet_double_blocks_0_img_attn_proj.lora_{part}.weight": torch.ones(4, 4) for part in ("down", "up")},
        "no layer double.blocks",
    ),
    "a norm": (
        {f"lora_unet_mid_block_resnets_0_norm1.lora_{part}.weight": torch.ones(4, 4) for part in ("down", "up")},
        "no layer mid_block.resnets.0.norm1",
    ),
    "Stable Diffusion 3": ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": ONE[None]}, "no up matrix"),
    "a checkpoint": ({"model.diffusion_model.input_blocks.0.0.weight": ONE}, "keys of a LoRA"),
    "no tensors": ({}, "keys of a LoRA|complete safetensors file"),
    "a matrix without its other": ({f"{_KOHYA}.lora_down.weight": torch.ones(2, 16)}, "no up matrix"),
    "two ranks of a layer": (_layer() | {f"{_KOHYA}.lora_down.weight": torch.ones(3, 16)}, "matrices of one rank"),
    "a vector": (_layer() | {f"{_KOHYA}.lora_down.weight": torch.ones(16)}, "expected a matrix"),
    "unknown key": (_layer() | {f"{_KOHYA}.lora_left.weight": ONE}, "keys of a LoRA, got .*lora_left"),
    "two formats": (_layer() | {f"unet.{_LAYER}.lora.up.weight": ONE}, "keys of one format"),
    "a matrix twice": (
        {f"unet.{_LAYER}.lora.up.weight": ONE, f"unet.{_LAYER}.lora_B.weight": ONE},
        "one up matrix",
    ),
}
"""Files that cannot be loaded into the tiny U-Net: their tensors, and a part of the error's message."""


def file_of(tensors: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """A file with these tensors, and settings of PEFT beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}", "utf-8")
    return _saved({key: tensor.clone() for key, tensor in tensors.items()}, folder / "adapter.safetensors", {})
