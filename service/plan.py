"""The plan of a job as data: its stages, the sizes of what its spec names, and its total work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dfusion.config import SamplingConfig
from service.states import StageKind


@dataclass(frozen=True)
class PromptsToMeasure:
    """A prompt set that an evaluation measures models on.

    Attributes:
        split: The name of the split in the metrics.
        set_id: The id of the prompt set.
        prompts: The number of its prompts.
    """

    split: str
    set_id: str
    prompts: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of what a spec names, which determine the plan.

    Attributes:
        shard_prompts: Prompts of one sampling or fusion stage.
        prompts: Prompts that are sampled or fused.
        samples_per_prompt: Samples per prompt of the sampling job that a fusion pairs.
        pairs: Pairs that the spec names, or that its jobs have.
        sampling: How the samples of these pairs were drawn.
        models: Ids of the models that an evaluation measures.
        measured: The prompt sets that an evaluation measures them on.
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
        """Prompts of all measured sets together."""
        return sum(prompt_set.prompts for prompt_set in self.measured)


@dataclass(frozen=True)
class PlannedStage:
    """A stage to insert. `needs` are indices of its dependencies in the same plan."""

    kind: StageKind
    round: int
    work: float
    shard: int = 0
    params: dict[str, Any] = field(default_factory=dict)
    needs: tuple[int, ...] = ()


@dataclass(frozen=True)
class StageTotals:
    """The stages of one kind, over all rounds of a job.

    Attributes:
        count: Their number.
        work: Their work, in U-Net evaluations.
    """

    count: int
    work: float


Totals = Mapping[StageKind, StageTotals]


@dataclass(frozen=True)
class WorkCounts:
    """Images and U-Net evaluations of a job.

    One row through the U-Net is one evaluation; guidance needs two. Fused targets and training rows are upper bounds,
    since a pair needs two samples with different scores.
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
        """Images that the job makes, at most."""
        return self.sampled + self.fused_at_most + self.evaluated

    @property
    def unet_evaluations(self) -> int:
        """U-Net evaluations of the whole job, at most."""
        return self.sampling + self.fusion_at_most + self.training_at_most + self.evaluation
