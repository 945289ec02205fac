"""A whole round in one call: sample, score, pair, fuse, adopt, train (figure 3).

Use it in a script or a notebook, with a model in memory. The service runs the same round in stages that survive the
loss of a worker.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from dfusion._diffusers import UNet2DConditionModel
from dfusion.adapter import attach_lora, has_lora, lora_config, lora_layers, lora_parameters, shapes_of
from dfusion.advantages import RewardHistory
from dfusion.attention.layers import find_layers, resolve_layers
from dfusion.config import FusionConfig, LoraConfig, RoundConfig, SamplingConfig
from dfusion.errors import InvalidInputError, shortened
from dfusion.fused_sampling import fuse
from dfusion.lora_layers import adapted_layers
from dfusion.models import DiffusionModel
from dfusion.optimizer_state import OptimizerState, require_moments_of, require_optimizer
from dfusion.pair_metrics import PairSides, PairStatistics, Side, decide, fusion_mask, pair_statistics
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

BATCH_SIZE = 8
"""Samples or pairs that are computed together, by default."""


@dataclass(frozen=True)
class Rollout:
    """One sample: its trajectory, image (H, W, 3) uint8 and score."""

    trajectory: Trajectory
    image: np.ndarray
    score: float


@dataclass(frozen=True)
class RoundPair:
    """Two samples of a prompt and their target. Without fusion, or without thresholds, there is no target.

    adopted     whether the target is the preferred side in training (Eq. 7); otherwise the reference is
    reason      the comparison that decided, or the reason why there is no target
    thresholds  thresholds of the mask
    mask        (h_m, w_m) in [0, 1], where the target took content from the reference (`fusion_mask`)
    statistics  the metrics of the pair
    """

    prompt: str
    reference: Rollout
    base: Rollout
    target: Rollout | None = None
    adopted: bool = False
    reason: str = "fusion is off: the reference is preferred"
    thresholds: tuple[float, ...] | None = None
    mask: torch.Tensor | None = None
    statistics: PairStatistics | None = None

    @property
    def better(self) -> Rollout:
        """The side that is preferred to the base."""
        return self.target if self.adopted and self.target is not None else self.reference


@dataclass(frozen=True)
class RoundResult:
    """The result of a round. Pass `history` and `optimizer` to the next round.

    pairs      the pairs of all prompts, with their targets
    updates    one report per optimiser update
    history    the scores of all rounds so far, including this one
    means      means over the round's samples: of the reward, of the held-out scorer, and "diversity" (mean distance of
               the clean latents of one prompt's samples); see `dfusion.rewards.signs`
    self_test  the training's self-test; None if there was nothing to learn from
    optimizer  AdamW's moments after the round
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
    batch_size: int = BATCH_SIZE,
) -> RoundResult:
    """Run one round and train the adapter in `model.unet` in place.

    A prompt whose samples all score the same gives no pair. Without any pair or sample to learn from there is no
    update.

    Args:
        model: The model. An adapter is attached if it has none.
        prompts: The prompts. Missing items are detected, and missing thresholds computed (decision 008).
        scorer: The reward.
        config: Settings of sampling, pairing, fusion and training.
        seed: The seed of the run, the same for all its rounds. Together with `round_number` and the prompt's
            index, it determines each sample's seed (`dfusion.seeds`), as in the service.
        round_number: Counts from 1. Two rounds with the same number sample the same noise.
        history: Scores of the same scorer in earlier rounds, for advantages. An algorithm that learns from pairs has
            no advantages and ignores a history of another scorer.
        optimizer: AdamW's moments after the previous round, carried over as in ddpo-pytorch.
        watch: A held-out scorer, which is never trained on.
        on_rows: As for `Trainer.step`.
        batch_size: Samples, or pairs to fuse, that are computed together. Prompts with few samples share a batch.
            Affects memory, and results only by rounding. `config.training.micro_batch` is that of the training.

    Returns:
        The pairs, the training's reports, and the state to pass to the next round.

    Raises:
        InvalidInputError: No prompts; a batch size below 1; items that cannot be found; an image size that is not a
            multiple of the VAE's factor; a history of another scorer (with samples); moments of another adapter or
            optimizer; LoRA settings that do not fit the U-Net or are not the attached adapter's; an optimizer that is
            not installed.
        LayerNotFoundError, ScorerError, NonFiniteError, PolicyMismatchError: From sampling, scoring and training.

    Example:
        >>> from dfusion import MODELS, DiffusionModel, Prompt, RoundConfig, SamplingConfig, TrainingConfig
        >>> from dfusion import load_scorer, run_round
        >>> model = DiffusionModel.load(MODELS["shapes"].folder)
        >>> prompts = [Prompt(text="a red and striped [circle]")]
        >>> config = RoundConfig(
        ...     samples_per_prompt=2, sampling=SamplingConfig(num_steps=4), training=TrainingConfig(inner_epochs=1)
        ... )
        >>> result = run_round(model, prompts, load_scorer("shapes-clip"), config, seed=1)
        >>> len(result.pairs), len(result.updates)
        (1, 1)
    """
    _check(model, prompts, scorer, watch, config, batch_size)
    history = _of_scorer(history, scorer, config)
    if not has_lora(model.unet):
        attach_lora(model.unet, config.training.lora, training_seed(seed, round_number))
    if optimizer is not None and config.training.optimizer_start == "carried":
        require_moments_of(lora_parameters(model.unet), optimizer, config.training.optimizer)

    # 1. sample and score
    groups = list(_groups(model, prompts, scorer, config, seed, round_number, batch_size))
    means = _means(groups, scorer, watch)
    for prompt, rollouts in groups:
        history = history.extended({prompt.text: [rollout.score for rollout in rollouts]}, _named(scorer))

    # 2. pair, fuse and adopt
    pairs = list(chain.from_iterable(_pairs(model, groups, scorer, config, batch_size)))

    # 3. train
    examples = list(_examples(groups, pairs, history, config))
    if not examples:
        return RoundResult(tuple(pairs), (), history, means, None, optimizer)
    trainer = Trainer(model, examples, config.training, training_seed(seed, round_number), optimizer)
    while trainer.updates_done < trainer.updates_total:
        trainer.step(on_rows)

    return RoundResult(
        tuple(pairs), tuple(trainer.reports), history, means, trainer.self_test, trainer.optimizer_state()
    )


def make_pairs(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: RoundConfig = RoundConfig(),
    *,
    seed: int,
    round_number: int = 1,
    batch_size: int = BATCH_SIZE,
) -> Iterator[list[RoundPair]]:
    """Make the pairs of a round without training, prompt by prompt.

    Prompts with few samples are sampled together. An error of one then also withholds the pairs of the others.

    Args:
        model, prompts, scorer, config, seed, round_number, batch_size: As for `run_round`.

    Yields:
        The pairs of each prompt; an empty list if its samples all score the same.

    Raises:
        The errors of `run_round`, except those of training.

    Example:
        >>> from dfusion import MODELS, DiffusionModel, Prompt, RoundConfig, SamplingConfig, load_scorer, make_pairs
        >>> model = DiffusionModel.load(MODELS["shapes"].folder)
        >>> config = RoundConfig(samples_per_prompt=2, sampling=SamplingConfig(num_steps=4))
        >>> prompts = [Prompt(text="a red and striped [circle]")]
        >>> [[pair]] = make_pairs(model, prompts, load_scorer("shapes-clip"), config, seed=1)
        >>> pair.reference.score > pair.base.score
        True
    """
    _check(model, prompts, scorer, None, config, batch_size)
    for group in _groups(model, prompts, scorer, config, seed, round_number, batch_size):
        yield from _pairs(model, [group], scorer, config, batch_size)


def _groups(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: RoundConfig,
    seed: int,
    round_number: int,
    batch_size: int,
) -> Iterator[tuple[Prompt, list[Rollout]]]:
    """Each prompt with its samples. Prompts with few samples share a batch."""
    count = config.samples_per_prompt
    at_once = max(1, batch_size // count)
    for first in range(0, len(prompts), at_once):
        part = prompts[first : first + at_once]
        planned = []
        for prompt_index, prompt in enumerate(part, first):
            planned += [(prompt, sample_seed(seed, round_number, prompt_index, prompt.text, n)) for n in range(count)]

        rollouts = _rollouts(model, planned, scorer, config, batch_size)
        for position, prompt in enumerate(part):
            yield prompt, rollouts[count * position : count * (position + 1)]


def _named(scorer: Scorer) -> str:
    return f"{scorer.name}, version {scorer.version}"


def _of_scorer(history: RewardHistory, scorer: Scorer, config: RoundConfig) -> RewardHistory:
    """The history to extend. It starts empty for another scorer if the algorithm needs no advantages.

    With advantages, a history of another scorer raises InvalidInputError: they would be wrong.
    """
    if config.training.learns_from_pairs and history.scorer not in (None, _named(scorer)):
        return RewardHistory()
    return history.extended({}, _named(scorer))


def _check(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    watch: Scorer | None,
    config: RoundConfig,
    batch_size: int,
) -> None:
    """Check the arguments of `run_round` before the first sample."""
    if batch_size < 1:
        raise InvalidInputError(f"batch_size: expected at least 1, got {batch_size}")
    if not prompts or not all(isinstance(prompt, Prompt) for prompt in prompts):
        raise InvalidInputError(f"prompts: expected a list of at least one Prompt, got {shortened(prompts)}")
    if (watch is not None and watch.name in (scorer.name, "diversity")) or scorer.name == "diversity":
        names = [scorer.name, watch.name if watch else None]
        raise InvalidInputError(
            f"watch: expected scorer names that differ from each other and from 'diversity', got {names}"
        )

    if has_lora(model.unet):
        _require_same_adapter(model.unet, config.training.lora)
    else:
        adapted_layers(shapes_of(model.unet), config.training.lora)
    require_optimizer(config.training)
    model.latent_size(config.sampling)
    if config.fusion is not None:
        resolve_layers(find_layers(model.unet), config.fusion.layers)
        if not config.fusion.steps(config.sampling.num_steps):
            steps = config.sampling.num_steps
            raise InvalidInputError(f"fusion.first_step: expected less than {steps}, got {config.fusion.first_step}")


def _require_same_adapter(unet: UNet2DConditionModel, requested: LoraConfig) -> None:
    """Raise InvalidInputError if other layers, ranks or alphas than the attached adapter's are requested.

    Its initialisation and dropout do not matter.
    """
    attached = lora_config(unet)
    if requested.model_copy(update={"init": LoraConfig().init, "dropout": 0.0}) == LoraConfig():
        return
    layers = adapted_layers(shapes_of(unet), requested)
    if (layers, requested.use_dora) == (lora_layers(unet), attached.use_dora):
        return
    expected = f"rank {attached.rank} and alpha {attached.alpha:g}, as the attached adapter has"
    got = f"{requested.rank} and {requested.alpha:g}"
    if (attached.rank, attached.alpha) == (requested.rank, requested.alpha):
        expected = "the layers, patterns and kind of the attached adapter"
        got = "others"
    raise InvalidInputError(f"training.lora: expected {expected}, got {got}")


def _means(
    groups: Sequence[tuple[Prompt, Sequence[Rollout]]], scorer: Scorer, watch: Scorer | None
) -> dict[str, float]:
    """Means over all samples by scorer, and their diversity."""
    texts: list[str] = []
    samples: list[Rollout] = []
    for prompt, rollouts in groups:
        texts += [prompt.text] * len(rollouts)
        samples += rollouts

    means = {scorer.name: statistics.fmean(rollout.score for rollout in samples)}
    if watch is not None:
        images = np.stack([rollout.image for rollout in samples])
        means[watch.name] = statistics.fmean(checked_scores(watch.name, watch.score(images, texts), texts))
    latents = np.stack([rollout.trajectory.final[0].numpy() for rollout in samples])
    return means | {"diversity": diversity(latents, texts, "rms").mean}


def _rollouts(
    model: DiffusionModel,
    planned: Sequence[tuple[Prompt, int]],
    scorer: Scorer,
    config: RoundConfig,
    batch_size: int,
) -> list[Rollout]:
    """The samples of prompts and seeds."""
    rollouts = []
    for start in range(0, len(planned), batch_size):
        batch = planned[start : start + batch_size]
        prompts = [prompt for prompt, _ in batch]
        texts = [prompt.text for prompt in prompts]
        items = None
        if config.fusion is not None:
            items = [model.item_tokens(prompt.text, prompt.items) for prompt in prompts]

        trajectory = sample(
            model.unet,
            model.scheduler,
            *_embeds(model, texts, config.sampling),
            [seed for _, seed in batch],
            items=items,
            config=config.sampling,
            mask_source="first_up" if config.fusion is None else config.fusion.mask_source,
            latent_size=model.latent_size(config.sampling),
        )
        rollouts += _scored(model, texts, trajectory, scorer)
    return rollouts


def _pairs(
    model: DiffusionModel,
    groups: Sequence[tuple[Prompt, Sequence[Rollout]]],
    scorer: Scorer,
    config: RoundConfig,
    batch_size: int,
) -> list[list[RoundPair]]:
    """The pairs of each prompt, with their targets. Pairs of several prompts share a batch."""
    pairs = [_without_targets(prompt, rollouts, config) for prompt, rollouts in groups]
    if config.fusion is None:
        return pairs

    places: list[tuple[int, int]] = []
    for position, of_prompt in enumerate(pairs):
        fusible = [number for number in _by_reference(of_prompt) if of_prompt[number].thresholds is not None]
        places += [(position, number) for number in fusible]
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        fused = _with_targets(
            model, [pairs[position][number] for position, number in batch], scorer, config, config.fusion
        )
        for (position, number), pair in zip(batch, fused, strict=True):
            pairs[position][number] = pair
    return pairs


def _without_targets(prompt: Prompt, rollouts: Sequence[Rollout], config: RoundConfig) -> list[RoundPair]:
    """The prompt's references and bases, with the thresholds to fuse them; without thresholds they are not fused."""
    chosen = choose_pairs([rollout.score for rollout in rollouts], config.pairing)
    pairs = [RoundPair(prompt.text, rollouts[pair.reference], rollouts[pair.base]) for pair in chosen]
    if config.fusion is None or not pairs:
        return pairs

    # the prompt's thresholds, or automatic ones from all paired samples
    thresholds = prompt.thresholds
    if thresholds is None:
        sides = chain.from_iterable((pair.reference, pair.base) for pair in pairs)
        paired = {id(rollout): rollout.trajectory for rollout in sides}
        try:
            thresholds = thresholds_of(Trajectory.cat(list(paired.values())), config.fusion)
        except InvalidInputError as error:  # an item whose map is constant
            return [replace(pair, reason=f"nothing was fused: {error}") for pair in pairs]
    return [replace(pair, thresholds=thresholds) for pair in pairs]


def _by_reference(pairs: Sequence[RoundPair]) -> list[int]:
    """The pairs' numbers, with those of a reference together: the U-Net then computes it once for them."""
    references = [id(pair.reference) for pair in pairs]
    return sorted(range(len(pairs)), key=lambda number: references.index(references[number]))


def _with_targets(
    model: DiffusionModel, pairs: Sequence[RoundPair], scorer: Scorer, config: RoundConfig, fusion: FusionConfig
) -> list[RoundPair]:
    """The pairs with their targets, the decision on each (Eq. 7), and their statistics."""
    # 1. targets
    texts = [pair.prompt for pair in pairs]
    thresholds = [pair.thresholds or () for pair in pairs]
    fused = fuse(
        model.unet,
        model.scheduler,
        Trajectory.cat([pair.base.trajectory for pair in pairs]),
        Trajectory.cat([pair.reference.trajectory for pair in pairs]),
        *_embeds(model, texts, config.sampling),
        thresholds=thresholds,
        config=fusion,
    )
    targets = _scored(model, texts, fused, scorer)

    # 2. statistics
    measured = []
    for pair, limits, target in zip(pairs, thresholds, targets, strict=True):
        mask = fusion_mask(pair.reference.trajectory, limits, fusion)
        measured.append(PairSides(_side(pair.reference), _side(pair.base), _side(target), mask))
    statistics = pair_statistics(measured, model.device)

    # 3. adoption
    judged = []
    for pair, target, sides, metrics in zip(pairs, targets, measured, statistics, strict=True):
        decision = decide(sides.reference, sides.base, sides.target, config.pairing, sides.mask, fusion)
        judged.append(
            replace(
                pair,
                target=target,
                adopted=decision.adopted,
                reason=decision.reason,
                mask=sides.mask,
                statistics=metrics,
            )
        )
    return judged


def _side(rollout: Rollout) -> Side:
    return Side(rollout.trajectory.final[0], rollout.image, rollout.score)


def _examples(
    groups: Sequence[tuple[Prompt, Sequence[Rollout]]],
    pairs: Sequence[RoundPair],
    history: RewardHistory,
    config: RoundConfig,
) -> Iterable[Example]:
    """The training's examples, pairs or samples. Samples are both sides of each pair, or all samples without fusion."""
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

    samples: list[tuple[str, Rollout, bool]] = []
    if config.fusion is None:
        for group_prompt, rollouts in groups:
            samples += [(group_prompt.text, rollout, True) for rollout in rollouts]
    else:
        for pair in pairs:
            sides = (pair.better, pair.base)
            samples += [(pair.prompt, rollout, rollout is not pair.target) for rollout in sides]
    for text, rollout, on_policy in samples:
        [advantage] = history.advantages(text, [rollout.score], config.training.advantage_clip)
        yield TrainingSample(rollout.trajectory, text, advantage, on_policy)


def _scored(model: DiffusionModel, texts: Sequence[str], trajectory: Trajectory, scorer: Scorer) -> list[Rollout]:
    """The samples of a trajectory, one per text, with their images and scores."""
    images = model.decode(trajectory.final)
    scores = checked_scores(scorer.name, scorer.score(images, texts), texts)
    return [Rollout(trajectory.select([i]), image, scores[i]) for i, image in enumerate(images)]


def _embeds(model: DiffusionModel, texts: Sequence[str], sampling: SamplingConfig) -> tuple[Conditioning, Conditioning]:
    size = model.latent_size(sampling)
    return model.encode_prompts(texts, size), model.encode_prompts([sampling.negative_prompt], size)
