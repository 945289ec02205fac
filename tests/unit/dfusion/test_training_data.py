import math
from dataclasses import replace

import pytest
import torch

from dfusion.config import SamplingConfig, TrainingConfig
from dfusion.ddim import Schedule
from dfusion.errors import InvalidInputError, NonFiniteError, ScheduleError, ShapeMismatchError
from dfusion.training_data import (
    Example,
    Row,
    TrainingPair,
    TrainingSample,
    check_examples,
    digest,
    plan_epoch,
    rows_of,
)
from dfusion.types import Trajectory
from tests.nets import sd_scheduler

STEPS = 5
CONFIG = SamplingConfig(num_steps=STEPS)
SCHEDULE = Schedule.from_scheduler(sd_scheduler(), STEPS, 1.0)


def trajectory(seed: int, samples: int = 1) -> Trajectory:
    generator = torch.Generator().manual_seed(seed)
    return Trajectory(
        latents=torch.randn(samples, STEPS + 1, 4, 2, 3, generator=generator),
        timesteps=SCHEDULE.timesteps,
        log_probs=torch.zeros(samples, STEPS),
        seeds=tuple(range(samples)),
        config=CONFIG,
    )


def fused(base: Trajectory, first_step: int) -> Trajectory:
    """Another trajectory with the base's states up to `first_step`, as a fused target."""
    other = trajectory(base.seeds[0] + 100)
    latents = torch.cat([base.latents[:, : first_step + 1], other.latents[:, first_step + 1 :]], 1)
    return replace(base, latents=latents)


def rows(examples: list[Example], schedule: Schedule = SCHEDULE, **settings: object) -> list[Row]:
    return rows_of(examples, schedule, TrainingConfig(**settings))


def test_rows_are_all_steps_of_all_examples() -> None:
    pair = TrainingPair(trajectory(1), trajectory(2), "a")
    assert rows([pair, pair]) == [Row(n, step) for n in range(2) for step in range(STEPS)]


def test_pairs_skip_the_transitions_that_they_share() -> None:
    """A target fused from step 2 on shares states 0, 1, 2 with its base, hence transitions 0 and 1."""
    base = trajectory(1)
    pair = TrainingPair(fused(base, 2), base, "a", on_policy=False)
    assert pair.shared_steps() == {0, 1}
    assert [row.step for row in rows([pair])] == [2, 3, 4]
    assert TrainingPair(trajectory(1), trajectory(2), "a").shared_steps() == frozenset()


def test_a_masks_weights_are_at_the_latents_size() -> None:
    """2 x 3 latents. A finer mask that covers only pixels that nearest-neighbour resizing drops counts as no mask."""
    pair = TrainingPair(trajectory(1), trajectory(2), "a", mask=torch.tensor([[0.0, 0.25, 1.0]]))
    assert pair.credit_weights().tolist() == [[0.0, 0.25, 1.0]] * 2
    between = torch.zeros(4, 6)
    between[1, 1] = 1
    for mask in (None, torch.zeros(1, 1), between):
        assert replace(pair, mask=mask).credit_weights().tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 2, 2), 2 * torch.ones(2, 2), -torch.ones(2, 2), torch.full((2, 2), torch.nan)]
)
def test_masks_outside_their_range_are_rejected(mask: torch.Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"expected a mask \(h_m, w_m\) in \[0, 1\]"):
        TrainingPair(trajectory(1), trajectory(2), "a", mask=mask)


def test_samples_skip_no_transition() -> None:
    """The policy gradient of a target's first transitions is not zero: only a pair's two sides cancel."""
    sample = TrainingSample(fused(trajectory(1), 2), "a", 0.5, on_policy=False)
    assert [row.step for row in rows([sample], algorithm="ddpo")] == list(range(STEPS))


def test_each_epoch_samples_its_own_share_of_the_steps() -> None:
    """Two of an example's five steps per epoch. All steps occur within a few epochs."""
    usable = [Row(n, step) for n in range(30) for step in range(STEPS)]

    def epochs(seed: int, share: float) -> list[list[Row]]:
        generator = torch.Generator().manual_seed(seed)
        config = TrainingConfig(timestep_fraction=share)
        return [row for _ in range(6) for row in plan_epoch(usable, config, generator)]

    kept = epochs(0, 0.4)
    assert [len(epoch) for epoch in kept] == [60] * 6
    for n in range(30):
        chosen = [[row.step for row in epoch if row.example == n] for epoch in kept]
        assert all(len(set(steps)) == 2 and steps == sorted(steps) for steps in chosen)
        assert len(set(map(tuple, chosen))) > 1
    assert {row.step for epoch in kept for row in epoch} == set(range(STEPS))
    assert kept == epochs(0, 0.4) != epochs(1, 0.4)
    assert [len(epoch) for epoch in epochs(0, 0.01)] == [30] * 6  # at least one


def test_the_dominant_step_is_left_out() -> None:
    """Step 3 of Stable Diffusion's 5: the second last, as it is of 20."""
    pair = TrainingPair(trajectory(1), trajectory(2), "a")
    assert [row.step for row in rows([pair], skip_dominant_step=True)] == [0, 1, 2, 4]


def test_steps_without_noise_are_left_out() -> None:
    schedule = Schedule.from_scheduler(sd_scheduler(set_alpha_to_one=True), STEPS, 1.0)
    pair = TrainingPair(trajectory(1), trajectory(2), "a")
    assert [row.step for row in rows([pair], schedule=schedule)] == [0, 1, 2, 3]


def test_different_examples_have_different_digests() -> None:
    side = trajectory(1)
    other_side = trajectory(2)
    examples: list[list[Example]] = [
        [TrainingPair(side, other_side, "a")],
        [TrainingPair(other_side, side, "a")],
        [TrainingPair(side, other_side, "b")],
        [TrainingPair(side, other_side, "a", on_policy=False)],
        [TrainingPair(side, other_side, "a", mask=torch.ones(2, 2))],
        [TrainingPair(side, other_side, "a", mask=torch.eye(2))],
        [TrainingPair(side, other_side, "a"), TrainingPair(side, other_side, "a")],
        [TrainingSample(side, "a", 0.5)],
        [TrainingSample(side, "a", 0.25)],
    ]

    assert len({digest(some) for some in examples}) == len(examples)
    assert digest(examples[0]) == digest([TrainingPair(trajectory(1), trajectory(2), "a")])


def test_invalid_examples_are_rejected() -> None:
    side = trajectory(1)
    longer = replace(trajectory(2), latents=torch.zeros(1, STEPS + 1, 4, 2, 4))

    with pytest.raises(InvalidInputError, match=r"rejected.*got 2"):
        TrainingPair(side, trajectory(2, samples=2), "a")
    with pytest.raises(ShapeMismatchError, match=r"rejected\.latents"):
        TrainingPair(side, longer, "a")
    with pytest.raises(InvalidInputError, match="one sampling config"):
        TrainingPair(side, replace(trajectory(2), config=SamplingConfig(num_steps=STEPS, eta=0.5)), "a")
    with pytest.raises(NonFiniteError, match="advantage"):
        TrainingSample(side, "a", math.nan)

    broken = side.latents.clone()
    broken[0, 3, 0, 0, 0] = math.inf

    with pytest.raises(NonFiniteError, match=r"preferred\.latents.*state 3"):
        TrainingPair(replace(side, latents=broken), side, "a")


def test_examples_must_fit_the_algorithm_and_each_other() -> None:
    pair = TrainingPair(trajectory(1), trajectory(2), "a")
    sample = TrainingSample(trajectory(1), "a", 5.5)
    dpo = TrainingConfig()
    ddpo = TrainingConfig(algorithm="ddpo")

    assert check_examples([pair, pair], dpo, 4) == CONFIG
    with pytest.raises(InvalidInputError, match="at least one"):
        check_examples([], dpo, 4)
    with pytest.raises(InvalidInputError, match=r"examples\[1\].*dpo learns from TrainingPair, got TrainingSample"):
        check_examples([pair, sample], dpo, 4)
    with pytest.raises(InvalidInputError, match="ddpo learns from TrainingSample"):
        check_examples([pair], ddpo, 4)
    with pytest.raises(InvalidInputError, match=r"examples\[0\]\.advantage: expected a number within .*5 .*got 5\.5"):
        check_examples([sample], ddpo, 4)
    with pytest.raises(ShapeMismatchError, match="latents"):
        check_examples([pair], dpo, 3)

    other = SamplingConfig(num_steps=STEPS, guidance_scale=2)
    odd = TrainingPair(replace(trajectory(1), config=other), replace(trajectory(2), config=other), "a")

    with pytest.raises(InvalidInputError, match="one sampling config"):
        check_examples([pair, odd], dpo, 4)


def test_examples_without_rows_are_rejected() -> None:
    side = trajectory(1)
    with pytest.raises(InvalidInputError, match="at least one step to train on, got none"):
        rows([TrainingPair(side, side, "a")])
    other = Schedule.from_scheduler(sd_scheduler(steps_offset=0), STEPS, 1.0)
    with pytest.raises(ScheduleError, match="timesteps"):
        rows([TrainingPair(side, trajectory(2), "a")], schedule=other)
