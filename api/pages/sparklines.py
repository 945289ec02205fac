"""Sparklines: the course of a score in a few pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.db.tables import Metric
from service.states import Split

WIDTH = 96
HEIGHT = 28
_MARGIN = 3
_SPLITS = (Split.HELD_OUT, Split.TRAIN, Split.ROLLOUT)
_NAMES: Mapping[str, str] = {Split.HELD_OUT: "held out", Split.TRAIN: "training prompts", Split.ROLLOUT: "samples"}


@dataclass(frozen=True)
class Sparkline:
    """The means of a scorer over rounds, as the points of a line.

    Attributes:
        points: The points of an SVG polyline; "" for a single value.
        x: Where the last value is.
        y: Where the last value is.
        last: The last value.
        name: The images and the scorer.
        label: The whole in words.
    """

    points: str
    x: float
    y: float
    last: float
    name: str
    label: str


def sparkline(metrics: Sequence[Metric], reward: str | None) -> Sparkline | None:
    """The score that says most about a run: of held-out images if there are any, by the reward if it measures them."""
    by_split: dict[str, dict[str, dict[int, float]]] = {}
    for metric in metrics:
        by_split.setdefault(metric.split, {}).setdefault(metric.scorer, {})[metric.round] = metric.mean
    split = next((split for split in _SPLITS if split in by_split), None)
    if split is None:
        return None

    scorers = by_split[split]
    scorer = reward if reward in scorers else min(scorers)
    means = [scorers[scorer][number] for number in sorted(scorers[scorer])]
    name = f"{scorer}, {_NAMES[split]}"
    places = _places(means)
    x, y = places[-1]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places) if len(places) > 1 else ""
    label = f"{name}: from {means[0]:.3f} to {means[-1]:.3f} in {len(means)} rounds"
    return Sparkline(points, round(x, 1), round(y, 1), means[-1], name, label)


def _places(means: Sequence[float]) -> list[tuple[float, float]]:
    """The values as points within the margins, the highest at the top."""
    low, high = min(means), max(means)
    span = high - low
    step = (WIDTH - 2 * _MARGIN) / max(1, len(means) - 1)
    inner = HEIGHT - 2 * _MARGIN

    places = []
    for number, mean in enumerate(means):
        share = (mean - low) / span if span else 0.5
        x = _MARGIN + number * step if len(means) > 1 else WIDTH / 2
        places.append((x, _MARGIN + (1 - share) * inner))
    return places
