"""Statistics of records: means with intervals, paired differences, pairs and trainings. Imports no torch.

Scores of one arm, split and scorer after a round are an array (R, P) with one row per training seed and one column per
prompt. Each value is the mean over the prompt's images. The model before training has one row. Differences are paired
by seed and prompt before they are averaged, and intervals resample seeds and prompts independently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from statistics import fmean

import numpy as np

from api.experiments.errors import RecordError
from api.experiments.format import BASE, Experiment
from api.experiments.records import Record, RoundFacts, ScoreFacts
from dfusion.evaluation import Bootstrap, Counts

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class ArmScores:
    """Scores of one arm after a round. `seeds` belong to the rows; None is the model before training."""

    arm: str
    round: int
    images: int
    seeds: tuple[int | None, ...]
    values: np.ndarray
    records: tuple[str, ...]


@dataclass(frozen=True)
class Mean:
    """An arm's mean score after a round, over `seeds` trainings and `prompts` prompts.

    change   difference from the model before training, paired by prompt; None if that was not measured
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
    """Difference of the scores of two arms, each after its last measured round.

    better, worse, equal   numbers of prompts, averaged over seeds
    chance                 p-value of the two-sided sign test over prompts
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
    """Results for one list, split and scorer: means after each measured round and final differences of arms."""

    list: str
    split: str
    scorer: str
    version: str
    means: tuple[Mean, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class ArmFacts:
    """Statistics of an arm's trainings on a list, over all seeds and all rounds or, with `round`, one round.

    adopted_share      share of adopted pairs among the pairs with a target
    pair_means         means of the pairs' statistics, weighted by the number of pairs
    update_means       means of the updates' statistics
    last_update_means  means of the statistics of each round's last update
    rollout_means      mean scores, by scorer, of the images sampled for training, before the round's training
    images_before      with `round`: number of images used for training before these were sampled
    seconds            time of its jobs per seed; None for one round
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
    """Compute means and differences for every list, split and scorer.

    Args:
        experiment: The matrix; it defines the order of the results.
        records: Records by file name.
        bootstrap: The method of the intervals.

    Returns:
        The results by list, split and scorer.

    Raises:
        RecordError: Records that are compared differ in prompts or in a scorer's version.
    """
    scores = []
    for list_name in experiment.prompt_lists:
        list_records = {file: record for file, record in records.items() if record.list == list_name}
        for split in experiment.evaluation.splits:
            for scorer in _scorers(list_records.values(), split):
                scores.append(_scores(experiment, list_name, split, scorer, list_records, bootstrap))
    return tuple(scores)


def _scorers(records: Iterable[Record], split: str) -> list[str]:
    names: dict[str, None] = {}
    for record in records:
        names |= {score.scorer: None for score in record.scores if score.split == split}
    return list(names)


def _scores(
    experiment: Experiment,
    list_name: str,
    split: str,
    scorer: str,
    records: Mapping[str, Record],
    bootstrap: Bootstrap,
) -> Scores:
    version = _common_version(records, split, scorer)
    by_arm = {arm: _scores_by_round(arm, split, scorer, records) for arm in (BASE, *experiment.arms)}
    last = {arm: rounds[-1] for arm, rounds in by_arm.items() if rounds}
    base = last.get(BASE)
    return Scores(
        list=list_name,
        split=split,
        scorer=scorer,
        version=version,
        means=tuple(_mean(scores, base, bootstrap) for scores in chain.from_iterable(by_arm.values())),
        differences=tuple(_differences(last, experiment.evaluation.comparisons, bootstrap)),
    )


def _common_version(records: Mapping[str, Record], split: str, scorer: str) -> str:
    """Return the scorer's version. Raises RecordError if versions or prompts differ, so that scores do not compare."""
    versions: dict[str, str] = {}
    prompts: dict[tuple[str, ...], str] = {}
    for file, record in records.items():
        for score in record.scores:
            if (score.split, score.scorer) == (split, scorer):
                versions.setdefault(score.version, file)
                prompts.setdefault(record.prompts[split], file)

    if len(versions) > 1:
        raise RecordError(
            f"expected one version of {scorer}, got {_join_versions(versions)}: run one of these cells again"
        )
    if len(prompts) > 1:
        raise RecordError(f"expected equal {split} prompts in {' and '.join(prompts.values())}")
    return next(iter(versions))


def _join_versions(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{version} ({file})" for version, file in versions.items())


def _scores_by_round(arm: str, split: str, scorer: str, records: Mapping[str, Record]) -> list[ArmScores]:
    """Collect the arm's scores after each measured round, in the order of rounds."""
    by_round: dict[int, list[tuple[str, Record, ScoreFacts]]] = {}
    for file, record in records.items():
        for score in record.scores:
            if (record.arm, score.split, score.scorer) == (arm, split, scorer):
                by_round.setdefault(score.round, []).append((file, record, score))

    rounds = []
    for number, rows in sorted(by_round.items()):
        files, cell_records, scores = zip(*rows, strict=True)
        rounds.append(
            ArmScores(
                arm=arm,
                round=number,
                images=max(score.images for score in scores),
                seeds=tuple(record.seed for record in cell_records),
                values=np.array([score.means for score in scores]),
                records=files,
            )
        )
    return rounds


def _mean(scores: ArmScores, base: ArmScores | None, bootstrap: Bootstrap) -> Mean:
    seeds, prompts = scores.values.shape
    changes = None if base is None or scores is base else scores.values - base.values

    return Mean(
        arm=scores.arm,
        round=scores.round,
        images=scores.images,
        seeds=seeds,
        prompts=prompts,
        mean=float(scores.values.mean()),
        interval=bootstrap.crossed_interval(scores.values),
        change=None if changes is None else float(changes.mean()),
        change_interval=None if changes is None else bootstrap.crossed_interval(changes),
        records=scores.records,
    )


def _differences(
    last: Mapping[str, ArmScores], comparisons: Iterable[tuple[str, str]] | None, bootstrap: Bootstrap
) -> Iterator[Difference]:
    """Compare arms with the model before training, which comes first, and with each other.

    Args:
        last: Scores after the last round, by arm.
        comparisons: Pairs of arms to compare with each other. None compares every arm with every earlier one.
        bootstrap: For the intervals.
    """
    pairs = [(arm, against) for against, arm in combinations(last, 2)]
    if comparisons is not None:
        pairs = [*(pair for pair in pairs if pair[1] == BASE), *comparisons]

    for arm_name, against_name in pairs:
        if arm_name not in last or against_name not in last:
            continue
        arm = last[arm_name]
        against = last[against_name]
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


def _paired(arm: ArmScores, against: ArmScores) -> tuple[list[int | None], np.ndarray] | None:
    """Return the common seeds and the differences (R, P) of two arms; None without common seeds."""
    if against.seeds == (None,):
        return list(arm.seeds), arm.values - against.values
    seeds = [seed for seed in arm.seeds if seed in against.seeds]
    if not seeds:
        return None
    rows = [arm.values[arm.seeds.index(seed)] - against.values[against.seeds.index(seed)] for seed in seeds]
    return list(seeds), np.array(rows)


def arm_facts(experiment: Experiment, records: Mapping[str, Record], *, by_round: bool = False) -> tuple[ArmFacts, ...]:
    """Summarize pairs and trainings of every list and arm with records; with `by_round`, of each round."""
    summaries: list[ArmFacts] = []
    for list_name in experiment.prompt_lists:
        for arm in experiment.arms:
            arm_records = {
                file: record for file, record in records.items() if (record.list, record.arm) == (list_name, arm)
            }
            rounds: Sequence[int | None] = [None] if arm_records else []
            if by_round:
                rounds = sorted({facts.round for facts in _all_rounds(arm_records)})
            summaries += [_arm_facts(list_name, arm, number, arm_records) for number in rounds]
    return tuple(summaries)


def _all_rounds(records: Mapping[str, Record]) -> Iterator[RoundFacts]:
    return chain.from_iterable(record.rounds for record in records.values())


def _arm_facts(list_name: str, arm: str, number: int | None, records: Mapping[str, Record]) -> ArmFacts:
    # 1. pairs and trainings of the chosen rounds
    rounds = [facts for facts in _all_rounds(records) if number in (None, facts.round)]
    targets = sum(facts.pairs.targets for facts in rounds)
    adopted = sum(facts.pairs.adopted for facts in rounds)
    trainings = [facts.training.updates for facts in rounds if facts.training is not None and facts.training.updates]

    # 2. images sampled for training
    metrics = chain.from_iterable(facts.metrics for facts in rounds)
    rollouts = [metric for metric in metrics if metric.split == "rollout"]
    images_before = [facts.images - _rollout_images(facts) for facts in rounds]

    # 3. time of all jobs
    jobs = chain.from_iterable(record.jobs.values() for record in records.values())
    seconds = [job.seconds for job in jobs if job.seconds is not None]

    return ArmFacts(
        list=list_name,
        arm=arm,
        round=number,
        seeds=len(records),
        rounds=len(rounds),
        pairs=sum(facts.pairs.pairs for facts in rounds),
        targets=targets,
        adopted=adopted,
        adopted_share=adopted / targets if targets else None,
        pair_means=_weighted_means([(facts.pairs.means, facts.pairs.targets) for facts in rounds]),
        update_means=_weighted_means([(update, 1) for update in chain.from_iterable(trainings)]),
        last_update_means=_weighted_means([(updates[-1], 1) for updates in trainings]),
        rollout_means=_weighted_means([({metric.scorer: metric.mean}, metric.count) for metric in rollouts]),
        images_before=None if number is None else min(images_before, default=None),
        seconds=sum(seconds) / len(records) if seconds and number is None else None,
        records=tuple(records),
    )


def _rollout_images(facts: RoundFacts) -> int:
    # a metric over prompts, such as the diversity, has a smaller count than the images
    return max((metric.count for metric in facts.metrics if metric.split == "rollout"), default=0)


def _weighted_means(rows: Sequence[tuple[Mapping[str, int | float | None], int]]) -> dict[str, float]:
    """Compute weighted means by name, over the rows that have a number of that name."""
    values: dict[str, list[tuple[float, int]]] = {}
    for numbers, weight in rows:
        for name, value in numbers.items():
            if value is not None and weight > 0:
                values.setdefault(name, []).append((float(value), weight))
    return {name: fmean(*zip(*pairs, strict=True)) for name, pairs in sorted(values.items())}
