"""Paths that are not a pipeline's folder: what they are, and what to do with them. Without torch."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from dfusion.errors import ModelNotFoundError, UnsupportedModelError
from dfusion.weight_files import read_header

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_ADAPTER_MARKS = ("lora_", ".lora.", "hada_", "lokr_", "dora_scale")
_UNET = "model.diffusion_model."
_SDXL = "conditioner.embedders.1."
_SDXL_REFINER = "conditioner.embedders.0.model."
_SD = "cond_stage_model."
_OTHERS = {
    "double_blocks.": "a Flux transformer",
    "joint_blocks.": "a Stable Diffusion 3 transformer",
    "transformer_blocks.": "a transformer",
}


def conversion_command(file: Path, pipeline: str) -> str:
    """The command that converts a single-file checkpoint to a folder next to it. It gets configs from the model hub."""
    folder = str(file.with_suffix(""))
    code = f"from dfusion.models import {pipeline} as P; P.from_single_file({str(file)!r}).save_pretrained({folder!r})"
    return f"python -c {shlex.quote(code)}"


def pickle_conversion(folder: Path, pipeline: str) -> str:
    """Advice for a folder whose weights are pickles."""
    converted = folder.with_name(f"{folder.name}-safetensors")
    code = (
        f"from dfusion.models import {pipeline} as P;"
        f" P.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained({str(converted)!r})"
    )
    return f"If you trust its source, convert it: python -c {shlex.quote(code)}"


def refuse_file(file: Path) -> ModelNotFoundError:
    """The error for a file instead of a folder: it names what the file contains."""
    expected = f"{file}: expected a folder in diffusers' layout"
    if file.suffix.lower() in _PICKLES:
        return UnsupportedModelError(
            f"{expected}, got a pickle, which can run code and is never loaded. If you trust its source, convert it:"
            f" {conversion_command(file, 'StableDiffusionPipeline')} (StableDiffusionXLPipeline for SDXL)"
        )
    if file.suffix.lower() != ".safetensors":
        return UnsupportedModelError(f"{expected}, got a file")

    try:
        names = read_header(file)
    except ModelNotFoundError as error:
        return error
    return UnsupportedModelError(f"{expected}, got {_content(file, names)}")


def _content(file: Path, names: Iterable[str]) -> str:
    """What a safetensors file contains, by the names of its tensors, and what to do with it."""
    names = list(names)
    if any(mark in name for mark in _ADAPTER_MARKS for name in names):
        return "an adapter: name its base model, and load the adapter on it"
    for part, kind in _OTHERS.items():
        if any(name.removeprefix(_UNET).startswith(part) for name in names):
            return f"{kind}, which is not a U-Net of Stable Diffusion"
    if any(name.startswith(_UNET) for name in names):
        if any(name.startswith(_SDXL) for name in names):
            pipeline = "StableDiffusionXLPipeline"
        elif any(name.startswith(_SD) for name in names):
            pipeline = "StableDiffusionPipeline"
        elif any(name.startswith(_SDXL_REFINER) for name in names):
            return "SDXL's refiner, which needs inputs other than a prompt"
        else:
            return "a U-Net without its text encoder and VAE"
        return f"a single-file checkpoint. Convert it: {conversion_command(file, pipeline)}"
    return "weights of another kind, such as a single part of a pipeline"


def refuse_folder(folder: Path) -> ModelNotFoundError:
    """The error for a folder without model_index.json: it names what the folder contains instead."""
    expected = f"expected a diffusers pipeline at {folder}, got no model_index.json"
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        return ModelNotFoundError(f"{expected}: {error}")

    # os.path: an unreadable subfolder, such as lost+found, has no such file
    if os.path.isfile(folder / "adapter_config.json"):
        return UnsupportedModelError(f"{expected}, but an adapter of PEFT: name its base model")
    if (kind := _part(folder / "config.json")) is not None:
        return UnsupportedModelError(f"{expected}, but a {kind}: name the folder of the whole pipeline")
    for child in children:
        if os.path.isfile(child / "model_index.json"):
            return ModelNotFoundError(f"{expected}; there is one in {child}")
    for child in children:
        if child.suffix.lower() in (".safetensors", *_PICKLES):
            refusal = refuse_file(child)
            return type(refusal)(f"{expected}; {refusal}")
    return ModelNotFoundError(expected)


def _part(config: Path) -> str | None:
    """The class of a single part, from its config."""
    try:
        content = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    names = [content.get("_class_name"), *(content.get("architectures") or [])]
    return next((name for name in names if isinstance(name, str)), None)
