"""Failed attempts of a stage, counted apart from its lost workers; an index of the states of a job's stages.

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
    op.create_index("ix_stages_job_id_state", "stages", ["job_id", "state"])
    op.drop_column("stages", "progress_at")


def downgrade() -> None:
    op.add_column("stages", sa.Column("progress_at", sa.Double(), nullable=True))
    op.drop_index("ix_stages_job_id_state", "stages")
    op.drop_column("stages", "failure_count")
