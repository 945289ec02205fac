"""The cost of a target, by plain fusion and by `dfusion`: `python -m benchmarks.fusion`.

Both implementations run several times, alternately, and the minimum time counts. On a CPU the process keeps freed
memory, as a worker does. Otherwise the plain implementation would page-fault all of its matrices again.

Plain fusion (`benchmarks.plain_fusion`) calls the U-Net for reference, base and target at every step, with explicit
attention matrices. Its cost is the same for every target, so one is measured. `dfusion.fuse` starts from the stored
trajectories of reference and base, which a round has already sampled. Their sampling time is therefore reported
separately. The reference is used for two targets. On a GPU: `--unet sd-2.1-base --device cuda --dtype float16`.

An evaluation is one pass of one sample through the U-Net; both halves of classifier-free guidance count as one.
Evaluations are counted by a hook on the U-Net.
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
    """A function that waits until the device has finished all its work."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


@contextmanager
def measured(unet: UNet2DConditionModel) -> Iterator[Cost]:
    """Measure wall time and evaluations within the context, with guidance enabled."""
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
    """A parser with the options for the model and the device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", choices=UNETS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    return parser


def set_up(arguments: argparse.Namespace) -> None:
    """Configure torch as a worker does on a CPU, except for the number of threads."""
    torch.set_num_threads(arguments.threads)
    if torch.device(arguments.device).type == "cpu":
        keep_freed_memory()


def setting(arguments: argparse.Namespace) -> str:
    """A description of model, dtype and device."""
    on_gpu = torch.device(arguments.device).type == "cuda"
    place = torch.cuda.get_device_name(arguments.device) if on_gpu else f"CPU with {arguments.threads} threads"
    return f"{arguments.unet}, {arguments.dtype}, {place}"


@dataclass(frozen=True)
class Compared:
    """The cost of plain fusion, of sampling, and of `dfusion.fuse` for `TARGETS` targets.

    difference  relative difference between the target and the plain one
    """

    plain: Cost
    sampled: Cost
    fused: Cost
    difference: float


def compare(unet: UNet2DConditionModel, tokens: int, steps: int) -> Compared:
    """Measure one target by plain fusion, and three samples and `TARGETS` targets by `dfusion`."""
    # 1. random prompts
    scheduler = sd_scheduler()
    shape = (2, 1, tokens, unet.config.cross_attention_dim)
    prompt, negative = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # a random net spreads its attention evenly over the tokens: about half of the pixels are above their share
    thresholds = (1 / tokens,) * len(ITEMS)

    # 2. plain fusion
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

    # 3. dfusion
    prompts = prompt.expand(3, -1, -1)
    sampling = SamplingConfig(num_steps=steps)
    with measured(unet) as sampled:
        samples = sample(unet, scheduler, prompts, negative, SEEDS, items=[ITEMS] * 3, config=sampling)
    with measured(unet) as fused:
        base = samples.select([1, 2])
        reference = samples.select([0, 0])
        target = fuse(unet, scheduler, base, reference, prompts[:2], negative, thresholds=[thresholds] * TARGETS)

    expected = states[2][-1].cpu()
    return Compared(plain, sampled, fused, float((target.final[0] - expected).norm() / expected.norm()))


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3, help="of each implementation, alternately; the minimum counts")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error(f"--runs: expected at least 1, got {arguments.runs}")
    set_up(arguments)

    # 1. measure
    unet = random_unet(arguments.unet, arguments.device, getattr(torch, arguments.dtype))
    compare(unet, TOKENS[arguments.unet], steps=4)  # warm up, above all on a GPU
    runs = [compare(unet, TOKENS[arguments.unet], arguments.steps) for _ in range(arguments.runs)]
    plain = min((run.plain for run in runs), key=_seconds)
    sampled = min((run.sampled for run in runs), key=_seconds)
    fused = min((run.fused for run in runs), key=_seconds)
    fused_steps = len(FusionConfig().steps(arguments.steps))

    # 2. print
    write(f"{setting(arguments)}; ")
    write(f"{arguments.steps} steps ({fused_steps} fused), 64x64 latents, {TARGETS} targets of one reference; ")
    write(f"the minimum of {arguments.runs} runs\n")
    write(f"{'':28}{'s per target':>14}{'evaluations per target':>24}{'per fused step':>16}\n")
    rows = (("plain, three calls per step", plain, 1, arguments.steps), ("dfusion.fuse", fused, TARGETS, fused_steps))
    for name, cost, targets, steps in rows:
        evaluations = cost.evaluations / targets
        write(f"{name:28}{cost.seconds / targets:14.2f}{evaluations:24.1f}{evaluations / steps:16.2f}\n")
    write(f"{'sampling, once a round':28}{sampled.seconds / 3:14.2f}{sampled.evaluations / 3:24.1f} per sample\n")
    write(f"{plain.seconds / (fused.seconds / TARGETS):.1f} times less time per target; ")
    write(f"the two targets differ by {runs[0].difference:.1e} (relative)\n")


def _seconds(cost: Cost) -> float:
    return cost.seconds


if __name__ == "__main__":
    main()
