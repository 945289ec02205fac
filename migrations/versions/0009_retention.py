"""The lifetime of data: stored bytes, sources and deletion of jobs, and indexes for what is removed by its age.

The sources of existing jobs are filled in: by references of their rows, and by the ids in their requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0009_retention"
down_revision = "0008_webhooks"
branch_labels = None
depends_on = None

_FILL_BYTES = """
UPDATE jobs SET storage_bytes = coalesce((SELECT sum(size_bytes) FROM artifacts WHERE job_id = jobs.id), 0)
"""
_REFERENCES = (
    ("models", "jobs", "id", "model_id"),
    ("models", "samples", "job_id", "model_id"),
    ("models", "models", "job_id", "parent_id"),
    ("models", "metrics", "job_id", "model_id"),
    ("models", "exports", "job_id", "model_id"),
    ("jobs", "exports", "job_id", "of_job_id"),
    ("samples", "pairs", "job_id", "reference_id"),
    ("samples", "pairs", "job_id", "base_id"),
    ("samples", "pairs", "job_id", "target_id"),
)
"""The referenced table; the referencing table, its column with the job, and its foreign key."""
_OWNERS = {
    "job": "SELECT id, id FROM jobs WHERE id IN :ids",
    "pair": "SELECT id, job_id FROM pairs WHERE id IN :ids",
    "smp": "SELECT id, job_id FROM samples WHERE id IN :ids",
    "mdl": "SELECT id, job_id FROM models WHERE id IN :ids AND job_id IS NOT NULL",
}
_ID = re.compile("(?:job|pair|smp|mdl)_[0-9a-hjkmnp-tv-z]{26}")
_PAGE = 100
_IDS = 500
_INDEXES = {
    "ix_jobs_deleted": ("deleted_at IS NOT NULL", ["purge_at", "id"]),
    "ix_jobs_retained": ("finished_at IS NOT NULL AND deleted_at IS NULL", ["state", "finished_at", "id"]),
    "ix_jobs_with_events": (
        "finished_at IS NOT NULL AND deleted_at IS NULL AND events_removed_at IS NULL",
        ["finished_at", "id"],
    ),
}
_TIMES = ("events_removed_at", "deleted_at", "purge_at")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("storage_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("stages", sa.Column("checkpoint_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(_FILL_BYTES)

    for name in _TIMES:
        op.add_column("jobs", sa.Column(name, sa.Double(), nullable=True))
    for name, (where, columns) in _INDEXES.items():
        op.create_index(name, "jobs", columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])

    op.create_table(
        "job_sources",
        sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id", name="fk_job_sources_job_id"), nullable=False),
        sa.Column(
            "source_id", sa.String(255), sa.ForeignKey("jobs.id", name="fk_job_sources_source_id"), nullable=False
        ),
        sa.PrimaryKeyConstraint("job_id", "source_id", name="pk_job_sources"),
    )
    op.create_index("ix_job_sources_source_id", "job_sources", ["source_id"])
    _fill_sources(op.get_bind())


def downgrade() -> None:
    op.drop_table("job_sources")
    op.drop_index("ix_idempotency_keys_created_at", "idempotency_keys")
    for name in _INDEXES:
        op.drop_index(name, "jobs")
    for name in reversed(_TIMES):
        op.drop_column("jobs", name)
    op.drop_column("stages", "checkpoint_bytes")
    op.drop_column("jobs", "storage_bytes")


def _fill_sources(connection: sa.Connection) -> None:
    # 1. by the references of rows
    for target, table, job, key in _REFERENCES:
        owner = "t.id" if target == "jobs" else "t.job_id"
        connection.exec_driver_sql(
            f"INSERT INTO job_sources (job_id, source_id) SELECT DISTINCT r.{job}, {owner} FROM {table} r "
            f"JOIN {target} t ON t.id = r.{key} WHERE {owner} IS NOT NULL AND r.{job} IS NOT NULL "
            f"AND r.{job} <> {owner} ON CONFLICT DO NOTHING"
        )

    # 2. by the ids in requests
    add = sa.text("INSERT INTO job_sources (job_id, source_id) VALUES (:job, :source) ON CONFLICT DO NOTHING")
    for job_id, ids in _ids_in_requests(connection):
        for source in sorted(_owners(connection, ids) - {job_id}):
            connection.execute(add, {"job": job_id, "source": source})


def _ids_in_requests(connection: sa.Connection) -> Iterator[tuple[str, set[str]]]:
    """The jobs and the ids in their requests, in pages."""
    jobs = sa.table("jobs", sa.column("id", sa.String), sa.column("spec", sa.JSON))
    last = ""
    while page := connection.execute(sa.select(jobs).where(jobs.c.id > last).order_by(jobs.c.id).limit(_PAGE)).all():
        for job_id, spec in page:
            named = {name: value for name, value in spec.items() if name not in ("label", "prompts")}
            yield job_id, set(_ID.findall(json.dumps(named)))
        last = page[-1].id


def _owners(connection: sa.Connection, ids: set[str]) -> set[str]:
    """The jobs that these rows belong to."""
    owners: set[str] = set()
    for prefix, query in _OWNERS.items():
        of_kind = sorted(row_id for row_id in ids if row_id.startswith(f"{prefix}_"))
        statement = sa.text(query).bindparams(sa.bindparam("ids", expanding=True))
        for start in range(0, len(of_kind), _IDS):
            rows = connection.execute(statement, {"ids": of_kind[start : start + _IDS]})
            owners |= {owner for _, owner in rows}
    return owners
