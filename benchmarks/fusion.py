"""The released code's sampling and fusion against `dfusion`'s: `python -m benchmarks.fusion`.

A prompt has four samples. As in the released code, the best quarter are references, each used twice, and the worst half
are bases: two pairs of one reference. What is measured:

    released code  `benchmarks.plain_fusion`: samples all images in one batch, then fuses both pairs in one batch with
                   three U-Net calls a step (references, bases, targets), with explicit attention matrices for all heads
    dfusion        `sample` with the references' item maps, then `fuse`
    stock          diffusers' StableDiffusionPipeline, which samples the same images and records nothing

All run in one process with the same threads and memory settings, in turn, and the median of the runs counts. The U-Net
is in channels last for dfusion, which loads models so, and in torch's default format for the others. This is done
without and with an adapter attached. On a CPU the process keeps freed memory, as a worker does. Otherwise the
explicit matrices would be page-faulted again.

All steps of a way cost the same, except that `fuse` copies the first ones. So operations and evaluations are counted in
a warm-up of a few steps and multiplied. With `--short`, seconds are, too. The floor is the time of the operations at
the rate of a large matrix product, which is measured in the same run. On a GPU: `--unet sd-2.1-base --device cuda
--dtype float16`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.measuring import (
    COST_COLUMNS,
    Cost,
    Goal,
    Output,
    Work,
    Write,
    cost_cells,
    counted,
    finish,
    matrix_rate,
    median_seconds,
    parser_of,
    seconds_of,
    set_up,
    setting,
    settled,
    table,
)
from benchmarks.nets import attach_random_lora, model_of, stock_pipeline
from benchmarks.plain_fusion import plain_fuse, plain_sample
from dfusion._diffusers import DDIMScheduler
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

WAYS = ("released_sampling", "sampling", "stock", "released_fusing", "fusing")
"""The methods of `Round`, in the order in which they run."""
OWN_WAYS = ("sampling", "fusing")
FUSION_GOAL = 3.5
TOTAL_GOAL = 2.7
STOCK_GOAL = 1.05
DIFFERENCE_GOAL = 1e-5
"""The largest relative difference of float32 latents. Half precision has none."""
_COUNTED_STEPS = 3
SHORT_STEPS = 5
"""Steps of the warm-up in which operations are counted, and of short runs. `fuse` copies the first two."""


def steps_of(way: str, steps: int) -> int:
    """In how many of these steps a way calls the U-Net."""
    return len(FusionConfig().steps(steps)) if way == "fusing" else steps


class Round:
    """The sampling and fusion of one prompt, by each way, on the same model and seeds."""

    def __init__(self, model: DiffusionModel, steps: int) -> None:
        self.model = model
        self.steps = steps
        # a random net spreads its attention evenly over the tokens: about half of the pixels are above their share
        self._thresholds = (1 / model.tokenizer.model_max_length,) * len(ITEMS)
        self._size = model.latent_shape[1:]
        self._pipeline = stock_pipeline(
            vae=model.vae,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=model.unet,
            scheduler=DDIMScheduler.from_config(model.scheduler.config),
        )
        self._pipeline.set_progress_bar_config(disable=True)

        self.results: dict[str, Any] = {}
        """What each way computed last."""

    def run(self, way: str) -> None:
        """Run one way and keep its result."""
        self.results[way] = getattr(self, way)()

    def ways(self, wait: Callable[[], None]) -> dict[str, Callable[[], float]]:
        """For each way, a function that runs it and returns its seconds per step."""

        def timed(way: str) -> float:
            self.model.unet.to(memory_format=torch.channels_last if way in OWN_WAYS else torch.contiguous_format)
            return seconds_of(partial(self.run, way), wait) / steps_of(way, self.steps)

        return {way: partial(timed, way) for way in WAYS}

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

    def fusing(self) -> torch.Tensor:
        """The clean latents of the two targets of the last `sampling`."""
        model = self.model
        samples: Trajectory = self.results["sampling"]
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


def compare(model: DiffusionModel, steps: int, runs: int, adapter: bool, short: bool = False) -> Compared:
    """Measure each way, with a random adapter attached or without any. Short runs have fewer steps than `steps`."""
    if adapter:
        attach_random_lora(model.unet)
    prompt_round = Round(model, min(steps, SHORT_STEPS) if short else steps)

    work = counted_work(Round(model, _COUNTED_STEPS))  # also warms up
    rate = matrix_rate(model.unet.device, model.unet.dtype)
    wait = settled(model.unet.device)
    seconds = median_seconds([prompt_round.ways(wait)] * runs)
    detach(model.unet)

    # the costs of all steps
    costs: dict[str, Cost] = {}
    for name in WAYS:
        count = steps_of(name, steps)
        costs[name] = Cost(seconds[name] * count, work[name].times(count), rate)
    results = prompt_round.results
    difference = relative_difference(results["fusing"], results["released_fusing"])
    stock_difference = relative_difference(results["sampling"].final, results["stock"])
    return Compared(adapter, difference=difference, stock_difference=stock_difference, **costs)


def counted_work(prompt_round: Round) -> dict[str, Work]:
    """What each way computes in a step."""
    work: dict[str, Work] = {}
    for name in WAYS:
        with counted(prompt_round.model.unet) as work_of_way:
            prompt_round.run(name)
        work[name] = work_of_way.times(1 / steps_of(name, prompt_round.steps))
    return work


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def measure(arguments: argparse.Namespace) -> Iterator[Compared]:
    """All ways, without and with an adapter attached, as the arguments say."""
    model = model_of(arguments.unet, arguments.device, arguments.dtype)
    for adapter in {"both": (False, True), "with": (True,), "without": (False,)}[arguments.adapter]:
        yield compare(model, arguments.steps, arguments.runs, adapter, arguments.short)


def heading(arguments: argparse.Namespace) -> str:
    """The line above the tables."""
    short = f" of {SHORT_STEPS} steps, multiplied" if arguments.short else ""
    return f"{setting(arguments)}; {arguments.steps} steps, medians of {arguments.runs} runs{short}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--short", action="store_true", help="runs of a few steps, multiplied")
    parser.add_argument("--adapter", choices=("both", "with", "without"), default="both")


def report(results: Iterable[Compared], float32: bool, write: Write) -> tuple[dict[str, Any], list[Goal]]:
    """Write the tables. Returns the figures for JSON, and the goals."""
    figures: list[dict[str, Any]] = []
    goals: list[Goal] = []
    for result in results:
        write(result.text())
        figures.append(result.figures())
        goals += result.goals(float32)
    return {"fusion": figures}, goals


def main(write: Write = sys.stdout.write) -> None:
    """Command line."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    set_up(arguments)
    output = Output(write)

    output(heading(arguments))
    figures, goals = report(measure(arguments), arguments.dtype == "float32", output)
    finish(arguments, figures, goals, output)


if __name__ == "__main__":
    main()
