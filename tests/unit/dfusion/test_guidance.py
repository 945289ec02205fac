import pytest
import torch

from dfusion.errors import InvalidInputError, ShapeMismatchError
from dfusion.guidance import check_embeds, predict
from dfusion.types import Conditioning
from tests.nets import WIDTH, XL_POOLED, XL_WIDTH, embeds, tiny_unet, tiny_xl_unet


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
    with pytest.raises(InvalidInputError, match="without"):
        predict(tiny_unet(), *arguments, xl_conditioning(1, 1), None, 1.0)
    with pytest.raises(ShapeMismatchError, match=f"N, {WIDTH}"):
        predict(tiny_unet(), *arguments, torch.zeros(1, 7, WIDTH + 1), None, 1.0)
    with pytest.raises(ShapeMismatchError, match="negative_prompt_embeds"):
        check_embeds(xl_conditioning(1, 1), Conditioning(xl_conditioning(1, 1).embeds), 1, 5.0)
