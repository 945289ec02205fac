import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest
import torch

from dfusion.errors import NonFiniteError, PolicyMismatchError
from dfusion.losses.objective import RowLosses
from dfusion.training_data import Row
from dfusion.training_report import (
    Replayed,
    SelfTest,
    Tally,
    UpdateReport,
    falling_preferred,
    require_ratio_one,
    self_test,
)

ROWS = [Row(0, 1), Row(0, 1), Row(0, 3), Row(0, 3), Row(1, 3), Row(1, 3)]
"""The rows of six transitions."""


def replayed(*log_probs: float, recorded: Sequence[float | None] = (-1.0,) * 6) -> list[Replayed]:
    """Six transitions with these log-probs."""
    return [Replayed(*values) for values in zip(ROWS, log_probs, recorded, strict=True)]


def test_recorded_and_replayed_agree() -> None:
    report = self_test(replayed(*[-1.0] * 6), 1e-3)
    assert (report.tolerance, report.compared, report.replayed) == (1e-3, 6, 0)
    assert report.ratio_by_step == {1: 1.0, 3: 1.0} and report.without_noise == ()
    assert SelfTest.of(json.loads(json.dumps(asdict(report)))) == report


def test_the_ratio_furthest_from_1_is_reported_for_each_step() -> None:
    transitions = replayed(-1.0, -1.1, -1.0, -0.9, -1.2, -1.0)
    with pytest.raises(PolicyMismatchError, match=r"within 0\.001 at step_index 3, got 0\.8187") as raised:
        self_test(transitions, 1e-3)
    expected = {1: pytest.approx(math.exp(-0.1)), 3: pytest.approx(math.exp(-0.2))}
    assert (raised.value.step_index, raised.value.tolerance) == (3, 1e-3)
    assert raised.value.ratio_by_step == self_test(transitions, 0.5).ratio_by_step == expected


def test_off_policy_transitions_are_only_replayed() -> None:
    """The fifth transition has another network's log-prob; the others are still tested."""
    recorded = (-1.0, -1.0, -1.0, -1.0, None, -1.0)
    report = self_test(replayed(-1.0, -1.0, -1.0, -1.0, 7.0, -1.0, recorded=recorded), 1e-3)
    assert (report.compared, report.replayed) == (5, 1)
    with pytest.raises(PolicyMismatchError, match="step_index 3"):
        self_test(replayed(-1.0, -1.0, -1.0, -1.0, 7.0, -2.0, recorded=recorded), 1e-3)
    assert self_test([Replayed(Row(0, 1), 3.0, None)], 1e-3).ratio_by_step == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("recorded", [-1.0, None])
def test_log_probs_must_be_finite(bad: float, recorded: float | None) -> None:
    with pytest.raises(NonFiniteError, match=r"examples\[1\].*step_index 3"):
        self_test([Replayed(Row(1, 3), bad, recorded)], 1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_records_that_are_not_finite_are_a_mismatch(bad: float) -> None:
    """One transition has such a record, the others agree."""
    with pytest.raises(PolicyMismatchError):
        self_test(replayed(*[-1.0] * 6, recorded=(-1.0, -1.0, bad, -1.0, -1.0, -1.0)), 1e-3)


def test_the_tolerance_itself_is_allowed() -> None:
    require_ratio_one({0: 1.5, 1: 0.5}, 0.5, "ratios")
    require_ratio_one({}, 0.5, "ratios")
    with pytest.raises(PolicyMismatchError, match=r"ratios: .*step_index 1"):
        require_ratio_one({0: 1.0, 1: 0.25}, 0.5, "ratios")


def test_figures_by_hand() -> None:
    """Two micro-batches of one pair algorithm: steps 4, 1 and then 4."""
    tally = Tally()
    first = RowLosses(torch.tensor([1.0, 2.0]), margins=torch.tensor([-0.5, 0.5]))
    tally.add([4, 1], first, torch.tensor([[0.1, -0.3], [0.2, 0.0]]), torch.tensor([0.5, 1.5]))
    second = RowLosses(torch.tensor([6.0]), margins=torch.tensor([3.0]))
    tally.add([4], second, torch.tensor([[0.0, 0.0]]), torch.tensor([4.0]))
    tally.add_grad_norm(4, torch.tensor(7.0))
    report = tally.report(3, grad_norm=9.0, below_epsilon=0.25)

    assert (report.update, report.rows, report.grad_norm, report.clipped) == (3, 3, 9.0, None)
    assert (report.loss, report.margin, report.kl, report.below_epsilon) == (3.0, 1.0, 2.0, 0.25)
    assert report.log_ratio_preferred == pytest.approx(0.1) and report.log_ratio_rejected == pytest.approx(-0.1)
    assert report.accuracy == pytest.approx(2 / 3) and report.ratio_max == pytest.approx(math.exp(0.3))

    step_1, step_4 = report.steps
    assert (step_1.step_index, step_1.rows, step_1.loss, step_1.kl, step_1.grad_norm) == (1, 1, 2.0, 1.5, None)
    assert (step_1.ratio, step_1.ratio_max) == (pytest.approx((math.exp(0.2) + 1) / 2), pytest.approx(math.exp(0.2)))
    assert (step_4.step_index, step_4.rows, step_4.loss, step_4.kl, step_4.grad_norm) == (4, 2, 3.5, 2.25, 7.0)
    assert step_4.ratio == pytest.approx((math.exp(0.1) + math.exp(-0.3) + 2) / 4)


def test_a_kl_that_is_not_known_is_left_out() -> None:
    """Steps 1 and 2: of two rows of step 1 one is known, of step 2 none."""
    tally = Tally()
    tally.add([1, 1, 2], RowLosses(torch.zeros(3)), torch.zeros(3, 1), torch.tensor([math.nan, 0.5, math.nan]))
    report = tally.report(1, 0.0, 0.0)
    assert (report.kl, [step.kl for step in report.steps]) == (0.5, [0.5, None])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_and_gradients_that_are_not_finite_are_named(bad: float) -> None:
    tally = Tally()
    tally.add([1], RowLosses(torch.zeros(1)), torch.zeros(1, 1), torch.zeros(1))
    tally.require_finite(7)
    tally = Tally()
    tally.add([1, 4], RowLosses(torch.tensor([0.0, bad])), torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(NonFiniteError, match=rf"loss became {bad} in update 7 at step_index 4"):
        tally.require_finite(7)
    tally = Tally()
    tally.add([1], RowLosses(torch.zeros(1)), torch.zeros(1, 1), torch.zeros(1))
    tally.add_grad_norm(1, torch.tensor(bad))
    with pytest.raises(NonFiniteError, match=rf"gradient became {bad} in update 7 at step_index 1, advice"):
        tally.require_finite(7, ", advice")


def test_clipped_rows_are_counted() -> None:
    tally = Tally()
    row_losses = RowLosses(torch.zeros(4), clipped=torch.tensor([True, False, False, False]))
    tally.add([0, 0, 0, 1], row_losses, torch.zeros(4, 1), torch.zeros(4))
    report = tally.report(1, 0.0, 0.0)
    assert (report.clipped, report.margin, report.accuracy) == (0.25, None, None)


def reports(*preferred: float | None) -> list[UpdateReport]:
    """Reports of one update each, with these mean log-ratios of the preferred side."""
    tally = Tally()
    tally.add([0], RowLosses(torch.zeros(1)), torch.zeros(1, 1), torch.zeros(1))
    report = tally.report(1, 0.0, 0.0)
    return [replace(report, log_ratio_preferred=value) for value in preferred]


@pytest.mark.parametrize(
    ("preferred", "expected"),
    [
        ((0.0, -0.1), (0.0, -0.1)),
        ((0.0, 0.2, 0.1), None),
        ((0.0,), None),
        ((), None),
        ((None, None), None),
        ((0.0, *[0.5] * 9, 0.4), (0.5, 0.4)),  # of the last ten
    ],
)
def test_a_falling_preferred_side_is_detected(
    preferred: tuple[float | None, ...], expected: tuple[float, float] | None
) -> None:
    assert falling_preferred(reports(*preferred)) == expected
