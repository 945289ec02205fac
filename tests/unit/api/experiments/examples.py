"""Experiments and records for tests."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from api.experiments import Cell, Experiment, Record, cells_of
from api.experiments.records import (
    JobFacts,
    MetricFacts,
    PairFacts,
    RoundFacts,
    ScoreFacts,
    TrainingFacts,
    folder_of,
    write_record,
)

CONTENT: dict[str, Any] = {
    "name": "trial",
    "model": "tiny",
    "common": {"rounds": 2, "training": {"learning_rate": 0.001, "lora": {"rank": 2}}},
    "prompt_lists": {"shapes": {"train": "shapes-attribute-train", "held_out": "shapes-attribute-test"}},
    "seeds": [1, 2],
    "arms": {"naive": {"fusion": None}, "fused": {"fusion": {"first_step": 10}}},
    "evaluation": {"splits": ["held_out"], "rounds": "last"},
}
_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def experiment(**changes: Any) -> Experiment:
    return Experiment.parse(CONTENT | changes)


def cells_by_name(trial: Experiment) -> dict[str, Cell]:
    return {cell.name: cell for cell in cells_of(trial)}


def record(trial: Experiment, cell: Cell, means: dict[int, list[float]], version: str = "1") -> Record:
    """Create a record with scores of "judge" on two held-out prompts by round; each round has four pairs."""
    job = JobFacts(
        id=f"job_{cell.file_name}",
        origin=None,
        created_at=_AT,
        started_at=_AT,
        finished_at=_AT,
        seconds=30.0,
        stage_seconds={},
    )
    rounds = () if cell.seed is None else tuple(_round(number) for number in (1, 2))
    return Record(
        experiment=trial.name,
        list=cell.list_name,
        arm=cell.arm,
        seed=cell.seed,
        key=cell.settings.key,
        settings=cell.settings.model_dump(mode="json"),
        service="0.1.0",
        devices=("cpu",),
        jobs={"evaluation": job} if cell.seed is None else {"round": job, "evaluation": job},
        prompts={"held_out": ("a star", "a heart")},
        rounds=rounds,
        scores=tuple(
            ScoreFacts(
                round=number,
                images=100 * number,
                model="mdl_1",
                split="held_out",
                scorer="judge",
                version=version,
                means=tuple(values),
            )
            for number, values in means.items()
        ),
    )


def _round(number: int) -> RoundFacts:
    """Round 1 has two targets, both adopted; round 2 has four, one of them adopted."""
    targets = 2 * number
    return RoundFacts(
        round=number,
        images=100 * number,
        model="mdl_1",
        metrics=(_rollout("judge", 100, 0.5 + 0.1 * number), _rollout("diversity", 2, 0.25)),
        pairs=PairFacts(pairs=4, targets=targets, adopted=3 - number, means={"mask_cover": 0.1 * number}),
        training=TrainingFacts(
            figures={}, updates=({"update": 1, "loss": 0.75}, {"update": 2, "loss": 0.5 - 0.25 * (number - 1)})
        ),
    )


def _rollout(scorer: str, count: int, mean: float) -> MetricFacts:
    return MetricFacts(split="rollout", scorer=scorer, version="1", count=count, mean=mean, std=0.1)


def write_records(trial: Experiment, out: Path, means: dict[str, dict[int, list[float]]]) -> None:
    """Write records of the named cells."""
    cells = cells_by_name(trial)
    for name, cell_means in means.items():
        write_record(folder_of(out, trial.name), cells[name], record(trial, cells[name], cell_means))
