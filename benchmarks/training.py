"""Rows a second of DPO training against plain training, in one run: `python -m benchmarks.training`.

Plain training (`benchmarks.plain_training`, as D3PO does) has batch 1 and evaluates the reference policy again for each
row of each inner epoch. `dfusion.Trainer` has micro-batches and keeps the reference policy's log-probs. Both train the
same pairs with stock attention, in turn, and the median of the runs counts. A row is one step of one pair, both sides
with guidance, in one inner epoch.

With `--micro-batches`, a table shows the first update of a new adapter by micro-batch: seconds per row, the GPU's peak
memory, and two errors. The first is the gradient's difference from that of micro-batch 1, which is plain accumulation.
The second is the ratio's difference from 1 before the update (`TrainingConfig.ratio_tolerance`). On a GPU: `--unet
sd-2.1-base --device cuda --dtype float16`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.measuring import (
    COST_COLUMNS,
    Cost,
    Goal,
    Output,
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
from benchmarks.nets import model_of
from benchmarks.plain_training import add_gradients
from dfusion.adapter import attach_lora, detach, lora_parameters
from dfusion.config import SamplingConfig, TrainingConfig
from dfusion.models import DiffusionModel
from dfusion.sampling import sample
from dfusion.training import Trainer
from dfusion.training_data import TrainingPair

PROMPT = "a red circle"
VARIANTS = ((1, False), (2, False), (4, False), (8, False), (1, True), (8, True))
"""Micro-batch, and whether gradient checkpointing is enabled."""
RATE_GOAL = 3.0
DIFFERENCE_GOAL = 1e-3
"""The largest relative difference of float32 gradients; their elements are sums over all rows."""


@dataclass(frozen=True)
class Compared:
    """The costs of plain training and of `dfusion.Trainer`, for this number of rows each.

    difference  relative difference of the first update's gradients
    """

    name: str
    plain: Cost
    plain_rows: int
    trained: Cost
    trained_rows: int
    difference: float

    @property
    def plain_rate(self) -> float:
        """Rows a second."""
        return self.plain_rows / self.plain.seconds

    @property
    def trained_rate(self) -> float:
        """Rows a second."""
        return self.trained_rows / self.trained.seconds

    @property
    def ratio(self) -> float:
        return self.trained_rate / self.plain_rate

    def goals(self, float32: bool) -> list[Goal]:
        goals = [Goal(f"training rows a second ({self.name}), times plain training", self.ratio, RATE_GOAL)]
        if float32:
            goals.append(Goal("difference of gradients", self.difference, DIFFERENCE_GOAL, at_least=False))
        return goals

    def text(self) -> str:
        rows = (
            ("plain: batch 1, reference not kept", self.plain, self.plain_rows, self.plain_rate),
            ("dfusion.Trainer", self.trained, self.trained_rows, self.trained_rate),
        )
        cells = [(name, str(count), f"{rate:.2f}", *cost_cells(cost)) for name, cost, count, rate in rows]
        text = table((f"training ({self.name})", "rows", "rows/s", *COST_COLUMNS), cells)
        return text + f"{self.ratio:.2f} times the rows; gradients differ by {self.difference:.1e} (relative)\n"

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "unet": self.name,
            "plain": self.plain.figures() | {"rows": self.plain_rows, "rows_per_second": self.plain_rate},
            "trained": self.trained.figures() | {"rows": self.trained_rows, "rows_per_second": self.trained_rate},
            "ratio": self.ratio,
            "difference": self.difference,
        }


def compare(model: DiffusionModel, name: str, pairs: Sequence[TrainingPair], micro_batch: int, runs: int) -> Compared:
    """Measure both ways on these pairs. Plain training does one inner epoch, since all cost the same."""
    unet = model.unet
    config = TrainingConfig(
        examples_per_update=len(pairs), micro_batch=micro_batch, log_gradient_norms=False, ratio_tolerance=1.0
    )
    prompt = model.encode_prompts([PROMPT]).embeds
    negative = model.encode_prompts([""]).embeds
    states = [(pair.preferred.latents[0], pair.rejected.latents[0]) for pair in pairs]
    rows = len(pairs) * (len(states[0][0]) - 1)
    gradients: dict[str, torch.Tensor] = {}

    def plain() -> None:
        optimizer = torch.optim.AdamW(lora_parameters(unet).values(), config.learning_rate)
        add_gradients(unet, reference, model.scheduler, states, prompt=prompt, negative=negative, beta=config.beta)
        gradients["plain"] = gradient_of(model)
        optimizer.step()

    def trained() -> None:
        trainer = Trainer(model, pairs, config, seed=1)
        trainer.step()
        gradients["trained"] = gradient_of(model)
        while trainer.updates_done < trainer.updates_total:
            trainer.step()

    def afresh(way: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            attach_lora(unet, seed=1)
            way()

        return call

    # 1. the policy before the update is a second network in plain training
    attach_lora(unet, seed=1)
    reference = copy.deepcopy(unet)

    # 2. operations; this also warms up
    ways = {"plain": afresh(plain), "trained": afresh(trained)}
    work = {}
    for way, call in ways.items():
        with counted(unet) as work[way], counted(reference) as of_reference:
            call()
        work[way].evaluations += of_reference.evaluations

    # 3. seconds
    rate = matrix_rate(unet.device, unet.dtype)
    wait = settled(unet.device)
    timed = {way: partial(seconds_of, call, wait) for way, call in ways.items()}
    seconds = median_seconds([timed] * runs)
    detach(unet)

    costs = {way: Cost(seconds[way], work[way], rate) for way in ways}
    off = (gradients["trained"] - gradients["plain"]).norm() / gradients["plain"].norm()
    return Compared(name, costs["plain"], rows, costs["trained"], rows * config.inner_epochs, float(off))


def gradient_of(model: DiffusionModel) -> torch.Tensor:
    """The adapter's gradient as one vector, on the CPU."""
    gradients = []
    for name, parameter in lora_parameters(model.unet).items():
        if parameter.grad is None:
            raise RuntimeError(f"{name} has no gradient")
        gradients.append(parameter.grad.flatten().cpu())
    return torch.cat(gradients)


@dataclass(frozen=True)
class Update:
    """The measurements of one update.

    seconds, peak_bytes  wall time; GPU memory, 0 on a CPU
    gradient             of the adapter, as one vector
    off                  the largest |p / p_old - 1| before the update
    below_epsilon        share of the gradient's non-zero elements below AdamW's epsilon, at the scale AdamW receives
    scale                the factor of the gradient before AdamW's step
    """

    seconds: float
    peak_bytes: int
    gradient: torch.Tensor
    off: float
    below_epsilon: float
    scale: float

    def below_epsilon_unscaled(self, epsilon: float) -> float:
        """The same share without scaling of the gradient."""
        sizes = self.gradient[self.gradient != 0].abs()
        return float((sizes < epsilon).float().mean())


def update(model: DiffusionModel, pairs: list[TrainingPair], micro_batch: int, checkpointing: bool) -> Update:
    """Measure the first update of a new adapter, with all rows of the pairs."""
    # 1. set up
    attach_lora(model.unet)
    config = TrainingConfig(
        examples_per_update=len(pairs),
        micro_batch=micro_batch,
        gradient_checkpointing=checkpointing,
        log_gradient_norms=False,
        ratio_tolerance=1.0,
    )
    trainer = Trainer(model, pairs, config, seed=1)
    trainer.prepare()
    device = model.unet.device
    wait = settled(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    # 2. the update
    wait()
    started = time.perf_counter()
    report = trainer.step()
    wait()
    seconds = time.perf_counter() - started

    # 3. the results
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    ratios = trainer.self_test.ratio_by_step.values() if trainer.self_test else ()
    off = max(abs(ratio - 1) for ratio in ratios)
    return Update(seconds, peak, gradient_of(model), off, report.below_epsilon, trainer.gradient_scale)


def sampled_pairs(model: DiffusionModel, count: int, steps: int) -> list[TrainingPair]:
    """Pairs of samples of one prompt. As for a fused target, the preferred side's recorded log-probs are not used."""
    prompt = model.encode_prompts([PROMPT] * 2)
    negative = model.encode_prompts([""])
    config = SamplingConfig(num_steps=steps)

    pairs = []
    for i in range(count):
        both = sample(model.unet, model.scheduler, prompt, negative, [2 * i, 2 * i + 1], config=config)
        pairs.append(TrainingPair(both.select([0]), both.select([1]), PROMPT, on_policy=False))
    return pairs


def measure(arguments: argparse.Namespace) -> Compared:
    """Both ways, for the U-Net, pairs and steps of the arguments."""
    model = model_of(arguments.unet, arguments.device, arguments.dtype)
    pairs = sampled_pairs(model, arguments.pairs, arguments.steps)
    return compare(model, arguments.unet, pairs, arguments.micro_batch, arguments.runs)


def report(result: Compared, float32: bool, write: Write) -> tuple[dict[str, Any], list[Goal]]:
    """Write the table. Returns the figures for JSON, and the goals."""
    write(result.text())
    return {"training": result.figures()}, result.goals(float32)


def write_micro_batches(arguments: argparse.Namespace, write: Write) -> None:
    """The table by micro-batch."""
    model = model_of(arguments.unet, arguments.device, arguments.dtype)
    pairs = sampled_pairs(model, arguments.pairs, arguments.steps)
    rows = arguments.pairs * arguments.steps
    update(model, pairs[:1], 1, checkpointing=False)  # warm up

    write(f"an update of {rows} rows\n")
    write(f"{'micro-batch':24}{'s per row':>12}{'GiB at peak':>14}{'gradient off by':>18}{'ratio off by':>15}\n")
    plain = update(model, pairs, *VARIANTS[0])
    for micro_batch, checkpointing in VARIANTS:
        is_plain = (micro_batch, checkpointing) == VARIANTS[0]
        cost = plain if is_plain else update(model, pairs, micro_batch, checkpointing)
        off = (cost.gradient - plain.gradient).norm() / plain.gradient.norm()
        name = f"{micro_batch}{', checkpointing' if checkpointing else ''}"
        write(f"{name:24}{cost.seconds / rows:12.3f}{cost.peak_bytes / 2**30:14.1f}{off:18.1e}{cost.off:15.1e}\n")

    epsilon = TrainingConfig().adam_epsilon
    unscaled = plain.below_epsilon_unscaled(epsilon)
    write(f"gradient elements below AdamW's epsilon, {epsilon:g}, at beta {TrainingConfig().beta:g}: {unscaled:.1%};")
    write(f" {plain.below_epsilon:.2%} at the scale that AdamW receives, {plain.scale:g}\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark, besides --unet and --steps."""
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=8)


def main(write: Write = sys.stdout.write) -> None:
    """Command line."""
    parser = parser_of(__doc__, unet="shapes")
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batches", action="store_true", help="also the table by micro-batch")
    arguments = parser.parse_args()
    set_up(arguments)
    output = Output(write)

    output(f"{setting(arguments)}; medians of {arguments.runs} runs\n")
    figures, goals = report(measure(arguments), arguments.dtype == "float32", output)
    if arguments.micro_batches:
        write_micro_batches(arguments, output)
    finish(arguments, figures, goals, output)


if __name__ == "__main__":
    main()
