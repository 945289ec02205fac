"""The samples of a file of trajectories are found by an index: the collector looks for them."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_samples_trajectory_artifact_id", "samples", ["trajectory_artifact_id"])


def downgrade() -> None:
    op.drop_index("ix_samples_trajectory_artifact_id", "samples")
