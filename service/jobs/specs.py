"""What a client may ask for, by kind of job. The method's own settings are dfusion.config's, checked there alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from dfusion.config import PRESETS, FusionConfig, PairingConfig, SamplingConfig, Settings, TrainingConfig
from dfusion.prompts import Prompt, Threshold
from dfusion.rewards.config import WeightedScorerConfig
from service.states import JobKind

Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Seed = Annotated[int, Field(ge=0, lt=1 << 53)]
ScorerRef = Name | WeightedScorerConfig
"""A scorer that the installation has, by name, or a weighted sum of such."""
ScorerRefs = Annotated[tuple[ScorerRef, ...], Field(min_length=1, max_length=16)]
_PRESET_PARTS = frozenset({"fusion", "pairing", "training"})
_ONE_OF = "expected exactly one of {}, got {}"


class Labelled(Settings):
    """Base of all requests for a job."""

    label: str | None = Field(None, max_length=200, description="Free text")


def _require_one(spec: Settings, *names: str) -> None:
    given = [name for name in names if getattr(spec, name) is not None]
    if len(given) != 1:
        raise ValueError(_ONE_OF.format(", ".join(names), ", ".join(given) or "none"))


class SamplesSpec(Labelled):
    """Samples of a model on prompts."""

    model: Name = Field("shapes", description="A base model's name, an alias, or the id of a model to go on from")
    prompt_set: Name | None = Field(None, description="Name or id of a prompt set; or give `prompts`")
    prompts: tuple[Prompt, ...] | None = Field(None, min_length=1, max_length=10_000)
    seed: Seed = 0
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _one_prompt_set(self) -> Self:
        if (self.prompt_set is None) == (self.prompts is None):
            raise ValueError("expected either prompt_set or prompts")
        return self


class EvaluationSpec(Settings):
    """How the models of a round job are measured: the same prompts and seeds every round."""

    samples_per_prompt: int = Field(1, ge=1, le=256)
    scorers: ScorerRefs | None = Field(None, description="By whom; the model's usual scorers if not given")
    every_round: bool = Field(True, description="After every round; otherwise before the first and after the last")
    seed: Seed = 0


class PresetSpec(Settings):
    """A request whose `fusion`, `pairing` and `training` a preset may fill in, as far as it has them."""

    preset: Literal["paper", "released_code"] | None = Field(
        None, description="Fills in `fusion`, `pairing` and `training` where they do not say otherwise (decision 006)"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        wanted = given.get("preset") if isinstance(given, Mapping) else None
        preset = next((preset for name, preset in PRESETS.items() if name == wanted), None)
        if preset is None:
            return given
        filled = dict(given)
        for name in _PRESET_PARTS & cls.model_fields.keys():
            own = given.get(name, {})
            if isinstance(own, Settings):
                own = own.model_dump(exclude_unset=True)
            if isinstance(own, Mapping):
                filled[name] = {**preset.settings_of(name, own.get("algorithm", "dpo")), **own}
        return filled


class RoundSpec(SamplesSpec, PresetSpec):
    """Online training: rounds of sampling, scoring, pairing, fusing, verifying, training and measuring."""

    held_out_prompt_set: Name | None = Field(None, description="Measured on, never trained on")
    rounds: int = Field(1, ge=1, le=1000)
    samples_per_prompt: int = Field(16, ge=2, le=1024, description="A pair takes two")
    fusion: FusionConfig | None = Field(FusionConfig(), description="null: naive, without fused targets")
    pairing: PairingConfig = PairingConfig()
    training: TrainingConfig = TrainingConfig()
    reward: ScorerRef | None = Field(None, description="Trained against; the model's own if not given")
    watch: ScorerRef | None = Field(
        None, description="Scores the same samples and is never trained on; the model's own if not given"
    )
    evaluation: EvaluationSpec | None = Field(EvaluationSpec(), description="null: the models are not measured")
    review: bool = Field(False, description="Whether each round waits for people's verdicts before it trains")


class SamplingJobSpec(SamplesSpec):
    """Samples alone, with their trajectories and item maps, so that they can be fused later."""

    samples_per_prompt: int = Field(4, ge=1, le=1024)
    mask_source: Literal["first_up", "resolution"] = Field("first_up", description="As in a fusion (Eq. 4)")
    scorers: ScorerRefs | None = Field(None, description="By whom they are scored; the model's own if not given")


class SamplePair(Settings):
    """A reference and a base, samples of one prompt."""

    reference: Name
    base: Name


class FusionJobSpec(Labelled, PresetSpec):
    """Targets for pairs of stored samples: named ones, those of a pair again, or the best and worst of a sampling."""

    pair: Name | None = Field(None, description="A pair to be fused again, from its stored trajectories")
    pairs: tuple[SamplePair, ...] | None = Field(None, min_length=1, max_length=10_000)
    sampling: Name | None = Field(None, description="A job whose samples are paired by their scores")
    fusion: FusionConfig = FusionConfig()
    thresholds: tuple[Threshold, ...] | None = Field(
        None, min_length=1, max_length=64, description="One an item; those of the prompts if not given"
    )
    pairing: PairingConfig = PairingConfig()
    reward: ScorerRef | None = Field(None, description="Whose scores pair and adopt; the model's own if not given")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _require_one(self, "pair", "pairs", "sampling")
        return self


class TrainingJobSpec(Labelled, PresetSpec):
    """A training alone, on stored pairs."""

    pairs: tuple[Name, ...] | None = Field(None, min_length=1, max_length=10_000)
    jobs: tuple[Name, ...] | None = Field(None, min_length=1, max_length=100, description="All pairs of these jobs")
    model: Name | None = Field(None, description="What is trained on; the model that the pairs' bases are of if null")
    prefer: Literal["adoption", "verdicts"] = Field(
        "adoption",
        description="Which side of a pair is better: by Eq. 7, or as people said (pairs without are left out)",
    )
    training: TrainingConfig = TrainingConfig()
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _require_one(self, "pairs", "jobs")
        return self


class EvaluationJobSpec(Labelled):
    """Models on the same prompts and seeds, compared (section 4.5; table 1)."""

    models: tuple[Name, ...] = Field(min_length=1, max_length=16, description="The first is what others are held to")
    prompt_sets: tuple[Name, ...] | None = Field(
        None, min_length=1, max_length=8, description="Each is measured by itself: trained prompts, unseen ones"
    )
    prompts: tuple[Prompt, ...] | None = Field(
        None, min_length=1, max_length=10_000, description="Further prompts, measured as a list of their own"
    )
    samples_per_prompt: int = Field(4, ge=1, le=256)
    scorers: ScorerRefs | None = Field(None, description="By whom; the models' usual scorers if not given")
    seed: Seed = 0
    sampling: SamplingConfig = SamplingConfig()
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Of the bootstrap intervals")
    resamples: int = Field(10_000, ge=100, le=100_000)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.prompt_sets is None and self.prompts is None:
            raise ValueError("expected prompt_sets, prompts or both, got none")
        if len(set(self.models)) != len(self.models):
            raise ValueError(f"models: expected each once, got {list(self.models)}")
        return self


class ExportJobSpec(Labelled):
    """A model's adapter in a form that other programs read, or a job's pairs as a data set."""

    model: Name | None = Field(None, description="The id of a trained model, for diffusers, kohya and merged")
    job: Name | None = Field(None, description="A job with pairs, for parquet")
    format: Literal["diffusers", "kohya", "merged", "parquet"]
    prefer: Literal["adoption", "verdicts"] = Field(
        "adoption", description="parquet: which side of a pair is better, as for a training"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _require_one(self, "model", "job")
        if (self.format == "parquet") != (self.job is not None):
            raise ValueError("expected `job` with format parquet, and `model` with the others")
        return self


JobSpec = RoundSpec | SamplingJobSpec | FusionJobSpec | TrainingJobSpec | EvaluationJobSpec | ExportJobSpec

SPECS: Mapping[JobKind, type[JobSpec]] = MappingProxyType(
    {
        JobKind.ROUND: RoundSpec,
        JobKind.SAMPLING: SamplingJobSpec,
        JobKind.FUSION: FusionJobSpec,
        JobKind.TRAINING: TrainingJobSpec,
        JobKind.EVALUATION: EvaluationJobSpec,
        JobKind.EXPORT: ExportJobSpec,
    }
)


def spec_of(kind: str, stored: Mapping[str, Any]) -> JobSpec:
    """A job's stored spec, checked again."""
    return SPECS[JobKind(kind)].model_validate(stored)
