"""The cells of an experiment and their selection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from api.experiments.errors import ExperimentError
from api.experiments.format import BASE, CellSettings, Experiment, digest


@dataclass(frozen=True)
class Cell:
    """One arm on one prompt list with one seed. `seed` is None for the model before training."""

    list_name: str
    arm: str
    seed: int | None
    settings: CellSettings

    @property
    def name(self) -> str:
        """Name in messages: `attribute/fused/seed 1`, `attribute/base`."""
        seed = [] if self.seed is None else [f"seed {self.seed}"]
        return "/".join((self.list_name, self.arm, *seed))

    @property
    def file_name(self) -> str:
        """File name of its record."""
        seed = [] if self.seed is None else [f"seed{self.seed}"]
        return "--".join((self.list_name, self.arm, *seed)) + ".json"

    @property
    def round_label(self) -> str:
        """Label of its round job. It depends only on the job's settings, so that experiments share equal jobs."""
        return f"{self._title} [{digest([self.settings.revision, self.round_body])[:12]}]"

    @property
    def evaluation_label(self) -> str:
        """Label of its evaluation job."""
        return f"evaluation of {self._title} [{self.settings.key[:12]}]"

    @property
    def _title(self) -> str:
        training = self.settings.round
        if training is None:
            return f"{self.settings.model} before training"
        kind = "naive" if training.fusion is None else "fused"
        return f"{training.training.algorithm} {kind}, {training.prompt_set}, seed {training.seed}"

    @property
    def round_body(self) -> dict[str, Any] | None:
        """The complete body of POST /rounds, without the label; None for the model before training."""
        return None if self.settings.round is None else self.settings.round.model_dump(mode="json")


@dataclass(frozen=True)
class Selection:
    """Selects cells by list, arm and seed; an empty field selects all."""

    lists: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    def require_known(self, experiment: Experiment) -> None:
        """Check the names and seeds. Raises ExperimentError for one that the experiment does not have."""
        known = (
            ("list", self.lists, tuple(experiment.prompt_lists)),
            ("arm", self.arms, (BASE, *experiment.arms)),
            ("seed", self.seeds, experiment.seeds),
        )
        for kind, chosen, names in known:
            for name in chosen:
                if name not in names:
                    raise ExperimentError(f"{kind}: expected one of {', '.join(map(str, names))}, got {name}")

    def includes(self, cell: Cell) -> bool:
        """Whether the cell is selected; the model before training belongs to every seed."""
        return (
            (not self.lists or cell.list_name in self.lists)
            and (not self.arms or cell.arm in self.arms)
            and (not self.seeds or cell.seed is None or cell.seed in self.seeds)
        )


def cells_of(experiment: Experiment, selection: Selection | None = None) -> tuple[Cell, ...]:
    """List the selected cells in the order in which they run.

    Base models are first, then all cells of one seed after another, so that a stopped run has complete comparisons.
    Raises ExperimentError for names that the experiment does not have.
    """
    selection = selection or Selection()
    selection.require_known(experiment)
    return tuple(filter(selection.includes, _all_cells(experiment)))


def _all_cells(experiment: Experiment) -> Iterator[Cell]:
    if experiment.evaluation.include_base:
        yield from (_cell(experiment, list_name, BASE, None) for list_name in experiment.prompt_lists)
    for seed in experiment.seeds:
        for list_name in experiment.prompt_lists:
            yield from (_cell(experiment, list_name, arm, seed) for arm in experiment.arms)


def _cell(experiment: Experiment, list_name: str, arm: str, seed: int | None) -> Cell:
    return Cell(list_name, arm, seed, experiment.settings(list_name, arm, seed))
