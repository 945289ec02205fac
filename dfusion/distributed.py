"""Data-parallel training: several processes ("ranks") of torch.distributed train one adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn

from dfusion.errors import InvalidInputError, RankLostError
from dfusion.training_data import Row


class Ranks:
    """The processes that train one adapter together, seen from one of them. By default it is alone.

    Each rank evaluates its own rows of every update. Gradients and metrics are added up, so that all ranks make the
    same step of AdamW and raise the same errors (decision 028).

    Args:
        rank: The number of this process, from 0.
        size: The number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        if not 0 <= rank < size:
            raise InvalidInputError(f"rank: expected 0 to {size - 1}, got {rank}")
        self.rank = rank
        self.size = size

    @classmethod
    def joined(cls) -> Ranks:
        """The ranks of the default process group (`torch.distributed.init_process_group`, torchrun)."""
        return cls(distributed.get_rank(), distributed.get_world_size())

    def owns(self, row: Row) -> bool:
        """Whether this rank evaluates a row. The rows of a step and of an example are spread over all ranks."""
        return (row.example + row.step) % self.size == self.rank

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' values. Raises RankLostError."""
        if self.size == 1:
            return values
        on_gpu = distributed.get_backend() == "nccl"
        total = values.to("cuda" if on_gpu else "cpu", copy=True)
        try:
            distributed.all_reduce(total)
        except RuntimeError as error:
            raise RankLostError(f"expected {self.size} ranks, one has ended or does not respond: {error}") from error
        return total.to(values.device)

    def add_up_gradients(self, parameters: Collection[nn.Parameter]) -> None:
        """Replace the gradients by the sums of all ranks' gradients. None counts as 0. Raises RankLostError."""
        if self.size == 1:
            return
        parts = []
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts.append(gradient.flatten())
        total = self.add_up(torch.cat(parts))
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, gradient in zip(parameters, total.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def concatenate(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (n, m) of all ranks, by rank. n may differ. Raises RankLostError."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        counts = self.add_up(counts)
        start = int(counts[: self.rank].sum())
        every = rows.new_zeros(int(counts.sum()), rows.shape[1])
        every[start : start + len(rows)] = rows
        return self.add_up(every)

    def require_equal(self, what: str, value: float) -> None:
        """Raise InvalidInputError unless all ranks have the same value."""
        values = self.concatenate(torch.tensor([[value]], dtype=torch.float64)).flatten().tolist()
        if len(set(values)) != 1:
            raise InvalidInputError(f"ranks: expected the same {what} in all, got {values}")


ALONE = Ranks()


@contextmanager
def process_group(file: Path, rank: int, size: int, timeout_seconds: float) -> Iterator[None]:
    """The default process group within the context, for processes of one host. All must enter it.

    It uses gloo on any device. The gradient of an adapter has a few megabytes, which the CPU adds up in milliseconds,
    and gloo notices at once that a process has ended (decision 028).

    Args:
        file: A file on a local disk that does not exist yet, by which the processes find each other.
        rank: The number of this process.
        size: The number of processes.
        timeout_seconds: How long an operation waits for the others.

    Raises:
        RankLostError: The others did not enter it.
    """
    timeout = timedelta(seconds=timeout_seconds)
    try:
        distributed.init_process_group(
            "gloo", init_method=file.absolute().as_uri(), rank=rank, world_size=size, timeout=timeout
        )
    except RuntimeError as error:
        raise RankLostError(f"expected {size} ranks to connect: {error}") from error
    try:
        yield
    finally:
        distributed.destroy_process_group()
