"""Export adapters in formats that other programs read. Each export is verified by reloading it in stock diffusers.

diffusers  one file, LoRA as `load_lora_weights` reads it
kohya      one file, LoRA in the keys of kohya's trainer, as ComfyUI and A1111 (and `load_lora_weights`) read them
merged     a folder, the whole pipeline with the adapter in the U-Net's weights
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError

from dfusion.adapter import METADATA_KEY, AdapterFile, detach, load_adapter, read_adapter, save_adapter
from dfusion.adapter_files import read_layout
from dfusion.errors import DFusionError, ExportError, InvalidInputError
from dfusion.files import write_tensors, write_whole
from dfusion.models import Pipeline, load_pipeline
from dfusion.sources import locate

ExportFormat = Literal["diffusers", "kohya", "merged"]
TOLERANCE = 1 / 255
"""The largest difference of two images, in [0, 1], that count as equal."""
ROUNDING = 1e-5
"""The largest difference due to floating-point rounding, for adapters with almost no effect."""


@dataclass(frozen=True)
class ImageCheck:
    """The image that verifies an export: the pipeline's own scheduler, float32, the U-Net's own size."""

    prompt: str = "a red circle"
    seed: int = 0
    num_steps: int = 4
    guidance_scale: float = 5.0


@dataclass(frozen=True)
class ExportReport:
    """The result of an export's verification, as largest differences of images in [0, 1].

    difference  between the image with the adapter and the image with the export
    effect      between the image with the adapter and the image without it; at least twice the difference, unless the
                difference is within ROUNDING, so that an export without the adapter cannot pass
    """

    difference: float
    effect: float


def export_adapter(
    model: Path | str,
    adapter: Path,
    path: Path,
    form: ExportFormat,
    *,
    device: str = "cpu",
    check: ImageCheck = ImageCheck(),
) -> ExportReport:
    """Write an adapter to `path` in the given form, in float32.

    The export is reloaded into a new stock pipeline. It must render the same image as the adapter, within TOLERANCE and
    half the adapter's own effect.

    Args:
        model: The base model that the adapter was trained on, as for `DiffusionModel.load`.
        adapter: The adapter's file, from `save_adapter`.
        path: The file or folder to write. It must not exist.
        form: "diffusers", "kohya" or "merged".
        device: The device of the verification.
        check: The image to render.

    Returns:
        The differences that the verification measured.

    Raises:
        ExportError: The export cannot be reloaded or renders another image. Nothing is left at `path`.
        InvalidInputError: An unknown form, or an existing `path`.
        CheckpointError: `adapter` is not an adapter, or does not fit the model.
        ModelNotFoundError: The model does not exist.
    """
    if form not in _WRITERS:
        raise InvalidInputError(f"form: expected one of {list(_WRITERS)}, got {form!r}")
    if path.exists():
        raise InvalidInputError(f"path: expected a path that does not exist, got {path}, which exists")

    folder = locate(model).folder
    expected, effect = _expected(folder, adapter, device, check)
    difference = 0.0

    def write(temporary: Path) -> None:
        nonlocal difference
        try:
            _WRITERS[form](folder, adapter, temporary)
            image = _image(_reloaded(form, folder, temporary).to(device), check)
        except (DFusionError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise ExportError(f"{form} export of {adapter}: cannot be reloaded: {error!r}") from error
        difference = float(np.abs(image - expected).max())
        if not difference <= min(TOLERANCE, max(effect / 2, ROUNDING)):  # also raises for NaN
            raise ExportError(f"{form} export of {adapter}: expected the same image, got a difference of {difference}")

    write_whole(path, write)
    return ExportReport(difference, effect)


def _expected(folder: Path, adapter: Path, device: str, check: ImageCheck) -> tuple[np.ndarray, float]:
    """The image with the adapter, and the largest difference that the adapter makes."""
    pipeline = load_pipeline(folder).to(device)
    plain = _image(pipeline, check)
    load_adapter(pipeline.unet, adapter)
    image = _image(pipeline, check)
    return image, float(np.abs(image - plain).max())


def _reloaded(form: ExportFormat, folder: Path, exported: Path) -> Pipeline:
    """A new stock pipeline with the export."""
    if form == "merged":
        return load_pipeline(exported)
    pipeline = load_pipeline(folder)
    pipeline.load_lora_weights(str(exported), use_safetensors=True)
    return pipeline


def _image(pipeline: Pipeline, check: ImageCheck) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        check.prompt,
        num_inference_steps=check.num_steps,
        guidance_scale=check.guidance_scale,
        generator=torch.Generator().manual_seed(check.seed),
        output_type="np",
    )
    return output.images[0]  # type: ignore[no-any-return]


def _write_diffusers(folder: Path, adapter: Path, out: Path) -> None:
    """Copy the file if it has this form already, as stored adapters have."""
    if read_layout(adapter).form == "diffusers":
        shutil.copyfile(adapter, out)
        return
    unet = load_pipeline(folder).unet
    load_adapter(unet, adapter)
    save_adapter(unet, out)


def _write_kohya(folder: Path, adapter: Path, out: Path) -> None:
    """Write lora_down (r, in), lora_up (out, r) and alpha () for each module. Raises ExportError for a DoRA."""
    unet = _config(folder, "unet/config.json")
    content = read_adapter(adapter, unet["layers_per_block"])
    if content.config.use_dora:
        raise ExportError(
            f"kohya export of {adapter}: expected a LoRA, got a DoRA, which is written as diffusers or merged"
        )

    tensors: dict[str, torch.Tensor] = {}
    for key, value in content.weights.items():
        module, _, matrix = key.rpartition(".lora_")
        layer = content.layers[module]
        module = original_name(module, unet["layers_per_block"]) if _is_xl(unet) else module
        name = "lora_unet_" + module.replace(".", "_")
        tensors[f"{name}.{_KOHYA_MATRICES[matrix]}"] = value
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha * (layer.rank**0.5 if content.config.use_rslora else 1))
    write_tensors(out, tensors, _kohya_metadata(folder, unet, content))


_KOHYA_MATRICES = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}


def original_name(module: str, layers_per_block: int) -> str:
    """The original code's name of a transformer module of an SDXL U-Net. kohya's SDXL keys use it.

    The original code numbers all layers of the down (up) blocks consecutively, including down- and up-samplers. A
    layer's transformer is its part 1. Examples: "down_blocks.1.attentions.0.x" is "input_blocks.4.1.x",
    "up_blocks.0.attentions.2.x" is "output_blocks.2.1.x", "mid_block.attentions.0.x" is "middle_block.1.x". Raises
    InvalidInputError for other modules.
    """
    if middle := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", module):
        return f"middle_block.1.{middle[1]}"
    side = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", module)
    if side is None:
        raise InvalidInputError(f"module: expected a module of a transformer in the U-Net, got {module!r}")

    number = int(side[2]) * (layers_per_block + 1) + int(side[3])
    return f"input_blocks.{number + 1}.1.{side[4]}" if side[1] == "down" else f"output_blocks.{number}.1.{side[4]}"


def _kohya_metadata(folder: Path, unet: Mapping[str, Any], content: AdapterFile) -> dict[str, str]:
    """The metadata that kohya's trainer writes. A1111 lists a LoRA only for the model version named there."""
    about = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(content.config.rank),
        "ss_network_alpha": str(content.config.alpha),
        METADATA_KEY: json.dumps(dict(content.metadata), sort_keys=True),
    }

    velocity = _config(folder, "scheduler/scheduler_config.json").get("prediction_type") == "v_prediction"
    versions = {768: "sd_v1", 1024: "sd_v2_v" if velocity else "sd_v2"}
    version = "sdxl_base_v1-0" if _is_xl(unet) else versions.get(unet["cross_attention_dim"])
    if version is not None:
        about |= {"ss_base_model_version": version, "ss_v2": str(version.startswith("sd_v2"))}
    return about


def _is_xl(unet: Mapping[str, Any]) -> bool:
    return unet.get("addition_embed_type") == "text_time"


def _config(folder: Path, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
    return config


def _write_merged(folder: Path, adapter: Path, out: Path) -> None:
    """Write the pipeline in float32, with W + alpha / rank * B A in place of W."""
    pipeline = load_pipeline(folder)
    load_adapter(pipeline.unet, adapter)
    pipeline.unet.fuse_lora(safe_fusing=True)
    detach(pipeline.unet)
    pipeline.save_pretrained(str(out))

    # diffusers writes local paths into the configs
    for file in (out / "model_index.json", *out.glob("*/config.json")):
        config = json.loads(file.read_text("utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


_WRITERS: Mapping[ExportFormat, Callable[[Path, Path, Path], None]] = {
    "diffusers": _write_diffusers,
    "kohya": _write_kohya,
    "merged": _write_merged,
}
