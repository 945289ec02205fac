"""What a target costs, plainly and by `dfusion`, side by side in one run: `python -m benchmarks.fusion`.

The plain way (`benchmarks.plain_fusion`) calls the U-Net for reference, base and target at every step, with explicit
attention matrices; its cost is the same for every target, so one is measured. `dfusion.fuse` starts from stored
trajectories of reference and base, as a round has them anyway, so sampling these is not part of its time; its line
below says what that took. The reference serves two targets.

An evaluation is one sample going through the U-Net once; both halves of classifier-free guidance together count as
one. Evaluations are counted by a hook on the U-Net, not derived.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dfusion import _torchvision_ops  # noqa: F401

# isort: split
from diffusers import DDIMScheduler, UNet2DConditionModel

from benchmarks.plain_fusion import plain_fuse
from dfusion.config import FusionConfig, SamplingConfig
from dfusion.fused_sampling import fuse
from dfusion.sampling import sample

TARGETS = 2
SEEDS = (1, 2, 3)
ITEMS = [(1,), (2, 3)]
THRESHOLDS = (0.143, 0.143)
"""A random net spreads its attention evenly over the 7 tokens: about half of the pixels are above 1/7."""


@dataclass
class Cost:
    """Seconds of wall time and U-Net evaluations."""

    seconds: float = 0.0
    evaluations: int = 0


@contextmanager
def measured(unet: UNet2DConditionModel) -> Iterator[Cost]:
    """Wall time and evaluations of what runs inside, with guidance on."""
    cost = Cost()

    def count(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        cost.evaluations += len(args[0]) // 2

    hook = unet.register_forward_pre_hook(count)
    started = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - started
        hook.remove()


def small_unet(heads: int) -> UNet2DConditionModel:
    """Stable Diffusion's layout on 64x64 latents, few channels: attention over 4096 pixels in three of its layers."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=heads,
        norm_num_groups=8,
    ).eval()


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    unet, config = small_unet(arguments.heads), FusionConfig()
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    prompt, negative = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(0))
    sampling = SamplingConfig(num_steps=arguments.steps)
    fused_steps = len(config.steps(arguments.steps))

    with measured(unet) as plain:
        states = plain_fuse(
            unet,
            scheduler,
            prompt=prompt,
            negative=negative,
            seeds=(SEEDS[0], SEEDS[1]),
            items=ITEMS,
            thresholds=THRESHOLDS,
            size=(64, 64),
            steps=arguments.steps,
        )
    prompts = prompt.expand(3, -1, -1)
    with measured(unet) as sampled:
        made = sample(unet, scheduler, prompts, negative, SEEDS, items=[ITEMS] * 3, config=sampling)
    with measured(unet) as fused:
        base, reference = made.select([1, 2]), made.select([0, 0])
        limits = [THRESHOLDS] * TARGETS
        target = fuse(unet, scheduler, base, reference, prompts[:2], negative, thresholds=limits, config=config)

    write(f"{arguments.steps} steps ({fused_steps} fused), 64x64 latents, {arguments.heads} heads, ")
    write(f"{TARGETS} targets of one reference, {arguments.threads} threads\n")
    write(f"{'':28}{'s per target':>14}{'evaluations per target':>24}{'per fused step':>16}\n")
    ways = (("plain, three calls a step", plain, 1, arguments.steps), ("dfusion.fuse", fused, TARGETS, fused_steps))
    for name, cost, targets, steps in ways:
        evaluations = cost.evaluations / targets
        write(f"{name:28}{cost.seconds / targets:14.2f}{evaluations:24.1f}{evaluations / steps:16.2f}\n")
    write(f"{'sampling, once a round':28}{sampled.seconds / 3:14.2f}{sampled.evaluations / 3:24.1f} per sample\n")
    difference = (target.final[0] - states[2][-1]).norm() / states[2][-1].norm()
    write(f"{plain.seconds / (fused.seconds / TARGETS):.1f} times less time a target; ")
    write(f"the two targets differ by {difference:.1e} (relative)\n")


if __name__ == "__main__":
    main()
