from pathlib import Path

import pytest
import torch

from dfusion.errors import CheckpointError
from dfusion.files import write_tensors
from dfusion.optimizer_state import OptimizerState, load_optimizer, restore, save_optimizer, state_of


def stepped() -> tuple[torch.optim.AdamW, dict[str, torch.nn.Parameter]]:
    """AdamW on two parameters, after one update with the gradients 1 and 2."""
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in ("down.weight", "up.weight")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for size, parameter in enumerate(parameters.values(), start=1):
        parameter.grad = torch.full((2,), float(size))
    optimizer.step()
    return optimizer, parameters


def test_moments_by_hand(tmp_path: Path) -> None:
    """Averages of the gradient with 0.9 and of its square with 0.999, from 0."""
    save_optimizer(state_of(*stepped()), tmp_path / "a.safetensors")
    state = load_optimizer(tmp_path / "a.safetensors")
    assert state.updates == 1
    assert state.moments["up.weight"]["exp_avg"].tolist() == pytest.approx([0.2, 0.2])
    assert state.moments["up.weight"]["exp_avg_sq"].tolist() == pytest.approx([0.004, 0.004])
    assert state.moments["down.weight"]["exp_avg"].tolist() == pytest.approx([0.1, 0.1])


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_optimizer(state_of(*stepped()), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_state_resets_the_optimizer() -> None:
    optimizer, parameters = stepped()
    restore(optimizer, parameters, OptimizerState({}))
    assert state_of(optimizer, parameters).moments == {} and OptimizerState({}).updates == 0


def test_a_restored_state_is_a_copy() -> None:
    optimizer, parameters = stepped()
    state = state_of(optimizer, parameters)
    restore(optimizer, parameters, state)
    optimizer.step()
    assert state.updates == 1 and state_of(optimizer, parameters).updates == 2


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a": torch.zeros(1)}, {}),
        ({"a.exp_avg": torch.zeros(1)}, {"optimizer": '{"format": "dfusion-adamw-1"}'}),
        ({}, {"optimizer": '{"format": "other"}'}),
        ({}, {"optimizer": "not json"}),
    ],
)
def test_other_files_are_rejected(tensors: dict[str, torch.Tensor], metadata: dict[str, str], tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_optimizer(tmp_path / "a.safetensors")
