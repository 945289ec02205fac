"""The format of an experiment: arms (settings) x prompt lists x seeds, and the evaluation of the models."""

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
_MAX_MODELS = 16
"""Models that one evaluation can measure."""
_RESERVED_SETTINGS = {
    "model": "model",
    "prompt_set": "prompt_lists",
    "prompts": "prompt_lists",
    "held_out_prompt_set": "prompt_lists",
    "seed": "seeds",
    "label": "name",
}
"""Settings of a round that the experiment sets, with the field that they come from."""


class PromptListSpec(StrictModel):
    """Training and held-out prompts: names of prompt sets, or the prompts."""

    train: Name | tuple[Prompt, ...]
    held_out: Name | tuple[Prompt, ...] | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _convert_texts(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [{"text": prompt} if isinstance(prompt, str) else prompt for prompt in value]

    @model_validator(mode="after")
    def _require_different_prompts(self) -> Self:
        if not self.train or self.held_out == ():
            raise ValueError("expected at least one prompt")
        if self.train == self.held_out:
            raise ValueError("expected held-out prompts that differ from the training prompts, got the same")
        return self

    def prompts(self, split: Split) -> Name | tuple[Prompt, ...] | None:
        """Return the prompts of a split."""
        return self.train if split == "train" else self.held_out


class MeasureSpec(StrictModel):
    """Settings of the evaluation, equal for all models of an experiment."""

    samples_per_prompt: int = Field(8, ge=1, le=256)
    scorers: ScorerRefs | None = Field(None, description="The model's usual scorers if not given")
    seed: Seed = 0
    sampling: SamplingConfig = SamplingConfig()


class EvaluationPlan(StrictModel):
    """Which models are evaluated, and on which prompts. `sampling` defaults to that of `common`."""

    samples_per_prompt: int = Field(8, ge=1, le=256)
    scorers: ScorerRefs | None = Field(None, description="The model's usual scorers if not given")
    seed: Seed = 0
    sampling: SamplingConfig | None = None
    splits: tuple[Split, ...] = Field(("held_out", "train"), min_length=1)
    rounds: Literal["all", "last"] | tuple[int, ...] = Field(
        "all", description="The rounds after which models are measured"
    )
    include_base: bool = Field(True, description="Whether to measure the model before training, once per list")
    primary: Name | None = Field(None, description="Main scorer of the report; the first if not given")
    comparisons: tuple[tuple[Slug, Slug], ...] | None = Field(
        None,
        description="Pairs of arms (one, other) whose difference the report shows, in addition to those from the model "
        "before training; all pairs if not given",
    )


class CellSettings(StrictModel):
    """All settings that determine a cell's results. Cells with equal settings have equal results.

    revision  revision of the experiment
    model     base model; measured without training if `round` is null
    round     settings of the training, without the label
    rounds    rounds after which the model is measured
    splits    prompt set of each split
    """

    revision: int = 0
    model: Name
    round: RoundSpec | None
    rounds: tuple[int, ...]
    splits: dict[Split, Name]
    measure: MeasureSpec

    @property
    def key(self) -> str:
        """SHA-256 of the settings, without the job's priority: it does not change results."""
        return digest(self.model_dump(mode="json", exclude={"round": {"priority"}}))


class Experiment(StrictModel):
    """A matrix of trainings and their evaluation.

    common   settings of a round (the body of POST /rounds) that all arms share
    arms     changes of these settings by arm: objects are merged, other values, including null, replace
    """

    name: Slug
    description: str = ""
    revision: int = Field(
        0, ge=0, description="Raise it to run every cell again, for example after a change of the code"
    )
    model: Name = "shapes"
    common: dict[str, Any] = Field(default_factory=dict)
    prompt_lists: dict[Slug, PromptListSpec] = Field(min_length=1)
    seeds: tuple[Seed, ...] = Field(min_length=1)
    arms: dict[Slug, dict[str, Any]] = Field(min_length=1)
    evaluation: EvaluationPlan = EvaluationPlan()

    @field_validator("arms", mode="before")
    @classmethod
    def _convert_empty_arms(cls, arms: Any) -> Any:
        if not isinstance(arms, Mapping):
            return arms
        return {name: {} if settings is None else settings for name, settings in arms.items()}

    @model_validator(mode="after")
    def _require_consistent_fields(self) -> Self:
        if BASE in self.arms:
            raise ValueError(f"arms: {BASE!r} is the name of the model before training; choose another")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected each once, got {list(self.seeds)}")
        problems = [
            *self._reserved(),
            *self._unmeasurable(),
            *self._unknown_comparisons(),
            *self._invalid_rounds(),
        ]
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))

        for arm in self.arms:
            equal = [other for other in self.arms if other < arm and self.training(other) == self.training(arm)]
            if equal:
                raise ValueError(f"arms: {equal[0]} and {arm} have the same settings")
        return self

    def training(self, arm: str) -> RoundSpec:
        """Return all settings of an arm, without the prompt set and seed of a cell."""
        settings = merge(self.common, self.arms[arm])
        settings.setdefault("evaluation", None)
        return RoundSpec.model_validate({**settings, "model": self.model, "prompt_set": "-"})

    def _reserved(self) -> Iterator[str]:
        settings_by_path = {"common": self.common} | {f"arms.{arm}": changes for arm, changes in self.arms.items()}
        for path, settings in settings_by_path.items():
            for name in settings:
                if name in _RESERVED_SETTINGS:
                    yield f"{path}.{name}: use the experiment's `{_RESERVED_SETTINGS[name]}`"

    def _unmeasurable(self) -> Iterator[str]:
        if "held_out" in self.evaluation.splits:
            for name, prompts in self.prompt_lists.items():
                if prompts.held_out is None:
                    yield f"prompt_lists.{name}.held_out: missing, but evaluation.splits contains held_out"
        if isinstance(self.evaluation.rounds, tuple):
            rounds = self.evaluation.rounds
            if not rounds or sorted(set(rounds)) != list(rounds) or rounds[0] < 1:
                yield f"evaluation.rounds: expected increasing numbers from 1, got {list(rounds)}"

    def _unknown_comparisons(self) -> Iterator[str]:
        for pair in self.evaluation.comparisons or ():
            if pair[0] == pair[1] or not set(pair) <= self.arms.keys():
                yield f"evaluation.comparisons: expected two of the arms {sorted(self.arms)}, got {list(pair)}"

    def _invalid_rounds(self) -> Iterator[str]:
        for arm, changes in self.arms.items():
            try:
                training = self.training(arm)
            except ValidationError as error:
                for path, message in _messages(error):
                    yield f"{'.'.join((_origin(path, arm, changes), *path))}: {message}"
                continue
            yield from self._unmeasurable_rounds(arm, training)

    def _unmeasurable_rounds(self, arm: str, training: RoundSpec) -> Iterator[str]:
        rounds = self.evaluation.rounds
        if isinstance(rounds, tuple) and rounds and rounds[-1] > training.rounds:
            yield f"evaluation.rounds: {arm} has {training.rounds} rounds, got {rounds[-1]}"
        if len(self._measured_rounds(training)) > _MAX_MODELS:
            yield f"evaluation.rounds: expected at most {_MAX_MODELS} for {arm}, got {training.rounds}; list some"

    def _measured_rounds(self, training: RoundSpec) -> tuple[int, ...]:
        match self.evaluation.rounds:
            case "all":
                return tuple(range(1, training.rounds + 1))
            case "last":
                return (training.rounds,)
            case rounds:
                return rounds

    def settings(self, list_name: str, arm: str, seed: int | None) -> CellSettings:
        """Return the settings of a cell. `seed` is None for the arm `BASE`."""
        prompts = self.prompt_lists[list_name]
        plan = self.evaluation
        sampling = plan.sampling or SamplingConfig.model_validate(self.common.get("sampling", {}))
        measure = MeasureSpec(
            samples_per_prompt=plan.samples_per_prompt, scorers=plan.scorers, seed=plan.seed, sampling=sampling
        )
        splits = {split: prompt_set_name(prompts.prompts(split) or ()) for split in plan.splits}

        if arm == BASE:
            return CellSettings(
                revision=self.revision, model=self.model, round=None, rounds=(0,), splits=splits, measure=measure
            )

        training = self.training(arm)
        cell_fields: dict[str, Any] = {"prompt_set": prompt_set_name(prompts.train), "seed": seed}
        if training.evaluation is not None and prompts.held_out is not None:
            cell_fields["held_out_prompt_set"] = prompt_set_name(prompts.held_out)
        training = training.model_copy(update=cell_fields)
        return CellSettings(
            revision=self.revision,
            model=self.model,
            round=training,
            rounds=self._measured_rounds(training),
            splits=splits,
            measure=measure,
        )

    @classmethod
    def load(cls, file: str | Path) -> Experiment:
        """Load an experiment from a YAML or JSON file.

        Args:
            file: Path of the file.

        Returns:
            The experiment.

        Raises:
            FormatError: The file is invalid; the error names every wrong field.
            OSError: The file cannot be read.
        """
        return cls.parse(read_yaml(Path(file)), str(file))

    @classmethod
    def parse(cls, content: Any, name: str = "experiment") -> Experiment:
        """Validate an experiment given as an object. `name` is its name in messages. Raises FormatError."""
        if not isinstance(content, Mapping):
            raise FormatError(f"{name}: expected an object with name, prompt_lists, seeds and arms")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            fields: list[FieldError] = []
            for path, message in _messages(error):
                fields += _fields(path, message)
            detail = "; ".join(f"{field.pointer}: {field.message}".removeprefix(": ") for field in fields)
            raise FormatError(f"{name}: {detail}", fields) from error


def merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` with `changes`: objects are merged, other values replace."""
    merged = dict(settings)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def prompt_set_name(prompts: Name | Sequence[Prompt]) -> str:
    """Return the name of a prompt set; for inline prompts it is derived from their content."""
    if isinstance(prompts, str):
        return prompts
    return f"prompts-{digest([prompt.model_dump(mode='json') for prompt in prompts])[:16]}"


def digest(content: Any) -> str:
    """Return the SHA-256 of canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def evaluation_body(settings: CellSettings, models: Iterable[str]) -> dict[str, Any]:
    """Build the body of POST /evaluations for these models; the others are compared with the first."""
    measure = settings.measure.model_dump(mode="json")
    prompt_sets = list(dict.fromkeys(settings.splits.values()))
    spec = EvaluationJobSpec.model_validate({**measure, "models": list(models), "prompt_sets": prompt_sets})
    return spec.model_dump(mode="json")


def _messages(error: ValidationError) -> Iterator[tuple[tuple[str, ...], str]]:
    for problem in error.errors(include_url=False, include_context=False):
        yield tuple(map(str, problem["loc"])), str(problem["msg"]).removeprefix("Value error, ")


def _fields(path: tuple[str, ...], message: str) -> Iterator[FieldError]:
    """Split a message with lines of the form `field: message` into one error per line."""
    if path:
        yield FieldError(pointer=".".join(path), message=message)
        return
    for line in message.split("\n"):
        pointer, colon, rest = line.partition(": ")
        yield FieldError(pointer=pointer if colon else "", message=rest if colon else line)


def _origin(path: tuple[str, ...], arm: str, settings: Mapping[str, Any]) -> str:
    """Return the part of the file that contains a setting: the arm or `common`."""
    value: Any = settings
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return "common"
        value = value[name]
    return f"arms.{arm}"
