from dataclasses import replace

import numpy as np
import pytest
import torch

from dfusion.config import FusionConfig, SamplingConfig
from dfusion.errors import InvalidInputError
from dfusion.previews import denoising_strip, mask_grid, preview_steps
from dfusion.types import Trajectory

TWO_FUSED = FusionConfig(first_step=1, last_step=2)


def trajectory(num_steps: int, item_maps: torch.Tensor | None = None) -> Trajectory:
    """A sample whose state i has the value i."""
    states = torch.arange(num_steps + 1.0)[None, :, None, None, None].expand(1, num_steps + 1, 4, 2, 3)
    return Trajectory(
        latents=states,
        timesteps=torch.arange(num_steps).flip(0),
        log_probs=torch.zeros(1, num_steps),
        seeds=(0,),
        config=SamplingConfig(num_steps=num_steps),
        item_maps=item_maps,
        items=None if item_maps is None else (((0,), (2,)),),
    )


def item_maps() -> torch.Tensor:
    """Three steps of two items on 1 x 2 pixels. Item 0 is left at all steps; item 1 is right, at the last step both."""
    first = torch.tensor([[[0.9, 0.0]], [[0.9, 0.0]], [[0.9, 0.0]]])
    second = torch.tensor([[[0.0, 0.4]], [[0.0, 0.4]], [[0.4, 0.4]]])
    return torch.stack([first, second], dim=-1)[None]


def test_all_states_of_a_short_trajectory_are_shown_and_sixteen_of_a_long_one() -> None:
    assert preview_steps(3) == (0, 1, 2, 3)
    assert preview_steps(15) == tuple(range(16))
    assert preview_steps(30) == tuple(range(0, 31, 2))
    assert preview_steps(20) == (0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 19, 20)  # 4/3 each, rounded
    assert len(set(preview_steps(1000))) == 16
    assert preview_steps(1000)[-1] == 1000


def test_a_strip_has_the_decoded_steps_from_left_to_right() -> None:
    def decode(latents: torch.Tensor) -> np.ndarray:
        return np.full((1, 2, 3, 3), int(latents[0, 0, 0, 0]), np.uint8)

    strip = denoising_strip(trajectory(6), [0, 2, 6], decode)
    assert strip.shape == (2, 9, 3)
    assert strip[0, :, 0].tolist() == [0, 0, 0, 2, 2, 2, 6, 6, 6]


def test_the_tiles_of_a_strip_are_bounded() -> None:
    strip = denoising_strip(trajectory(2), [0, 2], lambda _: np.full((1, 512, 1024, 3), 77, np.uint8))
    assert strip.shape == (128, 2 * 256, 3)
    assert set(strip.flatten().tolist()) == {77}


def test_masks_by_item_and_step_by_hand() -> None:
    """The last column is the mean of steps 1 and 2; the state after the last step has the mask of that step."""
    grid = mask_grid(trajectory(3, item_maps()), [0.5, 0.3], TWO_FUSED, [0, 2, 3])
    assert grid.tolist() == [
        [255, 0, 255, 0, 255, 0, 255, 0],
        [0, 255, 255, 255, 255, 255, 128, 255],
        [255, 255, 0, 255, 0, 255, 128, 255],  # exclusive or
    ]
    merged = mask_grid(trajectory(3, item_maps()), [0.5, 0.3], TWO_FUSED.model_copy(update={"merge": "or"}), [2])
    assert merged[-1].tolist() == [255, 255, 255, 255]


def test_masks_are_bounded() -> None:
    maps = torch.ones(1, 2, 256, 128, 1)
    reference = replace(trajectory(2, maps), items=(((0,),),))
    assert mask_grid(reference, [0.5], FusionConfig(first_step=0), [0, 1, 2]).shape == (2 * 64, 4 * 32)


def test_a_sample_without_item_maps_has_no_masks() -> None:
    with pytest.raises(InvalidInputError, match="item_maps"):
        mask_grid(trajectory(3), [0.5], TWO_FUSED, [0])
    with pytest.raises(InvalidInputError, match="expected 2, one per item, got 1"):
        mask_grid(trajectory(3, item_maps()), [0.5], TWO_FUSED, [0])
