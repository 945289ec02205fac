"""AdamW with its moments in 32 or 8 bits, and the moments between rounds.

They are passed from an adapter to its successor, together with the weights.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dfusion.config import TrainingConfig
from dfusion.errors import CheckpointError, InvalidInputError
from dfusion.files import read_tensors, write_tensors

OptimizerName = Literal["adamw", "adamw_8bit"]
_FORMATS: Mapping[OptimizerName, str] = {"adamw": "dfusion-adamw-1", "adamw_8bit": "dfusion-adamw-8bit-1"}
_KEYS = frozenset({"exp_avg", "exp_avg_sq", "step"})
_KEYS_8BIT = frozenset({"state1", "state2", "step"})
_QUANTIZED = _KEYS_8BIT | {"qmap1", "qmap2", "absmax1", "absmax2"}
_FUSED_DEVICES = frozenset({"cpu", "cuda"})
"""The devices on which torch's AdamW updates all parameters by one kernel."""
_BITSANDBYTES = "__bnb_optimizer_quant_state__"
"""The entry of bitsandbytes' state that contains its tensors."""


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state of each parameter, on the CPU.

    moments  by the parameter's name: "exp_avg" and "exp_avg_sq", float32 of the parameter's shape, and "step", ()
             float32, the number of updates. In 8 bits, "state1" and "state2" instead of the first two, and for large
             parameters, whose states are uint8, the tables "qmap1", "qmap2" and the scales "absmax1", "absmax2"
    """

    moments: Mapping[str, Mapping[str, torch.Tensor]]

    @property
    def updates(self) -> int:
        """Number of updates in the moments."""
        return max((int(values["step"]) for values in self.moments.values()), default=0)

    @property
    def optimizer(self) -> OptimizerName | None:
        """The optimizer that it belongs to; None if it is empty."""
        for values in self.moments.values():
            return "adamw_8bit" if "state1" in values else "adamw"
        return None


def is_complete(values: Mapping[str, torch.Tensor]) -> bool:
    """Whether a parameter's state has all its tensors."""
    if "state1" not in values:
        return values.keys() == _KEYS
    is_quantized = values["state1"].dtype == torch.uint8
    return values.keys() == (_QUANTIZED if is_quantized else _KEYS_8BIT)


def require_optimizer(config: TrainingConfig) -> None:
    """Raise InvalidInputError, naming the extra, if the optimizer's package is not installed."""
    if config.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        message = "adamw_8bit needs the package bitsandbytes: pip install 'dfusion[bitsandbytes]'"
        raise InvalidInputError(f"training.optimizer: {message}")


def adamw(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with the settings of `config`. Raises InvalidInputError as `require_optimizer` does."""
    require_optimizer(config)
    parameters = list(parameters)
    in_one_kernel = all(parameter.device.type in _FUSED_DEVICES for parameter in parameters)
    optimizer_class: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, fused=in_one_kernel)
    if config.optimizer == "adamw_8bit":
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    return optimizer_class(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def state_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    """The state of `optimizer`, whose parameters are the values of `parameters` in order. Empty before an update."""
    state = optimizer.state_dict()["state"]
    moments = {}
    for index, name in enumerate(parameters):
        if index in state:
            values = {**state[index], **state[index].get(_BITSANDBYTES, {})}
            values.pop(_BITSANDBYTES, None)
            moments[name] = {key: torch.as_tensor(value).detach().cpu().clone() for key, value in values.items()}
    return OptimizerState(moments)


def require_moments_of(
    parameters: Mapping[str, nn.Parameter], state: OptimizerState, optimizer: OptimizerName | None = None
) -> None:
    """Raise InvalidInputError unless `state` is empty or has parameters of these names and shapes.

    With `optimizer`, the state must be of this optimizer, too.
    """
    if state.optimizer is not None and optimizer not in (None, state.optimizer):
        message = f"expected {state.optimizer}, whose moments are carried over, got {optimizer}"
        raise InvalidInputError(f"training.optimizer: {message}; or set optimizer_start to fresh")

    shapes = {name: value.shape for name, value in parameters.items()}
    key = "state1" if state.optimizer == "adamw_8bit" else "exp_avg"
    own = {name: values[key].shape for name, values in state.moments.items()}
    if own and own != shapes:
        different = sorted(name for name in {*own, *shapes} if own.get(name) != shapes.get(name))
        raise InvalidInputError(f"optimizer state: expected the adapter's parameters, got others: {different[:3]}")


def restore(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: OptimizerState) -> None:
    """Load `state` into `optimizer`. An empty state resets it.

    Raises InvalidInputError if the state has other parameters or is of another optimizer. Nothing is changed then.
    """
    require_moments_of(parameters, state, "adamw" if isinstance(optimizer, torch.optim.AdamW) else "adamw_8bit")
    indices = {name: index for index, name in enumerate(parameters)}
    moments: dict[int, dict[str, Any]] = {}
    for name, values in state.moments.items():
        own: dict[str, Any] = {key: value.clone() for key, value in values.items()}
        if state.optimizer == "adamw_8bit":
            own = {"step": int(own.pop("step")), _BITSANDBYTES: own}
        moments[indices[name]] = own
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def save_optimizer(state: OptimizerState, file: Path) -> None:
    """Write the state as safetensors, atomically. Equal states give equal bytes."""
    tensors: dict[str, torch.Tensor] = {}
    for name, values in state.moments.items():
        tensors |= {f"{name}.{key}": value for key, value in values.items()}
    file_format = _FORMATS[state.optimizer or "adamw"]
    write_tensors(file, tensors, {"optimizer": json.dumps({"format": file_format})})


def load_optimizer(file: Path) -> OptimizerState:
    """Read a state that `save_optimizer` wrote. Raises CheckpointError if the file is missing, damaged or of another
    format."""
    tensors, metadata = read_tensors(file)
    try:
        file_format = json.loads(metadata["optimizer"])["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: expected an optimizer's state: {error!r}") from error
    if file_format not in _FORMATS.values():
        raise CheckpointError(f"{file}: expected a format of {list(_FORMATS.values())}, got {file_format}")

    moments: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        moments.setdefault(name, {})[key] = value
    incomplete = sorted(name for name, values in moments.items() if not is_complete(values))
    if incomplete:
        raise CheckpointError(f"{file}: expected the moments of each parameter, got others for {incomplete[:3]}")
    return OptimizerState(moments)
