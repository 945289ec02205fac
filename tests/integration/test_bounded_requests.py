"""Requests take as many statements for many prompts, pairs, stages and jobs as for few. Counted on both databases."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Connection, delete, event, select, update

from api.converters.jobs import job_detail
from api.main import create_app
from service.db.clock import now_seconds
from service.db.queries import jobs, results, stages
from service.db.queries.pages import encode_cursor
from service.db.tables import Export, Metric, Model, Pair, PromptSet, Stage
from service.ids import IdKind, new_id
from service.jobs import checking, execution
from service.jobs.kinds import RoundSpec
from service.plan import PlannedStage
from service.service import Service, cancel_job, continue_job, create_job, pause_job, resume_job
from service.states import StageKind
from tests.service import PROMPTS, round_body, service_of, settings_for
from tests.statements import statements
from tests.stored_pairs import Results, add_pairs

FEW = 3
MANY = 1200
"""More than SQLite's former limit of 999 bound variables; the statements have one each."""
TRAINING = {"examples_per_update": 2, "micro_batch": 4, "inner_epochs": 1}


@pytest.fixture
def client(tmp_path: Path, pipeline: Path, database_url: str) -> Iterator[TestClient]:
    """The application without a worker."""
    settings = settings_for(tmp_path / "data", pipeline, database_url=database_url, max_queued_jobs=100_000)
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def service(client: TestClient) -> Service:
    return service_of(client)


def count_of(service: Service, client: TestClient, path: str, body: dict[str, Any] | None = None) -> tuple[int, int]:
    """The status of a request, and the number of its statements."""
    with statements(service.uow.engine) as seen:
        answer = client.get(path) if body is None else client.post(path, json=body)
    variables = [len(parameters) for _, parameters in seen if isinstance(parameters, (tuple, dict))]
    assert max(variables, default=0) < 100
    return answer.status_code, len(seen)


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"text": f"a red circle {number}", "items": ["circle"], "thresholds": [0.02]} for number in range(count)]


def test_a_round_of_many_prompts_takes_the_statements_of_a_small_one(client: TestClient, service: Service) -> None:
    few = count_of(service, client, "/rounds", round_body(prompts=prompts(FEW)))
    many = count_of(service, client, "/rounds", round_body(prompts=prompts(MANY), rounds=300))
    assert few == many
    assert few[0] == 202


def test_the_stages_of_a_round_of_many_prompts(client: TestClient) -> None:
    job = client.post("/rounds", json=round_body(prompts=prompts(MANY), rounds=300)).json()
    path = job["links"]["stages"]

    # after 19 evaluations of 64 prompts each and their comparison: 600 shards of 2 prompts
    last = client.get(path, params={"kind": "sample", "limit": 1, "cursor": encode_cursor(str(20 + 599))}).json()
    assert [(stage["kind"], stage["round"], stage["shard"]) for stage in last["data"]] == [("sample", 1, 599)]
    assert last["has_more"] is False
    numbers = []
    cursor = None
    while True:
        page = client.get(path, params={"limit": 200, "kind": "sample"} | ({"cursor": cursor} if cursor else {})).json()
        numbers += [stage["shard"] for stage in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert numbers == list(range(600))
    assert client.get(path, params={"kind": "sample", "state": "running"}).json()["data"] == []
    assert client.get("/jobs/job_00000000000000000000000000/stages").status_code == 404


def test_a_training_on_many_pairs_takes_the_statements_of_a_small_one(client: TestClient, service: Service) -> None:
    ids = add_pairs(service, MANY)
    few = count_of(service, client, "/trainings", {"pairs": ids[:FEW], "training": TRAINING})
    many = count_of(service, client, "/trainings", {"pairs": ids, "training": TRAINING})
    assert few == many
    assert few[0] == 202

    # ids that do not exist, in the form of ids and in others
    unknown = [new_id(IdKind.PAIR) for _ in range(MANY - 2)] + [new_id(IdKind.SAMPLE), "no id"]
    status, statements_of_unknown = count_of(service, client, "/trainings", {"pairs": unknown})
    assert status == 422 and statements_of_unknown < few[1]
    problem = client.post("/trainings", json={"pairs": [*ids[:2], *unknown[-3:], ids[1]]}).json()
    assert (problem["status"], [error["pointer"] for error in problem["errors"]]) == (
        422,
        ["/pairs/2", "/pairs/3", "/pairs/4", "/pairs/5"],
    )

    # the error does not grow with the request
    problem = client.post("/trainings", json={"pairs": unknown}).json()
    assert len(problem["errors"]) == 100
    assert problem["detail"].endswith(f"; and {MANY - 100} more")


def test_a_training_on_all_pairs_of_a_job_has_a_limit(tmp_path: Path, pipeline: Path, database_url: str) -> None:
    settings = settings_for(tmp_path / "data", pipeline, database_url=database_url, max_pairs_per_training=5)
    with TestClient(create_app(settings)) as client:
        service = service_of(client)
        ids = add_pairs(service, 6)
        with service.uow.writing() as session:
            large = results.get_pair(session, ids[0]).job_id
            session.execute(update(Pair).where(Pair.id == ids[0]).values(verdict="target"))
        add_pairs(service, 5)
        with service.uow.reading() as session:
            small = session.scalars(select(Pair.job_id).where(Pair.job_id != large).limit(1)).one()

        def ask(**body: Any) -> tuple[int, str | None, str | None]:
            answer = client.post("/trainings?dry_run=true", json={"training": TRAINING, **body})
            problem = answer.json()
            return answer.status_code, problem.get("code"), problem.get("errors", [{}])[0].get("pointer")

        assert ask(jobs=[small]) == (200, None, None)
        assert ask(jobs=[large]) == (422, "too_many_pairs", "/jobs")
        assert ask(jobs=[large], prefer="verdicts") == (422, "too_many_pairs", "/jobs")  # all of them would be read
        assert ask(pairs=ids) == (422, "too_many_pairs", "/pairs")
        assert ask(pairs=ids[:5]) == (200, None, None)


def test_an_estimate_reads_the_latest_stages_of_the_base_model(client: TestClient, service: Service) -> None:
    """A job of 8 images of 2 KB, in 4 steps with guidance, and their scores."""
    past = Results.of_new_job(service)
    body = {"model": "tiny", "prompts": PROMPTS[:1], "samples_per_prompt": 8, "sampling": {"num_steps": 4}}
    assert client.post("/samplings?dry_run=true", json=body).json()["seconds"] is None
    with service.uow.writing() as session:
        rows = stages.of_job(session, past.job_id)
        ended = (("sample", "tiny", 64, 10, 3), ("sample", "other", 64, 1000, 7), ("score", "tiny", 16, 2, 2))
        for row, (row.kind, row.base, row.work, seconds, row.memory_bytes) in zip(rows, ended, strict=False):
            row.shard, row.state, row.started_at, row.finished_at = 90 + row.number, "succeeded", 5, 5 + seconds
        image = past.artifact("image", size_bytes=2000)
        results.add_all(session, [image, replace(past, stage_id=rows[0].id).sample(0, image)])

    estimate = client.post("/samplings?dry_run=true", json=body).json()
    assert (estimate["seconds"], estimate["memory_bytes"], estimate["storage_bytes"]) == (10 + 1, 3, 16_000)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_requests_are_checked_outside_the_transaction_that_writes(client: TestClient, service: Service) -> None:
    """SQLite has one writer at a time, which shows where its transaction begins."""
    ids = add_pairs(service, FEW)
    for path, body in (("/trainings", {"pairs": ids, "training": TRAINING}), ("/rounds", round_body())):
        with statements(service.uow.engine) as seen:
            assert client.post(path, json=body).status_code == 202
        texts = [statement for statement, _ in seen]
        written = texts[texts.index("BEGIN IMMEDIATE") :]
        read = [text for text in written if "SELECT" in text and "json_each" not in text]
        assert len(written) < len(texts)
        for table in ("pairs", "samples", "prompt_sets"):
            assert not any(f"FROM {table}" in text for text in read)


def test_what_is_removed_after_the_check_is_named(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt set of a request is removed between the check and the transaction that refers to it."""
    client.post("/prompt-sets", json={"name": "gone", "prompts": prompts(1)})

    def check_then_remove(*arguments: Any) -> Any:
        checked = checking.check(*arguments)
        with service.uow.writing() as session:
            session.execute(delete(PromptSet).where(PromptSet.name == "gone"))
        return checked

    monkeypatch.setattr("service.service.check", check_then_remove)
    problem = client.post("/rounds", json=round_body(prompts=None, prompt_set="gone")).json()
    assert (problem["status"], problem["errors"][0]["pointer"]) == (422, "/prompt_set")


def test_a_fusion_of_many_pairs_takes_the_statements_of_a_small_one(client: TestClient, service: Service) -> None:
    add_pairs(service, MANY)
    with service.uow.reading() as session:
        samples = results.sample_page(session, 2 * MANY, None).rows
    sides = [{"reference": samples[2 * n].id, "base": samples[2 * n + 1].id} for n in range(MANY)]
    body = {"fusion": {"first_step": 1, "last_step": 3}, "reward": "brightness", "thresholds": [0.1]}
    few = count_of(service, client, "/fusions", body | {"pairs": sides[:FEW]})
    many = count_of(service, client, "/fusions", body | {"pairs": sides})
    assert few == many
    assert few[0] == 202


def test_the_stages_of_many_models_take_the_statements_of_one(service: Service) -> None:
    job_id = create_job(service, RoundSpec.model_validate(round_body()))

    def add_stages(round_number: int, count: int) -> int:
        models = [new_id(IdKind.MODEL) for _ in range(count)]
        plan = [
            PlannedStage(StageKind.EVALUATE, round_number, 1, shard, {"model": model_id})
            for shard, model_id in enumerate(models)
        ]
        with service.uow.writing() as session:
            session.add_all(
                Model(id=model_id, base=f"base of {model_id}", statistics={}, created_at=0) for model_id in models
            )
            session.flush()
            last = stages.last_number(session, job_id)
            with statements(service.uow.engine) as seen:
                stages.add(session, job_id, plan, after=last)
            rows = stages.of_job(session, job_id)
        assert [row.base for row in rows[-count:]] == [f"base of {model_id}" for model_id in models]
        return len(seen)

    assert add_stages(2, 1) == add_stages(3, MANY)


def test_jobs_are_read_without_their_stages(client: TestClient, service: Service) -> None:
    first = create_job(service, RoundSpec.model_validate(round_body()))
    few = [count_of(service, client, path) for path in ("/jobs", f"/jobs/{first}", f"/jobs/{first}/stages")]

    loaded: list[str] = []
    with service.uow.writing() as session:
        plan = [PlannedStage(StageKind.FUSE, 2, 1, shard) for shard in range(MANY)]
        stages.add(session, first, plan, after=stages.last_number(session, first))
    for _ in range(20):
        create_job(service, RoundSpec.model_validate(round_body(prompts=prompts(50))))
    held = execution.claim(service.uow, service.settings, "w")
    assert held is not None

    def note(_connection: Connection, _cursor: object, statement: str, *_rest: object) -> None:
        loaded.append(statement)

    event.listen(service.uow.engine, "before_cursor_execute", note)
    many = [count_of(service, client, path) for path in ("/jobs", f"/jobs/{first}", f"/jobs/{first}/stages")]
    event.remove(service.uow.engine, "before_cursor_execute", note)
    assert [status for status, _ in many] == [200, 200, 200]
    # a job that has started also has running stages to read
    assert [count for _, count in many] == [few[0][1], few[1][1] + 1, few[2][1]]
    assert not any("jobs.spec" in statement for statement in loaded[: many[0][1]])


def sums_of(service: Service, job_id: str) -> tuple[float, int, int | None]:
    """The running sums of a job. Checks that the job shows what its stages say."""
    with service.uow.reading() as session:
        rows = stages.of_job(session, job_id)
        view = jobs.get_view(session, job_id)
    shown = job_detail(view)
    assert (view.job.work_done, shown.attempts, shown.progress.round) == (
        sum(row.work for row in rows if row.state == "succeeded"),
        max(row.attempt for row in rows),
        max((row.round for row in rows if row.started_at is not None), default=None),
    )
    running = [(row.kind, row.shard) for row in rows if row.state == "running"]
    assert (shown.progress.stage, shown.progress.shard) == (running[0] if running else (None, None))
    assert [row.is_counted for row in rows] == [row.finished_at is not None for row in rows]
    return view.job.work_done, view.job.attempts, view.job.last_round


def start_round(service: Service, **changes: Any) -> str:
    body = {"prompts": PROMPTS[:1], "evaluation": None}
    return create_job(service, RoundSpec.model_validate(round_body(**(body | changes))))


def take(service: Service) -> execution.Claim:
    held = execution.claim(service.uow, service.settings, "w")
    assert held is not None
    sums_of(service, held.job_id)
    return held


def finish(service: Service, held: execution.Claim) -> None:
    execution.finish(service.uow, service.settings, held, lambda _session: None)


WORK_OF_SAMPLING = 4 * 4 * 2
"""4 images in 4 steps with guidance."""


def test_running_sums_follow_the_stages(service: Service) -> None:
    """At each step a job shows what its stages say."""
    job_id = start_round(service)
    assert sums_of(service, job_id) == (0, 0, None)
    execution.give_back(service.uow, service.settings, take(service))
    assert sums_of(service, job_id) == (0, 0, 1)
    failure = execution.StageFailure("storage", "away", retryable=True)
    execution.fail(service.uow, service.settings.model_copy(update={"retry_seconds": 1e-6}), take(service), failure)
    assert sums_of(service, job_id) == (0, 1, 1)
    finish(service, take(service))
    assert sums_of(service, job_id) == (WORK_OF_SAMPLING, 2, 1)
    failure = execution.StageFailure("internal", "broken", retryable=False)
    execution.fail(service.uow, service.settings, take(service), failure)
    assert sums_of(service, job_id) == (WORK_OF_SAMPLING, 2, 1)


def test_running_sums_of_lost_workers_and_of_a_job_that_continues(service: Service) -> None:
    job_id = start_round(service)
    hasty = service.settings.model_copy(update={"retry_seconds": 1e-6, "max_crashes": 2})
    for attempts in (1, 2):
        take(service)
        with service.uow.writing() as session:
            session.execute(update(Stage).values(lease_expires_at=0.0))
        assert execution.sweep(service.uow, hasty) == 1
        assert sums_of(service, job_id) == (0, attempts, 1)
    assert jobs_state(service, job_id) == "failed"

    continue_job(service, job_id)
    assert sums_of(service, job_id) == (0, 2, 1)
    finish(service, take(service))
    assert sums_of(service, job_id) == (WORK_OF_SAMPLING, 3, 1)
    cancel_job(service, job_id)
    assert sums_of(service, job_id) == (WORK_OF_SAMPLING, 3, 1)


def jobs_state(service: Service, job_id: str) -> str:
    with service.uow.reading() as session:
        return jobs.state_of(session, job_id)


def test_running_sums_of_a_job_that_pauses_and_waits_for_its_review(service: Service) -> None:
    job_id = start_round(service, review=True)
    while (held := take(service)).kind != "verify":
        finish(service, held)
    pause_job(service, job_id)
    finish(service, held)
    before = sums_of(service, job_id)
    resume_job(service, job_id)  # ends the review, since the job has no pair
    with service.uow.reading() as session:
        [review] = [stage for stage in stages.of_job(session, job_id) if stage.kind == "review"]
    assert review.state == "succeeded"
    assert sums_of(service, job_id) == (before[0] + review.work, 1, 1)
    assert take(service).kind == "train"


def test_stages_that_an_earlier_version_ends_are_counted_by_the_sweeper(service: Service) -> None:
    """Processes of both versions run during an upgrade. Version 0.1.0 does not know the running sums."""
    job_id = start_round(service)
    other_id = start_round(service)
    for held in (take(service), take(service)):
        ended = {"state": "succeeded", "finished_at": now_seconds(), "lease_owner": None, "attempt": 3}
        with service.uow.writing() as session:
            session.execute(update(Stage).where(Stage.id == held.stage_id).values(ended))
    assert execution.count_missed(service.uow) == 2
    assert sums_of(service, job_id) == sums_of(service, other_id) == (WORK_OF_SAMPLING, 3, 1)
    assert execution.count_missed(service.uow) == 0


def test_a_change_of_all_stages_of_a_job_is_one_statement_that_writes_each_once(service: Service) -> None:
    many = [PlannedStage(StageKind.FUSE, 2, 1, shard, needs=() if shard % 2 else (0,)) for shard in range(MANY)]
    job_id = start_round(service)
    with service.uow.writing() as session:
        stages.add(session, job_id, many, after=stages.last_number(session, job_id))
    held = take(service)
    for change in (pause_job, resume_job, cancel_job, continue_job):
        if change is continue_job:
            execution.cancelled(service.uow, service.settings, held)
        with statements(service.uow.engine) as seen:
            change(service, job_id)
        assert sum(text.startswith("UPDATE stages") for text, _ in seen) == 1, change
        with service.uow.reading() as session:
            rows = stages.of_job(session, job_id)
        states = {"pause_job": "held", "cancel_job": "cancelled"}
        expected = states.get(change.__name__, "queued")
        assert {row.state for row in rows if row.id != held.stage_id} == {expected}
        running = next(row for row in rows if row.id == held.stage_id)
        assert (running.pause_requested_at is not None) == (change is pause_job)
        assert (running.cancel_requested_at is not None) == (change is cancel_job)
        if expected == "queued":  # those that are free are hinted, and no others
            assert {row.hinted_at is not None for row in rows if row.unmet} == {False}
            assert {row.hinted_at is not None for row in rows if not row.unmet} == {True}


def test_pages_of_stages_by_state_and_of_failed_attempts(client: TestClient, service: Service) -> None:
    job_id = start_round(service)
    plan = [PlannedStage(StageKind.FUSE, 2, 1, shard) for shard in range(60)]
    with service.uow.writing() as session:
        stages.add(session, job_id, plan, after=stages.last_number(session, job_id))
        for state, remainder in (("failed", 0), ("cancelled", 1), ("succeeded", 2)):
            of_shards = update(Stage).where(Stage.kind == "fuse", Stage.round == 2, Stage.shard % 4 == remainder)
            error = None if state == "succeeded" else "storage"
            session.execute(of_shards.values(state=state, finished_at=now_seconds(), error_code=error))

    def shards(*states: str, **filters: Any) -> list[int]:
        found: list[int] = []
        cursor = None
        while True:
            parameters = {"state": states, "kind": "fuse", "round": 2, "limit": 7, **filters}
            page = client.get(f"/jobs/{job_id}/stages", params=parameters | ({"cursor": cursor} if cursor else {}))
            found += [stage["shard"] for stage in page.json()["data"]]
            cursor = page.json()["next_cursor"]
            if cursor is None:
                return found

    assert shards("failed") == list(range(0, 60, 4))
    assert shards("failed", "queued") == [shard for shard in range(60) if shard % 4 in (0, 3)]
    assert shards("running") == []
    assert shards(with_error=True) == shards("failed")
    assert shards("cancelled", with_error=True) == []


def pages(client: TestClient, path: str, limit: int, **filters: str) -> list[dict[str, Any]]:
    """All pages of a list."""
    found: list[dict[str, Any]] = []
    while not found or found[-1]["has_more"]:
        cursor = {"cursor": found[-1]["next_cursor"]} if found else {}
        found.append(client.get(path, params={"limit": limit, **filters, **cursor}).json())
    return found


def test_pages_of_exports(client: TestClient, service: Service) -> None:
    """A model with 250 exports, every fifth of which is merged, and a job with 3 exports of its pairs."""
    rows = Results.of_new_job(service)
    artifact = rows.artifact("export")
    common = {"job_id": rows.job_id, "artifact_id": artifact.id, "statistics": {}, "created_at": 0}
    of_model = [
        Export(id=new_id(IdKind.EXPORT), model_id=rows.model_id, format="kohya" if n % 5 else "merged", **common)
        for n in range(250)
    ]
    of_job = [Export(id=new_id(IdKind.EXPORT), of_job_id=rows.job_id, format="parquet", **common) for _ in range(3)]
    with service.uow.writing() as session:
        results.add_all(session, [artifact, *of_model, *of_job])

    def listed(limit: int, **filters: str) -> list[list[str]]:
        return [[row["id"] for row in page["data"]] for page in pages(client, "/exports", limit, **filters)]

    newest_first = [row.id for row in reversed(of_model)]
    assert listed(100, model="tiny") == [newest_first[:100], newest_first[100:200], newest_first[200:]]
    assert listed(2, job=rows.job_id) == [[of_job[2].id, of_job[1].id], [of_job[0].id]]
    assert listed(200) == [[row.id for row in reversed(of_job)] + newest_first[:197], newest_first[197:]]
    assert [export["id"] for export in client.get("/models/tiny").json()["exports"]] == newest_first[:200]
    assert client.get("/exports?model=none").status_code == 404
    with service.uow.reading() as session:
        newest = results.newest_export(session, str(rows.model_id), "merged")
    assert newest is not None and newest.id == of_model[245].id


def test_pages_of_metrics_and_lineage(client: TestClient, service: Service) -> None:
    """A job with 260 rounds, each of which has trained the child of the model before."""
    job_id = start_round(service, rounds=260)
    with service.uow.writing() as session:
        base = results.base_model(session, "tiny")
        assert base is not None
        models = [
            Model(id=new_id(IdKind.MODEL), base="tiny", job_id=job_id, round=number, statistics={}, created_at=0)
            for number in range(1, 261)
        ]
        for parent, model in pairwise([base, *models]):
            model.parent_id = parent.id
        results.add_all(session, models)
        measured = {"job_id": job_id, "split": "train", "scorer": "s", "version": "1", "count": 1, "created_at": 0}
        results.add_all(
            session,
            [Metric(**measured, round=n, model_id=row.id, mean=n, std=0) for n, row in enumerate([base, *models])],
        )

    metrics = pages(client, f"/jobs/{job_id}/metrics", 100)
    assert [[row["round"] for row in page["data"]] for page in metrics] == [
        list(range(100)),
        list(range(100, 200)),
        list(range(200, 261)),
    ]
    assert [row["round"] for page in metrics for row in page["trainings"]] == list(range(1, 261))
    assert metrics[0]["data"][3]["training_images"] == 3 * 4  # 4 images of a prompt in each round before

    last = models[-1].id
    newest_first = [row.id for row in reversed([base, *models])]
    lineage = pages(client, f"/models/{last}/lineage", 87)
    assert [len(page["data"]) for page in lineage] == [87, 87, 87]
    assert [row["model"] for page in lineage for row in page["data"]] == newest_first
    assert lineage[0]["data"][0]["seed"] == 7
    assert client.get(f"/models/{last}").json()["lineage"] == newest_first[:200]

    # as many statements for many rounds as for few
    paths = (f"/jobs/{job_id}/metrics", f"/models/{last}/lineage", f"/models/{last}")
    many = [count_of(service, client, path) for path in paths]
    few = [count_of(service, client, path.replace(last, models[0].id)) for path in paths]
    assert many == few


@pytest.mark.parametrize(
    ("limit", "body", "pointer", "code"),
    [
        ({"max_prompts_per_job": 2}, {}, "/prompts", "too_many_prompts"),
        ({"max_stages_per_job": 20}, {"rounds": 3}, "/rounds", "too_many_stages"),
        ({"max_stages_per_job": 5}, {}, "/prompts", "too_many_stages"),
        # each round samples 12 images and fuses 6 at most; 4 evaluations of 3
        ({"max_images_per_job": 65}, {"rounds": 3}, "/rounds", "too_many_images"),
        ({"max_images_per_job": 66}, {"rounds": 3}, "", ""),
    ],
)
def test_a_job_above_a_limit_is_refused_by_its_name(
    tmp_path: Path, pipeline: Path, limit: dict[str, int], body: dict[str, Any], pointer: str, code: str
) -> None:
    with TestClient(create_app(settings_for(tmp_path / "data", pipeline, **limit))) as client:
        answer = client.post("/rounds", params={"dry_run": True}, json=round_body(**body))
    if not pointer:
        assert answer.status_code == 200
        return

    problem = answer.json()
    [(name, most)] = limit.items()
    assert (answer.status_code, problem["code"], problem["errors"][0]["pointer"]) == (422, code, pointer)
    assert f"at most {most}" in problem["detail"] and f"DFUSION_{name.upper()}" in problem["detail"]
