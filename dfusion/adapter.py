"""The LoRA adapter of the U-Net, by peft, in files that stock diffusers loads.

A file may also adapt text encoders. These parts are merged into the encoders' weights, are not trained, and are saved
with the U-Net's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from dfusion._diffusers import (
    LORA_ADAPTER_METADATA_KEY,
    LoraLayer,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    convert_state_dict_to_diffusers,
    get_peft_model_state_dict,
    peft,
)
from dfusion.adapter_files import UNET, AdaptedLayer, AdapterLayout, read_layout
from dfusion.config import GROUPS, LoraConfig
from dfusion.errors import AdapterError, CheckpointError, InvalidInputError
from dfusion.files import read_tensors, write_tensors, write_whole
from dfusion.lora_layers import LayerSettings, Shapes, adapted_layers, groups_of
from dfusion.lora_linear import use_fast_layers
from dfusion.text_encoder_lora import (
    MergedTextLayers,
    TextLayers,
    diffusers_settings,
    diffusers_tensors,
    read_text_layers,
)

METADATA_KEY = "dfusion"
ADAPTER = "default"
"""The adapter's name in peft."""
_MERGED = "dfusion_text_encoders"
"""The U-Net's attribute with the parts of text encoders that belong to its adapter."""
_PEFT_INIT: Mapping[str, str | bool] = {"gaussian": "gaussian", "kaiming": True}
"""peft's name of each initialisation, as stored in the adapter's metadata."""


def attach_lora(unet: UNet2DConditionModel, config: LoraConfig = LoraConfig(), seed: int = 0) -> None:
    """Attach a new trainable adapter to `unet`, by default to all attention layers, and freeze everything else.

    The first matrix, A (down), is initialised from `seed` according to `config.init`. The second, B (up), is 0, so the
    adapter has no effect at first. Both are float32 for any dtype of the U-Net, since half precision would round
    updates away. An attached adapter is replaced.

    Args:
        unet: The U-Net to change in place.
        config: The adapted layers, their ranks and alphas, and the initialisation. `dropout` applies in trainings.
        seed: Seed of A.

    Raises:
        LoraSettingError: The U-Net has no layers of these names (it then has no adapter).
    """
    detach(unet)
    layers = adapted_layers(shapes_of(unet), config)
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft uses the global generator; its values are overwritten below
        unet.add_adapter(_peft_config(config, layers))
    use_fast_layers(unet)

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(lora_parameters(unet).items()):
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            weight = torch.empty(parameter.shape)
            _initialise(weight, config, generator)
            parameter.data.copy_(weight)


def _peft_config(config: LoraConfig, layers: Mapping[str, LayerSettings]) -> peft.LoraConfig:
    """peft's settings. Groups are named by the ends of their layers' names, other targets and patterns in full."""
    only_groups = GROUPS.keys() >= set(config.targets)
    ends = [end for target in config.targets if only_groups for end in GROUPS[target]]
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        init_lora_weights=_PEFT_INIT[config.init],
        target_modules=ends or list(layers),
        rank_pattern={name: layer.rank for name, layer in layers.items() if layer.rank != config.rank},
        alpha_pattern={name: layer.alpha for name, layer in layers.items() if layer.alpha != config.alpha},
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def shapes_of(network: nn.Module) -> Shapes:
    """The shapes of the parameters of a U-Net or text encoder by name, without an adapter."""
    shapes = {}
    for name, parameter in network.named_parameters():
        if ".lora_" not in name:
            shapes[name.replace(".base_layer.", ".")] = tuple(parameter.shape)
    return shapes


def _initialise(weight: torch.Tensor, config: LoraConfig, generator: torch.Generator) -> None:
    """Fill A, (rank, in), in place: Gaussian with standard deviation 1/rank, or Kaiming-uniform, bound 1/sqrt(in)."""
    if config.init == "gaussian":
        weight.normal_(std=1 / len(weight), generator=generator)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def detach(unet: UNet2DConditionModel) -> None:
    """Detach the adapter, which restores the base model with its text encoders. Does nothing without an adapter."""
    if has_lora(unet):
        unet.unload_lora()
    merged = unet.__dict__.pop(_MERGED, None)
    if merged is not None:
        merged.undo()


def has_lora(unet: UNet2DConditionModel) -> bool:
    """Whether an adapter is attached."""
    return bool(getattr(unet, "peft_config", None))


def lora_config(unet: UNet2DConditionModel) -> LoraConfig:
    """The settings of the attached adapter. Raises InvalidInputError without one from dfusion."""
    adapters = getattr(unet, "peft_config", None) or {}
    if ADAPTER not in adapters:
        raise InvalidInputError(f"unet: expected an adapter by attach_lora or load_adapter, got {sorted(adapters)}")
    settings = adapters[ADAPTER]
    layers = {name for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
    return LoraConfig(
        rank=settings.r,
        alpha=settings.lora_alpha,
        init=_init_of(settings.init_lora_weights),
        targets=groups_of(shapes_of(unet), layers) or tuple(sorted(layers)),
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def lora_layers(unet: UNet2DConditionModel) -> dict[str, LayerSettings]:
    """The layers of the attached adapter by name. Raises InvalidInputError without an adapter from dfusion."""
    return adapted_layers(shapes_of(unet), lora_config(unet))


def _init_of(init_lora_weights: object) -> Literal["gaussian", "kaiming"]:
    """The initialisation, by peft's name."""
    return "gaussian" if init_lora_weights == "gaussian" else "kaiming"


def lora_parameters(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name. Raises InvalidInputError without an adapter."""
    parameters = {name: parameter for name, parameter in unet.named_parameters() if ".lora_" in name}
    if not parameters:
        raise InvalidInputError("unet: expected an attached LoRA adapter, got none; see attach_lora")
    return parameters


@contextmanager
def weights_as(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give the parameters these weights, by name, within the context.

    A forward pass and its backward pass must both be inside the context or both outside.
    """
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


@contextmanager
def without_effect(unet: UNet2DConditionModel) -> Iterator[None]:
    """Use the base model within the context, without gradients of the adapter."""
    layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def lora_dropout(unet: UNet2DConditionModel, share: float, seed: int) -> Iterator[None]:
    """Leave out a random share of the inputs of A within the context, from `seed`. 0 changes nothing."""
    if share == 0:
        yield
        return

    layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    own = [layer.lora_dropout[ADAPTER] for layer in layers]
    device = next(unet.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # nn.Dropout takes no generator
        try:
            for layer in layers:
                layer.lora_dropout[ADAPTER] = nn.Dropout(share)
                layer.train()
            yield
        finally:
            for layer, dropout in zip(layers, own, strict=True):
                layer.lora_dropout[ADAPTER] = dropout
                layer.train(unet.training)


def save_adapter(unet: UNet2DConditionModel, file: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write the adapter as safetensors that `load_lora_weights` of stock pipelines loads. The write is atomic.

    The file includes the parts of text encoders that `load_adapter` loaded. Equal adapters and metadata give equal
    bytes.

    Args:
        unet: The U-Net with the adapter.
        file: The file to write.
        metadata: Texts to store in the file. `load_adapter` returns them.

    Raises:
        InvalidInputError: The U-Net has no adapter.

    Example:
        >>> from dfusion import MODELS, DiffusionModel, attach_lora, save_adapter
        >>> model = DiffusionModel.load(MODELS["shapes"].folder)
        >>> attach_lora(model.unet)
        >>> save_adapter(model.unet, "adapter.safetensors", {"round": "1"})
    """
    lora_config(unet)

    settings = {}
    for key, value in unet.peft_config[ADAPTER].to_dict().items():
        settings[UNET + key] = sorted(value) if isinstance(value, set) else value
    merged: MergedTextLayers | None = getattr(unet, _MERGED, None)
    text_layers = {} if merged is None else merged.layers
    settings |= diffusers_settings(text_layers)
    about = {
        LORA_ADAPTER_METADATA_KEY: json.dumps(settings, sort_keys=True),
        METADATA_KEY: json.dumps(dict(metadata or {}), sort_keys=True),
        "format": "pt",
    }

    def write(temporary: Path) -> None:
        StableDiffusionPipeline.save_lora_weights(
            temporary.parent,
            unet_lora_layers=_stored_weights(unet),
            weight_name=temporary.name,
            save_function=lambda weights, path: write_tensors(
                Path(path), {**weights, **diffusers_tensors(text_layers)}, about
            ),
        )

    write_whole(Path(file), write)


def _stored_weights(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The adapter's weights by the keys of a file: diffusers' if these exist for all layers, otherwise peft's.

    Diffusers has own keys for attention only. It takes the format of a file from its first key, so a file with both
    would be loaded in part.
    """
    by_peft: dict[str, torch.Tensor] = get_peft_model_state_dict(unet)
    converted: dict[str, torch.Tensor] = convert_state_dict_to_diffusers(by_peft)
    return by_peft if any(".lora_A." in key for key in converted) else converted


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter's file.

    weights       of the U-Net, by peft's names without a prefix, "down_blocks.0. ... .to_q.lora_A.weight"; (rank, in)
                  and (out, rank)
    layers        the rank and alpha of each layer of the U-Net
    config        the settings; the initialisation is Kaiming, peft's default, if the file does not have it
    metadata      the metadata passed to `save_adapter`
    text_encoders the parts of text encoders
    """

    weights: Mapping[str, torch.Tensor]
    layers: Mapping[str, AdaptedLayer]
    config: LoraConfig
    metadata: Mapping[str, str]
    text_encoders: TextLayers


def read_adapter(file: Path, per_block: int = 2) -> AdapterFile:
    """Read an adapter of the U-Net, and of text encoders, in the format of diffusers, PEFT or kohya.

    The ranks come from the weights. Alphas come from the file or, for PEFT, from adapter_config.json next to it. The
    alpha of a layer without one is its rank, as in diffusers.

    Args:
        file: The file, or its folder.
        per_block: Layers of each block of the U-Net, on which names of SDXL's layers in kohya's files depend.

    Raises:
        AdapterError: A file that is damaged, another kind of adapter, or one without layers of the U-Net.
    """
    return _read(read_layout(file, per_block))


def _read(layout: AdapterLayout, shapes: Shapes | None = None) -> AdapterFile:
    tensors, _ = read_tensors(layout.file)
    weights = {}
    for name, layer in layout.layers.items():
        weights[f"{name}.lora_A.weight"] = tensors[layer.down]
        weights[f"{name}.lora_B.weight"] = tensors[layer.up]
        if layer.magnitude is not None:
            weights[f"{name}.lora_magnitude_vector"] = tensors[layer.magnitude]

    try:
        metadata = dict(json.loads(layout.metadata.get(METADATA_KEY, "{}")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{layout.file}: expected the metadata of an adapter: {error!r}") from error
    text_layers = read_text_layers(layout, tensors)
    return AdapterFile(weights, layout.layers, layout.config(shapes), metadata, text_layers)


def load_adapter(
    unet: UNet2DConditionModel, file: Path | str, text_encoders: Mapping[str, nn.Module] | None = None
) -> dict[str, str]:
    """Attach the adapter of a file, ready for training. It replaces an attached adapter.

    Parts of text encoders are merged into the encoders' weights until `detach`. They are not trained, and
    `save_adapter` writes them again.

    Args:
        unet: The U-Net to change in place.
        file: A file by `save_adapter`, or another adapter of the U-Net in the format of diffusers, PEFT or kohya, or
            its folder.
        text_encoders: The pipeline's text encoders, as `DiffusionModel.text_encoders`, to change in place. None
            refuses files with parts for them.

    Returns:
        The metadata passed to `save_adapter`.

    Raises:
        AdapterError: The file is damaged, is another kind of adapter, has no layers of the U-Net, has parts of text
            encoders that are not given, or does not fit the networks (the U-Net then has no adapter). The message
            names the kind or the first key.

    Example:
        >>> from dfusion import MODELS, DiffusionModel, attach_lora, load_adapter, save_adapter
        >>> model = DiffusionModel.load(MODELS["shapes"].folder)
        >>> attach_lora(model.unet)
        >>> save_adapter(model.unet, "adapter.safetensors", {"round": "1"})
        >>> load_adapter(model.unet, "adapter.safetensors")
        {'round': '1'}
    """
    detach(unet)
    per_block = unet.config.layers_per_block
    layout = read_layout(Path(file), per_block if isinstance(per_block, int) else max(per_block))
    shapes = shapes_of(unet)
    layout.require_fit(shapes)
    _require_text_encoders(layout, text_encoders)
    adapter = _read(layout, shapes)
    attach_lora(unet, adapter.config)

    for name, parameter in lora_parameters(unet).items():
        weight = adapter.weights[name.replace(f".{ADAPTER}.weight", "" if "magnitude" in name else ".weight")]
        parameter.data.copy_(weight.reshape(parameter.shape))
    if text_encoders and adapter.text_encoders:
        setattr(unet, _MERGED, MergedTextLayers(adapter.text_encoders, text_encoders))
    return dict(adapter.metadata)


def _require_text_encoders(layout: AdapterLayout, text_encoders: Mapping[str, nn.Module] | None) -> None:
    """Raise AdapterError unless the file's parts of text encoders can be loaded into these."""
    if text_encoders is None:
        for layers in layout.text_encoders.values():
            key = next(iter(layers.values())).down
            raise AdapterError(f"{layout.file}: expected text_encoders for parts of a text encoder ({key}), got none")
        return
    layout.require_text_encoders({name: shapes_of(encoder) for name, encoder in text_encoders.items()})
