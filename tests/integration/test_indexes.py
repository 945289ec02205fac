"""Each list of results, and each claim, uses one index: no sorting, and no rows are read and discarded."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from sqlalchemy.orm import Session

from benchmarks.service_data import fill
from service.db.migrate import migrate
from service.db.queries import agreement, collection, deletion, free_stages, jobs, results, stages, verdicts
from service.db.queries.pages import Period, encode_cursor
from service.db.tables import IS_UNFINISHED, Model
from service.db.unit_of_work import UnitOfWork
from service.jobs.estimates import estimate_of
from service.jobs.kinds import SamplingJobSpec
from service.jobs.kinds.base import Checked
from service.jobs.sources import TRAJECTORY_READERS
from service.plan import PlannedStage, Sizes
from service.states import FINAL_STAGE_STATES, JobState, StageKind, StageState
from tests.statements import statements

Query = Callable[[Session], object]
JOB, SET = f"job_{3:026d}", f"set_{2:026d}"
CURSOR = encode_cursor(f"smp_{500:026d}")
CURSOR_IN_TIME = encode_cursor(f"6.5 smp_{500:026d}")
SAMPLES: tuple[dict[str, Any], ...] = (
    {},
    {"job_id": JOB},
    {"job_id": JOB, "role": ["target"]},
    {"job_id": JOB, "round_number": 7},
    {"job_id": JOB, "round_number": 7, "role": ["target"]},
    {"prompt_set_id": SET},
    {"prompt_set_id": SET, "role": ["target"]},
    {"role": ["target"]},
    {"round_number": 7},
    {"prompt": ["a cat"]},
    {"created": Period(5.0, 9.0)},
    {"created": Period(5.0)},
)
PAIRS: tuple[dict[str, Any], ...] = (
    {},
    {"job_id": JOB},
    {"job_id": JOB, "round_number": 7},
    {"job_id": JOB, "adopted": True},
    {"prompt_set_id": SET},
    {"round_number": 7},
    {"adopted": False},
    {"prompt": ["a cat"]},
    {"created": Period(None, 9.0)},
)

DISABLED = ("seqscan", "bitmapscan", "sort", "hashjoin", "mergejoin")


def plan_of(uow: UnitOfWork, query: Query, disabled: Sequence[str] = DISABLED, statement: int = -1) -> str:
    """Return PostgreSQL's plan of a statement of the query, by default of the last one.

    Sequential scans are disabled by default, as for large tables.
    """
    with statements(uow.engine) as seen, Session(uow.engine) as session:
        query(session)
    return explained(uow, *seen[statement], "COSTS OFF", disabled)


def explained(
    uow: UnitOfWork, statement: str, parameters: Any, options: str, disabled: Sequence[str] = DISABLED
) -> str:
    with uow.engine.connect() as connection:
        for setting in disabled:
            connection.exec_driver_sql(f"SET LOCAL enable_{setting} = off")
        rows = connection.exec_driver_sql(f"EXPLAIN ({options}) {statement}", parameters).scalars()
        return "\n".join(rows)


@pytest.fixture(scope="module")
def uow(new_postgres_database: Callable[[], str]) -> Iterator[UnitOfWork]:
    """A database with jobs, samples and pairs, and a thousand stages that wait for another stage."""
    opened = UnitOfWork.connect(new_postgres_database())
    fill(opened.engine, 8, 500)
    with opened.writing() as session:
        first = [PlannedStage(StageKind.SELECT, 1, 1)]
        waiting = [PlannedStage(StageKind.FUSE, 1, 1, shard, needs=(0,)) for shard in range(1000)]
        stages.add(session, JOB, first + waiting, after=stages.last_number(session, JOB))
    with opened.engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE stages")
    yield opened
    opened.close()


def assert_one_index(plan: str) -> None:
    assert "Index Scan" in plan, plan
    for waste in ("Sort", "Filter", "Seq Scan"):
        assert waste not in plan, plan


def plan_of_page(uow: UnitOfWork, query: Query) -> str:
    """Return the plan of the page; the statement after it looks up which of its jobs are deleted."""
    return plan_of(uow, query, statement=0)


def test_pages_of_samples_and_pairs(uow: UnitOfWork) -> None:
    for page, of_table in ((results.sample_page, SAMPLES), (results.pair_page, PAIRS)):
        for filters in of_table:
            for cursor in (None, CURSOR_IN_TIME if "created" in filters else CURSOR):
                assert_one_index(plan_of_page(uow, lambda s, p=page, f=filters, c=cursor: p(s, 50, c, **f)))  # type: ignore[misc]


REVIEW_QUERIES: tuple[tuple[Query, str], ...] = (
    (lambda session: agreement.measure(session), "ix_pairs_judged"),
    (lambda session: agreement.measure(session, job_id=JOB), "ix_pairs_judged_of_job"),
    (lambda session: agreement.measure(session, prompt_set_id=SET), "ix_pairs_judged_of_prompt_set"),
)


def test_the_queue_of_a_reviewer_looks_up_each_of_its_pairs(uow: UnitOfWork, sqlite: UnitOfWork) -> None:
    def queue(session: Session) -> object:
        return results.pair_page(session, 1, CURSOR, JOB, where=[~verdicts.is_judged_by("ann")])

    plan = plan_of(uow, queue, statement=1)
    assert "Seq Scan" not in plan, plan
    assert re.search(r"using pk_pair_verdicts on pair_verdicts\n\s+Index Cond: .*pair_id.*reviewer", plan), plan
    for steps in list(sqlite_plans(sqlite, queue))[1:2]:
        assert any("USING INDEX ix_pairs_job_id_id" in step for step in steps), steps
        assert any(re.search(r"SEARCH pair_verdicts .*pair_id=\? AND reviewer=\?", step) for step in steps), steps


@pytest.mark.parametrize(("query", "index"), REVIEW_QUERIES)
def test_agreement_reads_only_judged_pairs(uow: UnitOfWork, sqlite: UnitOfWork, query: Query, index: str) -> None:
    with statements(uow.engine) as seen, Session(uow.engine) as session:
        query(session)
    assert len(seen) == 3
    for statement, parameters in seen:
        plan = explained(uow, statement, parameters, "COSTS OFF", disabled=("seqscan", "hashjoin", "mergejoin"))
        assert re.search("using ix_pairs_judged", plan), plan
        assert "Seq Scan" not in plan, plan
    for steps in sqlite_plans(sqlite, query):
        assert any(re.search(f"(SCAN|SEARCH) pairs USING INDEX {index}( |$)", step) for step in steps), steps
        assert not any(re.match(r"SCAN pair_verdicts", step) for step in steps), steps


def test_queued_jobs_are_counted_without_those_that_have_ended(uow: UnitOfWork) -> None:
    plan = plan_of(uow, lambda session: jobs.count_queued(session, "key"))
    assert "Index Scan using ix_jobs_state" in plan, plan
    assert "Index Cond: ((state)::text = ANY" in plan, plan


def test_shards_are_counted_by_the_last_one(uow: UnitOfWork) -> None:
    def count(session: Session) -> int:
        return stages.count_shards(session, JOB, 1, StageKind.FUSE)

    with uow.reading() as session:
        assert count(session) == 1000
    plan = plan_of(uow, count)
    assert plan.startswith("Limit\n  ->  Index Only Scan Backward using uq_stages_job_id_round_kind_shard"), plan
    assert "Filter" not in plan, plan


def test_running_stages_and_errors_have_indexes_of_few_rows(uow: UnitOfWork) -> None:
    # sorts are allowed, since no more stages run than there are workers
    running = plan_of(uow, lambda session: stages.running_of_jobs(session, [JOB]), disabled=())
    assert re.findall(r"using (\w+) on stages\n", running) == ["ix_stages_running"], running
    errors = plan_of(uow, lambda session: stages.page(session, JOB, 50, None, with_error=True))
    assert_one_index(errors)
    assert "using ix_stages_with_error on stages" in errors, errors


@pytest.mark.parametrize("state", list(StageState))
def test_pages_of_stages_by_state(uow: UnitOfWork, sqlite: UnitOfWork, state: StageState) -> None:
    index = "ix_stages_ended" if state in FINAL_STAGE_STATES else "ix_stages_unfinished"

    def page(session: Session) -> object:
        return stages.page(session, JOB, 50, encode_cursor("7"), state=[state])

    plan = plan_of(uow, page)
    assert_one_index(plan)
    assert f"using {index} on stages" in plan, plan
    for steps in sqlite_plans(sqlite, page):
        bounds = "((job_id,state,number)>(?,?,?) AND (job_id,state)<(?,?))"
        assert steps == [f"SEARCH stages USING INDEX {index} {bounds}"]


GROUP = free_stages.FreeGroup("gpu", "", "filled", 0, JOB)
CLAIM_QUERIES: tuple[Query, ...] = (
    free_stages.any_free,
    lambda session: free_stages.free_groups(session, 8),
    lambda session: free_stages.free_groups(session, 8, ("gpu",), "filled"),
    lambda session: free_stages.following_job(session, GROUP),
    lambda session: free_stages.count_free(session, "gpu", 100),
    lambda session: free_stages.mark_free(session, JOB),
)
CLAIM_INDEX = re.compile(r"using (ix_stages_(free|unhinted|running|queue_fair_key_started_at)|pk_stages) ")


def test_claims_on_postgresql(uow: UnitOfWork) -> None:
    for query in CLAIM_QUERIES:
        plan = plan_of(uow, query)
        assert "using ix_stages_" in plan, plan
        for scan in re.findall(r".*Scan.* on stages.*", plan):
            assert CLAIM_INDEX.search(scan), plan


def test_a_claim_reads_one_free_stage_of_each_group(uow: UnitOfWork) -> None:
    with uow.writing() as session:
        free = [PlannedStage(StageKind.FUSE, 2, 1, shard) for shard in range(500)]
        stages.add(session, JOB, free, after=stages.last_number(session, JOB))
    with statements(uow.engine) as seen, uow.reading() as session:
        assert [group.job_id for group in free_stages.free_groups(session, 8, prefer_base="other")] == [JOB, JOB]
    plan = explained(uow, *seen[-1], "ANALYZE, COSTS OFF, TIMING OFF")
    rows = [float(count) for count in re.findall(r"using ix_stages_free on .*actual rows=([\d.]+)", plan)]
    assert rows and max(rows) <= 1, plan


def sqlite_plans(uow: UnitOfWork, query: Query) -> Iterator[list[str]]:
    """The steps of SQLite's plan of each statement of the query."""
    with statements(uow.engine) as seen, uow.writing() as session:
        query(session)
    for statement, parameters in seen:
        if statement.startswith("BEGIN"):
            continue
        with uow.engine.connect() as connection:
            yield [step[3] for step in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]


@pytest.fixture
def sqlite(tmp_path: Any) -> Iterator[UnitOfWork]:
    opened = UnitOfWork.connect(f"sqlite:///{tmp_path / 'dfusion.db'}")
    migrate(opened.engine, tmp_path / "lock")
    yield opened
    opened.close()


def test_the_states_of_unfinished_stages_are_looked_up(uow: UnitOfWork, sqlite: UnitOfWork) -> None:
    """Each of them in an index without the stages that have ended, which are most."""
    listed = set(re.findall(r"\w+", IS_UNFINISHED.partition(" IN ")[2]))
    assert listed == set(StageState) - FINAL_STAGE_STATES

    plan = plan_of(uow, lambda session: stages.states_left(session, JOB), disabled=("seqscan",))
    assert len(re.findall(r"using ix_stages_(?:unfinished|running) on stages", plan)) == 4, plan
    for steps in sqlite_plans(sqlite, lambda session: stages.states_left(session, JOB)):
        assert [step for step in steps if "stages" in step] == [
            "SEARCH stages USING INDEX ix_stages_unfinished (job_id=? AND state=?)"
        ] * 4, steps


def test_claims_on_sqlite(sqlite: UnitOfWork) -> None:
    for query in CLAIM_QUERIES:
        for steps in sqlite_plans(sqlite, query):
            assert any("USING INDEX ix_stages_" in step for step in steps), steps
            assert not any(step.startswith("SCAN stages") or "state=?" in step for step in steps), steps


def test_expired_leases_are_looked_for_among_the_running_stages(uow: UnitOfWork, sqlite: UnitOfWork) -> None:
    assert plan_of(uow, stages.expired).startswith("Index Scan using ix_stages_running on stages")
    assert list(sqlite_plans(sqlite, stages.expired)) == [["SCAN stages USING INDEX ix_stages_running"]]


def test_estimates_read_the_latest_stages_of_a_kind_and_base_model(uow: UnitOfWork, sqlite: UnitOfWork) -> None:
    sizes = Sizes(2, prompts=3)
    checked = Checked(SamplingJobSpec(prompt_set="set-1"), sizes, Model(base="filled"))

    def estimate(session: Session) -> object:
        return estimate_of(session, checked)

    with statements(uow.engine) as seen, Session(uow.engine) as session:
        estimate(session)
    assert len(seen) == 3 + 3 + 1  # each kind of stage, stages with images, and their samples, of which there are none
    for statement, parameters in seen[:-1]:
        plan = explained(uow, statement, parameters, "COSTS OFF")
        assert "Index Scan Backward using ix_stages_timed on stages" in plan, plan
        assert "Sort" not in plan and "Filter" not in plan, plan
    for steps in sqlite_plans(sqlite, estimate):
        assert not any(re.match("SCAN (stages|samples|jobs)", step) for step in steps), steps


AFTER = (5.0, "x")
COLLECTION_QUERIES: tuple[Query, ...] = (
    lambda session: collection.uncollected_stages(session, 9.0, AFTER, 20),
    lambda session: collection.forget_checkpoints(session, 9.0, 20),
    lambda session: collection.next_job_to_prune(session, "pairs", 9.0, AFTER, (JOB,)),
    lambda session: collection.trajectory_page(session, JOB, "none", "art_", 500),
    lambda session: collection.unfinished_jobs(session, TRAJECTORY_READERS),
    lambda session: collection.jobs_of_pairs(session, ("pair_1",)),
    lambda session: deletion.expired(session, JobState.FAILED, 9.0, AFTER, 20),
    lambda session: deletion.used(session, (JOB,)),
    lambda session: deletion.next_with_events(session, 9.0),
    lambda session: deletion.forget_old_keys(session, 9.0, 20),
    lambda session: deletion.next_deleted(session, AFTER),
    lambda session: deletion.caches_of(session, JOB, 20),
    lambda session: deletion.next_to_purge(session, AFTER),
    lambda session: deletion.forget_contents(session, "job_none", 20),
    lambda session: deletion.forget_skeleton(session, "job_none", 20),
)
"""Queries of a collection; of a page of trajectories the first, as JOB has none."""


def test_collections_on_postgresql(uow: UnitOfWork) -> None:
    for query in COLLECTION_QUERIES[:3]:
        with statements(uow.engine) as seen, Session(uow.engine) as session:
            query(session)
        plan = explained(uow, *seen[0], "COSTS OFF")
        assert re.search("using ix_(stages_uncollected|stages_with_checkpoint|jobs_ended) on", plan), plan
        assert "Sort" not in plan and "Seq Scan" not in plan, plan
    for query in COLLECTION_QUERIES[3:]:
        with statements(uow.engine) as seen, Session(uow.engine) as session:
            query(session)
        plan = explained(uow, *seen[0], "COSTS OFF", disabled=("seqscan",))
        assert "Seq Scan" not in plan, plan


def test_collections_on_sqlite(sqlite: UnitOfWork) -> None:
    tables = "stages|jobs|artifacts|samples|pairs|events|idempotency_keys|job_sources"
    scan = re.compile(f"SCAN ({tables})(?! USING INDEX ix_stages_with_checkpoint)")
    for query in COLLECTION_QUERIES:
        for steps in sqlite_plans(sqlite, query):
            assert not any(scan.match(step) for step in steps), steps
