"""Memory of a training from files and with all trajectories in memory: `python -m benchmarks.training_memory`.

Both trainings learn from the same random pairs, one step of each in one update. A trajectory has as many bytes as one
of Stable Diffusion at 20 steps, but of 80 steps of 4 x 32 x 32 latents, which a CPU evaluates faster. Each training
runs in its own process. Its peak memory (resident set) is printed above that of the same training on one pair.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.nets import random_model
from dfusion.adapter import attach_lora, lora_parameters
from dfusion.config import SamplingConfig, TrainingConfig
from dfusion.ddim import Schedule
from dfusion.models import DiffusionModel
from dfusion.spool import SpooledTrajectory, TrajectorySpool
from dfusion.training import Trainer
from dfusion.training_data import TrainingPair
from dfusion.types import Trajectory

STEPS = 80
SIZE = 32


@dataclass(frozen=True)
class Result:
    """The peak memory of a process, the seconds of its training, and the sum of the trained weights."""

    peak_bytes: int
    seconds: float
    weights: float


def measure(count: int, from_files: bool) -> Result:
    """Train on `count` random pairs in this process."""
    model = random_model("small", "cpu", torch.float32)
    model.unet.register_to_config(sample_size=SIZE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        trainer = _trainer(model, _pairs(model, count, TrajectorySpool(folder) if from_files else None), folder)
        trainer.step()
        seconds = time.perf_counter() - started

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
    weights = sum(float(value.detach().double().abs().sum()) for value in lora_parameters(model.unet).values())
    return Result(peak, seconds, weights)


def _trainer(model: DiffusionModel, pairs: list[TrainingPair], folder: Path) -> Trainer:
    attach_lora(model.unet)
    config = TrainingConfig(
        examples_per_update=len(pairs),
        micro_batch=1,
        inner_epochs=1,
        timestep_fraction=1 / STEPS,
        log_gradient_norms=False,
    )
    from_files = isinstance(pairs[0].preferred, SpooledTrajectory)
    return Trainer(model, pairs, config, seed=1, spool=folder if from_files else None)


def _pairs(model: DiffusionModel, count: int, spool: TrajectorySpool | None) -> list[TrainingPair]:
    """Pairs of random trajectories, which no policy sampled."""
    sampling = SamplingConfig(num_steps=STEPS)
    timesteps = Schedule.from_scheduler(model.scheduler, STEPS, sampling.eta).timesteps
    generator = torch.Generator().manual_seed(0)

    def side(seed: int) -> Trajectory | SpooledTrajectory:
        latents = torch.randn((1, STEPS + 1, 4, SIZE, SIZE), generator=generator)
        trajectory = Trajectory(latents, timesteps, torch.zeros(1, STEPS), (seed,), sampling)
        return trajectory if spool is None else spool.add(trajectory, 0)

    return [
        TrainingPair(side(2 * n), side(2 * n + 1), "a red circle", on_policy=False, rejected_on_policy=False)
        for n in range(count)
    ]


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    count = parser.parse_args().pairs

    pair_bytes = 2 * (STEPS + 1) * 4 * SIZE * SIZE * 4
    write(f"{count} pairs of {pair_bytes / 2**20:.1f} MiB\n{'trajectories':16}{'MiB at peak':>14}{'seconds':>10}\n")
    weights = []
    for name, from_files in (("in memory", False), ("in files", True)):
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            one, many = pool.starmap(measure, [(1, from_files), (count, from_files)], chunksize=1)
        above = many.peak_bytes - one.peak_bytes
        weights.append(many.weights)
        write(f"{name:16}{above / 2**20:14.0f}{many.seconds:10.1f}\n")
    write(f"same weights: {weights[0] == weights[1]}\n")


if __name__ == "__main__":
    main()
