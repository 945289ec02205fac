"""Norms and scales of gradients, by hand. `checkpointing` is tested with the trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfusion import gradients
from dfusion.gradients import gradient_norm, must_checkpoint, scale_gradients, share_below


def parameters(*gradients: list[float] | None) -> list[nn.Parameter]:
    """Parameters with these gradients; None: no gradient."""
    created = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = None if gradient is None else torch.tensor(gradient)
        created.append(parameter)
    return created


def test_the_norm_is_of_all_gradients_together() -> None:
    assert gradient_norm(parameters([1.0, -2.0], None, [2.0, 4.0])) == 5.0


def test_scaling_ignores_parameters_without_gradient() -> None:
    scaled = parameters([1.0, -3.0], None)
    scale_gradients(scaled, 0.25)
    assert scaled[0].grad is not None and scaled[0].grad.tolist() == [0.25, -0.75]
    assert scaled[1].grad is None


def test_zeros_do_not_count_as_small() -> None:
    """Of 0.5, -2, 0 and -0.5, three are not 0, and two of these are below 1."""
    assert share_below(parameters([0.5, -2.0], [0.0, -0.5]), 1.0) == 2 / 3
    assert share_below(parameters([0.0, 0.0]), 1.0) == 0.0


@pytest.mark.parametrize(("free", "expected"), [(1199, True), (1200, False)])
def test_activations_are_recomputed_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, free: int, expected: bool
) -> None:
    """A row's activations take 100 bytes. Eight rows need 800, and half as much for the backward pass."""
    used = iter((50, 150))
    monkeypatch.setattr(gradients, "used_bytes", lambda _: next(used))
    monkeypatch.setattr(gradients, "free_bytes", lambda _: free)
    assert must_checkpoint(torch.device("cuda"), 8, lambda: None) is expected


def test_activations_of_one_row_that_do_not_fit_are_recomputed() -> None:
    def forward() -> None:
        raise torch.OutOfMemoryError("out of memory")

    assert must_checkpoint(torch.device("cuda"), 8, forward)


def test_a_cpu_keeps_activations() -> None:
    def forward() -> None:
        raise AssertionError("not evaluated")

    assert not must_checkpoint(torch.device("cpu"), 8, forward)
