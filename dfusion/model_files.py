"""The files of a pipeline, checked before they are loaded. Without torch.

Whatever the library cannot run is refused here by name: other pipelines, schedulers, text encoders and VAEs, parts that
do not fit together, and weights that are missing or damaged. A service uses the same check before it accepts a job.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfusion.errors import ModelNotFoundError, UnsupportedModelError, shortened
from dfusion.noise_schedules import DDIM, require_ddim
from dfusion.single_files import pickle_conversion, refuse_file, refuse_folder
from dfusion.weight_files import find_variant

SD = "StableDiffusionPipeline"
SDXL = "StableDiffusionXLPipeline"
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_CLASSES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    SD: {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": _TOKENIZERS,
    },
    SDXL: {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer": _TOKENIZERS,
        "tokenizer_2": _TOKENIZERS,
    },
}
"""The supported pipelines with the classes of their parts, as in model_index.json."""
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
"""The names of weights files; "model" for text encoders."""
_OTHER_INPUTS = {5: "depth maps", 7: "a low-resolution image", 8: "an image to edit", 9: "a mask (inpainting)"}
_UNUSED_CONDITIONS: Mapping[str, object] = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_type": "default",
    "dual_cross_attention": False,
}
"""Settings of a U-Net that need inputs other than a prompt, with the value that does not."""
_STOCK_SCHEDULE: Mapping[str, object] = {"steps_offset": 1, "clip_sample": False}
"""Settings of the scheduler that diffusers' StableDiffusionPipeline changes to these values."""
_LAYOUTS = {768: "SD 1.x", 1024: "SD 2.x"}
"""Names of Stable Diffusion's layouts by the width of the text encoder."""
_CLIP_DEFAULTS = {"hidden_size": 512, "projection_dim": 512, "vocab_size": 49408, "max_position_embeddings": 77}
"""Defaults of transformers' CLIPTextConfig."""


@dataclass(frozen=True)
class ModelFiles:
    """A pipeline whose files are complete and fit together.

    layout      "SD 1.x", "SD 2.x", "SDXL", or "other" with the text encoder's width
    pipeline    its class
    scheduler   the class of the folder's scheduler; DDIM is used instead
    schedule    the content of scheduler_config.json, with the changes that the stock pipeline makes
    empty_is_zero  whether the empty prompt is embedded as zeros
    variants    the variant of each part's weights, such as "fp16"; None for full precision
    notes       what is replaced, left out or unusual, for people
    """

    layout: str
    pipeline: str
    scheduler: str
    schedule: Mapping[str, Any]
    empty_is_zero: bool
    variants: Mapping[str, str | None]
    notes: tuple[str, ...]


def check_files(folder: Path) -> ModelFiles:
    """Check that a folder has a pipeline that Eq. 1 can run. Reads configs and the headers of weights only.

    Raises:
        ModelNotFoundError: No pipeline, or parts are missing or damaged. The message names the file.
        UnsupportedModelError: A pipeline that the library cannot run. The message names the part and the cause.
    """
    require_pipeline(folder)
    index = _read(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in _CLASSES:
        raise UnsupportedModelError(f"{folder}: {_other_pipeline(pipeline)}")

    # 1. its parts and their classes
    classes = {part: _class_of(folder, index, part) for part in (*_CLASSES[pipeline], "scheduler")}
    for part, expected in _CLASSES[pipeline].items():
        if classes[part] not in expected:
            raise UnsupportedModelError(f"{folder}: {part}: expected a {expected[0]}, got a {classes[part]}")
    for part in classes:
        if not (folder / part).is_dir():
            raise ModelNotFoundError(f"{folder}: {part}: expected a folder with this part, got none")

    # 2. the scheduler
    schedule = _read(folder / "scheduler" / "scheduler_config.json")
    own_name = schedule.get("_class_name", classes["scheduler"])
    try:
        require_ddim(schedule, (classes["scheduler"], str(own_name)))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{folder}: {error}") from error

    # 3. the networks fit together
    parts = {part: _read(folder / part / "config.json") for part in classes if part in _STEMS or "encoder" in part}
    encoders = {part: _text_config(config) for part, config in parts.items() if "encoder" in part}
    try:
        _require_unet(parts["unet"], parts["vae"], xl=pipeline == SDXL)
        _require_widths(parts["unet"], list(encoders.values()))
        _require_vae(parts["vae"])
        lengths = [_require_tokenizer(folder, part, encoders[part]) for part in encoders]
        if len(set(lengths)) > 1:
            raise UnsupportedModelError(f"tokenizers: expected one model_max_length, got {lengths}")
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{folder}: {error}") from error

    # 4. the weights
    advice = pickle_conversion(folder, pipeline)
    variants = {part: find_variant(folder / part, _STEMS.get(part, "model"), advice) for part in parts}

    width = encoders["text_encoder"]["hidden_size"]
    layout = "SDXL" if pipeline == SDXL else _LAYOUTS.get(width, f"other (text encoder of width {width})")
    notes = tuple(_notes(index, classes, schedule, variants))
    empty_is_zero = pipeline == SDXL and bool(index.get("force_zeros_for_empty_prompt", True))
    if pipeline == SD:
        schedule = {**schedule, **_STOCK_SCHEDULE}
    return ModelFiles(layout, pipeline, classes["scheduler"], schedule, empty_is_zero, variants, notes)


def require_pipeline(path: Path) -> None:
    """Raise ModelNotFoundError or UnsupportedModelError without a model_index.json, naming what is there instead."""
    if os.path.isfile(path):
        raise refuse_file(path)
    if not os.path.isfile(path / "model_index.json"):  # False for a folder that cannot be read
        raise refuse_folder(path)


def _other_pipeline(name: object) -> str:
    message = f"expected a {SD} or {SDXL}, got a {name}"
    if isinstance(name, str) and "Consistency" in name:
        return f"{message}: a distilled few-step model is not a policy of Eq. 1"
    return message


def _read(file: Path) -> Mapping[str, Any]:
    """The JSON object in a file. Raises ModelNotFoundError."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{file}: expected this file, got none") from error
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{file}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelNotFoundError(f"{file}: expected a JSON object, got {shortened(content)}")
    return content


def _class_of(folder: Path, index: Mapping[str, Any], part: str) -> str:
    """The class of a part, as the index names it. Raises ModelNotFoundError."""
    named = index.get(part)
    if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
        return named[1]
    raise ModelNotFoundError(
        f"{folder}: {part}: expected its library and class in model_index.json, got {shortened(named)}"
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a text encoder, with transformers' defaults. It may be a part of CLIP's."""
    nested = config.get("text_config")
    own = nested if isinstance(nested, dict) and "hidden_size" not in config else config
    return {**_CLIP_DEFAULTS, **own}


def _require_unet(unet: Mapping[str, Any], vae: Mapping[str, Any], *, xl: bool) -> None:
    """Latents of the VAE, a size, and no condition other than the prompt."""
    latent_channels = vae.get("latent_channels", 4)
    channels = unet.get("in_channels", 4)
    if channels != latent_channels:
        other = _OTHER_INPUTS.get(channels) if isinstance(channels, int) else None
        purpose = f": it also takes {other}" if other else ""
        raise UnsupportedModelError(
            f"unet: in_channels: expected the VAE's {latent_channels} latent channels, got"
            f" {shortened(channels)}{purpose}"
        )
    if unet.get("out_channels", 4) != channels:
        raise UnsupportedModelError(
            f"unet: out_channels: expected {channels} as in_channels, got {shortened(unet['out_channels'])}"
        )

    size = unet.get("sample_size")
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise UnsupportedModelError(
            f"unet: sample_size: expected the size of its latents in config.json, got {shortened(size)}"
        )

    if unet.get("time_cond_proj_dim") is not None:
        raise UnsupportedModelError(
            "unet: time_cond_proj_dim: the guidance scale is distilled into this U-Net (LCM); a distilled few-step"
            " model is not a policy of Eq. 1"
        )

    for name, unused in _UNUSED_CONDITIONS.items():
        if unet.get(name, unused) != unused:
            raise UnsupportedModelError(f"unet: {name}: expected {unused}, got {shortened(unet[name])}")
    expected = "text_time" if xl else None
    if unet.get("addition_embed_type") != expected:
        raise UnsupportedModelError(
            f"unet: addition_embed_type: expected {expected}, got {shortened(unet.get('addition_embed_type'))}"
        )


def _require_widths(unet: Mapping[str, Any], encoders: Sequence[Mapping[str, Any]]) -> None:
    """The text encoders' embeddings fit the U-Net's cross-attention."""
    widths = [encoder["hidden_size"] for encoder in encoders]
    cross = unet.get("cross_attention_dim", 1280)
    of_blocks = cross if isinstance(cross, list) else [cross]
    whole = all(isinstance(width, int) for width in widths)
    if not whole or any(width != sum(widths) for width in of_blocks):
        encoder = "text_encoder" if len(widths) == 1 else "text encoders"
        raise UnsupportedModelError(
            f"{encoder}: expected embeddings of the width {shortened(cross)} of the U-Net's cross-attention, got"
            f" {' + '.join(map(str, widths))}"
        )
    if len(encoders) == 1:
        return

    embedding = unet.get("addition_time_embed_dim")
    pooled = encoders[1]["projection_dim"]
    expected = 6 * embedding + pooled if isinstance(embedding, int) and isinstance(pooled, int) else None
    if unet.get("projection_class_embeddings_input_dim") != expected:
        raise UnsupportedModelError(
            f"unet: projection_class_embeddings_input_dim: expected {expected}, six time ids of {embedding} and pooled"
            f" embeddings of {pooled}, got {unet.get('projection_class_embeddings_input_dim')}: SDXL's base has these"
            " conditions, its refiner has others"
        )


def _require_vae(vae: Mapping[str, Any]) -> None:
    """Latents are scaled by one factor."""
    factor = vae.get("scaling_factor", 0.18215)
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < float("inf"):
        raise UnsupportedModelError(f"vae: scaling_factor: expected a positive number, got {shortened(factor)}")
    for name in ("latents_mean", "latents_std"):
        if vae.get(name) is not None:
            raise UnsupportedModelError(f"vae: {name}: expected a VAE with a scaling_factor only, got {name}")


def _require_tokenizer(folder: Path, encoder_part: str, encoder: Mapping[str, Any]) -> int:
    """The tokenizer of a text encoder has its files, a length and ids that the encoder has. Returns the length."""
    part = encoder_part.replace("text_encoder", "tokenizer")
    files = folder / part
    if not (files / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (files / name).is_file():
                raise ModelNotFoundError(f"{files / name}: expected this file, got none")

    # 1. its length
    length = _read(files / "tokenizer_config.json").get("model_max_length")
    most = encoder["max_position_embeddings"]
    if not isinstance(length, int) or not isinstance(most, int) or not 2 < length <= most:
        raise UnsupportedModelError(
            f"{part}: model_max_length: expected 3 to {shortened(most)} (max_position_embeddings of {encoder_part}),"
            f" got {shortened(length)}"
        )

    # 2. its ids
    largest = max(_token_ids(files), default=-1)
    count = encoder["vocab_size"]
    if not isinstance(count, int) or not 0 <= largest < count:
        raise UnsupportedModelError(
            f"{part}: expected token ids below {shortened(count)} (vocab_size of {encoder_part}), got {largest}"
        )
    return length


def _token_ids(files: Path) -> list[int]:
    """The ids of a tokenizer's vocabulary."""
    single_file = files / "tokenizer.json"
    try:
        if not single_file.is_file():
            return list(map(int, _read(files / "vocab.json").values()))
        content = _read(single_file)
        added = [int(token["id"]) for token in content.get("added_tokens", [])]
        return [*map(int, content["model"]["vocab"].values()), *added]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ModelNotFoundError(f"{files}: expected the vocabulary of a CLIP tokenizer: {error!r}") from error


def _notes(
    index: Mapping[str, Any],
    classes: Mapping[str, str],
    schedule: Mapping[str, Any],
    variants: Mapping[str, str | None],
) -> list[str]:
    notes = []
    if classes["scheduler"] != DDIM:
        notes.append(f"sampled by DDIM (Eq. 1) with the betas of the {classes['scheduler']}")
    for variant in sorted({variant for variant in variants.values() if variant is not None}):
        parts = ", ".join(part for part, of_part in variants.items() if of_part == variant)
        notes.append(f"only {variant} weights of {parts}: loaded, and cast to the model's precision")
    if index["_class_name"] == SD:
        for name, value in _STOCK_SCHEDULE.items():
            if schedule.get(name, value) != value:
                notes.append(f"scheduler: {name} is {value}, as in diffusers' {SD}, not {schedule[name]}")
    if schedule.get("rescale_betas_zero_snr") and schedule.get("timestep_spacing") != "trailing":
        notes.append("zero-terminal-SNR betas need timestep_spacing trailing, else sampling starts below full noise")

    unused = [part for part, named in index.items() if part not in classes and isinstance(named, list) and any(named)]
    if unused:
        notes.append(f"not used: {', '.join(sorted(unused))}")
    return notes
