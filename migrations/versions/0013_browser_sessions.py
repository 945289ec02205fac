"""Sessions of browsers that have signed in with an API key."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013_browser_sessions"
down_revision = "0012_rests"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "browser_sessions",
        sa.Column("sha256", sa.String(255), nullable=False),
        sa.Column("api_key_id", sa.String(255), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_browser_sessions"),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_keys.id"], name="fk_browser_sessions_api_key_id"),
    )
    op.create_index("ix_browser_sessions_api_key_id", "browser_sessions", ["api_key_id"])
    op.create_index("ix_browser_sessions_expires_at", "browser_sessions", ["expires_at"])


def downgrade() -> None:
    op.drop_table("browser_sessions")
