"""What a reviewer can look into on the page of a pair: its denoising steps, and other settings of its fusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from api.pages.pair_views import PairView, StatisticRow
from api.pages.reproduction import Reproduction
from api.pages.run_form import fields, text_in, text_of
from dfusion.config import FusionConfig
from service.db.queries import previews
from service.db.tables import Pair
from service.jobs.previews import masks_of, newest

_FIXED = frozenset({"fusion.mask_source"})
"""Settings of a fusion that the stored samples fix."""


@dataclass(frozen=True)
class Strip:
    """The denoising steps of a side of a pair as one image."""

    role: str
    image: str


@dataclass(frozen=True)
class Denoising:
    """The previews of a pair.

    Attributes:
        num_steps: The number of steps of its samples.
        steps: The states that the tiles of each strip show.
        strips: The strip of each side.
        mask: The masks of the reference by item and step; None for a pair without masks.
    """

    num_steps: int
    steps: tuple[int, ...]
    strips: tuple[Strip, ...]
    mask: str | None


def denoising_of(session: Session, row: Pair) -> Denoising | None:
    """The previews of a pair, with masks from the thresholds of the pair. None if one of its samples has none."""
    sides = {"base": row.base_id}
    if row.target_id is not None:
        sides["target"] = row.target_id
    sides["reference"] = row.reference_id
    masks = masks_of(session, [row])
    existing = previews.of_samples(session, sides.values())
    by_role = {role: newest(existing[sample_id], masks.get(sample_id)) for role, sample_id in sides.items()}

    complete = {role: preview for role, preview in by_role.items() if preview is not None}
    if len(complete) < len(sides):
        return None
    reference = complete["reference"]
    strips = [Strip(role, f"/images/{preview.strip_artifact_id}") for role, preview in complete.items()]
    mask_id = reference.mask_artifact_id if masks else None
    mask = None if mask_id is None else f"/images/{mask_id}"
    return Denoising(reference.num_steps, tuple(reference.steps), tuple(strips), mask)


@dataclass(frozen=True)
class FusionField:
    """A field of the form that fuses a pair again.

    Attributes:
        pointer: The JSON pointer of the value in the request.
        label: Its name.
        note: What it means.
        value: The value of the pair, as text.
        options: The values to choose from, and how they are shown; empty for a text.
        is_optional: Whether it may be null, which an empty field means.
    """

    pointer: str
    label: str
    note: str
    value: str
    options: Sequence[tuple[str, str]] = ()
    is_optional: bool = False


def fusion_fields(again: Reproduction | None, items: Sequence[str]) -> list[FusionField]:
    """The fields of a request that fuses a pair again: a threshold for each item, and the settings of the fusion."""
    if again is None:
        return []

    fusion_fields = []
    for n, threshold in enumerate(again.body.get("thresholds") or ()):
        label = f"Threshold of {items[n]}" if n < len(items) else f"Threshold {n + 1}"
        note = "The attention from which a pixel is in the mask (Eq. 4)"
        fusion_fields.append(FusionField(f"/thresholds/{n}", label, note, text_of(threshold)))

    request = {"fusion": _fusion_of(again.body)}
    for field in fields().values():
        if field.part == "fusion" and field.name not in _FIXED:
            pointer = "/" + field.name.replace(".", "/")
            value = text_in(field, request)
            fusion_fields.append(FusionField(pointer, field.label, field.note, value, field.options, field.is_optional))
    return fusion_fields


@dataclass(frozen=True)
class Difference:
    """A setting with other values in two fusions."""

    name: str
    before: str
    after: str


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], thresholds: tuple[Sequence[float], Sequence[float]]
) -> Iterator[Difference]:
    """The settings that differ between two fusions: those of their requests, and their thresholds."""
    old = _fusion_of(before)
    new = _fusion_of(after)
    values = {name: (old[name], new[name]) for name in old}
    values["thresholds"] = (list(thresholds[0]), list(thresholds[1]))
    for name, (first, second) in values.items():
        if first != second:
            yield Difference(name.replace("_", " "), _shown(first), _shown(second))


def _shown(value: Any) -> str:
    """A setting as it is compared: numbers with four digits, "none" for null."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else text_of(value) or "none"


def _fusion_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the fusion of a request, with defaults."""
    return FusionConfig.model_validate(spec.get("fusion") or {}).model_dump(mode="json")


@dataclass(frozen=True)
class Measure:
    """A number of two pairs."""

    name: str
    unit: str
    before: float | None
    after: float | None


def measures(before: PairView, after: PairView) -> Iterator[Measure]:
    """The score, the mask and the consistency of two targets of the same base."""
    yield Measure("Score of the target", before.pair.scorer, _score(before), _score(after))
    yield Measure("Mask covers", "share", before.mask_cover, after.mask_cover)
    for first, second in zip(before.statistics, after.statistics, strict=False):
        yield Measure(f"{first.name} to base", "inside the mask", _inside(first), _inside(second))
        yield Measure(f"{first.name} to base", "outside the mask", _outside(first), _outside(second))


def _score(view: PairView) -> float | None:
    return None if view.pair.target is None else view.pair.target.score


def _inside(row: StatisticRow) -> float | None:
    return row.values[0]


def _outside(row: StatisticRow) -> float | None:
    return row.values[1]
