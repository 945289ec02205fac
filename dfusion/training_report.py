"""Reports of a training: the self-test before its first update, and the metrics of each update."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from dfusion.errors import NonFiniteError, PolicyMismatchError
from dfusion.losses.objective import RowLosses
from dfusion.training_data import Example, Row


@dataclass(frozen=True)
class SelfTest:
    """Verifies that the policy to be trained sampled the trajectories: replayed log-probs against recorded ones.

    tolerance      largest accepted distance of a ratio from 1
    compared       number of on-policy transitions: their replayed log-prob must equal the recorded one
    replayed       number of off-policy transitions (fused targets, inverted trajectories): their log-prob is finite
    ratio_by_step  for each step_index, the ratio p_replayed / p_recorded furthest from 1
    without_noise  step indices left out because the sampler adds no noise there, so that they have no density
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
    """Compare `replayed` (rows, S), log p of all rows before the first update, with the recorded log-probs.

    Raises:
        NonFiniteError: A log-prob is NaN or infinite.
        PolicyMismatchError: A ratio differs from 1 by more than the tolerance.
    """
    log_ratios: dict[int, list[float]] = defaultdict(list)
    off_policy = 0
    for row, values in zip(rows, replayed.tolist(), strict=True):
        example = examples[row.example]
        for side, on_policy, value in zip(example.sides, example.sides_on_policy, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(f"log p of examples[{row.example}] became {value} at step_index {row.step}")
            if on_policy:
                log_ratio = value - float(side.log_probs[0, row.step])
                log_ratios[row.step].append(math.inf if math.isnan(log_ratio) else log_ratio)
            else:
                off_policy += 1

    ratio_by_step = _worst_ratios(log_ratios)
    require_ratio_one(ratio_by_step, tolerance, "recorded log-probs against replayed ones")
    return SelfTest(
        tolerance=tolerance,
        compared=sum(map(len, log_ratios.values())),
        replayed=off_policy,
        ratio_by_step=ratio_by_step,
        without_noise=tuple(without_noise),
    )


def ratio_tolerance_of(dtype: torch.dtype) -> float:
    """The default tolerance of |p / p_old - 1| for a U-Net of this dtype (decision 016)."""
    return 1e-2 if dtype == torch.bfloat16 else 1e-3


def require_ratio_one(ratio_by_step: Mapping[int, float], tolerance: float, what: str) -> None:
    """Raise PolicyMismatchError, naming the worst step, if a ratio differs from 1 by more than `tolerance`."""
    distances = {step: abs(ratio - 1) for step, ratio in ratio_by_step.items()}
    worst = max(distances, key=lambda step: distances[step], default=None)
    if worst is not None and not distances[worst] <= tolerance:
        raise PolicyMismatchError(what, worst, ratio_by_step, tolerance)


@dataclass(frozen=True)
class StepReport:
    """The rows of one step_index in one update.

    loss       mean over the rows
    ratio      mean of p / p_old over their transitions
    ratio_max  largest p / p_old, or its inverse
    kl         mean KL from the reference policy
    grad_norm  norm of the rows' part of the update's gradient; None if it is not logged
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
    """One optimiser update. The metrics are those of the policy before it.

    update     number of the update, from 1
    rows       number of rows (example x step) in the mean gradient
    loss       mean of Eq. 6, 8 or 9 over the rows; ln 2 in the first update of dpo
    margin     dpo: mean of beta * (log-ratio of the preferred - log-ratio of the rejected transition); otherwise None
    accuracy   dpo: share of rows with a positive margin; otherwise None
    log_ratio_preferred, log_ratio_rejected  dpo: mean of log p - log p_old of each side; otherwise None. The margin can
               grow while both fall; the preferred side then becomes less likely, too
    clipped    share of rows in which the clip removes a gradient; None without a clip
    kl         mean over the rows of KL(p || pref), exact, mean over C*h*w; pref is the policy before the first update,
               or the base model with `kl_reference="base"`
    grad_norm  norm of the gradient before clipping
    below_epsilon  share of the gradient's non-zero elements below AdamW's epsilon, at the scale that AdamW receives
    ratio_max  largest p / p_old or its inverse over all transitions; 1 in the first update
    steps      the same metrics by step_index, in order
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
        """The inverse of `dataclasses.asdict`. Raises TypeError or KeyError for other mappings."""
        return cls(**{**stored, "steps": tuple(StepReport(**step) for step in stored["steps"])})


WATCH_WINDOW = 10
"""Number of updates that `falling_preferred` considers."""


def falling_preferred(reports: Sequence[UpdateReport], window: int = WATCH_WINDOW) -> tuple[float, float] | None:
    """The preferred side's mean log-ratio at the start and at the end of the last `window` updates, if it fell.

    None if it did not fall, with fewer than two updates, and for algorithms without pairs. DPO's margin can grow while
    both sides become less likely. Images then degrade although loss and accuracy improve (Diffusion-SDPO).
    """
    log_ratios = [report.log_ratio_preferred for report in reports[-window:] if report.log_ratio_preferred is not None]
    if len(log_ratios) < 2 or log_ratios[-1] >= log_ratios[0]:
        return None
    return log_ratios[0], log_ratios[-1]


@dataclass(frozen=True)
class _RowMetrics:
    step: int
    loss: float
    log_ratios: tuple[float, ...]
    kl: float


class Tally:
    """Collects the metrics of one update over its micro-batches."""

    def __init__(self) -> None:
        self._rows: list[_RowMetrics] = []
        self._margins: list[float] = []
        self._clipped: list[bool] = []
        self._grad_norms: dict[int, float] = {}

    def add(self, steps: Sequence[int], results: RowLosses, log_ratios: torch.Tensor, kl: torch.Tensor) -> None:
        """Add the rows of a micro-batch, with log_ratios (R, S) and kl (R,)."""
        metrics = zip(steps, results.losses.tolist(), log_ratios.tolist(), kl.tolist(), strict=True)
        self._rows += [_RowMetrics(step, loss, tuple(ratios), kl) for step, loss, ratios, kl in metrics]
        self._margins += [] if results.margins is None else results.margins.tolist()
        self._clipped += [] if results.clipped is None else results.clipped.tolist()

    def add_grad_norm(self, step: int, norm: float) -> None:
        self._grad_norms[step] = norm

    def ratio_by_step(self) -> dict[int, float]:
        """For each step_index, the ratio furthest from 1."""
        log_ratios: dict[int, list[float]] = defaultdict(list)
        for row in self._rows:
            log_ratios[row.step] += row.log_ratios
        return _worst_ratios(log_ratios)

    def report(self, update: int, grad_norm: float, below_epsilon: float) -> UpdateReport:
        """The report of all rows so far."""
        by_step: dict[int, list[_RowMetrics]] = defaultdict(list)
        for row in self._rows:
            by_step[row.step].append(row)
        steps = tuple(self._step_report(step, rows) for step, rows in sorted(by_step.items()))

        loss = _mean([row.loss for row in self._rows])
        kl = _mean([row.kl for row in self._rows])
        accuracy = _mean([margin > 0 for margin in self._margins]) if self._margins else None
        preferred, rejected = self._mean_by_side() if self._margins else (None, None)
        return UpdateReport(
            update=update,
            rows=len(self._rows),
            loss=loss,
            margin=_mean(self._margins) if self._margins else None,
            accuracy=accuracy,
            log_ratio_preferred=preferred,
            log_ratio_rejected=rejected,
            clipped=_mean(self._clipped) if self._clipped else None,
            kl=kl,
            grad_norm=grad_norm,
            below_epsilon=below_epsilon,
            ratio_max=max(step.ratio_max for step in steps),
            steps=steps,
        )

    def _mean_by_side(self) -> tuple[float, ...]:
        """The mean log-ratio of the preferred and of the rejected side of all pairs."""
        log_ratios = [row.log_ratios for row in self._rows]
        return tuple(_mean(side) for side in zip(*log_ratios, strict=True))

    def _step_report(self, step: int, rows: Sequence[_RowMetrics]) -> StepReport:
        log_ratios = list(chain.from_iterable(row.log_ratios for row in rows))
        loss = _mean([row.loss for row in rows])
        ratio = _mean([_exp(value) for value in log_ratios])
        ratio_max = _exp(max(map(abs, log_ratios)))
        kl = _mean([row.kl for row in rows])
        return StepReport(step, len(rows), loss, ratio, ratio_max, kl, self._grad_norms.get(step))


def _worst_ratios(log_ratios: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """For each step_index, the ratio furthest from 1."""
    return {step: _exp(max(values, key=abs)) for step, values in sorted(log_ratios.items())}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _exp(value: float) -> float:
    """e^value, limited to what a float can hold, so that it can be written as JSON."""
    return math.exp(min(value, 700.0))
