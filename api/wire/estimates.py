"""What a job would take."""

from __future__ import annotations

from pydantic import BaseModel


class ImageCounts(BaseModel):
    """Images that a job makes."""

    sampled: int
    fused_at_most: int
    evaluated: int
    total_at_most: int


class UnetCounts(BaseModel):
    """Rows that go through the U-Net; guidance takes two for one image and step."""

    sampling: int
    fusion_at_most: int
    training_at_most: int
    evaluation: int
    total_at_most: int


class EstimateOut(BaseModel):
    """What a job would take; nothing was made. `seconds` (on one worker), `memory_bytes` (of its GPU, or of the machine
    where it has none) and `storage_bytes` are judged by this installation's own past jobs, null where there are none.
    """

    dry_run: bool
    images: ImageCounts
    unet_evaluations: UnetCounts
    seconds: float | None
    memory_bytes: int | None
    storage_bytes: int | None
