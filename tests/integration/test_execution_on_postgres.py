"""Claims and results of stages under concurrent transactions, broken connections and database outages."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, make_url, text
from sqlalchemy.orm import Session

from api.main import create_app
from service.db.clock import now_seconds
from service.db.queries import free_stages, jobs, results, stages, training_pairs
from service.db.tables import Artifact, Sample, Table
from service.errors import StartError
from service.ids import IdKind, new_id
from service.jobs import execution
from service.jobs.execution import StageFailure
from service.jobs.kinds import RoundSpec
from service.service import Service, cancel_job, create_job, set_alias
from tests.servers import CuttingProxy, PostgresServer, S3Server, cutting_proxy, postgres_server
from tests.service import migrated_template, round_body, settings_for
from tests.statements import statements
from tests.stored_pairs import add_pairs
from worker.local import work

COMMIT = b"COMMIT\0"


def opened(folder: Path, url: str, **changes: Any) -> Service:
    return Service.open(settings_for(folder / "data", folder / "tiny", database_url=url, **changes))


@pytest.fixture
def service(tmp_path: Path, postgres_url: str) -> Iterator[Service]:
    installation = opened(tmp_path, postgres_url)
    yield installation
    installation.close()


@pytest.fixture
def proxy(postgres: PostgresServer) -> Iterator[CuttingProxy]:
    with cutting_proxy(postgres.port) as cutting:
        yield cutting


@pytest.fixture
def far(tmp_path: Path, postgres_url: str, proxy: CuttingProxy) -> Iterator[Service]:
    """The installation of `service`, with its database behind the proxy."""
    url = make_url(postgres_url).set(port=proxy.port).render_as_string(hide_password=False)
    installation = opened(tmp_path, url)
    yield installation
    installation.close()


def test_an_installation_that_cannot_be_opened_leaves_no_connection(
    tmp_path: Path, postgres: PostgresServer, postgres_url: str, s3: S3Server
) -> None:
    """A worker tries again every few seconds, and would take all connections of the server."""
    wrong = s3.settings("dfusion") | {"s3_secret_key": "not-the-secret-key"}
    with pytest.raises(StartError, match="denies access") as caught:
        opened(tmp_path, postgres_url, **wrong)
    name = make_url(postgres_url).database
    [[count]] = postgres.execute(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'")
    assert count == 0
    del caught  # until here the traceback kept the connection from being garbage


def start(service: Service, **changes: Any) -> str:
    return create_job(service, RoundSpec.model_validate(round_body(**changes)))


def take(service: Service, owner: str = "w") -> execution.Claim:
    claimed = execution.claim(service.uow, service.settings, owner)
    assert claimed is not None
    return claimed


def kinds(service: Service, job_id: str) -> list[str]:
    with service.uow.reading() as session:
        return [event.kind for event in jobs.events(session, job_id, 100, None).rows]


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def waiting_for_locks(postgres: PostgresServer) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'dfusion'"
    return int(postgres.execute(query)[0][0])


def test_a_stage_that_somebody_claims_just_now_is_passed_over(service: Service) -> None:
    start(service)
    with service.uow.writing() as session:
        group = free_stages.free_groups(session, 1)[0]
        job = jobs.get(session, group.job_id)
        first = free_stages.claim(session, group, job, "slow", 60)
        assert first is not None
        held = take(service)  # neither waits for the other's transaction nor takes its stage
        assert held.stage_id != first.id
    while (held_later := execution.claim(service.uow, service.settings, "late")) is not None:
        assert held_later.stage_id != first.id


def test_a_claim_and_a_cancel_at_once_do_not_wait_for_each_other(service: Service, postgres: PostgresServer) -> None:
    """A claim that locked the stage before the job would deadlock with the cancellation."""
    job_id = start(service)
    claimed: list[object] = []
    worker = threading.Thread(target=lambda: claimed.append(execution.claim(service.uow, service.settings, "w")))
    with service.uow.writing() as session:
        jobs.lock(session, job_id)
        worker.start()
        until(lambda: waiting_for_locks(postgres) == 1)
        execution.cancel(session, job_id)
    worker.join()
    assert claimed == [None]
    assert deadlocks(service) == 0
    assert kinds(service, job_id)[-1] == "job.cancelled"


def deadlocks(service: Service) -> int:
    with service.uow.reading() as session:
        query = text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        return int(session.scalars(query).one())


def test_rows_of_a_job_can_be_written_while_it_is_locked(service: Service) -> None:
    start(service)
    held = take(service)
    with service.uow.writing() as session:
        jobs.lock(session, held.job_id)
        session.execute(text("SET LOCAL lock_timeout = 0"))
        with service.uow.writing() as other:
            jobs.add_event(other, held.job_id, "noted", "the lock does not keep out rows that name the job")
    assert "noted" in kinds(service, held.job_id)


def test_workers_and_cancels_at_once_end_every_job(service: Service) -> None:
    job_ids = [start(service, seed=seed) for seed in range(6)]
    stop = threading.Event()

    def do_work(name: str) -> None:
        while not stop.is_set():
            held = execution.claim(service.uow, service.settings, name)
            if held is None:
                time.sleep(0.01)
                continue
            try:
                execution.finish(service.uow, service.settings, held, lambda _session: None)
            except execution.StageCancelledError:
                execution.cancelled(service.uow, service.settings, held)

    workers = [threading.Thread(target=do_work, args=(f"w{n}",)) for n in range(4)]
    for worker in workers:
        worker.start()
    for job_id in job_ids[::2]:
        cancel_job(service, job_id)

    def states() -> list[str]:
        with service.uow.reading() as session:
            return [jobs.get(session, job_id).state for job_id in job_ids]

    until(lambda: all(state in ("succeeded", "cancelled") for state in states()))
    stop.set()
    for worker in workers:
        worker.join()
    assert states()[1::2] == ["succeeded"] * 3
    assert deadlocks(service) == 0


def test_what_is_free_from_the_start_and_nothing_else_is_marked_as_hinted(service: Service) -> None:
    job_id = start(service)
    with service.uow.reading() as session:
        planned = stages.of_job(session, job_id)
    marked = [(stage.hinted_at is not None, stage.free_at is not None) for stage in planned]
    assert marked == [(stage.unmet == 0, stage.unmet == 0) for stage in planned]
    assert sorted(stage.kind for stage in planned if stage.hinted_at) == ["evaluate", "sample", "sample"]


@pytest.mark.parametrize("delivered", [True, False])
def test_lost_replies_claim_once_and_finish_once(
    service: Service, far: Service, proxy: CuttingProxy, delivered: bool
) -> None:
    job_id = start(service)
    proxy.cut_at(COMMIT, delivered)
    held = take(far)
    assert (held.attempt, held.epoch) == (1, 1)
    proxy.cut_at(COMMIT, delivered)
    execution.finish(far.uow, far.settings, held, add_rows(*rows_of_a_sample(service, held)))
    assert proxy.cuts == 2
    assert kinds(service, job_id) == ["job.created", "stage.started", "stage.succeeded"]
    with service.uow.reading() as session:
        assert jobs.get(session, job_id).samples_made == 1


def rows_of_a_sample(service: Service, held: execution.Claim) -> tuple[Artifact, Sample]:
    with service.uow.reading() as session:
        model_id = jobs.get(session, held.job_id).model_id
    file = Artifact(
        id=new_id(IdKind.ARTIFACT),
        job_id=held.job_id,
        stage_id=held.stage_id,
        slot="image",
        key=f"jobs/{held.stage_id}",
        sha256="",
        size_bytes=1,
        media_type="image/png",
        created_at=now_seconds(),
    )
    sample = Sample(
        id=new_id(IdKind.SAMPLE),
        job_id=held.job_id,
        stage_id=held.stage_id,
        round=1,
        role="plain",
        split="train",
        prompt_index=0,
        prompt="p",
        number=0,
        seed=0,
        model_id=model_id,
        image_artifact_id=file.id,
        created_at=now_seconds(),
    )
    return file, sample


def add_rows(*rows: Table) -> Callable[[Session], None]:
    def record(session: Session) -> None:
        for row in rows:
            results.add_all(session, [row])

    return record


@pytest.mark.parametrize("delivered", [True, False])
def test_lost_replies_make_one_job_and_fail_a_stage_once(
    service: Service, far: Service, proxy: CuttingProxy, delivered: bool
) -> None:
    proxy.cut_at(COMMIT, delivered)
    job_id = start(far)
    held = take(service)
    proxy.cut_at(COMMIT, delivered)
    execution.fail(far.uow, far.settings, held, StageFailure("storage", "away", retryable=True))
    assert proxy.cuts == 2
    assert kinds(service, job_id) == ["job.created", "stage.started", "stage.retried"]
    with service.uow.reading() as session:
        assert [job.id for job in jobs.page(session, 10, None).rows] == [job_id]


def test_rows_made_before_a_lost_transaction_are_written_by_the_next(service: Service) -> None:
    """A stage creates its rows once, but the transaction that writes them may have to be repeated."""
    job_id = start(service)
    held = take(service)
    file, sample = rows_of_a_sample(service, held)
    tries: list[None] = []

    def record(session: Session) -> None:
        add_rows(file, sample)(session)
        tries.append(None)
        if len(tries) == 1:
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    execution.finish(service.uow, service.settings, held, record)
    assert len(tries) == 2
    with service.uow.reading() as session:
        samples = results.sample_page(session, 10, None, job_id).rows
        count = jobs.get(session, job_id).samples_made
    assert ([row.id for row in samples], count) == ([sample.id], 1)
    assert samples[0].created_at > 1_700_000_000


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


def test_a_finished_stage_outlives_an_absence_of_the_database(tmp_path: Path, own_server: PostgresServer) -> None:
    service = opened(tmp_path, own_server.create_database(migrated_template(own_server)))
    job_id = start(service)
    held = take(service)
    record = add_rows(*rows_of_a_sample(service, held))
    own_server.stop()
    back = threading.Timer(1.0, own_server.start)
    back.start()
    execution.finish(service.uow, service.settings, held, record)
    back.join()
    assert kinds(service, job_id)[-1] == "stage.succeeded"
    service.close()


def test_a_claimed_stage_is_run_although_the_database_stops_after_the_claim(
    tmp_path: Path, own_server: PostgresServer
) -> None:
    service = opened(tmp_path, own_server.create_database(migrated_template(own_server)))
    start(service)
    back = threading.Timer(1.0, own_server.start)

    def stop_server(_session: Session) -> None:
        own_server.stop()
        back.start()

    event.listen(Session, "after_commit", stop_server, once=True)
    claimed = execution.claim(service.uow, service.settings, "w")
    back.join()
    assert claimed is not None and claimed.epoch == 1
    service.close()


def test_a_worker_continues_when_the_database_is_back(
    tmp_path: Path, pipeline: Path, own_server: PostgresServer
) -> None:
    url = own_server.create_database(migrated_template(own_server))
    settings = settings_for(tmp_path / "data", pipeline, database_url=url)
    stop = threading.Event()
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        worker = threading.Thread(target=work, args=(settings, "w", stop))
        worker.start()
        try:
            job = client.post("/rounds", json=round_body()).json()
            until(lambda: client.get(f"/jobs/{job['id']}").json()["outputs"]["samples"] > 0)
            own_server.stop()
            response = client.get("/readyz")
            assert (response.status_code, response.json()["database"]) == (503, False)
            response = client.get(f"/jobs/{job['id']}")
            assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
            assert int(response.headers["retry-after"]) > 0
            own_server.start()
            until(lambda: client.get(f"/jobs/{job['id']}").json()["state"] not in ("queued", "running"))
            job = client.get(f"/jobs/{job['id']}").json()
            stages = client.get(job["links"]["stages"]).json()["data"]
        finally:
            stop.set()
            worker.join(60)
    assert (job["state"], job["outputs"]) == ("succeeded", {"samples": 24, "pairs": 6, "models": 1})
    assert max(stage["crashes"] for stage in stages) == 0


def test_text_that_the_database_cannot_hold_is_the_clients_mistake(tmp_path: Path, postgres_url: str) -> None:
    settings = settings_for(tmp_path / "data", tmp_path / "tiny", database_url=postgres_url)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        response = client.get("/prompt-sets/a%00b")
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


def test_events_of_one_job_are_seen_in_their_order(service: Service, postgres: PostgresServer) -> None:
    """A reader that continues after the highest id has missed no event: transactions that add events are serialized."""
    job_id = start(service)
    begun: list[object] = []
    worker = threading.Thread(target=lambda: begun.append(take(service, "late")))
    with service.uow.writing() as session:
        jobs.lock(session, job_id)
        first = jobs.add_event(session, job_id, "note", "written, but not committed yet")
        worker.start()
        until(lambda: waiting_for_locks(postgres) == 1)
        with service.uow.reading() as reader:
            assert [event.kind for event in jobs.events(reader, job_id, 100, None).rows] == ["job.created"]
    worker.join()
    with service.uow.reading() as session:
        rows = jobs.events(session, job_id, 100, None).rows
    assert [row.kind for row in rows] == ["job.created", "note", "stage.started"] and rows[1].id == first < rows[2].id
    assert len(begun) == 1


def test_a_new_alias_can_be_given_by_several_at_once(service: Service) -> None:
    with service.uow.reading() as session:
        model = results.find_model(session, "shapes")
        assert model is not None
    failed: list[BaseException] = []

    def give(name: str, barrier: threading.Barrier) -> None:
        barrier.wait()
        try:
            set_alias(service, name, model.id)
        except BaseException as error:
            failed.append(error)

    for round_number in range(5):
        barrier = threading.Barrier(6)

        threads = [threading.Thread(target=give, args=(f"best-{round_number}", barrier)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []


def test_pairs_are_not_compared_with_every_id(service: Service) -> None:
    pair_ids = add_pairs(service, 3000)
    with statements(service.uow.engine) as seen, service.uow.reading() as session:
        assert training_pairs.are_verified(session, pair_ids) == dict.fromkeys(pair_ids, True)
    [(statement, parameters)] = [each for each in seen if "FROM pairs" in each[0]]

    with service.uow.engine.connect() as connection:
        explained = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, COSTS OFF) {statement}", parameters)
        plan = "\n".join(explained.scalars())
    compared = [int(count) for count in re.findall(r"Removed by Join Filter: (\d+)", plan)]
    assert sum(compared) < 3000, plan  # millions if each pair is compared with all ids
