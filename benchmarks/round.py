"""CPU seconds of a round of the demo, next to an earlier version: `python -m benchmarks.round --before REVISION`.

A round of 8 of the demo's prompts with its settings, by the library, in processes with one thread. The earlier version
is a revision of git, in the same environment. The versions run in turn, and the least time of `--runs` counts. What is
neither sampling nor fusing is nearly all training.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.earlier import ROOT, checkout_of

PARTS = ("sampling", "fusing", "rest", "round")
_ROUND = """
import json, time
import torch
from dfusion import MODELS, DiffusionModel, FusionConfig, Prompt, RoundConfig, SamplingConfig, TrainingConfig
from dfusion import attach_lora, load_scorer, rounds
from dfusion.shapes.prompts import prompt_list
from worker.allocator import keep_freed_memory

seconds = {}

def timed(name, call):
    def wrapper(*arguments, **settings):
        start = time.process_time()
        result = call(*arguments, **settings)
        seconds[name] = seconds.get(name, 0.0) + time.process_time() - start
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
rounds.sample = timed("sampling", rounds.sample)
rounds.fuse = timed("fusing", rounds.fuse)
timed("round", rounds.run_round)(model, prompts, scorer, config, seed=1)
seconds["rest"] = seconds["round"] - seconds["sampling"] - seconds["fusing"]
print(json.dumps(seconds))
"""


def seconds_of_round(checkout: Path) -> dict[str, float]:
    """CPU seconds of the parts of a round by the code of a checkout."""
    result = subprocess.run(
        [sys.executable, "-c", _ROUND], cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    seconds: dict[str, float] = json.loads(result.stdout)
    return seconds


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
                results.append(seconds_of_round(checkout))

    before, now = (min(results, key=lambda seconds: seconds["round"]) for results in runs)
    write(f"{'CPU seconds':14}{arguments.before:>12}{'now':>12}{'times':>8}\n")
    for part in PARTS:
        write(f"{part:14}{before[part]:12.2f}{now[part]:12.2f}{before[part] / now[part]:8.2f}\n")


if __name__ == "__main__":
    main()
