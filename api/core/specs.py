"""What a client may ask for. The method's own settings are dfusion.config's, checked there and nowhere else."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from dfusion.config import FusionConfig, PairingConfig, SamplingConfig, Settings, TrainingConfig
from dfusion.prompts import Prompt

Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Seed = Annotated[int, Field(ge=0, lt=1 << 53)]


class EvaluationSpec(Settings):
    """How the models of a job are measured: the same prompts and seeds every round."""

    samples_per_prompt: int = Field(1, ge=1, le=256)
    scorers: tuple[Name, ...] | None = Field(
        None, min_length=1, max_length=16, description="By whom; the model's usual scorers if not given"
    )
    every_round: bool = Field(True, description="After every round; otherwise before the first and after the last")
    seed: Seed = 0


class RoundSpec(Settings):
    """Online training: rounds of sampling, scoring, pairing, fusing, verifying, training and measuring."""

    model: Name = Field("shapes", description="A base model's name, or the id of a model to go on from")
    prompt_set: Name | None = Field(None, description="Name or id of a prompt set; or give `prompts`")
    prompts: tuple[Prompt, ...] | None = Field(None, min_length=1, max_length=10_000)
    held_out_prompt_set: Name | None = Field(None, description="Measured on, never trained on")
    rounds: int = Field(1, ge=1, le=1000)
    samples_per_prompt: int = Field(16, ge=2, le=1024, description="A pair takes two")
    seed: Seed = 0
    sampling: SamplingConfig = SamplingConfig()
    fusion: FusionConfig | None = Field(FusionConfig(), description="null: naive DPO, the reference is preferred")
    pairing: PairingConfig = PairingConfig()
    training: TrainingConfig = TrainingConfig()
    reward: Name | None = Field(None, description="The scorer that is trained against; the model's own if not given")
    evaluation: EvaluationSpec | None = Field(EvaluationSpec(), description="null: the models are not measured")
    label: str | None = Field(None, max_length=200, description="Free text")

    @model_validator(mode="after")
    def _one_prompt_set(self) -> Self:
        if (self.prompt_set is None) == (self.prompts is None):
            raise ValueError("expected either prompt_set or prompts")
        return self

    @model_validator(mode="after")
    def _some_fused_step(self) -> Self:
        if self.fusion is not None and self.fusion.first_step >= self.sampling.num_steps:
            raise ValueError(
                f"fusion.first_step must be less than sampling.num_steps ({self.sampling.num_steps}), "
                f"got {self.fusion.first_step}"
            )
        return self
