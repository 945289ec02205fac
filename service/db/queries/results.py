"""Queries over the results of jobs: artifacts, samples, scores, pairs, models, exports and metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Row, bindparam, func, insert, inspect, literal, or_, select, update
from sqlalchemy import Table as SqlTable
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from service.db.clock import now_seconds
from service.db.queries import jobs
from service.db.queries.pages import (
    ALWAYS,
    MAX_READ,
    ColumnValues,
    Page,
    Period,
    encode_cursor,
    fetch_page,
    first_of,
    id_after,
    span_of,
    unindexed,
)
from service.db.queries.rows import UNSYNCED, get_row, is_any_of, is_kept, select_by_ids
from service.db.tables import (
    Artifact,
    Export,
    Job,
    Metric,
    Model,
    ModelAlias,
    Pair,
    Sample,
    Score,
    Table,
)
from service.errors import NotFoundError
from service.ids import IdKind, kind_of, new_id
from service.states import BEST, SampleRole

# built once, since requests for jobs run it and building it takes about as long as running it
_BY_NAME = select(Model).where(Model.name == bindparam("name"))
R = TypeVar("R", Sample, Pair, Model, Export)
P = TypeVar("P", Sample, Pair)
_TABLES = Table.metadata.sorted_tables
"""All tables, those that others reference first."""
_COUNTERS = {Sample: Job.samples_made, Pair: Job.pairs_made, Model: Job.models_made, Artifact: Job.storage_bytes}
"""The running sums of jobs: numbers of rows, and bytes of artifacts."""


@dataclass(frozen=True)
class ScoreFilter:
    """Scores by a scorer, from `low` to `high`; None is no bound."""

    scorer: str
    low: float | None = None
    high: float | None = None

    def bounds(self, value: InstrumentedAttribute[Any]) -> list[ColumnElement[bool]]:
        """The bounds as conditions."""
        lower = [] if self.low is None else [value >= self.low]
        upper = [] if self.high is None else [value <= self.high]
        return lower + upper


def add_all(session: Session, rows: Iterable[Table]) -> None:
    """Insert the rows, and update the running sums of their jobs.

    Rows of one table with the same columns are one statement. They do not become objects of the session, so that a
    retried transaction can insert them again.
    """
    rows = list(rows)
    session.flush()
    for table, group in _by_table(rows):
        session.execute(insert(table).values(group.computed), group.values)

    # the running sums
    sums: dict[str, Counter[str]] = {}
    for row in rows:
        if isinstance(row, (Sample, Pair, Model, Artifact)) and row.job_id is not None:
            of_job = sums.setdefault(row.job_id, Counter())
            of_job[_COUNTERS[type(row)].key] += row.size_bytes if isinstance(row, Artifact) else 1
    for job_id, of_job in sums.items():
        totals = {name: getattr(Job, name) + amount for name, amount in of_job.items()}
        session.execute(update(Job).where(Job.id == job_id).values(totals), execution_options=UNSYNCED)


@dataclass
class _Group:
    """Rows of one table with the same columns: those that the database computes, and the values of the others."""

    computed: dict[str, ColumnElement[Any]]
    values: list[dict[str, Any]]


def _by_table(rows: Iterable[Table]) -> list[tuple[SqlTable, _Group]]:
    """The rows by table and columns, tables that others reference first."""
    groups: dict[tuple[str, object], _Group] = {}
    for row in rows:
        values = _values(row)
        computed = {name: value for name, value in values.items() if isinstance(value, ColumnElement)}
        literals = {name: value for name, value in values.items() if name not in computed}
        columns = (frozenset(literals), frozenset((name, type(value)) for name, value in computed.items()))
        groups.setdefault((row.__tablename__, columns), _Group(computed, [])).values.append(literals)

    return [(table, group) for table in _TABLES for (name, _), group in groups.items() if name == table.name]


def _values(row: Table) -> dict[str, Any]:
    """The values of a new row by column, without those that were not given."""
    given = inspect(row).dict
    return {name: given[name] for name in inspect(type(row)).column_attrs.keys() if name in given}


def add_scores(session: Session, rows: Sequence[Score]) -> None:
    """Insert the scores that are missing. Another worker may insert equal ones concurrently."""
    if not rows:
        return

    session.flush()
    new = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    ordered = sorted(rows, key=_score_key)  # so that transactions that insert the same scores cannot deadlock
    session.execute(new(Score).on_conflict_do_nothing(), [_values(row) for row in ordered])


def _score_key(row: Score) -> tuple[str, str, str]:
    return row.sample_id, row.scorer, row.version


def get_artifact(session: Session, artifact_id: str) -> Artifact:
    """The artifact. Raises NotFoundError."""
    return get_row(session, Artifact, IdKind.ARTIFACT, artifact_id)


def artifacts(session: Session, ids: Iterable[str]) -> dict[str, Artifact]:
    """The artifacts with these ids, by id. Unknown ids are left out."""
    return {row.id: row for row in select_by_ids(session, Artifact, Artifact.id, ids)}


def get_sample(session: Session, sample_id: str) -> Sample:
    """The sample. Raises NotFoundError."""
    return get_row(session, Sample, IdKind.SAMPLE, sample_id)


def samples(session: Session, ids: Iterable[str]) -> dict[str, Sample]:
    """The samples with these ids, by id. Unknown ids are left out."""
    return {row.id: row for row in select_by_ids(session, Sample, Sample.id, ids)}


def round_samples(
    session: Session,
    job_id: str,
    round_number: int,
    roles: Sequence[str],
    prompts: tuple[int, int] | None = None,
) -> list[Sample]:
    """The samples of a round with these roles, by prompt and number.

    Args:
        session: A view of the database.
        job_id: The job.
        round_number: The round.
        roles: The roles.
        prompts: The range [start, stop) of prompt indices; None is all.
    """
    query = select(Sample).where(Sample.job_id == job_id, Sample.round == round_number, Sample.role.in_(roles))
    if prompts is not None:
        query = query.where(Sample.prompt_index >= prompts[0], Sample.prompt_index < prompts[1])
    return list(session.scalars(query.order_by(Sample.prompt_index, Sample.number, Sample.id)))


def sample_page(
    session: Session,
    limit: int,
    cursor: str | None,
    job_id: str | None = None,
    role: Sequence[str] = (),
    round_number: int | None = None,
    prompt_set_id: str | None = None,
    *,
    created: Period = ALWAYS,
    prompt: Sequence[str] = (),
    score: ScoreFilter | None = None,
) -> Page[Sample]:
    """Samples, oldest first. Filters without a value match all samples, several values any of them."""
    equal: ColumnValues = {
        Sample.job_id: job_id,
        Sample.prompt_set_id: prompt_set_id,
        Sample.round: round_number,
        Sample.role: list(role),
    }
    where = [] if score is None else [_has_score(score)]
    return _page_of(Sample, session, limit, cursor, equal, list(prompt), created, where)


def _has_score(score: ScoreFilter) -> ColumnElement[bool]:
    """The sample has a score by a version of the scorer within the bounds."""
    found = select(Score.sample_id).where(Score.sample_id == Sample.id, Score.scorer == score.scorer)
    # a scalar subquery, because PostgreSQL may read all scores of the scorer for EXISTS
    return found.where(*score.bounds(Score.value)).limit(1).scalar_subquery().is_not(None)


def _page_of(
    table: type[P],
    session: Session,
    limit: int,
    cursor: str | None,
    equal: ColumnValues,
    prompts: list[str],
    created: Period,
    where: Sequence[ColumnElement[bool]],
) -> Page[P]:
    """A page of samples or pairs. Several prompts are a page each, since an index has the rows of each prompt by id."""
    choices: list[Any] = [prompts]
    if len(prompts) > 1 and equal[table.job_id] is None:
        choices = sorted(set(prompts))

    pages = [
        fetch_page(
            session,
            select(table),
            table.id,
            limit,
            cursor,
            equal={**equal, table.prompt: choice},
            span=span_of(table.created_at, created),
            where=where,
            max_read=MAX_READ // len(choices),
        )
        for choice in choices
    ]
    return _without_deleted(session, pages[0] if len(pages) == 1 else first_of(pages, table.id, limit))


def score_histories(
    session: Session, job_ids: Iterable[str], up_to_round: int
) -> dict[tuple[str, str], dict[str, list[float]]]:
    """The scores of sampled images, without fused targets, by scorer.

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


def newest_pair_round(session: Session, job_id: str) -> int | None:
    """The round of the job's newest pair; None if it has none."""
    return session.scalar(select(Pair.round).where(Pair.job_id == job_id).order_by(Pair.id.desc()).limit(1))


def newest_round(session: Session, job_id: str, role: str) -> int | None:
    """The round of the job's newest sample with this role; None if it has none."""
    query = select(Sample.round).where(Sample.job_id == job_id, Sample.role == role)
    return session.scalar(query.order_by(Sample.id.desc()).limit(1))


def samples_of_job(session: Session, job_id: str, round_number: int, role: str) -> list[Sample]:
    """The samples of a round with this role, by split, prompt and number."""
    query = select(Sample).where(Sample.job_id == job_id, Sample.round == round_number, Sample.role == role)
    return list(session.scalars(query.order_by(Sample.split, Sample.prompt_index, Sample.number, Sample.id)))


def mark_paired(session: Session, job_id: str, round_number: int) -> None:
    """Set the roles of the job's samples that are in pairs of this round. Samples of other jobs do not change."""
    for column, role in ((Pair.reference_id, SampleRole.REFERENCE), (Pair.base_id, SampleRole.BASE)):
        in_pairs = select(column).where(Pair.job_id == job_id, Pair.round == round_number)
        query = update(Sample).where(Sample.job_id == job_id, Sample.id.in_(in_pairs)).values(role=role)
        session.execute(query, execution_options=UNSYNCED)


def scores(session: Session, sample_ids: Iterable[str]) -> dict[str, list[Score]]:
    """All scores of these samples, by sample."""
    by_sample: dict[str, list[Score]] = {sample_id: [] for sample_id in sample_ids}
    for row in select_by_ids(session, Score, Score.sample_id, by_sample, Score.scorer, Score.version):
        by_sample[row.sample_id].append(row)
    return by_sample


def score_scales(
    session: Session, job_id: str, newest_round: int, scorers: Sequence[str]
) -> list[tuple[str, str, int, float, float]]:
    """Name, version, count, mean and standard deviation of the scores of a job's sampled images, by these scorers.

    It covers the rounds up to `newest_round`. Targets are not sampled and do not count.
    """
    sampled = (SampleRole.PLAIN, SampleRole.REFERENCE, SampleRole.BASE)

    def grouped(*columns: Any) -> Any:
        query = select(Score.scorer, Score.version, *columns).join(Sample, Sample.id == Score.sample_id)
        query = query.where(Sample.job_id == job_id, Sample.round <= newest_round, Sample.role.in_(sampled))
        return query.where(Score.scorer.in_(scorers)).group_by(Score.scorer, Score.version)

    # the squares are those of the differences to the mean: sums of squares of scores would lose digits
    means = grouped(func.count().label("count"), func.avg(Score.value).label("mean")).subquery()
    square = (Score.value - means.c.mean) * (Score.value - means.c.mean)
    query = grouped(means.c.count, means.c.mean, func.avg(square)).join(
        means, (means.c.scorer == Score.scorer) & (means.c.version == Score.version)
    )
    rows = session.execute(query.group_by(means.c.count, means.c.mean))
    return [(name, version, count, mean, math.sqrt(variance)) for name, version, count, mean, variance in rows]


def get_pair(session: Session, pair_id: str) -> Pair:
    """The pair. Raises NotFoundError."""
    return get_row(session, Pair, IdKind.PAIR, pair_id)


def pair_page(
    session: Session,
    limit: int,
    cursor: str | None,
    job_id: str | None = None,
    round_number: int | None = None,
    adopted: bool | None = None,
    judged: bool | None = None,
    prompt_set_id: str | None = None,
    *,
    created: Period = ALWAYS,
    prompt: Sequence[str] = (),
    score: ScoreFilter | None = None,
    where: Sequence[ColumnElement[bool]] = (),
) -> Page[Pair]:
    """Pairs, oldest first. Filters without a value match all pairs, several values any of them.

    `judged` is whether a pair has a verdict. `score` is that of its target. `where` has other filters.
    """
    where = [*where]
    if judged is not None:
        verdict = unindexed(Pair.verdict)
        where.append(verdict.is_not(None) if judged else verdict.is_(None))
    if score is not None:
        where += [Pair.scorer == score.scorer, *score.bounds(Pair.target_score)]

    equal: ColumnValues = {
        Pair.job_id: job_id,
        Pair.prompt_set_id: prompt_set_id,
        Pair.round: round_number,
        Pair.adopted: adopted,
    }
    return _page_of(Pair, session, limit, cursor, equal, list(prompt), created, where)


def pairs_with(session: Session, sample_id: str) -> list[Pair]:
    """The pairs of a sample. A reference can be in several."""
    has_sample = or_(Pair.reference_id == sample_id, Pair.base_id == sample_id, Pair.target_id == sample_id)
    return list(session.scalars(select(Pair).where(has_sample, is_kept(Pair)).order_by(Pair.id)))


def round_pairs(
    session: Session,
    job_id: str,
    round_number: int,
    prompts: tuple[int, int] | None = None,
    numbers: tuple[int, int] | None = None,
) -> list[Pair]:
    """The pairs of a round, by number.

    Args:
        session: A view of the database.
        job_id: The job.
        round_number: The round.
        prompts: The range [start, stop) of prompt indices; None is all.
        numbers: The range [start, stop) of pair numbers; None is all.
    """
    query = select(Pair).where(Pair.job_id == job_id, Pair.round == round_number)
    for column, span in ((Pair.prompt_index, prompts), (Pair.number, numbers)):
        if span is not None:
            query = query.where(column >= span[0], column < span[1])
    return list(session.scalars(query.order_by(Pair.number)))


def any_pair(session: Session, job_id: str, round_number: int) -> bool:
    """Whether a round has a pair."""
    query = select(Pair.id).where(Pair.job_id == job_id, Pair.round == round_number)
    return session.scalar(query.limit(1)) is not None


def sides_of(pairs: Sequence[Pair]) -> set[str]:
    """The ids of all samples of these pairs."""
    ids = {pair.reference_id for pair in pairs} | {pair.base_id for pair in pairs}
    return ids | {pair.target_id for pair in pairs if pair.target_id is not None}


def job_pairs(session: Session, job_id: str) -> list[Pair]:
    """The pairs of a job whose targets are verified, by round and number."""
    query = select(Pair).where(Pair.job_id == job_id, Pair.adopted.is_not(None))
    return list(session.scalars(query.order_by(Pair.round, Pair.number)))


def pairs(session: Session, ids: Sequence[str]) -> list[Pair]:
    """The pairs with these ids, in their order. Unknown ids are left out."""
    by_id = {row.id: row for row in select_by_ids(session, Pair, Pair.id, ids)}
    return [by_id[pair_id] for pair_id in ids if pair_id in by_id]


def lock_pair(session: Session, pair_id: str) -> Pair:
    """Lock the row of the pair until the transaction ends, and read its current state."""
    query = select(Pair).where(Pair.id == pair_id).with_for_update().execution_options(populate_existing=True)
    return session.scalars(query).one()


def update_pairs(session: Session, values: Mapping[str, Mapping[str, object]]) -> None:
    """Update columns of pairs. `values` has the new values by the pair's id."""
    if values:
        rows = [{"id": pair_id, **columns} for pair_id, columns in values.items()]
        session.execute(update(Pair), sorted(rows, key=sorted))  # a statement updates the same columns of all its rows


def get_model(session: Session, model_id: str) -> Model:
    """The model. Raises NotFoundError."""
    return get_row(session, Model, IdKind.MODEL, model_id)


def models(session: Session, ids: Iterable[str]) -> dict[str, Model]:
    """The models with these ids, by id. Unknown ids are left out."""
    return {row.id: row for row in select_by_ids(session, Model, Model.id, ids)}


def base_model(session: Session, name: str) -> Model | None:
    """The row of the base model with this name."""
    return session.scalar(_BY_NAME, {"name": name})


def find_model(session: Session, name: str) -> Model | None:
    """The model with this id, base model name or alias.

    The alias `best` is the model of the best round of the newest run, unless somebody has set it.
    """
    if kind_of(name) is IdKind.MODEL:
        return session.scalar(select(Model).where(Model.id == name, is_kept(Model)))
    aliased = select(Model).join(ModelAlias, ModelAlias.model_id == Model.id).where(ModelAlias.name == name)
    model = base_model(session, name) or session.scalar(aliased)
    if model is not None or name != BEST:
        return model
    best = jobs.best_model_id(session)
    return None if best is None else session.get(Model, best)


def aliases(session: Session, model_ids: Iterable[str]) -> dict[str, list[str]]:
    """The aliases of these models, by model."""
    by_model: dict[str, list[str]] = {model_id: [] for model_id in model_ids}
    is_of_these = ModelAlias.model_id.in_(list(by_model))
    query = select(ModelAlias).where(or_(is_of_these, ModelAlias.name == BEST)).order_by(ModelAlias.name)
    named: dict[str, str | None] = {row.name: row.model_id for row in session.scalars(query)}
    if BEST not in named:
        named[BEST] = jobs.best_model_id(session)

    for name, model_id in sorted(named.items()):
        if model_id in by_model:
            by_model[model_id].append(name)
    return by_model


def set_alias(session: Session, name: str, model_id: str) -> None:
    """Create the alias, or move it to this model."""
    session.merge(ModelAlias(name=name, model_id=model_id, updated_at=jobs.now(session)))
    session.flush()


def remove_alias(session: Session, name: str) -> bool:
    """Remove the alias. False if it does not exist."""
    row = session.get(ModelAlias, name)
    if row is not None:
        session.delete(row)
    return row is not None


def export_page(
    session: Session, limit: int, cursor: str | None, model_id: str | None = None, of_job_id: str | None = None
) -> Page[Export]:
    """Exports, newest first; those of a model or of the pairs of a job if it is given."""
    equal: ColumnValues = {Export.model_id: model_id, Export.of_job_id: of_job_id}
    page = fetch_page(session, select(Export), Export.id, limit, cursor, newest_first=True, equal=equal)
    return _without_deleted(session, page)


def newest_export(session: Session, model_id: str, export_format: str) -> Export | None:
    """The newest export of a model in this format."""
    query = select(Export).where(Export.model_id == model_id, Export.format == export_format, is_kept(Export))
    return session.scalar(query.order_by(Export.id.desc()).limit(1))


def ensure_base_models(session: Session, names: Iterable[str]) -> None:
    """Insert missing rows of the base models with these names."""
    for name in names:
        if base_model(session, name) is None:
            row = Model(id=new_id(IdKind.MODEL), name=name, base=name, statistics={}, created_at=now_seconds())
            add_all(session, [row])


def model_before(session: Session, job: Job, round_number: int) -> Model:
    """The model that a round samples from: the last model trained before it, or the first model of the job.

    Raises:
        NotFoundError: The job has no model.
    """
    query = select(Model).where(Model.job_id == job.id, Model.round < round_number)
    trained = session.scalar(query.order_by(Model.round.desc()).limit(1))
    if trained is not None:
        return trained
    if job.model_id is None:
        raise NotFoundError(f"{job.id} has no model")
    return get_model(session, job.model_id)


def model_page(session: Session, limit: int, cursor: str | None, job_id: str | None = None) -> Page[Model]:
    """Models, newest first; those of one job if it is given."""
    equal: ColumnValues = {Model.job_id: job_id}
    page = fetch_page(session, select(Model), Model.id, limit, cursor, newest_first=True, equal=equal)
    return _without_deleted(session, page)


def _without_deleted(session: Session, page: Page[R]) -> Page[R]:
    """The page without the rows of deleted jobs.

    They are left out after the page was read, so that its cost does not depend on their number.
    """
    job_ids = {row.job_id for row in page.rows if row.job_id is not None}
    deleted = job_ids - jobs.existing(session, job_ids) if job_ids else set()
    return Page([row for row in page.rows if row.job_id not in deleted], page.next_cursor) if deleted else page


def lineage(session: Session, model_id: str, limit: int, cursor: str | None = None) -> Page[Model]:
    """A model and its ancestors, down to the base model, in pages. The cursor is the first model of the page."""
    first_id = model_id if cursor is None else id_after(cursor)
    parent = aliased(Model)
    chain = select(Model.id, Model.parent_id, literal(0).label("depth")).where(Model.id == first_id)
    line = chain.cte("line", recursive=True)
    ancestors = select(parent.id, parent.parent_id, line.c.depth + 1).join(line, parent.id == line.c.parent_id)
    line = line.union_all(ancestors.where(line.c.depth < limit))

    rows = list(session.scalars(select(Model).join(line, Model.id == line.c.id).order_by(line.c.depth)))
    return Page(rows[:limit], encode_cursor(rows[limit].id) if len(rows) > limit else None)


def models_of_job(session: Session, job_id: str, rounds: range) -> list[Model]:
    """The models that the job trained in these rounds, by round."""
    query = select(Model).where(Model.job_id == job_id, Model.round >= rounds.start, Model.round < rounds.stop)
    return list(session.scalars(query.order_by(Model.round)))


def metrics(session: Session, job_id: str, rounds: range) -> list[Metric]:
    """The metrics of the job in these rounds, by round, split and scorer."""
    query = select(Metric).where(Metric.job_id == job_id, Metric.round >= rounds.start, Metric.round < rounds.stop)
    return list(session.scalars(query.order_by(Metric.round, Metric.split, Metric.scorer)))


def means(session: Session, job_id: str) -> Sequence[Row[int, str, str, str, float, str]]:
    """The means of all rounds of a job, without their other columns: 1000 rounds have 10,000 of them."""
    query = select(Metric.round, Metric.split, Metric.scorer, Metric.version, Metric.mean, Metric.model_id)
    return session.execute(query.where(Metric.job_id == job_id).order_by(Metric.round)).all()


def last_measured_round(session: Session, job_id: str, splits: Sequence[str]) -> int | None:
    """The last round with metrics of one of these splits; None without any."""
    query = select(func.max(Metric.round)).where(Metric.job_id == job_id, Metric.split.in_(splits))
    return session.scalar(query)


def prompt_means(session: Session, job_id: str, scorer: str, rounds: range) -> list[tuple[int, str, int, float]]:
    """The mean scores of the sampled images of these rounds by prompt, as index, prompt, round and mean.

    It reads the scores of all their images, so the caller bounds the number of rounds.
    """
    roles = (SampleRole.PLAIN, SampleRole.REFERENCE, SampleRole.BASE)
    query = select(Sample.prompt_index, Sample.prompt, Sample.round, func.avg(Score.value))
    query = query.join(Score, Score.sample_id == Sample.id).where(
        Sample.job_id == job_id,
        Sample.round >= rounds.start,
        Sample.round < rounds.stop,
        Sample.role.in_(roles),
        Score.scorer == scorer,
    )
    query = query.group_by(Sample.prompt_index, Sample.prompt, Sample.round)
    rows = session.execute(query.order_by(Sample.prompt_index, Sample.round))
    return [(index, prompt, number, float(mean)) for index, prompt, number, mean in rows]


def recent_metrics(session: Session, job_ids: Iterable[str], rounds: int) -> dict[str, list[Metric]]:
    """The metrics of the last `rounds` rounds of these jobs, by job and round."""
    first_round = func.coalesce(Job.last_round, Job.rounds) - rounds
    query = select(Metric).join(Job, Metric.job_id == Job.id)
    query = query.where(is_any_of(Metric.job_id, job_ids), Metric.round > first_round)

    by_job: dict[str, list[Metric]] = {job_id: [] for job_id in job_ids}
    for row in session.scalars(query.order_by(Metric.job_id, Metric.round)):
        by_job[row.job_id].append(row)
    return by_job


def are_measured_from(session: Session, job_id: str, round_number: int) -> bool:
    """Whether the job has metrics or models of this round or a later one."""
    for table in (Metric, Model):
        later = select(table.job_id).where(table.job_id == job_id, table.round >= round_number)
        if session.scalar(later.limit(1)) is not None:
            return True
    return False
