"""Data-parallel training: several processes ("ranks") of torch.distributed train one adapter."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn

from dfusion.errors import InvalidInputError, RankLostError
from dfusion.training_data import Row

_INTERFACE = "GLOO_SOCKET_IFNAME"
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


class Ranks:
    """The group of processes that train one adapter, as seen by one member. The default is a single process.

    Each rank evaluates its own rows of every update. Gradients and metrics are summed, so that all ranks make the same
    step of AdamW and raise the same errors (decision 028).

    Args:
        rank: The number of this process, from 0.
        size: The number of processes.
        waiting: Returns a context manager that is entered while this process waits for the other ranks.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        if not 0 <= rank < size:
            raise InvalidInputError(f"rank: expected 0 to {size - 1}, got {rank}")
        self.rank = rank
        self.size = size
        self._waiting = waiting

    @classmethod
    def from_default_group(cls) -> Ranks:
        """The ranks of the default process group (`torch.distributed.init_process_group`, torchrun)."""
        return cls(distributed.get_rank(), distributed.get_world_size())

    def owns(self, row: Row) -> bool:
        """Whether this rank evaluates a row. The rows of a step and of an example are spread over all ranks."""
        return (row.example + row.step) % self.size == self.rank

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' values. Raises RankLostError."""
        if self.size == 1:
            return values
        on_gpu = distributed.get_backend() == "nccl"
        total = values.to("cuda" if on_gpu else "cpu", copy=True)
        try:
            with self._waiting():
                distributed.all_reduce(total)
        except RuntimeError as error:
            message = f"expected {self.size} ranks, but at least one has exited or does not respond: {error}"
            raise RankLostError(message) from error
        return total.to(values.device)

    def all_reduce_gradients(self, parameters: Collection[nn.Parameter]) -> None:
        """Replace the gradients by the sums of all ranks' gradients. None counts as 0. Raises RankLostError."""
        if self.size == 1:
            return
        parts = []
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts.append(gradient.flatten())
        total = self.all_reduce_sum(torch.cat(parts))
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, gradient in zip(parameters, total.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (n, m) of all ranks, by rank. n may differ. Raises RankLostError."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        counts = self.all_reduce_sum(counts)
        start = int(counts[: self.rank].sum())
        rows_of_all = rows.new_zeros(int(counts.sum()), rows.shape[1])
        rows_of_all[start : start + len(rows)] = rows
        return self.all_reduce_sum(rows_of_all)

    def any(self, value: bool) -> bool:
        """Whether the value is true in any rank. Raises RankLostError."""
        return bool(self.all_reduce_sum(torch.tensor(int(value))))

    def require_equal(self, what: str, value: bytes) -> None:
        """Raise InvalidInputError unless all ranks have the same bytes. Raises RankLostError."""
        sha256 = hashlib.sha256(value)
        digests = self.all_gather(torch.tensor([list(sha256.digest())], dtype=torch.uint8))
        different = [rank for rank, digest in enumerate(digests) if not digest.equal(digests[0])]
        if different:
            raise InvalidInputError(
                f"ranks: expected the same {what} on all ranks, got a different one on ranks {different} than on rank 0"
            )


SINGLE_PROCESS = Ranks()


@contextmanager
def process_group(file: Path, rank: int, size: int, timeout_seconds: float) -> Iterator[None]:
    """The default process group within the context, for processes of one host. All must enter it.

    It uses gloo on any device. The gradient of an adapter has a few megabytes, which the CPU sums in milliseconds, and
    gloo detects at once that a process has ended (decision 028). It listens on the loopback interface only, since gloo
    does not authenticate its peers.

    Args:
        file: Rendezvous file on a local disk. It must not exist yet.
        rank: The number of this process.
        size: The number of processes.
        timeout_seconds: How long an operation waits for the others.

    Raises:
        RankLostError: Not all processes connected in time.
    """
    timeout = timedelta(seconds=timeout_seconds)
    try:
        with _on_loopback():
            distributed.init_process_group(
                "gloo", init_method=file.absolute().as_uri(), rank=rank, world_size=size, timeout=timeout
            )
    except RuntimeError as error:
        raise RankLostError(f"expected {size} ranks to connect: {error}") from error
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let gloo choose the loopback interface within the context; torch takes it from the environment only."""
    before = os.environ.get(_INTERFACE)
    os.environ[_INTERFACE] = _LOOPBACK
    try:
        yield
    finally:
        del os.environ[_INTERFACE]
        if before is not None:
            os.environ[_INTERFACE] = before
