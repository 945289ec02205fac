"""The cost of a DPO update by micro-batch, in one run: `python -m benchmarks.training`.

Each line is the first update of a new adapter on the same rows. It shows seconds per row (both sides with guidance,
forward and backward), the GPU's peak memory, and two errors. The first is the gradient's difference from that of
micro-batch 1, which is plain accumulation. The second is the ratio's difference from 1 before the update
(`TrainingConfig.ratio_tolerance`). On a GPU: `--unet sd-2.1-base --device cuda --dtype float16`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.fusion import parser_of, set_up, setting, settled
from benchmarks.nets import random_model
from dfusion.adapter import attach_lora, lora_parameters
from dfusion.config import SamplingConfig, TrainingConfig
from dfusion.models import DiffusionModel
from dfusion.sampling import sample
from dfusion.training import Trainer
from dfusion.training_data import TrainingPair

PROMPT = "a red circle"
VARIANTS = ((1, False), (2, False), (4, False), (8, False), (1, True), (8, True))
"""Micro-batch, and whether gradient checkpointing is enabled."""


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
    gradients = [parameter.grad.flatten().cpu() for parameter in lora_parameters(model.unet).values()]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    off = max(abs(ratio - 1) for ratio in (trainer.self_test.ratio_by_step.values() if trainer.self_test else ()))
    return Update(seconds, peak, torch.cat(gradients), off, report.below_epsilon, trainer.gradient_scale)


def sampled_pairs(model: DiffusionModel, count: int, steps: int) -> list[TrainingPair]:
    """Pairs of samples of one prompt."""
    prompt = model.encode_prompts([PROMPT] * 2)
    negative = model.encode_prompts([""])
    config = SamplingConfig(num_steps=steps)

    pairs = []
    for i in range(count):
        both = sample(model.unet, model.scheduler, prompt, negative, [2 * i, 2 * i + 1], config=config)
        pairs.append(TrainingPair(both.select([0]), both.select([1]), PROMPT))
    return pairs


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=2)
    arguments = parser.parse_args()
    set_up(arguments)

    model = random_model(arguments.unet, arguments.device, getattr(torch, arguments.dtype))
    pairs = sampled_pairs(model, arguments.pairs, arguments.steps)
    rows = arguments.pairs * arguments.steps
    update(model, pairs[:1], 1, checkpointing=False)  # warm up

    write(f"{setting(arguments)}; an update of {rows} rows\n")
    write(f"{'micro-batch':24}{'s per row':>12}{'GiB at peak':>14}{'gradient off by':>18}{'ratio off by':>15}\n")
    plain: Update | None = None
    for micro_batch, checkpointing in VARIANTS:
        cost = update(model, pairs, micro_batch, checkpointing)
        plain = cost if plain is None else plain
        off = (cost.gradient - plain.gradient).norm() / plain.gradient.norm()
        name = f"{micro_batch}{', checkpointing' if checkpointing else ''}"
        write(f"{name:24}{cost.seconds / rows:12.3f}{cost.peak_bytes / 2**30:14.1f}{off:18.1e}{cost.off:15.1e}\n")

    epsilon = TrainingConfig().adam_epsilon
    unscaled = plain.below_epsilon_unscaled(epsilon)
    write(f"gradient elements below AdamW's epsilon, {epsilon:g}, at beta {TrainingConfig().beta:g}: {unscaled:.1%};")
    write(f" {plain.below_epsilon:.2%} at the scale that AdamW receives, {plain.scale:g}\n")


if __name__ == "__main__":
    main()
