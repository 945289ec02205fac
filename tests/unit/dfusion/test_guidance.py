import pytest
import torch

from dfusion.adapter import attach_lora
from dfusion.config import SamplingConfig, TrainingConfig
from dfusion.errors import InvalidInputError, ShapeMismatchError
from dfusion.guidance import check_embeds, check_negative, predict
from dfusion.sampling import sample
from dfusion.training import Trainer
from dfusion.training_data import TrainingPair
from dfusion.types import Conditioning
from tests.nets import WIDTH, XL_POOLED, XL_WIDTH, embeds, tiny_model, tiny_unet, tiny_xl_unet


def xl_conditioning(rows: int, seed: int) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(rows, -1)
    return Conditioning(
        torch.randn(rows, 7, WIDTH + XL_WIDTH, generator=generator),
        torch.randn(rows, XL_POOLED, generator=generator),
        sizes,
    )


def latents(rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_sdxl_guidance_by_two_separate_calls() -> None:
    unet = tiny_xl_unet()
    prompts = xl_conditioning(2, 1)
    negative = xl_conditioning(2, 2)

    def call(conditioning: Conditioning) -> torch.Tensor:
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        return unet(latents(2), 5, encoder_hidden_states=conditioning.embeds, added_cond_kwargs=added).sample

    with torch.no_grad():
        got = predict(unet, latents(2), torch.tensor(5), prompts, negative, 3.0)
        cond = call(prompts)
        uncond = call(negative)
    torch.testing.assert_close(got, uncond + 3 * (cond - uncond), rtol=1e-4, atol=1e-5)


def test_pooled_embeddings_and_sizes_reach_the_unet() -> None:
    unet = tiny_xl_unet()
    prompts = xl_conditioning(1, 1)
    with torch.no_grad():
        first = predict(unet, latents(1), torch.tensor(5), prompts, None, 1.0)
        for changed in (
            Conditioning(prompts.embeds, prompts.pooled + 1, prompts.time_ids),
            Conditioning(prompts.embeds, prompts.pooled, prompts.time_ids + 8),
        ):
            assert not torch.allclose(predict(unet, latents(1), torch.tensor(5), changed, None, 1.0), first, atol=1e-6)


@pytest.mark.parametrize("xl", [False, True])
def test_a_single_negative_row_serves_all(xl: bool) -> None:
    prompts = xl_conditioning(3, 1) if xl else embeds(3)
    negative = check_embeds(prompts, prompts[:1], 3, 5.0)
    assert isinstance(negative, type(prompts)) and len(negative) == 3
    assert all(Conditioning.of(negative)[i].equals(Conditioning.of(prompts)[0]) for i in range(3))
    assert check_embeds(prompts, None, 3, 1.0) is None


def test_conditioning_of_another_kind_of_model_is_rejected() -> None:
    arguments = (latents(1), torch.tensor(5))
    with pytest.raises(InvalidInputError, match="SDXL"):
        predict(tiny_xl_unet(), *arguments, xl_conditioning(1, 1).embeds, None, 1.0)
    with pytest.raises(InvalidInputError, match="expected neither pooled embeddings nor time ids"):
        predict(tiny_unet(), *arguments, xl_conditioning(1, 1), None, 1.0)
    with pytest.raises(ShapeMismatchError, match=f"N, {WIDTH}"):
        predict(tiny_unet(), *arguments, torch.zeros(1, 7, WIDTH + 1), None, 1.0)
    with pytest.raises(ShapeMismatchError, match="negative_prompt_embeds"):
        check_embeds(xl_conditioning(1, 1), Conditioning(xl_conditioning(1, 1).embeds), 1, 5.0)


def test_training_uses_the_negative_prompt_of_the_samples() -> None:
    """The first update replays the samples: its ratio would differ from 1 with another negative prompt."""
    model = tiny_model()
    config = SamplingConfig(num_steps=4, negative_prompt="a blue dog")
    prompts = ["a red circle"] * 2
    negative = model.encode_prompts([config.negative_prompt])
    trajectory = sample(model.unet, model.scheduler, model.encode_prompts(prompts), negative, [1, 2], config=config)
    plain = sample(
        model.unet,
        model.scheduler,
        model.encode_prompts(prompts),
        model.encode_prompts([""]),
        [1, 2],
        config=SamplingConfig(num_steps=4),
    )
    assert not torch.allclose(trajectory.final, plain.final, atol=1e-4)

    attach_lora(model.unet, seed=1)
    pair = TrainingPair(trajectory.select([0]), trajectory.select([1]), prompts[0])
    report = Trainer(model, [pair], TrainingConfig(ratio_tolerance=1e-5), seed=0).step()
    assert report.loss == pytest.approx(0.693, abs=1e-3)  # log 2: no change yet


def test_embeddings_of_another_negative_prompt_are_rejected() -> None:
    prompts = Conditioning(embeds(2), texts=("a cat", "a dog"))
    empty = Conditioning(embeds(1), texts=("",))
    config = SamplingConfig(negative_prompt="blurry")
    with pytest.raises(InvalidInputError, match=r"expected embeddings of config\.negative_prompt, 'blurry'"):
        check_negative(prompts, empty, 2, config)
    with pytest.raises(InvalidInputError, match="negative_prompt, '', got embeddings of"):
        check_negative(prompts, Conditioning(embeds(1), texts=("blurry",)), 2, SamplingConfig())
    assert check_negative(prompts, Conditioning(embeds(1), texts=("blurry",)), 2, config) is not None
    assert check_negative(prompts, embeds(1), 2, config) is not None  # a tensor of unknown text
    assert check_negative(prompts, empty, 2, SamplingConfig(guidance_scale=1)) is None


def test_a_negative_prompt_without_guidance_is_rejected() -> None:
    with pytest.raises(ValueError, match="expected no negative_prompt at guidance_scale 1"):
        SamplingConfig(negative_prompt="blurry", guidance_scale=1)
