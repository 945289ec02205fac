"""Adapters in the forms that other programs read. Each export is loaded again by stock diffusers before it counts.

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

from dfusion.adapter import METADATA_KEY, AdapterFile, detach, load_adapter, read_adapter
from dfusion.errors import DFusionError, ExportError, InvalidInputError
from dfusion.files import write_tensors, write_whole
from dfusion.models import Pipeline, load_pipeline
from dfusion.sources import locate

ExportFormat = Literal["diffusers", "kohya", "merged"]
TOLERANCE = 1 / 255
"""The largest difference of two images, in [0, 1], that are called the same."""
ROUNDING = 1e-5
"""The largest difference that arithmetic alone explains, for adapters that change next to nothing."""


@dataclass(frozen=True)
class ImageCheck:
    """The image by which an export is checked: the pipeline's own scheduler, float32, the U-Net's own size."""

    prompt: str = "a red circle"
    seed: int = 0
    num_steps: int = 4
    guidance_scale: float = 5.0


@dataclass(frozen=True)
class ExportReport:
    """What the check of an export showed, as largest differences of images in [0, 1].

    difference  between the image with the adapter and the one with the export
    effect      between the image with the adapter and the one without; twice the difference or more, unless it is
                ROUNDING, so that an export without the adapter cannot pass
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
    """Write the adapter of the file `adapter`, which was trained on `model`, to `path` in the given form.

    `model` is named as for `DiffusionModel.load`; everything is float32. The export is loaded again into a fresh stock
    pipeline and must give the same image as the adapter, within TOLERANCE and half the adapter's own effect. Raises
    ExportError if it does not, and nothing stays; InvalidInputError for an unknown form or where `path` is taken;
    CheckpointError for a file that is no adapter or does not fit the model; ModelNotFoundError.
    """
    if form not in _WRITERS:
        raise InvalidInputError(f"form: expected one of {list(_WRITERS)}, got {form!r}")
    if path.exists():
        raise InvalidInputError(f"path: expected a free name, got {path}, which is there already")
    folder = locate(model).folder
    expected, effect = _expected(folder, adapter, device, check)
    difference = 0.0

    def write(temporary: Path) -> None:
        nonlocal difference
        try:
            _WRITERS[form](folder, adapter, temporary)
            found = _image(_reloaded(form, folder, temporary).to(device), check)
        except (DFusionError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise ExportError(f"{form} export of {adapter}: cannot be loaded again: {error!r}") from error
        difference = float(np.abs(found - expected).max())
        if not difference <= min(TOLERANCE, max(effect / 2, ROUNDING)):  # NaN is not
            raise ExportError(f"{form} export of {adapter}: expected the same image, got a difference of {difference}")

    write_whole(path, write)
    return ExportReport(difference, effect)


def _expected(folder: Path, adapter: Path, device: str, check: ImageCheck) -> tuple[np.ndarray, float]:
    """The image with the adapter, and how much the adapter changes in it."""
    pipeline = load_pipeline(folder).to(device)
    plain = _image(pipeline, check)
    load_adapter(pipeline.unet, adapter)
    image = _image(pipeline, check)
    return image, float(np.abs(image - plain).max())


def _reloaded(form: ExportFormat, folder: Path, exported: Path) -> Pipeline:
    """A fresh stock pipeline with the export."""
    if form == "merged":
        return load_pipeline(exported)
    pipeline = load_pipeline(folder)
    pipeline.load_lora_weights(str(exported), use_safetensors=True)
    return pipeline


def _image(pipeline: Pipeline, check: ImageCheck) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        check.prompt,
        num_inference_steps=check.num_steps,
        guidance_scale=check.guidance_scale,
        generator=torch.Generator().manual_seed(check.seed),
        output_type="np",
    )
    return made.images[0]  # type: ignore[no-any-return]


def _write_diffusers(_folder: Path, adapter: Path, out: Path) -> None:
    """Adapters are kept in this form."""
    shutil.copyfile(adapter, out)


def _write_kohya(folder: Path, adapter: Path, out: Path) -> None:
    """lora_down (r, in), lora_up (out, r) and alpha () for each module."""
    unet, read = _config(folder, "unet/config.json"), read_adapter(adapter)
    tensors: dict[str, torch.Tensor] = {}
    for key, value in read.weights.items():
        module, _, matrix = key.rpartition(".lora_")
        named = original_name(module, unet["layers_per_block"]) if _is_xl(unet) else module
        name = "lora_unet_" + named.replace(".", "_")
        tensors[f"{name}.{_KOHYA_MATRICES[matrix]}"] = value
        tensors[f"{name}.alpha"] = torch.tensor(read.config.alpha)
    write_tensors(out, tensors, _kohya_metadata(folder, unet, read))


_KOHYA_MATRICES = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}


def original_name(module: str, layers_per_block: int) -> str:
    """A transformer's module of an SDXL U-Net by its name in the original code, which kohya's SDXL keys use.

    There all layers of the down (up) blocks are counted through, a down- or up-sampler being one, and every layer's
    transformer is its part 1: "down_blocks.1.attentions.0.x" is "input_blocks.4.1.x", "up_blocks.0.attentions.2.x" is
    "output_blocks.2.1.x", "mid_block.attentions.0.x" is "middle_block.1.x". Raises InvalidInputError for others.
    """
    if middle := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", module):
        return f"middle_block.1.{middle[1]}"
    side = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", module)
    if side is None:
        raise InvalidInputError(f"module: expected one of a transformer in the U-Net, got {module!r}")
    number = int(side[2]) * (layers_per_block + 1) + int(side[3])
    return f"input_blocks.{number + 1}.1.{side[4]}" if side[1] == "down" else f"output_blocks.{number}.1.{side[4]}"


def _kohya_metadata(folder: Path, unet: Mapping[str, Any], read: AdapterFile) -> dict[str, str]:
    """What kohya's trainer writes and A1111 reads: it lists a LoRA only for the model version that this names."""
    about = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(read.config.rank),
        "ss_network_alpha": str(read.config.alpha),
        METADATA_KEY: json.dumps(dict(read.metadata), sort_keys=True),
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
    loaded: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
    return loaded


def _write_merged(folder: Path, adapter: Path, out: Path) -> None:
    """The pipeline in float32, W + alpha / rank * B A in place of W; no paths of this machine in its configs."""
    pipeline = load_pipeline(folder)
    load_adapter(pipeline.unet, adapter)
    pipeline.unet.fuse_lora(safe_fusing=True)
    detach(pipeline.unet)
    pipeline.save_pretrained(str(out))
    for file in (out / "model_index.json", *out.glob("*/config.json")):
        config = json.loads(file.read_text("utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


_WRITERS: Mapping[ExportFormat, Callable[[Path, Path, Path], None]] = {
    "diffusers": _write_diffusers,
    "kohya": _write_kohya,
    "merged": _write_merged,
}
