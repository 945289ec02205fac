"""The definition of a kind of job, and the parts of requests that several kinds share.

The modules of this package do not import the tables, so that clients can build requests from them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import Field, StringConstraints, model_validator

from dfusion.config import PRESETS, SamplingConfig, StrictModel, TrainingConfig
from dfusion.errors import FieldsError
from dfusion.prompts import Prompt
from dfusion.rewards.config import WeightedScorerConfig
from service.plan import PlannedStage, Sizes, Totals, WorkCounts
from service.states import JobKind

if TYPE_CHECKING:
    from service.db.tables import Model, PromptSet
    from service.jobs.checking import Checker

Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Seed = Annotated[int, Field(ge=0, lt=1 << 53)]
ScorerRef = Name | WeightedScorerConfig
"""A scorer of the installation by name, or a weighted sum of scorers."""
ScorerRefs = Annotated[tuple[ScorerRef, ...], Field(min_length=1, max_length=16)]
_PRESET_PARTS = frozenset({"fusion", "pairing", "training"})


EXAMPLE_JOB = "job_01m8a1pxvper1w4ygsyx0hjs4m"
EXAMPLE_BASE_MODEL = "mdl_01m8a1pxsnbr7kqk7524659k0z"
EXAMPLE_MODEL = "mdl_01m8a1pz2njcg4jgh3z6rby2e1"
EXAMPLE_PAIR = "pair_01m8a1pydrc1tp73rptyprcnvn"
EXAMPLE_REFERENCE = "smp_01m8a1py9r4yx4az4f5bkcgypm"
EXAMPLE_BASE = "smp_01m8a1py9p4nzzye7q46sc4w7e"
Example = dict[str, Any]


class Labelled(StrictModel):
    """Base of all requests for a job."""

    label: str | None = Field(None, max_length=200, description="Free text")
    priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="Jobs with a higher priority run before other jobs of the same API key. Keys share the workers "
        "fairly whatever the priorities of their jobs",
    )


class SamplesSpec(Labelled):
    """Base of requests that sample a model on prompts."""

    model: Name = Field("shapes", description="The name of a base model, an alias, or the id of a trained model")
    prompt_set: Name | None = Field(None, description="Name or id of a prompt set; alternative to `prompts`")
    prompts: tuple[Prompt, ...] | None = Field(None, min_length=1, max_length=10_000)
    seed: Seed = 0
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _one_prompt_set(self) -> Self:
        require_one(self, "prompt_set", "prompts")
        return self


class PresetSpec(StrictModel):
    """A request with a preset, which sets the defaults of its `fusion`, `pairing` and `training`."""

    preset: Literal["paper", "released_code"] | None = Field(
        None,
        description="Defaults of `fusion`, `pairing` and `training`; explicit values take precedence (decision 006)",
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, request: Any) -> Any:
        preset_name = request.get("preset") if isinstance(request, Mapping) else None
        preset = next((preset for name, preset in PRESETS.items() if name == preset_name), None)
        if preset is None:
            return request

        filled = dict(request)
        for name in _PRESET_PARTS & cls.model_fields.keys():
            explicit = request.get(name, {})
            if isinstance(explicit, StrictModel):
                explicit = explicit.model_dump(exclude_unset=True)
            if isinstance(explicit, Mapping):
                algorithm = explicit.get("algorithm", TrainingConfig().algorithm)
                filled[name] = {**preset.settings_of(name, algorithm), **explicit}
        return filled


def require_one(spec: StrictModel, *names: str) -> None:
    """Check that the request sets exactly one of these fields. Raises FieldsError."""
    present = [name for name in names if getattr(spec, name) is not None]
    if len(present) != 1:
        message = f"expected exactly one of {', '.join(names)}, got {', '.join(present) or 'none'}"
        raise FieldsError(message, *(present or names))


S = TypeVar("S", bound=Labelled)


@dataclass(frozen=True)
class Checked(Generic[S]):
    """A checked spec and the rows that it names.

    Attributes:
        spec: The spec with its defaults filled in.
        sizes: The sizes of what it names.
        model: The model that the job starts from; the first one of an evaluation.
        prompt_set: The prompt set to sample.
        held_out_set: The held-out prompt set.
        new_set: The prompts of the request as a prompt set that is not in the database yet.
    """

    spec: S
    sizes: Sizes
    model: Model | None = None
    prompt_set: PromptSet | None = None
    held_out_set: PromptSet | None = None
    new_set: PromptSet | None = None

    @property
    def prompt_set_ids(self) -> set[str]:
        """The prompt sets that the job uses."""
        sets = [row for row in (self.prompt_set, self.held_out_set, self.new_set) if row is not None]
        return {row.id for row in sets} | {measured.set_id for measured in self.sizes.measured}


@dataclass(frozen=True)
class TrajectoriesRead:
    """The stored trajectories that a job may read, named by its request.

    Attributes:
        samples: Ids of samples.
        pairs: Ids of pairs, whose three samples are read.
        jobs: Ids of earlier jobs: their samples, and whatever those jobs may read.
    """

    samples: Collection[str] = ()
    pairs: Collection[str] = ()
    jobs: Collection[str] = ()


def _no_rounds(_spec: Any) -> int:
    return 0


def _no_round(_spec: Any, _round_number: int, _sizes: Sizes) -> list[PlannedStage]:
    return []


@dataclass(frozen=True)
class Kind(Generic[S]):
    """The definition of a kind of job.

    Attributes:
        name: The name in the database and the API.
        path: The path of the POST request that creates a job.
        operation: The id of this operation in the OpenAPI document.
        description: The description of this operation in the OpenAPI document.
        spec: The model of the request.
        check: Checks a spec against the installation. Reports problems to the checker; None if they prevent a result.
        count: Images and U-Net evaluations of the whole job.
        totals: The stages of all rounds by kind, without planning them: a job can have millions.
        plan: The first stages: all stages, or for a round job those until the end of the first round.
        examples: Example requests for the OpenAPI document, by name.
        rounds: The number of rounds; 0 for kinds without rounds.
        plan_round: The stages of one round, counted from 1.
        resolved: Further fields of the spec with ids instead of names, from the params of the job's stages. None if the
            job's row has all ids.
        reads: The stored trajectories of other jobs that the job may read. None for kinds that read none.
    """

    name: JobKind
    path: str
    operation: str
    description: str
    spec: type[S]
    check: Callable[[Checker, S], Checked[S] | None]
    count: Callable[[S, Sizes], WorkCounts]
    totals: Callable[[S, Sizes], Totals]
    plan: Callable[[S, Sizes], list[PlannedStage]]
    examples: Mapping[str, Example]
    rounds: Callable[[S], int] = _no_rounds
    plan_round: Callable[[S, int, Sizes], list[PlannedStage]] = _no_round
    resolved: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]] | None = None
    reads: Callable[[S], TrajectoriesRead] | None = None
