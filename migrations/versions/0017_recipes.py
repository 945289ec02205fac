"""The preview of an exported adapter, and the recipe that reproduces it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017_recipes"
down_revision = "0016_previews"
branch_labels = None
depends_on = None

_PREVIEW = "preview_artifact_id"


def upgrade() -> None:
    op.add_column("exports", sa.Column("recipe", sa.JSON(), nullable=True))
    # by SQL, since SQLite adds a foreign key only within the column's own definition
    reference = f"CONSTRAINT fk_exports_{_PREVIEW} REFERENCES artifacts (id)"
    op.execute(f"ALTER TABLE exports ADD COLUMN {_PREVIEW} VARCHAR(255) {reference}")
    op.create_index(f"ix_exports_{_PREVIEW}", "exports", [_PREVIEW])


def downgrade() -> None:
    op.drop_index(f"ix_exports_{_PREVIEW}", "exports")
    with op.batch_alter_table("exports") as exports:
        exports.drop_column(_PREVIEW)
        exports.drop_column("recipe")
