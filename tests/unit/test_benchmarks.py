"""The benchmarks, on small images and few steps."""

from __future__ import annotations

import torch

from benchmarks import fusion, training
from benchmarks.nets import TOKENS, random_model, random_unet


def test_fusion_counts_the_evaluations_of_both_ways() -> None:
    """Plainly 3 calls a step; fused, from the third step on, a reference and two targets a step."""
    unet = random_unet("small", "cpu", torch.float32)
    unet.register_to_config(sample_size=16)
    result = fusion.compare(unet, TOKENS["small"], steps=3)
    assert (result.plain.evaluations, result.sampled.evaluations, result.fused.evaluations) == (9, 9, 3)
    assert result.difference < 1e-5


def test_an_update_is_the_same_by_any_micro_batch() -> None:
    model = random_model("small", "cpu", torch.float32)
    model.unet.register_to_config(sample_size=16)
    pairs = training.sampled_pairs(model, count=1, steps=2)
    first, second = (training.update(model, pairs, *way) for way in ((1, False), (2, True)))
    assert (second.gradient - first.gradient).norm() / first.gradient.norm() < 1e-4
    assert max(first.off, second.off) < 1e-5
