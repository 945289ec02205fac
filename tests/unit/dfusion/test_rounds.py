"""A whole round in one call, against its separate parts."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dfusion import rounds
from dfusion.adapter import attach_lora, has_lora, lora_config, lora_parameters
from dfusion.advantages import RewardHistory
from dfusion.config import (
    PRESETS,
    FusionConfig,
    LoraConfig,
    PairingConfig,
    RoundConfig,
    SamplingConfig,
    TrainingConfig,
)
from dfusion.errors import InvalidInputError, LayerNotFoundError, ScorerError
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.prompts import Prompt
from dfusion.rounds import RoundResult, make_pairs, run_round
from dfusion.sampling import sample
from dfusion.seeds import sample_seed
from dfusion.shapes.prompts import prompt_list
from dfusion.thresholds import thresholds_of
from dfusion.training import Trainer
from dfusion.training_data import Example, TrainingPair, TrainingSample
from dfusion.types import Conditioning, Trajectory
from tests.nets import tiny_model, tiny_xl_model
from tests.scorers import Brightness, Constant

PROMPTS = [Prompt(text="a red [circle]"), Prompt(text="a blue [star]", thresholds=(0.03,))]
FUSION = FusionConfig(first_step=1, last_step=3)


def round_config(fusion: FusionConfig | None = FUSION, **training: Any) -> RoundConfig:
    return RoundConfig(
        samples_per_prompt=4,
        sampling=SamplingConfig(num_steps=4),
        pairing=PairingConfig(adoption_threshold=0, max_mask_cover=1),
        fusion=fusion,
        training=TrainingConfig(**({"examples_per_update": 8, "inner_epochs": 1} | training)),
    )


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """The examples of the last round's trainer."""
    recorded_examples: list[Example] = []

    class Recording(Trainer):
        def __init__(self, model: DiffusionModel, examples: Sequence[Example], *rest: Any) -> None:
            recorded_examples[:] = examples
            super().__init__(model, examples, *rest)

    monkeypatch.setattr(rounds, "Trainer", Recording)
    return recorded_examples


def weights(model: DiffusionModel) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in lora_parameters(model.unet).values()])


def scores_of(result: RoundResult) -> dict[str, tuple[float, ...]]:
    return dict(result.history.scores)


def test_dpo_learns_from_adopted_targets(learned: list[Example]) -> None:
    """In a U-Net with a middle block."""
    model = tiny_model(has_middle=True)
    assert not has_lora(model.unet)

    result = run_round(model, PROMPTS, Brightness(), round_config(), seed=5)
    assert [pair.prompt for pair in result.pairs] == ["a red circle"] * 2 + ["a blue star"] * 2
    assert {len(scores) for scores in scores_of(result).values()} == {4}
    for pair, example in zip(result.pairs, learned, strict=True):
        assert pair.reference.score > pair.base.score
        assert pair.adopted and pair.target is not None and pair.better is pair.target
        assert pair.target.score == Brightness().score(pair.target.image[None], [""])[0]
        assert isinstance(example, TrainingPair)
        assert (example.preferred, example.rejected) == (pair.target.trajectory, pair.base.trajectory)
        assert (example.on_policy, example.rejected_on_policy, example.prompt) == (False, True, pair.prompt)
    # 4 pairs x 3 rows: step 0 is not fused, so target and base share it
    assert [update.rows for update in result.updates] == [12]
    assert result.updates[0].loss == pytest.approx(math.log(2), abs=1e-4)


def test_prompts_with_few_samples_share_batches() -> None:
    """Three prompts with different numbers of items: 8 and 4 samples, then 6 pairs, instead of one by one."""
    prompts = [Prompt(text="a [dog] and a [cat]", thresholds=(0.3, 0.2)), *PROMPTS]
    model = tiny_model()
    rows: list[int] = []
    model.unet.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))

    together = run_round(model, prompts, Brightness(), round_config(), seed=5)
    sampled = [16] * 4 + [8] * 4  # both halves of guidance, in 4 steps
    fused = [2 * (3 + 6)] * 3  # with three references; step 0 is copied
    assert rows[: len(sampled + fused)] == sampled + fused

    one_by_one = run_round(tiny_model(), prompts, Brightness(), round_config(), seed=5, batch_size=1)
    assert [pair.prompt for pair in together.pairs] == [pair.prompt for pair in one_by_one.pairs]
    for pair, alone in zip(together.pairs, one_by_one.pairs, strict=True):
        for side, alone_side in (
            (pair.reference, alone.reference),
            (pair.base, alone.base),
            (pair.target, alone.target),
        ):
            assert side is not None and alone_side is not None
            assert torch.allclose(side.trajectory.latents, alone_side.trajectory.latents, rtol=0, atol=1e-5)
        assert pair.thresholds == pytest.approx(alone.thresholds, abs=1e-6)
        assert pair.adopted == alone.adopted
        assert pair.mask is not None and alone.mask is not None
        assert (pair.mask - alone.mask).abs().mean() < 0.01


def test_a_fused_step_computes_each_reference_once() -> None:
    """32 samples give 8 references with 2 targets each: 24 rows, in both halves of guidance, in calls of 8 pairs."""
    model = tiny_model()
    rows: list[int] = []
    model.unet.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    config = round_config(FusionConfig(first_step=1)).model_copy(
        update={"samples_per_prompt": 32, "sampling": SamplingConfig(num_steps=2)}
    )

    [pairs] = make_pairs(model, PROMPTS[1:], Brightness(), config, seed=5)

    assert len(pairs) == 16
    assert rows == [16] * 8 + [24, 24]


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_model, tiny_xl_model])
def test_a_round_with_another_image_size(
    make: Callable[[], DiffusionModel], learned: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 x 14 pixels are 5 x 7 latents, which no level of the U-Net can halve; the model's own are 8 x 8.

    SDXL's time ids have that size in sampling, fusion and training.
    """
    conditionings: list[Conditioning] = []
    encode = DiffusionModel.encode_prompts

    def recorded(model: DiffusionModel, *arguments: Any) -> Conditioning:
        conditionings.append(encode(model, *arguments))
        return conditionings[-1]

    monkeypatch.setattr(DiffusionModel, "encode_prompts", recorded)
    model = make()
    config = round_config()
    sampling = SamplingConfig(num_steps=4, height=10, width=14)
    result = run_round(model, PROMPTS, Brightness(), config.model_copy(update={"sampling": sampling}), seed=5)
    rollouts = [
        rollout for pair in result.pairs for rollout in (pair.reference, pair.base, pair.target) if rollout is not None
    ]
    assert len(rollouts) == 12 and {rollout.image.shape for rollout in rollouts} == {(10, 14, 3)}
    assert {rollout.trajectory.latent_size for rollout in rollouts} == {(5, 7)}
    assert {rollout.trajectory.config for rollout in rollouts} == {sampling}
    assert len(learned) == 4 and len(result.updates) == 1
    seen_time_ids = {
        tuple(row) for rollout in conditionings if rollout.time_ids is not None for row in rollout.time_ids.tolist()
    }
    assert seen_time_ids == ({(10, 14, 0, 0, 10, 14)} if model.text_encoder_2 is not None else set())


@pytest.mark.slow
def test_the_default_size_equals_the_models_own_size() -> None:
    config = round_config(None)
    explicit = SamplingConfig(num_steps=4, height=16, width=16)
    results = [
        run_round(tiny_model(), PROMPTS, Brightness(), config.model_copy(update={"sampling": sampling}), seed=5)
        for sampling in (config.sampling, explicit)
    ]
    assert scores_of(results[0]) == scores_of(results[1])


def test_a_size_without_latents_is_rejected_before_the_first_sample() -> None:
    config = round_config().model_copy(update={"sampling": SamplingConfig(num_steps=4, height=11)})
    with pytest.raises(InvalidInputError, match=r"height: expected a multiple of 2 pixels \(10 or 12\), got 11"):
        run_round(tiny_model(), PROMPTS, Brightness(), config, seed=5)


def test_targets_are_those_that_fuse_gives() -> None:
    model = tiny_model()
    result = run_round(model, PROMPTS[1:], Brightness(), round_config(), seed=5)
    pair = result.pairs[0]
    fresh = tiny_model()  # the round's targets are from before its updates
    attach_lora(fresh.unet)
    target = fuse(
        fresh.unet,
        fresh.scheduler,
        pair.base.trajectory,
        pair.reference.trajectory,
        fresh.encode_prompts([pair.prompt]),
        fresh.encode_prompts([""]),
        thresholds=[[0.03]],
        config=FUSION,
    )

    assert pair.target is not None
    torch.testing.assert_close(pair.target.trajectory.latents, target.latents, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_automatic_thresholds_come_from_the_paired_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Trajectory] = []

    def recording(trajectory: Trajectory, config: FusionConfig) -> tuple[float, ...]:
        seen.append(trajectory)
        return thresholds_of(trajectory, config)

    monkeypatch.setattr(rounds, "thresholds_of", recording)
    result = run_round(tiny_model(), PROMPTS, Brightness(), round_config(), seed=5)
    assert [len(trajectory) for trajectory in seen] == [3]  # a reference and two bases; the other prompt has its own
    assert result.pairs[0].thresholds == result.pairs[1].thresholds != (0.03,) == result.pairs[2].thresholds
    assert result.pairs[0].statistics is not None and 0 < result.pairs[0].statistics.mask_cover < 1


@pytest.mark.parametrize("fusion", [None, FUSION])
@pytest.mark.slow
def test_policy_gradients_learn_from_advantages_over_all_rounds(
    learned: list[Example], fusion: FusionConfig | None
) -> None:
    model = tiny_model()
    config = round_config(fusion, algorithm="ddpo", clip_range=0.1)
    first = run_round(model, PROMPTS[1:], Brightness(), config, seed=5)
    before = weights(model)
    second = run_round(model, PROMPTS[1:], Brightness(), config, seed=5, round_number=2, history=first.history)

    assert not torch.equal(weights(model), before)

    history = scores_of(second)["a blue star"]
    assert len(history) == 8 and history[:4] == scores_of(first)["a blue star"]

    mean = statistics.fmean(history)
    std = statistics.pstdev(history)
    if fusion is None:
        expected = [(score, True) for score in history[4:]]
    else:
        sides = [(pair.better, pair.base) for pair in second.pairs]
        expected = [entry for better, base in sides for entry in ((better.score, False), (base.score, True))]

    assert all(isinstance(example, TrainingSample) for example in learned)
    assert [(example.advantage, example.sides_on_policy) for example in learned] == [
        (pytest.approx((score - mean) / std), (own,)) for score, own in expected
    ]


def test_naive_pairs_prefer_the_reference(learned: list[Example]) -> None:
    result = run_round(tiny_model(), PROMPTS[1:], Brightness(), round_config(None), seed=5)
    assert {(pair.target, pair.adopted) for pair in result.pairs} == {(None, False)}
    assert [example.sides[0] for example in learned] == [pair.reference.trajectory for pair in result.pairs]
    assert [example.sides_on_policy for example in learned] == [(True, True)] * 2


def test_without_pairs_nothing_is_trained() -> None:
    model = tiny_model()
    attach_lora(model.unet, seed=1)
    before = weights(model)
    result = run_round(model, PROMPTS, Constant(), round_config(), seed=5)
    assert (result.pairs, result.updates, torch.equal(weights(model), before)) == ((), (), True)
    assert scores_of(result)["a red circle"] == (0.5,) * 4
    with pytest.raises(InvalidInputError, match="at least one"):
        run_round(model, [], Constant(), round_config(), seed=5)


def test_targets_with_an_empty_mask_are_not_adopted() -> None:
    prompt = Prompt(text="a blue [star]", thresholds=(0.999999,))
    result = run_round(tiny_model(), [prompt], Brightness(), round_config(), seed=5)
    for pair in result.pairs:
        assert pair.target is not None and not pair.adopted and pair.better is pair.reference
        assert np.array_equal(pair.target.image, pair.base.image)


@pytest.mark.slow
def test_samples_have_the_services_seeds_and_do_not_depend_on_other_prompts() -> None:
    alone = run_round(tiny_model(), PROMPTS[:1], Brightness(), round_config(), seed=5)
    together = run_round(tiny_model(), PROMPTS, Brightness(), round_config(), seed=5)
    assert scores_of(alone)["a red circle"] == pytest.approx(scores_of(together)["a red circle"])
    seeds = {pair.base.trajectory.seeds[0] for pair in alone.pairs}
    assert seeds <= {sample_seed(5, 1, 0, "a red circle", number) for number in range(4)}


def test_means_include_the_held_out_scorer_and_the_diversity() -> None:
    result = run_round(tiny_model(), PROMPTS, Brightness(), round_config(), seed=5, watch=Constant())
    assert result.means["constant"] == 0.5 and result.means["diversity"] > 0
    scores = [score for of_prompt in scores_of(result).values() for score in of_prompt]
    assert result.means["brightness"] == pytest.approx(statistics.fmean(scores))


def test_a_constant_item_map_gives_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(_trajectory: Trajectory, _config: FusionConfig) -> tuple[float, ...]:
        raise InvalidInputError("item_maps: no threshold for item 0")

    monkeypatch.setattr(rounds, "thresholds_of", constant)
    result = run_round(tiny_model(), PROMPTS, Brightness(), round_config(), seed=5)
    assert [pair.target is None for pair in result.pairs] == [True, True, False, False]
    assert result.pairs[0].reason == "nothing was fused: item_maps: no threshold for item 0"


@pytest.mark.slow
def test_moments_of_another_adapter_are_rejected_before_the_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `optimizer_start="fresh"` they are not used, so any moments are accepted."""
    small = round_config(lora={"rank": 2, "alpha": 2})
    moments = run_round(tiny_model(), PROMPTS[1:], Brightness(), small, seed=5).optimizer
    fresh = round_config(optimizer_start="fresh")
    assert run_round(tiny_model(), PROMPTS[1:], Brightness(), fresh, seed=5, optimizer=moments).updates

    def never(*_arguments: Any, **_settings: Any) -> Trajectory:
        raise AssertionError("a sample was made")

    monkeypatch.setattr(rounds, "sample", never)
    with pytest.raises(InvalidInputError, match="optimizer state"):
        run_round(tiny_model(), PROMPTS[1:], Brightness(), round_config(), seed=5, optimizer=moments)


def test_a_round_continues_from_an_adapter_of_any_initialisation() -> None:
    """Adapters of other tools do not record it and count as Kaiming."""
    model = tiny_model()
    attach_lora(model.unet, LoraConfig(rank=2, alpha=2, init="kaiming"), seed=1)
    config = round_config(lora={"rank": 2, "alpha": 2})
    assert run_round(model, PROMPTS[1:], Brightness(), config, seed=5).updates
    assert lora_config(model.unet).init == "kaiming"


def test_invalid_arguments_are_rejected_before_the_first_sample() -> None:
    model = tiny_model()
    config = round_config()
    late = config.model_copy(update={"fusion": FusionConfig(first_step=4)})

    with pytest.raises(InvalidInputError, match="first_step"):
        run_round(model, PROMPTS, Brightness(), late, seed=5)
    with pytest.raises(LayerNotFoundError):
        run_round(model, PROMPTS, Brightness(), round_config(FusionConfig(layers=(99,))), seed=5)

    attach_lora(model.unet)
    with pytest.raises(InvalidInputError, match="lora"):
        run_round(model, PROMPTS, Brightness(), round_config(lora={"rank": 8}), seed=5)
    for invalid in ("a red [circle]", ["a red [circle]"]):
        with pytest.raises(InvalidInputError, match="Prompt"):
            run_round(model, invalid, Brightness(), config, seed=5)  # type: ignore[arg-type, list-item]
    other_prompts = prompt_list("attribute", "train")
    with pytest.raises(InvalidInputError, match=r"one Prompt, got tuple of length 40: \(ShapesPrompt.{,300}$"):
        run_round(model, other_prompts, Brightness(), config, seed=5)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="scorer names that differ"):
        run_round(model, PROMPTS, Brightness(), config, seed=5, watch=Brightness())

    lora_parameters(model.unet).popitem()[1].requires_grad_(False)
    with pytest.raises(InvalidInputError, match="trainable adapter, got a frozen one"):
        run_round(model, PROMPTS, Brightness(), config, seed=5)
    with pytest.raises(ScorerError, match="expected 8 scores"):
        run_round(model, PROMPTS, TooFew(), config, seed=5)
    with pytest.raises(InvalidInputError, match="batch_size: expected at least 1, got 0"):
        run_round(model, PROMPTS, Brightness(), config, seed=5, batch_size=0)


class TooFew(Brightness):
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        return super().score(images, prompts)[1:]


@pytest.mark.slow
def test_every_setting_has_an_effect(learned: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """The released code's preset, more samples than one batch, another guidance scale, rank and lambda."""
    sampled: list[dict[str, Any]] = []

    def recording(*arguments: Any, **settings: Any) -> Trajectory:
        sampled.append(settings)
        return sample(*arguments, **settings)

    monkeypatch.setattr(rounds, "sample", recording)
    preset = PRESETS["released_code"]
    model = tiny_model()
    config = RoundConfig(
        samples_per_prompt=10,
        sampling=SamplingConfig(num_steps=4, guidance_scale=2.0),
        pairing=preset.pairing.model_copy(update={"adoption_threshold": 1e9}),
        fusion=preset.fusion.model_copy(update={"first_step": 1}),
        training=TrainingConfig(examples_per_update=8, inner_epochs=1, lora=LoraConfig(rank=2, alpha=3.0)),
    )
    first = run_round(model, PROMPTS[1:], Brightness(), config, seed=5)
    assert lora_config(model.unet) == LoraConfig(rank=2, alpha=3.0)
    base_seeds = {example.sides[1].seeds[0] for example in learned}
    assert (
        len(scores_of(first)["a blue star"]) == len(set(scores_of(first)["a blue star"])) == 10 and len(base_seeds) == 4
    )
    assert {(s["config"].guidance_scale, s["mask_source"]) for s in sampled} == {(2.0, "resolution")}
    assert [len(pair.reason) > 0 and pair.adopted for pair in first.pairs] == [False] * 4  # lambda is far too high
    assert [pair.better for pair in first.pairs] == [pair.reference for pair in first.pairs]
    uses = [pair.reference.score for pair in first.pairs]
    assert uses[0] == uses[1] > uses[2] == uses[3]  # rank order: all uses of one reference before the next
    assert first.self_test is not None and first.self_test.compared > 0
    second = run_round(model, PROMPTS[1:], Brightness(), config, seed=5, round_number=2, history=first.history)
    assert len(second.pairs) == 4  # the same call continues with its own adapter


def test_a_history_of_another_scorer_is_rejected_before_the_first_sample() -> None:
    model = tiny_model()
    foreign = RewardHistory({"a cat": (0.5,)}, "clip, version 1")
    with pytest.raises(InvalidInputError, match=r"scorer: expected 'clip, version 1'.*got 'brightness, version 1'"):
        run_round(model, PROMPTS, Brightness(), round_config(None, algorithm="ddpo"), seed=5, history=foreign)
    assert not has_lora(model.unet)
    dpo_result = run_round(
        model, PROMPTS[1:], Brightness(), round_config(), seed=5, history=foreign
    )  # dpo has no advantages
    assert (list(dpo_result.history.scores), dpo_result.history.scorer) == (["a blue star"], "brightness, version 1")


def test_advantages_are_clipped_to_the_setting(learned: list[Example]) -> None:
    config = round_config(None, algorithm="ddpo", clip_range=0.1, advantage_clip=0.5)
    run_round(tiny_model(), PROMPTS[1:], Brightness(), config, seed=5)
    assert max(abs(example.advantage) for example in learned) == 0.5


@pytest.mark.slow
def test_the_same_seed_gives_the_same_round() -> None:
    first, second = (run_round(tiny_model(), PROMPTS, Brightness(), round_config(), seed=5) for _ in range(2))
    assert (first.updates, first.history) == (second.updates, second.history)
    assert run_round(tiny_model(), PROMPTS, Brightness(), round_config(), seed=6).history != RewardHistory()
