"""Training examples: pairs of trajectories (Eq. 6), or single trajectories with their advantages (Eq. 8, 9)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch.nn import functional

from dfusion.config import SamplingConfig, TrainingConfig
from dfusion.ddim import Schedule
from dfusion.errors import InvalidInputError, NonFiniteError, ScheduleError, ShapeMismatchError
from dfusion.labelled_pairs import LabelledPair, why_untrainable
from dfusion.policy import step_weights
from dfusion.spool import SpooledTrajectory
from dfusion.types import Trajectory

AnyTrajectory = Trajectory | SpooledTrajectory
"""A trajectory of one sample, in memory or in a file."""


@dataclass(frozen=True)
class TrainingPair:
    """A preferred and a rejected trajectory of one prompt, each of one sample, for Eq. 6.

    on_policy           whether the policy to be trained sampled the preferred trajectory. False for a fused target and
                        an inverted trajectory, whose recorded log-probs are another network's
    rejected_on_policy  the same for the rejected trajectory. A reviewer may have rejected a target
    mask                (h_m, w_m) in [0, 1]: where the target was fused (`dfusion.pair_metrics.fusion_mask`). None if
                        neither side is a target. Used with `credit="mask"` only

    Raises ShapeMismatchError and InvalidInputError, and NonFiniteError for latents that are NaN or infinite.
    """

    preferred: AnyTrajectory
    rejected: AnyTrajectory
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

        expected = tuple(self.preferred.latents.shape)
        actual = tuple(self.rejected.latents.shape)
        if actual != expected:
            raise ShapeMismatchError("rejected.latents", expected, actual)
        if self.mask is not None and (self.mask.ndim != 2 or not 0 <= self.mask.min() <= self.mask.max() <= 1):
            described = f"shape {tuple(self.mask.shape)}, {self.mask.min():g} to {self.mask.max():g}"
            raise InvalidInputError(f"pair: expected a mask (h_m, w_m) in [0, 1], got {described}")

    def credit_weights(self) -> torch.Tensor:
        """(h, w): the mask at the latents' size. Ones if there is no mask, or if it is empty at that size."""
        height, width = self.preferred.latents.shape[3:]
        everywhere = torch.ones(height, width)
        if self.mask is None:
            return everywhere
        resized = functional.interpolate(self.mask[None, None].float(), size=(height, width), mode="nearest")[0, 0]
        return resized if bool(resized.any()) else everywhere

    @property
    def sides(self) -> tuple[AnyTrajectory, ...]:
        """The trajectories of a row's transitions, preferred first."""
        return self.preferred, self.rejected

    @property
    def sides_on_policy(self) -> tuple[bool, ...]:
        """For each side, whether the policy sampled it."""
        return self.on_policy, self.rejected_on_policy

    @property
    def advantage(self) -> float:
        """Always 0: Eq. 6 uses no advantage."""
        return 0.0

    def shared_steps(self) -> frozenset[int]:
        """The transitions that both trajectories share. Their gradient in Eq. 6 is exactly zero.

        A fused target shares the transitions before its first fused step with its base.
        """
        same = (self.preferred.latents == self.rejected.latents).flatten(2).all(2)[0].tolist()
        return frozenset(i for i in range(len(same) - 1) if same[i] and same[i + 1])


@dataclass(frozen=True)
class TrainingSample:
    """A trajectory of one sample and its advantage, for Eq. 8 and 9.

    advantage  the normalised reward, see `dfusion.advantages`
    on_policy  whether the policy to be trained sampled the trajectory. False for a fused target or an inverted
               trajectory

    Raises ShapeMismatchError, and NonFiniteError for latents or an advantage that is NaN or infinite.
    """

    trajectory: AnyTrajectory
    prompt: str
    advantage: float
    on_policy: bool = True

    def __post_init__(self) -> None:
        _check_one("trajectory", self.trajectory)
        if not math.isfinite(self.advantage):
            raise NonFiniteError(f"advantage: expected a finite number, got {self.advantage}")

    @property
    def sides(self) -> tuple[AnyTrajectory, ...]:
        """The trajectory of a row's transition."""
        return (self.trajectory,)

    @property
    def sides_on_policy(self) -> tuple[bool, ...]:
        """Whether the policy sampled the trajectory."""
        return (self.on_policy,)

    def shared_steps(self) -> frozenset[int]:
        """Always empty: every transition of a sample is trained on, including those a target copied from its base."""
        return frozenset()


Example = TrainingPair | TrainingSample


@dataclass(frozen=True, order=True)
class Row:
    """One term of the loss: transition `step` of each side of examples[example]."""

    example: int
    step: int


def check_examples(examples: Sequence[Example], config: TrainingConfig, channels: int) -> SamplingConfig:
    """The sampling config that all examples share.

    Raises:
        InvalidInputError: No examples; different sampling configs; an example of a kind that the algorithm does not
            learn from; an advantage outside +-advantage_clip.
        ShapeMismatchError: Latents that differ in shape or channels.
    """
    if not examples:
        raise InvalidInputError("examples: expected at least one, got none")

    kind = TrainingPair if config.learns_from_pairs else TrainingSample
    for n, example in enumerate(examples):
        if not isinstance(example, kind):
            got = why_untrainable(example) if isinstance(example, LabelledPair) else f"got {type(example).__name__}"
            raise InvalidInputError(f"examples[{n}]: {config.algorithm} learns from {kind.__name__}, {got}")
        if abs(example.advantage) > config.advantage_clip:
            raise InvalidInputError(
                f"examples[{n}].advantage: expected a number within +-{config.advantage_clip:g} (advantage_clip), "
                f"got {example.advantage:g}"
            )

    sides = list(chain.from_iterable(example.sides for example in examples))
    configs = {side.config for side in sides}
    if len(configs) != 1:
        raise InvalidInputError(f"examples: expected one sampling config, got {len(configs)}")
    shapes = {tuple(side.latents.shape[2:]) for side in sides}
    if len(shapes) != 1 or sides[0].latents.shape[2] != channels:
        raise ShapeMismatchError("latents", f"({channels}, h, w) for all examples", sorted(shapes))
    return sides[0].config


def rows_of(examples: Sequence[Example], schedule: Schedule, config: TrainingConfig) -> list[Row]:
    """All rows that can be trained on, in order of example and step.

    Steps without noise are left out, as are transitions that a pair's trajectories share. With `skip_dominant_step` the
    dominant step is left out, too.

    Raises:
        ScheduleError: Trajectories whose timesteps differ from the schedule's.
        InvalidInputError: No row is left.
    """
    sides = chain.from_iterable(example.sides for example in examples)
    for side in sides:
        if not torch.equal(side.timesteps, schedule.timesteps):
            expected = schedule.timesteps.tolist()
            raise ScheduleError(f"examples: expected the timesteps {expected}, got {side.timesteps.tolist()}")

    steps = set(schedule.trainable_steps)
    if config.skip_dominant_step:
        steps -= {int(step_weights(schedule).argmax())}

    rows = []
    for n, example in enumerate(examples):
        rows += [Row(n, step) for step in sorted(steps - example.shared_steps())]
    if not rows:
        raise InvalidInputError(
            "examples: expected at least one step to train on, got none; the two sides of each pair may be identical"
        )
    return rows


def plan_epoch(rows: Sequence[Row], config: TrainingConfig, generator: torch.Generator) -> list[list[Row]]:
    """The rows of each update of one inner epoch.

    The examples are shuffled and split into updates of at most `examples_per_update`. Of each example's rows a random
    share `timestep_fraction` is kept (rounded, at least one row), in their order. Each epoch has its own share, as in
    ddpo-pytorch.
    """
    # 1. the order of the examples
    rows_of_example: dict[int, list[Row]] = {}
    for row in rows:
        rows_of_example.setdefault(row.example, []).append(row)
    examples = list(rows_of_example)
    order = [examples[index] for index in torch.randperm(len(examples), generator=generator).tolist()]

    # 2. the steps of each example
    if config.timestep_fraction < 1:
        for example, usable in rows_of_example.items():
            count = max(1, round(len(usable) * config.timestep_fraction))
            indices = torch.randperm(len(usable), generator=generator)[:count].tolist()
            rows_of_example[example] = [usable[index] for index in sorted(indices)]

    # 3. the updates
    updates = []
    for part in split_evenly(order, config.examples_per_update):
        updates.append(list(chain.from_iterable(rows_of_example[example] for example in part)))
    return updates


def split_evenly(numbers: Sequence[int], max_size: int) -> list[list[int]]:
    """Split the numbers, in order, into the fewest parts of at most `max_size`, whose sizes differ by at most one.

    With a short last part, one update would take a full step on a fraction of the examples.
    """
    parts = math.ceil(len(numbers) / max_size)
    bounds = [len(numbers) * part // parts for part in range(parts + 1)]
    return [list(numbers[start:stop]) for start, stop in pairwise(bounds)]


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of everything that a training reads from its examples."""
    sha256 = hashlib.sha256()
    for example in examples:
        sha256.update(json.dumps([example.prompt, example.advantage, example.sides_on_policy]).encode())
        if isinstance(example, TrainingPair) and example.mask is not None:
            sha256.update(example.mask.cpu().float().contiguous().numpy().tobytes())
        for side in example.sides:
            sha256.update(side.config.model_dump_json().encode())
            for tensor in (side.latents, side.log_probs):
                sha256.update(tensor.cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _check_one(name: str, trajectory: AnyTrajectory) -> None:
    if len(trajectory) != 1:
        raise InvalidInputError(f"{name}: expected a trajectory of 1 sample, got {len(trajectory)}")
    finite = trajectory.latents.isfinite().flatten(2).all(2)[0].tolist()
    if not all(finite):
        state = finite.index(False)
        raise NonFiniteError(f"{name}.latents: expected finite numbers, got NaN or infinity at state {state}")
