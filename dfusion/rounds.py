"""A whole round in one call: sample, score, pair, fuse, adopt, train (figure 3).

Use it in a script or a notebook, with a model in memory. The service runs the same round in stages that survive the
loss of a worker.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from dfusion._diffusers import UNet2DConditionModel
from dfusion.adapter import attach_lora, has_lora, lora_config, lora_layers, lora_parameters, shapes_of
from dfusion.advantages import RewardHistory
from dfusion.attention.layers import find_layers, resolve_layers
from dfusion.config import FusionConfig, LoraConfig, PairingConfig, RoundConfig, SamplingConfig
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

BATCH = 8
"""Samples in one U-Net call."""


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

    Returns:
        The pairs, the training's reports, and the state to pass to the next round.

    Raises:
        InvalidInputError: No prompts; items that cannot be found; an image size that is not a multiple of the VAE's
            factor; a history of another scorer (with samples); moments of another adapter or optimizer; LoRA settings
            that do not fit the U-Net or are not the attached adapter's; an optimizer that is not installed.
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
    _check(model, prompts, scorer, watch, config)
    history = _of_scorer(history, scorer, config)
    if not has_lora(model.unet):
        attach_lora(model.unet, config.training.lora, training_seed(seed, round_number))
    if optimizer is not None and config.training.optimizer_start == "carried":
        require_moments_of(lora_parameters(model.unet), optimizer, config.training.optimizer)

    # 1. sample and score
    groups = list(_groups(model, prompts, scorer, config, seed, round_number))
    means = _means(groups, scorer, watch)
    for prompt, rollouts in groups:
        history = history.extended({prompt.text: [rollout.score for rollout in rollouts]}, _named(scorer))

    # 2. pair, fuse and adopt
    pairs: list[RoundPair] = []
    for prompt, rollouts in groups:
        pairs += _pairs(model, prompt, rollouts, scorer, config)

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
) -> Iterator[list[RoundPair]]:
    """Make the pairs of a round without training, prompt by prompt.

    Args:
        model, prompts, scorer, config, seed, round_number: As for `run_round`.

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
    _check(model, prompts, scorer, None, config)
    for prompt, rollouts in _groups(model, prompts, scorer, config, seed, round_number):
        yield list(_pairs(model, prompt, rollouts, scorer, config))


def _groups(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: RoundConfig,
    seed: int,
    round_number: int,
) -> Iterator[tuple[Prompt, list[Rollout]]]:
    """Each prompt with its samples."""
    for i, prompt in enumerate(prompts):
        seeds = [sample_seed(seed, round_number, i, prompt.text, n) for n in range(config.samples_per_prompt)]
        yield prompt, _rollouts(model, prompt, seeds, scorer, config)


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
    model: DiffusionModel, prompts: Sequence[Prompt], scorer: Scorer, watch: Scorer | None, config: RoundConfig
) -> None:
    """Check the arguments of `run_round` before the first sample."""
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
    model: DiffusionModel, prompt: Prompt, seeds: Sequence[int], scorer: Scorer, config: RoundConfig
) -> list[Rollout]:
    """The prompt's samples, one per seed."""
    items = None if config.fusion is None else model.item_tokens(prompt.text, prompt.items)

    rollouts = []
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
        rollouts += _scored(model, prompt, trajectory, scorer)
    return rollouts


def _pairs(
    model: DiffusionModel, prompt: Prompt, rollouts: Sequence[Rollout], scorer: Scorer, config: RoundConfig
) -> Iterable[RoundPair]:
    """The prompt's pairs with their targets."""
    # 1. references and bases
    chosen = choose_pairs([rollout.score for rollout in rollouts], config.pairing)
    sides = [(rollouts[pair.reference], rollouts[pair.base]) for pair in chosen]
    if config.fusion is None:
        return [RoundPair(prompt.text, *pair) for pair in sides]

    # 2. thresholds: the prompt's, or automatic ones from all paired samples
    paired = list({id(rollout): rollout for rollout in chain.from_iterable(sides)}.values())
    thresholds = prompt.thresholds
    if thresholds is None and paired:
        try:
            thresholds = thresholds_of(Trajectory.cat([rollout.trajectory for rollout in paired]), config.fusion)
        except InvalidInputError as error:  # an item whose map is constant
            return [RoundPair(prompt.text, *pair, reason=f"nothing was fused: {error}") for pair in sides]

    # 3. targets and their adoption, with the pairs of a reference together: the U-Net then computes it once for them
    by_reference = sorted(range(len(sides)), key=lambda number: chosen[number].reference)
    pairs: dict[int, RoundPair] = {}
    for start in range(0, len(sides), BATCH):
        numbers = by_reference[start : start + BATCH]
        part = [sides[number] for number in numbers]
        bases = Trajectory.cat([base.trajectory for _, base in part])
        references = Trajectory.cat([reference.trajectory for reference, _ in part])
        fused = fuse(
            model.unet,
            model.scheduler,
            bases,
            references,
            *_embeds(model, prompt, len(part), config.sampling),
            thresholds=[thresholds or ()] * len(part),
            config=config.fusion,
        )
        targets = _scored(model, prompt, fused, scorer)
        judged = _judged(model, prompt, part, targets, thresholds or (), config.fusion, config.pairing)
        pairs.update(zip(numbers, judged, strict=True))
    return [pairs[number] for number in range(len(sides))]


def _judged(
    model: DiffusionModel,
    prompt: Prompt,
    sides: Sequence[tuple[Rollout, Rollout]],
    targets: Sequence[Rollout],
    thresholds: tuple[float, ...],
    fusion: FusionConfig,
    pairing: PairingConfig,
) -> list[RoundPair]:
    """Pairs of (reference, base) with the decision on each target (Eq. 7), and their statistics."""
    measured = []
    for (reference, base), target in zip(sides, targets, strict=True):
        mask = fusion_mask(reference.trajectory, thresholds, fusion)
        measured.append(PairSides(_side(reference), _side(base), _side(target), mask))

    pairs = []
    statistics = pair_statistics(measured, model.device)
    for (reference, base), target, pair, metrics in zip(sides, targets, measured, statistics, strict=True):
        decision = decide(pair.reference, pair.base, pair.target, pairing, pair.mask, fusion)
        pairs.append(
            RoundPair(
                prompt.text,
                reference,
                base,
                target,
                decision.adopted,
                decision.reason,
                thresholds,
                pair.mask,
                statistics=metrics,
            )
        )
    return pairs


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


def _scored(model: DiffusionModel, prompt: Prompt, trajectory: Trajectory, scorer: Scorer) -> list[Rollout]:
    """The samples of a trajectory with their images and scores."""
    images = model.decode(trajectory.final)
    texts = [prompt.text] * len(images)
    scores = checked_scores(scorer.name, scorer.score(images, texts), texts)
    return [Rollout(trajectory.select([i]), image, scores[i]) for i, image in enumerate(images)]


def _embeds(
    model: DiffusionModel, prompt: Prompt, rows: int, sampling: SamplingConfig
) -> tuple[Conditioning, Conditioning]:
    size = model.latent_size(sampling)
    return model.encode_prompts([prompt.text] * rows, size), model.encode_prompts([sampling.negative_prompt], size)
