"""The check of a model: what it is, what it costs on this machine, and an image of it.

`python -m dfusion.model_report '{"model": "shapes", "image": "check.png"}'` writes the report as JSON. The command line
runs it this way, since it starts without torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError

from dfusion.adapter import load_adapter
from dfusion.attention.layers import find_layers, resolve_layers
from dfusion.catalogue import MODELS
from dfusion.config import Precision, SamplingConfig
from dfusion.ddim import Schedule
from dfusion.errors import DFusionError, InvalidInputError, LayerNotFoundError, NonFiniteError, shortened
from dfusion.memory import peak_bytes
from dfusion.model_files import check_files
from dfusion.models import DiffusionModel
from dfusion.sampling import sample
from dfusion.sources import locate

_PROMPT = "a red circle"
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class ModelReport:
    """What a model is and what it costs.

    layout             "SD 1.x", "SD 2.x", "SDXL" or "other"
    scheduler          the folder's own; it is sampled by DDIM (Eq. 1) with the same betas
    betas              the noise schedule, for people
    zero_terminal_snr  whether the last alpha-bar is 0
    fused_layers       the layers that are fused by default, as paths in the U-Net
    parameters         number of parameters of each network, without the adapter
    adapter            the adapter with which the image was sampled
    weights_bytes      memory of the networks
    peak_bytes         most memory while sampling: of the GPU, or of the process on a CPU
    seconds_per_image  time of the sampled image, without loading
    notes              what was replaced or left out
    image              the file of the sampled image
    """

    model: str
    folder: str
    layout: str
    pipeline: str
    prediction_type: str
    scheduler: str
    betas: str
    zero_terminal_snr: bool
    timestep_spacing: str
    fused_layers: tuple[str, ...]
    parameters: Mapping[str, int]
    adapter: str | None
    dtype: str
    vae_dtype: str
    weights_bytes: int
    peak_bytes: int
    device: str
    height: int
    width: int
    num_steps: int
    load_seconds: float
    seconds_per_image: float
    notes: tuple[str, ...]
    image: str


def check_model(
    model: Path | str,
    image: Path,
    *,
    device: str = "cpu",
    dtype: Precision = "float32",
    vae_dtype: Precision | None = None,
    adapter: Path | None = None,
    prompt: str = _PROMPT,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
) -> ModelReport:
    """Load a model, sample one image to a file, and describe both.

    Args:
        model: As for `DiffusionModel.load`, or a name of `dfusion.MODELS`.
        image: The PNG file to write; an existing file is replaced.
        device: The device of the model.
        dtype: Of U-Net and text encoders.
        vae_dtype: Of the VAE, as for `DiffusionModel.load`.
        adapter: An adapter to load on the model, as for `load_adapter`.
        prompt: The prompt of the image.
        sampling: Steps, guidance and size of the image.
        seed: Its seed.

    Raises:
        ModelNotFoundError, UnsupportedModelError, InvalidInputError: As `DiffusionModel.load` and `sample`.
        AdapterError: As `load_adapter`.
        InvalidInputError: The image cannot be written.
        NonFiniteError: The image is not finite, or has only one colour.

    Example:
        >>> from dfusion import check_model
        >>> report = check_model("shapes", Path("check.png"))
        >>> report.layout, report.prediction_type, report.scheduler
        ('other (text encoder of width 128)', 'epsilon', 'DDIMScheduler')
    """
    if image.is_dir():
        raise InvalidInputError(f"image: expected a PNG file, got the folder {image}")
    source = MODELS[model].folder if isinstance(model, str) and model in MODELS else model
    folder = locate(source).folder
    files = check_files(folder)

    # 1. load, and describe the model without its adapter
    started = time.perf_counter()
    loaded = DiffusionModel.load(source, device, dtype, vae_dtype=vae_dtype)
    networks = {name: network for name in _PARTS if (network := getattr(loaded, name)) is not None}
    parameters = {name: list(network.parameters()) for name, network in networks.items()}
    fused_layers = _fused_layers(loaded)
    if adapter is not None:
        load_adapter(loaded.unet, adapter, loaded.text_encoders)
    load_seconds = time.perf_counter() - started
    schedule = Schedule.from_scheduler(loaded.scheduler, sampling.num_steps, sampling.eta)

    # 2. sample one image
    started = time.perf_counter()
    pixels = _image_of(loaded, prompt, sampling, seed)
    seconds = time.perf_counter() - started
    if pixels.std() == 0:
        raise NonFiniteError(f"{model}: expected an image, got {pixels.shape} pixels of one colour")
    _save(pixels, image)

    # 3. report
    config = loaded.scheduler.config
    return ModelReport(
        model=str(model),
        folder=str(folder),
        layout=files.layout,
        pipeline=files.pipeline,
        prediction_type=schedule.prediction_type,
        scheduler=files.scheduler,
        betas=_betas(config),
        zero_terminal_snr=bool(loaded.scheduler.alphas_cumprod[-1] == 0),
        timestep_spacing=config.timestep_spacing,
        fused_layers=fused_layers,
        parameters={name: sum(p.numel() for p in of_part) for name, of_part in parameters.items()},
        adapter=None if adapter is None else str(adapter),
        dtype=dtype,
        vae_dtype=str(loaded.vae.dtype).removeprefix("torch."),
        weights_bytes=sum(p.numel() * p.element_size() for p in chain.from_iterable(parameters.values())),
        peak_bytes=peak_bytes(device),
        device=device,
        height=pixels.shape[0],
        width=pixels.shape[1],
        num_steps=sampling.num_steps,
        load_seconds=load_seconds,
        seconds_per_image=seconds,
        notes=loaded.notes,
        image=str(image),
    )


def _image_of(model: DiffusionModel, prompt: str, sampling: SamplingConfig, seed: int) -> np.ndarray:
    """(H, W, 3) uint8 of one sample."""
    size = model.latent_size(sampling)
    trajectory = sample(
        model.unet,
        model.scheduler,
        model.encode_prompts([prompt], size),
        model.encode_prompts([sampling.negative_prompt], size),
        [seed],
        config=sampling,
        latent_size=size,
    )
    return model.decode(trajectory.final)[0]  # type: ignore[no-any-return]


def _save(pixels: np.ndarray, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, "PNG")
    except OSError as error:
        raise InvalidInputError(f"image: expected a writable file, got {file}: {error.strerror}") from error


def _betas(config: Any) -> str:
    total = config.num_train_timesteps
    if config.trained_betas is not None:
        return f"{total} trained betas"
    if config.beta_schedule == "squaredcos_cap_v2":
        return f"{total}, squaredcos_cap_v2"
    return f"{total}, {config.beta_schedule} from {config.beta_start:g} to {config.beta_end:g}"


def _fused_layers(model: DiffusionModel) -> tuple[str, ...]:
    try:
        layers = resolve_layers(find_layers(model.unet), "middle+up")
    except LayerNotFoundError:
        return ()
    return tuple(f"{layer.index} {layer.name}" for layer in layers)


def main(arguments: Sequence[str]) -> int:
    """Check the model of a JSON object with the arguments of `check_model`, and write the report or the error as JSON.

    The device "auto" is a GPU, if there is one. Returns the exit code: 1 for an error of dfusion.
    """
    options = json.loads(arguments[0])
    if options.get("device") == "auto":
        options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    image = Path(options.pop("image"))
    try:
        sampling = _sampling_of(options.pop("sampling", {}))
        if options.get("adapter") is not None:
            options["adapter"] = Path(options["adapter"])
        report = check_model(options.pop("model"), image, sampling=sampling, **options)
    except DFusionError as error:
        json.dump({"error": {"kind": type(error).__name__, "message": str(error)}}, sys.stdout)
        return 1
    json.dump(asdict(report), sys.stdout)
    return 0


def _sampling_of(settings: Mapping[str, Any]) -> SamplingConfig:
    """Raises InvalidInputError, naming the first invalid setting."""
    try:
        return SamplingConfig.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        setting = ".".join(map(str, problem["loc"]))
        raise InvalidInputError(f"{setting}: {problem['msg']}, got {shortened(problem['input'])}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
