"""The report of an experiment: JSON, a Markdown page and plots, all from its records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
"""Digits after the point in the JSON: the last bits of a sum depend on the machine."""
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
    """What the records of an experiment add up to, and the files that say so.

    records   by file name
    missing   cells without a record
    primary   the split and the scorer that the page leads with
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
        """The scores of all lists."""
        return [scores for scores in self.scores if (scores.split, scores.scorer) == (split, scorer)]

    @property
    def measures(self) -> list[tuple[str, str]]:
        """Splits and scorers, the primary ones first."""
        pairs = dict.fromkeys((scores.split, scores.scorer) for scores in self.scores)
        return sorted(pairs, key=lambda one: (one[1] != self.primary[1], one[0] != self.primary[0]))


def report(experiment: Experiment, out: Path, *, plots: bool = True, bootstrap: Bootstrap | None = None) -> Report:
    """Write `report.json`, `report.md` and the plots beside the experiment's records.

    Args:
        experiment: The matrix.
        out: Where its records are: `out/<name of the experiment>/`.
        plots: Whether to draw plots, which takes matplotlib.
        bootstrap: How intervals are made; 95 %, 10,000 resamples if not given.

    Returns:
        The numbers, and the files written. Equal records give equal files.

    Raises:
        RecordError: There is no record, or records do not compare.
        MissingExtraError: matplotlib is not installed.
    """
    folder = folder_of(out, experiment.name)
    collected = _collect(experiment, folder, bootstrap or Bootstrap())
    images: list[Path] = []
    if plots:
        from api.experiments.plots import draw  # only here: matplotlib is optional and slow to import

        images = draw(collected, folder)
    files = (folder / JSON_FILE, folder / PAGE_FILE)
    write_text(files[0], json_text(as_json(collected)))
    write_text(files[1], page(collected, [image.name for image in images]))
    return Report(**{**collected.__dict__, "files": (*files, *images)})


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
        raise RecordError(f"{folder} holds no record of this experiment as its file describes it; run it first")
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
    """Raises RecordError for a scorer that no record has."""
    scorers = list(dict.fromkeys(one.scorer for one in scores))
    primary = experiment.evaluation.primary or scorers[0]
    if primary not in scorers:
        raise RecordError(f"evaluation.primary: expected one of {', '.join(scorers)}, got {primary}")
    return experiment.evaluation.splits[0], primary


# JSON


def as_json(report: Report) -> dict[str, Any]:
    """All numbers, each with the files of the records that it comes from."""
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
    """The report as a Markdown page; `images` are files beside it."""
    return "\n".join(_page(report, images)) + "\n"


def _page(report: Report, images: Sequence[str]) -> Iterator[str]:
    experiment, bootstrap = report.experiment, report.bootstrap
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

    for place, (split, scorer) in enumerate(report.measures):
        name = f"{scorer} on {SPLIT_NAMES[split]}"
        yield from (f"## {name}" + (" (primary)" if place == 0 else ""), "")
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


def score_table(report: Report, split: str, scorer: str) -> Iterator[str]:
    """Models by prompt lists, after the last measured round (table 1 of the paper)."""
    scores = report.of(split, scorer)
    last = {(one.list, mean.arm): mean for one in scores for mean in one.means}
    rows = []
    for arm in (BASE, *report.experiment.arms):
        cells = [last.get((one.list, arm)) for one in scores]
        if any(cells):
            rows.append([arm, *("" if mean is None else _estimate(mean.mean, mean.interval) for mean in cells)])
    yield from table(["model", *(f"{one.list}>" for one in scores)], rows)


def difference_table(report: Report, split: str, scorer: str) -> Iterator[str]:
    """All pairs of arms for the primary measure, each arm against the model before training for the others."""
    is_primary = (split, scorer) == report.primary
    rows = [
        _difference_row(one.list, difference)
        for one in report.of(split, scorer)
        for difference in one.differences
        if is_primary or difference.against == BASE
    ]
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
    """Scores before training and all paired differences of `difference_table`, a column for each prompt list."""
    scores = report.of(split, scorer)
    before = [next((mean.mean for mean in of_list.means if mean.arm == BASE), None) for of_list in scores]
    rows = [[f"{BASE}, score", *map(_number, before)]]

    differences = [{(each.arm, each.against): each for each in of_list.differences} for of_list in scores]
    for arm, against in dict.fromkeys(key for of_list in differences for key in of_list):
        cells = [of_list.get((arm, against)) for of_list in differences]
        rows.append([f"{arm} - {against}", *("" if each is None else _difference(each) for each in cells)])
    yield from table(["", *(f"{of_list.list}>" for of_list in scores)], rows)


def _difference(difference: Difference) -> str:
    """The estimate, bold where its interval excludes zero."""
    estimate = _estimate(difference.mean, difference.interval, signed=True)
    excludes_zero = difference.interval is not None and (difference.interval[0] > 0 or difference.interval[1] < 0)
    return f"**{estimate}**" if excludes_zero else estimate


def _difference_row(list_name: str, one: Difference) -> list[str]:
    counts = f"{one.better} / {one.worse} / {one.equal}"
    return [
        list_name,
        one.arm,
        one.against,
        _difference(one),
        str(one.seeds),
        counts,
        "< 0.001" if one.chance < 0.001 else f"{one.chance:.3f}",
    ]


def round_tables(report: Report) -> Iterator[str]:
    """Every measured round, by list and split."""
    for list_name in report.experiment.prompt_lists:
        for split in report.experiment.evaluation.splits:
            scores = [one for one in report.scores if (one.list, one.split) == (list_name, split)]
            if scores:
                yield from (f"{list_name}, {SPLIT_NAMES[split]}:", "")
                columns = [f"{one.scorer}{part}>" for one in scores for part in ("", ", change")]
                headings = ["model", "round>", "images used>", "seeds>", *columns]
                yield from table(headings, _round_rows(scores))


def _round_rows(scores: Sequence[Scores]) -> list[list[str]]:
    means: dict[tuple[str, int], dict[str, Mean]] = {}
    for one in scores:
        for mean in one.means:
            means.setdefault((mean.arm, mean.round), {})[one.scorer] = mean
    rows = []
    for (arm, number), by_scorer in means.items():
        some = next(iter(by_scorer.values()))
        cells = [cell for one in scores for cell in _mean_and_change(by_scorer.get(one.scorer))]
        rows.append([arm, str(number), str(some.images), str(some.seeds), *cells])
    return rows


def _mean_and_change(mean: Mean | None) -> tuple[str, str]:
    if mean is None:
        return "", ""
    change = "" if mean.change is None else _estimate(mean.change, mean.change_interval, signed=True)
    return _estimate(mean.mean, mean.interval), change


def rollout_table(report: Report) -> Iterator[str]:
    """Mean scores of the images that each round sampled for training, by the images used before."""
    scorers = sorted({scorer for arm in report.arms for scorer in arm.rollout_means})
    rows = [
        [
            arm.list,
            arm.arm,
            str(arm.round),
            _number(arm.images_before),
            str(arm.seeds),
            *(_number(arm.rollout_means.get(scorer)) for scorer in scorers),
        ]
        for arm in report.arms_by_round
    ]
    headings = ["list", "arm", "round>", "images used before>", "seeds>", *(f"{scorer}>" for scorer in scorers)]
    yield from table(headings, rows)


def pair_table(report: Report) -> Iterator[str]:
    """How many pairs each arm had, how many targets were adopted, and how alike the images are."""
    rows = [
        [
            arm.list,
            arm.arm,
            str(arm.pairs),
            str(arm.targets),
            _number(arm.adopted_share),
            *(_number(arm.pair_means.get(name)) for name in _CONSISTENCY.values()),
        ]
        for arm in report.arms
    ]
    headings = ["list", "arm", "pairs>", "targets>", "share adopted>", *(f"{name}>" for name in _CONSISTENCY)]
    yield from table(headings, rows)


def training_table(report: Report) -> Iterator[str]:
    """How each arm's trainings went."""
    rows = [
        [
            arm.list,
            arm.arm,
            str(arm.seeds),
            str(arm.rounds),
            *(_number(arm.last_update_means.get(name)) for name in _TRAINING),
            "" if arm.seconds is None else f"{arm.seconds:.0f}",
        ]
        for arm in report.arms
    ]
    headings = ["list", "arm", "seeds>", "rounds>", *(f"{name.replace('_', ' ')}>" for name in _TRAINING), "seconds>"]
    yield from table(headings, rows)


def _record_table(report: Report) -> Iterator[str]:
    rows = [
        [
            f"[{file}]({file})",
            record.key[:12],
            ", ".join(job.id for job in record.jobs.values()),
            record.service,
            ", ".join(record.devices),
        ]
        for file, record in report.records.items()
    ]
    yield from ("## Records", "")
    yield from table(["file", "key", "jobs", "service", "device"], rows)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; a heading that ends in `>` is that of numbers."""
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
