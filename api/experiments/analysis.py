"""What records add up to: means with intervals, paired differences, pairs and trainings. Imports no torch.

Scores of one arm, split and scorer after a round are an array (R, P): a training per seed, a prompt per column, each
value the mean over the prompt's images. The model before training has one row. Differences are taken seed by seed and
prompt by prompt before they are averaged, and intervals resample seeds and prompts apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np

from api.experiments.errors import RecordError
from api.experiments.format import BASE, Experiment
from api.experiments.records import Record, RoundFacts, ScoreFacts
from dfusion.evaluation import Bootstrap, Counts

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Measured:
    """One arm's scores after a round. `seeds` name the rows, None the model before training."""

    arm: str
    round: int
    images: int
    seeds: tuple[int | None, ...]
    values: np.ndarray
    records: tuple[str, ...]


@dataclass(frozen=True)
class Mean:
    """An arm's mean score after a round, over `seeds` trainings and `prompts` prompts.

    change   how much higher than before training, paired by prompt; None where that was not measured
    """

    arm: str
    round: int
    images: int
    seeds: int
    prompts: int
    mean: float
    interval: Interval
    change: float | None
    change_interval: Interval
    records: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """How much higher an arm's score is than another's, each after its last measured round.

    better, worse, equal   on how many prompts, on the average of the seeds
    chance                 two-sided sign test over the prompts
    """

    arm: str
    against: str
    seeds: int
    prompts: int
    mean: float
    interval: Interval
    better: int
    worse: int
    equal: int
    chance: float
    records: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """One list, split and scorer: all arms after every measured round, and all arms against each other at the end."""

    list: str
    split: str
    scorer: str
    version: str
    means: tuple[Mean, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class ArmFacts:
    """How an arm's trainings on a list went, over all its seeds and rounds or, with `round`, those of one round.

    adopted_share      of the pairs with a target
    pair_means         means of the pairs' figures, weighted by their pairs
    update_means       means of the updates' figures
    last_update_means  the same over the last updates of the rounds
    rollout_means      mean scores of the images sampled for training, by scorer, before the round's training
    images_before      with `round`: images used for training before these were sampled
    seconds            of its jobs, for each seed; None for one round
    """

    list: str
    arm: str
    round: int | None
    seeds: int
    rounds: int
    pairs: int
    targets: int
    adopted: int
    adopted_share: float | None
    pair_means: Mapping[str, float]
    update_means: Mapping[str, float]
    last_update_means: Mapping[str, float]
    rollout_means: Mapping[str, float]
    images_before: int | None
    seconds: float | None
    records: tuple[str, ...]


def scores_of(experiment: Experiment, records: Mapping[str, Record], bootstrap: Bootstrap) -> tuple[Scores, ...]:
    """Every list, split and scorer of the records (by file name), in the experiment's order.

    Raises RecordError where records that are to be compared differ in prompts or in a scorer's version.
    """
    scores = []
    for list_name in experiment.prompt_lists:
        of_list = {file: record for file, record in records.items() if record.list == list_name}
        for split in experiment.evaluation.splits:
            for scorer in _scorers(of_list.values(), split):
                scores.append(_scores(experiment, list_name, split, scorer, of_list, bootstrap))
    return tuple(scores)


def _scorers(records: Iterable[Record], split: str) -> list[str]:
    names = [score.scorer for record in records for score in record.scores if score.split == split]
    return list(dict.fromkeys(names))


def _scores(
    experiment: Experiment,
    list_name: str,
    split: str,
    scorer: str,
    records: Mapping[str, Record],
    bootstrap: Bootstrap,
) -> Scores:
    version = _common_version(records, split, scorer)
    measured = {arm: _measured(arm, split, scorer, records) for arm in (BASE, *experiment.arms)}
    last = {arm: rounds[-1] for arm, rounds in measured.items() if rounds}
    base = last.get(BASE)
    return Scores(
        list=list_name,
        split=split,
        scorer=scorer,
        version=version,
        means=tuple(_mean(one, base, bootstrap) for rounds in measured.values() for one in rounds),
        differences=tuple(_differences(last, bootstrap)),
    )


def _common_version(records: Mapping[str, Record], split: str, scorer: str) -> str:
    """The scorer's version. Raises RecordError where versions or prompts differ: such scores do not compare."""
    versions: dict[str, str] = {}
    prompts: dict[tuple[str, ...], str] = {}
    for file, record in records.items():
        for score in record.scores:
            if (score.split, score.scorer) == (split, scorer):
                versions.setdefault(score.version, file)
                prompts.setdefault(record.prompts[split], file)
    if len(versions) > 1:
        raise RecordError(f"expected one version of {scorer}, got {_and(versions)}: run one of them again")
    if len(prompts) > 1:
        raise RecordError(f"expected the same prompts, {split}, in {' and '.join(prompts.values())}")
    return next(iter(versions))


def _and(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{version} ({file})" for version, file in versions.items())


def _measured(arm: str, split: str, scorer: str, records: Mapping[str, Record]) -> list[Measured]:
    """The arm after each round that all its seeds have been measured after."""
    by_round: dict[int, list[tuple[str, Record, ScoreFacts]]] = {}
    of_arm = {file: record for file, record in records.items() if record.arm == arm}
    for file, record in of_arm.items():
        for score in record.scores:
            if (score.split, score.scorer) == (split, scorer):
                by_round.setdefault(score.round, []).append((file, record, score))
    return [
        Measured(
            arm=arm,
            round=number,
            images=max(score.images for _, _, score in rows),
            seeds=tuple(record.seed for _, record, _ in rows),
            values=np.array([score.means for _, _, score in rows]),
            records=tuple(file for file, _, _ in rows),
        )
        for number, rows in sorted(by_round.items())
    ]


def _mean(one: Measured, base: Measured | None, bootstrap: Bootstrap) -> Mean:
    seeds, prompts = one.values.shape
    changes = None if base is None or one is base else one.values - base.values
    return Mean(
        arm=one.arm,
        round=one.round,
        images=one.images,
        seeds=seeds,
        prompts=prompts,
        mean=float(one.values.mean()),
        interval=bootstrap.crossed_interval(one.values),
        change=None if changes is None else float(changes.mean()),
        change_interval=None if changes is None else bootstrap.crossed_interval(changes),
        records=one.records,
    )


def _differences(last: Mapping[str, Measured], bootstrap: Bootstrap) -> Iterator[Difference]:
    """Every arm against every one before it, the model before training first."""
    for against, arm in combinations(last.values(), 2):
        paired = _paired(arm, against)
        if paired is None:
            continue
        seeds, values = paired
        by_prompt = values.mean(0)
        counts = Counts(
            better=int((by_prompt > 0).sum()), worse=int((by_prompt < 0).sum()), equal=int((by_prompt == 0).sum())
        )
        yield Difference(
            arm=arm.arm,
            against=against.arm,
            seeds=len(seeds),
            prompts=values.shape[1],
            mean=float(values.mean()),
            interval=bootstrap.crossed_interval(values),
            better=counts.better,
            worse=counts.worse,
            equal=counts.equal,
            chance=counts.chance,
            records=(*arm.records, *against.records),
        )


def _paired(arm: Measured, against: Measured) -> tuple[list[int | None], np.ndarray] | None:
    """Seeds that both have, and the differences (R, P); None where they share none."""
    if against.seeds == (None,):
        return list(arm.seeds), arm.values - against.values
    seeds = [seed for seed in arm.seeds if seed in against.seeds]
    if not seeds:
        return None
    rows = [arm.values[arm.seeds.index(seed)] - against.values[against.seeds.index(seed)] for seed in seeds]
    return list(seeds), np.array(rows)


def arm_facts(experiment: Experiment, records: Mapping[str, Record], *, by_round: bool = False) -> tuple[ArmFacts, ...]:
    """Pairs and trainings of every list and arm that has records; with `by_round` of each round apart."""
    facts = []
    for list_name in experiment.prompt_lists:
        for arm in experiment.arms:
            of_arm = {file: one for file, one in records.items() if (one.list, one.arm) == (list_name, arm)}
            rounds = sorted({one.round for record in of_arm.values() for one in record.rounds})
            for number in rounds if by_round else [None] if of_arm else []:
                facts.append(_arm_facts(list_name, arm, number, of_arm))
    return tuple(facts)


def _arm_facts(list_name: str, arm: str, number: int | None, records: Mapping[str, Record]) -> ArmFacts:
    rounds = [one for record in records.values() for one in record.rounds if number in (None, one.round)]
    targets = sum(one.pairs.targets for one in rounds)
    adopted = sum(one.pairs.adopted for one in rounds)
    trainings = [one.training.updates for one in rounds if one.training is not None and one.training.updates]
    rollouts = [metric for facts in rounds for metric in facts.metrics if metric.split == "rollout"]
    images_before = [facts.images - _rollout_images(facts) for facts in rounds]
    seconds = [job.seconds for record in records.values() for job in record.jobs.values() if job.seconds is not None]

    return ArmFacts(
        list=list_name,
        arm=arm,
        round=number,
        seeds=len(records),
        rounds=len(rounds),
        pairs=sum(one.pairs.pairs for one in rounds),
        targets=targets,
        adopted=adopted,
        adopted_share=adopted / targets if targets else None,
        pair_means=_weighted_means([(one.pairs.means, one.pairs.targets) for one in rounds]),
        update_means=_weighted_means([(update, 1) for updates in trainings for update in updates]),
        last_update_means=_weighted_means([(updates[-1], 1) for updates in trainings]),
        rollout_means=_weighted_means([({metric.scorer: metric.mean}, metric.count) for metric in rollouts]),
        images_before=None if number is None else min(images_before, default=None),
        seconds=sum(seconds) / len(records) if seconds and number is None else None,
        records=tuple(records),
    )


def _rollout_images(facts: RoundFacts) -> int:
    # A metric over prompts, such as the diversity, counts less than the images.
    return max((metric.count for metric in facts.metrics if metric.split == "rollout"), default=0)


def _weighted_means(rows: Sequence[tuple[Mapping[str, int | float | None], int]]) -> dict[str, float]:
    """Means by name over the rows that have a number there."""
    values: dict[str, list[tuple[float, int]]] = {}
    for numbers, weight in rows:
        for name, value in numbers.items():
            if value is not None and weight > 0:
                values.setdefault(name, []).append((float(value), weight))
    return {
        name: fmean([value for value, _ in pairs], [weight for _, weight in pairs])
        for name, pairs in sorted(values.items())
    }
