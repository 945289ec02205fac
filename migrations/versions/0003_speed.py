"""What keeps lists, counts and claims quick with a million samples and ten thousand waiting stages."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_SAMPLE_PAGES = (
    ("job_id", "id"),
    ("job_id", "role", "id"),
    ("job_id", "round", "id"),
    ("job_id", "round", "role", "id"),
    ("prompt_set_id", "id"),
    ("prompt_set_id", "role", "id"),
    ("role", "id"),
    ("round", "id"),
)
_PAIR_PAGES = (
    ("job_id", "id"),
    ("job_id", "round", "id"),
    ("job_id", "adopted", "id"),
    ("prompt_set_id", "id"),
    ("round", "id"),
    ("adopted", "id"),
)
_PAGES = [
    (table, columns) for table, pages in (("samples", _SAMPLE_PAGES), ("pairs", _PAIR_PAGES)) for columns in pages
]
_FREE = "ix_stages_state_unmet_job_id_number"
_MADE = ("samples", "pairs", "models")

_UNMET = """
    UPDATE stages SET unmet = (
        SELECT count(*) FROM stage_dependencies JOIN stages AS needed ON needed.id = stage_dependencies.needs_id
        WHERE stage_dependencies.stage_id = stages.id AND needed.state != 'succeeded'
    ) WHERE state IN ('queued', 'held', 'waiting')
"""
_SET_OF_JOB = "(SELECT jobs.prompt_set_id FROM jobs WHERE jobs.id = {0}.job_id)"
_HELD_OUT_SET_OF_JOB = "(SELECT jobs.held_out_prompt_set_id FROM jobs WHERE jobs.id = samples.job_id)"


def upgrade() -> None:
    op.add_column("stages", sa.Column("unmet", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(_UNMET)
    op.create_index(_FREE, "stages", ["state", "unmet", "job_id", "number"])
    op.drop_index("ix_stages_state_not_before", "stages")
    op.create_index("ix_stages_state_lease_expires_at", "stages", ["state", "lease_expires_at"])
    for table in _MADE:
        op.add_column("jobs", sa.Column(f"{table}_made", sa.BigInteger(), nullable=False, server_default="0"))
        op.execute(f"UPDATE jobs SET {table}_made = (SELECT count(*) FROM {table} WHERE {table}.job_id = jobs.id)")
    for table in ("samples", "pairs"):
        op.add_column(table, sa.Column("prompt_set_id", sa.String(255), nullable=True))
        op.execute(f"UPDATE {table} SET prompt_set_id = {_SET_OF_JOB.format(table)}")
    op.execute(f"UPDATE samples SET prompt_set_id = {_HELD_OUT_SET_OF_JOB} WHERE split = 'held_out'")
    op.drop_index("ix_samples_job_id_round_role", "samples")
    for table, columns in _PAGES:
        op.create_index("_".join(("ix", table, *columns)), table, list(columns))


def downgrade() -> None:
    for table, columns in reversed(_PAGES):
        op.drop_index("_".join(("ix", table, *columns)), table)
    op.create_index("ix_samples_job_id_round_role", "samples", ["job_id", "round", "role"])
    for table in ("samples", "pairs"):
        op.drop_column(table, "prompt_set_id")
    for table in _MADE:
        op.drop_column("jobs", f"{table}_made")
    op.drop_index("ix_stages_state_lease_expires_at", "stages")
    op.create_index("ix_stages_state_not_before", "stages", ["state", "not_before"])
    op.drop_index(_FREE, "stages")
    op.drop_column("stages", "unmet")
