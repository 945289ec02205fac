import math
from itertools import chain
from typing import get_args

import numpy as np
import pytest
import torch

from dfusion import pair_metrics
from dfusion.config import PRESETS, AttentionControl, FusionConfig, PairingConfig, SamplingConfig
from dfusion.errors import InvalidInputError, ShapeMismatchError
from dfusion.pair_metrics import PSNR_MAX, PairSides, Side, decide, fusion_mask, mask_image, pair_statistics
from dfusion.types import Trajectory

UPPER_HALF = torch.tensor([[1.0, 1.0], [0.0, 0.0]])


def side(latent: float, pixel: int, score: float) -> Side:
    return Side(torch.full((2, 2, 2), latent), np.full((4, 4, 3), pixel, np.uint8), score)


def test_figures_by_hand() -> None:
    """151 - 100 = 51 = 0.2 * 255, and 20 log10(1 / 0.2) = 13.979 dB."""
    base = side(0.0, 100, 0.25)
    reference = side(3.0, 151, 1.0)
    target = Side(base.latents.clone(), base.image.copy(), 0.75)
    target.latents[:, 0, :] = 2.0  # the upper half, which is where the mask is
    target.image[:2] = 151
    [statistics] = pair_statistics([PairSides(reference, base, target, UPPER_HALF)])

    assert statistics.margin == {"target_over_base": 0.5, "reference_over_base": 0.75}
    assert statistics.mask_cover == 0.5
    assert statistics.latent_distance["target_to_base"] == pytest.approx({"inside": 2.0, "outside": 0.0})
    assert statistics.latent_distance["reference_to_base"] == pytest.approx({"inside": 3.0, "outside": 3.0})
    assert statistics.pixel_distance["target_to_base"] == pytest.approx({"inside": 0.2, "outside": 0.0})
    assert statistics.pixel_distance["reference_to_base"] == pytest.approx({"inside": 0.2, "outside": 0.2})

    decibels = 20 * math.log10(5)
    assert statistics.psnr["target_to_base"] == pytest.approx({"inside": decibels, "outside": PSNR_MAX})
    assert statistics.psnr["reference_to_base"] == pytest.approx({"inside": decibels, "outside": decibels})

    a = 100 / 255
    b = 151 / 255  # flat images have no variance: only the means are left of SSIM
    flat = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)

    assert statistics.ssim["target_to_base"] == pytest.approx({"inside": flat, "outside": 1.0}, abs=1e-5)
    assert statistics.ssim["reference_to_base"] == pytest.approx({"inside": flat, "outside": flat}, abs=1e-5)


def test_an_empty_mask_has_no_inside() -> None:
    base = side(0.0, 0, 0.0)
    [statistics] = pair_statistics([PairSides(base, base, base, torch.zeros(2, 2))])
    assert statistics.latent_distance["target_to_base"] == {"inside": None, "outside": 0.0}
    assert statistics.psnr["target_to_base"] == {"inside": None, "outside": PSNR_MAX}
    assert statistics.ssim["target_to_base"] == {"inside": None, "outside": pytest.approx(1.0)}


def test_a_soft_mask_weights_a_pixel_on_both_sides() -> None:
    """Weights 1 and 0.25 inside, 0 and 0.75 outside; squared distances 4 and 1."""
    base = side(0.0, 0, 0.0)
    target = side(0.0, 0, 0.0)
    target.latents[:, :, 0] = 2.0
    target.latents[:, :, 1] = 1.0
    [statistics] = pair_statistics([PairSides(base, base, target, torch.tensor([[1.0, 0.25]]))])
    assert statistics.latent_distance["target_to_base"] == pytest.approx(
        {"inside": math.sqrt((4 + 0.25) / 1.25), "outside": 1.0}
    )


def test_pairs_of_any_sizes_are_measured_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as one at a time, although batches have two pairs of 16 pixels at most."""
    monkeypatch.setattr(pair_metrics, "_BATCH_PIXELS", 32)
    rng = np.random.default_rng(0)

    def random_side(height: int) -> Side:
        return Side(torch.rand(2, height // 2, 2), rng.integers(0, 256, (height, 4, 3), np.uint8), rng.random())

    pairs = []
    for height in (4, 4, 4, 8, 4):
        mask = torch.rand(2, 2)
        pairs.append(PairSides(random_side(height), random_side(height), random_side(height), mask))

    one_by_one = chain.from_iterable(pair_statistics([pair]) for pair in pairs)
    for together, alone in zip(pair_statistics(pairs), one_by_one, strict=True):
        assert together.margin == alone.margin
        for metric in ("latent_distance", "pixel_distance", "psnr", "ssim"):
            for name, values in getattr(together, metric).items():
                assert values == pytest.approx(getattr(alone, metric)[name], rel=1e-12)
    assert pair_statistics([]) == []


def test_images_that_cannot_be_written_to() -> None:
    image = np.full((4, 4, 3), 7, np.uint8)
    image.setflags(write=False)
    read_only = Side(torch.zeros(4, 2, 2), image, 0.0)
    [statistics] = pair_statistics([PairSides(read_only, read_only, read_only, UPPER_HALF)])
    assert statistics.ssim["target_to_base"] == pytest.approx({"inside": 1.0, "outside": 1.0})


def test_invalid_arguments_are_rejected() -> None:
    base = side(0.0, 0, 0.0)
    wide = Side(torch.zeros(2, 2, 4), base.image, 0.0)
    large = Side(base.latents, np.zeros((8, 8, 3), np.uint8), 0.0)

    with pytest.raises(ShapeMismatchError, match=r"reference\.latents"):
        pair_statistics([PairSides(wide, base, base, UPPER_HALF)])
    with pytest.raises(ShapeMismatchError, match=r"target\.image"):
        pair_statistics([PairSides(base, base, large, UPPER_HALF)])
    with pytest.raises(ShapeMismatchError, match="mask"):
        pair_statistics([PairSides(base, base, base, UPPER_HALF[None])])
    with pytest.raises(InvalidInputError, match="mask"):
        pair_statistics([PairSides(base, base, base, 2 * UPPER_HALF)])
    with pytest.raises(InvalidInputError, match="mask"):
        pair_statistics([PairSides(base, base, base, UPPER_HALF * torch.nan)])


def four_steps(item_maps: torch.Tensor | None) -> Trajectory:
    config = SamplingConfig(num_steps=4)
    return Trajectory(torch.zeros(1, 5, 4, 2, 2), torch.arange(4), torch.zeros(1, 4), (0,), config, item_maps)


def test_the_mask_counts_the_fused_steps() -> None:
    maps = torch.zeros(1, 4, 1, 2, 1)
    maps[0, 0, 0, :, 0] = 1.0  # step 0 is not fused
    maps[0, 1, 0, 0, 0] = 1.0
    maps[0, 2, 0, 0, 0] = 1.0
    maps[0, 3, 0, 1, 0] = 1.0
    mask = fusion_mask(four_steps(maps), [0.5], FusionConfig(first_step=1, last_step=19))

    assert mask.tolist() == [[pytest.approx(2 / 3), pytest.approx(1 / 3)]]
    assert mask_image(mask, 1, 4).tolist() == [[170, 170, 85, 85]]
    with pytest.raises(InvalidInputError, match="item_maps"):
        fusion_mask(four_steps(None), [0.5], FusionConfig())


def test_decisions_name_the_comparison() -> None:
    reference = side(1, 1, 0.75)
    base = side(2, 2, 0.25)
    target = side(3, 3, 0.5)
    mask = UPPER_HALF
    ours = FusionConfig()
    adopted = decide(reference, base, target, PairingConfig(), mask, ours)

    assert (adopted.adopted, adopted.reason) == (True, "target 0.5 >= 1 x base 0.25")

    keep_all = PairingConfig(adoption_threshold=0)
    copies = [
        decide(reference, base, side(2, 2, 0.25), keep_all, mask, ours),
        decide(reference, base, target, keep_all, 0 * mask, ours),  # differs only by rounding in another batch
    ]

    assert all(not copy.adopted and "target identical to base" in copy.reason for copy in copies)
    assert decide(reference, base, target, keep_all, 0 * mask, FusionConfig(control="kv")).adopted

    refused = decide(reference, base, target, PairingConfig(adoption_against="reference"), mask, ours)
    assert (refused.adopted, refused.reason) == (False, "target 0.5 < 1 x reference 0.75")


@pytest.mark.parametrize(
    ("cells", "limit", "adopted"), [([1, 1], 0.75, True), ([1, 1, 1], 0.75, True), ([1, 1, 1, 0.04], 0.75, False)]
)
def test_masks_over_more_of_the_image_than_the_limit_are_not_adopted(
    cells: list[float], limit: float, adopted: bool
) -> None:
    """Four pixels: 2 / 4, 3 / 4 and 3.04 / 4 of the image."""
    mask = torch.tensor(cells + [0.0] * (4 - len(cells))).reshape(2, 2)
    config = PairingConfig(adoption_threshold=0, max_mask_cover=limit)
    decision = decide(side(1, 1, 0.75), side(2, 2, 0.25), side(3, 3, 0.5), config, mask, FusionConfig())
    assert decision.adopted is adopted
    if not adopted:
        assert decision.reason.startswith("the mask covers 0.76 of the image, max_mask_cover is 0.75")


@pytest.mark.parametrize("control", get_args(AttentionControl))
def test_a_full_mask_counts_where_the_control_uses_it(control: AttentionControl) -> None:
    everywhere = torch.ones(2, 2)
    fusion = FusionConfig(control=control)
    sides = side(1, 1, 0.75), side(2, 2, 0.25), side(3, 3, 0.5)
    masked = control in ("masked_kv", "masactrl_maps", "masactrl_features", "masactrl")
    assert decide(*sides, PairingConfig(), everywhere, fusion).adopted is not masked
    assert decide(*sides, PRESETS["released_code"].pairing, everywhere, fusion).adopted
