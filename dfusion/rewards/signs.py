"""The best round of a run, and warning signs in its metrics. Does not import torch.

A run is described by its means: of each scorer, and of the diversity, over the images of each round. `best_round` has
the only definition of the best round, and `warning_sign` that of the signs that end a run (`stop_when`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, get_args

from dfusion.rewards.watch import chance_of_rise, falling_figures

SignName = Literal["misleading_reward", "saturation", "collapse"]
"""misleading_reward   the reward rises while another metric falls
saturation          the reward is at its ceiling while another metric falls
collapse            the reward neither rises nor is at its ceiling while another metric falls
"""
SIGNS: tuple[SignName, ...] = get_args(SignName)
ROLLOUT = "rollout"
TRAIN = "train"
HELD_OUT = "held_out"
WINDOW = 6
"""The last rounds that are tested for a trend."""
LEVEL = 0.05
"""The significance level of a fall while the reward rises, and of the rise."""
LEVEL_ALONE = 0.01
"""The significance level of a fall while the reward does not rise, which is the only trend then."""


@dataclass(frozen=True)
class Measured:
    """The mean of a scorer over the images of a round.

    round    of "rollout": the round that drew the samples; otherwise the round after which the model was measured, 0
             for the model before the first round
    split    "rollout": the samples of the round; "train" or "held_out": an evaluation on the training or held-out
             prompts, with the same seeds after each round
    scorer   the scorer, or "diversity"
    mean     the mean, which is finite
    version  the version of the scorer; means are compared within one version
    """

    round: int
    split: str
    scorer: str
    mean: float
    version: str = ""

    @property
    def trained_rounds(self) -> int:
        """The rounds that the measured model was trained in. The samples of a round are drawn before its training."""
        return self.round - 1 if self.split == ROLLOUT else self.round


@dataclass(frozen=True)
class Sign:
    """A warning sign: its name, the scorer of the reward, and the metrics that fall."""

    name: SignName
    reward: str
    falling: tuple[str, ...]

    def __str__(self) -> str:
        does = {
            "misleading_reward": "rises",
            "saturation": "is at its ceiling",
            "collapse": "neither rises nor is at its ceiling",
        }
        verb = "falls" if len(self.falling) == 1 else "fall"
        return f"the reward {self.reward} {does[self.name]} while {' and '.join(self.falling)} {verb}"


def rollout_means(round_number: int, means: Mapping[str, float]) -> list[Measured]:
    """The means of a round's samples, such as `RoundResult.means`, by name."""
    return [Measured(round_number, ROLLOUT, name, mean) for name, mean in means.items()]


def best_round(means: Iterable[Measured], reward: str, watch: str | None = None) -> Measured | None:
    """The mean of the best round: the one whose model scored highest where it was not trained.

    1. Images: of held-out prompts if they are measured, else of the training prompts, else the samples of the rounds,
       which have other seeds in each round, and which the model after the last round has none of.
    2. Scorer: `watch` if it scored these images, else the reward, else the first in alphabetical order.
    3. Round: that of the highest mean. Of equal ones the earliest, which is closest to the base model. The model
       before the first round takes part as round 0.

    Only means by the version of the newest one are compared.

    Args:
        means: The means of all rounds, in any order.
        reward: The scorer that the run is trained on.
        watch: The held-out scorer.

    Returns:
        The highest mean; None if fewer than two models were measured.
    """
    # 1. the images
    by_split: dict[str, list[Measured]] = {}
    for row in means:
        if row.scorer != "diversity":
            by_split.setdefault(row.split, []).append(row)
    split = next((split for split in (HELD_OUT, TRAIN, ROLLOUT) if split in by_split), None)
    if split is None:
        return None

    # 2. the scorer
    scorers = {row.scorer for row in by_split[split]}
    scorer = next((name for name in (watch, reward) if name in scorers), min(scorers))
    measured = _of_newest_version([row for row in by_split[split] if row.scorer == scorer])

    # 3. the round
    if len(measured) < 2:
        return None
    return max(measured, key=lambda row: (row.mean, -row.round))


def warning_sign(means: Iterable[Measured], reward: str) -> Sign | None:
    """The warning sign of the last rounds, if there is one.

    The metrics that can fall are all others of the samples, with their diversity, and those of held-out prompts. A fall
    is a downward trend over the last six rounds (`chance_of_rise`), at 5 % if the reward rises over these rounds, and
    at 1 % if it does not.

    Without a rise, the reward is at its ceiling if it does not fall, and if the mean of these rounds is nearer to the
    highest round of the run than to the first one.

    Args:
        means: The means of all rounds, in any order.
        reward: The scorer that the run is trained on.
    """
    # 1. the means by metric and round
    series: dict[tuple[str, str], list[Measured]] = {}
    for row in means:
        series.setdefault((row.split, row.scorer), []).append(row)
    rewards = _by_round(series.pop((ROLLOUT, reward), []))
    rounds = sorted(rewards)[-WINDOW:]
    last = [rewards[number] for number in rounds]

    # 2. the metrics that fall
    others: dict[str, list[float]] = {}
    for (split, scorer), rows in series.items():
        by_round = _by_round(rows)
        if split in (ROLLOUT, HELD_OUT) and by_round.keys() >= set(rounds):
            name = scorer if split == ROLLOUT else f"{scorer} on held-out prompts"
            others[name] = [by_round[number] for number in rounds]
    misled = falling_figures(last, others, window=WINDOW, level=LEVEL)
    if misled:
        return Sign("misleading_reward", reward, misled)
    if chance_of_rise(last) <= LEVEL:
        return None
    falling = tuple(name for name, values in others.items() if _falls(values))

    # 3. the reward over the same rounds
    if not falling:
        return None
    middle = (rewards[min(rewards)] + max(rewards.values())) / 2
    is_at_ceiling = fmean(last) >= middle and not _falls(last)
    return Sign("saturation" if is_at_ceiling else "collapse", reward, falling)


def _falls(series: Sequence[float]) -> bool:
    return chance_of_rise([-value for value in series]) <= LEVEL_ALONE


def _by_round(rows: Sequence[Measured]) -> dict[int, float]:
    return {row.round: row.mean for row in _of_newest_version(rows)}


def _of_newest_version(rows: Sequence[Measured]) -> list[Measured]:
    newest = max(rows, key=lambda row: row.round, default=None)
    return [row for row in rows if newest is not None and row.version == newest.version]
