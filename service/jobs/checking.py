"""Checks of requests against the models, prompt sets, scorers, samples and pairs of the installation.

Each kind of job (`service.jobs.kinds`) composes its check from the methods of `Checker`. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from dfusion.config import FusionConfig, LoraConfig, SamplingConfig, TrainingConfig
from dfusion.errors import LayerNotFoundError, LoraSettingError, shortened
from dfusion.lora_layers import adapted_layers
from dfusion.prompts import Prompt
from dfusion.rewards.config import WeightedScorerConfig
from dfusion.rewards.ocr import EXPECTED_QUOTES, quotes_text
from service.catalogue import Catalogue, InstalledModel
from service.db.queries import jobs, prompt_sets, results, training_pairs
from service.db.queries.training_pairs import Side
from service.db.tables import Job, Model, Pair, PromptSet, Sample
from service.errors import MAX_PROBLEMS, FieldProblem, InvalidRequestError, NotFoundError
from service.ids import IdKind, expect, kind_of
from service.jobs import kinds
from service.jobs.kinds import JobSpec, ScorerRef
from service.jobs.kinds.base import Checked, SamplesSpec
from service.settings import Settings

T = TypeVar("T")
_SIZED_BY = ("rounds", "prompts", "prompt_sets", "prompt_set", "pairs", "sampling")
"""The fields that determine a job's number of stages and images, in decreasing order of influence."""


def check(catalogue: Catalogue, settings: Settings, session: Session, spec: JobSpec) -> Checked[Any]:
    """Check a spec against the installation.

    Args:
        catalogue: The models and scorers of the installation.
        settings: Its settings, which limit the size of a job.
        session: A view of the database.
        spec: The request.

    Returns:
        The spec with its defaults filled in, and the rows that it names.

    Raises:
        InvalidRequestError: Lists the first problems.
    """
    checker = Checker(catalogue, settings, session)
    checked = kinds.kind_of(spec).check(checker, spec)
    if checked is not None:
        checker.limit_job(checked)

    raise_problems(checker)
    if checked is None:
        raise TypeError(f"the check of {type(spec).__name__} has neither a result nor a problem")
    return checked


def raise_problems(checker: Checker) -> None:
    """Raise an InvalidRequestError with the first problems that the checker has collected, if there are any."""
    if not checker.problems:
        return
    listed = checker.problems[:MAX_PROBLEMS]
    message = "; ".join(problem.message for problem in listed)
    if len(checker.problems) > len(listed):
        message += f"; and {len(checker.problems) - len(listed)} more"
    raise InvalidRequestError(message, *listed, code=checker.codes[0])


def unknown_model(catalogue: Catalogue, name: str) -> str:
    """The message of an error for a model that does not exist."""
    names = ", ".join(sorted(catalogue.models))
    return f"unknown model {name!r}; expected one of {names}, an alias, or a model's id"


class Checker:
    """Looks up what a request names and collects all problems, so that a client gets them in one response."""

    def __init__(self, catalogue: Catalogue, settings: Settings, session: Session) -> None:
        self._catalogue = catalogue
        self._settings = settings
        self._session = session
        self.problems: list[FieldProblem] = []
        self.codes: list[str] = []
        self._prompts = 0
        self._models: dict[str, Model] = {}
        self._jobs: dict[str, Job] = {}
        self._specs: dict[str, JobSpec] = {}
        self._prompt_sets: dict[str, PromptSet] = {}

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
        """The model that the field names, and its base model.

        A base model that cannot be loaded is a problem. Not checked if its files are not on this machine.
        """
        row = results.find_model(self._session, name)
        base = self._catalogue.models.get(row.base) if row else None
        if row is None or base is None:
            self.wrong(pointer, unknown_model(self._catalogue, name), "unknown_model")
            return row, base

        facts = self._catalogue.facts(base.name)
        if facts is not None and facts.problem is not None:
            self.wrong(pointer, f"{base.name} cannot be used: {facts.problem}", "unsupported_model")
        elif problem := self._catalogue.adapter_problem(base.name):
            self.wrong(pointer, f"{base.name}: {problem}", "unsuitable_adapter")
        return row, base

    def one_model(self, pointer: str, model_ids: Collection[str], advice: str = "") -> Model | None:
        """The only model of these, which sampled some samples. `advice` is appended to the message for several."""
        ids = sorted(set(model_ids))
        if len(ids) != 1:
            self.wrong(pointer, f"expected samples of one model, got {ids}{advice}", "models_differ")
            return None
        return results.get_model(self._session, ids[0])

    def prompts(self, spec: SamplesSpec) -> tuple[PromptSet | None, PromptSet | None]:
        """The prompt set of a spec: the one that it names, or a new one from its own prompts.

        Returns:
            The prompt set, and the prompt set again if it is new.
        """
        if spec.prompts is not None:
            new = self.new_set(spec.prompts)
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
        else:
            self._limit_prompts(pointer, len(row.prompts))
        return row

    def job(self, pointer: str, job_id: str) -> Job | None:
        """The job that the field names."""
        return self._find(pointer, lambda: jobs.get(self._session, job_id), "unknown_job")

    def pair(self, pointer: str, pair_id: str) -> Pair | None:
        """The pair that the field names."""
        return self._find(pointer, lambda: results.get_pair(self._session, pair_id), "unknown_pair")

    def unknown(self, pointer: str, kind: IdKind, row_id: str) -> None:
        """Add the problem that the field names no row of this kind."""
        message = f"there is no {kind.noun} {row_id}"
        try:
            expect(kind, row_id)
        except NotFoundError as error:
            message = str(error)
        self.wrong(pointer, message, f"unknown_{kind.name.lower()}")

    # lookups without a field

    def jobs_of(self, samples: Iterable[Sample]) -> dict[str, Job]:
        """The jobs that created the samples, by id."""
        return self.jobs({sample.job_id for sample in samples})

    def jobs(self, ids: Collection[str]) -> dict[str, Job]:
        """The jobs with these ids, by id. Unknown ids are left out."""
        missing = _ids_of(IdKind.JOB, ids) - self._jobs.keys()
        if missing:
            self._jobs |= jobs.by_ids(self._session, missing)
        return {job_id: self._jobs[job_id] for job_id in ids if job_id in self._jobs}

    def load_models(self, ids: Collection[str]) -> None:
        """Read these models at once, for `one_base`."""
        missing = set(ids) - self._models.keys()
        if missing:
            self._models |= results.models(self._session, missing)

    def spec_of(self, job: Job) -> JobSpec:
        """The request that created the job."""
        if job.id not in self._specs:
            self._specs[job.id] = kinds.spec_of(job.kind, job.spec)
        return self._specs[job.id]

    def samplings(self, job_ids: Collection[str]) -> dict[str, SamplingConfig]:
        """The sampling settings of these jobs, by job."""
        stored = jobs.sampling_settings(self._session, job_ids)
        return {job_id: SamplingConfig.model_validate(settings) for job_id, settings in stored.items()}

    def samples(self, ids: Collection[str]) -> Mapping[str, Sample]:
        """The samples with these ids, by id. Unknown ids are left out."""
        return results.samples(self._session, _ids_of(IdKind.SAMPLE, ids))

    def samples_of(self, pair: Pair) -> Mapping[str, Sample]:
        """The samples of the pair, by id."""
        return self.samples(results.sides_of([pair]))

    def first_samples(self, job_id: str) -> list[Sample]:
        """The first sample of the job; empty if it has none."""
        return results.sample_page(self._session, 1, None, job_id).rows

    def verified_pairs(self, pair_ids: Collection[str]) -> Mapping[str, bool]:
        """Whether the targets of these pairs are verified, by pair. Unknown ids are left out."""
        return training_pairs.are_verified(self._session, _ids_of(IdKind.PAIR, pair_ids))

    def existing_jobs(self, job_ids: Collection[str]) -> set[str]:
        """Those of these ids that are jobs."""
        return jobs.existing(self._session, _ids_of(IdKind.JOB, job_ids))

    def jobs_with_pairs(self, job_ids: Collection[str]) -> set[str]:
        """Those of these jobs that have pairs whose targets are verified."""
        return training_pairs.jobs_with_pairs(self._session, _ids_of(IdKind.JOB, job_ids))

    def training_sides(
        self, pair_ids: Collection[str], job_ids: Collection[str], only_preferred: bool
    ) -> tuple[int, list[Side]] | None:
        """The number of the pairs that a training names, and their samples as far as they differ.

        More pairs than the limit of the settings are a problem; then no pairs are read, and the result is None.
        """
        # 1. all pairs of the jobs, whose number is known before they are read
        pair_ids = _ids_of(IdKind.PAIR, pair_ids)
        job_ids = _ids_of(IdKind.JOB, job_ids)
        limit = self._settings.max_pairs_per_training
        named = training_pairs.selected(pair_ids, job_ids, only_preferred=False)
        if training_pairs.count(self._session, named, limit=limit + 1) > limit:
            message = f"expected at most {limit} pairs (DFUSION_MAX_PAIRS_PER_TRAINING), got more"
            self.wrong("/pairs" if pair_ids else "/jobs", message, "too_many_pairs")
            return None

        # 2. those that the training uses
        condition = training_pairs.selected(pair_ids, job_ids, only_preferred)
        count = training_pairs.count(self._session, condition, limit=limit)
        return count, training_pairs.sides(self._session, condition) if count else []

    def has_pairs(self, job_id: str) -> bool:
        """Whether the job has pairs."""
        return bool(results.pair_page(self._session, 1, None, job_id).rows)

    def set_by_id(self, set_id: str | None) -> PromptSet | None:
        """The prompt set with this id."""
        return None if set_id is None else self.sets_by_id([set_id]).get(set_id)

    def sets_by_id(self, ids: Collection[str]) -> dict[str, PromptSet]:
        """The prompt sets with these ids, by id. Unknown ids are left out."""
        missing = set(ids) - self._prompt_sets.keys()
        if missing:
            self._prompt_sets |= prompt_sets.by_ids(self._session, missing)
        return {set_id: self._prompt_sets[set_id] for set_id in ids if set_id in self._prompt_sets}

    def new_set(self, prompts: Sequence[Prompt]) -> PromptSet:
        """The prompts of the request as a prompt set that is not in the database yet."""
        self._limit_prompts("/prompts", len(prompts))
        return prompt_sets.unsaved(prompts)

    def base_of(self, model: Model | None) -> InstalledModel | None:
        """The base model of a model."""
        return self._catalogue.models.get(model.base) if model else None

    def base_row(self, model_id: str) -> Model | None:
        """The row of the base model of a model."""
        self.load_models([model_id])
        return results.base_model(self._session, self._models[model_id].base)

    # conditions; a violation is a problem

    def one_base(self, pointer: str, model_ids: Collection[str], model: Model | None = None) -> None:
        """These models, which sampled some samples, and `model` have the same base model.

        Latents of different base models are incompatible.
        """
        self.load_models(model_ids)
        bases = {self._models[model_id].base for model_id in model_ids}
        bases |= {model.base} if model is not None else set()
        if len(bases) > 1:
            self.wrong(pointer, f"expected samples of one base model, got {sorted(bases)}", "models_differ")

    def one_sampling(self, pointer: str, samplings: Collection[SamplingConfig]) -> None:
        """Some samples have the same settings."""
        if len(set(samplings)) > 1:
            message = (
                "expected samples with the same steps, guidance, eta, size and negative prompt, got different ones"
            )
            self.wrong(pointer, message, "invalid_request")

    def learns_from_rewards(self, pointer: str, training: TrainingConfig) -> None:
        """The algorithm learns from samples and their rewards."""
        if training.learns_from_pairs:
            message = f"expected an algorithm that learns from rewards, got {training.algorithm}"
            self.wrong(pointer, message, "invalid_request")

    def learns_from_verdicts(self, pointer: str, training: TrainingConfig) -> None:
        """The algorithm learns from the preferred side of a pair."""
        if not training.learns_from_pairs:
            message = f"expected an algorithm that learns from pairs, as verdicts require, got {training.algorithm}"
            self.wrong(pointer, message, "invalid_request")

    def continues(self, model: Model | None, training: TrainingConfig) -> None:
        """A training keeps the adapter and the moments of the model that it continues.

        It sets no LoRA layers, ranks or alphas then. Without an adapter to keep, the U-Net has the layers that it sets
        (not checked if its files are not on this machine).
        """
        base = self.base_of(model)
        if model is None or base is None:
            return
        if model.adapter_artifact_id is not None or base.adapter is not None:
            if training.lora.model_copy(update={"dropout": 0.0}) != LoraConfig():
                message = (
                    f"{model.id} has an adapter, whose layers, ranks and alphas are kept: omit lora, except dropout"
                )
                self.wrong("/training/lora", message, "adapter_is_kept")
        elif (shapes := self._catalogue.shapes(base.name)) is not None:
            try:
                adapted_layers(shapes, training.lora)
            except LoraSettingError as error:
                self.wrong(f"/training/lora/{error.setting}", f"{base.name}: {error}", "unsuitable_lora")

        kept = model.statistics.get("optimizer", "adamw")
        is_carried = model.optimizer_artifact_id is not None and training.optimizer_start == "carried"
        if is_carried and training.optimizer != kept:
            message = (
                f"expected {kept}, because {model.id} has its moments, or optimizer_start fresh, got"
                f" {training.optimizer}"
            )
            self.wrong("/training/optimizer", message, "optimizer_is_kept")

    def fits_prompts(self, pointer: str, base: InstalledModel | None, prompt_set: PromptSet | None) -> None:
        """The prompts fit the model's tokenizer. Not checked if the files of the model are not on this machine."""
        facts = self._catalogue.facts(base.name) if base else None
        if base is None or facts is None or facts.prompt_length is None or prompt_set is None:
            return

        limit = facts.prompt_length.max_tokens
        texts = [prompt["text"] for prompt in prompt_set.prompts]
        for n, count in facts.prompt_length.too_long(texts).items():
            if pointer == "/prompts":
                message = f"expected at most {limit} tokens for {base.name}, got {count}"
                self.wrong(f"{pointer}/{n}/text", message, "prompt_too_long")
            else:
                message = f"expected at most {limit} tokens for {base.name}, got {count} in prompt {n} of the set"
                self.wrong(pointer, message, "prompt_too_long")

    def quotes_text(self, pointer: str, prompt_set: PromptSet | None, scorers: Iterable[ScorerRef | None]) -> None:
        """The prompts quote a text if one of the scorers compares it with the text in the images."""
        readers = [scorer for scorer in scorers if scorer is not None and self._catalogue.reads_text(scorer)]
        if not readers or prompt_set is None:
            return

        name = readers[0] if isinstance(readers[0], str) else readers[0].name
        for n, prompt in enumerate(prompt_set.prompts):
            if not quotes_text(prompt["text"]):
                message = f"{EXPECTED_QUOTES}, for the scorer {name}, got {shortened(prompt['text'])}"
                self.wrong(f"{pointer}/{n}/text" if pointer == "/prompts" else pointer, message, "prompt_without_text")
                return  # one is enough: the whole set is probably meant for another scorer

    def fits_prompt(self, pointer: str, base: InstalledModel | None, text: str) -> None:
        """A single prompt fits the model's tokenizer. Not checked if the files of the model are not on this machine."""
        facts = self._catalogue.facts(base.name) if base else None
        if base is None or facts is None or facts.prompt_length is None:
            return

        for count in facts.prompt_length.too_long([text]).values():
            limit = facts.prompt_length.max_tokens
            message = f"expected at most {limit} tokens for {base.name}, got {count}"
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
        if base and base.scorers:
            return base.scorers
        if isinstance(reward, WeightedScorerConfig) and reward.normalise:
            return tuple(part.scorer for part in reward.parts)
        return (reward,) if reward else None

    def scorer_list(self, pointer: str, scorers: Sequence[ScorerRef]) -> None:
        """All scorers exist, and each is named once."""
        if len(set(scorers)) < len(scorers):
            self.wrong(pointer, "expected each scorer once", "invalid_request")
        for n, scorer in enumerate(scorers):
            self.scorer(f"{pointer}/{n}", scorer)

    def scorer(self, pointer: str, scorer: ScorerRef, without: str = "", *, of_round: bool = False) -> None:
        """The scorer, or each part of a weighted sum, exists.

        Args:
            pointer: The JSON pointer of the field.
            scorer: The scorer; "" if the request and the model name none.
            without: The start of the message in this case.
            of_round: Whether it is the reward of a round, which alone has a run to normalise a sum by.
        """
        if isinstance(scorer, WeightedScorerConfig):
            if scorer.normalise and not of_round:
                message = "expected a sum of raw scores: only the reward of a round can be normalised"
                self.wrong(f"{pointer}/normalise", message, "invalid_request")
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
        self._limit(pointer, images, "images", "max_images_per_round")

    def _limit_prompts(self, pointer: str, prompts: int) -> None:
        """All prompts of the request so far, and these, are within the limit of the settings."""
        self._prompts += prompts
        self._limit(pointer, self._prompts, "prompts", "max_prompts_per_job")

    def limit_job(self, checked: Checked[Any]) -> None:
        """The images and stages of all rounds are within the limits of the settings."""
        spec = checked.spec
        kind = kinds.kind_of(spec)
        names = [name for name in _SIZED_BY if getattr(spec, name, None) is not None]
        if kind.rounds(spec) == 1:
            names.remove("rounds")

        pointer = f"/{next(iter(names), '')}"
        stages = sum(stages.count for stages in kind.totals(spec, checked.sizes).values())
        self._limit(pointer, stages, "stages", "max_stages_per_job")
        self._limit(pointer, kind.count(spec, checked.sizes).images, "images", "max_images_per_job")

    def _limit(self, pointer: str, count: int, noun: str, setting: str) -> None:
        limit = getattr(self._settings, setting)
        if count > limit:
            message = f"expected at most {limit} {noun} (DFUSION_{setting.upper()}), got {count}"
            self.wrong(pointer, message, f"too_many_{noun}")

    def _find(self, pointer: str, get: Callable[[], T], code: str) -> T | None:
        try:
            return get()
        except NotFoundError as error:
            self.wrong(pointer, str(error), code)
            return None


def _ids_of(kind: IdKind, texts: Collection[str]) -> set[str]:
    """Those of these texts that are ids of this kind."""
    return {text for text in texts if kind_of(text) is kind}
