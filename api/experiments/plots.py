"""Plots of a report, after the paper's figures 6 and 7. The only module that imports matplotlib.

Figures are drawn without pyplot, so nothing global changes and no display is needed.
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
"""Inches."""
_DOTS_PER_INCH = 120


def draw(report: Report, folder: Path) -> list[Path]:
    """Write figures 6 and 7 of every split and scorer; their files, in the order of the report's measures.

    Raises MissingExtraError, OSError.
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
    """Figure 6: each arm's mean score against the images it was trained on; a panel for each list.

    Arms start from the model before training. The band is the interval of the paired change since then: that of the
    score itself shows mostly how prompts differ. Without a model before training it is the score's own interval.
    """
    has_base = any(mean.change is not None for one in scores for mean in one.means)
    of_what = "change since before training" if has_base else "score"
    figure, panels = _panels(len(scores), f"{title}\nband: {interval} of the {of_what}")
    colours = _colours(experiment)
    for panel, one in zip(panels, scores, strict=True):
        base = next((mean for mean in one.means if mean.arm == BASE), None)
        if base is not None:
            panel.axhline(base.mean, color=_BASE_COLOUR, linewidth=1, linestyle=":", label="before training")
        for arm in experiment.arms:
            means = [mean for mean in one.means if mean.arm == arm]
            if means:
                _draw_curve(panel, base, means, arm, colours[arm])
        panel.set_title(one.list, fontsize=10)
        panel.set_xlabel("images used for training")
    panels[0].set_ylabel("mean score")
    _add_legend(figure, panels[0])
    return figure


def _draw_curve(panel: Axes, base: Mean | None, means: Sequence[Mean], arm: str, colour: str) -> None:
    start = [] if base is None else [base]
    points = [*start, *means]
    bands = [*((one.mean, one.mean) for one in start), *(_band(base, mean) for mean in means)]
    images = [mean.images for mean in points]
    panel.plot(images, [mean.mean for mean in points], color=colour, marker="o", markersize=3.5, label=arm)
    panel.fill_between(
        images, [low for low, _ in bands], [high for _, high in bands], color=colour, alpha=0.15, linewidth=0
    )


def _band(base: Mean | None, mean: Mean) -> tuple[float, float]:
    if base is not None and mean.change_interval is not None:
        return base.mean + mean.change_interval[0], base.mean + mean.change_interval[1]
    return mean.interval or (mean.mean, mean.mean)


def changes_by_arm(experiment: Experiment, scores: Sequence[Scores], title: str, interval: str) -> Figure | None:
    """Figure 7: how much each arm's score lies above that before training, with the interval of the paired difference;
    a panel for each list, arms of one algorithm side by side. None where nothing was measured before training."""
    against_base = [{d.arm: d for d in one.differences if d.against == BASE} for one in scores]
    if not any(against_base):
        return None
    figure, panels = _panels(len(scores), f"{title}\nchange by training, {interval}")
    colours = _colours(experiment)
    places = _places(experiment)
    for panel, one, differences in zip(panels, scores, against_base, strict=True):
        panel.axhline(0, color=_BASE_COLOUR, linewidth=1)
        for arm, difference in differences.items():
            _draw_bar(panel, places[arm], difference, colours[arm])
        panel.set_xticks([places[arm] for arm in differences], list(differences), rotation=30, ha="right", fontsize=9)
        panel.set_title(one.list, fontsize=10)
    panels[0].set_ylabel("change of the mean score")
    return figure


def _draw_bar(panel: Axes, place: float, difference: Difference, colour: str) -> None:
    errors: Any = None
    if difference.interval is not None:
        low, high = difference.interval
        errors = [[max(0.0, difference.mean - low)], [max(0.0, high - difference.mean)]]
    panel.bar([place], [difference.mean], width=0.8, color=colour, yerr=errors, capsize=3, ecolor="#222222")


def _places(experiment: Experiment) -> Mapping[str, float]:
    """Where each arm's bar stands; arms of another algorithm stand apart."""
    algorithms = {arm: experiment.training(arm).training.algorithm for arm in experiment.arms}
    places: dict[str, float] = {}
    place = 0.0
    for algorithm in dict.fromkeys(algorithms.values()):
        for arm in (arm for arm, of_arm in algorithms.items() if of_arm == algorithm):
            places[arm] = place
            place += 1
        place += 0.6
    return places


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
    return {arm: _COLOURS[place % len(_COLOURS)] for place, arm in enumerate(experiment.arms)}
