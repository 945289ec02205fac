import numpy as np
import pytest
import torch

from dfusion.config import FusionConfig, SamplingConfig
from dfusion.errors import InvalidInputError, NonFiniteError, ShapeMismatchError
from dfusion.thresholds import auto_thresholds, mask_iou, otsu_threshold, thresholds_of
from dfusion.types import Trajectory


def test_otsu_by_hand() -> None:
    # Splits 1|289, 12|89 and 128|9 have w0*w1*d**2 = 3*(16/3)**2 = 85.3, 4*7**2 = 196, 3*(16/3)**2 = 85.3.
    assert otsu_threshold(torch.tensor([[9.0, 1.0], [2.0, 8.0]])) == 5.0
    # The many do not outweigh the few: 1000 numbers of background, 10 of an object.
    values = torch.cat([torch.full((1000,), 0.01), torch.full((10,), 0.05)])
    assert otsu_threshold(values) == pytest.approx(0.03)


def test_otsu_leaves_the_least_variance_within_the_classes() -> None:
    values = np.random.default_rng(0).gamma(2, size=200)
    # Otsu's other form, by brute force: the split whose classes vary least within.
    ordered = np.sort(values)
    within = [k * ordered[:k].var() + (200 - k) * ordered[k:].var() for k in range(1, 200)]
    k = int(np.argmin(within)) + 1
    assert otsu_threshold(torch.from_numpy(values)) == pytest.approx((ordered[k - 1] + ordered[k]) / 2, rel=1e-12)


def test_equal_numbers_have_no_threshold() -> None:
    assert otsu_threshold(torch.tensor([0.0, 0.0, 0.0, 1.0])) == 0.5
    for values in (torch.full((5,), 0.2), torch.tensor([0.2]), torch.tensor([])):
        with pytest.raises(InvalidInputError, match="two different numbers"):
            otsu_threshold(values)
    with pytest.raises(NonFiniteError):
        otsu_threshold(torch.tensor([0.1, torch.nan]))


def _maps(samples: int = 3, steps: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (B, T, 4, 4, 2) of two items at known pixels, and the pixels (4, 4, 2) bool."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(4, 4, 2, dtype=torch.bool)
    truth[:2, :2, 0] = True
    truth[2:, 1:, 1] = True
    noise = torch.rand(samples, steps, 4, 4, 2, generator=generator)
    return torch.where(truth, torch.tensor([0.05, 0.4]), torch.tensor([0.01, 0.1])) * (0.9 + 0.2 * noise), truth


def test_each_item_has_its_own_threshold_over_all_samples_and_steps() -> None:
    maps, truth = _maps()
    low, high = auto_thresholds(maps)
    assert 0.011 < low < 0.045 and 0.11 < high < 0.36
    assert mask_iou(maps, torch.tensor([low, high]), truth).min() == 1
    with pytest.raises(ShapeMismatchError):
        auto_thresholds(maps[0])
    with pytest.raises(InvalidInputError, match="item 1"):
        auto_thresholds(torch.stack([maps[..., 0], torch.zeros(maps.shape[:-1])], -1))


def test_thresholds_are_found_among_square_roots() -> None:
    # of 0, 0.04, 1 the roots 0, 0.2, 1 part into 0, 0.2 | 1, midway at 0.6
    maps = torch.tensor([0.0, 0.04, 1.0]).reshape(1, 1, 3, 1, 1)
    assert auto_thresholds(maps) == pytest.approx((0.36,))
    with pytest.raises(NonFiniteError):
        auto_thresholds(-maps)


def _trajectory(maps: torch.Tensor | None, items: object = (((0,), (2,)),) * 3) -> Trajectory:
    return Trajectory(
        latents=torch.zeros(3, 5, 1, 2, 2),
        timesteps=torch.tensor([751, 501, 251, 1]),
        log_probs=torch.zeros(3, 4),
        seeds=(0, 1, 2),
        config=SamplingConfig(num_steps=4),
        item_maps=maps,
        items=items,  # type: ignore[arg-type]
    )


def test_a_trajectory_gives_the_thresholds_of_its_fused_steps_and_own_items() -> None:
    maps, _ = _maps()
    config = FusionConfig(first_step=1, last_step=2)
    expected = auto_thresholds(maps[:, 1:3])
    spoiled = maps.clone()
    spoiled[:, 0] = spoiled[:, 3] = 0.9
    assert thresholds_of(_trajectory(spoiled), config) == expected
    padded = torch.cat([spoiled, torch.zeros(3, 4, 4, 4, 1)], -1)
    assert thresholds_of(_trajectory(padded), config) == expected


def test_trajectories_without_items_are_rejected() -> None:
    maps, _ = _maps()
    with pytest.raises(InvalidInputError, match="item_maps"):
        thresholds_of(_trajectory(None, None))
    with pytest.raises(InvalidInputError, match="one prompt"):
        thresholds_of(_trajectory(maps, (((0,), (2,)), ((0,), (3,)), ((0,), (2,)))))
    with pytest.raises(InvalidInputError, match="first_step"):
        thresholds_of(_trajectory(maps), FusionConfig(first_step=4))


def test_iou_by_hand() -> None:
    maps = torch.tensor([[0.1, 0.9], [0.5, 0.9], [0.9, 0.0], [0.9, 0.0]]).reshape(2, 2, 2)
    truth = torch.tensor([[0, 0], [1, 0], [1, 0], [0, 0]], dtype=torch.bool).reshape(2, 2, 2)
    # item 0: mask {1, 2, 3}, truth {1, 2}; item 1: mask {0, 1}, truth empty
    assert mask_iou(maps, torch.tensor([0.5, 0.5]), truth).tolist() == pytest.approx([2 / 3, 0])
    assert mask_iou(maps, torch.tensor([0.5, 0.95]), truth)[1] == 1  # both empty
    with pytest.raises(ShapeMismatchError):
        mask_iou(maps, torch.tensor([0.5]), truth)
    with pytest.raises(ShapeMismatchError):
        mask_iou(maps, torch.tensor([0.5, 0.5]), truth[:1])
