"""How long jobs have rested, so that their remaining time is estimated from the time in which they ran."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012_rests"
down_revision = "0011_used_prompt_sets"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("rest_seconds", sa.Double(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("rest_since", sa.Double(), nullable=True))
    op.execute("UPDATE jobs SET rest_since = finished_at WHERE finished_at IS NOT NULL")
    op.execute("UPDATE jobs SET rest_since = pause_requested_at WHERE state = 'paused'")


def downgrade() -> None:
    op.drop_column("jobs", "rest_since")
    op.drop_column("jobs", "rest_seconds")
