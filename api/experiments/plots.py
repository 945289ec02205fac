"""Plots of a report, after the paper's figures 6 and 7. The only module that imports matplotlib.

Figures are created without pyplot, so that no global state changes and no display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from api.experiments.analysis import Difference, Mean, Scores
from api.experiments.errors import MissingExtraError
from api.experiments.format import BASE, SPLIT_NAMES, Experiment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from api.experiments.reporting import Report

_COLOURS = ("#d1750f", "#1f6fb4", "#2c8a4b", "#b03a48", "#7a55a3", "#6b6b6b", "#0f8f8f", "#a8742a")
_BASE_COLOUR = "#444444"
_PANEL = (4.2, 3.2)
"""Width and height in inches."""
_DOTS_PER_INCH = 120


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Write figures 6 and 7 for every split and scorer.

    Args:
        report: The report.
        folder: The output folder.

    Returns:
        The files, in the order of the report's measures.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: A file cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib") from error

    files = []
    for split, scorer in report.measures:
        scores = report.of(split, scorer)
        title = f"{scorer}, {SPLIT_NAMES[split]}"
        interval = f"{report.bootstrap.confidence:.0%} interval"
        for name, figure in (
            ("figure-6", score_against_images(report.experiment, scores, title, interval)),
            ("figure-7", changes_by_arm(report.experiment, scores, title, interval)),
        ):
            if figure is not None:
                file = folder / f"{name}--{split}--{scorer}.png"
                figure.savefig(file, dpi=_DOTS_PER_INCH, metadata={"Software": None})
                files.append(file)
    return files


def score_against_images(experiment: Experiment, scores: Sequence[Scores], title: str, interval: str) -> Figure:
    """Plot figure 6: each arm's mean score against the number of training images, with one panel per list.

    Curves start at the model before training. The band is the interval of the paired change since then, because the
    interval of the score mostly shows how prompts differ. Without a model before training it is the score's interval.
    """
    has_base = any(map(_has_changes, scores))
    quantity = "change since before training" if has_base else "score"
    figure, panels = _panels(len(scores), f"{title}\nband: {interval} of the {quantity}")
    colours = _colours(experiment)

    for panel, list_scores in zip(panels, scores, strict=True):
        base = next((mean for mean in list_scores.means if mean.arm == BASE), None)
        if base is not None:
            panel.axhline(base.mean, color=_BASE_COLOUR, linewidth=1, linestyle=":", label="before training")
        for arm in experiment.arms:
            means = [mean for mean in list_scores.means if mean.arm == arm]
            if means:
                _draw_curve(panel, base, means, arm, colours[arm])
        panel.set_title(list_scores.list, fontsize=10)
        panel.set_xlabel("images used for training")

    panels[0].set_ylabel("mean score")
    _add_legend(figure, panels[0])
    return figure


def _has_changes(scores: Scores) -> bool:
    return any(mean.change is not None for mean in scores.means)


def _draw_curve(panel: Axes, base: Mean | None, means: Sequence[Mean], arm: str, colour: str) -> None:
    start = [] if base is None else [base]
    points = [*start, *means]
    bands = [(mean.mean, mean.mean) for mean in start] + [_band(base, mean) for mean in means]
    images = [mean.images for mean in points]
    panel.plot(images, [mean.mean for mean in points], color=colour, marker="o", markersize=3.5, label=arm)
    lows, highs = zip(*bands, strict=True)
    panel.fill_between(images, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _band(base: Mean | None, mean: Mean) -> tuple[float, float]:
    if base is not None and mean.change_interval is not None:
        return base.mean + mean.change_interval[0], base.mean + mean.change_interval[1]
    return mean.interval or (mean.mean, mean.mean)


def changes_by_arm(experiment: Experiment, scores: Sequence[Scores], title: str, interval: str) -> Figure | None:
    """Plot figure 7: the change of each arm's score by training, with the interval of the paired difference.

    There is one panel per list; arms with the same algorithm are adjacent. Returns None if the model before training
    was not measured.
    """
    against_base = [_differences_from_base(list_scores) for list_scores in scores]
    if not any(against_base):
        return None

    figure, panels = _panels(len(scores), f"{title}\nchange by training, {interval}")
    colours = _colours(experiment)
    positions = _positions(experiment)

    for panel, list_scores, differences in zip(panels, scores, against_base, strict=True):
        panel.axhline(0, color=_BASE_COLOUR, linewidth=1)
        for arm, difference in differences.items():
            _draw_bar(panel, positions[arm], difference, colours[arm])
        ticks = [positions[arm] for arm in differences]
        panel.set_xticks(ticks, list(differences), rotation=30, ha="right", fontsize=9)
        panel.set_title(list_scores.list, fontsize=10)

    panels[0].set_ylabel("change of the mean score")
    return figure


def _differences_from_base(scores: Scores) -> dict[str, Difference]:
    return {difference.arm: difference for difference in scores.differences if difference.against == BASE}


def _draw_bar(panel: Axes, position: float, difference: Difference, colour: str) -> None:
    errors: Any = None
    if difference.interval is not None:
        low, high = difference.interval
        errors = [[max(0.0, difference.mean - low)], [max(0.0, high - difference.mean)]]
    panel.bar([position], [difference.mean], width=0.8, color=colour, yerr=errors, capsize=3, ecolor="#222222")


def _positions(experiment: Experiment) -> Mapping[str, float]:
    """Return the position of each arm's bar, with a gap between algorithms."""
    algorithms = {arm: experiment.training(arm).training.algorithm for arm in experiment.arms}
    positions: dict[str, float] = {}
    position = 0.0
    for algorithm in dict.fromkeys(algorithms.values()):
        for arm, arm_algorithm in algorithms.items():
            if arm_algorithm == algorithm:
                positions[arm] = position
                position += 1
        position += 0.6
    return positions


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL[0] * count, _PANEL[1]), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = [figure.add_subplot(1, count, number + 1) for number in range(count)]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, panels


def _add_legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9)


def _colours(experiment: Experiment) -> Mapping[str, str]:
    return {arm: _COLOURS[number % len(_COLOURS)] for number, arm in enumerate(experiment.arms)}
