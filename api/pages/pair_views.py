"""Pairs as the pages show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from api.wire.pairs import PairOut, SideOut, VerdictOut

_STATISTICS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "latent_distance": ("Latent distance", "RMS"),
        "pixel_distance": ("Pixel distance", "mean, 0 to 1"),
        "psnr": ("PSNR", "dB"),
        "ssim": ("SSIM", "at most 1"),
    }
)
"""The names and units of the statistics that compare images."""
_COMPARISONS = ("target_to_base", "reference_to_base")
_REGIONS = ("inside", "outside")


@dataclass(frozen=True)
class Side:
    """An image of a pair."""

    role: str
    id: str
    seed: int
    score: float | None
    image: str


@dataclass(frozen=True)
class StatisticRow:
    """A statistic of how far the target and the reference are from the base.

    Attributes:
        name: Its name.
        unit: Its unit or range.
        values: Target and base inside and outside the mask, then reference and base inside and outside.
    """

    name: str
    unit: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class PairView:
    """A pair as its page and its card show it.

    Attributes:
        pair: The pair as the API shows it.
        items: The items of its prompt.
        sides: Its images: base, then target and reference, as far as it has them.
        mask: The path of the mask as an overlay.
        can_be_judged: Whether its target is verified, or it has none.
        margin: The scores of target and reference minus that of the base.
        mask_cover: The share of the image that the mask covers.
        statistics: How far the target is from its base and its reference.
        thresholds: The mask threshold of each item.
        own: The verdict of the reviewer who reads the page.
        stored: The ids of its samples whose trajectories are stored; empty on a card.
    """

    pair: PairOut
    items: tuple[str, ...]
    sides: tuple[Side, ...]
    mask: str | None
    can_be_judged: bool
    margin: Mapping[str, float | None]
    mask_cover: float | None
    statistics: tuple[StatisticRow, ...]
    thresholds: tuple[tuple[str, float], ...]
    own: VerdictOut | None
    stored: frozenset[str] = frozenset()

    @property
    def can_be_decoded(self) -> bool:
        """Whether the trajectories of all its samples are stored."""
        return all(side.id in self.stored for side in self.sides)

    @property
    def can_be_fused(self) -> bool:
        """Whether the trajectories of its base and reference are stored."""
        return {self.pair.base.id, self.pair.reference.id} <= self.stored

    @property
    def better(self) -> Side:
        """The side that is compared with the base: the target, or the reference of a pair without one."""
        return self.sides[1]


def pair_view(
    pair: PairOut, reviewer: str | None, items: Sequence[str] = (), stored: frozenset[str] = frozenset()
) -> PairView:
    """Convert a pair for the page of this reviewer, of the prompt with these items, with the trajectories `stored`."""
    sides = [_side("base", pair.base)]
    if pair.target is not None:
        sides.append(_side("target", pair.target))
    sides.append(_side("reference", pair.reference))

    thresholds = zip(items, pair.thresholds, strict=False) if pair.thresholds is not None else ()
    return PairView(
        pair=pair,
        items=tuple(items),
        sides=tuple(sides),
        mask=None if pair.mask is None else image_path(pair.mask),
        can_be_judged=pair.adopted is not None,
        margin=_margins(pair),
        mask_cover=pair.statistics.get("mask_cover"),
        statistics=tuple(_statistics(pair.statistics)),
        thresholds=tuple(thresholds),
        own=next((verdict for verdict in pair.verdicts if verdict.reviewer == reviewer), None),
        stored=stored,
    )


def image_path(artifact: str) -> str:
    """The path of an image for a page, from the path of its artifact."""
    return f"/images/{artifact.rpartition('/')[2]}"


def _side(role: str, side: SideOut) -> Side:
    return Side(role, side.id, side.seed, side.score, image_path(side.image))


def _margins(pair: PairOut) -> dict[str, float | None]:
    """The scores of target and reference minus that of the base."""
    base = pair.base.score
    sides = {"target": pair.target, "reference": pair.reference}
    return {
        name: None if side is None or side.score is None or base is None else side.score - base
        for name, side in sides.items()
    }


def _statistics(by_name: Mapping[str, Any]) -> Iterator[StatisticRow]:
    for name, (label, unit) in _STATISTICS.items():
        by_place = by_name.get(name)
        if isinstance(by_place, Mapping):
            values = [by_place.get(comparison, {}).get(region) for comparison in _COMPARISONS for region in _REGIONS]
            yield StatisticRow(label, unit, tuple(values))
