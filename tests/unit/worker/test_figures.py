import numpy as np
import pytest
import torch

from dfusion.config import FusionConfig, SamplingConfig
from dfusion.types import Trajectory
from worker.figures import Side, fusion_mask, mask_image, pair_figures


def side(latent: float, pixel: int, score: float) -> Side:
    return Side(torch.full((2, 2, 2), latent), np.full((4, 4, 3), pixel, np.uint8), score)


def test_figures_by_hand() -> None:
    base, reference = side(0.0, 100, 0.25), side(3.0, 151, 1.0)
    target = Side(base.latents.clone(), base.image.copy(), 0.75)
    target.latents[:, 0, :] = 2.0  # the upper half, which is where the mask is
    target.image[:2] = 151
    figures = pair_figures(reference, base, target, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert figures["margin"] == {"target_over_base": 0.5, "reference_over_base": 0.75}
    assert figures["mask_cover"] == 0.5
    assert figures["latent_distance"]["target_to_base"] == pytest.approx({"inside": 2.0, "outside": 0.0})
    assert figures["latent_distance"]["reference_to_base"] == pytest.approx({"inside": 3.0, "outside": 3.0})
    assert figures["pixel_distance"]["target_to_base"] == pytest.approx({"inside": 0.2, "outside": 0.0})
    assert figures["pixel_distance"]["reference_to_base"] == pytest.approx({"inside": 0.2, "outside": 0.2})


def test_an_empty_mask_has_no_inside() -> None:
    base = side(0.0, 0, 0.0)
    figures = pair_figures(base, base, base, torch.zeros(2, 2))
    assert figures["latent_distance"]["target_to_base"] == {"inside": None, "outside": 0.0}


def test_the_mask_counts_the_fused_steps() -> None:
    maps = torch.zeros(1, 4, 1, 2, 1)
    maps[0, 0, 0, :, 0] = 1.0  # step 0 is not fused
    maps[0, 1, 0, 0, 0] = 1.0
    maps[0, 2, 0, 0, 0] = 1.0
    maps[0, 3, 0, 1, 0] = 1.0
    reference = Trajectory(
        torch.zeros(1, 5, 4, 2, 2), torch.arange(4), torch.zeros(1, 4), (0,), SamplingConfig(num_steps=4), maps
    )
    mask = fusion_mask(reference, [0.5], FusionConfig(first_step=1, last_step=19))
    assert mask.tolist() == [[pytest.approx(2 / 3), pytest.approx(1 / 3)]]
    assert mask_image(mask, 1, 4).tolist() == [[170, 170, 85, 85]]
