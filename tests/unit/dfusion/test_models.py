from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dfusion import _torchvision_ops  # noqa: F401

# isort: split
from diffusers import EulerDiscreteScheduler

from dfusion.errors import InvalidInputError, ItemNotInPromptError, ModelNotFoundError, ShapeMismatchError
from dfusion.models import DiffusionModel
from tests.nets import tiny_model, tiny_pipeline


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    yield tiny_model()


def test_load_gives_what_was_saved_in_float32_with_ddim(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    expected = {name: value.half().float() for name, value in pipeline.unet.state_dict().items()}
    pipeline.to(torch.float16).save_pretrained(tmp_path)
    loaded = DiffusionModel.load(tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.unet.state_dict().items())
    assert loaded.unet.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.float32
    assert not loaded.unet.training and not any(p.requires_grad for p in loaded.unet.parameters())
    assert loaded.scheduler.config.set_alpha_to_one is False
    assert loaded.latent_shape == (4, 8, 8)


def test_ddim_clips_nothing_where_another_schedulers_settings_do_not_say(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_schedule="scaled_linear", steps_offset=1)
    pipeline.save_pretrained(tmp_path)
    config = DiffusionModel.load(tmp_path).scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one) == (False, False)
    assert (config.beta_start, config.beta_schedule) == (0.00085, "scaled_linear")


def test_missing_and_pickled_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="model_index"):
        DiffusionModel.load(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelNotFoundError):
        DiffusionModel.load(tmp_path)


def test_items_are_found_after_bos(model: DiffusionModel) -> None:
    text = "a red square above a blue circle"
    ids = model.tokenizer(text).input_ids
    assert ids[0] == model.tokenizer.bos_token_id
    (square,), blue_circle = model.item_tokens(text, ["square", "blue circle"])
    assert ids[square + 1] == model.tokenizer.convert_tokens_to_ids("square</w>")
    assert [model.tokenizer.convert_ids_to_tokens(ids[j + 1]) for j in blue_circle] == ["blue</w>", "circle</w>"]
    assert (square, blue_circle) == (2, (5, 6))


def test_every_mention_counts_and_parts_of_words_do_not(model: DiffusionModel) -> None:
    assert model.item_tokens("red circle red", ["red"]) == ((0, 2),)
    with pytest.raises(ItemNotInPromptError):
        model.item_tokens("xyred circle", ["red"])
    with pytest.raises(ItemNotInPromptError, match="'star'"):
        model.item_tokens("a red circle", ["star"])


def test_embeddings_are_the_text_encoders_and_long_prompts_are_refused(model: DiffusionModel) -> None:
    embeds = model.encode_prompts(["a red circle", ""])
    length = model.tokenizer.model_max_length
    assert embeds.shape == (2, length, 16) and embeds.dtype == torch.float32 and not embeds.requires_grad
    empty = [model.tokenizer.bos_token_id, model.tokenizer.eos_token_id]
    empty += [model.tokenizer.pad_token_id] * (length - 2)
    torch.testing.assert_close(embeds[1], model.text_encoder(torch.tensor([empty]))[0][0])
    with pytest.raises(InvalidInputError, match="tokens"):
        model.encode_prompts(["red " * (length - 1)])


def test_decode_gives_pixels(model: DiffusionModel) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = model.decode(latents)
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
    with torch.no_grad():
        raw = model.vae.decode(latents / model.vae.config.scaling_factor).sample
    expected = np.rint(((raw.numpy().transpose(0, 2, 3, 1) + 1) * 127.5).clip(0, 255))
    assert np.abs(images.astype(float) - expected).max() <= 1
    with pytest.raises(ShapeMismatchError):
        model.decode(latents[:, :3])
