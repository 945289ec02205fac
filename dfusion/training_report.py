"""Reports of a training: the self-test before its first update, and the metrics of each update."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch

from dfusion.distributed import SINGLE_PROCESS, Ranks
from dfusion.errors import NonFiniteError, PolicyMismatchError
from dfusion.losses.objective import RowLosses
from dfusion.training_data import Row


@dataclass(frozen=True)
class Replayed:
    """A transition that was evaluated under the policy before the first update.

    row       its row
    log_prob  log p over all elements
    recorded  the recorded log p; None if another network sampled the trajectory
    """

    row: Row
    log_prob: float
    recorded: float | None


@dataclass(frozen=True)
class SelfTest:
    """Verifies that the policy to be trained sampled the trajectories: replayed log-probs against recorded ones.

    It covers the transitions that are evaluated under the policy before the first update (`Trainer`): all of the first
    update, and later ones whose recorded log-probs are not enough.

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

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> SelfTest:
        """The inverse of `dataclasses.asdict`, also after JSON.

        Raises TypeError, KeyError, ValueError or AttributeError for other mappings.
        """
        ratios = {int(step): ratio for step, ratio in stored["ratio_by_step"].items()}
        return cls(**{**stored, "ratio_by_step": ratios, "without_noise": tuple(stored["without_noise"])})


def self_test(transitions: Iterable[Replayed], tolerance: float, without_noise: Sequence[int] = ()) -> SelfTest:
    """Compare replayed log-probs with recorded ones.

    Raises:
        NonFiniteError: A replayed log-prob is NaN or infinite.
        PolicyMismatchError: A ratio differs from 1 by more than the tolerance.
    """
    log_ratios: dict[int, list[float]] = defaultdict(list)
    off_policy = 0
    for transition in transitions:
        row = transition.row
        if not math.isfinite(transition.log_prob):
            value = transition.log_prob
            raise NonFiniteError(f"log p of examples[{row.example}] became {value} at step_index {row.step}")
        if transition.recorded is None:
            off_policy += 1
        else:
            log_ratio = transition.log_prob - transition.recorded
            log_ratios[row.step].append(math.inf if math.isnan(log_ratio) else log_ratio)

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
    kl         mean KL from the reference policy, over the rows for which it is known; None if there are none
    grad_norm  norm of the rows' part of the update's gradient; None if it is not logged
    """

    step_index: int
    rows: int
    loss: float
    ratio: float
    ratio_max: float
    kl: float | None
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
               or the base model with `kl_reference="base"`. dpo and ddpo do not need it: it is the mean over the
               transitions that were evaluated under pref for another reason, and None if there are none
    grad_norm  norm of the gradient before clipping
    below_epsilon  share of the gradient's non-zero elements below AdamW's epsilon, at the scale that AdamW receives
    ratio_max  largest p / p_old or its inverse over all transitions; 1 in the first update
    steps      the same metrics by step_index, in order
    seconds    duration of the update
    peak_bytes  peak memory of tensors on the GPU, since its statistics were reset; on a CPU that of the process
    """

    update: int
    rows: int
    loss: float
    margin: float | None
    accuracy: float | None
    log_ratio_preferred: float | None
    log_ratio_rejected: float | None
    clipped: float | None
    kl: float | None
    grad_norm: float
    below_epsilon: float
    ratio_max: float
    steps: tuple[StepReport, ...]
    seconds: float = field(default=0.0, compare=False)
    peak_bytes: int = field(default=0, compare=False)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> UpdateReport:
        """The inverse of `dataclasses.asdict`. Raises TypeError or KeyError for other mappings."""
        return cls(**{**stored, "steps": tuple(StepReport(**step) for step in stored["steps"])})


def rows_per_second(reports: Sequence[UpdateReport]) -> float | None:
    """The rows of all updates by their duration. None without updates."""
    seconds = math.fsum(report.seconds for report in reports)
    return sum(report.rows for report in reports) / seconds if seconds else None


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
    """The metrics of a row; NaN for what it does not have."""

    step: int
    loss: float
    kl: float
    margin: float
    clipped: float
    log_ratios: tuple[float, ...]


class Tally:
    """Collects the metrics of one update over its micro-batches. They stay on the device until they are read.

    Args:
        sides: S of the log-ratios.
        ranks: The processes whose rows are reported together.
    """

    def __init__(self, sides: int = 1, ranks: Ranks = SINGLE_PROCESS) -> None:
        self._ranks = ranks
        self._metrics: list[torch.Tensor] = []
        self._no_metrics = torch.empty(0, 4 + sides)
        self._steps: list[int] = []
        self._grad_norms: dict[int, torch.Tensor] = {}

    def add(self, steps: Sequence[int], results: RowLosses, log_ratios: torch.Tensor, kl: torch.Tensor) -> None:
        """Add the rows of a micro-batch, with log_ratios (R, S) and kl (R,), NaN where it is not known."""
        none = torch.full_like(kl, torch.nan)
        margins = none if results.margins is None else results.margins
        clipped = none if results.clipped is None else results.clipped.to(kl.dtype)
        columns = torch.stack([results.losses, kl, margins, clipped], 1)
        self._metrics.append(torch.cat([columns, log_ratios], 1).detach())
        self._steps += steps

    def add_grad_norm(self, step: int, norm: torch.Tensor) -> None:
        """Add the norm, (), of one step's part of the gradient."""
        self._grad_norms[step] = norm

    @cached_property
    def _rows(self) -> list[_RowMetrics]:
        """The metrics of all rows of all ranks, read once after the last `add`."""
        metrics = torch.cat(self._metrics).cpu() if self._metrics else self._no_metrics
        steps = torch.tensor(self._steps, dtype=torch.float64)[:, None]
        metrics_of_all = self._ranks.all_gather(torch.cat([steps, metrics.double()], 1))
        rows = []
        for step, loss, kl, margin, clipped, *log_ratios in metrics_of_all.tolist():
            rows.append(_RowMetrics(int(step), loss, kl, margin, clipped, tuple(log_ratios)))
        return rows

    @cached_property
    def _norms(self) -> dict[int, float]:
        if not self._grad_norms:
            return {}
        return dict(zip(self._grad_norms, torch.stack(list(self._grad_norms.values())).tolist(), strict=True))

    def require_finite(self, update: int, advice: str = "") -> None:
        """Raise NonFiniteError, naming the step, for a loss or a gradient that is NaN or infinite."""
        for row in self._rows:
            if not math.isfinite(row.loss):
                raise NonFiniteError(f"loss became {row.loss} in update {update} at step_index {row.step}")
        for step, norm in self._norms.items():
            if not math.isfinite(norm):
                raise NonFiniteError(f"gradient became {norm} in update {update} at step_index {step}{advice}")

    def report(self, update: int, grad_norm: float, below_epsilon: float) -> UpdateReport:
        """The report of all rows."""
        by_step: dict[int, list[_RowMetrics]] = defaultdict(list)
        for row in self._rows:
            by_step[row.step].append(row)
        steps = tuple(self._step_report(step, rows) for step, rows in sorted(by_step.items()))

        margins = [row.margin for row in self._rows if not math.isnan(row.margin)]
        clipped = [row.clipped for row in self._rows if not math.isnan(row.clipped)]
        preferred, rejected = self._mean_by_side() if margins else (None, None)
        return UpdateReport(
            update=update,
            rows=len(self._rows),
            loss=_mean([row.loss for row in self._rows]),
            margin=_mean(margins) if margins else None,
            accuracy=_mean([margin > 0 for margin in margins]) if margins else None,
            log_ratio_preferred=preferred,
            log_ratio_rejected=rejected,
            clipped=_mean(clipped) if clipped else None,
            kl=_mean_kl(self._rows),
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
        return StepReport(step, len(rows), loss, ratio, ratio_max, _mean_kl(rows), self._norms.get(step))


def _worst_ratios(log_ratios: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """For each step_index, the ratio furthest from 1."""
    return {step: _exp(max(values, key=abs)) for step, values in sorted(log_ratios.items())}


def _mean_kl(rows: Sequence[_RowMetrics]) -> float | None:
    """The mean over the rows for which it is known."""
    known = [row.kl for row in rows if not math.isnan(row.kl)]
    return _mean(known) if known else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _exp(value: float) -> float:
    """e^value, limited to what a float can hold, so that it can be written as JSON."""
    return math.exp(min(value, 700.0))
