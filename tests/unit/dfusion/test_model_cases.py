"""The rows of the cases page about models: each input runs, or is refused before any work, in the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dfusion.config import FusionConfig, SamplingConfig
from dfusion.errors import InvalidInputError, NonFiniteError, ScheduleError, UnsupportedModelError
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.policy import log_probs
from dfusion.sampling import sample
from tests.model_folders import (
    WEIGHTS,
    Change,
    Templates,
    Variant,
    as_variant,
    both,
    file_of,
    nothing,
    schedule,
    scheduler,
)

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Templates]:
    yield Templates(tmp_path_factory.mktemp("templates"))


@pytest.fixture
def folder(templates: Templates, tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that creates a changed pipeline, and gives the path to load."""
    return lambda change, xl=False: templates.create(Variant("", change, xl=xl), tmp_path / "model")


REFUSED: dict[str, tuple[Change, str]] = {
    "FlowMatchEulerDiscreteScheduler": (
        scheduler("FlowMatchEulerDiscreteScheduler"),
        "FlowMatchEulerDiscreteScheduler: a flow-matching model",
    ),
    "flow_prediction of UniPC": (
        scheduler("UniPCMultistepScheduler", prediction_type="flow_prediction"),
        "flow_prediction: a flow-matching model",
    ),
    "flow_prediction of DPM++": (
        scheduler("DPMSolverMultistepScheduler", prediction_type="flow_prediction"),
        "flow_prediction: a flow-matching model",
    ),
    "zero-terminal-SNR betas with epsilon prediction": (
        schedule(rescale_betas_zero_snr=True),
        "v-prediction and trailing spacing",
    ),
    "LCM scheduler": (scheduler("LCMScheduler"), "LCMScheduler: a distilled few-step model is not a policy of Eq. 1"),
    "turbo": (
        scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing"),
        "turbo and lightning models: a distilled few-step model is not a policy of Eq. 1",
    ),
    "single-file safetensors checkpoint": (
        file_of("sd.safetensors", ("model.diffusion_model.x", "cond_stage_model.x")),
        "Convert it: python -c .*StableDiffusionPipeline as P; P.from_single_file",
    ),
    "single-file ckpt checkpoint": (file_of("sd.ckpt"), "a pickle, which can run code and is never loaded"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_refused_by_name(row: str, folder: Callable[..., Path]) -> None:
    change, cause = REFUSED[row]
    with pytest.raises(UnsupportedModelError, match=cause):
        DiffusionModel.load(folder(change))


def test_only_fp16_variant_files(folder: Callable[..., Path]) -> None:
    """The same weights as the full-precision files rounded to float16, and the variant is said."""
    path = folder(nothing)
    full = DiffusionModel.load(path).unet.state_dict()
    both(*(as_variant(part, "fp16") for part in WEIGHTS))(path)
    model = DiffusionModel.load(path)
    assert all(torch.equal(value, full[name].half().float()) for name, value in model.unet.state_dict().items())
    [note] = model.notes
    assert note == "only fp16 weights of unet, vae, text_encoder: loaded, and cast to the model's precision"


def test_vae_in_float16_that_overflows(templates: Templates) -> None:
    model = DiffusionModel.load(templates.overflowing, vae_dtype="float16")
    with pytest.raises(NonFiniteError, match=r'VAE in float16: .* vae_dtype "float32"'):
        model.decode(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_num_steps_1_with_leading_spacing(folder: Callable[..., Path]) -> None:
    model = DiffusionModel.load(folder(nothing))
    negative = model.encode_prompts([""])
    one_step = SamplingConfig(num_steps=1)
    with pytest.raises(ScheduleError, match="num_steps: expected at least 2 with leading spacing, got 1"):
        sample(model.unet, model.scheduler, model.encode_prompts([PROMPT]), negative, [1], config=one_step)


def test_image_size_other_than_the_models_own(folder: Callable[..., Path]) -> None:
    """SDXL of 8 x 12 latents: sampled, replayed and fused at that size, with its time ids. This VAE halves once."""
    model = DiffusionModel.load(folder(nothing, xl=True))
    config = SamplingConfig(num_steps=3, height=16, width=24)
    with pytest.raises(InvalidInputError, match="width: expected a multiple of 2 pixels"):
        model.latent_size(config.model_copy(update={"width": 23}))

    size = model.latent_size(config)
    prompts = model.encode_prompts([PROMPT], size)
    negative = model.encode_prompts([""], size)
    items = [model.item_tokens(PROMPT, ["circle"])]
    base, reference = (
        sample(model.unet, model.scheduler, prompts, negative, [seed], items=items, config=config, latent_size=size)
        for seed in (1, 2)
    )
    assert prompts.time_ids is not None and prompts.time_ids.tolist() == [[16, 24, 0, 0, 16, 24]]
    assert base.latents.shape == (1, 4, 4, 8, 12) and (base.config.height, base.config.width) == (16, 24)

    fusion = FusionConfig(first_step=1, last_step=2)
    target = fuse(model.unet, model.scheduler, base, reference, prompts, negative, thresholds=[[1e-6]], config=fusion)
    assert target.latents.shape == base.latents.shape and model.decode(target.final).shape == (1, 16, 24, 3)
    with torch.no_grad():
        replayed = log_probs(model.unet, model.scheduler, base, prompts, negative)
    torch.testing.assert_close(replayed, base.log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_other_samplers_are_replaced_by_ddim_and_that_is_said(name: str, folder: Callable[..., Path]) -> None:
    model = DiffusionModel.load(folder(scheduler(name)))
    assert type(model.scheduler).__name__ == "DDIMScheduler"
    assert model.notes == (f"sampled by DDIM (Eq. 1) with the betas of the {name}",)
