"""How a job's time and a worker's memory grow: `python -m benchmarks.scaling [--short]`.

It runs rounds of the shapes model in deployed mode (PostgreSQL, Redis, S3) with workers of one thread each, on this
machine, and prints

1. the time of a job with twice the samples, twice the prompts and twice the rounds, divided by that of the first job,
2. the memory of a worker after each of ten rounds of one job,
3. the time of sampling and fusion with one worker divided by that with two. With 10 shards for two workers, at most the
   last shard leaves a worker idle,
4. the time of the first job divided by that of the same round by the library, in one process with one thread and the
   same batches: what the service adds to the model's work.

A job's time is the sum of its stages' times, so it has no waiting. For 3 it is the wall time from the first stage to
the last one. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dfusion import (
    MODELS,
    DiffusionModel,
    Prompt,
    RoundConfig,
    Trainer,
    TrainingPair,
    attach_lora,
    load_scorer,
    make_pairs,
)
from dfusion.rewards import Scorer
from dfusion.shapes.prompts import prompt_list
from service.db.tables import Stage
from service.states import StageKind
from tests.deployment import DEPLOYED, WORKERS, Deployment, deployment
from worker.workbench import set_up_torch_on

SAMPLED_AND_FUSED = (StageKind.SAMPLE, StageKind.SCORE, StageKind.SELECT, StageKind.FUSE, StageKind.VERIFY)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the first job, and the rounds of the memory's job."""

    prompts: int
    samples: int
    steps: int
    rounds_for_memory: int


FULL = Sizes(prompts=10, samples=4, steps=10, rounds_for_memory=10)
SHORT = Sizes(prompts=2, samples=4, steps=4, rounds_for_memory=2)


def busy_seconds(stages: Sequence[Stage]) -> float:
    """The sum of the stages' times."""
    return sum((stage.finished_at or 0) - (stage.started_at or 0) for stage in stages)


def wall_seconds(stages: Sequence[Stage]) -> float:
    """The time from the start of the first stage to the end of the last one."""
    return max(stage.finished_at or 0 for stage in stages) - min(stage.started_at or 0 for stage in stages)


def of_kinds(stages: Sequence[Stage], kinds: Sequence[StageKind]) -> list[Stage]:
    """The stages of these kinds."""
    return [stage for stage in stages if stage.kind in kinds]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="small sizes: shows that it runs, not how fast")
    sizes = SHORT if parser.parse_args().short else FULL

    settings: dict[str, Any] = {"torch_threads": 1, "shard_prompts": 1, "batch_size": 16}
    with (
        tempfile.TemporaryDirectory() as name,
        deployment(DEPLOYED, Path(name), Path(name), forks=False, has_workers=False, **settings) as deployed,
    ):
        deployed.run("sweeper", "-m", "worker.sweeper")
        deployed.start_worker(WORKERS[0])
        _run(deployed, _body(SHORT))  # the worker loads the model

        first = _measure_growth(deployed, sizes)
        _measure_memory(deployed, sizes)
        _measure_workers(deployed, sizes, first)
    _measure_overhead(sizes, busy_seconds(first))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _body(sizes: Sizes, **changes: Any) -> dict[str, Any]:
    prompts = []
    for prompt in prompt_list("attribute", "train")[: sizes.prompts]:
        prompts.append({"text": prompt.text, "items": prompt.items, "thresholds": prompt.thresholds})
    body = {
        "model": "shapes",
        "prompts": prompts,
        "reward": "shapes-clip",
        "rounds": 1,
        "samples_per_prompt": sizes.samples,
        "seed": 1,
        "sampling": {"num_steps": sizes.steps},
        "fusion": {"first_step": 1},
        "training": {"inner_epochs": 1, "micro_batch": 16, "log_gradient_norms": False},
        "evaluation": None,
    }
    return body | changes


def _run(deployed: Deployment, body: dict[str, Any]) -> list[Stage]:
    job = deployed.done("/rounds", body)
    return deployed.stages(str(job["id"]))


def _measure_growth(deployed: Deployment, sizes: Sizes) -> list[Stage]:
    """Print the growth of a job's time. Returns the stages of the first job."""
    first = _run(deployed, _body(sizes))
    seconds = busy_seconds(first)
    _say(f"one round of {sizes.prompts} prompts x {sizes.samples} samples: {seconds:.1f} s in {len(first)} stages")

    twice = Sizes(2 * sizes.prompts, sizes.samples, sizes.steps, sizes.rounds_for_memory)
    bodies = {
        "samples": _body(sizes, samples_per_prompt=2 * sizes.samples),
        "prompts": _body(twice),
        "rounds": _body(sizes, rounds=2),
    }
    for name, body in bodies.items():
        grown = busy_seconds(_run(deployed, body))
        _say(f"twice the {name}: {grown:.1f} s, {grown / seconds:.2f} times the first job (target: 1.8 to 2.2)")
    return first


def _measure_memory(deployed: Deployment, sizes: Sizes) -> None:
    """Print the memory of the worker's processes after each round."""
    job_id = deployed.post("/rounds", _body(SHORT, rounds=sizes.rounds_for_memory))
    megabytes: list[float] = []
    seen = 0
    while seen < sizes.rounds_for_memory:
        with deployed.client() as client:
            job = client.get(f"/jobs/{job_id}", params={"wait": 1}).json()
        if job["state"] in ("failed", "cancelled"):
            raise RuntimeError(f"the job {job['state']}: {job['error']}")
        trained = of_kinds(deployed.stages(job_id), [StageKind.TRAIN])
        done = sum(stage.finished_at is not None for stage in trained)
        if done > seen:
            seen = done
            megabytes.append(_megabytes(deployed))
    values = " ".join(f"{value:.0f}" for value in megabytes)
    growth = megabytes[-1] - megabytes[len(megabytes) // 2]
    _say(f"MB of a worker after each round: {values} (second half: {growth:+.0f} MB)")


def _megabytes(deployed: Deployment) -> float:
    """The unshared memory of a worker and its child processes."""
    worker = psutil.Process(deployed.process[WORKERS[0]].pid)
    family = [worker, *worker.children(recursive=True)]
    return sum(float(process.memory_full_info().uss) for process in family) / 1e6


def _measure_workers(deployed: Deployment, sizes: Sizes, first: Sequence[Stage]) -> None:
    """Print how much faster two workers sample and fuse the first job."""
    one = wall_seconds(of_kinds(first, SAMPLED_AND_FUSED))
    deployed.start_worker(WORKERS[1])
    _run(deployed, _body(SHORT, rounds=2))  # it loads the model
    two = wall_seconds(of_kinds(_run(deployed, _body(sizes)), SAMPLED_AND_FUSED))
    _say(f"sampling and fusion: {one:.1f} s with one worker, {two:.1f} s with two: {one / two:.2f} times (target: 1.8)")


def _measure_overhead(sizes: Sizes, seconds: float) -> None:
    """Print how much longer the service took for the first job than the library."""
    set_up_torch_on("cpu", threads=1)
    model = DiffusionModel.load(MODELS["shapes"].folder)
    attach_lora(model.unet)
    scorer = load_scorer("shapes-clip")

    times = []
    for measured in (SHORT, sizes):  # the first one warms up
        body = _body(measured)
        settings = {name: body[name] for name in ("samples_per_prompt", "sampling", "fusion", "training")}
        prompts = [Prompt(**prompt) for prompt in body["prompts"]]
        started = time.perf_counter()
        _run_by_library(model, prompts, scorer, RoundConfig(**settings), batch_size=measured.samples)
        times.append(time.perf_counter() - started)
    overhead = seconds / times[-1] - 1
    _say(
        f"the first job by the library: {times[-1]:.1f} s; the service adds {100 * overhead:.1f} % (target: below 5 %)"
    )


def _run_by_library(
    model: DiffusionModel, prompts: Sequence[Prompt], scorer: Scorer, config: RoundConfig, batch_size: int
) -> None:
    """A round whose batches have one prompt each, like the stages of the service here."""
    examples = []
    for pairs in make_pairs(model, prompts, scorer, config, seed=1, batch_size=batch_size):
        for pair in pairs:
            sides = (pair.better.trajectory, pair.base.trajectory)
            examples.append(TrainingPair(*sides, pair.prompt, on_policy=not pair.adopted))

    trainer = Trainer(model, examples, config.training, seed=1)
    while trainer.updates_done < trainer.updates_total:
        trainer.step()


if __name__ == "__main__":
    main()
