"""Estimates of a job's cost."""

from __future__ import annotations

from pydantic import BaseModel

from api.wire.prompt_sets import PromptWarning


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


class PromptItems(BaseModel):
    """A prompt and its items: given, marked or detected."""

    text: str
    items: list[str]


class EstimateOut(BaseModel):
    """The estimated cost of a job that was not created, and the prompts that it would sample.

    `seconds` (on one worker), `memory_bytes` (GPU memory, or main memory without a GPU) and `storage_bytes` are derived
    from earlier jobs of this installation. They are null if there are none. `prompts` has the first 100 prompts,
    `warnings` the first 100 warnings about the negative prompt and all prompts.
    """

    dry_run: bool
    images: ImageCounts
    unet_evaluations: UnetCounts
    seconds: float | None
    memory_bytes: int | None
    storage_bytes: int | None
    prompts: list[PromptItems]
    warnings: list[PromptWarning]
