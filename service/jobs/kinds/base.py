"""What a kind of job consists of, and the parts of requests that several kinds share.

The modules of this package import no tables: clients build requests from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import Field, StringConstraints, model_validator

from dfusion.config import PRESETS, SamplingConfig, StrictModel, TrainingConfig
from dfusion.prompts import Prompt
from dfusion.rewards.config import WeightedScorerConfig
from service.plan import PlannedStage, Sizes, WorkCounts
from service.states import JobKind

if TYPE_CHECKING:
    from service.db.tables import Model, PromptSet
    from service.jobs.checking import Checker

Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Seed = Annotated[int, Field(ge=0, lt=1 << 53)]
ScorerRef = Name | WeightedScorerConfig
"""A scorer that the installation has, by name, or a weighted sum of such."""
ScorerRefs = Annotated[tuple[ScorerRef, ...], Field(min_length=1, max_length=16)]
_PRESET_PARTS = frozenset({"fusion", "pairing", "training"})
_ONE_OF = "expected exactly one of {}, got {}"

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


class PresetSpec(StrictModel):
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
            if isinstance(own, StrictModel):
                own = own.model_dump(exclude_unset=True)
            if isinstance(own, Mapping):
                filled[name] = {**preset.settings_of(name, own.get("algorithm", TrainingConfig().algorithm)), **own}
        return filled


def require_one(spec: StrictModel, *names: str) -> None:
    """Exactly one of these fields must be given. Raises ValueError."""
    given = [name for name in names if getattr(spec, name) is not None]
    if len(given) != 1:
        raise ValueError(_ONE_OF.format(", ".join(names), ", ".join(given) or "none"))


S = TypeVar("S", bound=Labelled)


@dataclass(frozen=True)
class Checked(Generic[S]):
    """A spec with its defaults filled in, and what it names.

    new_set  the prompts that came with the request, as a set that is not in the database yet
    """

    spec: S
    sizes: Sizes
    model: Model | None = None
    prompt_set: PromptSet | None = None
    held_out_set: PromptSet | None = None
    new_set: PromptSet | None = None


def _no_rounds(_spec: Any) -> int:
    return 0


def _no_round(_spec: Any, _round_number: int, _sizes: Sizes) -> list[PlannedStage]:
    return []


def _nothing_more(_params: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Kind(Generic[S]):
    """A kind of job, in all that the service does with jobs.

    Attributes:
        name: As in the database and the API.
        path: Where it is asked for, by POST.
        operation: The name of that operation in the OpenAPI document.
        description: What the operation does, for that document.
        spec: What a request may hold.
        check: Compares a spec with what there is. Reports problems to the checker; None where they prevent a result.
        count: Images and U-Net evaluations of the whole job.
        plan: The first stages: all of them, but for a job of rounds only those up to the end of the first round.
        examples: Requests for the OpenAPI document, by name.
        rounds: How many rounds a job has; 0 where it has none.
        plan_round: The stages of one round, counted from 1.
        resolved: Further fields of the spec with ids for names, from the params of the job's stages.
    """

    name: JobKind
    path: str
    operation: str
    description: str
    spec: type[S]
    check: Callable[[Checker, S], Checked[S] | None]
    count: Callable[[S, Sizes], WorkCounts]
    plan: Callable[[S, Sizes], list[PlannedStage]]
    examples: Mapping[str, Example]
    rounds: Callable[[S], int] = _no_rounds
    plan_round: Callable[[S, int, Sizes], list[PlannedStage]] = _no_round
    resolved: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]] = _nothing_more
