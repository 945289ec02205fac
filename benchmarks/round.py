"""CPU seconds of a round of the demo, next to an earlier version: `python -m benchmarks.round --before REVISION`.

A round of 8 of the demo's prompts with its settings, by the library, in processes with one thread. The earlier version
is a revision of git, in the same environment. The versions run in turn, and the least time of `--runs` counts. What is
neither sampling nor fusing is nearly all training.

The floor is the time of the present version's matrix products, convolutions and attention at the rate of a large matrix
product.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.earlier import ROOT, checkout_of
from benchmarks.measuring import matrix_rate

PARTS = ("sampling", "fusing", "rest", "round")
_ROUND = """
import json, sys, time
import torch
from dfusion import MODELS, DiffusionModel, FusionConfig, Prompt, RoundConfig, SamplingConfig, TrainingConfig
from dfusion import attach_lora, load_scorer, rounds
from dfusion.shapes.prompts import prompt_list
from worker.allocator import keep_freed_memory

figures = {}

def seconds_of(call):
    start = time.process_time()
    result = call()
    return result, time.process_time() - start

def operations_of(call):
    from benchmarks.measuring import counted
    with counted(model.unet) as work:
        result = call()
    return result, work.operations

figure_of = {"seconds": seconds_of, "operations": operations_of}[sys.argv[1]]

def measured(name, call):
    def wrapper(*arguments, **settings):
        result, figure = figure_of(lambda: call(*arguments, **settings))
        figures[name] = figures.get(name, 0.0) + figure
        return result
    return wrapper

torch.set_num_threads(1)
keep_freed_memory()
model = DiffusionModel.load(MODELS["shapes"].folder)
scorer = load_scorer("shapes-clip")
prompts = [Prompt(text=p.text, items=p.items, thresholds=p.thresholds) for p in prompt_list("attribute", "train")[:8]]
config = RoundConfig(
    samples_per_prompt=4,
    sampling=SamplingConfig(num_steps=10),
    fusion=FusionConfig(first_step=3),
    training=TrainingConfig(
        learning_rate=7e-4, beta=50, inner_epochs=8, timestep_fraction=0.12, micro_batch=16, log_gradient_norms=False
    ),
)
attach_lora(model.unet, config.training.lora)
rounds.sample = measured("sampling", rounds.sample)
rounds.fuse = measured("fusing", rounds.fuse)
measured("round", rounds.run_round)(model, prompts, scorer, config, seed=1)
figures["rest"] = figures["round"] - figures["sampling"] - figures["fusing"]
print(json.dumps(figures))
"""


def figures_of_round(checkout: Path, unit: str) -> dict[str, float]:
    """CPU "seconds" or "operations" of the parts of a round by the code of a checkout."""
    command = [sys.executable, "-c", _ROUND, unit]
    result = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    figures: dict[str, float] = json.loads(result.stdout)
    return figures


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="REVISION", required=True, help="revision of git to compare with")
    parser.add_argument("--runs", type=int, default=2)
    arguments = parser.parse_args()

    with ExitStack() as stack:
        checkouts = (stack.enter_context(checkout_of(arguments.before)), ROOT)
        runs: list[list[dict[str, float]]] = [[], []]
        for _ in range(arguments.runs):
            for results, checkout in zip(runs, checkouts, strict=True):
                results.append(figures_of_round(checkout, "seconds"))
    operations = figures_of_round(ROOT, "operations")
    torch.set_num_threads(1)
    rate = matrix_rate(torch.device("cpu"), torch.float32)

    before, now = (min(results, key=lambda seconds: seconds["round"]) for results in runs)
    write(f"{'CPU seconds':14}{arguments.before:>12}{'now':>12}{'times':>8}{'floor':>12}\n")
    for part in PARTS:
        floor = operations[part] / rate
        write(f"{part:14}{before[part]:12.2f}{now[part]:12.2f}{before[part] / now[part]:8.2f}{floor:12.2f}\n")


if __name__ == "__main__":
    main()
