"""The report of an experiment, from its records: JSON, a Markdown page and plots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from api.experiments.analysis import ArmFacts, Difference, Interval, Mean, Scores, arm_facts, scores_of
from api.experiments.cells import Cell, cells_of
from api.experiments.errors import RecordError
from api.experiments.format import BASE, SPLIT_NAMES, Experiment
from api.experiments.records import Record, folder_of, json_text, record_of, write_text
from dfusion.evaluation import Bootstrap

JSON_FILE = "report.json"
PAGE_FILE = "report.md"
_DIGITS = 6
"""Decimals in the JSON; the last bits of a sum depend on the machine."""
_CONSISTENCY = {
    "mask cover": "mask_cover",
    "target to base, inside": "ssim.target_to_base.inside",
    "target to base, outside": "ssim.target_to_base.outside",
    "reference to base, inside": "ssim.reference_to_base.inside",
    "reference to base, outside": "ssim.reference_to_base.outside",
}
_TRAINING = ("loss", "accuracy", "log_ratio_preferred", "log_ratio_rejected", "grad_norm", "below_epsilon", "kl")


@dataclass(frozen=True)
class Report:
    """The results of an experiment and the files of its report.

    records   records by file name
    missing   cells without a record
    primary   split and scorer of the page's first section
    """

    experiment: Experiment
    records: Mapping[str, Record]
    missing: tuple[Cell, ...]
    primary: tuple[str, str]
    bootstrap: Bootstrap
    scores: tuple[Scores, ...]
    arms: tuple[ArmFacts, ...]
    arms_by_round: tuple[ArmFacts, ...]
    files: tuple[Path, ...] = ()

    def of(self, split: str, scorer: str) -> list[Scores]:
        """Return the scores of all lists."""
        return [scores for scores in self.scores if (scores.split, scores.scorer) == (split, scorer)]

    @property
    def measures(self) -> list[tuple[str, str]]:
        """Splits and scorers, the primary ones first."""
        pairs = dict.fromkeys((scores.split, scores.scorer) for scores in self.scores)
        return sorted(pairs, key=lambda pair: (pair[1] != self.primary[1], pair[0] != self.primary[0]))


def report(experiment: Experiment, out: Path, *, plots: bool = True, bootstrap: Bootstrap | None = None) -> Report:
    """Write `report.json`, `report.md` and the plots next to the experiment's records.

    Args:
        experiment: The matrix.
        out: Folder of all records; those of the experiment are in `out/<name of the experiment>/`.
        plots: Whether to create plots, which requires matplotlib.
        bootstrap: The method of the intervals; 95 % and 10,000 resamples if not given.

    Returns:
        The results and the files. Equal records give equal files.

    Raises:
        RecordError: There is no record, or records do not compare.
        MissingExtraError: matplotlib is not installed.
    """
    folder = folder_of(out, experiment.name)
    results = _collect(experiment, folder, bootstrap or Bootstrap())

    images: list[Path] = []
    if plots:
        from api.experiments.plots import write_plots  # imported here: matplotlib is optional and slow to import

        images = write_plots(results, folder)

    files = (folder / JSON_FILE, folder / PAGE_FILE)
    write_text(files[0], json_text(as_json(results)))
    write_text(files[1], page(results, [image.name for image in images]))
    return replace(results, files=(*files, *images))


def _collect(experiment: Experiment, folder: Path, bootstrap: Bootstrap) -> Report:
    records: dict[str, Record] = {}
    missing = []
    for cell in cells_of(experiment):
        record = record_of(folder, cell)
        if record is None:
            missing.append(cell)
        else:
            records[cell.file_name] = record
    if not records:
        raise RecordError(f"{folder} has no record with the settings of this experiment's file; run it first")

    scores = scores_of(experiment, records, bootstrap)
    return Report(
        experiment=experiment,
        records=records,
        missing=tuple(missing),
        primary=_primary(experiment, scores),
        bootstrap=bootstrap,
        scores=scores,
        arms=arm_facts(experiment, records),
        arms_by_round=arm_facts(experiment, records, by_round=True),
    )


def _primary(experiment: Experiment, scores: Sequence[Scores]) -> tuple[str, str]:
    """Return the primary split and scorer. Raises RecordError for a scorer that no record has."""
    scorers = list(dict.fromkeys(list_scores.scorer for list_scores in scores))
    primary = experiment.evaluation.primary or scorers[0]
    if primary not in scorers:
        raise RecordError(f"evaluation.primary: expected one of {', '.join(scorers)}, got {primary}")
    return experiment.evaluation.splits[0], primary


# JSON


def as_json(report: Report) -> dict[str, Any]:
    """Return all numbers, each with the files of its records."""
    content = {
        "experiment": report.experiment.name,
        "description": report.experiment.description,
        "primary": {"split": report.primary[0], "scorer": report.primary[1]},
        "bootstrap": asdict(report.bootstrap),
        "records": {file: _source(record) for file, record in report.records.items()},
        "missing": [cell.name for cell in report.missing],
        "scores": [asdict(scores) for scores in report.scores],
        "arms": [asdict(arm) for arm in report.arms],
        "arms_by_round": [asdict(arm) for arm in report.arms_by_round],
    }
    return {name: _rounded(value) for name, value in content.items()}


def _source(record: Record) -> dict[str, Any]:
    jobs = {kind: {"id": job.id, "seconds": job.seconds} for kind, job in record.jobs.items()}
    return {"key": record.key, "service": record.service, "devices": record.devices, "jobs": jobs}


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return round(value, _DIGITS) + 0.0  # no -0.0
        case dict():
            return {name: _rounded(part) for name, part in value.items()}
        case list() | tuple():
            return [_rounded(part) for part in value]
    return value


# Markdown


def page(report: Report, images: Sequence[str]) -> str:
    """Format the report as a Markdown page; `images` are files in its folder."""
    return "\n".join(_page(report, images)) + "\n"


def _page(report: Report, images: Sequence[str]) -> Iterator[str]:
    yield from _heading(report)

    for number, (split, scorer) in enumerate(report.measures):
        name = f"{scorer} on {SPLIT_NAMES[split]}"
        yield from (f"## {name}" + (" (primary)" if number == 0 else ""), "")
        yield from ("Mean score after the last measured round:", "", *score_table(report, split, scorer))
        differences = list(difference_table(report, split, scorer))
        if differences:
            yield from ("Paired differences:", "", *differences)
        for image in images:
            if image.endswith(f"--{split}--{scorer}.png"):
                yield from (f"![{image.partition('--')[0]}: {name}]({image})", "")

    yield from ("## After each round", "")
    yield from round_tables(report)

    yield from ("## Rollouts", "")
    yield "Mean scores of the images sampled for training, each round's before its training, over all seeds."
    yield ""
    yield from rollout_table(report)

    yield from ("## Pairs", "")
    yield "Means over the pairs of all seeds and rounds. Similarity is SSIM inside and outside the mask."
    yield ""
    yield from pair_table(report)

    yield from ("## Training", "")
    yield "Means over the last updates of all rounds; seconds of a cell's jobs, from start to end."
    yield ""
    yield from training_table(report)
    yield from _record_table(report)


def _heading(report: Report) -> Iterator[str]:
    experiment = report.experiment
    bootstrap = report.bootstrap
    yield from (f"# {experiment.name}", "")
    if experiment.description:
        yield from (experiment.description, "")

    total = len(report.records) + len(report.missing)
    size = (
        f"{len(experiment.arms)} arms x {len(experiment.prompt_lists)} lists x {len(experiment.seeds)} training seeds"
    )
    yield f"Cells recorded: {len(report.records)} of {total} ({size}, and the model before training)."
    yield f"Intervals: {bootstrap.confidence:.0%}, bootstrap over training seeds and prompts"
    yield f"({bootstrap.resamples} resamples). All models are measured on images from the same seeds;"
    yield "differences are paired by training seed and prompt, and bold where the interval excludes zero."
    if report.missing:
        yield from ("", f"**Missing:** {', '.join(cell.name for cell in report.missing)}.")
    yield ""


def score_table(report: Report, split: str, scorer: str) -> Iterator[str]:
    """Table of models by prompt lists after the last measured round (table 1 of the paper)."""
    scores = report.of(split, scorer)
    last_by_list = [_last_means(list_scores) for list_scores in scores]

    rows = []
    for arm in (BASE, *report.experiment.arms):
        means = [last.get(arm) for last in last_by_list]
        if any(means):
            rows.append([arm, *map(_mean_and_interval, means)])
    yield from table(["model", *(f"{list_scores.list}>" for list_scores in scores)], rows)


def _last_means(scores: Scores) -> dict[str, Mean]:
    """Return each arm's mean after its last measured round; means are in the order of rounds."""
    return {mean.arm: mean for mean in scores.means}


def difference_table(report: Report, split: str, scorer: str) -> Iterator[str]:
    """Table of differences: all pairs of arms for the primary measure, otherwise only those from the base model."""
    is_primary = (split, scorer) == report.primary
    rows = []
    for list_scores in report.of(split, scorer):
        for difference in list_scores.differences:
            if is_primary or difference.against == BASE:
                rows.append(_difference_row(list_scores.list, difference))

    if rows:
        headings = [
            "list",
            "model",
            "against",
            "difference>",
            "seeds>",
            "prompts better / worse / equal>",
            "sign test>",
        ]
        yield from table(headings, rows)


def change_table(report: Report, split: str, scorer: str) -> Iterator[str]:
    """Table of the scores before training and all paired differences, with one column per prompt list."""
    scores = report.of(split, scorer)
    rows = [[f"{BASE}, score", *(_number(_base_score(list_scores)) for list_scores in scores)]]

    by_list = [_differences_by_arms(list_scores) for list_scores in scores]
    for arm, against in dict.fromkeys(chain.from_iterable(by_list)):
        row = [differences.get((arm, against)) for differences in by_list]
        rows.append(
            [f"{arm} - {against}", *("" if difference is None else _difference(difference) for difference in row)]
        )
    yield from table(["", *(f"{list_scores.list}>" for list_scores in scores)], rows)


def _base_score(scores: Scores) -> float | None:
    return next((mean.mean for mean in scores.means if mean.arm == BASE), None)


def _differences_by_arms(scores: Scores) -> dict[tuple[str, str], Difference]:
    return {(difference.arm, difference.against): difference for difference in scores.differences}


def _difference(difference: Difference) -> str:
    """Format the estimate, in bold if its interval excludes zero."""
    estimate = _estimate(difference.mean, difference.interval, signed=True)
    excludes_zero = difference.interval is not None and (difference.interval[0] > 0 or difference.interval[1] < 0)
    return f"**{estimate}**" if excludes_zero else estimate


def _difference_row(list_name: str, difference: Difference) -> list[str]:
    return [
        list_name,
        difference.arm,
        difference.against,
        _difference(difference),
        str(difference.seeds),
        f"{difference.better} / {difference.worse} / {difference.equal}",
        "< 0.001" if difference.chance < 0.001 else f"{difference.chance:.3f}",
    ]


def round_tables(report: Report) -> Iterator[str]:
    """Tables of the scores after every measured round, by list and split."""
    for list_name in report.experiment.prompt_lists:
        for split in report.experiment.evaluation.splits:
            scores = [part for part in report.scores if (part.list, part.split) == (list_name, split)]
            if scores:
                yield from (f"{list_name}, {SPLIT_NAMES[split]}:", "")
                columns: list[str] = []
                for scorer_scores in scores:
                    columns += [f"{scorer_scores.scorer}>", f"{scorer_scores.scorer}, change>"]
                headings = ["model", "round>", "images used>", "seeds>", *columns]
                yield from table(headings, _round_rows(scores))


def _round_rows(scores: Sequence[Scores]) -> list[list[str]]:
    means: dict[tuple[str, int], dict[str, Mean]] = {}
    for scorer_scores in scores:
        for mean in scorer_scores.means:
            means.setdefault((mean.arm, mean.round), {})[scorer_scores.scorer] = mean

    rows = []
    for (arm, number), by_scorer in means.items():
        first = next(iter(by_scorer.values()))
        row = [arm, str(number), str(first.images), str(first.seeds)]
        for scorer_scores in scores:
            row += _mean_and_change(by_scorer.get(scorer_scores.scorer))
        rows.append(row)
    return rows


def _mean_and_interval(mean: Mean | None) -> str:
    return "" if mean is None else _estimate(mean.mean, mean.interval)


def _mean_and_change(mean: Mean | None) -> tuple[str, str]:
    if mean is None or mean.change is None:
        return _mean_and_interval(mean), ""
    return _mean_and_interval(mean), _estimate(mean.change, mean.change_interval, signed=True)


def rollout_table(report: Report) -> Iterator[str]:
    """Table of the mean scores of the images that each round sampled for training."""
    scorers = sorted(set(chain.from_iterable(arm.rollout_means for arm in report.arms)))
    rows = []
    for arm in report.arms_by_round:
        means = (_number(arm.rollout_means.get(scorer)) for scorer in scorers)
        rows.append([arm.list, arm.arm, str(arm.round), _number(arm.images_before), str(arm.seeds), *means])

    headings = ["list", "arm", "round>", "images used before>", "seeds>", *(f"{scorer}>" for scorer in scorers)]
    yield from table(headings, rows)


def pair_table(report: Report) -> Iterator[str]:
    """Table of each arm's numbers of pairs and targets, its adopted share and the similarity of the images."""
    rows = []
    for arm in report.arms:
        means = (_number(arm.pair_means.get(name)) for name in _CONSISTENCY.values())
        rows.append([arm.list, arm.arm, str(arm.pairs), str(arm.targets), _number(arm.adopted_share), *means])

    headings = ["list", "arm", "pairs>", "targets>", "share adopted>", *(f"{name}>" for name in _CONSISTENCY)]
    yield from table(headings, rows)


def training_table(report: Report) -> Iterator[str]:
    """Table of the statistics of each arm's trainings."""
    rows = []
    for arm in report.arms:
        means = (_number(arm.last_update_means.get(name)) for name in _TRAINING)
        seconds = "" if arm.seconds is None else f"{arm.seconds:.0f}"
        rows.append([arm.list, arm.arm, str(arm.seeds), str(arm.rounds), *means, seconds])

    headings = ["list", "arm", "seeds>", "rounds>", *(f"{name.replace('_', ' ')}>" for name in _TRAINING), "seconds>"]
    yield from table(headings, rows)


def _record_table(report: Report) -> Iterator[str]:
    rows = []
    for file, record in report.records.items():
        jobs = ", ".join(job.id for job in record.jobs.values())
        rows.append([f"[{file}]({file})", record.key[:12], jobs, record.service, ", ".join(record.devices)])

    yield from ("## Records", "")
    yield from table(["file", "key", "jobs", "service", "device"], rows)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Format a Markdown table; a heading that ends in `>` belongs to a right-aligned column of numbers."""
    yield "| " + " | ".join(heading.rstrip(">") for heading in headings) + " |"
    yield "|" + "|".join("--:" if heading.endswith(">") else "---" for heading in headings) + "|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def _estimate(mean: float, interval: Interval, *, signed: bool = False) -> str:
    kind = "+.4f" if signed else ".4f"
    if interval is None:
        return f"{mean:{kind}}"
    return f"{mean:{kind}} [{interval[0]:{kind}}, {interval[1]:{kind}}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
