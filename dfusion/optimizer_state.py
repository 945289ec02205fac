"""AdamW's moments between rounds. They are passed from an adapter to its successor, together with the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dfusion.errors import CheckpointError, InvalidInputError
from dfusion.files import read_tensors, write_tensors

FORMAT = "dfusion-adamw-1"
_KEYS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state of each parameter, on the CPU.

    moments  by the parameter's name: "exp_avg" and "exp_avg_sq", float32 of the parameter's shape, and "step", ()
             float32, the number of updates
    """

    moments: Mapping[str, Mapping[str, torch.Tensor]]

    @property
    def updates(self) -> int:
        """Number of updates in the moments."""
        return max((int(values["step"]) for values in self.moments.values()), default=0)


def state_of(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    """The state of `optimizer`, whose parameters are the values of `parameters` in order. Empty before an update."""
    state = optimizer.state_dict()["state"]
    moments = {}
    for index, name in enumerate(parameters):
        if index in state:
            moments[name] = {key: state[index][key].detach().cpu().clone() for key in _KEYS}
    return OptimizerState(moments)


def require_moments_of(parameters: Mapping[str, nn.Parameter], state: OptimizerState) -> None:
    """Raise InvalidInputError unless `state` is empty or has parameters of these names and shapes."""
    shapes = {name: value.shape for name, value in parameters.items()}
    own = {name: values["exp_avg"].shape for name, values in state.moments.items()}
    if own and own != shapes:
        different = sorted(name for name in {*own, *shapes} if own.get(name) != shapes.get(name))
        raise InvalidInputError(f"optimizer state: expected the adapter's parameters, got others: {different[:3]}")


def restore(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], state: OptimizerState) -> None:
    """Load `state` into `optimizer`. An empty state resets it.

    Raises InvalidInputError if the state has other parameters. Nothing is changed then.
    """
    require_moments_of(parameters, state)
    indices = {name: index for index, name in enumerate(parameters)}
    moments = {}
    for name, values in state.moments.items():
        moments[indices[name]] = {key: value.clone() for key, value in values.items()}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def save_optimizer(state: OptimizerState, file: Path) -> None:
    """Write the state as safetensors, atomically. Equal states give equal bytes."""
    tensors: dict[str, torch.Tensor] = {}
    for name, values in state.moments.items():
        tensors |= {f"{name}.{key}": value for key, value in values.items()}
    write_tensors(file, tensors, {"optimizer": json.dumps({"format": FORMAT})})


def load_optimizer(file: Path) -> OptimizerState:
    """Read a state that `save_optimizer` wrote. Raises CheckpointError if the file is missing, damaged or of another
    format."""
    tensors, metadata = read_tensors(file)
    try:
        file_format = json.loads(metadata["optimizer"])["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: expected an optimizer's state: {error!r}") from error
    if file_format != FORMAT:
        raise CheckpointError(f"{file}: expected the format {FORMAT}, got {file_format}")

    moments: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        moments.setdefault(name, {})[key] = value
    incomplete = sorted(name for name, values in moments.items() if sorted(values) != sorted(_KEYS))
    if incomplete:
        raise CheckpointError(f"{file}: expected {', '.join(_KEYS)} of each parameter, got others for {incomplete[:3]}")
    return OptimizerState(moments)
