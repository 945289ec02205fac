"""The released code's sampling and fusion against `dfusion`'s: `python -m benchmarks.fusion`.

A prompt has four samples. As in the released code, the best quarter are references, each used twice, and the worst half
are bases: two pairs of one reference. What is measured:

    released code  `benchmarks.plain_fusion`: samples all images in one batch, then fuses both pairs in one batch with
                   three U-Net calls a step (references, bases, targets), with explicit attention matrices for all heads
    dfusion        `sample` with the references' item maps, then `fuse`
    stock          diffusers' StableDiffusionPipeline, which samples the same images and records nothing

All run in one process with the same threads and memory settings, in turn, and the median of the runs counts. This is
done without and with an adapter attached. On a CPU the process keeps freed memory, as a worker does. Otherwise the
explicit matrices would be page-faulted again.

Operations and evaluations are counted in a short warm-up and multiplied by the number of steps. The floor is the time
of these operations at the rate of a large matrix product, which is measured in the same run. On a GPU:
`--unet sd-2.1-base --device cuda --dtype float16`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measuring import (
    COST_COLUMNS,
    Cost,
    Goal,
    Work,
    Write,
    cost_cells,
    counted,
    machine,
    matrix_rate,
    median_seconds,
    parser_of,
    set_up,
    setting,
    settled,
    table,
    write_json,
)
from benchmarks.nets import attach_random_lora, random_model
from benchmarks.plain_fusion import plain_fuse, plain_sample
from dfusion._diffusers import DDIMScheduler, StableDiffusionPipeline
from dfusion.adapter import detach
from dfusion.config import FusionConfig, SamplingConfig
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.sampling import sample
from dfusion.types import Trajectory

PROMPT = "a red and striped circle"
ITEMS = ((1,), (2, 3))
SEEDS = (1, 2, 3, 4)
REFERENCE = 0
BASES = (2, 3)
"""Which of the four samples are the reference and the bases."""

FUSION_GOAL = 3.5
TOTAL_GOAL = 2.7
STOCK_GOAL = 1.05
DIFFERENCE_GOAL = 1e-5
"""The largest relative difference of float32 latents. Half precision has none."""
_COUNTED_STEPS = 3


class Round:
    """The sampling and fusion of one prompt, by each way, on the same model and seeds."""

    def __init__(self, model: DiffusionModel, steps: int) -> None:
        self.model = model
        self.steps = steps
        # a random net spreads its attention evenly over the tokens: about half of the pixels are above their share
        self._thresholds = (1 / model.tokenizer.model_max_length,) * len(ITEMS)
        self._size = model.latent_shape[1:]
        self._pipeline = StableDiffusionPipeline(
            vae=model.vae,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=model.unet,
            scheduler=DDIMScheduler.from_config(model.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipeline.set_progress_bar_config(disable=True)

    def released_sampling(self) -> torch.Tensor:
        """The clean latents of the four samples."""
        prompt, negative = self._embeds()
        states = plain_sample(
            self.model.unet,
            self.model.scheduler,
            prompt=prompt,
            negative=negative,
            seeds=SEEDS,
            size=self._size,
            steps=self.steps,
        )
        return states[:, -1].cpu()

    def released_fusing(self) -> torch.Tensor:
        """The clean latents of the two targets."""
        prompt, negative = self._embeds()
        *_, targets = plain_fuse(
            self.model.unet,
            self.model.scheduler,
            prompt=prompt,
            negative=negative,
            seeds=[(SEEDS[REFERENCE], SEEDS[base]) for base in BASES],
            items=ITEMS,
            thresholds=self._thresholds,
            size=self._size,
            steps=self.steps,
            last_step=self.steps - 1,
        )
        return targets[:, -1].cpu()

    def sampling(self) -> Trajectory:
        """The four samples, with item maps."""
        model = self.model
        config = SamplingConfig(num_steps=self.steps)
        prompts = model.encode_prompts([PROMPT] * len(SEEDS))
        negative = model.encode_prompts([""])
        items = [ITEMS] * len(SEEDS)
        return sample(model.unet, model.scheduler, prompts, negative, SEEDS, items=items, config=config)

    def fusing(self, samples: Trajectory) -> torch.Tensor:
        """The clean latents of the two targets."""
        model = self.model
        prompts = model.encode_prompts([PROMPT] * len(BASES))
        negative = model.encode_prompts([""])
        base = samples.select(BASES)
        reference = samples.select([REFERENCE] * len(BASES))
        thresholds = [self._thresholds] * len(BASES)
        return fuse(model.unet, model.scheduler, base, reference, prompts, negative, thresholds=thresholds).final

    def stock(self) -> torch.Tensor:
        """The clean latents of the four samples."""
        settings = SamplingConfig(num_steps=self.steps)
        output = self._pipeline(
            prompt=[PROMPT] * len(SEEDS),
            num_inference_steps=self.steps,
            guidance_scale=settings.guidance_scale,
            eta=settings.eta,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="latent",
        )
        latents: torch.Tensor = output.images
        return latents.cpu()

    def _embeds(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.encode_prompts([PROMPT]).embeds, self.model.encode_prompts([""]).embeds


@dataclass(frozen=True)
class Compared:
    """The costs of one prompt's four samples and two targets.

    difference  relative difference between the targets of both ways
    stock_difference  the same between our samples and the stock pipeline's
    """

    adapter: bool
    released_sampling: Cost
    released_fusing: Cost
    sampling: Cost
    fusing: Cost
    stock: Cost
    difference: float
    stock_difference: float

    @property
    def fusion_ratio(self) -> float:
        return self.released_fusing.seconds / self.fusing.seconds

    @property
    def sampling_ratio(self) -> float:
        return self.released_sampling.seconds / self.sampling.seconds

    @property
    def total_ratio(self) -> float:
        """Of sampling and fusion together."""
        released = self.released_sampling + self.released_fusing
        return released.seconds / (self.sampling + self.fusing).seconds

    @property
    def stock_ratio(self) -> float:
        """Our sampling time, relative to the stock pipeline's."""
        return self.sampling.seconds / self.stock.seconds

    def goals(self, float32: bool) -> list[Goal]:
        name = "with an adapter" if self.adapter else "without an adapter"
        goals = [
            Goal(f"fusion {name}, times faster", self.fusion_ratio, FUSION_GOAL),
            Goal(f"sampling + fusion {name}, times faster", self.total_ratio, TOTAL_GOAL),
            Goal(f"sampling with maps {name}, relative to stock", self.stock_ratio, STOCK_GOAL, at_least=False),
        ]
        if float32:
            differences = max(self.difference, self.stock_difference)
            goals.append(Goal(f"difference of latents {name}", differences, DIFFERENCE_GOAL, at_least=False))
        return goals

    def text(self) -> str:
        """The table and the ratios."""
        rows = (
            ("released code: sampling", self.released_sampling),
            ("released code: fusing", self.released_fusing),
            ("released code: both", self.released_sampling + self.released_fusing),
            ("dfusion: sampling with maps", self.sampling),
            ("dfusion: fusing", self.fusing),
            ("dfusion: both", self.sampling + self.fusing),
            ("stock pipeline: sampling", self.stock),
        )
        title = "with an adapter attached" if self.adapter else "without an adapter"
        text = table((title, *COST_COLUMNS), [(name, *cost_cells(cost)) for name, cost in rows])
        text += f"times faster: sampling {self.sampling_ratio:.2f}, fusing {self.fusion_ratio:.2f}, "
        text += f"both {self.total_ratio:.2f}; targets differ by {self.difference:.1e} (relative)\n"
        text += f"sampling with maps takes {self.stock_ratio:.2f} times the stock pipeline's time; "
        return text + f"samples differ by {self.stock_difference:.1e} (relative)\n"

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        costs = ("released_sampling", "released_fusing", "sampling", "fusing", "stock")
        ratios = ("sampling_ratio", "fusion_ratio", "total_ratio", "stock_ratio", "difference", "stock_difference")
        figures: dict[str, Any] = {"adapter": self.adapter}
        figures |= {name: getattr(self, name).figures() for name in costs}
        return figures | {name: getattr(self, name) for name in ratios}


def compare(model: DiffusionModel, steps: int, runs: int, adapter: bool) -> Compared:
    """Measure each way, with a random adapter attached or without any."""
    if adapter:
        attach_random_lora(model.unet)
    device = model.unet.device
    prompt_round = Round(model, steps)

    # 1. operations and evaluations; this also warms up
    work = _work(Round(model, _COUNTED_STEPS), steps)

    # 2. seconds, and what was computed
    results: dict[str, Any] = {}

    def keeping(name: str, way: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            results[name] = way()

        return call

    ways: dict[str, Callable[[], object]] = {
        "released_sampling": prompt_round.released_sampling,
        "sampling": prompt_round.sampling,
        "released_fusing": prompt_round.released_fusing,
        "fusing": lambda: prompt_round.fusing(results["sampling"]),
        "stock": prompt_round.stock,
    }
    rate = matrix_rate(device, model.unet.dtype)
    seconds = median_seconds({name: keeping(name, way) for name, way in ways.items()}, runs, settled(device))
    detach(model.unet)

    # 3. the costs
    costs = {name: Cost(seconds[name], work[name], rate) for name in ways}
    difference = relative_difference(results["fusing"], results["released_fusing"])
    stock_difference = relative_difference(results["sampling"].final, results["stock"])
    return Compared(adapter, difference=difference, stock_difference=stock_difference, **costs)


def _work(short: Round, steps: int) -> dict[str, Work]:
    """What each way computes in `steps` steps, counted over a few. All steps are alike, but the first are not fused."""
    unet = short.model.unet
    every_step = steps / short.steps
    fused_steps = len(FusionConfig().steps(steps)) / len(FusionConfig().steps(short.steps))

    with counted(unet) as released_sampling:
        short.released_sampling()
    with counted(unet) as released_fusing:
        short.released_fusing()
    with counted(unet) as sampling:
        samples = short.sampling()
    with counted(unet) as fusing:
        short.fusing(samples)
    with counted(unet) as stock:
        short.stock()

    return {
        "released_sampling": released_sampling.times(every_step),
        "released_fusing": released_fusing.times(every_step),
        "sampling": sampling.times(every_step),
        "fusing": fusing.times(fused_steps),
        "stock": stock.times(every_step),
    }


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def measure(arguments: argparse.Namespace, adapters: Sequence[bool]) -> list[Compared]:
    """Both ways, with each of the `adapters`: whether one is attached."""
    model = random_model(arguments.unet, arguments.device, getattr(torch, arguments.dtype))
    return [compare(model, arguments.steps, arguments.runs, adapter) for adapter in adapters]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--adapter", choices=("both", "with", "without"), default="both")


def adapters_of(arguments: argparse.Namespace) -> Sequence[bool]:
    """Whether an adapter is attached, for each measurement."""
    return {"both": (False, True), "with": (True,), "without": (False,)}[arguments.adapter]


def main(write: Write = sys.stdout.write) -> None:
    """Command line."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    set_up(arguments)

    write(f"{setting(arguments)}; {arguments.steps} steps, medians of {arguments.runs} runs\n")
    results = measure(arguments, adapters_of(arguments))
    goals: list[Goal] = []
    for result in results:
        write(result.text())
        goals += result.goals(arguments.dtype == "float32")
    for goal in goals:
        write(goal.line())
    write_json(
        arguments.json,
        {
            "machine": machine(arguments.device),
            "fusion": [result.figures() for result in results],
            "goals": [goal.figures() for goal in goals],
        },
    )


if __name__ == "__main__":
    main()
