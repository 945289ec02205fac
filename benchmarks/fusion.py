"""What a target costs, plainly and by `dfusion`, side by side: `python -m benchmarks.fusion`.

Each way runs several times, in turns, and its least time counts. On a CPU freed memory stays with the process, as in a
worker: else the plain way would fault all pages of each of its matrices anew.

The plain way (`benchmarks.plain_fusion`) calls the U-Net for reference, base and target at every step, with explicit
attention matrices; its cost is the same for every target, so one is measured. `dfusion.fuse` starts from stored
trajectories of reference and base, as a round has them anyway, so sampling these is not part of its time; its line
below says what that took. The reference serves two targets. On a GPU: `--unet sd-2.1-base --device cuda
--dtype float16`.

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

from benchmarks.nets import TOKENS, UNETS, random_unet, sd_scheduler
from benchmarks.plain_fusion import plain_fuse
from dfusion._diffusers import UNet2DConditionModel
from dfusion.config import FusionConfig, SamplingConfig
from dfusion.fused_sampling import fuse
from dfusion.sampling import sample
from worker.allocator import keep_freed_memory

TARGETS = 2
SEEDS = (1, 2, 3)
ITEMS = [(1,), (2, 3)]


@dataclass
class Cost:
    """Seconds of wall time and U-Net evaluations."""

    seconds: float = 0.0
    evaluations: int = 0


def settled(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done all that it was given."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


@contextmanager
def measured(unet: UNet2DConditionModel) -> Iterator[Cost]:
    """Wall time and evaluations of what runs inside, with guidance on."""
    cost = Cost()
    wait = settled(unet.device)

    def count(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        cost.evaluations += len(args[0]) // 2

    hook = unet.register_forward_pre_hook(count)
    wait()
    started = time.perf_counter()
    try:
        yield cost
    finally:
        wait()
        cost.seconds = time.perf_counter() - started
        hook.remove()


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that say on which model, and where."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", choices=UNETS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    return parser


def set_up(arguments: argparse.Namespace) -> None:
    """As a worker is on a CPU, but for the threads, which are those asked for."""
    torch.set_num_threads(arguments.threads)
    if torch.device(arguments.device).type == "cpu":
        keep_freed_memory()


def setting(arguments: argparse.Namespace) -> str:
    """On which model it runs, and where."""
    on_gpu = torch.device(arguments.device).type == "cuda"
    place = torch.cuda.get_device_name(arguments.device) if on_gpu else f"CPU with {arguments.threads} threads"
    return f"{arguments.unet}, {arguments.dtype}, {place}"


@dataclass(frozen=True)
class Compared:
    """What each way took, for `TARGETS` targets where it is fused, and how far its target is from the plain one."""

    plain: Cost
    sampled: Cost
    fused: Cost
    difference: float


def compare(unet: UNet2DConditionModel, tokens: int, steps: int) -> Compared:
    """One target plainly; three samples and `TARGETS` targets by `dfusion`."""
    scheduler = sd_scheduler()
    shape = (2, 1, tokens, unet.config.cross_attention_dim)
    prompt, negative = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # a random net spreads its attention evenly over the tokens: about half of the pixels are above their share
    thresholds = (1 / tokens,) * len(ITEMS)
    with measured(unet) as plain:
        states = plain_fuse(
            unet,
            scheduler,
            prompt=prompt,
            negative=negative,
            seeds=(SEEDS[0], SEEDS[1]),
            items=ITEMS,
            thresholds=thresholds,
            size=(unet.config.sample_size,) * 2,
            steps=steps,
        )
    prompts, sampling = prompt.expand(3, -1, -1), SamplingConfig(num_steps=steps)
    with measured(unet) as sampled:
        made = sample(unet, scheduler, prompts, negative, SEEDS, items=[ITEMS] * 3, config=sampling)
    with measured(unet) as fused:
        base, reference = made.select([1, 2]), made.select([0, 0])
        target = fuse(unet, scheduler, base, reference, prompts[:2], negative, thresholds=[thresholds] * TARGETS)
    plainly = states[2][-1].cpu()
    return Compared(plain, sampled, fused, float((target.final[0] - plainly).norm() / plainly.norm()))


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3, help="of each way, in turns; the least time counts")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error(f"--runs: expected at least 1, got {arguments.runs}")
    set_up(arguments)
    unet = random_unet(arguments.unet, arguments.device, getattr(torch, arguments.dtype))
    compare(unet, TOKENS[arguments.unet], steps=4)  # what only a first call does, on a GPU above all
    found = [compare(unet, TOKENS[arguments.unet], arguments.steps) for _ in range(arguments.runs)]
    plain, sampled, fused = (
        min((getattr(one, way) for one in found), key=lambda cost: cost.seconds)
        for way in ("plain", "sampled", "fused")
    )
    fused_steps = len(FusionConfig().steps(arguments.steps))

    write(f"{setting(arguments)}; ")
    write(f"{arguments.steps} steps ({fused_steps} fused), 64x64 latents, {TARGETS} targets of one reference; ")
    write(f"the least of {arguments.runs} runs in turns\n")
    write(f"{'':28}{'s per target':>14}{'evaluations per target':>24}{'per fused step':>16}\n")
    ways = (("plain, three calls a step", plain, 1, arguments.steps), ("dfusion.fuse", fused, TARGETS, fused_steps))
    for name, cost, targets, steps in ways:
        evaluations = cost.evaluations / targets
        write(f"{name:28}{cost.seconds / targets:14.2f}{evaluations:24.1f}{evaluations / steps:16.2f}\n")
    write(f"{'sampling, once a round':28}{sampled.seconds / 3:14.2f}{sampled.evaluations / 3:24.1f} per sample\n")
    write(f"{plain.seconds / (fused.seconds / TARGETS):.1f} times less time a target; ")
    write(f"the two targets differ by {found[0].difference:.1e} (relative)\n")


if __name__ == "__main__":
    main()
