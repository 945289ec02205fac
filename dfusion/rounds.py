"""A whole round in one call: sample, score, pair, fuse, adopt, train (figure 3).

The service's rounds do the same in stages that survive a lost worker. This is for a script or a notebook with a model
in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dfusion.adapter import attach_lora, has_lora
from dfusion.advantages import RewardHistory
from dfusion.config import RoundConfig
from dfusion.errors import InvalidInputError
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.pairing import adopt, choose_pairs
from dfusion.prompts import Prompt
from dfusion.rewards import Scorer
from dfusion.sampling import sample
from dfusion.thresholds import thresholds_of
from dfusion.training import OnRows, Trainer
from dfusion.training_data import Example, TrainingPair, TrainingSample
from dfusion.training_report import UpdateReport
from dfusion.types import Conditioning, Trajectory

BATCH = 8
"""Samples that go through the U-Net at once."""


@dataclass(frozen=True)
class Drawn:
    """One sample: its trajectory, image (H, W, 3) uint8 and score."""

    trajectory: Trajectory
    image: np.ndarray
    score: float


@dataclass(frozen=True)
class RoundPair:
    """Two samples of a prompt and the target between them; without fusion there is none.

    adopted  whether the target is the better side in training (Eq. 7); where not, the reference is
    """

    prompt: str
    reference: Drawn
    base: Drawn
    target: Drawn | None = None
    adopted: bool = False

    @property
    def better(self) -> Drawn:
        """The side that is preferred to the base."""
        return self.target if self.adopted and self.target is not None else self.reference


@dataclass(frozen=True)
class RoundResult:
    """What a round made. `history` holds this round's scores, too: hand it to the next one."""

    pairs: tuple[RoundPair, ...]
    updates: tuple[UpdateReport, ...]
    history: RewardHistory


def run_round(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: RoundConfig = RoundConfig(),
    *,
    seed: int,
    history: RewardHistory = RewardHistory(),
    on_rows: OnRows | None = None,
) -> RoundResult:
    """Run one round; the adapter in `model.unet` is trained in place, and attached first where there is none.

    seed     of this round: another one for the next, or it samples the same noise again
    history  the scores of earlier rounds, for ddpo and dpok
    on_rows  as for `Trainer.step`

    Items and thresholds of a prompt are its own, or found (decision 008). A prompt whose samples all score the same
    gives no pair; without any there is no update. Raises InvalidInputError without prompts or for prompts whose items
    cannot be found, NonFiniteError, PolicyMismatchError.
    """
    if not prompts:
        raise InvalidInputError("prompts: expected at least one, got none")
    if not has_lora(model.unet):
        attach_lora(model.unet, config.training.lora, seed)
    noise = torch.Generator().manual_seed(seed)
    groups = [(prompt, _draw(model, prompt, scorer, config, noise)) for prompt in prompts]
    for prompt, drawn in groups:
        history = history.extended({prompt.text: [one.score for one in drawn]})
    pairs = [pair for prompt, drawn in groups for pair in _pairs(model, prompt, drawn, scorer, config)]
    examples = list(_examples(groups, pairs, history, config))
    if not examples:
        return RoundResult((), (), history)
    trainer = Trainer(model, examples, config.training, seed)
    while trainer.updates_done < trainer.updates_total:
        trainer.step(on_rows)
    return RoundResult(tuple(pairs), tuple(trainer.reports), history)


def _draw(
    model: DiffusionModel, prompt: Prompt, scorer: Scorer, config: RoundConfig, noise: torch.Generator
) -> list[Drawn]:
    """The prompt's samples."""
    seeds = torch.randint(1 << 53, (config.samples_per_prompt,), generator=noise).tolist()
    items = None if config.fusion is None else model.item_tokens(prompt.text, prompt.items)
    found = []
    for start in range(0, len(seeds), BATCH):
        part = seeds[start : start + BATCH]
        trajectory = sample(
            model.unet,
            model.scheduler,
            *_embeds(model, prompt, len(part)),
            part,
            items=None if items is None else [items] * len(part),
            config=config.sampling,
            mask_source="first_up" if config.fusion is None else config.fusion.mask_source,
        )
        found += _scored(model, prompt, trajectory, scorer)
    return found


def _pairs(
    model: DiffusionModel, prompt: Prompt, drawn: Sequence[Drawn], scorer: Scorer, config: RoundConfig
) -> Iterable[RoundPair]:
    """The prompt's pairs with their targets."""
    chosen = choose_pairs([one.score for one in drawn], config.pairing)
    sides = [(drawn[pair.reference], drawn[pair.base]) for pair in chosen]
    if config.fusion is None:
        return [RoundPair(prompt.text, *pair) for pair in sides]
    thresholds = prompt.thresholds or thresholds_of(Trajectory.cat([one.trajectory for one in drawn]), config.fusion)
    found = []
    for start in range(0, len(sides), BATCH):
        part = sides[start : start + BATCH]
        fused = fuse(
            model.unet,
            model.scheduler,
            Trajectory.cat([base.trajectory for _, base in part]),
            Trajectory.cat([reference.trajectory for reference, _ in part]),
            *_embeds(model, prompt, len(part)),
            thresholds=[thresholds] * len(part),
            config=config.fusion,
        )
        for (reference, base), target in zip(part, _scored(model, prompt, fused, scorer), strict=True):
            adopted = adopt(target.score, base.score, reference.score, config.pairing)
            copied = torch.equal(target.trajectory.latents, base.trajectory.latents)  # an empty mask teaches nothing
            found.append(RoundPair(prompt.text, reference, base, target, adopted and not copied))
    return found


def _examples(
    groups: Sequence[tuple[Prompt, Sequence[Drawn]]],
    pairs: Sequence[RoundPair],
    history: RewardHistory,
    config: RoundConfig,
) -> Iterable[Example]:
    """Pairs for dpo; for ddpo and dpok both sides of each pair, or without fusion all samples."""
    if config.training.algorithm == "dpo":
        for pair in pairs:
            own = not pair.adopted
            yield TrainingPair(pair.better.trajectory, pair.base.trajectory, pair.prompt, on_policy=own)
        return
    singles: Iterable[tuple[str, Drawn, bool]]
    if config.fusion is None:
        singles = ((prompt.text, one, True) for prompt, drawn in groups for one in drawn)
    else:
        sides = ((pair, one) for pair in pairs for one in (pair.better, pair.base))
        singles = ((pair.prompt, one, one is not pair.target) for pair, one in sides)
    for prompt, one, own in singles:
        [advantage] = history.advantages(prompt, [one.score], config.training.advantage_clip)
        yield TrainingSample(one.trajectory, prompt, advantage, own)


def _scored(model: DiffusionModel, prompt: Prompt, trajectory: Trajectory, scorer: Scorer) -> list[Drawn]:
    images = model.decode(trajectory.final)
    scores = scorer.score(images, [prompt.text] * len(images))
    return [Drawn(trajectory.select([i]), image, float(scores[i])) for i, image in enumerate(images)]


def _embeds(model: DiffusionModel, prompt: Prompt, rows: int) -> tuple[Conditioning, Conditioning]:
    return model.encode_prompts([prompt.text] * rows), model.encode_prompts([""])
