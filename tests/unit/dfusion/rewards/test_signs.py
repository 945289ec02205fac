"""The best round of a run, and the warning signs in its metrics."""

from collections.abc import Sequence

import pytest

from dfusion.rewards.signs import Measured, best_round, rollout_means, warning_sign

RISING = [0.30, 0.31, 0.305, 0.32, 0.33, 0.335, 0.34]
AT_CEILING = [0.1, 0.2, 0.4, 0.5, 0.5, 0.49, 0.5, 0.5, 0.49]
STILL = [0.5, 0.52, 0.49, 0.51, 0.5, 0.52, 0.5, 0.49, 0.51]
FALLING = [0.9, 0.88, 0.89, 0.85, 0.8, 0.79, 0.7, 0.6, 0.5]
DOWN_AND_LOW = [0.5, 0.4, 0.3, 0.1, 0.1, 0.11, 0.1, 0.09, 0.1]


def evaluated(split: str, scorer: str, means: Sequence[float], version: str = "", first: int = 0) -> list[Measured]:
    return [Measured(number, split, scorer, mean, version) for number, mean in enumerate(means, first)]


def rollouts(**series: Sequence[float]) -> list[Measured]:
    return [row for name, means in series.items() for row in evaluated("rollout", name, means, first=1)]


def best(means: list[Measured], watch: str | None = "judge") -> tuple[int, str, str] | None:
    found = best_round(reversed(means), "reward", watch)
    return None if found is None else (found.trained_rounds, found.split, found.scorer)


def test_the_best_round_is_that_of_the_held_out_scorer_on_held_out_prompts() -> None:
    held_out = evaluated("held_out", "judge", [0.5, 0.7, 0.6, 0.4])
    others = evaluated("held_out", "reward", [0.1, 0.2, 0.3, 0.4]) + evaluated("train", "judge", [0.5, 0.6, 0.7, 0.8])
    drawn = rollouts(judge=[0.9, 0.1, 0.1], diversity=[3.0, 9.0, 1.0])
    assert best([*held_out, *others, *drawn]) == (1, "held_out", "judge")
    assert best([*held_out, *others, *drawn], watch=None) == (3, "held_out", "reward")
    assert best([*held_out, *others], watch="another") == (3, "held_out", "reward")
    assert best(held_out, watch=None) == (1, "held_out", "judge")
    assert best([*others[4:], *drawn]) == (3, "train", "judge")


def test_of_equal_rounds_the_earliest_is_the_best() -> None:
    assert best(evaluated("train", "judge", [0.5, 0.7, 0.7, 0.6])) == (1, "train", "judge")
    assert best(evaluated("train", "judge", [0.7, 0.7])) == (0, "train", "judge")


def test_a_round_draws_its_samples_from_the_model_before_it() -> None:
    assert best(rollouts(judge=[0.5, 0.6, 0.9, 0.8])) == (2, "rollout", "judge")
    assert best(rollout_means(1, {"reward": 0.5, "diversity": 0.1})) is None


@pytest.mark.parametrize("means", [[], evaluated("held_out", "judge", [0.5]), rollouts(judge=[0.5])])
def test_there_is_no_best_round_before_two_models_are_measured(means: list[Measured]) -> None:
    assert best(means) is None


def test_rounds_of_an_older_version_do_not_take_part() -> None:
    upgraded = evaluated("train", "judge", [0.2, 0.3], "2", first=2)
    assert best([*evaluated("train", "judge", [0.8, 0.9], "1"), *upgraded]) == (3, "train", "judge")


@pytest.mark.parametrize(
    ("reward", "judge", "diversity", "sign"),
    [
        (RISING, FALLING[:7], STILL[:7], ("misleading_reward", ("judge",))),
        (AT_CEILING, FALLING, STILL, ("saturation", ("judge",))),
        (AT_CEILING, FALLING, FALLING, ("saturation", ("judge", "diversity"))),
        ([1.0] * 6, STILL[:6], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1], ("saturation", ("diversity",))),
        (FALLING, FALLING, STILL, ("collapse", ("judge",))),
        (DOWN_AND_LOW, STILL, FALLING, ("collapse", ("diversity",))),
        (AT_CEILING, STILL, STILL, None),
        (RISING, RISING, STILL[:7], None),
        (STILL, AT_CEILING, STILL, None),
        (AT_CEILING, [*FALLING[:3], *STILL[:6]], STILL, None),  # it fell before the last six rounds
        (AT_CEILING[:4], FALLING[:4], STILL[:4], None),
        ([], [], [], None),
    ],
)
def test_signs(
    reward: list[float], judge: list[float], diversity: list[float], sign: tuple[str, tuple[str, ...]] | None
) -> None:
    found = warning_sign(rollouts(judge=judge, reward=reward, diversity=diversity), "reward")
    assert (found and (found.name, found.falling)) == sign


def test_held_out_prompts_are_watched_and_training_prompts_are_not() -> None:
    """A round's samples and its evaluation are of the same rounds; the one before the first has no counterpart."""
    drawn = rollouts(reward=AT_CEILING)
    falls = [0.1, *FALLING]
    assert warning_sign([*drawn, *evaluated("train", "reward", falls)], "reward") is None
    sign = warning_sign([*drawn, *evaluated("held_out", "reward", falls)], "reward")
    assert str(sign) == "the reward reward is at its ceiling while reward on held-out prompts falls"
    assert warning_sign([*drawn, *evaluated("held_out", "reward", falls)[:-1]], "reward") is None


def test_a_fall_between_two_versions_is_no_sign() -> None:
    drawn = rollouts(reward=AT_CEILING)
    upgraded = evaluated("rollout", "judge", FALLING[6:], "2", first=7)
    assert (
        warning_sign([*drawn, *evaluated("rollout", "judge", FALLING[:6], "1", first=1), *upgraded], "reward") is None
    )


def test_messages_say_what_the_reward_does() -> None:
    rises = warning_sign(rollouts(reward=RISING, judge=FALLING[:7], diversity=FALLING[:7]), "reward")
    assert str(rises) == "the reward reward rises while judge and diversity fall"
    low = warning_sign(rollouts(reward=DOWN_AND_LOW, judge=FALLING), "reward")
    assert str(low) == "the reward reward neither rises nor is at its ceiling while judge falls"
