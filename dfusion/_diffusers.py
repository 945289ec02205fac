"""All imports from diffusers and peft, and of transformers' text encoders and tokenizer.

No other module of this library imports diffusers or peft. All three import torchvision, which fails with a CPU-only
torch unless `_torchvision_ops` was imported first.
"""

from __future__ import annotations

from typing import Any

import dfusion._torchvision_ops  # noqa: F401

# isort: split
import diffusers
import peft
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

__all__ = [
    "LORA_ADAPTER_METADATA_KEY",
    "Attention",
    "AttnProcessor2_0",
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "DDIMScheduler",
    "LoraLayer",
    "LoraLinear",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "Transformer2DModel",
    "UNet2DConditionModel",
    "convert_state_dict_to_diffusers",
    "disable_progress_bar",
    "get_peft_model_state_dict",
    "peft",
    "scheduler_class",
]


def scheduler_class(name: str) -> Any:
    """A scheduler's class. Its constructor raises ImportError if a package that it needs is missing."""
    return getattr(diffusers, name)
