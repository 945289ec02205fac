"""The state of a trainer between two updates, and its file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dfusion.errors import CheckpointError
from dfusion.files import read_tensors, write_tensors
from dfusion.optimizer_state import OptimizerState, is_complete
from dfusion.training_report import SelfTest, UpdateReport

FORMAT = "dfusion-trainer-6"
STATE_FILE = "trainer.safetensors"


@dataclass(frozen=True)
class TrainerState:
    """Everything that a trainer needs to continue.

    tensors  by name: `adapter.*`, the weights; `start.*`, the weights before the first update; `average.*`, their
             average if the training has one; `optimizer.*`, AdamW's moments
    about    plain values (JSON): the reports of all updates so far, the self-test, and a description of the training,
             which a trainer that loads the state compares with its own
    """

    tensors: Mapping[str, torch.Tensor]
    about: Mapping[str, object]

    @classmethod
    def of(
        cls,
        training: Mapping[str, object],
        adapter: Mapping[str, torch.Tensor],
        start: Mapping[str, torch.Tensor],
        optimizer: OptimizerState,
        reports: Sequence[UpdateReport],
        self_test: SelfTest | None,
        average: Mapping[str, torch.Tensor] | None = None,
    ) -> TrainerState:
        """The state of a training with the description `training`. Weights are copied to the CPU."""
        tensors = {}
        for name, parameter in adapter.items():
            tensors[f"adapter.{name}"] = parameter.detach().cpu().clone()
            tensors[f"start.{name}"] = start[name].cpu().clone()
        for name, value in (average or {}).items():
            tensors[f"average.{name}"] = value.cpu().clone()
        for name, values in optimizer.moments.items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
        tested = None if self_test is None else asdict(self_test)
        return cls(tensors, {**training, "reports": [asdict(report) for report in reports], "self_test": tested})

    def require_training(self, training: Mapping[str, object]) -> None:
        """Raise CheckpointError, naming the first difference, unless the state's description is `training`."""
        for key, expected in training.items():
            if self.about.get(key) != expected:
                raise CheckpointError(f"trainer state: expected {key} {expected!r}, got {self.about.get(key)!r}")

    def reports(self, max_updates: int) -> list[UpdateReport]:
        """The reports of its updates. Raises CheckpointError for more than `max_updates`, or for anything else."""
        try:
            reports = [UpdateReport.of(report) for report in self.about["reports"]]  # type: ignore[attr-defined]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"trainer state: expected the reports of its updates: {error!r}") from error

        if [report.update for report in reports] != list(range(1, len(reports) + 1)) or len(reports) > max_updates:
            raise CheckpointError(f"trainer state: expected reports of up to {max_updates} updates, got {len(reports)}")
        return reports

    def self_test(self) -> SelfTest | None:
        """The self-test; None before the first update. Raises CheckpointError for anything else."""
        stored = self.about.get("self_test")
        if stored is None and not self.about["reports"]:
            return None
        try:
            return SelfTest.of(stored)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"trainer state: expected a self-test: {error!r}") from error

    def weights(self, kind: str, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of the weights of `kind`, "adapter", "start" or "average", by the names and with the shapes of `like`.

        Raises CheckpointError if one is missing or has another shape.
        """
        return {name: self._tensor(f"{kind}.{name}", parameter) for name, parameter in like.items()}

    def moments(self, like: Mapping[str, torch.Tensor]) -> OptimizerState:
        """Copies of AdamW's moments of the parameters `like`. Raises CheckpointError as `weights` does.

        They are empty before the first update of a training that started without moments.
        """
        if not any(name.startswith("optimizer.") for name in self.tensors) and not self.about["reports"]:
            return OptimizerState({})

        moments = {}
        for name, parameter in like.items():
            prefix = f"optimizer.{name}."
            keys = [full.removeprefix(prefix) for full in self.tensors if full.startswith(prefix)]
            shapes = {key: self.tensors[prefix + key] for key in keys}
            if "state1" in keys or "state2" in keys:
                shapes |= {"state1": parameter, "state2": parameter, "step": torch.tensor(0)}
            else:
                shapes |= {"step": torch.tensor(0.0), "exp_avg": parameter, "exp_avg_sq": parameter}
            moments[name] = {key: self._tensor(prefix + key, value) for key, value in shapes.items()}
            if not is_complete(moments[name]):
                raise CheckpointError(f"trainer state: expected all moments of {name}, got {sorted(keys)}")
        return OptimizerState(moments)

    def _tensor(self, name: str, like: torch.Tensor) -> torch.Tensor:
        tensor = self.tensors.get(name)
        if tensor is None or tensor.shape != like.shape:
            got = None if tensor is None else tuple(tensor.shape)
            raise CheckpointError(f"trainer state: expected {name} of shape {tuple(like.shape)}, got {got}")
        return tensor.clone()

    def save(self, folder: Path) -> None:
        """Write the state to `folder` as STATE_FILE, a safetensors file with JSON metadata. The write is atomic."""
        write_tensors(folder / STATE_FILE, self.tensors, {"trainer": json.dumps(self.about)})

    @classmethod
    def load(cls, folder: Path) -> TrainerState:
        """Read a state that `save` wrote. Raises CheckpointError if it is missing or damaged."""
        tensors, metadata = read_tensors(folder / STATE_FILE)
        try:
            about = dict(json.loads(metadata["trainer"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / STATE_FILE}: expected a trainer's state: {error!r}") from error
        return cls(tensors, about)
