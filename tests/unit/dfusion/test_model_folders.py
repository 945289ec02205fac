"""Whatever is pointed at as a model runs, or is refused by a typed error that names the cause."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from dfusion.config import SamplingConfig
from dfusion.errors import DFusionError, UnsupportedModelError
from dfusion.models import DiffusionModel
from dfusion.sampling import sample
from tests.model_folders import SD_KEYS, VARIANTS, XL_KEYS, Templates, Variant, file_of, nothing
from tests.nets import tiny_pipeline

RUNNING = [variant for variant in VARIANTS if variant.refusal is None]
REFUSED = [variant for variant in VARIANTS if variant.refusal is not None]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Templates]:
    yield Templates(tmp_path_factory.mktemp("templates"))


def image_of(path: Path) -> np.ndarray:
    """Load a model and sample one image of it."""
    model = DiffusionModel.load(path)
    prompts = model.encode_prompts(["a red circle"])
    config = SamplingConfig(num_steps=4)
    trajectory = sample(model.unet, model.scheduler, prompts, model.encode_prompts([""]), [1], config=config)
    return model.decode(trajectory.final)[0]


def require_outcome(templates: Templates, variant: Variant, folder: Path) -> None:
    """Any error other than dfusion's propagates."""
    path = templates.create(variant, folder)
    if variant.refusal is None:
        assert image_of(path).std() > 1, variant.name
        return
    with pytest.raises(DFusionError) as refused:
        image_of(path)
    assert re.search(variant.refusal, str(refused.value), re.DOTALL), f"{variant.name}: {refused.value}"


def test_the_sweep_is_wide() -> None:
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS) >= 300
    assert len(RUNNING) >= 50 and len(REFUSED) >= 150


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_a_file_lacks_are_not_random(templates: Templates, part: str, tmp_path: Path) -> None:
    [variant] = [variant for variant in VARIANTS if variant.name == f"{part} without a tensor"]
    require_outcome(templates, variant, tmp_path / "model")


@pytest.mark.parametrize("name", ["LCMScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_scheduler_of_another_kind_is_refused(templates: Templates, name: str, tmp_path: Path) -> None:
    [variant] = [variant for variant in VARIANTS if variant.name == name]
    require_outcome(templates, variant, tmp_path / "model")


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_zero_snr_with_epsilon_is_refused(templates: Templates, name: str, tmp_path: Path) -> None:
    [variant] = [variant for variant in VARIANTS if variant.name == f"{name} zero-SNR"]
    require_outcome(templates, variant, tmp_path / "model")


@pytest.mark.parametrize(
    "name",
    [
        "text encoder of an old transformers",
        "SDXL text encoders of an old transformers",
        "VAE of SD 1.x",
        "vocabulary and merges",
        "SDXL vocabulary and merges",
    ],
)
@pytest.mark.slow
def test_files_as_the_hub_has_them_give_the_same_image(templates: Templates, name: str, tmp_path: Path) -> None:
    """Names of tensors and files of Stability AI's repositories, which are older than those that are saved today."""
    [variant] = [variant for variant in VARIANTS if variant.name == name]
    [plain] = [other for other in VARIANTS if other.name == ("SDXL" if variant.xl else "SD")]
    path = templates.create(variant, tmp_path / "model")
    assert np.array_equal(image_of(path), image_of(templates.create(plain, tmp_path / "plain")))


@pytest.mark.slow
def test_the_command_of_the_error_converts_pickles(tmp_path: Path) -> None:
    """A folder with .bin weights, as they were saved before safetensors."""
    folder = tmp_path / "model"
    tiny_pipeline().save_pretrained(folder)
    for file in list(folder.glob("*/*.safetensors")):
        name = "pytorch_model.bin" if file.stem == "model" else "diffusion_pytorch_model.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()

    with pytest.raises(UnsupportedModelError, match="a pickle") as refused:
        DiffusionModel.load(folder)
    command = str(refused.value).partition("convert it: ")[2]
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    exec(code, {})
    plain = Templates(tmp_path / "templates").create(Variant("", nothing), tmp_path / "plain")
    assert np.array_equal(image_of(tmp_path / "model-safetensors"), image_of(plain))


def test_the_command_of_the_error_names_what_diffusers_has(tmp_path: Path) -> None:
    """The conversion itself needs the model hub, for the configs."""
    for keys, kind in ((SD_KEYS, StableDiffusionPipeline), (XL_KEYS, StableDiffusionXLPipeline)):
        file = file_of("my model.safetensors", keys)(tmp_path / "x")
        with pytest.raises(UnsupportedModelError, match="single-file") as refused:
            DiffusionModel.load(str(file))
        *_, code = shlex.split(str(refused.value).partition("Convert it: ")[2])
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        arguments = [ast.literal_eval(argument) for call in calls for argument in call.args]
        assert sorted(arguments) == sorted([str(file), str(file.with_suffix(""))])
        assert hasattr(kind, "from_single_file") and f"import {kind.__name__} as P" in code


EVERY_FOURTH = [
    pytest.param(variant, id=variant.name, marks=() if n % 4 == 0 else pytest.mark.long)
    for n, variant in enumerate(VARIANTS)
]


@pytest.mark.parametrize("variant", EVERY_FOURTH)
def test_every_folder_runs_or_is_refused_by_name(templates: Templates, variant: Variant, tmp_path: Path) -> None:
    require_outcome(templates, variant, tmp_path / "model")
