"""The fused sampler against `benchmarks.plain_fusion`, an independent implementation of the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import get_args

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.plain_fusion import plain_fuse
from dfusion.config import AttentionControl, FusionConfig, SamplingConfig
from dfusion.errors import InvalidInputError, NonFiniteError, ScheduleError, ShapeMismatchError
from dfusion.fused_sampling import fuse
from dfusion.inversion import invert
from dfusion.sampling import sample
from dfusion.types import Conditioning, Trajectory
from tests.nets import (
    TOKENS,
    WIDTH,
    XL_POOLED,
    XL_WIDTH,
    embeds,
    relative_error,
    sd_scheduler,
    sd_unet,
    sharpened,
    tiny_unet,
    tiny_xl_unet,
)

ITEMS = [[(1,), (3, 4)], [(2,)], [(5,), (0,), (2,)]]
REFERENCE_SEEDS = [10, 11, 12]
BASE_SEEDS = [20, 21, 22]


def balanced_thresholds(maps: torch.Tensor, counts: list[int]) -> list[list[float]]:
    """For each item a threshold near the middle of its maps over all steps, as far as possible from any value.

    Rounding then cannot change a pixel.
    """
    chosen = []
    for sample_maps, count in zip(maps, counts, strict=True):
        row = []
        for k in range(count):
            values = sample_maps[..., k].flatten().sort().values.double()
            middle = values[len(values) * 2 // 5 : len(values) * 3 // 5]
            widest = int(middle.diff().argmax())
            row.append(float((middle[widest] + middle[widest + 1]) / 2))
        chosen.append(row)
    return chosen


def pairs(
    unet: UNet2DConditionModel, size: tuple[int, int], config: SamplingConfig, mask_source: str, count: int = 3
) -> tuple[Trajectory, Trajectory, list[list[float]]]:
    """References and bases of `count` prompts, and thresholds."""
    arguments = (unet, sd_scheduler(), embeds(count), embeds(1, seed=2))
    reference = sample(
        *arguments,
        REFERENCE_SEEDS[:count],
        items=ITEMS[:count],
        config=config,
        mask_source=mask_source,
        latent_size=size,
    )
    base = sample(*arguments, BASE_SEEDS[:count], config=config, latent_size=size)
    return base, reference, balanced_thresholds(reference.item_maps, [len(items) for items in ITEMS[:count]])


def check_against_plain(
    unet: UNet2DConditionModel,
    size: tuple[int, int],
    guidance: float,
    config: FusionConfig,
    count: int,
    steps: int,
    compared: Sequence[int] | None = None,
) -> None:
    """Compare these pairs of a batch; by default all."""
    sampling = SamplingConfig(num_steps=steps, guidance_scale=guidance)
    base, reference, thresholds = pairs(unet, size, sampling, config.mask_source, count)
    target = fuse(
        unet,
        sd_scheduler(),
        base,
        reference,
        embeds(count),
        embeds(1, seed=2),
        thresholds=thresholds,
        config=config,
    )
    for b in range(count) if compared is None else compared:
        states = plain_fuse(
            unet,
            sd_scheduler(),
            prompt=embeds(count)[b : b + 1],
            negative=embeds(1, seed=2),
            seeds=[(REFERENCE_SEEDS[b], BASE_SEEDS[b])],
            items=ITEMS[b],
            thresholds=thresholds[b],
            size=size,
            steps=steps,
            guidance=guidance,
            merge=config.merge,
            mask_source=config.mask_source,
            control=config.control,
            first_step=config.first_step,
            last_step=steps - 1 if config.last_step is None else config.last_step,
        )
        for ours, (plain,) in zip((reference, base, target), states, strict=True):
            assert relative_error(ours.latents[b], plain) < 1e-5
            assert relative_error(ours.final[b], plain[-1]) < 1e-5
        assert relative_error(target.final[b], base.final[b]) > 1e-3  # fusion did something


def small_unet() -> UNet2DConditionModel:
    """Two levels, for what does not depend on their number."""
    return sharpened(tiny_unet())


@pytest.mark.slow
def test_sd_layout_at_64_by_64() -> None:
    """Two fused steps of three: the sizes of all levels are Stable Diffusion's; twenty steps are compared below."""
    check_against_plain(sd_unet(64, heads=1), (64, 64), 5.0, FusionConfig(first_step=1), count=1, steps=3)


@pytest.mark.slow
def test_a_batch_of_prompts_in_the_released_codes_way() -> None:
    """Over 32 x 32 latents, so that masks are enlarged as well as reduced."""
    config = FusionConfig.released_code().model_copy(update={"first_step": 1})
    check_against_plain(sd_unet(32, heads=1), (32, 32), 5.0, config, count=2, steps=3)


@pytest.mark.parametrize("merge", ["xor", "or"])
@pytest.mark.parametrize("mask_source", ["first_up", "resolution"])
@pytest.mark.slow
def test_items_thresholds_and_prompts_of_each_pair(merge: str, mask_source: str) -> None:
    """The paper's way over its twenty steps, in two levels, for the second of two prompts; the others over five."""
    config = FusionConfig(merge=merge, mask_source=mask_source)
    if config == FusionConfig():
        check_against_plain(small_unet(), (8, 8), 5.0, config, count=2, steps=20, compared=[1])
    else:
        check_against_plain(sd_unet(16), (16, 16), 5.0, config, count=3, steps=5)


@pytest.mark.slow
def test_without_guidance() -> None:
    check_against_plain(small_unet(), (8, 8), 1.0, FusionConfig(), count=2, steps=5)


@pytest.mark.slow
def test_images_that_are_not_square() -> None:
    check_against_plain(sd_unet(16), (16, 32), 5.0, FusionConfig(), count=2, steps=5)


@pytest.mark.parametrize("steps", [5, 21])
@pytest.mark.slow
def test_fusion_continues_to_the_last_step_of_any_sampler(steps: int) -> None:
    check_against_plain(small_unet(), (8, 8), 5.0, FusionConfig(), count=1, steps=steps)


@pytest.mark.slow
def test_plain_steps_before_and_after_the_fused_ones() -> None:
    check_against_plain(small_unet(), (8, 8), 5.0, FusionConfig(first_step=2, last_step=3), count=2, steps=5)


@pytest.mark.slow
def test_several_transformers_in_a_block() -> None:
    check_against_plain(
        sd_unet(16, transformer_layers=2), (16, 16), 5.0, FusionConfig.released_code(), count=1, steps=5
    )


@pytest.mark.parametrize("control", get_args(AttentionControl))
@pytest.mark.slow
def test_attention_controls(control: AttentionControl) -> None:
    """Both of two pairs are compared with the default control, otherwise one: the first by every other control."""
    config = FusionConfig(control=control, first_step=1, last_step=2)
    compared = [0, 1] if config.control == FusionConfig().control else [get_args(AttentionControl).index(control) % 2]
    check_against_plain(small_unet(), (8, 8), 5.0, config, count=2, steps=4, compared=compared)


FIVE = SamplingConfig(num_steps=5)


def fuse_five(
    base: Trajectory,
    reference: Trajectory,
    thresholds: list[list[float]],
    unet: UNet2DConditionModel,
    **changes: object,
) -> Trajectory:
    prompts = embeds(len(base))
    return fuse(unet, sd_scheduler(), base, reference, prompts, embeds(1, seed=2), thresholds=thresholds, **changes)


@pytest.mark.parametrize("control", ["masked_kv", "masactrl_maps", "masactrl_features", "masactrl"])
@pytest.mark.slow
def test_an_empty_mask_gives_the_base(control: AttentionControl) -> None:
    unet = sd_unet(16)
    base, reference, thresholds = pairs(unet, (16, 16), FIVE, "first_up")
    config = FusionConfig(control=control)
    target = fuse_five(base, reference, [[0.999999] * len(row) for row in thresholds], unet, config=config)
    assert relative_error(target.latents, base.latents) < 1e-5
    torch.testing.assert_close(target.log_probs, base.log_probs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_full_mask_takes_keys_and_values_whole() -> None:
    """With a full mask, masking keys and values, or the output, equals no mask."""
    unet = sd_unet(16)
    base, reference, thresholds = pairs(unet, (16, 16), FIVE, "first_up", count=1)
    full = [[1e-9] * len(row) for row in thresholds]
    whole = fuse_five(base, reference, full, unet, config=FusionConfig(control="kv"))
    for control in ("masked_kv", "masactrl_features", "masactrl"):
        masked = fuse_five(base, reference, full, unet, config=FusionConfig(control=control, merge="or"))
        assert relative_error(masked.latents, whole.latents) < 1e-5


@pytest.mark.slow
def test_no_two_attention_controls_are_the_same() -> None:
    unet = sd_unet(16)
    base, reference, thresholds = pairs(unet, (16, 16), FIVE, "first_up", count=1)
    finals = {
        control: fuse_five(base, reference, thresholds, unet, config=FusionConfig(control=control)).final
        for control in get_args(AttentionControl)
    }
    for (first, a), (second, b) in combinations(finals.items(), 2):
        assert relative_error(a, b) > 1e-4, (first, second)


@pytest.mark.slow
def test_an_inverted_trajectory_ends_with_the_fused_latents() -> None:
    unet = sd_unet(16)
    base, reference, thresholds = pairs(unet, (16, 16), FIVE, "first_up", count=1)
    fused = fuse_five(base, reference, thresholds, unet)
    actual = fuse_five(base, reference, thresholds, unet, config=FusionConfig(trajectory="ddim_inversion"))
    arguments = (unet, sd_scheduler(), fused.final, embeds(1), embeds(1, seed=2))
    expected = invert(*arguments, seeds=base.seeds, config=FIVE).trajectory
    assert torch.equal(actual.final, fused.final) and torch.equal(actual.latents, expected.latents)
    assert (actual.seeds, actual.config) == (base.seeds, base.config)


def test_states_before_the_first_fused_step_are_the_bases() -> None:
    unet = sd_unet(16)
    base, reference, thresholds = pairs(unet, (16, 16), FIVE, "first_up")
    target = fuse_five(base, reference, thresholds, unet, config=FusionConfig(first_step=3))
    assert torch.equal(target.latents[:, :4], base.latents[:, :4])
    assert not torch.equal(target.latents[:, 4], base.latents[:, 4])
    assert target.seeds == base.seeds and target.item_maps is None


@pytest.mark.slow
def test_one_reference_of_several_targets_is_computed_once() -> None:
    """Five steps, three of them fused: each is one call on (1 reference + 2 targets) x 2 guidance halves."""
    unet = sd_unet(16)
    base, reference, thresholds = pairs(unet, (16, 16), FIVE, "first_up")
    both = base.select([0, 1])
    prompts = embeds(3)[[0, 0]]
    shared = reference.select([0, 0])
    arguments = (unet, sd_scheduler(), both, shared, prompts, embeds(1, seed=2))
    rows: list[int] = []
    hook = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    together = fuse(*arguments, thresholds=[thresholds[0]] * 2)
    hook.remove()

    assert rows == [6, 6, 6]

    alone = fuse(
        unet,
        sd_scheduler(),
        base.select([1]),
        reference.select([0]),
        prompts[:1],
        embeds(1, seed=2),
        thresholds=thresholds[:1],
    )

    assert relative_error(together.latents[1], alone.latents[0]) < 1e-5


@pytest.mark.slow
def test_references_that_differ_are_not_merged() -> None:
    unet = sd_unet(16)
    base, reference, thresholds = pairs(unet, (16, 16), FIVE, "first_up")
    rows: list[int] = []
    hook = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    fuse_five(base, replace(reference, seeds=(10, 10, 10)), thresholds, unet)
    hook.remove()
    assert rows == [12, 12, 12]


def spoiled(trajectory: Trajectory) -> Trajectory:
    """The same with a NaN in its last state."""
    latents = trajectory.latents.clone()
    latents[0, -1, 0, 0, 0] = math.nan
    return replace(trajectory, latents=latents)


def test_invalid_arguments_are_rejected() -> None:
    unet = tiny_unet()
    arguments = (unet, sd_scheduler(), embeds(1), embeds(1, seed=2))
    reference = sample(*arguments, [1], items=[[1]], config=FIVE)
    base = sample(*arguments, [2], config=FIVE)

    with pytest.raises(InvalidInputError, match="item_maps"):
        fuse_five(reference, base, [[0.1]], unet)
    with pytest.raises(InvalidInputError, match="config"):
        fuse_five(sample(*arguments, [2], config=SamplingConfig(num_steps=5, eta=0.5)), reference, [[0.1]], unet)
    with pytest.raises(InvalidInputError, match="thresholds"):
        fuse_five(base, reference, [[0.1, 0.2]], unet)
    with pytest.raises(InvalidInputError, match="between 0 and 1"):
        fuse_five(base, reference, [[1.5]], unet)
    with pytest.raises(InvalidInputError, match="mask_source"):
        fuse_five(base, reference, [[0.1]], unet, config=FusionConfig.released_code())
    with pytest.raises(InvalidInputError, match="first_step"):
        fuse_five(base, reference, [[0.1]], unet, config=FusionConfig(first_step=5))

    other_items = sample(*arguments, [2], items=[[3]], config=FIVE)
    with pytest.raises(InvalidInputError, match=r"one prompt, got items at \(\(\(3,\),\),\) and \(\(\(1,\),\),\)"):
        fuse_five(other_items, reference, [[0.1]], unet)

    conditionings = (Conditioning(embeds(1), texts=("a cat",)), Conditioning(embeds(1), texts=("a dog",)))
    cat, dog = (
        sample(*arguments[:2], conditioning, arguments[3], [2], items=[[1]], config=FIVE)
        for conditioning in conditionings
    )

    with pytest.raises(InvalidInputError, match=r"in the samples and in prompt_embeds, got .*'a cat'.*'a dog'"):
        fuse_five(cat, dog, [[0.1]], unet)
    with pytest.raises(InvalidInputError, match=r"'prompt_embeds': .'a dog'"):
        fuse(unet, sd_scheduler(), cat, cat, conditionings[1], arguments[3], thresholds=[[0.1]])
    with pytest.raises(ScheduleError, match="timesteps"):
        trailing = sd_scheduler(timestep_spacing="trailing", steps_offset=0)
        fuse(unet, trailing, base, reference, arguments[2], arguments[3], thresholds=[[0.1]])
    for name, sides in (("base", (spoiled(base), reference)), ("reference", (base, spoiled(reference)))):
        with pytest.raises(NonFiniteError, match=f"{name}.latents"):
            fuse_five(*sides, [[0.1]], unet)
    with pytest.raises(ShapeMismatchError, match="reference"):
        wide = sample(*arguments, [2], config=FIVE, latent_size=(8, 16))
        fuse_five(wide, reference, [[0.1]], unet)


def test_sdxl_conditionings_stay_with_their_rows() -> None:
    unet = tiny_xl_unet()
    generator = torch.Generator().manual_seed(0)
    prompt, negative = (
        Conditioning(
            torch.randn(rows, TOKENS, WIDTH + XL_WIDTH, generator=generator),
            torch.randn(rows, XL_POOLED, generator=generator),
            torch.full((rows, 6), 16.0),
        )
        for rows in (2, 1)
    )
    reference = sample(unet, sd_scheduler(), prompt, negative, [1, 2], items=[[1], [2]], config=FIVE)
    base = sample(unet, sd_scheduler(), prompt, negative, [3, 4], config=FIVE)
    thresholds = balanced_thresholds(reference.item_maps, [1, 1])
    together = fuse(unet, sd_scheduler(), base, reference, prompt, negative, thresholds=thresholds)
    second = base.select([1]), reference.select([1])
    alone = fuse(unet, sd_scheduler(), *second, prompt[1], negative, thresholds=thresholds[1:])

    assert relative_error(together.latents[1], alone.latents[0]) < 1e-5
    assert relative_error(alone.final[0], base.final[1]) > 1e-4
