"""Fair claims: key, base model and priority in the row of a stage, and indexes of free and running stages.

The index of free stages has one entry for each stage that can be claimed, in the order of claims.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002_claims"
down_revision = "0001_tables"
branch_labels = None
depends_on = None

_OLD_INDEX = "ix_stages_state_unmet_job_id_number"
_KEY_INDEX = "ix_stages_fair_key_started_at"
_IS_FREE = "state = 'queued' AND unmet = 0"
_PARTIAL_INDEXES = {
    "ix_stages_running": ("state = 'running'", ["fair_key"]),
    "ix_stages_free": (_IS_FREE, ["queue", "fair_key", "base", "rank", "job_id", "number"]),
    "ix_stages_unhinted": (f"{_IS_FREE} AND hinted_at IS NULL", ["job_id"]),
}

_FILL_KEYS = "UPDATE stages SET fair_key = coalesce((SELECT api_key_id FROM jobs WHERE jobs.id = stages.job_id), '')"
_FILL_BASES = (
    "UPDATE stages SET base = coalesce((SELECT models.base FROM jobs JOIN models "
    "ON models.id = coalesce({params_model}, jobs.model_id) WHERE jobs.id = stages.job_id), '') WHERE queue = 'gpu'"
)
_PARAMS_MODEL = {"postgresql": "stages.params ->> 'model'", "sqlite": "json_extract(stages.params, '$.model')"}
"""The model in the parameters of an evaluation's stage. All other stages use the model of their job."""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("priority", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("stages", sa.Column("fair_key", sa.String(255), nullable=False, server_default=""))
    op.add_column("stages", sa.Column("base", sa.String(255), nullable=False, server_default=""))
    op.add_column("stages", sa.Column("rank", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(_FILL_KEYS)
    op.execute(_FILL_BASES.format(params_model=_PARAMS_MODEL[op.get_bind().dialect.name]))

    op.drop_index(_OLD_INDEX, "stages")
    op.create_index(_KEY_INDEX, "stages", ["fair_key", "started_at"])
    for name, (where, columns) in _PARTIAL_INDEXES.items():
        op.create_index(name, "stages", columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def downgrade() -> None:
    for name in (*_PARTIAL_INDEXES, _KEY_INDEX):
        op.drop_index(name, "stages")
    op.create_index(_OLD_INDEX, "stages", ["state", "unmet", "job_id", "number"])

    for name in ("rank", "base", "fair_key"):
        op.drop_column("stages", name)
    op.drop_column("jobs", "priority")
