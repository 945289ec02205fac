"""Checks of requests against the models, prompt sets, scorers, samples and pairs of the installation.

Each kind of job (`service.jobs.kinds`) composes its check from the methods of `Checker`. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from dfusion.config import FusionConfig, LoraConfig, SamplingConfig, TrainingConfig
from dfusion.errors import LayerNotFoundError
from dfusion.prompts import Prompt
from dfusion.rewards.config import WeightedScorerConfig
from service.catalogue import Catalogue, InstalledModel
from service.db.queries import jobs, prompt_sets, results, training_pairs
from service.db.tables import Job, Model, Pair, PromptSet, Sample
from service.errors import FieldProblem, InvalidRequestError, NotFoundError
from service.ids import IdKind, kind_of
from service.jobs import kinds
from service.jobs.kinds import JobSpec, ScorerRef
from service.jobs.kinds.base import Checked, SamplesSpec
from service.settings import Settings

T = TypeVar("T")


def check(catalogue: Catalogue, settings: Settings, session: Session, spec: JobSpec) -> Checked[Any]:
    """Check a spec against the installation.

    Args:
        catalogue: The models and scorers of the installation.
        settings: Its settings, which limit the number of images.
        session: A view of the database.
        spec: The request.

    Returns:
        The spec with its defaults filled in, and the rows that it names.

    Raises:
        InvalidRequestError: Lists all problems.
    """
    checker = Checker(catalogue, settings, session)
    checked = kinds.kind_of(spec).check(checker, spec)

    if checker.problems or checked is None:
        raise InvalidRequestError(
            "; ".join(problem.message for problem in checker.problems), *checker.problems, code=checker.codes[0]
        )
    return checked


class Checker:
    """Looks up what a request names and collects all problems, so that a client gets them in one response."""

    def __init__(self, catalogue: Catalogue, settings: Settings, session: Session) -> None:
        self._catalogue = catalogue
        self._settings = settings
        self._session = session
        self.problems: list[FieldProblem] = []
        self.codes: list[str] = []

    @property
    def shard_prompts(self) -> int:
        """Prompts of one sampling or fusion stage."""
        return self._settings.shard_prompts

    def wrong(self, pointer: str, message: str, code: str) -> None:
        """Add a problem with a field.

        Args:
            pointer: The JSON pointer of the field.
            message: The problem, for people.
            code: The problem, for programs.
        """
        self.problems.append(FieldProblem(pointer, message))
        self.codes.append(code)

    # lookups; a field that names nothing is a problem

    def model(self, pointer: str, name: str) -> tuple[Model | None, InstalledModel | None]:
        """The model that the field names, and its base model."""
        row = results.find_model(self._session, name)
        base = self._catalogue.models.get(row.base) if row else None
        if row is None or base is None:
            names = ", ".join(sorted(self._catalogue.models))
            message = f"unknown model {name!r}; expected one of {names}, an alias, or a model's id"
            self.wrong(pointer, message, "unknown_model")
        return row, base

    def one_model(self, pointer: str, samples: Iterable[Sample], advice: str = "") -> Model | None:
        """The model that sampled all these samples. `advice` is appended to the message if there are several."""
        ids = {sample.model_id for sample in samples}
        if len(ids) != 1:
            self.wrong(pointer, f"expected samples of one model, got {sorted(ids)}{advice}", "models_differ")
            return None
        return results.get_model(self._session, ids.pop())

    def prompts(self, spec: SamplesSpec) -> tuple[PromptSet | None, PromptSet | None]:
        """The prompt set of a spec: the one that it names, or a new one from its own prompts.

        Returns:
            The prompt set, and the prompt set again if it is new.
        """
        if spec.prompts is not None:
            new = prompt_sets.unsaved(spec.prompts)
            return new, new
        return self.prompt_set("/prompt_set", spec.prompt_set), None

    def prompt_set(self, pointer: str, name: str | None) -> PromptSet | None:
        """The prompt set that the field names; None if it names none."""
        if name is None:
            return None
        is_id = kind_of(name) is IdKind.PROMPT_SET
        row = prompt_sets.by_id(self._session, name) if is_id else prompt_sets.latest(self._session, name)
        if row is None:
            self.wrong(pointer, "unknown prompt set; GET /prompt-sets lists all prompt sets", "unknown_prompt_set")
        return row

    def job(self, pointer: str, job_id: str) -> Job | None:
        """The job that the field names."""
        return self._find(pointer, lambda: jobs.get(self._session, job_id), "unknown_job")

    def pair(self, pointer: str, pair_id: str) -> Pair | None:
        """The pair that the field names."""
        return self._find(pointer, lambda: results.get_pair(self._session, pair_id), "unknown_pair")

    # lookups without a field

    def job_of(self, sample: Sample) -> Job:
        """The job that created the sample."""
        return jobs.get(self._session, sample.job_id)

    def spec_of(self, job: Job) -> JobSpec:
        """The request that created the job."""
        return kinds.spec_of(job.kind, job.spec)

    def sampling_of(self, job: Job) -> SamplingConfig:
        """The sampling settings of the job."""
        spec = self.spec_of(job)
        return spec.sampling if isinstance(spec, SamplesSpec) else SamplingConfig()

    def samples(self, ids: Collection[str]) -> Mapping[str, Sample]:
        """The samples with these ids, by id. Unknown ids are left out."""
        return results.samples(self._session, ids)

    def samples_of(self, pairs: Sequence[Pair]) -> Mapping[str, Sample]:
        """The samples of these pairs, by id."""
        return self.samples(results.sides_of(pairs))

    def first_samples(self, job_id: str) -> list[Sample]:
        """The first sample of the job; empty if it has none."""
        return results.sample_page(self._session, 1, None, job_id).rows

    def named_pairs(self, pair_ids: Sequence[str], job_ids: Sequence[str]) -> list[Pair]:
        """The pairs of these ids that there are, then all pairs of these jobs."""
        return training_pairs.named(self._session, pair_ids, job_ids)

    def with_preferred_side(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Those of these pairs of which a person prefers a side."""
        return training_pairs.with_preferred_side(pairs)

    def has_pairs(self, job_id: str) -> bool:
        """Whether the job has pairs."""
        return bool(results.pair_page(self._session, 1, None, job_id).rows)

    def set_by_id(self, set_id: str | None) -> PromptSet | None:
        """The prompt set with this id."""
        return prompt_sets.by_id(self._session, set_id or "")

    def new_set(self, prompts: Sequence[Prompt]) -> PromptSet:
        """The prompts of the request as a prompt set that is not in the database yet."""
        return prompt_sets.unsaved(prompts)

    def base_of(self, model: Model | None) -> InstalledModel | None:
        """The base model of a model."""
        return self._catalogue.models.get(model.base) if model else None

    # conditions; a violation is a problem

    def one_base(self, pointer: str, samples: Iterable[Sample], model: Model | None = None) -> None:
        """All samples, and `model`, have the same base model: latents of different base models are incompatible."""
        model_ids = {sample.model_id for sample in samples}
        bases = {results.get_model(self._session, model_id).base for model_id in model_ids}
        bases |= {model.base} if model is not None else set()
        if len(bases) > 1:
            self.wrong(pointer, f"expected samples of one base model, got {sorted(bases)}", "models_differ")

    def one_sampling(self, pointer: str, sampled_by: Iterable[Job]) -> None:
        """These jobs sampled with the same settings."""
        if len({self.sampling_of(job) for job in sampled_by}) > 1:
            message = "expected samples with the same steps, guidance, eta and size, got different ones"
            self.wrong(pointer, message, "invalid_request")

    def learns_from_verdicts(self, pointer: str, training: TrainingConfig) -> None:
        """The algorithm learns from the preferred side of a pair."""
        if not training.learns_from_pairs:
            message = f"expected an algorithm that learns from pairs, as verdicts require, got {training.algorithm}"
            self.wrong(pointer, message, "invalid_request")

    def adapter_is_kept(self, model: Model | None, training: TrainingConfig) -> None:
        """A training that continues an adapter sets no LoRA rank or alpha, since those of the adapter are kept."""
        if model is not None and model.adapter_artifact_id is not None and training.lora != LoraConfig():
            message = f"{model.id} has an adapter, whose rank and alpha are kept: omit lora"
            self.wrong("/training/lora", message, "adapter_is_kept")

    def fits_prompts(self, pointer: str, base: InstalledModel | None, prompt_set: PromptSet | None) -> None:
        """The prompts fit the model's tokenizer. Not checked if the files of the model are not on this machine."""
        facts = self._catalogue.facts(base.name) if base else None
        if base is None or facts is None or facts.prompt_length is None or prompt_set is None:
            return

        limit = facts.prompt_length.most
        for n, prompt in enumerate(prompt_set.prompts):
            count = facts.prompt_length.of(prompt["text"])
            if count > limit and pointer == "/prompts":
                message = f"expected at most {limit} tokens for {base.name}, got {count}"
                self.wrong(f"{pointer}/{n}/text", message, "prompt_too_long")
            elif count > limit:
                message = f"expected at most {limit} tokens for {base.name}, got {count} in prompt {n} of the set"
                self.wrong(pointer, message, "prompt_too_long")

    def fits_steps(self, fusion: FusionConfig, sampling: SamplingConfig) -> None:
        """At least one step is fused."""
        if not fusion.steps(sampling.num_steps):
            message = f"expected less than the {sampling.num_steps} steps of the samples, got {fusion.first_step}"
            self.wrong("/fusion/first_step", message, "invalid_request")

    def fits_sampling(self, base: InstalledModel | None, sampling: SamplingConfig) -> None:
        """The model supports the sampling settings. Not checked if its files are not on this machine."""
        facts = self._catalogue.facts(base.name) if base else None
        if base is None or facts is None:
            return

        for setting, problem in facts.sampling_problems(sampling):
            self.wrong(f"/sampling/{setting}", f"{base.name}: {problem}", "unsuitable_sampling")

    def fits_layers(self, base: InstalledModel | None, fusion: FusionConfig | None) -> None:
        """The U-Net of the model has the fused layers. Not checked if its files are not on this machine."""
        facts = self._catalogue.facts(base.name) if base else None
        if facts is None or fusion is None:
            return

        try:
            facts.require_layers(fusion)
        except LayerNotFoundError as error:
            self.wrong("/fusion/layers", str(error), "unknown_layer")

    def scorers(
        self, pointer: str, given: Sequence[ScorerRef] | None, base: InstalledModel | None, reward: ScorerRef | None
    ) -> tuple[ScorerRef, ...] | None:
        """The scorers of a request: the given ones, else the model's default scorers, else the reward."""
        if given is not None:
            self.scorer_list(pointer, given)
            return tuple(given)
        return (base.scorers if base else ()) or ((reward,) if reward else None)

    def scorer_list(self, pointer: str, scorers: Sequence[ScorerRef]) -> None:
        """All scorers exist, and each is named once."""
        if len(set(scorers)) < len(scorers):
            self.wrong(pointer, "expected each scorer once", "invalid_request")
        for n, scorer in enumerate(scorers):
            self.scorer(f"{pointer}/{n}", scorer)

    def scorer(self, pointer: str, scorer: ScorerRef, without: str = "") -> None:
        """The scorer, or each part of a weighted sum, exists.

        Args:
            pointer: The JSON pointer of the field.
            scorer: The scorer; "" if the request and the model name none.
            without: The start of the message in this case.
        """
        if isinstance(scorer, WeightedScorerConfig):
            for n, part in enumerate(scorer.parts):
                self.scorer(f"{pointer}/parts/{n}/scorer", part.scorer)
        elif scorer not in self._catalogue.scorers:
            names = ", ".join(sorted(self._catalogue.scorers))
            got = f"unknown scorer {scorer!r}" if scorer else without
            self.wrong(pointer, f"{got}; expected one of {names}", "unknown_scorer")

    def limit_images(self, prompt_set: PromptSet | None, samples_per_prompt: int) -> None:
        """A round samples no more images than allowed."""
        self.limit("/samples_per_prompt", (len(prompt_set.prompts) if prompt_set else 0) * samples_per_prompt)

    def limit(self, pointer: str, images: int) -> None:
        """The number of images is within the limit of the settings."""
        limit = self._settings.max_images_per_round
        if images > limit:
            self.wrong(pointer, f"expected at most {limit} images, got {images}", "too_many_images")

    def _find(self, pointer: str, get: Callable[[], T], code: str) -> T | None:
        try:
            return get()
        except NotFoundError as error:
            self.wrong(pointer, str(error), code)
            return None
