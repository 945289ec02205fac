"""What an experiment is: arms (settings) x prompt lists x seeds, and how the resulting models are measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from api.experiments.errors import FormatError
from api.experiments.yaml_file import read_yaml
from api.wire.common import FieldError
from dfusion.config import SamplingConfig, StrictModel
from dfusion.prompts import Prompt
from service.jobs.kinds import EvaluationJobSpec, Name, RoundSpec, ScorerRefs, Seed

Slug = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]+([_.-][A-Za-z0-9]+)*$", max_length=64)]
"""A name that is part of a record's file name; `--` separates such names."""
Split = Literal["held_out", "train"]
SPLIT_NAMES: Mapping[str, str] = MappingProxyType({"held_out": "held-out prompts", "train": "training prompts"})
BASE = "base"
"""The name of the arm that trains nothing."""
_MOST_MODELS = 16
"""Models that one evaluation measures."""
_OF_THE_EXPERIMENT = {
    "model": "model",
    "prompt_set": "prompt_lists",
    "prompts": "prompt_lists",
    "held_out_prompt_set": "prompt_lists",
    "seed": "seeds",
    "label": "name",
}
"""Settings of a round that the experiment makes itself, and from which of its fields."""


class PromptListSpec(StrictModel):
    """Prompts to train on and prompts that are only measured: names of prompt sets, or the prompts themselves."""

    train: Name | tuple[Prompt, ...]
    held_out: Name | tuple[Prompt, ...] | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _texts_are_prompts(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [{"text": prompt} if isinstance(prompt, str) else prompt for prompt in value]

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if not self.train or self.held_out == ():
            raise ValueError("expected at least one prompt")
        if self.train == self.held_out:
            raise ValueError("expected other prompts to hold out than to train on, got the same")
        return self

    def prompts(self, split: Split) -> Name | tuple[Prompt, ...] | None:
        return self.train if split == "train" else self.held_out


class MeasureSpec(StrictModel):
    """How a model is measured: the same for all models of an experiment."""

    samples_per_prompt: int = Field(8, ge=1, le=256)
    scorers: ScorerRefs | None = Field(None, description="The model's usual scorers if not given")
    seed: Seed = 0
    sampling: SamplingConfig = SamplingConfig()


class EvaluationPlan(StrictModel):
    """Which models are measured, and on what. `sampling` is that of `common` if not given."""

    samples_per_prompt: int = Field(8, ge=1, le=256)
    scorers: ScorerRefs | None = Field(None, description="The model's usual scorers if not given")
    seed: Seed = 0
    sampling: SamplingConfig | None = None
    splits: tuple[Split, ...] = Field(("held_out", "train"), min_length=1)
    rounds: Literal["all", "last"] | tuple[int, ...] = Field("all", description="After which rounds")
    include_base: bool = Field(True, description="Whether the model before training is measured, once for each list")
    primary: Name | None = Field(None, description="The scorer that the report leads with; the first if not given")


class CellSettings(StrictModel):
    """Everything that decides what a cell finds. Cells of equal settings find the same.

    revision  of the experiment
    model     measured without training where `round` is null
    round     the training, without its label
    rounds    after which of its rounds the model is measured
    splits    the prompt set that each split is measured on
    """

    revision: int = 0
    model: Name
    round: RoundSpec | None
    rounds: tuple[int, ...]
    splits: dict[Split, Name]
    measure: MeasureSpec

    @property
    def key(self) -> str:
        """SHA-256 of the settings."""
        return digest(self.model_dump(mode="json"))


class Experiment(StrictModel):
    """A matrix of trainings and their measurement.

    common   settings of a round (the body of POST /rounds) that all arms share
    arms     settings that an arm has instead: objects are merged, anything else, null too, replaces
    """

    name: Slug
    description: str = ""
    revision: int = Field(0, ge=0, description="Raise it to run every cell again, as after a change of the code")
    model: Name = "shapes"
    common: dict[str, Any] = Field(default_factory=dict)
    prompt_lists: dict[Slug, PromptListSpec] = Field(min_length=1)
    seeds: tuple[Seed, ...] = Field(min_length=1)
    arms: dict[Slug, dict[str, Any]] = Field(min_length=1)
    evaluation: EvaluationPlan = EvaluationPlan()

    @field_validator("arms", mode="before")
    @classmethod
    def _an_arm_may_change_nothing(cls, arms: Any) -> Any:
        if not isinstance(arms, Mapping):
            return arms
        return {name: {} if settings is None else settings for name, settings in arms.items()}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if BASE in self.arms:
            raise ValueError(f"arms: {BASE!r} is the name of the model before training; choose another")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected each once, got {list(self.seeds)}")
        problems = [*self._reserved(), *self._unmeasurable(), *self._invalid_rounds()]
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        for arm in self.arms:
            equal = [other for other in self.arms if other < arm and self.training(other) == self.training(arm)]
            if equal:
                raise ValueError(f"arms: {equal[0]} and {arm} have the same settings")
        return self

    def training(self, arm: str) -> RoundSpec:
        """An arm's settings, all of them; prompt set and seed are not yet those of a cell."""
        settings = merge(self.common, self.arms[arm])
        settings.setdefault("evaluation", None)
        return RoundSpec.model_validate({**settings, "model": self.model, "prompt_set": "-"})

    def _reserved(self) -> Iterator[str]:
        for place, settings in (("common", self.common), *((f"arms.{arm}", own) for arm, own in self.arms.items())):
            for name in settings:
                if name in _OF_THE_EXPERIMENT:
                    yield f"{place}.{name}: use the experiment's `{_OF_THE_EXPERIMENT[name]}`"

    def _unmeasurable(self) -> Iterator[str]:
        if "held_out" in self.evaluation.splits:
            for name, prompts in self.prompt_lists.items():
                if prompts.held_out is None:
                    yield f"prompt_lists.{name}.held_out: missing, but evaluation.splits names it"
        if isinstance(self.evaluation.rounds, tuple):
            rounds = self.evaluation.rounds
            if not rounds or sorted(set(rounds)) != list(rounds) or rounds[0] < 1:
                yield f"evaluation.rounds: expected increasing numbers from 1, got {list(rounds)}"

    def _invalid_rounds(self) -> Iterator[str]:
        for arm, own in self.arms.items():
            try:
                training = self.training(arm)
            except ValidationError as error:
                for path, message in _messages(error):
                    yield f"{'.'.join((_origin(path, arm, own), *path))}: {message}"
                continue
            yield from self._unmeasurable_rounds(arm, training)

    def _unmeasurable_rounds(self, arm: str, training: RoundSpec) -> Iterator[str]:
        wanted = self.evaluation.rounds
        if isinstance(wanted, tuple) and wanted and wanted[-1] > training.rounds:
            yield f"evaluation.rounds: {arm} has {training.rounds} rounds, got {wanted[-1]}"
        if len(self._measured(training)) > _MOST_MODELS:
            yield f"evaluation.rounds: expected at most {_MOST_MODELS} for {arm}, got {training.rounds}; name some"

    def _measured(self, training: RoundSpec) -> tuple[int, ...]:
        match self.evaluation.rounds:
            case "all":
                return tuple(range(1, training.rounds + 1))
            case "last":
                return (training.rounds,)
            case rounds:
                return rounds

    def settings(self, list_name: str, arm: str, seed: int | None) -> CellSettings:
        """The settings of a cell; `seed` None with the arm `BASE`."""
        prompts, plan = self.prompt_lists[list_name], self.evaluation
        sampling = plan.sampling or SamplingConfig.model_validate(self.common.get("sampling", {}))
        measure = MeasureSpec(
            samples_per_prompt=plan.samples_per_prompt, scorers=plan.scorers, seed=plan.seed, sampling=sampling
        )
        splits = {split: set_name(prompts.prompts(split) or ()) for split in plan.splits}
        if arm == BASE:
            return CellSettings(
                revision=self.revision, model=self.model, round=None, rounds=(0,), splits=splits, measure=measure
            )

        training = self.training(arm)
        own: dict[str, Any] = {"prompt_set": set_name(prompts.train), "seed": seed}
        if training.evaluation is not None and prompts.held_out is not None:
            own["held_out_prompt_set"] = set_name(prompts.held_out)
        training = training.model_copy(update=own)
        return CellSettings(
            revision=self.revision,
            model=self.model,
            round=training,
            rounds=self._measured(training),
            splits=splits,
            measure=measure,
        )

    @classmethod
    def load(cls, file: str | Path) -> Experiment:
        """The experiment that a YAML (or JSON) file describes.

        Raises FormatError naming every wrong field, OSError.
        """
        return cls.parse(read_yaml(Path(file)), str(file))

    @classmethod
    def parse(cls, content: Any, name: str = "experiment") -> Experiment:
        """The experiment that an object describes. Raises FormatError, which calls it `name`."""
        if not isinstance(content, Mapping):
            raise FormatError(f"{name}: expected an object with name, prompt_lists, seeds and arms")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            fields = [field for path, message in _messages(error) for field in _fields(path, message)]
            detail = "; ".join(": ".join(filter(None, (field.pointer, field.message))) for field in fields)
            raise FormatError(f"{name}: {detail}", fields) from error


def merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `changes`: objects are merged, anything else replaces."""
    merged = dict(settings)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def set_name(prompts: Name | Sequence[Prompt]) -> str:
    """The name of the prompt set; prompts that are given themselves have one that follows from them."""
    if isinstance(prompts, str):
        return prompts
    return f"prompts-{digest([prompt.model_dump(mode='json') for prompt in prompts])[:16]}"


def digest(content: Any) -> str:
    """SHA-256 of canonical JSON: keys in order, no space."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def evaluation_body(settings: CellSettings, models: Iterable[str]) -> dict[str, Any]:
    """The body of POST /evaluations that measures these models, the first to compare with."""
    measure = settings.measure.model_dump(mode="json")
    sets = list(dict.fromkeys(settings.splits.values()))
    return EvaluationJobSpec.model_validate({**measure, "models": list(models), "prompt_sets": sets}).model_dump(
        mode="json"
    )


def _messages(error: ValidationError) -> Iterator[tuple[tuple[str, ...], str]]:
    for problem in error.errors(include_url=False, include_context=False):
        yield tuple(map(str, problem["loc"])), str(problem["msg"]).removeprefix("Value error, ")


def _fields(path: tuple[str, ...], message: str) -> Iterator[FieldError]:
    """A message of several lines, `field: what is wrong`, as an error for each; others as they are."""
    if path:
        yield FieldError(pointer=".".join(path), message=message)
        return
    for line in message.split("\n"):
        pointer, colon, rest = line.partition(": ")
        yield FieldError(pointer=pointer if colon else "", message=rest if colon else line)


def _origin(path: tuple[str, ...], arm: str, settings: Mapping[str, Any]) -> str:
    """Where a wrong setting was written: in the arm, or in what all arms share."""
    inner: Any = settings
    for name in path:
        if not isinstance(inner, Mapping) or name not in inner:
            return "common"
        inner = inner[name]
    return f"arms.{arm}"
