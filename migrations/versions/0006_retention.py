"""The lifetime of data: the bytes that each job stores."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006_retention"
down_revision = "0005_collection"
branch_labels = None
depends_on = None

_FILL_BYTES = """
UPDATE jobs SET storage_bytes = coalesce((SELECT sum(size_bytes) FROM artifacts WHERE job_id = jobs.id), 0)
"""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("storage_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("stages", sa.Column("checkpoint_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(_FILL_BYTES)


def downgrade() -> None:
    op.drop_column("stages", "checkpoint_bytes")
    op.drop_column("jobs", "storage_bytes")
