"""Trajectories and other rows of tensors in a file, so that a training needs memory only for what it evaluates.

Rows are written once and then mapped or read as needed. The bytes are those of the tensors, so results are the same.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch

from dfusion.config import SamplingConfig
from dfusion.errors import InvalidInputError, ShapeMismatchError
from dfusion.types import Trajectory

_ELEMENT_BYTES = 4


class RowFile:
    """Rows of tensors, float32, in an unnamed temporary file, which is deleted when the process ends.

    A full disk raises OSError in `append`, and never when a row is read.

    Args:
        folder: The folder of the file.
        shapes: The shapes of the tensors of a row.
    """

    def __init__(self, folder: Path, *shapes: Sequence[int]) -> None:
        self._set(TemporaryFile(dir=folder), shapes, 0)

    def shared(self) -> dict[str, Any]:
        """The arguments with which `RowFile.of` opens the file in another process, as long as this one runs."""
        path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        return {"path": path, "shapes": [list(shape) for shape in self._shapes], "count": self._count}

    @classmethod
    def of(cls, path: str, shapes: Sequence[Sequence[int]], count: int) -> RowFile:
        """The file of another process (`shared`), to read from. Raises OSError."""
        rows = cls.__new__(cls)
        rows._set(open(path, "rb"), shapes, count)
        return rows

    def _set(self, file: IO[bytes], shapes: Sequence[Sequence[int]], count: int) -> None:
        self._shapes = tuple(map(tuple, shapes))
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self._file = file
        weakref.finalize(self, file.close)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def append(self, *tensors: torch.Tensor) -> int:
        """Append a row. Returns its number. Raises ShapeMismatchError, OSError."""
        actual = tuple(tuple(tensor.shape) for tensor in tensors)
        if actual != self._shapes:
            raise ShapeMismatchError("row", self._shapes, actual)

        number = self._count
        self._file.seek(self._offset(number))
        for tensor in tensors:
            self._file.write(tensor.detach().cpu().float().contiguous().numpy().data)
        self._file.flush()
        self._count += 1
        return number

    def mapped(self, number: int) -> tuple[torch.Tensor, ...]:
        """The tensors of a row, mapped into memory as long as they live. Only parts that are read occupy memory."""
        if not 0 <= number < self._count:
            raise InvalidInputError(f"number: expected a row among {self._count}, got {number}")
        # mode "c": changes would stay in memory; torch warns of read-only arrays
        row = np.memmap(self._file, np.float32, "c", self._offset(number), (sum(self._sizes),))
        parts = torch.from_numpy(row).split(self._sizes)
        return tuple(part.view(shape) for part, shape in zip(parts, self._shapes, strict=True))

    def __getitem__(self, numbers: Sequence[int]) -> torch.Tensor:
        """Copies of the first tensors of rows, (n, *shape)."""
        return torch.stack([self.mapped(number)[0] for number in numbers])

    def _offset(self, number: int) -> int:
        return number * sum(self._sizes) * _ELEMENT_BYTES


@dataclass(frozen=True, eq=False)
class SpooledTrajectory:
    """A trajectory of one sample whose tensors are in a file. Otherwise like `Trajectory`, without item maps.

    rows    the file
    number  the row of the latents (T+1, C, h, w) and log-probs (T,)
    """

    rows: RowFile
    number: int
    timesteps: torch.Tensor
    config: SamplingConfig

    @property
    def latents(self) -> torch.Tensor:
        """(1, T+1, C, h, w), mapped as long as the tensor lives."""
        return self.rows.mapped(self.number)[0][None]

    @property
    def log_probs(self) -> torch.Tensor:
        """(1, T), mapped as long as the tensor lives."""
        return self.rows.mapped(self.number)[1][None]

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        height, width = self.latents.shape[-2:]
        return height, width

    def __len__(self) -> int:
        return 1


class TrajectorySpool:
    """The trajectories of many samples, in a file for each shape.

    `add` keeps no allocation per sample in memory. Such allocations would keep the allocator from reusing one
    trajectory's memory for the next.

    Args:
        folder: The folder of the files. They take about (T+1) x C x h x w x 4 bytes a sample.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[int, ...], RowFile] = {}
        self._timesteps: dict[tuple[int, ...], torch.Tensor] = {}

    def add(self, trajectory: Trajectory, index: int) -> SpooledTrajectory:
        """Write the sample at `index` of `trajectory`. Raises OSError if the disk is full."""
        latents = trajectory.latents[index]
        shape = tuple(latents.shape)
        if shape not in self._files:
            self._files[shape] = RowFile(self._folder, shape, (len(trajectory.timesteps),))
        key = tuple(trajectory.timesteps.tolist())
        timesteps = self._timesteps.setdefault(key, trajectory.timesteps)

        rows = self._files[shape]
        return SpooledTrajectory(rows, rows.append(latents, trajectory.log_probs[index]), timesteps, trajectory.config)
