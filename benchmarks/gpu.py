"""Stable Diffusion in full size on a GPU, and the paper's run from it: `python -m benchmarks.gpu`.

SD 2.1-base and SDXL with random weights and an adapter attached, in bfloat16. For each it prints images, targets and
training rows a second, peak memory, and the share of the GPU's matrix rate, which is measured in the same run.
Training is measured with the default setting of gradient checkpointing, and with checkpointing, for whose memory there
is a goal. Operations that checkpointing repeats count for the share, which the output says. The paper's run in hours
is computed from the rates with the default setting: 40 rounds of 640 images, 320 targets, and two inner epochs over the
steps of 320 pairs. Scoring is not included.

An image is sampled with its item maps and decoded. A target is denoised after its reference and base were sampled; a
reference has two targets. A row is one step of one pair, both sides with guidance, in one inner epoch.

Needs a GPU with 24 GB for SD 2.1-base, and with 40 GB for SDXL. `--device cpu` runs the same code, but takes very long.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.measuring import (
    Cost,
    Goal,
    Output,
    Write,
    add_output_arguments,
    counted,
    finish,
    machine,
    matrix_rate,
    median_seconds,
    seconds_of,
    settled,
    table,
)
from benchmarks.nets import attach_random_lora, model_of
from dfusion.adapter import attach_lora, detach
from dfusion.config import SamplingConfig, TrainingConfig
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.sampling import sample
from dfusion.training import Trainer
from dfusion.training_data import TrainingPair
from dfusion.types import Trajectory

PROMPT = "a red circle"
ITEMS = ((1,), (2,))
PAPER_MODEL = "sd-2.1-base"
ROUNDS = 40
IMAGES = 640
"""Of the paper's run: rounds, and images of a round (table 3)."""

SHARE_GOAL = 0.45
HOURS_GOAL = 4.0
TRAINING_GB_GOAL = 10.0


@dataclass(frozen=True)
class Speed:
    """Cost and peak memory of producing some images, targets or training rows. peak_bytes is 0 on a CPU."""

    count: int
    cost: Cost
    peak_bytes: int

    @property
    def rate(self) -> float:
        """A second."""
        return self.count / self.cost.seconds

    def figures(self) -> dict[str, float]:
        """For JSON."""
        return {"count": self.count, "per_second": self.rate, "peak_bytes": self.peak_bytes} | self.cost.figures()


@dataclass(frozen=True)
class Layout:
    """The speeds of one model.

    rows          training with the default setting of checkpointing
    frugal_rows   training with checkpointing
    """

    name: str
    steps: int
    images: Speed
    targets: Speed
    rows: Speed
    frugal_rows: Speed

    @property
    def hours(self) -> float:
        return paper_hours(self.images.rate, self.targets.rate, self.rows.rate, self.steps)

    def goals(self) -> list[Goal]:
        """The share is a goal for every model, hours and memory for the paper's, on one H200."""
        least_share = min(speed.cost.share for speed in (self.images, self.targets, self.rows))
        goals = [Goal(f"{self.name}: least share of the matrix rate", least_share, SHARE_GOAL)]
        if self.name != PAPER_MODEL:
            return goals
        return [
            *goals,
            Goal(f"{self.name}: the paper's run, hours", self.hours, HOURS_GOAL, at_least=False),
            Goal(
                f"{self.name}: training with checkpointing, GB",
                self.frugal_rows.peak_bytes / 1e9,
                TRAINING_GB_GOAL,
                at_least=False,
            ),
        ]

    def text(self) -> str:
        rows = []
        named = {
            "images": self.images,
            "targets": self.targets,
            "training rows": self.rows,
            "training rows, checkpointing": self.frugal_rows,
        }
        for name, speed in named.items():
            cost = speed.cost
            cells = (f"{speed.rate:.3g}", f"{speed.count / cost.floor_seconds:.3g}", f"{cost.share:.0%}")
            rows.append((name, *cells, f"{speed.peak_bytes / 1e9:.1f}"))
        columns = (self.name, "a second", "at the matrix rate", "share", "peak GB")
        note = "operations that checkpointing repeats count for the share\n"
        return table(columns, rows) + note + f"the paper's run: {self.hours:.1f} hours\n"

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        speeds = {"images": self.images, "targets": self.targets, "rows": self.rows, "frugal_rows": self.frugal_rows}
        figures: dict[str, Any] = {"name": self.name, "steps": self.steps, "paper_hours": self.hours}
        return figures | {name: speed.figures() for name, speed in speeds.items()}


@dataclass(frozen=True)
class Sizes:
    """images: in one batch. pairs: fused in one batch, and trained. micro_batch: of training."""

    steps: int = 20
    images: int = 16
    pairs: int = 8
    micro_batch: int = 8
    runs: int = 3


def paper_hours(images: float, targets: float, rows: float, steps: int = 20) -> float:
    """Hours of the paper's run at these rates a second. All steps of all pairs are trained, which is an upper bound."""
    pairs = IMAGES // 2
    trained_rows = pairs * steps * TrainingConfig().inner_epochs
    return ROUNDS * (IMAGES / images + pairs / targets + trained_rows / rows) / 3600


class _Work:
    """The three kinds of work on one model."""

    def __init__(self, model: DiffusionModel, sizes: Sizes) -> None:
        self.model = model
        self.sizes = sizes
        self._config = SamplingConfig(num_steps=sizes.steps)
        self._negative = model.encode_prompts([""])
        self.samples: Trajectory | None = None

    def images(self) -> None:
        """Sample images with their item maps, and decode them."""
        count = self.sizes.images
        model = self.model
        self.samples = sample(
            model.unet,
            model.scheduler,
            model.encode_prompts([PROMPT] * count),
            self._negative,
            list(range(count)),
            items=[ITEMS] * count,
            config=self._config,
        )
        model.decode(self.samples.final)

    def targets(self) -> None:
        """Fuse targets: the first samples are references, each used twice, and the last ones bases."""
        assert self.samples is not None
        model = self.model
        pairs = self.sizes.pairs
        fuse(
            model.unet,
            model.scheduler,
            self.samples.select(range(self.sizes.images - pairs, self.sizes.images)),
            self.samples.select([pair // 2 for pair in range(pairs)]),
            model.encode_prompts([PROMPT] * pairs),
            self._negative,
            thresholds=[(1 / model.tokenizer.model_max_length,) * len(ITEMS)] * pairs,
        )

    def rows(self) -> None:
        """Train with the default setting of checkpointing."""
        self._train(None)

    def frugal_rows(self) -> None:
        """Train with checkpointing."""
        self._train(True)

    def _train(self, gradient_checkpointing: bool | None) -> None:
        """Train a new adapter on pairs of the samples."""
        assert self.samples is not None
        config = TrainingConfig(
            examples_per_update=self.sizes.pairs,
            micro_batch=self.sizes.micro_batch,
            gradient_checkpointing=gradient_checkpointing,
            log_gradient_norms=False,
            ratio_tolerance=1.0,
        )
        pairs = [
            TrainingPair(self.samples.select([2 * i]), self.samples.select([2 * i + 1]), PROMPT, on_policy=False)
            for i in range(self.sizes.pairs)
        ]
        attach_lora(self.model.unet, seed=1)
        trainer = Trainer(self.model, pairs, config, seed=1)
        while trainer.updates_done < trainer.updates_total:
            trainer.step()


def measure(model: DiffusionModel, name: str, sizes: Sizes) -> Layout:
    """Measure images, targets and training rows on a model, with an adapter attached."""
    device = model.unet.device
    work = _Work(model, sizes)
    rows = sizes.pairs * sizes.steps * TrainingConfig().inner_epochs
    counts = {"images": sizes.images, "targets": sizes.pairs, "rows": rows, "frugal_rows": rows}
    rate = matrix_rate(device, model.unet.dtype)

    speeds: dict[str, Speed] = {}
    for kind, count in counts.items():
        if not kind.endswith("rows"):  # training attaches its own
            attach_random_lora(model.unet)
        speeds[kind] = _speed(getattr(work, kind), model, count, sizes.runs, rate)
    detach(model.unet)
    return Layout(name, sizes.steps, **speeds)


def _speed(call: Callable[[], None], model: DiffusionModel, count: int, runs: int, rate: float) -> Speed:
    """Count the operations of a call, which also warms up, and measure further calls."""
    device = model.unet.device
    with counted(model.unet) as work:
        call()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds([{"call": partial(seconds_of, call, settled(device))}] * runs)["call"]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Speed(count, Cost(seconds, work, rate), peak)


def main(write: Write = sys.stdout.write) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=("sd-2.1-base", "sdxl"), default=["sd-2.1-base", "sdxl"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add_output_arguments(parser)
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("expected a GPU that torch can use, got none")
    if arguments.images < 2 * arguments.pairs:
        raise SystemExit(f"--images: expected at least two for each of {arguments.pairs} pairs, got {arguments.images}")
    sizes = Sizes(**{name: getattr(arguments, name) for name in asdict(Sizes())})

    output = Output(write)
    described = machine(arguments.device)
    output(f"{described['gpu'] or described['cpu']}, torch {described['torch']}, {arguments.dtype}, {sizes}\n")
    layouts: list[Layout] = []
    goals: list[Goal] = []
    for name in arguments.layouts:
        layout = measure(model_of(name, arguments.device, arguments.dtype), name, sizes)
        layouts.append(layout)
        goals += layout.goals()
        output(layout.text())
    finish(arguments, {"layouts": [layout.figures() for layout in layouts]}, goals, output, section="gpu")


if __name__ == "__main__":
    main()
