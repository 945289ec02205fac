import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch._dynamo
from diffusers import EulerDiscreteScheduler, LCMScheduler

from dfusion import models
from dfusion.adapter import attach_lora
from dfusion.config import FusionConfig, SamplingConfig
from dfusion.errors import (
    InvalidInputError,
    ItemNotInPromptError,
    ModelNotFoundError,
    NonFiniteError,
    ShapeMismatchError,
    UnsupportedModelError,
)
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel, Pipeline
from dfusion.policy import log_probs
from dfusion.sampling import sample
from tests.clip_tokenizer import clip_tokenizer
from tests.model_folders import edit
from tests.nets import overflowing_pipeline, relative_error, tiny_model, tiny_pipeline, tiny_xl_model, tiny_xl_pipeline

PROMPTS = ["a red circle", "a blue square above a star"]
FOUR = SamplingConfig(num_steps=4)


@pytest.fixture(scope="module")
def model() -> Iterator[DiffusionModel]:
    yield tiny_model()


@pytest.fixture(scope="module")
def xl_model() -> Iterator[DiffusionModel]:
    yield tiny_xl_model()


def sampled_latents(model: DiffusionModel, seeds: list[int]) -> torch.Tensor:
    """Our samples of the prompts: clean latents (B, C, h, w)."""
    embeds = model.encode_prompts(PROMPTS)
    negative = model.encode_prompts([""])
    return sample(model.unet, model.scheduler, embeds, negative, seeds, config=FOUR).final


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sdxl"])
def test_stock_pipelines_sample_the_same_latents(kind: str) -> None:
    """A stock pipeline with a DDIM scheduler and eta = 1 follows the seed contract: x_T, then one noise per step.

    Its guidance and its embeddings of prompts, sizes and the empty prompt are its own code.
    """
    pipeline: Pipeline = tiny_xl_pipeline() if kind == "sdxl" else tiny_pipeline(prediction_type=kind)
    pipeline.set_progress_bar_config(disable=True)
    stock = [
        pipeline(
            prompt,
            num_inference_steps=4,
            guidance_scale=5.0,
            eta=1.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images[0]
        for prompt, seed in zip(PROMPTS, [7, 8], strict=True)
    ]
    ours = sampled_latents(DiffusionModel.from_pipeline(pipeline), [7, 8])

    assert relative_error(ours, torch.stack(stock)) < 1e-4  # float32 over 4 steps, in batches of other sizes


def test_load_gives_what_was_saved_in_float32_with_ddim(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    expected = {name: value.half().float() for name, value in pipeline.unet.state_dict().items()}
    pipeline.to(torch.float16).save_pretrained(tmp_path)
    loaded = DiffusionModel.load(tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.unet.state_dict().items())
    assert loaded.unet.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.float32
    assert not loaded.unet.training and not any(p.requires_grad for p in loaded.unet.parameters())
    assert loaded.scheduler.config.set_alpha_to_one is False
    assert loaded.latent_shape == (4, 8, 8) and loaded.text_encoder_2 is None


def test_convolutions_are_in_channels_last(tmp_path: Path) -> None:
    """Of a loaded model, and of a pipeline, which can still be saved."""
    pipeline = tiny_pipeline()
    model = DiffusionModel.from_pipeline(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionModel.load(tmp_path)
    for network in (model.unet, model.vae, loaded.unet, loaded.vae):
        weights = [layer.weight for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
        assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    for name, value in model.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value)


@pytest.mark.slow
def test_sdxl_is_loaded_with_both_text_encoders(tmp_path: Path, xl_model: DiffusionModel) -> None:
    tiny_xl_pipeline().save_pretrained(tmp_path)
    loaded = DiffusionModel.load(str(tmp_path))
    assert loaded.empty_is_zero
    assert torch.equal(sampled_latents(loaded, [1, 2]), sampled_latents(xl_model, [1, 2]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_half_precision_is_for_the_networks_only(tmp_path: Path, dtype: str) -> None:
    """The VAE follows its config's force_upcast; states, log-probs and adapters are float32."""
    pipeline = tiny_xl_pipeline()
    half = getattr(torch, dtype)

    assert pipeline.vae.config.force_upcast

    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionModel.load(tmp_path, dtype=dtype)
    parts = (loaded.unet, loaded.text_encoder, loaded.text_encoder_2, loaded.vae)

    assert [part.dtype for part in parts] == [half, half, half, torch.float32]

    prompts = loaded.encode_prompts(PROMPTS)
    negative = loaded.encode_prompts([""])

    assert all(part.dtype == torch.float32 for part in prompts.tensors)

    trajectory = sample(loaded.unet, loaded.scheduler, prompts, negative, [1, 2], config=FOUR)
    assert trajectory.latents.dtype == trajectory.log_probs.dtype == torch.float32
    assert not torch.equal(trajectory.latents, trajectory.latents.to(half).float())  # not rounded on the way

    with torch.no_grad():
        replayed = log_probs(loaded.unet, loaded.scheduler, trajectory, prompts, negative)

    torch.testing.assert_close(replayed, trajectory.log_probs, rtol=0, atol=1e-5)
    assert loaded.decode(trajectory.final).shape == (2, 16, 16, 3)


def test_a_vae_without_force_upcast_uses_half_precision(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.vae.register_to_config(force_upcast=False)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionModel.load(tmp_path, dtype="bfloat16")
    assert loaded.vae.dtype == torch.bfloat16
    assert loaded.decode(torch.zeros(1, 4, 8, 8)).dtype == np.uint8
    with pytest.raises(InvalidInputError, match="float8"):
        DiffusionModel.load(tmp_path, dtype="float8")  # type: ignore[arg-type]


@pytest.mark.parametrize(("make", "expected"), [(tiny_pipeline, torch.float16), (tiny_xl_pipeline, torch.float32)])
def test_a_vae_config_without_force_upcast_is_read_as_by_stock_pipelines(
    tmp_path: Path, make: Any, expected: torch.dtype
) -> None:
    """SD's own configs lack the setting, and stock pipelines decode them in half precision."""
    make().save_pretrained(tmp_path)
    edit("vae/config.json", force_upcast=...)(tmp_path)
    assert DiffusionModel.load(tmp_path, dtype="float16").vae.dtype == expected


@pytest.mark.parametrize(("dtype", "batches"), [("float32", [1] * 10), ("float16", [8, 2])])
def test_a_vae_decodes_several_images_at_once_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, batches: list[int]
) -> None:
    """Eight images of this size have the largest number of pixels at once."""
    tiny_pipeline().save_pretrained(tmp_path)
    model = DiffusionModel.load(tmp_path, vae_dtype=dtype)
    decode = model.vae.decode
    sizes = []

    def counted(latents: torch.Tensor) -> Any:
        sizes.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(models, "_BATCH_PIXELS", 8 * 16 * 16)
    monkeypatch.setattr(model.vae, "decode", counted)
    latents = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = model.decode(latents)
    assert sizes == batches and images.shape == (10, 16, 16, 3)
    alone = model.decode(latents[9:])
    assert np.abs(images[9:].astype(int) - alone.astype(int)).max() <= (0 if dtype == "float32" else 2)


def test_a_v_prediction_model_loaded_as_epsilon_is_rejected(tmp_path: Path) -> None:
    tiny_pipeline(prediction_type="v_prediction").save_pretrained(tmp_path)
    assert DiffusionModel.load(tmp_path, prediction_type="v_prediction").scheduler.config.prediction_type
    with pytest.raises(InvalidInputError, match=r"expected 'v_prediction' .*, got 'epsilon'"):
        DiffusionModel.load(tmp_path, prediction_type="epsilon")


def test_ddim_does_not_clip_without_a_scheduler_setting(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_schedule="scaled_linear", steps_offset=1)
    pipeline.save_pretrained(tmp_path)
    config = DiffusionModel.load(tmp_path).scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one) == (False, False)
    assert (config.beta_start, config.beta_schedule) == (0.00085, "scaled_linear")


def test_missing_pickled_damaged_and_other_models_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="model_index"):
        DiffusionModel.load(tmp_path)

    tiny_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(ModelNotFoundError):
        DiffusionModel.load(tmp_path)

    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelNotFoundError):
        DiffusionModel.load(tmp_path)

    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))

    with pytest.raises(ModelNotFoundError, match="FluxPipeline"):
        DiffusionModel.load(tmp_path)


def test_items_are_found_after_bos(model: DiffusionModel) -> None:
    text = "a red square above a blue circle"
    ids = model.tokenizer(text).input_ids
    assert ids[0] == model.tokenizer.bos_token_id
    (square,), blue_circle = model.item_tokens(text, ["square", "blue circle"])
    assert ids[square + 1] == model.tokenizer.convert_tokens_to_ids("square</w>")
    assert [model.tokenizer.convert_ids_to_tokens(ids[j + 1]) for j in blue_circle] == ["blue</w>", "circle</w>"]
    assert (square, blue_circle) == (2, (5, 6))


def test_all_occurrences_count_and_parts_of_words_do_not(model: DiffusionModel) -> None:
    assert model.item_tokens("red circle red", ["red"]) == ((0, 2),)
    with pytest.raises(ItemNotInPromptError):
        model.item_tokens("xyred circle", ["red"])
    with pytest.raises(ItemNotInPromptError, match="'star'"):
        model.item_tokens("a red circle", ["star"])


@pytest.mark.parametrize(
    ("text", "items", "indices"),
    [
        ("a photo of an axolotl riding a skateboard", ["axolotl", "skateboard"], ((4, 5, 6, 7), (10,))),
        ("A red-haired cat, a Hat and another cat", ["cat", "hat", "red-haired cat"], ((4, 10), (7,), (1, 2, 3, 4))),
        ("a cat's hat", ["cat", "hat"], ((1,), (3,))),
        ("a catfish and a cat", ["cat"], ((4,),)),
        ("a naïve café", ["naïve", "café"], ((1, 2, 3), (4,))),
        ('the number "47"', ["47"], ((3, 4),)),
    ],
)
def test_items_by_clips_own_tokens(
    model: DiffusionModel, text: str, items: list[str], indices: tuple[tuple[int, ...], ...]
) -> None:
    """Words of several tokens, hyphens, punctuation, accents and digits; the tokens were counted by hand."""
    real = replace(model, tokenizer=clip_tokenizer())
    assert real.item_tokens(text, items) == indices


def test_clips_tokenizer_has_the_ids_of_open_clips_and_takes_75_tokens(model: DiffusionModel) -> None:
    real = replace(model, tokenizer=clip_tokenizer())
    text = 'A red-and-striped circle, "Ab9" 你好 naïve it\'s'
    for prompt in (text, "x " * 100, ""):
        ids = clip_tokenizer()(prompt, truncation=True).input_ids
        assert open_clip.tokenize([prompt])[0, : len(ids)].tolist() == ids
    assert len(clip_tokenizer()("x " * 100, truncation=True).input_ids) == 77

    assert real.item_tokens("x " * 74 + "cat", ["cat"]) == ((74,),)
    with pytest.raises(InvalidInputError, match="at most 75 tokens, got 76"):
        real.item_tokens("x " * 75 + "cat", ["cat"])


def test_embeddings_are_the_text_encoders_and_long_prompts_are_rejected(model: DiffusionModel) -> None:
    conditioning = model.encode_prompts(["a red circle", ""])
    embeds = conditioning.embeds
    length = model.tokenizer.model_max_length

    assert embeds.shape == (2, length, 16) and embeds.dtype == torch.float32 and not embeds.requires_grad
    assert conditioning.pooled is None and conditioning.time_ids is None

    empty = [model.tokenizer.bos_token_id, model.tokenizer.eos_token_id]
    empty += [model.tokenizer.pad_token_id] * (length - 2)

    torch.testing.assert_close(embeds[1], model.text_encoder(torch.tensor([empty]))[0][0])
    with pytest.raises(InvalidInputError, match="tokens"):
        model.encode_prompts(["red " * (length - 1)])
    for texts in ("a red circle", []):
        with pytest.raises(InvalidInputError, match="list of at least one text"):
            model.encode_prompts(texts)
    for device in ("gpu", "cuda:99"):
        with pytest.raises(InvalidInputError, match=f"device: .*'{device}'"):
            DiffusionModel.load("nowhere", device)


def test_a_stock_pipeline_whose_scheduler_ddim_cannot_replace_is_refused() -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(UnsupportedModelError, match="LCMScheduler: a distilled few-step model"):
        DiffusionModel.from_pipeline(pipeline)


@pytest.mark.parametrize("force_zeros", [False, True])
def test_sdxl_conditions_are_the_stock_pipelines(force_zeros: bool) -> None:
    pipeline = tiny_xl_pipeline(force_zeros)
    with torch.no_grad():
        stock = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    model = DiffusionModel.from_pipeline(pipeline)
    prompts = model.encode_prompts(PROMPTS)
    negative = model.encode_prompts(["", ""])
    got = (prompts.embeds, negative.embeds, prompts.pooled, negative.pooled)

    for ours, theirs in zip(got, stock, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert bool((negative.embeds == 0).all()) is force_zeros


def test_sdxl_time_ids_contain_the_size_in_pixels(xl_model: DiffusionModel) -> None:
    """Latents of 8x8 are 16x16 pixels: this VAE halves once. Not cropped: 0, 0."""
    assert xl_model.encode_prompts(PROMPTS).time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert xl_model.encode_prompts(PROMPTS[:1], (6, 10)).time_ids.tolist() == [[12, 20, 0, 0, 12, 20]]


def test_latents_have_the_requested_size(model: DiffusionModel) -> None:
    """This VAE halves once; the model's own images are 16 x 16."""
    assert model.latent_size(SamplingConfig()) == (8, 8)
    assert model.latent_size(SamplingConfig(height=12, width=20)) == (6, 10)
    assert model.latent_size(SamplingConfig(width=20)) == (8, 10)
    with pytest.raises(InvalidInputError, match=r"width: expected a multiple of 2 pixels \(20 or 22\), got 21"):
        model.latent_size(SamplingConfig(height=12, width=21))


def test_decode_gives_pixels(model: DiffusionModel) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = model.decode(latents)

    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
    assert np.array_equal(images[1:], model.decode(latents[1:]))

    with torch.no_grad():
        raw = model.vae.decode(latents / model.vae.config.scaling_factor).sample
    expected = np.rint(((raw.numpy().transpose(0, 2, 3, 1) + 1) * 127.5).clip(0, 255))

    assert np.abs(images.astype(float) - expected).max() <= 1
    with pytest.raises(ShapeMismatchError):
        model.decode(latents[:, :3])


def test_a_vae_that_overflows_in_half_precision_is_named_and_float32_decodes(tmp_path: Path) -> None:
    overflowing_pipeline().save_pretrained(tmp_path)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NonFiniteError, match=r'VAE in float16: .* vae_dtype "float32"'):
        DiffusionModel.load(tmp_path, vae_dtype="float16").decode(latents)
    upcast = DiffusionModel.load(tmp_path, dtype="float16", vae_dtype="float32")
    assert (upcast.unet.dtype, upcast.vae.dtype) == (torch.float16, torch.float32)
    assert upcast.decode(latents).std() > 0
    with pytest.raises(InvalidInputError, match=r"vae_dtype: .*'float8'"):
        DiffusionModel.load(tmp_path, vae_dtype="float8")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_decode_names_non_finite_latents_or_vae(value: float) -> None:
    model = tiny_model()
    latents = torch.zeros(2, 4, 8, 8)
    with torch.no_grad():
        model.vae.decoder.conv_out.bias[0] = value
    with pytest.raises(NonFiniteError, match=r"VAE in float32: .* weights"):
        model.decode(latents)
    latents[1, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match=r"^latents"):
        model.decode(latents)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of dynamo itself
def test_compiled_blocks_give_the_same_samples_targets_and_log_probs() -> None:
    """dynamo compiles them for its interpreter ("eager"), without breaks; a code generator only makes them faster."""
    prompt = "a red circle"
    config = SamplingConfig(num_steps=2, guidance_scale=1)

    def results(compiled: bool) -> list[torch.Tensor]:
        model = DiffusionModel.from_pipeline(tiny_pipeline(has_middle=False))
        attach_lora(model.unet)
        if compiled:
            model.compile(backend="eager")
        embeds = model.encode_prompts([prompt] * 2)
        parts = (model.unet, model.scheduler)

        items = [model.item_tokens(prompt, ["circle"])] * 2
        samples = sample(*parts, embeds, None, [1, 2], items=items, config=config)
        base = samples.select([1])
        reference = samples.select([0])
        target = fuse(
            *parts, base, reference, embeds[[0]], None, thresholds=[[0.05]], config=FusionConfig(first_step=0)
        )
        assert samples.item_maps is not None
        return [samples.latents, samples.item_maps, target.latents, log_probs(*parts, samples, embeds, None)]

    plain = results(compiled=False)
    torch._dynamo.utils.counters.clear()
    compiled = results(compiled=True)

    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert torch._dynamo.utils.counters["graph_break"] == {}
    for actual, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
