"""Migrations on both kinds of database."""

import json
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import alembic.command
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, inspect, select, text
from sqlalchemy.orm import Session

from service.db.migrate import migrate, revisions
from service.db.tables import Job, Table
from service.db.unit_of_work import make_engine
from service.errors import UnknownRevisionError
from service.jobs.kinds import RoundSpec, TrainingJobSpec, spec_of
from tests.servers import PostgresServer

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
    made = make_engine(url)
    yield made
    made.dispose()


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


FIRST_VERSION_ROWS = """
INSERT INTO prompt_sets (id, name, version, description, builtin, prompts, sha256, created_at)
    VALUES ('set_a', 'a', 1, '', false, '[]', '', 0), ('set_b', 'b', 1, '', false, '[]', '', 0);
INSERT INTO models (id, name, base, figures, created_at) VALUES ('mdl_base', 'base', 'base', '{}', 0);
INSERT INTO jobs (id, kind, state, spec, prompt_set_id, held_out_prompt_set_id, model_id, rounds, work_total,
                  created_at)
    VALUES ('job_1', 'round', 'running', '{}', 'set_a', 'set_b', 'mdl_base', 1, 1, 0);
INSERT INTO stages (id, job_id, number, kind, round, shard, params, work, state, lease_epoch, progress_done,
                    progress_total, attempt, crash_count, not_before, created_at)
    VALUES ('stg_1', 'job_1', 1, 'sample', 1, 0, '{}', 1, 'succeeded', 1, 0, 0, 1, 0, 0, 0),
           ('stg_2', 'job_1', 2, 'sample', 1, 1, '{}', 1, 'running', 1, 0, 0, 1, 0, 0, 0),
           ('stg_3', 'job_1', 3, 'score', 1, 0, '{}', 1, 'queued', 0, 0, 0, 0, 0, 0, 0);
INSERT INTO stage_dependencies (stage_id, needs_id) VALUES ('stg_3', 'stg_1'), ('stg_3', 'stg_2');
INSERT INTO artifacts (id, job_id, stage_id, slot, key, sha256, size_bytes, media_type, created_at)
    VALUES ('art_1', 'job_1', 'stg_1', 'image', 'key', '', 1, 'image/png', 0);
INSERT INTO samples (id, job_id, stage_id, round, role, split, prompt_index, prompt, number, seed, model_id,
                     image_artifact_id, created_at)
    VALUES ('smp_1', 'job_1', 'stg_1', 1, 'plain', 'train', 0, 'p', 0, 0, 'mdl_base', 'art_1', 0),
           ('smp_2', 'job_1', 'stg_1', 1, 'plain', 'held_out', 0, 'p', 0, 0, 'mdl_base', 'art_1', 0);
"""


def test_what_the_first_version_held_is_counted_by_the_newest(engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        alembic.command.upgrade(alembic_config(connection), "0001")
        for statement in FIRST_VERSION_ROWS.split(";\n"):
            connection.execute(text(statement))
    migrate(engine, tmp_path / "lock")
    with engine.connect() as connection:
        # stg_3 needs two stages, of which one has succeeded
        unmet = connection.execute(text("SELECT unmet FROM stages ORDER BY id")).scalars().all()
        made = connection.execute(text("SELECT samples_made, pairs_made, models_made FROM jobs")).one()
        sets = connection.execute(text("SELECT prompt_set_id FROM samples ORDER BY id")).scalars().all()
    assert (unmet, tuple(made), sets) == ([0, 0, 1], (2, 0, 0), ["set_a", "set_b"])


@pytest.mark.parametrize(
    ("kind", "spec", "examples"),
    [
        # 320 rows are 20 examples of 16 steps, or 53.3 of which each has 0.3 of 20 steps
        ("round", {"model": "a", "prompt_set": "a", "sampling": {"num_steps": 16}, "pairing": {}}, 20),
        ("training", {"jobs": ["job_0"], "training": {"timestep_fraction": 0.3}}, 54),
    ],
)
def test_jobs_from_before_the_recipe_are_read_as_what_they_were(
    engine: Engine, tmp_path: Path, kind: str, spec: dict[str, Any], examples: int
) -> None:
    """Stored with the defaults of that time filled in."""
    training = {"rows_per_update": 320, "lora": {"rank": 4, "alpha": 4.0}, "gradient_checkpointing": False}
    stored = spec | {"training": training | spec.get("training", {})}
    with engine.begin() as connection:
        alembic.command.upgrade(alembic_config(connection), "0001")
        for statement in FIRST_VERSION_ROWS.split(";\n"):
            connection.execute(text(statement))
        connection.execute(text("UPDATE jobs SET spec = :spec"), {"spec": json.dumps(stored)})
    migrate(engine, tmp_path / "lock")
    with Session(engine) as session:
        read = spec_of(kind, session.scalars(select(Job.spec)).one())
    assert isinstance(read, RoundSpec | TrainingJobSpec)
    assert read.training.examples_per_update == examples
    assert (read.training.lora.init, read.training.optimizer_start) == ("kaiming", "fresh")
    assert not isinstance(read, RoundSpec) or read.pairing.max_mask_cover == 1


def test_a_database_of_an_unknown_revision_is_left_alone(engine: Engine, url: str, tmp_path: Path) -> None:
    migrate(engine, tmp_path / "lock")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from-the-future'"))
    with pytest.raises(UnknownRevisionError, match="from-the-future"):
        migrate(engine, tmp_path / "lock")
    done = run_command(url, tmp_path)
    assert done.returncode == 1
    assert "from-the-future" in done.stderr and "Traceback" not in done.stderr


def run_command(url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DFUSION_DATABASE_URL": url, "DFUSION_DATA_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "service.db.migrate"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_looking_at_the_revision_leaves_the_log_alone(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with engine.connect() as connection:
        assert revisions(connection)[0] == frozenset()
    migrate(engine, tmp_path / "lock")
    caplog.clear()
    with caplog.at_level(logging.INFO), engine.connect() as connection:
        present, made = revisions(connection)
    assert (len(present), present, caplog.records) == (1, made, [])


def test_the_command_migrates(engine: Engine, url: str, tmp_path: Path) -> None:
    done = run_command(url, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(inspect(engine).get_table_names()) == {*Table.metadata.tables, "alembic_version"}


def test_the_command_says_that_there_is_no_database(tmp_path: Path) -> None:
    done = run_command("postgresql://nobody:secret@127.0.0.1:1/none", tmp_path)
    assert done.returncode == 1
    assert "cannot migrate the database" in done.stderr
    assert "Traceback" not in done.stderr and "secret" not in done.stderr


def _migrate(url: str, folder: Path, ran: "multiprocessing.Queue[int]") -> None:
    migrations = []
    logging.getLogger("alembic.runtime.migration").addHandler(_Collector(migrations))
    logging.getLogger("alembic.runtime.migration").setLevel(logging.INFO)
    engine = make_engine(url)
    migrate(engine, folder / "lock")
    engine.dispose()
    ran.put(sum(message.startswith("Running upgrade") for message in migrations))


class _Collector(logging.Handler):
    """Keeps the messages."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


def test_of_four_processes_that_migrate_at_once_one_does_it(url: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ran: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=_migrate, args=(url, tmp_path, ran)) for _ in range(4)]
    for process in processes:
        process.start()
    counts = sorted(ran.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert counts[:-1] == [0] * 3 and counts[-1] > 0


def test_sqlite_is_set_up_to_keep_what_it_commits(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'dfusion.db'}")
    with engine.connect() as connection:
        pragmas = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in PRAGMAS}
    assert pragmas == PRAGMAS
    engine.dispose()


PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
