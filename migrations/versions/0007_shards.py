"""Shards of scoring stages leave a summary for the stage that joins them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_shards"
down_revision = "0006_bounded_requests"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("stages", sa.Column("summary", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("stages", "summary")
