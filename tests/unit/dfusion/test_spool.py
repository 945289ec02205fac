import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfusion import spool
from dfusion.adapter import attach_lora, lora_parameters
from dfusion.config import SamplingConfig, TrainingConfig
from dfusion.errors import InvalidInputError, ShapeMismatchError
from dfusion.models import DiffusionModel
from dfusion.sampling import sample
from dfusion.spool import RowFile, TrajectorySpool
from dfusion.training import Trainer
from dfusion.training_data import TrainingPair, digest
from dfusion.types import Trajectory
from tests.nets import tiny_model

PAIRS = 6
TWO = SamplingConfig(num_steps=2)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return tiny_model()


@pytest.fixture(scope="module")
def sampled(model: DiffusionModel) -> Trajectory:
    prompts = model.encode_prompts(["a red circle"] * 2 * PAIRS)
    return sample(model.unet, model.scheduler, prompts, model.encode_prompts([""]), list(range(2 * PAIRS)), config=TWO)


class HeldBytes:
    """Counts the bytes of rows that are mapped at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        self.peak = 0
        self._map = np.memmap
        monkeypatch.setattr(spool.np, "memmap", self._mapped)

    def _mapped(self, *arguments: Any) -> np.ndarray:
        row = self._map(*arguments)
        self.now += row.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(row, self._release, row.nbytes)
        return row

    def _release(self, count: int) -> None:
        self.now -= count


def pairs_of(trajectory: Trajectory, spooled: TrajectorySpool | None = None) -> list[TrainingPair]:
    sides = [trajectory.select([i]) if spooled is None else spooled.add(trajectory, i) for i in range(2 * PAIRS)]
    return [TrainingPair(sides[i], sides[i + 1], "a red circle") for i in range(0, 2 * PAIRS, 2)]


def trained(model: DiffusionModel, pairs: list[TrainingPair], folder: Path | None) -> list[torch.Tensor]:
    """The adapter after two epochs of three updates each."""
    attach_lora(model.unet, seed=1)
    config = TrainingConfig(examples_per_update=2, micro_batch=1, inner_epochs=2, learning_rate=1e-3)
    trainer = Trainer(model, pairs, config, 0, spool=folder)
    while trainer.updates_done < trainer.updates_total:
        trainer.step()
    return [value.detach().clone() for value in lora_parameters(model.unet).values()]


@pytest.mark.slow
def test_a_training_from_files_is_the_same_and_holds_one_micro_batch(
    model: DiffusionModel, sampled: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = pairs_of(sampled)
    expected = trained(model, in_memory, None)

    held = HeldBytes(monkeypatch)
    in_files = pairs_of(sampled, TrajectorySpool(tmp_path))
    assert digest(in_files) == digest(in_memory)
    adapter = trained(model, in_files, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(adapter, expected, strict=True))

    # three trajectories at most, each of three states and two log-probs; the six pairs have twelve
    state_bytes = sampled.latents[0, 0].nbytes
    assert 0 < held.peak <= 3 * (3 * state_bytes + 2 * 4)
    assert held.now == 0


def test_a_file_gives_back_its_rows(tmp_path: Path) -> None:
    rows = RowFile(tmp_path, (2, 3), (2,))
    values = torch.arange(24.0).reshape(4, 2, 3)
    assert [rows.append(value, value[:, 0]) for value in values] == [0, 1, 2, 3]
    assert len(rows) == 4
    assert torch.equal(rows[[3, 0, 0]], values[[3, 0, 0]])
    first, second = rows.mapped(2)
    assert torch.equal(first, values[2]) and second.tolist() == [12.0, 15.0]
    assert list(tmp_path.iterdir()) == []  # nothing is left if the process is killed


def test_rows_of_another_shape_or_number_are_refused(tmp_path: Path) -> None:
    rows = RowFile(tmp_path, (2, 3))
    with pytest.raises(ShapeMismatchError, match="row"):
        rows.append(torch.zeros(3, 2))
    with pytest.raises(InvalidInputError, match="among 0"):
        rows.mapped(0)
