"""A verdict of each reviewer on a pair, gold pairs, whose verdict is known, and reviews of some pairs of a round."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from alembic import op

revision = "0014_verdicts"
down_revision = "0013_browser_sessions"
branch_labels = None
depends_on = None

_JUDGED = sa.text("reviewers > 0")
_PAGE = 500
_POLICIES = {False: "none", True: "required"}
_BOOLEANS = {"none": False, "sample": True, "required": True}
_INDEXES = {
    "ix_pairs_judged": ["id"],
    "ix_pairs_judged_of_job": ["job_id", "id"],
    "ix_pairs_judged_of_prompt_set": ["prompt_set_id", "id"],
}


def upgrade() -> None:
    op.create_table(
        "pair_verdicts",
        sa.Column("pair_id", sa.String(255), nullable=False),
        sa.Column("reviewer", sa.String(255), nullable=False),
        sa.Column("prefer", sa.String(255), nullable=True),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("pair_id", "reviewer", name="pk_pair_verdicts"),
        sa.ForeignKeyConstraint(["pair_id"], ["pairs.id"], name="fk_pair_verdicts_pair_id"),
    )
    op.add_column("pairs", sa.Column("reviewers", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("pairs", sa.Column("review_exempt", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("pairs", sa.Column("gold", sa.String(255), nullable=True))

    op.execute(
        "INSERT INTO pair_verdicts (pair_id, reviewer, prefer, revision, created_at) "
        "SELECT id, coalesce(verdict_by, ''), verdict, revision, coalesce(verdict_at, created_at) "
        "FROM pairs WHERE verdict IS NOT NULL"
    )
    op.execute("UPDATE pairs SET reviewers = 1 WHERE verdict IS NOT NULL")
    for name, columns in _INDEXES.items():
        op.create_index(name, "pairs", columns, postgresql_where=_JUDGED, sqlite_where=_JUDGED)
    _rewrite_reviews(op.get_bind(), _POLICIES)


def downgrade() -> None:
    """Each pair keeps the combined verdict of its reviewers."""
    _rewrite_reviews(op.get_bind(), _BOOLEANS)
    for name in _INDEXES:
        op.drop_index(name, "pairs")
    op.drop_column("pairs", "gold")
    op.drop_column("pairs", "review_exempt")
    op.drop_column("pairs", "reviewers")
    op.drop_table("pair_verdicts")


def _rewrite_reviews(connection: sa.Connection, values: Mapping[object, object]) -> None:
    """Replace `review` in the requests of round jobs, in pages."""
    jobs = sa.table("jobs", sa.column("id", sa.String), sa.column("kind", sa.String), sa.column("spec", sa.JSON))
    rounds = sa.select(jobs.c.id, jobs.c.spec).where(jobs.c.kind == "round").order_by(jobs.c.id).limit(_PAGE)
    last = ""
    while page := connection.execute(rounds.where(jobs.c.id > last)).all():
        for job_id, spec in page:
            if spec.get("review") in values:
                rewritten = spec | {"review": values[spec["review"]]}
                connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(spec=rewritten))
        last = page[-1].id
