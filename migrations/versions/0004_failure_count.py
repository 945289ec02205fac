"""Failed attempts of a stage, counted apart from its lost workers; an index of the states of a job's stages.

The use that an API key makes of the workers is counted for each queue.

The time of a stage's last progress is dropped: a worker that makes no progress ends itself.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004_failure_count"
down_revision = "0003_running_sums"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("stages", sa.Column("failure_count", sa.BigInteger(), nullable=False, server_default="0"))
    unfinished = sa.text("state IN ('held', 'queued', 'running', 'waiting')")
    op.create_index(
        "ix_stages_unfinished", "stages", ["job_id", "state"], postgresql_where=unfinished, sqlite_where=unfinished
    )
    op.drop_column("stages", "progress_at")
    no_verdict = sa.text("verdict IS NULL")
    op.create_index(
        "ix_pairs_without_verdict", "pairs", ["job_id", "round"], postgresql_where=no_verdict, sqlite_where=no_verdict
    )
    _index_use_of_workers(["queue", "fair_key"])
    op.drop_index("ix_stages_fair_key_started_at", "stages")
    op.create_index("ix_stages_queue_fair_key_started_at", "stages", ["queue", "fair_key", "started_at"])


def downgrade() -> None:
    op.drop_index("ix_pairs_without_verdict", "pairs")
    op.drop_index("ix_stages_queue_fair_key_started_at", "stages")
    op.create_index("ix_stages_fair_key_started_at", "stages", ["fair_key", "started_at"])
    _index_use_of_workers(["fair_key"])
    op.add_column("stages", sa.Column("progress_at", sa.Double(), nullable=True))
    op.drop_index("ix_stages_unfinished", "stages")
    op.drop_column("stages", "failure_count")


def _index_use_of_workers(columns: list[str]) -> None:
    is_running = sa.text("state = 'running'")
    op.drop_index("ix_stages_running", "stages")
    op.create_index("ix_stages_running", "stages", columns, postgresql_where=is_running, sqlite_where=is_running)
