"""Estimates of a job's cost."""

from __future__ import annotations

from pydantic import BaseModel


class ImageCounts(BaseModel):
    """Number of images that a job creates."""

    sampled: int
    fused_at_most: int
    evaluated: int
    total_at_most: int


class UnetCounts(BaseModel):
    """Number of U-Net evaluations, in rows; guidance needs two rows per image and step."""

    sampling: int
    fusion_at_most: int
    training_at_most: int
    evaluation: int
    total_at_most: int


class EstimateOut(BaseModel):
    """The estimated cost of a job that was not created.

    `seconds` (on one worker), `memory_bytes` (GPU memory, or main memory without a GPU) and `storage_bytes` are derived
    from earlier jobs of this installation. They are null if there are none.
    """

    dry_run: bool
    images: ImageCounts
    unet_evaluations: UnetCounts
    seconds: float | None
    memory_bytes: int | None
    storage_bytes: int | None
