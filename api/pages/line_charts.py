"""The geometry of line charts that templates draw as SVG, for pages without scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api.pages.formats import number

WIDTH = 420
HEIGHT = 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 42
_MOST_POINTS = 400
"""Longer lines are thinned out, so that the size of a chart has a bound."""
_MOST_DOTS = 30
_STEPS = (1, 2, 2.5, 5, 10)
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: Its name in the legend.
        places: Its points within the chart.
        dots: Those that are marked.
    """

    name: str
    places: tuple[tuple[float, float], ...]
    dots: tuple[tuple[float, float], ...]

    @property
    def points(self) -> str:
        """Its points as SVG writes them."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.places)


@dataclass(frozen=True)
class LineChart:
    """A chart, with places in a box of WIDTH x HEIGHT.

    Attributes:
        title: Its title.
        x_label: The quantity and unit of its x axis.
        y_label: Those of its y axis.
        lines: Its lines.
        x_ticks: Places and labels on the x axis.
        y_ticks: Those on the y axis.
        summary: The first and last value of each line, for screen readers.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    summary: str


def line_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Points]) -> LineChart | None:
    """The chart of these series. None if none of them has a point with finite numbers."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    shown = {name: _thinned(points) for name, points in finite.items() if points}
    if not shown:
        return None

    # 1. the ranges, with space above and below
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points]
    pad = (max(ys) - min(ys)) * 0.08 or abs(min(ys)) * 0.1 or 0.1
    x_range = (min(xs), max(xs))
    y_range = (min(ys) - pad, max(ys) + pad)

    # 2. the places
    def place(x: float, y: float) -> tuple[float, float]:
        across = _share(x, x_range) * (WIDTH - LEFT - RIGHT)
        up = _share(y, y_range) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    lines = []
    for name, points in shown.items():
        places = tuple(place(x, y) for x, y in points)
        lines.append(Line(name, places, places if len(places) <= _MOST_DOTS else ()))
    summaries = [f"{name}: {number(points[0][1])} to {number(points[-1][1])}" for name, points in shown.items()]
    return LineChart(
        title,
        x_label,
        y_label,
        tuple(lines),
        tuple((place(x, y_range[0])[0], number(x)) for x in ticks(*x_range, 5) if x == round(x)),
        tuple((place(x_range[0], y)[1], number(y)) for y in ticks(*y_range, 4)),
        "; ".join(summaries),
    )


def _share(value: float, span: tuple[float, float]) -> float:
    low, high = span
    return (value - low) / (high - low) if high > low else 0.5


def _thinned(points: Points) -> Points:
    """At most about `_MOST_POINTS` of the points, the last one included."""
    every = math.ceil(len(points) / _MOST_POINTS)
    return points if every == 1 else [*points[:-1:every], points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from `low` to `high`, at most about `count`."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in _STEPS if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]
