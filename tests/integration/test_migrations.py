"""Migrations on both kinds of database."""

import json
import logging
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import alembic.command
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, make_url, text
from sqlalchemy.exc import IntegrityError, ProgrammingError
from sqlalchemy.orm import Session

from service.db.migrate import migrate, require_newest, revisions
from service.db.queries import collection
from service.db.tables import Job, PromptSet, Table
from service.db.unit_of_work import make_engine
from service.errors import StartError, UnknownRevisionError
from service.jobs.kinds import RoundSpec
from service.maintenance import sweep_once
from service.service import Service, create_job
from tests import forking
from tests.servers import PostgresServer
from tests.service import round_body, settings_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'dfusion.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.create_database()


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    created = make_engine(url)
    yield created
    created.dispose()


def alembic_config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    config.attributes["connection"] = connection
    return config


def test_migrations_make_the_tables_that_the_code_knows(engine: Engine, tmp_path: Path) -> None:
    migrate(engine, tmp_path / "lock")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []


def test_migrations_can_be_undone_and_done_again(engine: Engine, tmp_path: Path) -> None:
    migrate(engine, tmp_path / "lock")
    with engine.begin() as connection:
        alembic.command.downgrade(alembic_config(connection), "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    migrate(engine, tmp_path / "lock")
    assert set(inspect(engine).get_table_names()) == {*Table.metadata.tables, "alembic_version"}


LATER_MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision = "9999_later"
down_revision = "{newest}"


def upgrade() -> None:
    with op.batch_alter_table("prompt_sets") as prompt_sets:  # SQLite copies the table, PostgreSQL alters it
        prompt_sets.alter_column("description", existing_type=sa.Text(), nullable=True)
        prompt_sets.add_column(sa.Column("later", sa.Text(), nullable=True))
"""


def test_a_later_migration_may_change_a_table_that_rows_refer_to(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate(engine, tmp_path / "lock")
    with Session(engine) as session, session.begin():
        session.add(
            PromptSet(id="set_a", version=1, description="", builtin=False, prompts=[], sha256="", created_at=0)
        )
        session.flush()
        session.add(
            Job(
                id="job_a",
                kind="round",
                state="queued",
                spec={},
                prompt_set_id="set_a",
                rounds=1,
                work_total=1,
                created_at=0,
            )
        )

    scripts = tmp_path / "migrations"
    shutil.copytree(ROOT / "migrations", scripts)
    with engine.connect() as connection:
        [newest] = revisions(connection)[1]
    (scripts / "versions" / "9999_later.py").write_text(LATER_MIGRATION.format(newest=newest))
    monkeypatch.setattr("service.db.migrate._SCRIPTS", scripts)
    migrate(engine, tmp_path / "lock")

    with engine.connect() as connection:
        assert connection.scalars(text("SELECT version_num FROM alembic_version")).all() == ["9999_later"]
        assert connection.execute(text("SELECT id, later FROM prompt_sets")).all() == [("set_a", None)]
    with engine.begin() as connection, pytest.raises(IntegrityError):  # the reference still holds
        connection.execute(text("DELETE FROM prompt_sets"))


def insert(connection: Connection, table: str, **values: object) -> None:
    """Insert a row by plain SQL, as the tables of this revision have no classes any more."""
    names = ", ".join(values)
    parameters = ", ".join(f":{name}" for name in values)
    connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({parameters})"), values)


def insert_job(connection: Connection, job_id: str, stages: list[dict[str, object]], **of_job: object) -> None:
    """A job of 0001_tables with stages of these values."""
    job = {"kind": "round", "state": "running", "spec": "{}", "rounds": 1, "work_total": 9, "created_at": 0}
    insert(connection, "jobs", id=job_id, **(job | of_job))
    for number, values in enumerate(stages, 1):
        row = {
            "id": f"{job_id}_{number}",
            "job_id": job_id,
            "number": number,
            "kind": "sample",
            "queue": "gpu",
            "round": 1,
            "shard": number,
            "params": "{}",
            "work": 1.5,
            "state": "queued",
            "lease_epoch": 0,
            "progress_done": 0,
            "progress_total": 0,
            "attempt": 0,
            "crash_count": 0,
            "not_before": 0,
            "created_at": 0,
        }
        insert(connection, "stages", **(row | values))


def test_stages_of_version_0_1_0_get_the_key_and_the_base_model_of_their_job(engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        alembic.command.upgrade(alembic_config(connection), "0001_tables")
        insert(connection, "api_keys", id="key_a", name="a", prefix="dfk_", sha256="x", scopes="[]", created_at=0)
        insert(connection, "models", id="mdl_a", name="sd", base="sd", figures="{}", created_at=0)
        insert(connection, "models", id="mdl_b", name="xl", base="xl", figures="{}", created_at=0)
        sample_and_select: list[dict[str, object]] = [{"state": "running"}, {"kind": "select", "queue": "cpu"}]
        insert_job(connection, "job_a", sample_and_select, model_id="mdl_a", api_key_id="key_a")
        evaluate: dict[str, object] = {"kind": "evaluate", "params": '{"model": "mdl_b"}'}
        insert_job(connection, "job_b", [evaluate], kind="evaluation", model_id="mdl_a")

    migrate(engine, tmp_path / "lock")

    with engine.connect() as connection:
        rows = connection.execute(text("SELECT id, fair_key, base, rank FROM stages ORDER BY id")).all()
        assert rows == [
            ("job_a_1", "key_a", "sd", 0),
            ("job_a_2", "key_a", "", 0),  # loads no model
            ("job_b_1", "", "xl", 0),  # an evaluation of a model other than the job's first
        ]
        assert connection.scalars(text("SELECT priority FROM jobs")).all() == [0, 0]
    with engine.begin() as connection:
        alembic.command.downgrade(alembic_config(connection), "0001_tables")
        assert connection.scalar(text("SELECT count(*) FROM stages")) == 3


def test_running_sums_are_filled_from_the_stages_of_existing_jobs(engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        alembic.command.upgrade(alembic_config(connection), "0001_tables")
        succeeded = {"state": "succeeded", "attempt": 2, "started_at": 1.0}
        running = {"state": "running", "attempt": 5, "round": 3, "started_at": 2.0}
        insert_job(connection, "job_a", [succeeded, succeeded | {"work": 4.0}, running, {"attempt": 3, "round": 4}])
        insert_job(connection, "job_b", [{}])
    migrate(engine, tmp_path / "lock")

    query = "SELECT id, work_done, attempts, last_round FROM jobs ORDER BY id"
    with engine.connect() as connection:
        assert connection.execute(text(query)).all() == [("job_a", 5.5, 3, 3), ("job_b", 0.0, 0, None)]
    with engine.begin() as connection:
        alembic.command.downgrade(alembic_config(connection), "0001_tables")
    migrate(engine, tmp_path / "lock")
    with engine.connect() as connection:
        assert connection.execute(text(query)).all() == [("job_a", 5.5, 3, 3), ("job_b", 0.0, 0, None)]


def test_stages_and_jobs_that_ended_before_the_upgrade_are_collected_after_it(engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        alembic.command.upgrade(alembic_config(connection), "0003_running_sums")
        ended: dict[str, object] = {"state": "failed", "finished_at": 5.0}
        ran = ended | {"lease_epoch": 1, "checkpoint_key": "jobs/job_a/job_a_1/checkpoint/a"}
        insert_job(connection, "job_a", [ran, ended, {}], state="failed", finished_at=5.0)
    migrate(engine, tmp_path / "lock")

    with Session(engine) as session:
        due = collection.uncollected_stages(session, 10.0, collection.START, 9)
        assert due == [collection.EndedStage("job_a", "job_a_1", (5.0, "job_a_1"))]  # the second never ran
        assert collection.next_job_to_prune(session, "pairs", 1.0, collection.START, ()) == (5.0, "job_a")
        assert collection.forget_checkpoints(session, 1.0, 9) == ["jobs/job_a/job_a_1/checkpoint/a"]
    with engine.begin() as connection:
        alembic.command.downgrade(alembic_config(connection), "0003_running_sums")
        assert connection.scalar(text("SELECT count(*) FROM stages WHERE checkpoint_key IS NOT NULL")) == 1
    migrate(engine, tmp_path / "lock")


def test_stored_bytes_and_sources_of_existing_jobs_are_filled(engine: Engine, tmp_path: Path) -> None:
    """Sources by references of rows and by ids in requests, but not by those in texts of people."""
    source, user, trained, other = (f"job_{digit}{'0' * 25}" for digit in "1234")
    pair = f"pair_{'0' * 26}"
    with engine.begin() as connection:
        alembic.command.upgrade(alembic_config(connection), "0005_collection")
        for job_id in (source, other):
            insert_job(connection, job_id, [{}])
        common: dict[str, object] = {"job_id": source, "stage_id": f"{source}_1", "created_at": 0}
        for number, size in enumerate((3, 4)):
            file = {"slot": str(number), "key": str(number), "sha256": "", "size_bytes": size, "media_type": ""}
            insert(connection, "artifacts", id=f"art_{number}", **common, **file)
        insert(connection, "models", id="mdl_a", base="tiny", figures="{}", round=1, **common)
        image = {"role": "plain", "split": "train", "prompt_index": 0, "prompt": "", "number": 0, "seed": 0}
        insert(
            connection, "samples", id="smp_a", round=1, model_id="mdl_a", image_artifact_id="art_0", **common, **image
        )
        sides = {"reference_id": "smp_a", "base_id": "smp_a", "reference_score": 0, "base_score": 0}
        scored = {"scorer": "", "scorer_version": "", "figures": "{}", "revision": 0, "prompt_index": 0, "prompt": ""}
        insert(connection, "pairs", id=pair, round=1, number=0, **common, **sides, **scored)
        insert_job(connection, user, [{}], model_id="mdl_a")
        insert_job(connection, trained, [{}], spec=json.dumps({"pairs": [pair], "label": f"as {other}"}))
    migrate(engine, tmp_path / "lock")

    with engine.connect() as connection:
        sources = connection.execute(text("SELECT job_id, source_id FROM job_sources ORDER BY job_id")).all()
        assert sources == [(user, source), (trained, source)]
        sizes = connection.execute(text("SELECT id, storage_bytes FROM jobs ORDER BY id")).all()
        assert sizes == [(source, 7), (user, 0), (trained, 0), (other, 0)]


def test_existing_jobs_use_the_prompt_sets_of_their_rows_and_of_their_evaluations(
    engine: Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        alembic.command.upgrade(alembic_config(connection), "0009_retention")
        for letter in "abcd":
            prompts = {"prompts": "[]", "sha256": "", "created_at": 0}
            insert(connection, "prompt_sets", id=f"set_{letter}", version=1, description="", builtin=False, **prompts)
        evaluate: list[dict[str, object]] = [
            {"kind": "evaluate", "params": f'{{"set": "set_{letter}"}}'} for letter in "aca"
        ]
        of_round = {"prompt_set_id": "set_a", "held_out_prompt_set_id": "set_b"}
        insert_job(connection, "job_a", evaluate[:1], **of_round)
        insert_job(connection, "job_b", [*evaluate, {"kind": "compare"}], kind="evaluation")
    migrate(engine, tmp_path / "lock")

    with engine.connect() as connection:
        used = connection.execute(text("SELECT job_id, prompt_set_id FROM job_prompt_sets ORDER BY 1, 2")).all()
        assert used == [("job_a", "set_a"), ("job_a", "set_b"), ("job_b", "set_a"), ("job_b", "set_c")]


def test_existing_verdicts_belong_to_their_reviewers(engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        alembic.command.upgrade(alembic_config(connection), "0013_browser_sessions")
        insert_job(connection, "job_a", [{}])
        common: dict[str, object] = {"job_id": "job_a", "stage_id": "job_a_1", "created_at": 3}
        insert(connection, "artifacts", id="art", slot="", key="", sha256="", size_bytes=1, media_type="", **common)
        insert(connection, "models", id="mdl", base="tiny", figures="{}", round=1, **common)
        image = {"role": "plain", "split": "train", "prompt_index": 0, "prompt": "", "number": 0, "seed": 0}
        insert(connection, "samples", id="smp", round=1, model_id="mdl", image_artifact_id="art", **common, **image)
        sides = {"reference_id": "smp", "base_id": "smp", "reference_score": 0, "base_score": 0, "figures": "{}"}
        texts = {"scorer": "", "scorer_version": "", "prompt_index": 0, "prompt": ""}
        for number, verdict in enumerate(({"verdict_by": "ann"}, {}, {"verdict": None, "verdict_at": None})):
            columns = {"verdict": "tie", "verdict_at": 7, "revision": 4, **verdict}
            insert(connection, "pairs", id=f"p{number}", round=1, number=number, **common, **sides, **texts, **columns)
    migrate(engine, tmp_path / "lock")

    with engine.connect() as connection:
        verdicts = connection.execute(text("SELECT * FROM pair_verdicts ORDER BY pair_id")).all()
        assert verdicts == [("p0", "ann", "tie", 4, 7.0), ("p1", "", "tie", 4, 7.0)]
        pairs = connection.execute(text("SELECT verdict, verdict_by, reviewers FROM pairs ORDER BY id")).all()
        assert pairs == [("tie", "ann", 1), ("tie", None, 1), (None, None, 0)]


def test_reviews_of_existing_requests_become_policies(engine: Engine, tmp_path: Path) -> None:
    def specs(connection: Connection) -> list[object]:
        rows = connection.scalars(text("SELECT spec FROM jobs ORDER BY id"))
        return [json.loads(spec) if isinstance(spec, str) else spec for spec in rows]

    old: list[dict[str, object]] = [{"review": True, "label": "é"}, {"review": False}, {"seed": 1}]
    with engine.begin() as connection:
        alembic.command.upgrade(alembic_config(connection), "0013_browser_sessions")
        for number in range(501):  # more than a page
            insert_job(connection, f"job_{number:03}", [], spec=json.dumps(old[number % 3]))
    migrate(engine, tmp_path / "lock")

    with engine.connect() as connection:
        assert specs(connection) == [{"review": "required", "label": "é"}, {"review": "none"}, {"seed": 1}] * 167
    with engine.begin() as connection:
        alembic.command.downgrade(alembic_config(connection), "0013_browser_sessions")
        assert specs(connection) == old * 167


@pytest.mark.parametrize("revision", ["0001", "0010"])
def test_a_database_from_before_the_first_release_is_refused_with_advice(
    engine: Engine, url: str, tmp_path: Path, revision: str
) -> None:
    migrate(engine, tmp_path / "lock")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :it"), {"it": revision})
    with pytest.raises(UnknownRevisionError, match=f"at revision {revision}, created by a version before 0.1.0"):
        migrate(engine, tmp_path / "lock")
    for module in ("service.db.migrate", "api"):
        done = run_command(url, tmp_path, module)
        assert done.returncode != 0
        assert "dfusion models export" in done.stdout and "Traceback" not in done.stdout


def test_a_database_of_an_unknown_revision_is_left_alone(engine: Engine, url: str, tmp_path: Path) -> None:
    migrate(engine, tmp_path / "lock")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from-the-future'"))
    with pytest.raises(UnknownRevisionError, match="from-the-future"):
        migrate(engine, tmp_path / "lock")
    done = run_command(url, tmp_path)
    assert done.returncode == 1
    assert "from-the-future" in done.stdout and "Traceback" not in done.stdout


def run_command(url: str, folder: Path, module: str = "service.db.migrate") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DFUSION_DATABASE_URL": url, "DFUSION_DATA_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    return forking.run(["-m", module], folder, environment)


def test_looking_at_the_revision_leaves_the_log_alone(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with engine.connect() as connection:
        assert revisions(connection)[0] == frozenset()
    migrate(engine, tmp_path / "lock")
    caplog.clear()
    with caplog.at_level(logging.INFO), engine.connect() as connection:
        present, newest = revisions(connection)
    assert (len(present), present, caplog.records) == (1, newest, [])


def test_the_command_migrates(engine: Engine, url: str, tmp_path: Path) -> None:
    done = run_command(url, tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert set(inspect(engine).get_table_names()) == {*Table.metadata.tables, "alembic_version"}


def test_the_command_says_that_there_is_no_database(tmp_path: Path) -> None:
    done = run_command("postgresql://nobody:secret@127.0.0.1:1/none", tmp_path)
    assert done.returncode == 1
    assert "cannot migrate the database" in done.stdout
    assert "Traceback" not in done.stdout and "secret" not in done.stdout


def _migrate(url: str, folder: Path, ran: "multiprocessing.Queue[int]") -> None:
    migrations: list[str] = []
    logging.getLogger("alembic.runtime.migration").addHandler(_Collector(migrations))
    logging.getLogger("alembic.runtime.migration").setLevel(logging.INFO)
    engine = make_engine(url)
    migrate(engine, folder / "lock")
    engine.dispose()
    ran.put(sum(message.startswith("Running upgrade") for message in migrations))


class _Collector(logging.Handler):
    """Records log messages."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


def test_a_process_that_does_not_migrate_refuses_another_schema(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"revision none.*python -m service\.db\.migrate"):
        require_newest(engine)
    migrate(engine, tmp_path / "lock")
    require_newest(engine)
    with engine.begin() as connection:
        alembic.command.downgrade(alembic_config(connection), "-1")
    with pytest.raises(StartError, match="at revision 0"):
        require_newest(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from-the-future'"))
    with pytest.raises(UnknownRevisionError, match="from-the-future"):
        require_newest(engine)


@pytest.mark.parametrize("module", ["worker.sweeper", "worker.local"])
def test_workers_and_sweepers_do_not_migrate(tmp_path: Path, module: str) -> None:
    url = f"sqlite:///{tmp_path / 'dfusion.db'}"
    done = run_command(url, tmp_path, module)
    assert (done.returncode, "Traceback" in done.stdout) == (1, False)
    assert "cannot start: the database is at revision none" in done.stdout
    engine = make_engine(url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()


ROLES = ROOT / "docker" / "postgres-roles.sql"
PASSWORDS = {"POSTGRES_OWNER_PASSWORD": "o'wner", "POSTGRES_SERVICE_PASSWORD": "service"}


@pytest.fixture
def roles(postgres: PostgresServer) -> Iterator[dict[str, Engine]]:
    """An empty database as its owner and the service's role see it."""
    superuser = make_url(postgres.create_database())
    for _ in range(2):
        postgres.run_file(str(superuser.database), ROLES, **PASSWORDS)
    names = ("dfusion_owner", "dfusion")
    engines = {name: make_engine(superuser.set(username=name).render_as_string(False)) for name in names}
    yield engines
    for engine in engines.values():
        engine.dispose()


def test_the_services_role_changes_rows_but_no_tables(roles: dict[str, Engine], tmp_path: Path) -> None:
    migrate(roles["dfusion_owner"], tmp_path / "lock")
    url = roles["dfusion"].url.render_as_string(False)
    service = Service.open(settings_for(tmp_path, tmp_path / "tiny", database_url=url))  # nothing is pending
    create_job(service, RoundSpec.model_validate(round_body()))
    sweep_once(service)
    service.close()
    for statement in ("DROP TABLE scores", "ALTER TABLE jobs ADD COLUMN x int", "CREATE TABLE x (y int)"):
        with pytest.raises(ProgrammingError, match=r"must be owner|permission denied"), roles["dfusion"].begin() as own:
            own.execute(text(statement))


def test_the_services_role_is_told_that_it_may_not_migrate(roles: dict[str, Engine], tmp_path: Path) -> None:
    with pytest.raises(StartError, match="this role may not migrate"):
        migrate(roles["dfusion"], tmp_path / "lock")
    migrate(roles["dfusion_owner"], tmp_path / "lock")
    with roles["dfusion_owner"].begin() as connection:
        alembic.command.downgrade(alembic_config(connection), "-1")
    with pytest.raises(StartError, match="this role may not migrate"):
        migrate(roles["dfusion"], tmp_path / "lock")


def test_of_four_processes_that_migrate_at_once_one_does_it(url: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ran: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=_migrate, args=(url, tmp_path, ran)) for _ in range(4)]
    for process in processes:
        process.start()
    counts = sorted(ran.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    migrations = len(list(ScriptDirectory(str(ROOT / "migrations")).walk_revisions()))
    assert counts == [0, 0, 0, migrations]


def test_sqlite_is_set_up_to_keep_what_it_commits(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'dfusion.db'}")
    with engine.connect() as connection:
        pragmas = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in PRAGMAS}
    assert pragmas == PRAGMAS
    engine.dispose()


PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
