"""Full-size models on a GPU, with random weights. Without a GPU, all tests are skipped."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import gpu
from benchmarks.fusion import Round, relative_difference
from benchmarks.nets import attach_random_lora, model_of, random_model
from dfusion.adapter import detach

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA)")


@pytest.mark.parametrize("name", ["sd-2.1-base", "sdxl"])
def test_a_full_size_model_samples_fuses_and_trains(name: str) -> None:
    """A few steps in bfloat16 with an adapter. No figure of speed is checked, since the GPU may be in use."""
    sizes = gpu.Sizes(steps=4, images=4, pairs=2, micro_batch=2, runs=1)
    layout = gpu.measure(model_of(name, "cuda", "bfloat16"), name, sizes)
    assert all(math.isfinite(speed.rate) and speed.rate > 0 for speed in (layout.images, layout.targets, layout.rows))
    assert 0 < layout.rows.peak_bytes


def test_training_of_the_papers_model_fits_into_ten_gb() -> None:
    """With the default micro-batch and checkpointing."""
    sizes = gpu.Sizes(steps=4, images=16, pairs=8, runs=1)
    layout = gpu.measure(model_of(gpu.PAPER_MODEL, "cuda", "bfloat16"), gpu.PAPER_MODEL, sizes)
    assert layout.rows.peak_bytes <= gpu.TRAINING_GB_GOAL * 1e9


@pytest.mark.parametrize("adapter", [False, True])
def test_targets_equal_those_of_the_released_codes_way(adapter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 without TF32, and so do the samples those of the stock pipeline; GPUs sum in another order than the
    explicit matrices, so the tolerance is ten times that of a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model = random_model("small", "cuda", torch.float32)
    if adapter:
        attach_random_lora(model.unet)
    both = Round(model, steps=20)
    for way in ("released_fusing", "sampling", "stock", "fusing"):
        both.run(way)
    detach(model.unet)
    assert relative_difference(both.results["fusing"], both.results["released_fusing"]) < 1e-4
    assert relative_difference(both.results["sampling"].final, both.results["stock"]) < 1e-4
