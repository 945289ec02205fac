"""The best round of a run, and the warning sign after which it stopped before its last round."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018_best_rounds"
down_revision = "0017_recipes"
branch_labels = None
depends_on = None

_HAS_BEST_AND_IS_KEPT = sa.text("best IS NOT NULL AND deleted_at IS NULL")


def upgrade() -> None:
    for name in ("best", "stopped"):
        op.add_column("jobs", sa.Column(name, sa.JSON(none_as_null=True), nullable=True))
    op.create_index(
        "ix_jobs_with_best",
        "jobs",
        ["id"],
        postgresql_where=_HAS_BEST_AND_IS_KEPT,
        sqlite_where=_HAS_BEST_AND_IS_KEPT,
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_with_best", "jobs")
    for name in ("best", "stopped"):
        op.drop_column("jobs", name)
