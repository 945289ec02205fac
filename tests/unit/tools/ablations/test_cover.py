"""Targets under masks of increasing coverage."""

from __future__ import annotations

import pytest
import torch

from dfusion.config import FusionConfig, SamplingConfig
from dfusion.fused_sampling import fuse
from dfusion.pair_metrics import fusion_mask
from dfusion.prompts import Prompt
from dfusion.types import Trajectory
from tests.nets import tiny_model
from tests.scorers import Brightness
from tools.ablations.cover import COVERS, covered, widened
from tools.ablations.pairs import Bench, conditions, find_pairs

OR = FusionConfig(merge="or", first_step=0)


def reference(maps: list[list[float]]) -> Trajectory:
    """A trajectory of one step with these item maps, (pixels, items)."""
    item_maps = torch.tensor(maps)[None, None, None]
    config = SamplingConfig(num_steps=1)
    return Trajectory(torch.zeros(1, 2, 4, 2, 2), torch.arange(1), torch.zeros(1, 1), (0,), config, item_maps)


@pytest.mark.parametrize(("share", "factor"), [(0.25, 2.25), (0.5, 1.5), (0.75, 0.5), (0.9, 0.01), (1.0, 0.01)])
def test_thresholds_are_scaled_together_until_the_mask_covers_the_share(share: float, factor: float) -> None:
    """Thresholds 0.2 and 0.4: by pixel, the larger of A / threshold is 2.25, 1.5, 0.5 and 0.01."""
    maps = reference([[0.45, 0.0], [0.3, 0.0], [0.0, 0.2], [0.002, 0.0]])
    thresholds = widened(maps, (0.2, 0.4), share, OR)
    assert fusion_mask(maps, thresholds, OR).mean() == (1.0 if share == 0.9 else share)
    assert thresholds == pytest.approx([0.2 * factor, 0.4 * factor], rel=1e-4)


@pytest.mark.slow
def test_a_full_mask_by_hand() -> None:
    """Distances are shares of the distance between base and reference."""
    bench = Bench(tiny_model(), Brightness())
    config = FusionConfig(merge="or", first_step=10)
    [pairs] = find_pairs(bench, [Prompt(text="a red [circle]")], 4, seed=7)
    pair = pairs.single(0)
    results = covered(bench, pair, config)

    assert len(results) == len(COVERS) and results[-1].cover == 1
    assert all(result.cover >= share for result, share in zip(results, COVERS, strict=True))

    prompt, negative = conditions(bench.model, pair)
    model = bench.model
    whole = fuse(
        model.unet, model.scheduler, pair.base, pair.reference, prompt, negative, thresholds=[[1e-9]], config=config
    )
    apart = torch.dist(pair.base.final, pair.reference.final)

    assert results[-1].to_base == pytest.approx(float(torch.dist(whole.final, pair.base.final) / apart), abs=1e-5)
    assert results[-1].to_reference == pytest.approx(float(torch.dist(whole.final, pair.reference.final) / apart))
    assert len({result.to_base for result in results}) > 1

    for result in results:
        score = Brightness().score(result.picture[None], [""])[0]
        assert result.margin == pytest.approx(score - pair.base_scores[0])
        assert result.adopted is (result.margin >= 0) and result.accepted is None
