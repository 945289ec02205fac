"""A pair says which version of its scorer chose it: scores of another version are not comparable."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_OF_ITS_BASE = """
UPDATE pairs SET scorer_version = COALESCE(
    (SELECT MAX(version) FROM scores WHERE scores.sample_id = pairs.base_id AND scores.scorer = pairs.scorer), ''
)
"""


def upgrade() -> None:
    op.add_column("pairs", sa.Column("scorer_version", sa.String(), nullable=True))
    op.execute(_OF_ITS_BASE)
    with op.batch_alter_table("pairs") as pairs:
        pairs.alter_column("scorer_version", nullable=False)


def downgrade() -> None:
    with op.batch_alter_table("pairs") as pairs:
        pairs.drop_column("scorer_version")
