"""Full-size models on a GPU, with random weights. Without a GPU, all tests are skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import gpu
from benchmarks.fusion import Round, relative_difference
from benchmarks.nets import attach_random_lora, model_of, random_model
from dfusion.adapter import detach
from dfusion.config import FusionConfig, SamplingConfig
from dfusion.fused_sampling import fuse
from dfusion.sampling import sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA)")


@pytest.mark.parametrize("name", ["sd-2.1-base", "sdxl"])
def test_a_full_size_model_samples_fuses_and_trains(name: str) -> None:
    """A few steps in bfloat16 with an adapter. No figure of speed is checked, since the GPU may be in use."""
    sizes = gpu.Sizes(steps=4, images=4, pairs=2, micro_batch=2, runs=1)
    layout = gpu.measure(model_of(name, "cuda", "bfloat16"), name, sizes)
    assert all(math.isfinite(speed.rate) and speed.rate > 0 for speed in (layout.images, layout.targets, layout.rows))
    assert 0 < layout.frugal_rows.peak_bytes <= layout.rows.peak_bytes


def test_training_of_the_papers_model_fits_into_ten_gb() -> None:
    """With the default micro-batch, and with checkpointing, which is not the default if more memory is free."""
    sizes = gpu.Sizes(steps=4, images=16, pairs=8, runs=1)
    layout = gpu.measure(model_of(gpu.PAPER_MODEL, "cuda", "bfloat16"), gpu.PAPER_MODEL, sizes)
    assert layout.frugal_rows.peak_bytes <= gpu.TRAINING_GB_GOAL * 1e9


@pytest.mark.parametrize("adapter", [False, True])
def test_targets_equal_those_of_the_released_codes_way(adapter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 without TF32, and so do the samples those of the stock pipeline; GPUs sum in a different order than
    the explicit matrices, so the tolerance is ten times that of a CPU."""
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


@pytest.fixture
def sync_debug_mode() -> Iterator[Callable[[int, int], None]]:
    """Returns an on_step for which torch refuses to wait for the GPU from the second step to the last one."""

    def on_step(step_index: int, num_steps: int) -> None:
        if step_index == 1:
            torch.cuda.set_sync_debug_mode("error")
        if step_index == num_steps - 1:
            torch.cuda.set_sync_debug_mode("default")

    yield on_step
    torch.cuda.set_sync_debug_mode("default")


def test_steps_do_not_wait_for_the_gpu(sync_debug_mode: Callable[[int, int], None]) -> None:
    """Neither those of sampling with items nor those of fusion, plain or fused."""
    model = random_model("small", "cuda", torch.float16)
    attach_random_lora(model.unet)
    prompts = model.encode_prompts([gpu.PROMPT] * 2)
    negative = model.encode_prompts([""])
    config = SamplingConfig(num_steps=8)
    arguments = (model.unet, model.scheduler, prompts, negative)
    samples = sample(*arguments, [1, 2], items=[gpu.ITEMS] * 2, config=config, on_step=sync_debug_mode)
    fuse(
        *(model.unet, model.scheduler, samples, samples.select([1, 0]), prompts, negative),
        thresholds=[(0.1, 0.1)] * 2,
        config=FusionConfig(first_step=2, last_step=5),
        on_step=sync_debug_mode,
    )
