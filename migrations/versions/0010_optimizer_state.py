"""Models keep AdamW's moments, so that a training that continues from one does not start them at 0.

Specs of earlier jobs are written as the newer settings say the same: how many examples an update takes in place of how
many rows, and the recipe of that time where the defaults are another one now (decision 017).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_JOBS = sa.table("jobs", sa.column("id", sa.String), sa.column("spec", sa.JSON))


def upgrade() -> None:
    with op.batch_alter_table("models") as models:
        models.add_column(sa.Column("optimizer_artifact_id", sa.String(255), nullable=True))
        models.create_foreign_key("fk_models_optimizer_artifact_id", "artifacts", ["optimizer_artifact_id"], ["id"])

    connection = op.get_bind()
    for job in connection.execute(sa.select(_JOBS.c.id, _JOBS.c.spec)).all():
        if "rows_per_update" in job.spec.get("training", {}):
            change = sa.update(_JOBS).where(_JOBS.c.id == job.id).values(spec=_renewed(job.spec))
            connection.execute(change)


def _renewed(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a job that counted rows. Trainings of stored pairs do not say the steps: the default is 20."""
    training = dict(spec["training"])
    steps = spec.get("sampling", {}).get("num_steps", 20)
    rows_of_example = max(1, round(steps * training.get("timestep_fraction", 1)))
    training["examples_per_update"] = math.ceil(training.pop("rows_per_update") / rows_of_example)
    training["optimizer_start"] = "fresh"
    training["lora"] = {**training.get("lora", {}), "init": "kaiming"}

    renewed = {**spec, "training": training}
    if "pairing" in spec:
        renewed["pairing"] = {**spec["pairing"], "max_mask_cover": 1}
    return renewed


def downgrade() -> None:
    with op.batch_alter_table("models") as models:
        models.drop_constraint("fk_models_optimizer_artifact_id", type_="foreignkey")
        models.drop_column("optimizer_artifact_id")
