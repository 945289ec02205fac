"""Export adapters in formats that other programs read. Each export is verified by reloading it in stock diffusers.

diffusers  one file, LoRA as `load_lora_weights` reads it
kohya      one file, LoRA in the keys of kohya's trainer, as ComfyUI and A1111 (and `load_lora_weights`) read them
peft       a folder, LoRA as `PeftModel.from_pretrained` reads it for the pipeline's U-Net
merged     a folder, the whole pipeline with the adapter in its weights

Parts of text encoders are exported with the U-Net's, except by peft, whose folder is for one network.

Each export comes with a preview and the recipe that reproduces it (`Companions`).
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from dfusion._diffusers import DDIMScheduler, UNet2DConditionModel, peft
from dfusion.adapter import (
    ADAPTER,
    METADATA_KEY,
    AdapterFile,
    attach_lora,
    load_adapter,
    read_adapter,
    save_adapter,
)
from dfusion.adapter_files import layers_per_block, read_layout
from dfusion.config import SamplingConfig
from dfusion.errors import DFusionError, ExportError, InvalidInputError
from dfusion.files import write_tensors, write_whole
from dfusion.models import DiffusionModel, Pipeline, load_pipeline
from dfusion.recipes import FOLDERS, Companions, ExportFormat, PipelineCall, Recipe, readme_of
from dfusion.sampling import sample
from dfusion.sources import locate
from dfusion.text_encoder_lora import TextLayer

TOLERANCE = 1 / 255
"""The largest difference of two images, in [0, 1], that count as equal."""
VERIFICATION_STEPS = 4
ROUNDING = 1e-5
"""The largest difference due to floating-point rounding, for adapters with almost no effect."""


@dataclass(frozen=True)
class PreviewSettings:
    """Settings of an export's preview, rendered in float32. The same image with fewer steps verifies the export.

    Two settings are changed, since stock pipelines do not have them: a guidance_scale below 1 becomes 1, and with zero
    terminal SNR eta is at most 0.999.
    """

    prompt: str = "a red circle"
    seed: int = 0
    sampling: SamplingConfig = SamplingConfig()


@dataclass(frozen=True)
class ExportReport:
    """The result of an export's verification, as largest differences of images in [0, 1], and the preview's recipe.

    difference  between the image with the adapter and the image with the export
    effect      between the image with the adapter and the image without it; at least twice the difference, unless the
                difference is within ROUNDING, so that an export without the adapter cannot pass
    """

    difference: float
    effect: float
    recipe: Recipe


def export_adapter(
    model: Path | str,
    adapter: Path,
    path: Path,
    form: ExportFormat,
    *,
    device: str = "cpu",
    preview: PreviewSettings = PreviewSettings(),
    base: str | None = None,
) -> ExportReport:
    """Write an adapter to `path` in the given form, in float32, with a preview and its recipe (`Companions`).

    The export is reloaded into a new stock pipeline. It must render the same image as the adapter, within TOLERANCE and
    half the adapter's own effect. The preview is sampled with `dfusion.sample`, with all its steps. For the
    verification, `dfusion.sample` and a stock pipeline render the same prompt and seed in at most VERIFICATION_STEPS
    steps, because rounding errors grow with the number of steps. The two images must be equal within TOLERANCE.

    Args:
        model: The base model that the adapter was trained on, as for `DiffusionModel.load`.
        adapter: The adapter's file, from `save_adapter`.
        path: The file or folder to write. Neither it nor its companions may exist.
        form: "diffusers", "kohya", "peft" or "merged".
        device: The device of the verification.
        preview: The image to render.
        base: The base model's name in the recipe. None: that of `model`, without the path of a folder.

    Returns:
        The differences that the verification measured, and the recipe.

    Raises:
        ExportError: The export cannot be reloaded, the export or the recipe renders a different image, or the format
            cannot store part of the adapter. Nothing is left at `path`.
        InvalidInputError: An unknown form, or an existing `path`.
        CheckpointError: `adapter` is not an adapter, or does not fit the model.
        ModelNotFoundError: The model does not exist.
    """
    if form not in _WRITERS:
        raise InvalidInputError(f"form: expected one of {list(_WRITERS)}, got {form!r}")
    companions = Companions.of(path, form)
    for written in (path, companions.recipe, companions.preview):
        if written.exists():
            raise InvalidInputError(f"path: expected a path that does not exist, got {written}, which exists")

    folder = locate(model).folder
    name = base or (Path(model).name if Path(model).is_dir() else str(model))
    expected = _expected(folder, adapter, device, preview, name, form)
    difference = 0.0

    def write(temporary: Path) -> None:
        nonlocal difference
        try:
            _WRITERS[form](folder, adapter, temporary)
            image = render(_reloaded(form, folder, temporary).to(device), expected.verification)
        except ExportError:
            raise
        except (DFusionError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise ExportError(f"{form} export of {adapter}: cannot be reloaded: {error!r}") from error
        difference = float(np.abs(image - expected.image).max())
        largest = min(TOLERANCE, max(expected.effect / 2, ROUNDING))
        if not difference <= largest:  # also raises for NaN
            raise ExportError(f"{form} export of {adapter}: expected the same image, got a difference of {difference}")
        if form in FOLDERS:
            _write_companions(Companions.of(temporary, form), expected)

    write_whole(path, write)
    if form not in FOLDERS:
        _write_companions(companions, expected)
    return ExportReport(difference, expected.effect, expected.recipe)


@dataclass(frozen=True)
class _Expected:
    """What the export must render.

    image         with the adapter, (H, W, 3) float32 in [0, 1], by a stock pipeline and `verification`
    effect        the largest difference that the adapter makes
    preview       by `dfusion.sample`, (H, W, 3) uint8
    recipe        how a stock pipeline renders the preview
    verification  the recipe with fewer steps
    """

    image: np.ndarray
    effect: float
    preview: np.ndarray
    recipe: Recipe
    verification: Recipe


def _expected(
    folder: Path, adapter: Path, device: str, settings: PreviewSettings, base: str, form: ExportFormat
) -> _Expected:
    """Render images with the adapter and without. Raises ExportError if the recipe's image differs from ours."""
    pipeline = load_pipeline(folder).to(device)
    model = DiffusionModel.from_pipeline(pipeline, device)
    short = replace(settings, sampling=_with_fewer_steps(settings.sampling))
    verification = _recipe(model, short, base, form)
    plain = render(pipeline, verification)

    load_adapter(pipeline.unet, adapter, model.text_encoders)
    image = render(pipeline, verification)
    distance = float(np.abs(image - _preview(model, short) / 255).max())
    if not distance <= TOLERANCE:  # also raises for NaN
        raise ExportError(f"recipe for {adapter}: expected the preview's image, got a difference of {distance}")
    effect = float(np.abs(image - plain).max())
    return _Expected(image, effect, _preview(model, settings), _recipe(model, settings, base, form), verification)


def _with_fewer_steps(sampling: SamplingConfig) -> SamplingConfig:
    return sampling.model_copy(update={"num_steps": min(sampling.num_steps, VERIFICATION_STEPS)})


def _recipe(model: DiffusionModel, settings: PreviewSettings, base: str, form: ExportFormat) -> Recipe:
    sampling = _reproducible(settings.sampling, model.scheduler)
    height, width = (side * model.pixels_per_latent for side in model.latent_size(sampling))
    arguments = inspect.signature(DDIMScheduler.__init__).parameters
    config = dict(model.scheduler.config)

    return Recipe(
        base=base,
        format=form,
        pipeline="StableDiffusionPipeline" if model.text_encoder_2 is None else "StableDiffusionXLPipeline",
        scheduler={name: config[name] for name in sorted(config) if name in arguments},
        seed=settings.seed,
        call=PipelineCall(
            prompt=settings.prompt,
            negative_prompt=sampling.negative_prompt or None,
            num_inference_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            eta=sampling.eta,
            height=height,
            width=width,
        ),
    )


def _reproducible(sampling: SamplingConfig, scheduler: DDIMScheduler) -> SamplingConfig:
    """The nearest settings with which a stock pipeline gives the same image."""
    if sampling.guidance_scale <= 1:  # stock pipelines then do not guide
        sampling = sampling.model_copy(update={"guidance_scale": 1.0, "negative_prompt": ""})
    if float(scheduler.alphas_cumprod.min()) == 0:  # with eta 1, diffusers' step gives sqrt(-1e-8), NaN
        sampling = sampling.model_copy(update={"eta": min(sampling.eta, _LARGEST_ETA_WITH_ZERO_SNR)})
    return sampling


_LARGEST_ETA_WITH_ZERO_SNR = 0.999


def _preview(model: DiffusionModel, settings: PreviewSettings) -> np.ndarray:
    """(H, W, 3) uint8, by `dfusion.sample`."""
    sampling = _reproducible(settings.sampling, model.scheduler)
    size = model.latent_size(sampling)
    trajectory = sample(
        model.unet,
        model.scheduler,
        model.encode_prompts([settings.prompt], size),
        model.encode_prompts([sampling.negative_prompt], size),
        [settings.seed],
        config=sampling,
        latent_size=size,
    )
    return model.decode(trajectory.final)[0]  # type: ignore[no-any-return]


def _reloaded(form: ExportFormat, folder: Path, exported: Path) -> Pipeline:
    """A new stock pipeline with the export."""
    if form == "merged":
        return load_pipeline(exported)
    pipeline = load_pipeline(folder)
    if form == "peft":
        peft.PeftModel.from_pretrained(pipeline.unet, str(exported))  # changes the U-Net in place
    else:
        pipeline.load_lora_weights(str(exported), use_safetensors=True)
    return pipeline


def render(pipeline: Pipeline, recipe: Recipe) -> np.ndarray:
    """Render a recipe's image by a stock pipeline: (H, W, 3) float32 in [0, 1]. The pipeline keeps its scheduler."""
    scheduler = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler(**recipe.scheduler)
    try:
        generator = torch.Generator().manual_seed(recipe.seed)
        output = pipeline(generator=generator, output_type="np", **recipe.call.model_dump())
    finally:
        pipeline.scheduler = scheduler
    return output.images[0]  # type: ignore[no-any-return]


def _write_companions(companions: Companions, expected: _Expected) -> None:
    text = expected.recipe.to_json()
    write_whole(companions.recipe, lambda temporary: _write_text(temporary, text))
    write_whole(companions.preview, lambda temporary: Image.fromarray(expected.preview).save(temporary, "png"))
    if companions.readme is not None:
        readme = readme_of(expected.recipe)
        write_whole(companions.readme, lambda temporary: _write_text(temporary, readme))


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, "utf-8")


def _write_diffusers(folder: Path, adapter: Path, out: Path) -> None:
    """Copy the file if it has this form already, as stored adapters have.

    Diffusers' training scripts write files with two kinds of keys, which diffusers loads in part. They are rewritten.
    """
    layout = read_layout(adapter)
    of_unet = [key for key in layout.tensors if not key.startswith("text_encoder")]
    has_both = any(".lora_A." in key for key in of_unet) and any(".lora.down." in key for key in of_unet)
    if layout.form == "diffusers" and not has_both:
        shutil.copyfile(adapter, out)
        return
    pipeline, metadata = _load_with_adapter(folder, adapter)
    save_adapter(pipeline.unet, out, metadata)


def _load_with_adapter(folder: Path, adapter: Path) -> tuple[Pipeline, dict[str, str]]:
    """A stock pipeline with the adapter, and the adapter's metadata."""
    pipeline = load_pipeline(folder)
    metadata = load_adapter(pipeline.unet, adapter, DiffusionModel.from_pipeline(pipeline).text_encoders)
    return pipeline, metadata


def _write_kohya(folder: Path, adapter: Path, out: Path) -> None:
    """Write lora_down (r, in), lora_up (out, r) and alpha () for each module.

    Diffusers ignores alphas that differ between modules. So all modules get the most frequent one, and lora_up of the
    others is scaled instead.

    Raises ExportError for a DoRA, and for layers of SDXL outside its transformers.
    """
    unet = _config(folder, "unet/config.json")
    per_block = layers_per_block(folder)
    content = read_adapter(adapter, per_block)
    if content.config.use_dora:
        raise ExportError(
            f"kohya export of {adapter}: expected a LoRA, got a DoRA; export it as diffusers, peft or merged"
        )

    # 1. alphas and names
    alphas = {}
    names = {}
    for module, layer in content.layers.items():
        alphas[module] = layer.alpha * (layer.rank**0.5 if content.config.use_rslora else 1)
        names[module] = _kohya_name(module, adapter, per_block) if _is_xl(unet) else module
    text_layers = _kohya_text_layers(content, _is_xl(unet))
    of_text = [layer.alpha for layer in text_layers.values()]
    [(alpha, _)] = Counter([*alphas.values(), *of_text]).most_common(1)

    # 2. the U-Net
    tensors: dict[str, torch.Tensor] = {}
    for key, value in content.weights.items():
        module, _, matrix = key.rpartition(".lora_")
        scale = alphas[module] / alpha if matrix == "B.weight" else 1.0
        name = "lora_unet_" + names[module].replace(".", "_")
        tensors[f"{name}.{_KOHYA_MATRICES[matrix]}"] = value * scale
        tensors[f"{name}.alpha"] = torch.tensor(alpha)

    # 3. the text encoders
    for name, part in text_layers.items():
        tensors[f"{name}.lora_down.weight"] = part.down
        tensors[f"{name}.lora_up.weight"] = part.up * (part.alpha / alpha)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    write_tensors(out, tensors, _kohya_metadata(folder, unet, content, alpha))


def _kohya_name(module: str, adapter: Path, per_block: int) -> str:
    """The original name of a module of SDXL. Raises ExportError for modules other than transformers'."""
    try:
        return original_name(module, per_block)
    except InvalidInputError as error:
        raise ExportError(f"kohya export of {adapter}: {error}; export it as diffusers, peft or merged") from error


def _kohya_text_layers(content: AdapterFile, is_xl: bool) -> dict[str, TextLayer]:
    """The parts of text encoders by kohya's names of their layers."""
    prefixes = {"text_encoder": "lora_te1" if is_xl else "lora_te", "text_encoder_2": "lora_te2"}
    result = {}
    for encoder, layers in content.text_encoders.items():
        for name, layer in layers.items():
            result[f"{prefixes[encoder]}_{name.replace('.', '_')}"] = layer
    return result


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


def _kohya_metadata(folder: Path, unet: Mapping[str, Any], content: AdapterFile, alpha: float) -> dict[str, str]:
    """The metadata that kohya's trainer writes, and Stability AI's model specification. `alpha` is the modules' own.

    A1111 and Forge list a LoRA only for the model version named there. Some programs read the prediction type from
    `modelspec.prediction_type`, others from `ss_v_parameterization`.
    """
    about = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(content.config.rank),
        "ss_network_alpha": str(alpha),
        METADATA_KEY: json.dumps(dict(content.metadata), sort_keys=True),
    }

    # the prediction type, which a loader cannot see in the weights
    scheduler = _config(folder, "scheduler/scheduler_config.json")
    prediction = _PREDICTIONS.get(scheduler.get("prediction_type", "epsilon"))
    if prediction is not None:
        about |= {"modelspec.prediction_type": prediction, "ss_v_parameterization": str(prediction == "v")}
    about["ss_zero_terminal_snr"] = str(bool(scheduler.get("rescale_betas_zero_snr")))

    # the version of the model
    versions = {768: "sd_v1", 1024: "sd_v2_v" if prediction == "v" else "sd_v2"}
    width = unet.get("cross_attention_dim")
    version = versions.get(width) if isinstance(width, int) else None  # a list has the widths of the blocks
    if _is_xl(unet):
        version = "sdxl_base_v1-0"
    if version is not None:
        about |= {"ss_base_model_version": version, "ss_v2": str(version.startswith("sd_v2"))}
        about |= _model_specification(folder, unet, version)
    return about


_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""The names of prediction types in Stability AI's specification, by diffusers' names."""
_ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
}
"""The names of model versions in Stability AI's specification, by kohya's names."""


def _model_specification(folder: Path, unet: Mapping[str, Any], version: str) -> dict[str, str]:
    """What https://github.com/Stability-AI/ModelSpec requires of a LoRA file."""
    factor = 2 ** (len(_config(folder, "vae/config.json")["block_out_channels"]) - 1)
    size = unet["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    original = "https://github.com/Stability-AI/generative-models"

    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{_ARCHITECTURES[version]}/lora",
        "modelspec.implementation": original if _is_xl(unet) else "diffusers",
        "modelspec.title": "D-Fusion LoRA",
        "modelspec.resolution": f"{width * factor}x{height * factor}",
    }


def _is_xl(unet: Mapping[str, Any]) -> bool:
    return unet.get("addition_embed_type") == "text_time"


def _config(folder: Path, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
    return config


def _write_peft(folder: Path, adapter: Path, out: Path) -> None:
    """Write the settings and the weights, (r, in) and (out, r), as `PeftModel.save_pretrained` does.

    Raises ExportError for an adapter with parts of a text encoder: PEFT's folder is for one network.
    """
    config = _config(folder, "unet/config.json")
    content = read_adapter(adapter, layers_per_block(folder))
    if content.text_encoders:
        raise ExportError(
            f"peft export of {adapter}: expected an adapter of the U-Net only, got one of"
            f" {' and '.join(content.text_encoders)} too, which is written as diffusers, kohya or merged"
        )
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    attach_lora(unet, content.config)
    settings = unet.peft_config[ADAPTER].to_dict() | {"inference_mode": True}
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}

    out.mkdir()
    _write_text(out / "adapter_config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
    weights = {f"base_model.model.{key}": value for key, value in content.weights.items()}
    write_tensors(out / "adapter_model.safetensors", weights, {"format": "pt"})


def _write_merged(folder: Path, adapter: Path, out: Path) -> None:
    """Write the pipeline in float32, with W + alpha / rank * B A in place of W."""
    pipeline, _ = _load_with_adapter(folder, adapter)
    pipeline.unet.fuse_lora(safe_fusing=True)
    pipeline.unet.unload_lora()  # not `detach`, which restores the text encoders
    pipeline.save_pretrained(str(out))

    # diffusers writes local paths into the configs
    for file in (out / "model_index.json", *out.glob("*/config.json")):
        config = json.loads(file.read_text("utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


_WRITERS: Mapping[ExportFormat, Callable[[Path, Path, Path], None]] = {
    "diffusers": _write_diffusers,
    "kohya": _write_kohya,
    "peft": _write_peft,
    "merged": _write_merged,
}
