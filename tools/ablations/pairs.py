"""Pairs for ablations: chosen by a reward from new samples of any model and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dfusion.errors import InvalidInputError
from dfusion.models import DiffusionModel
from dfusion.pairing import choose_pairs
from dfusion.prompts import Prompt
from dfusion.rewards import Scorer
from dfusion.rewards.checks import checked_scores
from dfusion.sampling import sample
from dfusion.shapes.judge import Judge, read_prompt
from dfusion.shapes.scenes import IMAGE_SIZE
from dfusion.thresholds import thresholds_of
from dfusion.types import Conditioning, Trajectory

SAMPLES_PER_PROMPT = 16
PAIRS_PER_PROMPT = 4
BATCH = 8
"""Samples in one U-Net call."""


@dataclass(frozen=True)
class Bench:
    """A model with the scorers of its images: the reward and, if it applies, the shapes world's judge."""

    model: DiffusionModel
    scorer: Scorer
    judge: Judge | None = None

    def scores(self, pictures: np.ndarray, prompt: str) -> list[float]:
        """The reward of each picture."""
        prompts = [prompt] * len(pictures)
        return checked_scores(self.scorer.name, self.scorer.score(pictures, prompts), prompts)

    def accepts(self, pictures: np.ndarray, prompt: str) -> list[bool | None]:
        """Whether the judge accepts each image. None without a judge."""
        if self.judge is None:
            return [None] * len(pictures)
        return list(self.judge.accepts(pictures, [prompt] * len(pictures)))


@dataclass(frozen=True)
class Pairs:
    """Pairs of one prompt with their mask thresholds, and the images and rewards of bases and references."""

    prompt: str
    thresholds: tuple[float, ...]
    base: Trajectory
    reference: Trajectory
    base_pictures: np.ndarray
    reference_pictures: np.ndarray
    base_scores: tuple[float, ...]
    reference_scores: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.base)

    def single(self, row: int) -> Pairs:
        """The pair of this row only."""
        return Pairs(
            self.prompt,
            self.thresholds,
            self.base.select([row]),
            self.reference.select([row]),
            self.base_pictures[row : row + 1],
            self.reference_pictures[row : row + 1],
            self.base_scores[row : row + 1],
            self.reference_scores[row : row + 1],
        )


def judge_for(model: DiffusionModel, prompts: Sequence[Prompt]) -> Judge | None:
    """The shapes world's judge, if it can read all prompts and the model's images have its size. Otherwise None."""
    sides = {side * model.pixels_per_latent for side in model.latent_shape[1:]}
    try:
        for prompt in prompts:
            read_prompt(prompt.text)
    except InvalidInputError:
        return None
    return Judge.load() if sides == {IMAGE_SIZE} else None


def find_pairs(bench: Bench, prompts: Sequence[Prompt], count: int, seed: int) -> list[Pairs]:
    """At least `count` pairs, unless the prompts run out, grouped by prompt.

    For each prompt, they are the first few pairs that `choose_pairs` returns for 16 samples, by the reward. Raises
    InvalidInputError if there are no pairs.
    """
    groups: list[Pairs] = []
    for number, prompt in enumerate(prompts):
        # 1. sample and score
        first = seed + number * 1000
        trajectory = _sampled(bench.model, prompt, range(first, first + SAMPLES_PER_PROMPT))
        pictures = bench.model.decode(trajectory.final)
        scores = bench.scores(pictures, prompt.text)

        # 2. pair
        chosen = choose_pairs(scores)[:PAIRS_PER_PROMPT]
        if chosen:
            bases = [pair.base for pair in chosen]
            references = [pair.reference for pair in chosen]
            pairs = Pairs(
                prompt.text,
                prompt.thresholds or thresholds_of(trajectory),
                trajectory.select(bases),
                trajectory.select(references),
                pictures[bases],
                pictures[references],
                tuple(map(scores.__getitem__, bases)),
                tuple(map(scores.__getitem__, references)),
            )
            groups.append(pairs)
        if sum(map(len, groups)) >= count:
            break

    if not groups:
        raise InvalidInputError(f"prompts: expected samples of different {bench.scorer.name}, got equal scores for all")
    return groups


def _sampled(model: DiffusionModel, prompt: Prompt, seeds: Sequence[int]) -> Trajectory:
    """Samples with item maps, in batches."""
    items = model.item_tokens(prompt.text, prompt.items)
    embeds = model.encode_prompts([prompt.text])
    negative = model.encode_prompts([""])

    parts = []
    for start in range(0, len(seeds), BATCH):
        part = list(seeds[start : start + BATCH])
        rows = embeds.expand(len(part))
        parts.append(sample(model.unet, model.scheduler, rows, negative, part, items=[items] * len(part)))
    return Trajectory.cat(parts)


def conditions(model: DiffusionModel, pairs: Pairs) -> tuple[Conditioning, Conditioning]:
    """The conditioning of all pairs, and the negative one of guidance (one row)."""
    return model.encode_prompts([pairs.prompt]).expand(len(pairs)), model.encode_prompts([""])
