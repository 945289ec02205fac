"""Human preference tests with their questions and answers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015_preference_tests"
down_revision = "0014_verdicts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "preference_tests",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("name", sa.String(255), nullable=True),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("models", sa.JSON(), nullable=False),
        sa.Column("questions", sa.BigInteger(), nullable=False),
        sa.Column("answers", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_preference_tests"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_preference_tests_job_id"),
    )
    op.create_index("ix_preference_tests_job_id_id", "preference_tests", ["job_id", "id"])

    op.create_table(
        "preference_questions",
        sa.Column("test_id", sa.String(255), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("split", sa.String(255), nullable=False),
        sa.Column("samples", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("test_id", "number", name="pk_preference_questions"),
        sa.ForeignKeyConstraint(["test_id"], ["preference_tests.id"], name="fk_preference_questions_test_id"),
    )

    op.create_table(
        "preference_answers",
        sa.Column("test_id", sa.String(255), nullable=False),
        sa.Column("rater", sa.String(255), nullable=False),
        sa.Column("question", sa.BigInteger(), nullable=False),
        sa.Column("sample_id", sa.String(255), nullable=True),
        sa.Column("position", sa.BigInteger(), nullable=True),
        sa.Column("answered_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("test_id", "rater", "question", name="pk_preference_answers"),
        sa.ForeignKeyConstraint(
            ["test_id", "question"],
            ["preference_questions.test_id", "preference_questions.number"],
            name="fk_preference_answers_test_id",
        ),
        sa.ForeignKeyConstraint(["sample_id"], ["samples.id"], name="fk_preference_answers_sample_id"),
    )
    op.create_index("ix_preference_answers_question", "preference_answers", ["test_id", "question"])
    op.create_index("ix_preference_answers_sample_id", "preference_answers", ["sample_id"])


def downgrade() -> None:
    op.drop_table("preference_answers")
    op.drop_table("preference_questions")
    op.drop_table("preference_tests")
