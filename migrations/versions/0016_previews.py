"""Previews: small images of the denoising steps of samples, and of the masks of references."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016_previews"
down_revision = "0015_preference_tests"
branch_labels = None
depends_on = None

_REFERENCES = {
    "sample_id": "samples",
    "job_id": "jobs",
    "strip_artifact_id": "artifacts",
    "mask_artifact_id": "artifacts",
}


def upgrade() -> None:
    keys = [
        sa.Column(
            name,
            sa.String(255),
            sa.ForeignKey(f"{table}.id", name=f"fk_previews_{name}"),
            nullable=name == "mask_artifact_id",
        )
        for name, table in _REFERENCES.items()
    ]
    op.create_table(
        "previews",
        *keys,
        sa.Column("num_steps", sa.BigInteger(), nullable=False),
        sa.Column("steps", sa.JSON(), nullable=False),
        sa.Column("mask_settings", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("sample_id", "job_id", name="pk_previews"),
    )
    for name in ("job_id", "strip_artifact_id", "mask_artifact_id"):
        op.create_index(f"ix_previews_{name}", "previews", [name])


def downgrade() -> None:
    op.drop_table("previews")
