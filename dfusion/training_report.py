"""What a training says of itself: the self-test before it begins, and the figures of each update."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dfusion.errors import NonFiniteError, PolicyMismatchError
from dfusion.losses.objective import RowLosses
from dfusion.training_data import Example, Row


@dataclass(frozen=True)
class SelfTest:
    """Whether the policy that is trained is the one that sampled: recorded log-probs against replayed ones.

    tolerance      how far a ratio may be from 1
    compared       transitions that the policy drew, so that their recorded log-prob must be the replayed one
    replayed       transitions that it did not draw (fused targets, inverted trajectories); their log-probs are finite
    ratio_by_step  for each step_index the ratio p_replayed / p_recorded that is furthest from 1
    without_noise  the step indices that are left out because the sampler adds no noise there: they have no density
    """

    tolerance: float
    compared: int
    replayed: int
    ratio_by_step: Mapping[int, float]
    without_noise: tuple[int, ...] = ()


def self_test(
    rows: Sequence[Row],
    examples: Sequence[Example],
    replayed: torch.Tensor,
    tolerance: float,
    without_noise: Sequence[int] = (),
) -> SelfTest:
    """Compare `replayed` (rows, S), log p of all rows before the first update, with what was recorded.

    Raises NonFiniteError for a log-prob that is NaN or infinite, PolicyMismatchError for a ratio over the tolerance.
    """
    log_ratios: dict[int, list[float]] = defaultdict(list)
    foreign = 0
    for row, values in zip(rows, replayed.tolist(), strict=True):
        example = examples[row.example]
        for side, drawn, value in zip(example.sides, example.drawn, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(f"log p of examples[{row.example}] became {value} at step_index {row.step}")
            if drawn:
                log_ratio = value - float(side.log_probs[0, row.step])
                log_ratios[row.step].append(math.inf if math.isnan(log_ratio) else log_ratio)
            else:
                foreign += 1
    report = SelfTest(
        tolerance=tolerance,
        compared=sum(len(values) for values in log_ratios.values()),
        replayed=foreign,
        ratio_by_step={step: _exp(max(values, key=abs)) for step, values in sorted(log_ratios.items())},
        without_noise=tuple(without_noise),
    )
    require_ratio_one(report.ratio_by_step, tolerance, "recorded log-probs against replayed ones")
    return report


def ratio_tolerance_of(dtype: torch.dtype) -> float:
    """How far p / p_old may be from 1 for a U-Net of that dtype, unless somebody says otherwise (decision 016)."""
    return 1e-2 if dtype == torch.bfloat16 else 1e-3


def require_ratio_one(ratio_by_step: Mapping[int, float], tolerance: float, what: str) -> None:
    """Raise PolicyMismatchError naming the worst step, if a ratio is further from 1 than `tolerance`."""
    off = {step: abs(ratio - 1) for step, ratio in ratio_by_step.items()}
    worst = max(off, key=lambda step: off[step], default=None)
    if worst is not None and not off[worst] <= tolerance:
        raise PolicyMismatchError(what, worst, ratio_by_step, tolerance)


@dataclass(frozen=True)
class StepReport:
    """The rows of one step_index in one update.

    loss       mean over the rows
    ratio      mean of p / p_old over their transitions
    ratio_max  largest p / p_old, or its inverse
    kl         mean KL from the reference policy
    grad_norm  norm of what the rows add to the update's gradient; None where it is not logged
    """

    step_index: int
    rows: int
    loss: float
    ratio: float
    ratio_max: float
    kl: float
    grad_norm: float | None


@dataclass(frozen=True)
class UpdateReport:
    """One optimiser update. Figures are of the policy before it.

    update     its number, from 1
    rows       rows (example x step) whose gradients it took the mean of
    loss       mean of Eq. 6, 8 or 9 over the rows; ln 2 in the first of dpo
    margin     dpo: mean of beta * (log-ratio of the preferred - log-ratio of the rejected transition); else None
    accuracy   dpo: share of rows with a positive margin; else None
    log_ratio_preferred, log_ratio_rejected  dpo: mean of log p - log p_old of either side; else None. The margin also
               grows where both fall, and then what is preferred becomes less likely, too
    clipped    share of rows of which the clip takes a gradient away; None where there is no clip
    kl         mean over the rows of KL(p || pref), exact, mean over C*h*w; pref is the policy before the first update,
               or the base model where `kl_reference` says so
    grad_norm  norm of the gradient before clipping
    below_epsilon  share of the gradient's non-zero elements that are smaller than AdamW's epsilon, as AdamW sees them
    ratio_max  largest p / p_old or its inverse over all transitions; 1 in the first
    steps      the same by step_index, in order
    """

    update: int
    rows: int
    loss: float
    margin: float | None
    accuracy: float | None
    log_ratio_preferred: float | None
    log_ratio_rejected: float | None
    clipped: float | None
    kl: float
    grad_norm: float
    below_epsilon: float
    ratio_max: float
    steps: tuple[StepReport, ...]

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> UpdateReport:
        """The report that `dataclasses.asdict` gave. Raises TypeError or KeyError for something else."""
        return cls(**{**stored, "steps": tuple(StepReport(**step) for step in stored["steps"])})


WATCH_WINDOW = 10
"""Updates over which `falling_preferred` looks."""


def falling_preferred(reports: Sequence[UpdateReport], window: int = WATCH_WINDOW) -> tuple[float, float] | None:
    """The preferred side's mean log-ratio at the head and at the end of the last `window` updates, if it fell.

    None where it did not, with fewer than two updates, and for algorithms without sides. DPO's margin may grow while
    both sides become less likely; images then degrade although loss and accuracy look well (Diffusion-SDPO).
    """
    log_ratios = [report.log_ratio_preferred for report in reports[-window:] if report.log_ratio_preferred is not None]
    if len(log_ratios) < 2 or log_ratios[-1] >= log_ratios[0]:
        return None
    return log_ratios[0], log_ratios[-1]


@dataclass(frozen=True)
class _RowFigures:
    step: int
    loss: float
    log_ratios: tuple[float, ...]
    kl: float


class Tally:
    """Figures of one update, gathered over its micro-batches."""

    def __init__(self) -> None:
        self._rows: list[_RowFigures] = []
        self._margins: list[float] = []
        self._clipped: list[bool] = []
        self._grad_norms: dict[int, float] = {}

    def add(self, steps: Sequence[int], found: RowLosses, log_ratios: torch.Tensor, kl: torch.Tensor) -> None:
        """The rows of a micro-batch: log_ratios (R, S) and kl (R,)."""
        figures = zip(steps, found.losses.tolist(), log_ratios.tolist(), kl.tolist(), strict=True)
        self._rows += [_RowFigures(step, loss, tuple(ratios), kl) for step, loss, ratios, kl in figures]
        self._margins += [] if found.margins is None else found.margins.tolist()
        self._clipped += [] if found.clipped is None else found.clipped.tolist()

    def add_grad_norm(self, step: int, norm: float) -> None:
        self._grad_norms[step] = norm

    def ratio_by_step(self) -> dict[int, float]:
        """For each step_index the ratio furthest from 1."""
        log_ratios: dict[int, list[float]] = defaultdict(list)
        for row in self._rows:
            log_ratios[row.step] += row.log_ratios
        return {step: _exp(max(values, key=abs)) for step, values in sorted(log_ratios.items())}

    def report(self, update: int, grad_norm: float, below_epsilon: float) -> UpdateReport:
        by_step: dict[int, list[_RowFigures]] = defaultdict(list)
        for row in self._rows:
            by_step[row.step].append(row)
        steps = tuple(self._step_report(step, rows) for step, rows in sorted(by_step.items()))
        preferred, rejected = self._mean_by_side() if self._margins else (None, None)
        return UpdateReport(
            update=update,
            rows=len(self._rows),
            loss=_mean([row.loss for row in self._rows]),
            margin=_mean(self._margins) if self._margins else None,
            accuracy=_mean([margin > 0 for margin in self._margins]) if self._margins else None,
            log_ratio_preferred=preferred,
            log_ratio_rejected=rejected,
            clipped=_mean(self._clipped) if self._clipped else None,
            kl=_mean([row.kl for row in self._rows]),
            grad_norm=grad_norm,
            below_epsilon=below_epsilon,
            ratio_max=max(step.ratio_max for step in steps),
            steps=steps,
        )

    def _mean_by_side(self) -> tuple[float, ...]:
        """The mean log-ratio of the preferred and of the rejected side of all pairs."""
        return tuple(_mean(side) for side in zip(*(row.log_ratios for row in self._rows), strict=True))

    def _step_report(self, step: int, rows: Sequence[_RowFigures]) -> StepReport:
        log_ratios = [value for row in rows for value in row.log_ratios]
        return StepReport(
            step_index=step,
            rows=len(rows),
            loss=_mean([row.loss for row in rows]),
            ratio=_mean([_exp(value) for value in log_ratios]),
            ratio_max=_exp(max(abs(value) for value in log_ratios)),
            kl=_mean([row.kl for row in rows]),
            grad_norm=self._grad_norms.get(step),
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _exp(value: float) -> float:
    """e^value, at most the largest that a float holds, so that it can be written as JSON."""
    return math.exp(min(value, 700.0))
