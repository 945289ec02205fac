from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dfusion.config import SamplingConfig
from dfusion.errors import CheckpointError
from dfusion.files import write_whole
from dfusion.sampling import sample
from dfusion.trajectories import load_trajectory, save_trajectory
from tests.nets import embeds, sd_scheduler, tiny_unet


@pytest.mark.parametrize("with_items", [True, False])
def test_a_saved_trajectory_is_loaded_back(tmp_path: Path, with_items: bool) -> None:
    items = [[1, (2, 3)], [4]] if with_items else None
    trajectory = sample(
        tiny_unet(),
        sd_scheduler(),
        embeds(2),
        embeds(1),
        [1, 2**40],
        items=items,
        config=SamplingConfig(num_steps=3, guidance_scale=2.5),
    )
    save_trajectory(tmp_path / "deep" / "t.safetensors", trajectory)
    back = load_trajectory(tmp_path / "deep" / "t.safetensors")
    for name in ("latents", "timesteps", "log_probs", "item_maps"):
        before = getattr(trajectory, name)
        after = getattr(back, name)
        assert (before is None and after is None) or torch.equal(before, after)

    for name in ("seeds", "config", "items", "mask_source", "prompts"):
        assert getattr(back, name) == getattr(trajectory, name)


def test_damage_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(CheckpointError):
        load_trajectory(path)
    save_file({"latents": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="trajectory"):
        load_trajectory(path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError):
        load_trajectory(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def break_off(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, break_off)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
