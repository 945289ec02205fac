"""A job's plan as data: the stages to be made, how much a spec means, and what a job takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dfusion.config import SamplingConfig
from service.states import StageKind


@dataclass(frozen=True)
class PromptsToMeasure:
    """A prompt set that models are measured on: what its metrics are called, its id and its number of prompts."""

    split: str
    set_id: str
    prompts: int


@dataclass(frozen=True)
class Sizes:
    """How much a spec means here.

    prompts        that are sampled or fused        samples_per_prompt  of the sampling that a fusion pairs
    pairs          named ones, or those there are   sampling            how the samples behind them were made
    models         ids of those measured            measured            on what
    shard_prompts  prompts of one sampling or fusion stage
    """

    shard_prompts: int
    prompts: int = 0
    samples_per_prompt: int = 0
    pairs: int = 0
    sampling: SamplingConfig = SamplingConfig()
    models: tuple[str, ...] = ()
    measured: tuple[PromptsToMeasure, ...] = ()

    @property
    def measured_prompts(self) -> int:
        return sum(one.prompts for one in self.measured)


@dataclass(frozen=True)
class PlannedStage:
    """A stage to be made; `needs` are places in the same plan."""

    kind: StageKind
    round: int
    work: float
    shard: int = 0
    params: dict[str, Any] = field(default_factory=dict)
    needs: tuple[int, ...] = ()


@dataclass(frozen=True)
class WorkCounts:
    """Images and U-Net evaluations (one row through the U-Net is one; guidance takes two) of a job.

    Fused targets and training rows are upper bounds: a pair needs two samples with different scores.
    """

    sampled: int = 0
    fused_at_most: int = 0
    evaluated: int = 0
    sampling: int = 0
    fusion_at_most: int = 0
    training_at_most: int = 0
    evaluation: int = 0

    @property
    def images(self) -> int:
        return self.sampled + self.fused_at_most + self.evaluated

    @property
    def unet_evaluations(self) -> int:
        return self.sampling + self.fusion_at_most + self.training_at_most + self.evaluation
