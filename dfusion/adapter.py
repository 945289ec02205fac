"""The LoRA adapter on the U-Net's attention, by peft, in files that stock diffusers loads."""

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
    StableDiffusionPipeline,
    UNet2DConditionModel,
    convert_state_dict_to_diffusers,
    convert_unet_state_dict_to_peft,
    get_peft_model_state_dict,
    peft,
    set_peft_model_state_dict,
)
from dfusion.config import LoraConfig
from dfusion.errors import CheckpointError, InvalidInputError
from dfusion.files import read_tensors, write_tensors, write_whole

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The adapted projections of every attention layer."""
METADATA_KEY = "dfusion"
ADAPTER = "default"
"""The adapter's name in peft."""
_PREFIX = "unet."
_PEFT_INIT: Mapping[str, str | bool] = {"gaussian": "gaussian", "kaiming": True}
"""peft's name of each initialisation, as stored in the adapter's metadata."""


def attach_lora(unet: UNet2DConditionModel, config: LoraConfig = LoraConfig(), seed: int = 0) -> None:
    """Attach a new trainable adapter to all attention layers of `unet`, and freeze everything else.

    The first matrix, A (down), is initialised from `seed` according to `config.init`. The second, B (up), is 0, so the
    adapter has no effect at first. Both are float32 for any dtype of the U-Net, since half precision would round
    updates away. An attached adapter is replaced.

    Args:
        unet: The U-Net to change in place.
        config: Rank, alpha and initialisation.
        seed: Seed of A.
    """
    detach(unet)
    unet.requires_grad_(False)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        init_lora_weights=_PEFT_INIT[config.init],
        target_modules=list(TARGETS),
    )
    with torch.random.fork_rng(devices=[]):  # peft uses the global generator; its values are overwritten below
        unet.add_adapter(settings)

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(lora_parameters(unet).items()):
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            weight = torch.empty(parameter.shape)
            _initialise(weight, config, generator)
            parameter.data.copy_(weight)


def _initialise(weight: torch.Tensor, config: LoraConfig, generator: torch.Generator) -> None:
    """Fill A, (rank, in), in place: Gaussian with standard deviation 1/rank, or Kaiming-uniform, bound 1/sqrt(in)."""
    if config.init == "gaussian":
        weight.normal_(std=1 / config.rank, generator=generator)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def detach(unet: UNet2DConditionModel) -> None:
    """Detach the adapter, which restores the base model. Does nothing without an adapter."""
    if has_lora(unet):
        unet.unload_lora()


def has_lora(unet: UNet2DConditionModel) -> bool:
    """Whether an adapter is attached."""
    return bool(getattr(unet, "peft_config", None))


def lora_config(unet: UNet2DConditionModel) -> LoraConfig:
    """Rank, alpha and initialisation of the attached adapter. Raises InvalidInputError without one from dfusion."""
    adapters = getattr(unet, "peft_config", None) or {}
    if ADAPTER not in adapters:
        raise InvalidInputError(f"unet: expected an adapter by attach_lora or load_adapter, got {sorted(adapters)}")
    settings = adapters[ADAPTER]
    return LoraConfig(rank=settings.r, alpha=settings.lora_alpha, init=_init_of(settings.init_lora_weights))


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


def save_adapter(unet: UNet2DConditionModel, file: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write the adapter as safetensors that `load_lora_weights` of stock pipelines loads. The write is atomic.

    Equal adapters and metadata give equal bytes.

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
        settings[_PREFIX + key] = sorted(value) if isinstance(value, set) else value
    about = {
        LORA_ADAPTER_METADATA_KEY: json.dumps(settings, sort_keys=True),
        METADATA_KEY: json.dumps(dict(metadata or {}), sort_keys=True),
        "format": "pt",
    }

    def write(temporary: Path) -> None:
        StableDiffusionPipeline.save_lora_weights(
            temporary.parent,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
            weight_name=temporary.name,
            save_function=lambda weights, path: write_tensors(Path(path), weights, about),
        )

    write_whole(Path(file), write)


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter's file.

    weights   by peft's names without a prefix, "down_blocks.0. ... .to_q.lora_A.weight"; (rank, in) and (out, rank)
    config    rank, alpha, and the initialisation if the file has it (otherwise Kaiming, peft's default)
    metadata  the metadata passed to `save_adapter`
    """

    weights: Mapping[str, torch.Tensor]
    config: LoraConfig
    metadata: Mapping[str, str]


def read_adapter(file: Path) -> AdapterFile:
    """Read an adapter that `save_adapter` wrote, or another one in diffusers' format for the U-Net.

    The rank comes from the weights. Alpha comes from the file's metadata; without it, alpha is the rank, as in
    diffusers. Raises CheckpointError for a file that is damaged or has no adapter of a single rank.
    """
    tensors, about = read_tensors(file)
    weights = {key.removeprefix(_PREFIX): value for key, value in tensors.items() if key.startswith(_PREFIX)}
    weights = convert_unet_state_dict_to_peft(weights)
    ranks = {value.shape[0] for key, value in weights.items() if ".lora_A." in key}
    if len(ranks) != 1:
        raise CheckpointError(f"{file}: expected an adapter of one rank, got ranks {sorted(ranks)}")
    (rank,) = ranks

    try:
        settings = json.loads(about.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        config = LoraConfig(
            rank=rank,
            alpha=settings.get(f"{_PREFIX}lora_alpha", rank),
            init=_init_of(settings.get(f"{_PREFIX}init_lora_weights")),
        )
        return AdapterFile(weights, config, json.loads(about.get(METADATA_KEY, "{}")))
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f"{file}: expected the metadata of an adapter: {error!r}") from error


def load_adapter(unet: UNet2DConditionModel, file: Path | str) -> dict[str, str]:
    """Attach the adapter of a file, ready for training. It replaces an attached adapter.

    Args:
        unet: The U-Net to change in place.
        file: A file by `save_adapter`, or another adapter in diffusers' format.

    Returns:
        The metadata passed to `save_adapter`.

    Raises:
        CheckpointError: The file is damaged, or does not fit the U-Net (which then has no adapter).

    Example:
        >>> from dfusion import MODELS, DiffusionModel, attach_lora, load_adapter, save_adapter
        >>> model = DiffusionModel.load(MODELS["shapes"].folder)
        >>> attach_lora(model.unet)
        >>> save_adapter(model.unet, "adapter.safetensors", {"round": "1"})
        >>> load_adapter(model.unet, "adapter.safetensors")
        {'round': '1'}
    """
    adapter = read_adapter(Path(file))
    attach_lora(unet, adapter.config)

    expected = {name: value.shape for name, value in get_peft_model_state_dict(unet).items()}
    if expected != {name: value.shape for name, value in adapter.weights.items()}:
        detach(unet)
        raise CheckpointError(f"{file}: the adapter does not fit the attention layers of this U-Net")
    set_peft_model_state_dict(unet, dict(adapter.weights))
    return dict(adapter.metadata)
