"""Jobs of every kind: what they start from may be none or many; queues, pauses, verdicts, aliases and exports."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_NULLABLE = ("prompt_set_id", "model_id")
_METRICS = "job_id, round, split, scorer, model_id, version, count, mean, std, created_at"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        for name in _NULLABLE:
            jobs.alter_column(name, existing_type=sa.String(255), nullable=True)
        jobs.add_column(sa.Column("origin_id", sa.String(255), nullable=True))
        jobs.add_column(sa.Column("result", sa.JSON(), nullable=True))
        jobs.add_column(sa.Column("pause_requested_at", sa.Double(), nullable=True))
        jobs.create_foreign_key("fk_jobs_origin_id", "jobs", ["origin_id"], ["id"])
    with op.batch_alter_table("stages") as stages:
        stages.add_column(sa.Column("queue", sa.String(255), nullable=False, server_default="gpu"))
        stages.add_column(sa.Column("pause_requested_at", sa.Double(), nullable=True))
    op.execute("UPDATE stages SET queue = 'cpu' WHERE kind = 'select'")
    with op.batch_alter_table("stages") as stages:
        stages.alter_column("queue", existing_type=sa.String(255), nullable=False, server_default=None)
    with op.batch_alter_table("pairs") as pairs:
        pairs.add_column(sa.Column("thresholds", sa.JSON(), nullable=True))
        pairs.add_column(sa.Column("verdict", sa.String(255), nullable=True))
        pairs.add_column(sa.Column("verdict_by", sa.String(255), nullable=True))
        pairs.add_column(sa.Column("verdict_at", sa.Double(), nullable=True))
        pairs.add_column(sa.Column("revision", sa.BigInteger(), nullable=False, server_default="0"))
    with op.batch_alter_table("pairs") as pairs:
        pairs.alter_column("revision", existing_type=sa.BigInteger(), nullable=False, server_default=None)
    _rebuild_metrics("model_id", sa.Text())
    op.create_table(
        "model_aliases",
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_model_aliases"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_model_aliases_model_id"),
    )
    op.create_table(
        "exports",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("model_id", sa.String(255), nullable=True),
        sa.Column("of_job_id", sa.String(255), nullable=True),
        sa.Column("format", sa.String(255), nullable=False),
        sa.Column("artifact_id", sa.String(255), nullable=False),
        sa.Column("figures", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_exports"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_exports_job_id"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_exports_model_id"),
        sa.ForeignKeyConstraint(["of_job_id"], ["jobs.id"], name="fk_exports_of_job_id"),
        sa.ForeignKeyConstraint(["artifact_id"], ["artifacts.id"], name="fk_exports_artifact_id"),
    )
    op.create_index("ix_exports_model_id", "exports", ["model_id"])
    op.create_index("ix_exports_of_job_id", "exports", ["of_job_id"])


def downgrade() -> None:
    """Refuses where rows exist that the older version cannot hold: jobs of other kinds than rounds."""
    connection = op.get_bind()
    if connection.execute(sa.text("SELECT 1 FROM jobs WHERE kind != 'round' LIMIT 1")).first():
        raise RuntimeError("this database holds jobs that version 0001 does not know; they would be lost")
    op.drop_table("exports")
    op.drop_table("model_aliases")
    _rebuild_metrics(None, sa.String(255))
    with op.batch_alter_table("pairs") as pairs:
        for name in ("thresholds", "verdict", "verdict_by", "verdict_at", "revision"):
            pairs.drop_column(name)
    with op.batch_alter_table("stages") as stages:
        stages.drop_column("queue")
        stages.drop_column("pause_requested_at")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_constraint("fk_jobs_origin_id", type_="foreignkey")
        for name in ("origin_id", "result", "pause_requested_at"):
            jobs.drop_column(name)
        for name in _NULLABLE:
            jobs.alter_column(name, existing_type=sa.String(255), nullable=False)


def _rebuild_metrics(further_key: str | None, version: sa.types.TypeEngine[str]) -> None:
    """Another primary key: SQLite cannot alter one in place."""
    op.rename_table("metrics", "metrics_before")
    if op.get_bind().dialect.name == "postgresql":  # the names of constraints are the schema's, not the table's
        op.execute("ALTER TABLE metrics_before DROP CONSTRAINT pk_metrics")
    keys = ["job_id", "round", "split", "scorer", *([further_key] if further_key else [])]
    op.create_table(
        "metrics",
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("round", sa.BigInteger(), nullable=False),
        sa.Column("split", sa.String(255), nullable=False),
        sa.Column("scorer", sa.String(255), nullable=False),
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("version", version, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("mean", sa.Double(), nullable=False),
        sa.Column("std", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint(*keys, name="pk_metrics"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_metrics_job_id"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_metrics_model_id"),
    )
    op.execute(f"INSERT INTO metrics ({_METRICS}) SELECT {_METRICS} FROM metrics_before")
    op.drop_table("metrics_before")
