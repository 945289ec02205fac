"""The prompt sets that each job uses, so that those that nothing uses can be deleted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011_used_prompt_sets"
down_revision = "0010_filters"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job_prompt_sets",
        sa.Column("job_id", sa.String(255), sa.ForeignKey("jobs.id", name="fk_job_prompt_sets_job_id"), nullable=False),
        sa.Column(
            "prompt_set_id",
            sa.String(255),
            sa.ForeignKey("prompt_sets.id", name="fk_job_prompt_sets_prompt_set_id"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("job_id", "prompt_set_id", name="pk_job_prompt_sets"),
    )
    op.create_index("ix_job_prompt_sets_prompt_set_id", "job_prompt_sets", ["prompt_set_id"])

    # 1. the prompt sets in the rows of jobs
    for column in ("prompt_set_id", "held_out_prompt_set_id"):
        op.execute(
            f"INSERT INTO job_prompt_sets (job_id, prompt_set_id) SELECT id, {column} FROM jobs "
            f"WHERE {column} IS NOT NULL ON CONFLICT DO NOTHING"
        )

    # 2. those that the stages of evaluations name
    name = "json_extract(s.params, '$.set')" if op.get_bind().dialect.name == "sqlite" else "s.params ->> 'set'"
    op.execute(
        "INSERT INTO job_prompt_sets (job_id, prompt_set_id) SELECT DISTINCT s.job_id, p.id FROM stages s "
        f"JOIN jobs j ON j.id = s.job_id JOIN prompt_sets p ON p.id = {name} "
        "WHERE j.kind = 'evaluation' ON CONFLICT DO NOTHING"
    )


def downgrade() -> None:
    op.drop_table("job_prompt_sets")
