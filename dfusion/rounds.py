"""A whole round in one call: sample, score, pair, fuse, adopt, train (figure 3).

The service's rounds do the same in stages that survive a lost worker. This is for a script or a notebook with a model
in memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dfusion.adapter import attach_lora, has_lora, lora_config, lora_parameters
from dfusion.advantages import RewardHistory
from dfusion.attention.layers import find_layers, resolve_layers
from dfusion.config import FusionConfig, LoraConfig, PairingConfig, RoundConfig, SamplingConfig
from dfusion.errors import InvalidInputError
from dfusion.figures import PairFigures, Side, decide, fusion_mask, pair_figures
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.optimizer_state import OptimizerState, require_moments_of
from dfusion.pairing import choose_pairs
from dfusion.prompts import Prompt
from dfusion.rewards import Scorer
from dfusion.rewards.checks import checked_scores
from dfusion.rewards.watch import diversity
from dfusion.sampling import sample
from dfusion.seeds import sample_seed, training_seed
from dfusion.thresholds import thresholds_of
from dfusion.training import OnRows, Trainer
from dfusion.training_data import Example, TrainingPair, TrainingSample
from dfusion.training_report import SelfTest, UpdateReport
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
    """Two samples of a prompt and the target between them; without fusion, or without thresholds, there is none.

    adopted     whether the target is the better side in training (Eq. 7); where not, the reference is
    why         the comparison that decided, or why there is no target
    thresholds  those of the mask
    mask        (h_m, w_m) in [0, 1], where the target took from the reference (`dfusion.figures.fusion_mask`)
    figures     what is measured on the pair
    """

    prompt: str
    reference: Drawn
    base: Drawn
    target: Drawn | None = None
    adopted: bool = False
    why: str = "fusion is off: the reference is preferred"
    thresholds: tuple[float, ...] | None = None
    mask: torch.Tensor | None = None
    figures: PairFigures | None = None

    @property
    def better(self) -> Drawn:
        """The side that is preferred to the base."""
        return self.target if self.adopted and self.target is not None else self.reference


@dataclass(frozen=True)
class RoundResult:
    """What a round made. `history` holds this round's scores, too: hand it to the next one.

    means      of the round's samples: the reward's, the watching scorer's, and "diversity" (mean distance of the clean
               latents of one prompt's samples); `dfusion.rewards.watch.falling_figures` tells whether they part
    self_test  of the training; None where there was nothing to learn from
    optimizer  AdamW's moments after the round: hand them to the next one, too
    """

    pairs: tuple[RoundPair, ...]
    updates: tuple[UpdateReport, ...]
    history: RewardHistory
    means: Mapping[str, float]
    self_test: SelfTest | None
    optimizer: OptimizerState | None = None


def run_round(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: RoundConfig = RoundConfig(),
    *,
    seed: int,
    round_number: int = 1,
    history: RewardHistory = RewardHistory(),
    optimizer: OptimizerState | None = None,
    watch: Scorer | None = None,
    on_rows: OnRows | None = None,
) -> RoundResult:
    """Run one round; the adapter in `model.unet` is trained in place, and attached first where there is none.

    seed          of the run, the same for all its rounds; with `round_number` and the prompt's place it gives each
                  sample's seed (`dfusion.seeds`), as in the service
    round_number  from 1; another for each round, or it samples the same noise again
    history       the same scorer's scores of earlier rounds, for advantages; an algorithm that learns from pairs has
                  none, and ignores a history of another scorer
    optimizer     AdamW's moments of the round before, so that it goes through all rounds as in ddpo-pytorch
    watch         a scorer that is never trained on
    on_rows       as for `Trainer.step`

    Items and thresholds of a prompt are its own, or found (decision 008). A prompt whose samples all score the same
    gives no pair; without any there is no update. Raises InvalidInputError without prompts, for prompts whose items
    cannot be found, for an image size that the VAE has no latents for, for a history of another scorer (with samples),
    for moments of another adapter, or where another rank or alpha is asked for than the attached adapter has;
    LayerNotFoundError, ScorerError, NonFiniteError, PolicyMismatchError.
    """
    _check(model, prompts, scorer, watch, config)
    history = _of_scorer(history, scorer, config)
    if not has_lora(model.unet):
        attach_lora(model.unet, config.training.lora, training_seed(seed, round_number))
    if optimizer is not None and config.training.optimizer_start == "carried":
        require_moments_of(lora_parameters(model.unet), optimizer)
    groups = list(_groups(model, prompts, scorer, config, seed, round_number))
    means = _means(groups, scorer, watch)
    for prompt, drawn in groups:
        history = history.extended({prompt.text: [one.score for one in drawn]}, _named(scorer))
    pairs = [pair for prompt, drawn in groups for pair in _pairs(model, prompt, drawn, scorer, config)]
    examples = list(_examples(groups, pairs, history, config))
    if not examples:
        return RoundResult(tuple(pairs), (), history, means, None, optimizer)
    trainer = Trainer(model, examples, config.training, training_seed(seed, round_number), optimizer)
    tested = trainer.prepare(on_rows)
    while trainer.updates_done < trainer.updates_total:
        trainer.step(on_rows)
    return RoundResult(tuple(pairs), tuple(trainer.reports), history, means, tested, trainer.optimizer_state())


def make_pairs(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: RoundConfig = RoundConfig(),
    *,
    seed: int,
    round_number: int = 1,
) -> Iterator[list[RoundPair]]:
    """The pairs of a round, prompt by prompt, without training; arguments and errors as of `run_round`."""
    _check(model, prompts, scorer, None, config)
    for prompt, samples in _groups(model, prompts, scorer, config, seed, round_number):
        yield list(_pairs(model, prompt, samples, scorer, config))


def _groups(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: RoundConfig,
    seed: int,
    round_number: int,
) -> Iterator[tuple[Prompt, list[Drawn]]]:
    """Each prompt with its samples."""
    for i, prompt in enumerate(prompts):
        seeds = [sample_seed(seed, round_number, i, prompt.text, n) for n in range(config.samples_per_prompt)]
        yield prompt, _draw(model, prompt, seeds, scorer, config)


def _named(scorer: Scorer) -> str:
    return f"{scorer.name}, version {scorer.version}"


def _of_scorer(history: RewardHistory, scorer: Scorer, config: RoundConfig) -> RewardHistory:
    """The history to go on from. Advantages of another scorer's scores would be wrong; pairs have
    none."""
    if config.training.learns_from_pairs and history.scorer not in (None, _named(scorer)):
        return RewardHistory()
    return history.extended({}, _named(scorer))


def _check(
    model: DiffusionModel, prompts: Sequence[Prompt], scorer: Scorer, watch: Scorer | None, config: RoundConfig
) -> None:
    """What can be known before the first sample; see `run_round`."""
    if not prompts or not all(isinstance(prompt, Prompt) for prompt in prompts):
        raise InvalidInputError(f"prompts: expected a list of at least one Prompt, got {prompts!r}")
    if (watch is not None and watch.name in (scorer.name, "diversity")) or scorer.name == "diversity":
        names = [scorer.name, watch.name if watch else None]
        raise InvalidInputError(f"watch: expected another name than the reward's and 'diversity', got {names}")
    if has_lora(model.unet):
        _keeps_adapter(lora_config(model.unet), config.training.lora)
    model.latent_size(config.sampling)
    if config.fusion is not None:
        resolve_layers(find_layers(model.unet), config.fusion.layers)
        if not config.fusion.steps(config.sampling.num_steps):
            steps = config.sampling.num_steps
            raise InvalidInputError(f"fusion.first_step: expected less than {steps}, got {config.fusion.first_step}")


def _keeps_adapter(attached: LoraConfig, asked: LoraConfig) -> None:
    """Raise InvalidInputError where another rank or alpha is asked for. How the adapter began no longer matters."""
    if (asked.rank, asked.alpha) not in ((LoraConfig().rank, LoraConfig().alpha), (attached.rank, attached.alpha)):
        expected = f"rank {attached.rank} and alpha {attached.alpha:g}, as the attached adapter has"
        raise InvalidInputError(f"training.lora: expected {expected}, got {asked.rank} and {asked.alpha:g}")


def _means(groups: Sequence[tuple[Prompt, Sequence[Drawn]]], scorer: Scorer, watch: Scorer | None) -> dict[str, float]:
    everything = [(prompt.text, one) for prompt, drawn in groups for one in drawn]
    texts = [text for text, _ in everything]
    found = {scorer.name: statistics.fmean(one.score for _, one in everything)}
    if watch is not None:
        images = np.stack([one.image for _, one in everything])
        found[watch.name] = statistics.fmean(checked_scores(watch.name, watch.score(images, texts), len(texts)))
    latents = np.stack([one.trajectory.final[0].numpy() for _, one in everything])
    return found | {"diversity": diversity(latents, texts, "rms").mean}


def _draw(
    model: DiffusionModel, prompt: Prompt, seeds: Sequence[int], scorer: Scorer, config: RoundConfig
) -> list[Drawn]:
    """The prompt's samples."""
    items = None if config.fusion is None else model.item_tokens(prompt.text, prompt.items)
    found = []
    for start in range(0, len(seeds), BATCH):
        part = seeds[start : start + BATCH]
        trajectory = sample(
            model.unet,
            model.scheduler,
            *_embeds(model, prompt, len(part), config.sampling),
            part,
            items=None if items is None else [items] * len(part),
            config=config.sampling,
            mask_source="first_up" if config.fusion is None else config.fusion.mask_source,
            latent_size=model.latent_size(config.sampling),
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

    # thresholds, from all samples that are paired if none are given
    paired = list({id(one): one for pair in sides for one in pair}.values())
    thresholds = prompt.thresholds
    if thresholds is None and paired:
        try:
            thresholds = thresholds_of(Trajectory.cat([one.trajectory for one in paired]), config.fusion)
        except InvalidInputError as error:  # an item whose map is the same everywhere
            return [RoundPair(prompt.text, *pair, why=f"nothing was fused: {error}") for pair in sides]

    # targets, and what is decided on them
    pairs = []
    for start in range(0, len(sides), BATCH):
        part = sides[start : start + BATCH]
        fused = fuse(
            model.unet,
            model.scheduler,
            Trajectory.cat([base.trajectory for _, base in part]),
            Trajectory.cat([reference.trajectory for reference, _ in part]),
            *_embeds(model, prompt, len(part), config.sampling),
            thresholds=[thresholds or ()] * len(part),
            config=config.fusion,
        )
        for pair, target in zip(part, _scored(model, prompt, fused, scorer), strict=True):
            pairs.append(_judged(prompt, *pair, target, thresholds or (), config.fusion, config.pairing))
    return pairs


def _judged(
    prompt: Prompt,
    reference: Drawn,
    base: Drawn,
    target: Drawn,
    thresholds: tuple[float, ...],
    fusion: FusionConfig,
    pairing: PairingConfig,
) -> RoundPair:
    """The pair with the decision on its target (Eq. 7), and its figures."""
    one, other, fused = (Side(s.trajectory.final[0], s.image, s.score) for s in (reference, base, target))
    mask = fusion_mask(reference.trajectory, thresholds, fusion)
    decision, figures = decide(one, other, fused, pairing, mask, fusion), pair_figures(one, other, fused, mask)
    return RoundPair(
        prompt.text, reference, base, target, decision.adopted, decision.why, thresholds, mask, figures=figures
    )


def _examples(
    groups: Sequence[tuple[Prompt, Sequence[Drawn]]],
    pairs: Sequence[RoundPair],
    history: RewardHistory,
    config: RoundConfig,
) -> Iterable[Example]:
    """Pairs; or, as samples, both sides of each pair, or without fusion all samples."""
    if config.training.learns_from_pairs:
        for pair in pairs:
            yield TrainingPair(
                pair.better.trajectory,
                pair.base.trajectory,
                pair.prompt,
                on_policy=not pair.adopted,
                mask=pair.mask if pair.adopted else None,
            )
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
    scores = checked_scores(scorer.name, scorer.score(images, [prompt.text] * len(images)), len(images))
    return [Drawn(trajectory.select([i]), image, scores[i]) for i, image in enumerate(images)]


def _embeds(
    model: DiffusionModel, prompt: Prompt, rows: int, sampling: SamplingConfig
) -> tuple[Conditioning, Conditioning]:
    size = model.latent_size(sampling)
    return model.encode_prompts([prompt.text] * rows, size), model.encode_prompts([""], size)
