"""Running sums on the rows of jobs, so that a job is read without its stages; an index of the stages with errors."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003_running_sums"
down_revision = "0002_claims"
branch_labels = None
depends_on = None

_FILL = """
UPDATE jobs SET
    work_done = coalesce(
        (SELECT sum(work) FROM stages WHERE job_id = jobs.id AND state = 'succeeded'), 0),
    attempts = coalesce(
        (SELECT max(attempt) FROM stages WHERE job_id = jobs.id AND state <> 'running'), 0),
    last_round = (SELECT max(round) FROM stages WHERE job_id = jobs.id AND started_at IS NOT NULL)
"""
_INDEX = "ix_stages_with_error"
_HAS_ERROR = sa.text("error_code IS NOT NULL")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("work_done", sa.Double(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("attempts", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("last_round", sa.BigInteger(), nullable=True))
    op.execute(_FILL)

    op.create_index(_INDEX, "stages", ["job_id", "number"], postgresql_where=_HAS_ERROR, sqlite_where=_HAS_ERROR)


def downgrade() -> None:
    op.drop_index(_INDEX, "stages")
    for name in ("last_round", "attempts", "work_done"):
        op.drop_column("jobs", name)
