"""The policy before the first update, p_old: its log-probs and means of transitions, as far as they are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dfusion.spool import RowFile


class OldPolicy:
    """log p_old of N transitions, on the device, and the means from which the KL is measured, on the CPU or in a file.

    log_probs  (N,) log p_old over the credited elements
    replayed   (N,) log p_old over all elements, of the transitions in `evaluated`
    evaluated  the numbers of the transitions that were evaluated

    Args:
        recorded: (N,) recorded log-probs, the initial log p_old; NaN where it must be evaluated.
        keep: The transitions whose means are kept.
        shape: (C, h, w) of the latents.
        device: The device of the log-probs.
        folder: The folder of the file for the means. None = in memory.
    """

    def __init__(
        self,
        recorded: torch.Tensor,
        keep: frozenset[int],
        shape: Sequence[int],
        device: torch.device,
        folder: Path | None,
    ) -> None:
        self.log_probs = recorded.to(device)
        self.replayed = torch.full_like(self.log_probs, torch.nan)
        self.evaluated: set[int] = set()
        self._keep = keep
        self._means = _Memory() if folder is None else RowFile(folder, shape)
        self._positions: dict[int, int] = {}
        self._copy: tuple[list[int], torch.Tensor, torch.cuda.Event | None] | None = None

    def put(
        self, numbers: Sequence[int], indices: torch.Tensor, log_probs: torch.Tensor, replayed: torch.Tensor
    ) -> None:
        """Set the log-probs of transitions that were evaluated. `indices` are the numbers, on the device."""
        self.log_probs[indices] = log_probs
        self.replayed[indices] = replayed
        self.evaluated.update(numbers)

    def put_means(self, numbers: Sequence[int], means: torch.Tensor) -> None:
        """Set the means of transitions, (N, C, h, w).

        Copies from a GPU are asynchronous; the next call waits for them.
        """
        self._end_copy()
        if self._keep.isdisjoint(numbers):
            return
        event = None
        if means.device.type == "cuda":
            means = means.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._copy = (list(numbers), means, event)

    def known_means(self, numbers: Sequence[int]) -> list[bool]:
        """For each transition, whether its mean is known."""
        self._end_copy()
        return [number in self._positions for number in numbers]

    def means(self, numbers: Sequence[int]) -> torch.Tensor:
        """The means of transitions, (N, C, h, w) on the CPU. They must be known."""
        return self._means[[self._positions[number] for number in numbers]]

    def _end_copy(self) -> None:
        if self._copy is None:
            return
        numbers, means, event = self._copy
        self._copy = None
        if event is not None:
            event.synchronize()
        for number, row in zip(numbers, means, strict=True):
            if number in self._keep and number not in self._positions:
                self._positions[number] = self._means.append(row)


class _Memory:
    """Rows in memory, with the interface of RowFile."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []

    def append(self, row: torch.Tensor) -> int:
        self._rows.append(row.clone())
        return len(self._rows) - 1

    def __getitem__(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.stack([self._rows[number] for number in numbers])
