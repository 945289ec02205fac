"""Samples as the pages show them."""

from __future__ import annotations

from dataclasses import dataclass

from api.pages.pair_views import image_path
from api.wire.samples import SampleOut, ScoreOut


@dataclass(frozen=True)
class SampleCard:
    """A sample in a grid."""

    sample: SampleOut
    image: str
    score: ScoreOut | None


def sample_card(sample: SampleOut) -> SampleCard:
    """Convert a sample. Its first score is shown."""
    return SampleCard(sample, image_path(sample.image), sample.scores[0] if sample.scores else None)
