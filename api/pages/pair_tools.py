"""What a reviewer can look into on the page of a pair: its denoising steps."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.db.queries import previews
from service.db.tables import Pair
from service.jobs.previews import masks_of, newest


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
    """The previews of a pair, with the masks of its own thresholds. None if one of its samples has none."""
    sides = {"base": row.base_id}
    if row.target_id is not None:
        sides["target"] = row.target_id
    sides["reference"] = row.reference_id
    masks = masks_of(session, [row])
    existing = previews.of_samples(session, sides.values())
    by_role = {role: newest(existing[sample_id], masks.get(sample_id)) for role, sample_id in sides.items()}

    found = {role: preview for role, preview in by_role.items() if preview is not None}
    if len(found) < len(sides):
        return None
    reference = found["reference"]
    strips = [Strip(role, f"/images/{preview.strip_artifact_id}") for role, preview in found.items()]
    mask_id = reference.mask_artifact_id if masks else None
    mask = None if mask_id is None else f"/images/{mask_id}"
    return Denoising(reference.num_steps, tuple(reference.steps), tuple(strips), mask)
