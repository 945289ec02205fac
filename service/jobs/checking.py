"""A request against what there is: models, prompt sets, scorers, samples, pairs. Nothing is made here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy.orm import Session

from dfusion.config import FusionConfig, LoraConfig, SamplingConfig, TrainingConfig
from dfusion.errors import LayerNotFoundError
from dfusion.rewards.config import WeightedScorerConfig
from service.catalogue import BaseModel, Catalogue
from service.db.queries import jobs, prompt_sets, results
from service.db.tables import Job, Model, Pair, PromptSet, Sample
from service.errors import FieldProblem, InvalidRequestError, NotFoundError
from service.ids import IdKind, kind_of
from service.jobs.planning import measured_splits
from service.jobs.specs import (
    EvaluationJobSpec,
    ExportJobSpec,
    FusionJobSpec,
    JobSpec,
    RoundSpec,
    SamplesSpec,
    SamplingJobSpec,
    ScorerRef,
    TrainingJobSpec,
    spec_of,
)
from service.plan import PromptsToMeasure, Sizes
from service.settings import Settings
from service.states import JobKind, JobState, SampleRole, Verdict

T = TypeVar("T")


OWN_PROMPTS = "prompts"
"""What the prompts that come with an evaluation are called among its lists."""


@dataclass(frozen=True)
class Checked:
    """A spec with its defaults filled in, and what it names.

    new_set  the prompts that came with the request, as a set that is not in the database yet
    """

    spec: JobSpec
    sizes: Sizes
    model: Model | None = None
    prompt_set: PromptSet | None = None
    held_out_set: PromptSet | None = None
    new_set: PromptSet | None = None


def check(catalogue: Catalogue, settings: Settings, session: Session, spec: JobSpec) -> Checked:
    """The spec against what there is. Raises InvalidRequestError with all that is wrong."""
    checker = _Checker(catalogue, settings, session)
    match spec:
        case RoundSpec():
            found = checker.rounds(spec)
        case SamplingJobSpec():
            found = checker.sampling(spec)
        case FusionJobSpec():
            found = checker.fusion(spec)
        case TrainingJobSpec():
            found = checker.training(spec)
        case EvaluationJobSpec():
            found = checker.evaluation(spec)
        case ExportJobSpec():
            found = checker.export(spec)
    if checker.problems or found is None:
        raise InvalidRequestError(
            "; ".join(problem.message for problem in checker.problems), *checker.problems, code=checker.codes[0]
        )
    return found


class _Checker:
    """Gathers everything that is wrong, so that a client learns it all at once."""

    def __init__(self, catalogue: Catalogue, settings: Settings, session: Session) -> None:
        self._catalogue, self._settings, self._session = catalogue, settings, session
        self.problems: list[FieldProblem] = []
        self.codes: list[str] = []

    def wrong(self, pointer: str, message: str, code: str) -> None:
        self.problems.append(FieldProblem(pointer, message))
        self.codes.append(code)

    def rounds(self, spec: RoundSpec) -> Checked | None:
        model, base = self._model("/model", spec.model)
        prompt_set, new_set = self._prompts(spec)
        held_out = self._prompt_set("/held_out_prompt_set", spec.held_out_prompt_set)
        self._fits_prompts("/prompts" if spec.prompts else "/prompt_set", base, prompt_set)
        self._fits_prompts("/held_out_prompt_set", base, held_out)
        self._fits_layers(base, spec.fusion)
        if spec.fusion is not None:
            self._fits_steps(spec.fusion, spec.sampling)
        self._fits_sampling(base, spec.sampling)
        reward = spec.reward or (base.reward if base else None)
        watch = spec.watch or (base.watch if base else None)
        self._scorer("/reward", reward or "", "the model has no reward of its own")
        if spec.review and spec.training.algorithm != "dpo":
            message = f"verdicts say which side is better, which {spec.training.algorithm} does not learn from"
            self.wrong("/review", message, "invalid_request")
        if watch is not None:
            self._scorer("/watch", watch)
        evaluation = spec.evaluation
        if evaluation is not None:
            scorers = self._scorers("/evaluation/scorers", evaluation.scorers, base, reward)
            evaluation = evaluation.model_copy(update={"scorers": scorers})
        self._limit_images(prompt_set, spec.samples_per_prompt)
        self._adapter_is_kept(model, spec.training)
        if prompt_set is None or model is None:
            return None
        filled = spec.model_copy(update={"reward": reward, "watch": watch, "evaluation": evaluation})
        ids = [prompt_set, *([held_out] if held_out else [])]
        measured = measured_splits(
            prompt_set.id, held_out.id if held_out else None, {row.id: len(row.prompts) for row in ids}
        )
        sizes = Sizes(self._settings.shard_prompts, len(prompt_set.prompts), measured=measured)
        return Checked(filled, sizes, model, prompt_set, held_out, new_set)

    def sampling(self, spec: SamplingJobSpec) -> Checked | None:
        model, base = self._model("/model", spec.model)
        prompt_set, new_set = self._prompts(spec)
        self._fits_prompts("/prompts" if spec.prompts else "/prompt_set", base, prompt_set)
        self._fits_sampling(base, spec.sampling)
        scorers = self._scorers("/scorers", spec.scorers, base, base.reward if base else None)
        self._limit_images(prompt_set, spec.samples_per_prompt)
        if prompt_set is None or model is None:
            return None
        filled = spec.model_copy(update={"scorers": scorers})
        return Checked(
            filled, Sizes(self._settings.shard_prompts, len(prompt_set.prompts)), model, prompt_set, None, new_set
        )

    def fusion(self, spec: FusionJobSpec) -> Checked | None:
        named = self._pairs_to_fuse(spec)
        if named is None:
            return None
        job, bases, pairs = named
        model = self._one_model("/pairs", bases)
        base = self._catalogue.models.get(model.base) if model else None
        self._fits_layers(base, spec.fusion)
        reward = spec.reward or (base.reward if base else None)
        self._scorer("/reward", reward or "", "the model has no reward of its own")
        sampling = _sampling_of(job)
        self._fits_steps(spec.fusion, sampling)
        prompt_set = prompt_sets.by_id(self._session, job.prompt_set_id or "")
        per_prompt = spec_of(job.kind, job.spec).samples_per_prompt if spec.sampling else 0  # type: ignore[union-attr]
        prompts = len(prompt_set.prompts) if prompt_set and spec.sampling else 0
        sizes = Sizes(self._settings.shard_prompts, prompts, per_prompt, pairs, sampling)
        return Checked(spec.model_copy(update={"reward": reward}), sizes, model, prompt_set)

    def _maps_fit(self, spec: FusionJobSpec, job: Job) -> None:
        """Whether the samples have item maps, recorded where the fusion looks for masks."""
        sampled = spec_of(job.kind, job.spec)
        source = sampled.mask_source if isinstance(sampled, SamplingJobSpec) else None
        if isinstance(sampled, RoundSpec) and sampled.fusion is not None:
            source = sampled.fusion.mask_source
        if source is None:
            self.wrong("/pairs", f"{job.id} sampled without item maps, so that nothing can be fused", "no_item_maps")
        elif source != spec.fusion.mask_source:
            message = f"expected {source!r}, where the samples' maps were recorded, got {spec.fusion.mask_source!r}"
            self.wrong("/fusion/mask_source", message, "invalid_request")

    def _pairs_to_fuse(self, spec: FusionJobSpec) -> tuple[Job, list[Sample], int] | None:
        """The job whose samples they are, bases (some, where a sampling is paired), and how many pairs are named."""
        if spec.sampling is not None:
            return self._sampling_to_fuse(spec, spec.sampling)
        sides = spec.pairs or ()
        if spec.pair is not None:
            pair = self._found("/pair", lambda: results.get_pair(self._session, spec.pair or ""), "unknown_pair")
            if pair is None:
                return None
            rows = results.samples(self._session, results.sides_of([pair]))
            found = [(rows[pair.reference_id], rows[pair.base_id])]
        else:
            rows = results.samples(self._session, {i for side in sides for i in (side.reference, side.base)})
            found = []
            for n, side in enumerate(sides):
                reference, base = rows.get(side.reference), rows.get(side.base)
                for role, row in (("reference", reference), ("base", base)):
                    if row is None:
                        self.wrong(f"/pairs/{n}/{role}", "there is no such sample", "unknown_sample")
                if reference is not None and base is not None:
                    self._check_side_by_side(n, reference, base)
                    found.append((reference, base))
        if self.problems:
            return None
        self._fits_items(spec, [reference for reference, _ in found])
        samples = [row for pair in found for row in pair]
        gone = [row.id for row in samples if row.trajectory_artifact_id is None]
        if gone:
            self.wrong("/pairs", f"the trajectories of {', '.join(gone[:5])} are not kept", "trajectory_gone")
        of_jobs = {row.job_id: jobs.get(self._session, row.job_id) for row in samples}
        for job in of_jobs.values():
            self._maps_fit(spec, job)
        if len({_sampling_of(job) for job in of_jobs.values()}) > 1:
            self.wrong("/pairs", "expected samples made with the same steps, guidance, eta and size", "invalid_request")
        return next(iter(of_jobs.values())), [base for _, base in found], len(found)

    def _fits_items(self, spec: FusionJobSpec, references: Sequence[Sample]) -> None:
        """Whether the request's thresholds are as many as each prompt's items."""
        for sample in references if spec.thresholds is not None else ():
            row = prompt_sets.by_id(self._session, sample.prompt_set_id or "")
            items = row.prompts[sample.prompt_index]["items"] if row is not None else ()
            got = len(spec.thresholds or ())
            if row is not None and len(items) != got:
                message = f"expected {len(items)}, one for each item of {sample.prompt!r}, got {got}"
                self.wrong("/thresholds", message, "invalid_request")
                return

    def _check_side_by_side(self, n: int, reference: Sample, base: Sample) -> None:
        if reference.id == base.id:
            self.wrong(f"/pairs/{n}", "expected two samples, got the same twice", "invalid_request")
        for role, row in (("reference", reference), ("base", base)):
            if row.role == SampleRole.TARGET:
                message = "expected a sample that was sampled, got one that was fused"
                self.wrong(f"/pairs/{n}/{role}", message, "invalid_request")
        self._one_base(f"/pairs/{n}", [reference, base])
        if reference.prompt != base.prompt:
            message = f"expected samples of one prompt, got {reference.prompt!r} and {base.prompt!r}"
            self.wrong(f"/pairs/{n}", message, "prompts_differ")

    def _sampling_to_fuse(self, spec: FusionJobSpec, job_id: str) -> tuple[Job, list[Sample], int] | None:
        job = self._found("/sampling", lambda: jobs.get(self._session, job_id), "unknown_job")
        if job is None:
            return None
        if job.kind != JobKind.SAMPLING or job.state != JobState.SUCCEEDED:
            message = f"expected a sampling that has succeeded, got a {job.kind} that is {job.state}"
            self.wrong("/sampling", message, "unsuitable_job")
            return None
        sampled = spec_of(job.kind, job.spec)
        if isinstance(sampled, SamplingJobSpec) and sampled.samples_per_prompt < 2:
            self.wrong("/sampling", "expected at least two samples a prompt, got one", "unsuitable_job")
        if spec.thresholds is not None:
            self.wrong("/thresholds", "one list does not fit all prompts of a sampling; give pairs", "invalid_request")
        self._maps_fit(spec, job)
        page = results.sample_page(self._session, 1, None, job_id)
        if any(sample.trajectory_artifact_id is None for sample in page.rows):
            self.wrong("/sampling", f"the trajectories of {job_id} are not kept", "trajectory_gone")
        return job, page.rows, 0

    def training(self, spec: TrainingJobSpec) -> Checked | None:
        pairs = self._pairs_to_train_on(spec)
        if spec.prefer == "verdicts" and pairs:
            pairs = [pair for pair in pairs if pair.verdict in (Verdict.TARGET, Verdict.BASE)]
            if not pairs:
                self.wrong("/prefer", "expected pairs that a person prefers a side of, got none", "no_pairs")
        if not pairs:
            return None
        samples = results.samples(self._session, results.sides_of(pairs))
        if any(sample.trajectory_artifact_id is None for sample in samples.values()):
            self.wrong("/pairs", "the trajectories of some samples are not kept", "trajectory_gone")
        model = self._model("/model", spec.model)[0] if spec.model else None
        if spec.model is None:
            bases = [samples[pair.base_id] for pair in pairs]
            model = self._one_model("/pairs", bases, "; or give `model`, the one to be trained")
        self._one_base("/pairs", samples.values(), model)
        sampled = {samples[pair.base_id].job_id for pair in pairs} | {samples[p.reference_id].job_id for p in pairs}
        configs = {_sampling_of(jobs.get(self._session, job_id)) for job_id in sampled}
        self._adapter_is_kept(model, spec.training)
        if len(configs) > 1:
            self.wrong("/pairs", "expected samples made with the same steps, guidance, eta and size", "invalid_request")
        if spec.prefer == "verdicts" and spec.training.algorithm != "dpo":
            self.wrong(
                "/prefer",
                f"verdicts say which side is better, which {spec.training.algorithm} does not learn from",
                "invalid_request",
            )
        return Checked(spec, Sizes(self._settings.shard_prompts, pairs=len(pairs), sampling=configs.pop()), model)

    def _one_base(self, pointer: str, samples: Iterable[Sample], model: Model | None = None) -> None:
        """Latents of another base model mean something else, even where their shapes agree."""
        bases = {results.get_model(self._session, model_id).base for model_id in {s.model_id for s in samples}}
        bases |= {model.base} if model is not None else set()
        if len(bases) > 1:
            self.wrong(pointer, f"expected samples of one base model, got {sorted(bases)}", "models_differ")

    def _pairs_to_train_on(self, spec: TrainingJobSpec) -> list[Pair]:
        found: list[Pair] = []
        for n, pair_id in enumerate(spec.pairs or ()):
            get = lambda pair_id=pair_id: results.get_pair(self._session, pair_id)  # noqa: E731
            pair = self._found(f"/pairs/{n}", get, "unknown_pair")
            if pair is not None and pair.adopted is None:
                self.wrong(f"/pairs/{n}", f"{pair.id} is still being made", "unsuitable_pair")
            if pair is not None and pair.id in {other.id for other in found}:
                self.wrong(f"/pairs/{n}", "expected each pair once", "invalid_request")
            found += [pair] if pair else []
        for n, job_id in enumerate(spec.jobs or ()):
            job = self._found(f"/jobs/{n}", lambda job_id=job_id: jobs.get(self._session, job_id), "unknown_job")  # type: ignore[misc]
            of_job = results.job_pairs(self._session, job.id) if job else []
            if job is not None and not of_job:
                self.wrong(f"/jobs/{n}", f"{job.id} has no pairs", "no_pairs")
            if {pair.id for pair in of_job} & {pair.id for pair in found}:
                self.wrong(f"/jobs/{n}", "expected each job once", "invalid_request")
            found += of_job
        return found

    def evaluation(self, spec: EvaluationJobSpec) -> Checked | None:
        found = [self._model(f"/models/{n}", name) for n, name in enumerate(spec.models)]
        models = [model for model, _ in found if model is not None]
        if len({model.id for model in models}) < len(models):
            self.wrong("/models", "expected different models, got one under two names", "invalid_request")
        sets = [self._prompt_set(f"/prompt_sets/{n}", name) for n, name in enumerate(spec.prompt_sets or ())]
        new_set = prompt_sets.unsaved(spec.prompts) if spec.prompts else None
        names = [row.name or row.id for row in sets if row is not None]
        if len(set(names)) < len(names):
            self.wrong("/prompt_sets", f"expected each set once, got {names}", "invalid_request")
        if OWN_PROMPTS in names and new_set is not None:
            message = f"{OWN_PROMPTS!r} is what the prompts of the request are called: measure that set by itself"
            self.wrong("/prompt_sets", message, "invalid_request")
        for base in {base.name: base for _, base in found if base}.values():
            self._fits_sampling(base, spec.sampling)
            self._fits_prompts("/prompts", base, new_set)
            for n, row in enumerate(sets):
                self._fits_prompts(f"/prompt_sets/{n}", base, row)
        usual: tuple[str, ...] = tuple(
            dict.fromkeys(s for _, base in found if base for s in (base.scorers or (base.reward,)) if s)
        )
        scorers = spec.scorers or usual
        if not scorers:
            self.wrong("/scorers", "the models have no scorers of their own; name some", "unknown_scorer")
        self._scorer_list("/scorers", scorers)
        rows = [row for row in (*sets, new_set) if row is not None]
        measured = tuple(
            PromptsToMeasure(row.name or (OWN_PROMPTS if row is new_set else row.id), row.id, len(row.prompts))
            for row in rows
        )
        images = sum(one.prompts for one in measured) * spec.samples_per_prompt * len(models)
        self._limit("/samples_per_prompt", images)
        if not models:
            return None
        ids = tuple(model.id for model in models)
        sizes = Sizes(self._settings.shard_prompts, models=ids, measured=measured)
        return Checked(spec.model_copy(update={"scorers": scorers}), sizes, models[0], None, None, new_set)

    def export(self, spec: ExportJobSpec) -> Checked | None:
        if spec.job is not None:
            job = self._found("/job", lambda: jobs.get(self._session, spec.job or ""), "unknown_job")
            if job is not None and not results.pair_page(self._session, 1, None, job.id).rows:
                self.wrong("/job", f"{job.id} has no pairs", "no_pairs")
            return Checked(spec, Sizes(self._settings.shard_prompts))
        model, _ = self._model("/model", spec.model or "")
        if model is not None and model.adapter_artifact_id is None:
            self.wrong("/model", f"{spec.model} is a base model: it has no adapter to export", "no_adapter")
        return Checked(spec, Sizes(self._settings.shard_prompts), model)

    def _adapter_is_kept(self, model: Model | None, training: TrainingConfig) -> None:
        """A training that goes on from an adapter has that adapter's rank and alpha, whatever is asked for."""
        if model is not None and model.adapter_artifact_id is not None and training.lora != LoraConfig():
            message = f"{model.id} has an adapter, whose rank and alpha are kept: leave lora out"
            self.wrong("/training/lora", message, "adapter_is_kept")

    def _found(self, pointer: str, get: Callable[[], T], code: str) -> T | None:
        try:
            return get()
        except NotFoundError as error:
            self.wrong(pointer, str(error), code)
            return None

    def _model(self, pointer: str, name: str) -> tuple[Model | None, BaseModel | None]:
        row = results.find_model(self._session, name)
        base = self._catalogue.models.get(row.base) if row else None
        if row is None or base is None:
            names = ", ".join(sorted(self._catalogue.models))
            message = f"unknown model {name!r}; expected one of {names}, an alias, or a model's id"
            self.wrong(pointer, message, "unknown_model")
        return row, base

    def _one_model(self, pointer: str, samples: Iterable[Sample], advice: str = "") -> Model | None:
        ids = {sample.model_id for sample in samples}
        if len(ids) != 1:
            self.wrong(pointer, f"expected samples of one model, got {sorted(ids)}{advice}", "models_differ")
            return None
        return results.get_model(self._session, ids.pop())

    def _prompts(self, spec: SamplesSpec) -> tuple[PromptSet | None, PromptSet | None]:
        """The set that is named or given, and the same again if it is new."""
        if spec.prompts is not None:
            new = prompt_sets.unsaved(spec.prompts)
            return new, new
        return self._prompt_set("/prompt_set", spec.prompt_set), None

    def _prompt_set(self, pointer: str, name: str | None) -> PromptSet | None:
        if name is None:
            return None
        is_id = kind_of(name) is IdKind.PROMPT_SET
        row = prompt_sets.by_id(self._session, name) if is_id else prompt_sets.latest(self._session, name)
        if row is None:
            self.wrong(pointer, "unknown prompt set; GET /prompt-sets lists those there are", "unknown_prompt_set")
        return row

    def _fits_prompts(self, pointer: str, base: BaseModel | None, prompt_set: PromptSet | None) -> None:
        """Whether the model's tokenizer takes the prompts; nothing is said while its files are not here."""
        facts = self._catalogue.facts(base.name) if base else None
        if base is None or facts is None or facts.prompt_length is None or prompt_set is None:
            return
        most = facts.prompt_length.most
        for n, prompt in enumerate(prompt_set.prompts):
            count = facts.prompt_length.of(prompt["text"])
            if count > most and pointer == "/prompts":
                message = f"{base.name} takes prompts of at most {most} tokens, got {count}"
                self.wrong(f"{pointer}/{n}/text", message, "prompt_too_long")
            elif count > most:
                message = f"{base.name} takes prompts of at most {most} tokens, prompt {n} of the set has {count}"
                self.wrong(pointer, message, "prompt_too_long")

    def _fits_steps(self, fusion: FusionConfig, sampling: SamplingConfig) -> None:
        if not fusion.steps(sampling.num_steps):
            message = f"expected less than the samples' {sampling.num_steps} steps, got {fusion.first_step}"
            self.wrong("/fusion/first_step", message, "invalid_request")

    def _fits_sampling(self, base: BaseModel | None, sampling: SamplingConfig) -> None:
        """Whether the model can sample so; nothing is said while its files are not here."""
        facts = self._catalogue.facts(base.name) if base else None
        if base is None or facts is None:
            return
        for setting, problem in facts.sampling_problems(sampling):
            self.wrong(f"/sampling/{setting}", f"{base.name}: {problem}", "unsuitable_sampling")

    def _fits_layers(self, base: BaseModel | None, fusion: FusionConfig | None) -> None:
        """Whether the model's U-Net has the layers."""
        facts = self._catalogue.facts(base.name) if base else None
        if facts is None or fusion is None:
            return
        try:
            facts.require_layers(fusion)
        except LayerNotFoundError as error:
            self.wrong("/fusion/layers", str(error), "unknown_layer")

    def _scorers(
        self, pointer: str, given: Sequence[ScorerRef] | None, base: BaseModel | None, reward: ScorerRef | None
    ) -> tuple[ScorerRef, ...] | None:
        """Those that are given, or else the model's usual ones, or else the reward."""
        if given is not None:
            self._scorer_list(pointer, given)
            return tuple(given)
        return (base.scorers if base else ()) or ((reward,) if reward else None)

    def _scorer_list(self, pointer: str, scorers: Sequence[ScorerRef]) -> None:
        if len(set(scorers)) < len(scorers):
            self.wrong(pointer, "expected each scorer once", "invalid_request")
        for n, scorer in enumerate(scorers):
            self._scorer(f"{pointer}/{n}", scorer)

    def _scorer(self, pointer: str, scorer: ScorerRef, without: str = "") -> None:
        if isinstance(scorer, WeightedScorerConfig):
            for n, part in enumerate(scorer.parts):
                self._scorer(f"{pointer}/parts/{n}/scorer", part.scorer)
        elif scorer not in self._catalogue.scorers:
            names = ", ".join(sorted(self._catalogue.scorers))
            got = f"unknown scorer {scorer!r}" if scorer else without
            self.wrong(pointer, f"{got}; expected one of {names}", "unknown_scorer")

    def _limit_images(self, prompt_set: PromptSet | None, samples_per_prompt: int) -> None:
        self._limit("/samples_per_prompt", (len(prompt_set.prompts) if prompt_set else 0) * samples_per_prompt)

    def _limit(self, pointer: str, images: int) -> None:
        most = self._settings.max_images_per_round
        if images > most:
            self.wrong(pointer, f"expected at most {most} images, got {images}", "too_many_images")


def _sampling_of(job: Job) -> SamplingConfig:
    """How the job's samples were made."""
    spec = spec_of(job.kind, job.spec)
    return spec.sampling if isinstance(spec, SamplesSpec) else SamplingConfig()
