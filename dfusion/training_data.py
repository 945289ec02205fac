"""What a training learns from: pairs of trajectories (Eq. 6), or single ones with their advantages (Eq. 8, 9)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional

from dfusion.config import SamplingConfig, TrainingConfig
from dfusion.ddim import Schedule
from dfusion.errors import InvalidInputError, NonFiniteError, ScheduleError, ShapeMismatchError
from dfusion.policy import step_weights
from dfusion.types import Trajectory


@dataclass(frozen=True)
class TrainingPair:
    """A preferred and a rejected trajectory of one prompt, each of one sample, for Eq. 6.

    on_policy           whether the policy that is about to be trained drew the preferred trajectory. A fused target and
                        an inverted trajectory are not its own: the log-probs recorded with them are another network's
                        or none
    rejected_on_policy  the same for the rejected one, which people may have found a target to be
    mask                (h_m, w_m) in [0, 1]: where the target was fused (`dfusion.figures.fusion_mask`); None where
                        neither side is a target. Read with `credit="mask"` only

    Raises ShapeMismatchError, InvalidInputError, and NonFiniteError for latents that are NaN or infinite.
    """

    preferred: Trajectory
    rejected: Trajectory
    prompt: str
    on_policy: bool = True
    rejected_on_policy: bool = True
    mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check_one("preferred", self.preferred)
        _check_one("rejected", self.rejected)
        if self.preferred.config != self.rejected.config:
            got = (self.preferred.config, self.rejected.config)
            raise InvalidInputError(f"pair: expected one sampling config, got {got}")
        if self.preferred.latents.shape != self.rejected.latents.shape:
            shapes = tuple(self.preferred.latents.shape), tuple(self.rejected.latents.shape)
            raise ShapeMismatchError("rejected.latents", *shapes)
        if self.mask is not None and (self.mask.ndim != 2 or not 0 <= self.mask.min() <= self.mask.max() <= 1):
            described = f"shape {tuple(self.mask.shape)}, {self.mask.min():g} to {self.mask.max():g}"
            raise InvalidInputError(f"pair: expected a mask (h_m, w_m) in [0, 1], got {described}")

    def credit_weights(self) -> torch.Tensor:
        """(h, w) at the latents' size: the mask, or ones where there is none or it covers nothing at that size."""
        height, width = self.preferred.latents.shape[3:]
        everywhere = torch.ones(height, width)
        if self.mask is None:
            return everywhere
        resized = functional.interpolate(self.mask[None, None].float(), size=(height, width), mode="nearest")[0, 0]
        return resized if bool(resized.any()) else everywhere

    @property
    def sides(self) -> tuple[Trajectory, ...]:
        """The trajectories whose transitions a row takes, preferred first."""
        return self.preferred, self.rejected

    @property
    def drawn(self) -> tuple[bool, ...]:
        """For each side, whether the policy drew it."""
        return self.on_policy, self.rejected_on_policy

    @property
    def advantage(self) -> float:
        """Not read: Eq. 6 has none."""
        return 0.0

    def shared_steps(self) -> frozenset[int]:
        """The transitions that both trajectories have; their gradient in Eq. 6 is exactly zero.

        A fused target's are those before its first fused step, which are copies of its base's.
        """
        same = (self.preferred.latents == self.rejected.latents).flatten(2).all(2)[0].tolist()
        return frozenset(i for i in range(len(same) - 1) if same[i] and same[i + 1])


@dataclass(frozen=True)
class TrainingSample:
    """A trajectory of one sample and its advantage, for Eq. 8 and 9.

    advantage  see `dfusion.advantages`
    on_policy  whether the policy that is about to be trained drew the trajectory; not so for a fused target or an
               inverted trajectory

    Raises ShapeMismatchError, and NonFiniteError for latents or an advantage that are NaN or infinite.
    """

    trajectory: Trajectory
    prompt: str
    advantage: float
    on_policy: bool = True

    def __post_init__(self) -> None:
        _check_one("trajectory", self.trajectory)
        if not math.isfinite(self.advantage):
            raise NonFiniteError(f"advantage: expected a finite number, got {self.advantage}")

    @property
    def sides(self) -> tuple[Trajectory, ...]:
        """The trajectory whose transitions a row takes."""
        return (self.trajectory,)

    @property
    def drawn(self) -> tuple[bool, ...]:
        """Whether the policy drew it."""
        return (self.on_policy,)

    def shared_steps(self) -> frozenset[int]:
        """None: every transition of a sample counts, also those that a target has from its base."""
        return frozenset()


Example = TrainingPair | TrainingSample


@dataclass(frozen=True, order=True)
class Row:
    """One term of the loss: the transition `step` of each side of example number `example`."""

    example: int
    step: int


def check_examples(examples: Sequence[Example], config: TrainingConfig, channels: int) -> SamplingConfig:
    """The sampling config that all examples share.

    Raises InvalidInputError where there is none, an example is not of the kind that the algorithm learns from, or an
    advantage lies outside +-advantage_clip; ShapeMismatchError where latents differ in shape or channels.
    """
    if not examples:
        raise InvalidInputError("examples: expected at least one, got none")
    kind = TrainingPair if config.learns_from_pairs else TrainingSample
    for n, example in enumerate(examples):
        if not isinstance(example, kind):
            raise InvalidInputError(
                f"examples[{n}]: {config.algorithm} learns from {kind.__name__}, got {type(example).__name__}"
            )
        if abs(example.advantage) > config.advantage_clip:
            raise InvalidInputError(
                f"examples[{n}].advantage: expected at most {config.advantage_clip:g} (advantage_clip) either way,"
                f" got {example.advantage:g}"
            )
    sides = [side for example in examples for side in example.sides]
    configs = {side.config for side in sides}
    if len(configs) != 1:
        raise InvalidInputError(f"examples: expected one sampling config, got {configs}")
    shapes = {tuple(side.latents.shape[2:]) for side in sides}
    if len(shapes) != 1 or sides[0].latents.shape[2] != channels:
        raise ShapeMismatchError("latents", f"({channels}, h, w) for all examples", sorted(shapes))
    return sides[0].config


def rows_of(examples: Sequence[Example], schedule: Schedule, config: TrainingConfig) -> list[Row]:
    """All rows that may be trained on, in order: example by example, step by step.

    Left out are steps without noise, transitions that a pair's trajectories share, and the dominant step if
    `skip_dominant_step`. Raises ScheduleError for trajectories of other timesteps, InvalidInputError where no row is
    left.
    """
    if not all(torch.equal(side.timesteps, schedule.timesteps) for example in examples for side in example.sides):
        raise ScheduleError(f"examples: expected trajectories of timesteps {schedule.timesteps.tolist()}")
    steps = set(schedule.trainable_steps)
    if config.skip_dominant_step:
        steps -= {int(step_weights(schedule).argmax())}
    rows = []
    for n, example in enumerate(examples):
        rows += [Row(n, step) for step in sorted(steps - example.shared_steps())]
    if not rows:
        raise InvalidInputError("examples: expected a step to train on, got none (pairs of equal trajectories?)")
    return rows


def draw_epoch(rows: Sequence[Row], config: TrainingConfig, generator: torch.Generator) -> list[list[Row]]:
    """The rows of each update of one inner epoch.

    The examples are permuted and dealt to updates of at most `examples_per_update`. Of each example's rows
    `timestep_fraction` (rounded, at least one) are drawn, in every epoch anew as in ddpo-pytorch, and stay in order.
    """
    rows_of_example: dict[int, list[Row]] = {}
    for row in rows:
        rows_of_example.setdefault(row.example, []).append(row)

    examples = list(rows_of_example)
    order = [examples[place] for place in torch.randperm(len(examples), generator=generator).tolist()]
    if config.timestep_fraction < 1:
        for example, usable in rows_of_example.items():
            count = max(1, round(len(usable) * config.timestep_fraction))
            places = torch.randperm(len(usable), generator=generator)[:count].tolist()
            rows_of_example[example] = [usable[place] for place in sorted(places)]
    updates = split_evenly(order, config.examples_per_update)
    return [[row for example in update for row in rows_of_example[example]] for update in updates]


def split_evenly(numbers: Sequence[int], most: int) -> list[list[int]]:
    """The numbers in order, in as few parts of at most `most` as there must be, whose sizes differ by at most one.

    A short last part would be an update as long as the others on a fraction of the examples.
    """
    parts = math.ceil(len(numbers) / most)
    bounds = [len(numbers) * part // parts for part in range(parts + 1)]
    return [list(numbers[start:stop]) for start, stop in pairwise(bounds)]


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of all that a training reads of its examples."""
    found = hashlib.sha256()
    for example in examples:
        found.update(json.dumps([example.prompt, example.advantage, example.drawn]).encode())
        if isinstance(example, TrainingPair) and example.mask is not None:
            found.update(example.mask.cpu().float().contiguous().numpy().tobytes())
        for side in example.sides:
            found.update(side.config.model_dump_json().encode())
            for tensor in (side.latents, side.log_probs):
                found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _check_one(name: str, trajectory: Trajectory) -> None:
    if len(trajectory) != 1:
        raise InvalidInputError(f"{name}: expected a trajectory of 1 sample, got {len(trajectory)}")
    finite = trajectory.latents.isfinite().flatten(2).all(2)[0].tolist()
    if not all(finite):
        state = finite.index(False)
        raise NonFiniteError(f"{name}.latents: expected finite numbers, got NaN or infinity at state {state}")
