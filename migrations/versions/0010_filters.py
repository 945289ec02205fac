"""Indexes of lists by time of creation and by prompt."""

from __future__ import annotations

from alembic import op

revision = "0010_filters"
down_revision = "0009_retention"
branch_labels = None
depends_on = None

_INDEXES = (
    ("jobs", "created_at"),
    ("samples", "created_at"),
    ("samples", "prompt"),
    ("pairs", "created_at"),
    ("pairs", "prompt"),
)


def upgrade() -> None:
    for table, column in _INDEXES:
        op.create_index(f"ix_{table}_{column}_id", table, [column, "id"])


def downgrade() -> None:
    for table, column in reversed(_INDEXES):
        op.drop_index(f"ix_{table}_{column}_id", table)
