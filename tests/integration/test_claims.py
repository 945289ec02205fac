"""Which stage a worker claims: none is missed, keys share the workers, priorities and loaded models count."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select, update

from service.db.clock import now_seconds
from service.db.queries import free_stages, jobs, stages
from service.db.tables import ApiKey, Stage
from service.jobs import execution
from service.jobs.execution import Claim
from service.jobs.kinds import EvaluationJobSpec, SamplingJobSpec
from service.service import Service, cancel_job, create_job
from tests.service import PROMPTS, settings_for

KEYS = ("key_a", "key_b", "key_c")


@pytest.fixture
def service(tmp_path: Path, database_url: str) -> Iterator[Service]:
    models = {name: str(tmp_path / name) for name in ("tiny", "other")}
    settings = settings_for(
        tmp_path / "data", tmp_path / "tiny", database_url=database_url, models=models, shard_prompts=1
    )
    opened = Service.open(settings)
    with opened.uow.writing() as session:
        for name in KEYS:
            key = ApiKey(id=name, name=name, prefix=name, sha256=name, scopes=["submit"], created_at=0.0)
            session.add(key)
    yield opened
    opened.close()


def start(service: Service, key: str | None = None, size: int = 1, model: str = "tiny", priority: int = 0) -> str:
    """A sampling of `size` stages, all of them free, and one that follows them."""
    prompts = [{"text": f"circle {number}", "items": ["circle"]} for number in range(size)]
    body = {"model": model, "prompts": prompts, "sampling": {"num_steps": 2}, "priority": priority}
    return create_job(service, SamplingJobSpec.model_validate(body), api_key_id=key)


def claim(service: Service, base: str | None = None, queues: Sequence[str] | None = ("gpu",)) -> Claim | None:
    return execution.claim(service.uow, service.settings, "w", queues, base)


def take(service: Service, base: str | None = None) -> Claim:
    held = claim(service, base)
    assert held is not None
    return held


def finish(service: Service, held: Claim) -> None:
    execution.finish(service.uow, service.settings, held, lambda _session: None)


def work(service: Service, stages_to_run: int, base: str | None = None) -> list[str]:
    """One worker runs stages one after the other. Returns the keys of their jobs."""
    keys = []
    for _ in range(stages_to_run):
        held = take(service, base)
        finish(service, held)
        keys.append(key_of(service, held))
    return keys


def key_of(service: Service, held: Claim) -> str:
    with service.uow.reading() as session:
        return jobs.get(session, held.job_id).api_key_id or ""


def set_back(service: Service, key: str, **seconds: float) -> None:
    """As if these times of a key's stages had been so long ago, where they are set."""
    with service.uow.writing() as session:
        for name, ago in seconds.items():
            changed = update(Stage).where(Stage.fair_key == key, getattr(Stage, name).is_not(None))
            session.execute(changed.values({name: now_seconds() - ago}))


# No worker gets nothing while stages are free


def claim_together(service: Service, workers: int) -> list[Claim | None]:
    barrier = threading.Barrier(workers, timeout=60)

    def claim_once(_number: int) -> Claim | None:
        with service.uow.reading() as session:
            free_stages.any_free(session)  # its connection is open
        barrier.wait()
        return claim(service)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(claim_once, range(workers)))


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize(("number_of_jobs", "size"), [(1, 60), (60, 1), (3, 20)])
def test_no_worker_is_empty_handed_while_a_stage_is_free(service: Service, number_of_jobs: int, size: int) -> None:
    for _ in range(number_of_jobs):
        start(service, size=size)

    claims = claim_together(service, workers=40)

    assert len({held.stage_id for held in claims if held is not None}) == 40


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_workers_share_the_last_stages_without_an_error(service: Service) -> None:
    start(service, "key_a", size=2)
    start(service, "key_b")

    claims = claim_together(service, workers=12)

    assert len({held.stage_id for held in claims if held is not None}) == 3
    assert sum(held is None for held in claims) == 9


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_claim_takes_another_job_instead_of_waiting_for_a_locked_one(service: Service) -> None:
    first = start(service, "key_a")
    second = start(service, "key_a")
    third = start(service, "key_b")
    with service.uow.writing() as session:
        jobs.lock(session, first)
        assert take(service).job_id in (second, third)
        assert take(service).job_id in (second, third)
    assert take(service).job_id == first
    assert claim(service) is None


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_claim_waits_if_every_job_is_locked(service: Service) -> None:
    start(service, size=2)
    claims: list[Claim | None] = []
    worker = threading.Thread(target=lambda: claims.append(claim(service)))
    with service.uow.writing() as session:
        jobs.lock(session, take(service).job_id)
        worker.start()
        worker.join(0.5)
        assert worker.is_alive()
    worker.join(30)
    assert [held is not None for held in claims] == [True]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_large_job_does_not_hide_the_others_of_its_key(service: Service) -> None:
    large = start(service, "key_a", size=1500)
    small = start(service, "key_a")
    with service.uow.writing() as session:
        jobs.lock(session, large)
        assert take(service).job_id == small


# Fair share


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_workers_that_claim_at_once_divide_themselves_among_the_keys(service: Service) -> None:
    """A locked job is a claim that no other worker sees yet."""
    of_key = {key: [start(service, key) for _ in range(4)] for key in ("key_a", "key_b")}
    locked = ["key_a"]
    claimed_jobs = []
    for key in ("key_b", "key_a", "key_b", "key_a"):
        with service.uow.writing() as session:
            for number, name in enumerate(locked):
                jobs.lock(session, of_key[name][locked[:number].count(name)])
            held = take(service)
            claimed_jobs.append(held.job_id)
        execution.give_back(service.uow, service.settings, held)
        with service.uow.writing() as session:
            session.execute(update(Stage).values(started_at=None))  # as before the claim
        locked.append(key)
    assert claimed_jobs == [of_key["key_b"][0], of_key["key_a"][1], of_key["key_b"][1], of_key["key_a"][2]]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_claim_that_has_waited_follows_the_shares_of_then(service: Service) -> None:
    first = start(service, "key_a", size=5)
    claims: list[Claim | None] = []
    worker = threading.Thread(target=lambda: claims.append(claim(service)))
    with service.uow.writing() as session:
        job = jobs.lock(session, first)
        worker.start()
        worker.join(0.5)
        assert worker.is_alive()
        second = start(service, "key_b")
        [group] = [group for group in free_stages.free_groups(session, 8) if group.job_id == first]
        assert free_stages.claim(session, group, job, "other", 60) is not None
    worker.join(30)
    assert [held.job_id for held in claims if held is not None] == [second]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_many_workers_at_once_serve_two_keys_alike(service: Service) -> None:
    for key in ("key_a", "key_b"):
        for _ in range(40):
            start(service, key)

    claims = claim_together(service, workers=40)

    keys = [key_of(service, held) for held in claims if held is not None]
    assert len(keys) == 40
    assert abs(keys.count("key_a") - keys.count("key_b")) <= 8


def test_a_job_of_another_key_starts_within_one_stage_of_a_backlog(service: Service) -> None:
    for _ in range(30):
        start(service, "key_a")
    running = take(service)
    start(service, "key_b", priority=-100)

    finish(service, running)
    assert work(service, 1) == ["key_b"]


def test_keys_take_turns_on_one_worker(service: Service) -> None:
    start(service, "key_a", size=6)
    assert work(service, 1) == ["key_a"]
    start(service, "key_b", size=3)
    start(service, "key_c", size=3)
    turns = work(service, 2)
    assert sorted(turns) == ["key_b", "key_c"]
    assert work(service, 6) == ["key_a", *turns] * 2


def test_keys_share_several_workers_equally(service: Service) -> None:
    start(service, "key_a", size=10)
    held = [take(service) for _ in range(4)]  # four workers
    start(service, "key_b", size=10)

    keys = []
    for stage in held:  # they end one after the other
        finish(service, stage)
        keys.append(key_of(service, take(service)))
    assert keys == ["key_b", "key_b", "key_a", "key_a"]  # the others run 3:0, 2:1, 1:2 and 1:2


def test_jobs_without_a_key_share_as_one_key(service: Service) -> None:
    start(service, None, size=3)
    start(service, None, size=3)
    start(service, "key_a", size=2)
    assert sorted(work(service, 2)) == ["", "key_a"]


# Age and priority


def test_the_jobs_of_a_key_run_by_age(service: Service) -> None:
    first = start(service, "key_a", size=2)
    second = start(service, "key_a", size=1)
    assert [take(service).job_id for _ in range(3)] == [first, first, second]


def test_a_higher_priority_goes_first_within_a_key(service: Service) -> None:
    low = start(service, "key_a", priority=-1)
    default = start(service, "key_a", size=2)
    high = start(service, "key_a", priority=100)
    assert [take(service).job_id for _ in range(4)] == [high, default, default, low]


def test_a_priority_does_not_take_another_keys_share(service: Service) -> None:
    start(service, "key_a", size=4)
    start(service, "key_b", size=4, priority=100)
    assert sorted(work(service, 2)) == ["key_a", "key_b"]
    assert sorted(work(service, 2)) == ["key_a", "key_b"]


def test_the_next_stages_of_a_job_keep_its_priority(service: Service) -> None:
    slow = start(service, None, priority=-5)
    held = take(service)
    fast = start(service, None, priority=5)
    finish(service, held)
    assert held.job_id == slow
    assert take(service).job_id == fast


# Loaded models


def test_the_stages_of_a_job_name_the_base_model_that_they_load(service: Service) -> None:
    body = {"models": ["tiny", "other"], "prompts": PROMPTS[:1], "scorers": ["brightness"], "priority": 7}
    job_id = create_job(service, EvaluationJobSpec.model_validate(body), api_key_id="key_a")
    with service.uow.reading() as session:
        rows = stages.of_job(session, job_id)
    assert [(row.kind, row.base, row.fair_key, row.rank) for row in rows] == [
        ("evaluate", "tiny", "key_a", -7),
        ("evaluate", "other", "key_a", -7),
        ("compare", "", "key_a", -7),
    ]


def test_the_stage_of_an_evaluation_with_the_loaded_model_goes_first(service: Service) -> None:
    body = {"models": ["tiny", "other"], "prompts": PROMPTS[:1], "scorers": ["brightness"]}
    create_job(service, EvaluationJobSpec.model_validate(body))
    assert take(service, base="other").shard == 1


def test_the_use_of_one_queue_does_not_count_in_another(service: Service) -> None:
    """A key with a running stage in the CPU queue has its full share of the GPU queue."""
    start(service, "key_a", size=2)
    start(service, "key_b")
    with service.uow.writing() as session:
        stage_id = session.scalars(select(Stage.id).where(Stage.fair_key == "key_a", Stage.number == 1)).one()
        running = {"queue": "cpu", "state": "running", "started_at": now_seconds()}
        session.execute(update(Stage).where(Stage.id == stage_id).values(running))
    assert work(service, 2) == ["key_a", "key_b"]  # equal keys are in order of their ids


def test_a_stored_request_that_cannot_be_read_fails_its_job_and_blocks_no_other(service: Service) -> None:
    """It was stored by a newer version, for example."""
    unreadable = start(service, "key_a", size=2)
    other = start(service, "key_b")
    with service.uow.writing() as session:
        job = jobs.get(session, unreadable)
        job.spec = {**job.spec, "from_the_future": 1}
    assert take(service).job_id == other
    assert claim(service) is None
    with service.uow.reading() as session:
        job = jobs.get(session, unreadable)
    assert (job.state, job.error_code) == ("failed", "unreadable_request")
    assert "from_the_future" in str(job.error_message)


# The state of a job


def test_a_cancelled_job_is_not_claimed(service: Service) -> None:
    cancelled = start(service, "key_a", size=3)
    other = start(service, "key_b")
    cancel_job(service, cancelled)
    assert [take(service).job_id, claim(service)] == [other, None]
