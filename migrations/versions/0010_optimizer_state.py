"""Models keep AdamW's moments, so that a training that continues from one does not start them at 0."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("models") as models:
        models.add_column(sa.Column("optimizer_artifact_id", sa.String(255), nullable=True))
        models.create_foreign_key("fk_models_optimizer_artifact_id", "artifacts", ["optimizer_artifact_id"], ["id"])


def downgrade() -> None:
    with op.batch_alter_table("models") as models:
        models.drop_constraint("fk_models_optimizer_artifact_id", type_="foreignkey")
        models.drop_column("optimizer_artifact_id")
