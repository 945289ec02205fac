"""Queries over what jobs make: artifacts, samples, scores, pairs, models and metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from sqlalchemy import bindparam, func, inspect, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db.clock import now_seconds
from service.db.queries.pages import Filters, Page, fetch_page
from service.db.tables import Artifact, Export, Job, Metric, Model, ModelAlias, Pair, Sample, Score, Table
from service.errors import NotFoundError
from service.ids import IdKind, expect, kind_of, new_id
from service.states import SampleRole, Verdict

_MOST_IDS = 1000
# made once, as requests for a job run it: to make it takes about as long as to run it
_NAMED = select(Model).where(Model.name == bindparam("name"))
_MADE = {Sample: Job.samples_made, Pair: Job.pairs_made, Model: Job.models_made}


def add_all(session: Session, rows: Iterable[Table]) -> None:
    """Insert copies of the rows now, so that later ones may refer to them; the jobs that made them count them.

    Copies, since a session changes what it inserts (times by the database's clock, whether it is there): where the
    transaction is not kept, the same rows are inserted again by the next.
    """
    rows = list(rows)
    session.add_all(_copy(row) for row in rows)
    session.flush()
    counted = [row for row in rows if isinstance(row, (Sample, Pair, Model)) and row.job_id is not None]
    made = Counter((row.job_id, _MADE[type(row)].key) for row in counted)
    for (job_id, name), number in made.items():
        query = update(Job).where(Job.id == job_id).values({name: getattr(Job, name) + number})
        session.execute(query, execution_options={"synchronize_session": False})


def add_scores(session: Session, rows: Sequence[Score]) -> None:
    """Insert those scores that nobody else has inserted meanwhile: equal images have equal scores."""
    known = {
        (row.sample_id, row.scorer, row.version)
        for found in scores(session, [r.sample_id for r in rows]).values()
        for row in found
    }
    for row in rows:
        if (row.sample_id, row.scorer, row.version) not in known:
            try:
                with session.begin_nested():
                    add_all(session, [row])
            except IntegrityError:  # at the same moment, on a database that writes in parallel
                continue


def _copy(row: Table) -> Table:
    given = inspect(row).dict
    return type(row)(**{name: given[name] for name in inspect(type(row)).column_attrs.keys() if name in given})


def _parts(ids: Iterable[str]) -> Iterator[list[str]]:
    """Distinct ids, so many at a time as any database takes in one statement."""
    distinct = sorted(set(ids))
    for start in range(0, len(distinct), _MOST_IDS):
        yield distinct[start : start + _MOST_IDS]


def get_artifact(session: Session, artifact_id: str) -> Artifact:
    """Raises NotFoundError."""
    row = session.get(Artifact, expect(IdKind.ARTIFACT, artifact_id))
    if row is None:
        raise NotFoundError(f"there is no artifact {artifact_id}")
    return row


def artifacts(session: Session, ids: Iterable[str]) -> dict[str, Artifact]:
    """The artifacts of these ids, by id."""
    found = (session.scalars(select(Artifact).where(Artifact.id.in_(part))) for part in _parts(ids))
    return {row.id: row for rows in found for row in rows}


def get_sample(session: Session, sample_id: str) -> Sample:
    """Raises NotFoundError."""
    row = session.get(Sample, expect(IdKind.SAMPLE, sample_id))
    if row is None:
        raise NotFoundError(f"there is no sample {sample_id}")
    return row


def samples(session: Session, ids: Iterable[str]) -> dict[str, Sample]:
    """The samples of these ids, by id."""
    found = (session.scalars(select(Sample).where(Sample.id.in_(part))) for part in _parts(ids))
    return {row.id: row for rows in found for row in rows}


def round_images(
    session: Session, job_id: str, round_number: int, roles: Sequence[str]
) -> list[tuple[Sample, Artifact]]:
    """The round's samples of these roles with their images, by prompt and number."""
    query = select(Sample, Artifact).join(Artifact, Artifact.id == Sample.image_artifact_id)
    query = query.where(Sample.job_id == job_id, Sample.round == round_number, Sample.role.in_(roles))
    ordered = query.order_by(Sample.prompt_index, Sample.number, Sample.id)
    return [(sample, artifact) for sample, artifact in session.execute(ordered)]


def sample_page(
    session: Session,
    limit: int,
    cursor: str | None,
    job_id: str | None = None,
    role: str | None = None,
    round_number: int | None = None,
    prompt_set_id: str | None = None,
) -> Page[Sample]:
    """Samples, oldest first."""
    equal: Filters = {
        Sample.job_id: job_id,
        Sample.prompt_set_id: prompt_set_id,
        Sample.round: round_number,
        Sample.role: role,
    }
    return fetch_page(session, select(Sample), Sample.id, limit, cursor, equal=equal)


def score_histories(
    session: Session, job_ids: Iterable[str], up_to_round: int
) -> dict[tuple[str, str], dict[str, list[float]]]:
    """What each scorer gave the samples that the policy itself sampled, oldest round first.

    Returns:
        By scorer and version, then by prompt: the scores in the order of the samples.
    """
    roles = (SampleRole.PLAIN, SampleRole.REFERENCE, SampleRole.BASE)
    query = select(Score.scorer, Score.version, Sample.prompt, Score.value).join(Score, Score.sample_id == Sample.id)
    query = query.where(Sample.job_id.in_(list(job_ids)), Sample.role.in_(roles), Sample.round <= up_to_round)
    ordered = query.order_by(Sample.round, Sample.job_id, Sample.prompt_index, Sample.number, Sample.id)

    histories: dict[tuple[str, str], dict[str, list[float]]] = {}
    for scorer, version, prompt, value in session.execute(ordered):
        histories.setdefault((scorer, version), {}).setdefault(prompt, []).append(value)
    return histories


def samples_of_job(session: Session, job_id: str, round_number: int, role: str) -> list[Sample]:
    """The round's samples of a role, by split, prompt and number."""
    query = select(Sample).where(Sample.job_id == job_id, Sample.round == round_number, Sample.role == role)
    return list(session.scalars(query.order_by(Sample.split, Sample.prompt_index, Sample.number, Sample.id)))


def mark_paired(session: Session, job_id: str, round_number: int) -> None:
    """Give the round's own samples that are in pairs their roles; those of other jobs keep theirs."""
    for column, role in ((Pair.reference_id, SampleRole.REFERENCE), (Pair.base_id, SampleRole.BASE)):
        inside = select(column).where(Pair.job_id == job_id, Pair.round == round_number)
        query = update(Sample).where(Sample.job_id == job_id, Sample.id.in_(inside)).values(role=role)
        session.execute(query, execution_options={"synchronize_session": False})


def scores(session: Session, sample_ids: Iterable[str]) -> dict[str, list[Score]]:
    """All scores of these samples, by sample."""
    found: dict[str, list[Score]] = {sample_id: [] for sample_id in sample_ids}
    for part in _parts(found):
        query = select(Score).where(Score.sample_id.in_(part)).order_by(Score.scorer, Score.version)
        for row in session.scalars(query):
            found[row.sample_id].append(row)
    return found


def get_pair(session: Session, pair_id: str) -> Pair:
    """Raises NotFoundError."""
    row = session.get(Pair, expect(IdKind.PAIR, pair_id))
    if row is None:
        raise NotFoundError(f"there is no pair {pair_id}")
    return row


def pair_page(
    session: Session,
    limit: int,
    cursor: str | None,
    job_id: str | None = None,
    round_number: int | None = None,
    adopted: bool | None = None,
    judged: bool | None = None,
    prompt_set_id: str | None = None,
) -> Page[Pair]:
    """Pairs, oldest first."""
    query = select(Pair)
    if judged is not None:
        query = query.where(Pair.verdict.is_not(None) if judged else Pair.verdict.is_(None))
    equal: Filters = {
        Pair.job_id: job_id,
        Pair.prompt_set_id: prompt_set_id,
        Pair.round: round_number,
        Pair.adopted: adopted,
    }
    return fetch_page(session, query, Pair.id, limit, cursor, equal=equal)


def pairs_with(session: Session, sample_id: str) -> list[Pair]:
    """The pairs that a sample is in (a reference may be in several)."""
    inside = or_(Pair.reference_id == sample_id, Pair.base_id == sample_id, Pair.target_id == sample_id)
    return list(session.scalars(select(Pair).where(inside).order_by(Pair.id)))


def round_pairs(
    session: Session,
    job_id: str,
    round_number: int,
    prompts: tuple[int, int] | None = None,
    numbers: tuple[int, int] | None = None,
) -> list[Pair]:
    """The round's pairs in order, of all prompts and numbers or of those from one up to, not including, another."""
    query = select(Pair).where(Pair.job_id == job_id, Pair.round == round_number)
    for column, span in ((Pair.prompt_index, prompts), (Pair.number, numbers)):
        if span is not None:
            query = query.where(column >= span[0], column < span[1])
    return list(session.scalars(query.order_by(Pair.number)))


def sides_of(pairs: Sequence[Pair]) -> set[str]:
    """The ids of all samples of these pairs."""
    found = {sample_id for pair in pairs for sample_id in (pair.reference_id, pair.base_id)}
    return found | {pair.target_id for pair in pairs if pair.target_id is not None}


def job_pairs(session: Session, job_id: str) -> list[Pair]:
    """All pairs of a job whose targets are verified, round by round."""
    query = select(Pair).where(Pair.job_id == job_id, Pair.adopted.is_not(None))
    return list(session.scalars(query.order_by(Pair.round, Pair.number)))


def pairs(session: Session, ids: Sequence[str]) -> list[Pair]:
    """The pairs of these ids that there are, in their order."""
    found = (session.scalars(select(Pair).where(Pair.id.in_(part))) for part in _parts(ids))
    by_id = {row.id: row for rows in found for row in rows}
    return [by_id[i] for i in ids if i in by_id]


def lock_pair(session: Session, pair_id: str) -> Pair:
    """The pair as it is now, held until the transaction ends."""
    query = select(Pair).where(Pair.id == pair_id).with_for_update().execution_options(populate_existing=True)
    return session.scalars(query).one()


def set_verdict(session: Session, pair: Pair, verdict: Verdict | None, reviewer: str | None) -> None:
    """Write a person's word on a pair."""
    pair.verdict, pair.verdict_by = verdict, reviewer if verdict is not None else None
    pair.verdict_at = session.scalars(select(now_seconds())).one() if verdict is not None else None
    pair.revision += 1
    session.flush()


def pairs_without_verdict(session: Session, job_id: str) -> int:
    """How many pairs of the job's newest round nobody has judged yet."""
    newest = select(func.max(Pair.round)).where(Pair.job_id == job_id).scalar_subquery()
    query = select(func.count()).select_from(Pair).where(Pair.job_id == job_id, Pair.round == newest)
    return session.scalar(query.where(Pair.verdict.is_(None))) or 0


def update_pair(session: Session, pair_id: str, values: Mapping[str, object]) -> None:
    """Write what became of a pair."""
    session.execute(update(Pair).where(Pair.id == pair_id).values(dict(values)))


def get_model(session: Session, model_id: str) -> Model:
    """Raises NotFoundError."""
    row = session.get(Model, expect(IdKind.MODEL, model_id))
    if row is None:
        raise NotFoundError(f"there is no model {model_id}")
    return row


def base_model(session: Session, name: str) -> Model | None:
    """The row of the catalogue's model of that name."""
    return session.scalar(_NAMED, {"name": name})


def find_model(session: Session, name: str) -> Model | None:
    """The model of that id, base model's name or alias."""
    if kind_of(name) is IdKind.MODEL:
        return session.get(Model, name)
    aliased = select(Model).join(ModelAlias, ModelAlias.model_id == Model.id).where(ModelAlias.name == name)
    return base_model(session, name) or session.scalar(aliased)


def aliases(session: Session, model_ids: Iterable[str]) -> dict[str, list[str]]:
    """The aliases of these models, by model."""
    found: dict[str, list[str]] = {model_id: [] for model_id in model_ids}
    query = select(ModelAlias).where(ModelAlias.model_id.in_(list(found))).order_by(ModelAlias.name)
    for row in session.scalars(query):
        found[row.model_id].append(row.name)
    return found


def set_alias(session: Session, name: str, model_id: str) -> None:
    """Let the name mean that model."""
    now = session.scalars(select(now_seconds())).one()
    session.merge(ModelAlias(name=name, model_id=model_id, updated_at=now))
    session.flush()


def remove_alias(session: Session, name: str) -> bool:
    """Let the name mean nothing; whether it meant something."""
    row = session.get(ModelAlias, name)
    if row is not None:
        session.delete(row)
    return row is not None


def exports(session: Session, model_id: str | None = None, of_job_id: str | None = None) -> list[Export]:
    """The exports of a model or of a job's pairs, newest first."""
    query = select(Export).where(Export.model_id == model_id if model_id else Export.of_job_id == of_job_id)
    return list(session.scalars(query.order_by(Export.id.desc())))


def ensure_base_models(session: Session, names: Iterable[str]) -> None:
    """Add rows for the catalogue's models that have none yet."""
    for name in names:
        if base_model(session, name) is None:
            row = Model(id=new_id(IdKind.MODEL), name=name, base=name, figures={}, created_at=now_seconds())
            add_all(session, [row])


def model_before(session: Session, job: Job, round_number: int) -> Model:
    """The model that a round of the job samples from: the last one trained before it, or the job's first."""
    query = select(Model).where(Model.job_id == job.id, Model.round < round_number)
    found = session.scalar(query.order_by(Model.round.desc()).limit(1))
    if found is not None:
        return found
    if job.model_id is None:
        raise NotFoundError(f"{job.id} starts from no model")
    return get_model(session, job.model_id)


def model_page(session: Session, limit: int, cursor: str | None, job_id: str | None = None) -> Page[Model]:
    """Models, newest first."""
    query = select(Model)
    if job_id is not None:
        query = query.where(Model.job_id == job_id)
    return fetch_page(session, query, Model.id, limit, cursor, newest_first=True)


def lineage(session: Session, model: Model) -> list[Model]:
    """The model and what it came from, down to the base model."""
    line = [model]
    while line[-1].parent_id is not None:
        line.append(get_model(session, line[-1].parent_id))
    return line


def models_of_job(session: Session, job_id: str) -> list[Model]:
    """The models that the job trained, by round."""
    return list(session.scalars(select(Model).where(Model.job_id == job_id).order_by(Model.round)))


def metrics(session: Session, job_id: str) -> list[Metric]:
    """The job's metrics by round, split and scorer."""
    query = select(Metric).where(Metric.job_id == job_id)
    return list(session.scalars(query.order_by(Metric.round, Metric.split, Metric.scorer)))
