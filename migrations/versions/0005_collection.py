"""Collection in bounded batches: what is collected already, and an index of each foreign key.

Without such an index, the deletion of a row reads each referencing table as a whole.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_collection"
down_revision = "0004_failure_count"
branch_labels = None
depends_on = None

_FOREIGN_KEYS = (
    ("models", "parent_id"),
    ("models", "stage_id"),
    ("models", "adapter_artifact_id"),
    ("models", "optimizer_artifact_id"),
    ("jobs", "prompt_set_id"),
    ("jobs", "held_out_prompt_set_id"),
    ("jobs", "model_id"),
    ("jobs", "origin_id"),
    ("samples", "stage_id"),
    ("samples", "model_id"),
    ("samples", "image_artifact_id"),
    ("pairs", "stage_id"),
    ("pairs", "mask_artifact_id"),
    ("metrics", "model_id"),
    ("model_aliases", "model_id"),
    ("exports", "job_id"),
    ("exports", "artifact_id"),
    ("events", "stage_id"),
    ("idempotency_keys", "job_id"),
)
_PARTIAL_INDEXES = {
    "ix_jobs_ended": ("jobs", "finished_at IS NOT NULL", ["trajectories_kept", "finished_at", "id"]),
    "ix_stages_with_checkpoint": ("stages", "checkpoint_key IS NOT NULL", ["id"]),
    "ix_stages_uncollected": (
        "stages",
        "finished_at IS NOT NULL AND lease_epoch > 0 AND (collected_at IS NULL OR collected_at < finished_at)",
        ["finished_at", "id"],
    ),
}


def upgrade() -> None:
    op.add_column("jobs", sa.Column("trajectories_kept", sa.String(255), nullable=False, server_default="all"))
    op.add_column("stages", sa.Column("collected_at", sa.Double(), nullable=True))

    for table, column in _FOREIGN_KEYS:
        op.create_index(f"ix_{table}_{column}", table, [column])
    op.create_index("ix_artifacts_job_id_id", "artifacts", ["job_id", "id"])
    op.drop_index("ix_artifacts_job_id", "artifacts")
    for name, (table, where, columns) in _PARTIAL_INDEXES.items():
        op.create_index(name, table, columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def downgrade() -> None:
    for name, (table, _, _) in _PARTIAL_INDEXES.items():
        op.drop_index(name, table)
    op.create_index("ix_artifacts_job_id", "artifacts", ["job_id"])
    op.drop_index("ix_artifacts_job_id_id", "artifacts")
    for table, column in _FOREIGN_KEYS:
        op.drop_index(f"ix_{table}_{column}", table)

    op.drop_column("stages", "collected_at")
    op.drop_column("jobs", "trajectories_kept")
