"""What the service does for its clients: check a request, make a job of it, call it off."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api.core import execution, limits
from api.core.catalogue import BaseModel, Catalogue
from api.core.errors import FieldProblem, IdempotencyError, InvalidRequestError
from api.core.ids import IdKind, kind_of
from api.core.migrate import migrate
from api.core.planning import Counts, count, plan_start, total_work
from api.core.queries import jobs, prompt_sets, results, stages
from api.core.settings import Settings
from api.core.specs import RoundSpec
from api.core.storage import FileStore
from api.core.tables import Job, Model, PromptSet
from api.core.unit_of_work import UnitOfWork
from dfusion.prompts import Prompt, builtin_lists


@dataclass(frozen=True)
class Service:
    """An installation: its settings, database, store and catalogue."""

    settings: Settings
    uow: UnitOfWork
    store: FileStore
    catalogue: Catalogue

    @classmethod
    def open(cls, settings: Settings) -> Service:
        """Open the installation, bringing its database up to date. Raises StartError."""
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        uow = UnitOfWork.connect(settings.database)
        catalogue = Catalogue.of(settings)
        migrate(uow.engine, settings.data_dir / "migrate.lock")
        with uow.writing() as session:
            prompt_sets.ensure_builtin(session, builtin_lists().values())
            results.ensure_base_models(session, catalogue.models)
        return cls(settings, uow, FileStore(settings.data_dir / "artifacts"), catalogue)

    def close(self) -> None:
        """Give the database's connections back."""
        self.uow.close()


@dataclass(frozen=True)
class _Checked:
    """A spec with its defaults filled in, and what it names."""

    spec: RoundSpec
    model: Model
    prompts: Sequence[Prompt]
    prompt_set: PromptSet | None
    held_out_set: PromptSet | None

    @property
    def held_out_prompts(self) -> int:
        return 0 if self.held_out_set is None else len(self.held_out_set.prompts)


def estimate_round(service: Service, spec: RoundSpec) -> Counts:
    """What the job would take. Raises InvalidRequestError as `create_round` does; makes nothing."""
    with service.uow.reading() as session:
        checked = _check(service, session, spec)
        return count(checked.spec, len(checked.prompts), checked.held_out_prompts)


def create_round(service: Service, spec: RoundSpec, key: str | None = None, api_key_id: str | None = None) -> str:
    """The id of a new job with its first stages, or of the one that the same request made under the same key.

    Raises InvalidRequestError, IdempotencyError where the key came with another request before, or OverloadError.
    """
    key = _own_key(key, api_key_id)
    try:
        with service.uow.writing() as session:
            return _create_round(service, session, spec, key, api_key_id)
    except IntegrityError:  # the same key at the same moment, on a database that writes in parallel
        with service.uow.writing() as session:
            return _create_round(service, session, spec, key, api_key_id)


def _own_key(key: str | None, api_key_id: str | None) -> str | None:
    """An Idempotency-Key as it is stored: callers that choose the same do not meet."""
    if key is None or api_key_id is None:
        return key
    return hashlib.sha256(f"{api_key_id} {key}".encode()).hexdigest()


def _create_round(service: Service, session: Session, spec: RoundSpec, key: str | None, api_key_id: str | None) -> str:
    fingerprint = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
    known = None if key is None else jobs.by_key(session, key)
    if known is not None:
        if known.fingerprint != fingerprint:
            raise IdempotencyError("this Idempotency-Key came with another request before")
        return known.job_id
    checked = _check(service, session, spec)
    limits.require_room(session, service.settings, api_key_id)
    job = _insert(service, session, checked)
    job.api_key_id = api_key_id
    if key is not None:
        jobs.add_key(session, key, fingerprint, job.id)
    return job.id


def _insert(service: Service, session: Session, checked: _Checked) -> Job:
    spec, shard_prompts = checked.spec, service.settings.shard_prompts
    sizes = (len(checked.prompts), checked.held_out_prompts, shard_prompts)
    prompt_set = checked.prompt_set or prompt_sets.add(session, checked.prompts)
    job = jobs.add(
        session,
        spec=spec.model_dump(mode="json"),
        label=spec.label,
        rounds=spec.rounds,
        model_id=checked.model.id,
        prompt_set_id=prompt_set.id,
        held_out_prompt_set_id=checked.held_out_set.id if checked.held_out_set else None,
        work_total=total_work(spec, *sizes),
    )
    stages.add(session, job.id, plan_start(spec, *sizes))
    jobs.add_event(session, job.id, "job.created", "the job is queued")
    return job


def cancel_job(service: Service, job_id: str) -> None:
    """Call a job off; one that has ended stays as it is. Raises NotFoundError."""
    with service.uow.writing() as session:
        execution.cancel(session, jobs.get(session, job_id).id)


def _check(service: Service, session: Session, spec: RoundSpec) -> _Checked:
    """The spec against what there is. Raises InvalidRequestError with all that is wrong."""
    problems: list[FieldProblem] = []
    codes: list[str] = []

    def wrong(pointer: str, message: str, code: str) -> None:
        problems.append(FieldProblem(pointer, message))
        codes.append(code)

    model, base = _find_model(service, session, spec.model)
    if model is None or base is None:
        names = ", ".join(sorted(service.catalogue.models))
        wrong("/model", f"unknown model {spec.model!r}; expected one of {names}, or a model's id", "unknown_model")
    found = {
        pointer: _find_prompt_set(session, name)
        for pointer, name in (("/prompt_set", spec.prompt_set), ("/held_out_prompt_set", spec.held_out_prompt_set))
        if name is not None
    }
    for pointer, row in found.items():
        if row is None:
            wrong(pointer, "unknown prompt set; GET /prompt-sets lists those there are", "unknown_prompt_set")
    filled = _with_scorers(spec, base)
    for pointer, name in _named_scorers(filled):
        if name not in service.catalogue.scorers:
            names = ", ".join(sorted(service.catalogue.scorers))
            got = f"unknown scorer {name!r}" if name else "the model has no scorer of its own"
            wrong(pointer, f"{got}; expected one of {names}", "unknown_scorer")
    row = found.get("/prompt_set")
    prompts = spec.prompts or (prompt_sets.prompts_of(row) if row else ())
    most = service.settings.max_images_per_round
    if len(prompts) * spec.samples_per_prompt > most:
        wrong("/samples_per_prompt", f"more than {most} images a round", "too_many_images")
    if problems or model is None:
        raise InvalidRequestError("; ".join(p.message for p in problems), *problems, code=codes[0])
    return _Checked(filled, model, prompts, row, found.get("/held_out_prompt_set"))


def _find_model(service: Service, session: Session, name: str) -> tuple[Model | None, BaseModel | None]:
    if kind_of(name) is IdKind.MODEL:
        row = session.get(Model, name)
    else:
        row = results.base_model(session, name)
    return row, service.catalogue.models.get(row.base) if row else None


def _find_prompt_set(session: Session, name: str) -> PromptSet | None:
    is_id = kind_of(name) is IdKind.PROMPT_SET
    return prompt_sets.by_id(session, name) if is_id else prompt_sets.latest(session, name)


def _with_scorers(spec: RoundSpec, base: BaseModel | None) -> RoundSpec:
    """The spec with reward and scorers named; where nobody says which, they stay open."""
    reward = spec.reward or (base.reward if base else None)
    evaluation = spec.evaluation
    if evaluation is not None and evaluation.scorers is None:
        scorers = (base.scorers if base else ()) or ((reward,) if reward else None)
        evaluation = evaluation.model_copy(update={"scorers": scorers})
    return spec.model_copy(update={"reward": reward, "evaluation": evaluation})


def _named_scorers(spec: RoundSpec) -> list[tuple[str, str]]:
    named = [("/reward", spec.reward or "")]
    if spec.evaluation is not None:
        named += [(f"/evaluation/scorers/{i}", name) for i, name in enumerate(spec.evaluation.scorers or ())]
    return named
