"""Stages that the running sums of their job include, and indexes for pages of stages and for estimates.

The index of running stages also serves the search for expired leases. The full index that did so before was preferred
to indexes that read less.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006_bounded_requests"
down_revision = "0005_collection"
branch_labels = None
depends_on = None

_IS_UNFINISHED = "state IN ('held', 'queued', 'running', 'waiting')"
_FULL_INDEX = "ix_stages_state_lease_expires_at"
_REPLACED = {
    "ix_stages_unfinished": (_IS_UNFINISHED, ["job_id", "state"]),
    "ix_stages_with_error": ("error_code IS NOT NULL", ["job_id", "number"]),
}
_INDEXES = {
    "ix_stages_unfinished": (_IS_UNFINISHED, ["job_id", "state", "number"]),
    "ix_stages_ended": ("state IN ('cancelled', 'failed', 'succeeded')", ["job_id", "state", "number"]),
    "ix_stages_with_error": ("error_code IS NOT NULL AND state <> 'cancelled'", ["job_id", "number"]),
    "ix_stages_timed": ("state = 'succeeded' AND started_at IS NOT NULL", ["base", "kind", "finished_at"]),
    "ix_stages_uncounted": ("finished_at IS NOT NULL AND NOT is_counted", ["job_id"]),
}


def upgrade() -> None:
    op.add_column("stages", sa.Column("is_counted", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE stages SET is_counted = true WHERE finished_at IS NOT NULL")

    for name in (*_REPLACED, _FULL_INDEX):
        op.drop_index(name, "stages")
    for name, (where, columns) in _INDEXES.items():
        op.create_index(name, "stages", columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def downgrade() -> None:
    for name in _INDEXES:
        op.drop_index(name, "stages")
    for name, (where, columns) in _REPLACED.items():
        op.create_index(name, "stages", columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))
    op.create_index(_FULL_INDEX, "stages", ["state", "lease_expires_at"])
    op.drop_column("stages", "is_counted")
