"""Commands that submit jobs: rounds, samplings, fusions, trainings and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from api.cli.bodies import build_body
from api.cli.jobs import follow_to_end, job_sheet
from api.cli.options import DryRun, Follow, Key, Label, Priority, Prompts, Seed, Sets, Spec, prompt_bodies
from api.cli.screens import clock, listing, sheet, size, warning_lines
from api.cli.session import Session
from dfusion.algorithms import ALGORITHMS
from dfusion.rewards.signs import SIGNS
from service.states import JobKind

if TYPE_CHECKING:
    from api.wire.estimates import EstimateOut

rounds = typer.Typer(no_args_is_help=True, help="Online training: sample, pair, fuse, verify, train, evaluate.")
SamplesPerPrompt = Annotated[int | None, typer.Option(help="Samples per prompt")]
Model = Annotated[str | None, typer.Option(help="Base model, alias, or id of a model to continue from")]
PromptSet = Annotated[str | None, typer.Option(help="Name or id of a prompt set")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps T")]
Algorithm = Annotated[
    str | None,
    typer.Option(help="Training algorithm", metavar=f"<{'|'.join(ALGORITHMS)}>"),
]


@rounds.command("start")
def start(
    ctx: typer.Context,
    prompt_set: PromptSet = None,
    prompt: Prompts = None,
    model: Model = None,
    held_out: Annotated[str | None, typer.Option(help="Prompt set for evaluation only")] = None,
    rounds: Annotated[int | None, typer.Option(help="Number of rounds")] = None,
    samples_per_prompt: SamplesPerPrompt = None,
    steps: Steps = None,
    algorithm: Algorithm = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW learning rate")] = None,
    preset: Annotated[
        Literal["paper", "released_code"] | None,
        typer.Option(help="Which values to use where the paper and its code differ"),
    ] = None,
    naive: Annotated[bool, typer.Option("--naive", help="Train without fused targets")] = False,
    reward: Annotated[str | None, typer.Option(help="Scorer used as the reward")] = None,
    stop_when: Annotated[
        list[str] | None,
        typer.Option(
            help="Warning sign after which the job ends before its last round; can be repeated",
            metavar=f"<{'|'.join(SIGNS)}>",
        ),
    ] = None,
    review: Annotated[
        Literal["none", "sample", "required"] | None,
        typer.Option(help="Pairs of each round that must have a verdict before the training"),
    ] = None,
    review_pairs: Annotated[int | None, typer.Option(help="Pairs to review per round, for --review sample")] = None,
    seed: Seed = None,
    label: Label = None,
    priority: Priority = None,
    spec: Spec = None,
    settings: Sets = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    key: Key = None,
) -> None:
    """Train a model online on visually consistent pairs of its samples.

    Settings that are not given have the paper's values. --set sets any setting; /docs of the service lists them.

    Examples:
      dfusion round start --prompt-set shapes-attribute-train \\
          --held-out shapes-attribute-test --rounds 3 --follow
      dfusion round start --prompt "a \\[cat] eating a \\[sandwich]" --algorithm ddpo
      dfusion round start --spec round.json --set training.beta=0.5 --dry-run
    """
    options: dict[str, Any] = {
        "prompt_set": prompt_set,
        "prompts": prompt_bodies(prompt),
        "model": model,
        "held_out_prompt_set": held_out,
        "rounds": rounds,
        "samples_per_prompt": samples_per_prompt,
        "sampling.num_steps": steps,
        "training.algorithm": algorithm,
        "training.learning_rate": learning_rate,
        "preset": preset,
        "reward": reward,
        "stop_when": stop_when or None,
        "review": review,
        "review_pairs": review_pairs,
        "seed": seed,
        "label": label,
        "priority": priority,
    }

    body = build_body(spec, options, settings or [])
    if naive:
        body["fusion"] = None
    _submit(ctx.obj, JobKind.ROUND, body, follow, dry_run, key)


@rounds.command("extend")
def extend(
    ctx: typer.Context,
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="A round job that has succeeded")],
    rounds: Annotated[int, typer.Option(help="Total number of rounds, including those already run")],
    to_the_end: Annotated[
        bool, typer.Option("--to-the-end", help="Do not stop early, whatever the job's stop_when says")
    ] = False,
    follow: Follow = False,
) -> None:
    """Raise the number of rounds of a job. It continues with the round after its last one.

    Examples:
      dfusion round extend job_… --rounds 20 --follow
      dfusion round extend job_… --rounds 20 --to-the-end
    """
    session: Session = ctx.obj
    with session.client() as client:
        job = client.raise_rounds(job_id, rounds, () if to_the_end else None)
        if follow:
            follow_to_end(session, client, job.id)
        else:
            session.show(job, lambda: job_sheet(job))


def sample(
    ctx: typer.Context,
    prompt_set: PromptSet = None,
    prompt: Prompts = None,
    model: Model = None,
    samples_per_prompt: SamplesPerPrompt = None,
    steps: Steps = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance")] = None,
    seed: Seed = None,
    label: Label = None,
    priority: Priority = None,
    spec: Spec = None,
    settings: Sets = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    key: Key = None,
) -> None:
    """Sample a model. The service keeps trajectories and item maps, so that samples can be fused later.

    Examples:
      dfusion sample --prompt "a red and striped \\[circle]" --follow
      dfusion sample --prompt-set shapes-position-test --model mdl_… --seed 1
    """
    options = {
        "prompt_set": prompt_set,
        "prompts": prompt_bodies(prompt),
        "model": model,
        "samples_per_prompt": samples_per_prompt,
        "sampling.num_steps": steps,
        "sampling.guidance_scale": guidance_scale,
        "seed": seed,
        "label": label,
        "priority": priority,
    }
    _submit(ctx.obj, JobKind.SAMPLING, build_body(spec, options, settings or []), follow, dry_run, key)


def fuse(
    ctx: typer.Context,
    sampling: Annotated[
        str | None, typer.Option(metavar="JOB", help="Job whose samples are paired by their scores")
    ] = None,
    pair: Annotated[str | None, typer.Option(metavar="PAIR", help="Pair to fuse again")] = None,
    reference: Annotated[str | None, typer.Option(metavar="SAMPLE", help="The well-aligned sample")] = None,
    base: Annotated[str | None, typer.Option(metavar="SAMPLE", help="The sample whose noise the target uses")] = None,
    threshold: Annotated[
        list[float] | None, typer.Option(help="Mask threshold of an item; repeat for each item, in order")
    ] = None,
    first_step: Annotated[int | None, typer.Option(help="First fused step_index")] = None,
    last_step: Annotated[int | None, typer.Option(help="Last fused step_index")] = None,
    label: Label = None,
    priority: Priority = None,
    spec: Spec = None,
    settings: Sets = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    key: Key = None,
) -> None:
    """Fuse stored samples: denoise the base's noise with the reference's keys and values inside the mask.

    Examples:
      dfusion fuse --sampling job_… --follow
      dfusion fuse --reference smp_… --base smp_… --threshold 0.02
      dfusion fuse --pair pair_… --first-step 4 --set fusion.merge=or
    """
    if (reference is None) != (base is None):
        raise typer.BadParameter("expected both or neither", param_hint="--reference, --base")

    options = {
        "sampling": sampling,
        "pair": pair,
        "pairs": None if reference is None else [{"reference": reference, "base": base}],
        "thresholds": threshold or None,
        "fusion.first_step": first_step,
        "fusion.last_step": last_step,
        "label": label,
        "priority": priority,
    }
    _submit(ctx.obj, JobKind.FUSION, build_body(spec, options, settings or []), follow, dry_run, key)


def train(
    ctx: typer.Context,
    job: Annotated[
        list[str] | None, typer.Option(metavar="JOB", help="Train on all pairs of this job; can be repeated")
    ] = None,
    pair: Annotated[list[str] | None, typer.Option(metavar="PAIR", help="Train on this pair; can be repeated")] = None,
    model: Model = None,
    prefer: Annotated[
        Literal["adoption", "verdicts"] | None,
        typer.Option(help="How the better side is chosen: adoption (Eq. 7) or verdicts"),
    ] = None,
    algorithm: Algorithm = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW learning rate")] = None,
    seed: Seed = None,
    label: Label = None,
    priority: Priority = None,
    spec: Spec = None,
    settings: Sets = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    key: Key = None,
) -> None:
    """Train an adapter on stored pairs, by adoption or by reviewers' verdicts.

    Examples:
      dfusion train --job job_… --follow
      dfusion train --job job_… --prefer verdicts --set training.beta=0.5
    """
    options = {
        "jobs": job or None,
        "pairs": pair or None,
        "model": model,
        "prefer": prefer,
        "training.algorithm": algorithm,
        "training.learning_rate": learning_rate,
        "seed": seed,
        "label": label,
        "priority": priority,
    }
    _submit(ctx.obj, JobKind.TRAINING, build_body(spec, options, settings or []), follow, dry_run, key)


def evaluate(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Models; the others are compared with the first")
    ] = None,
    prompt_set: Annotated[list[str] | None, typer.Option(help="Name or id of a prompt set; can be repeated")] = None,
    prompt: Prompts = None,
    samples_per_prompt: SamplesPerPrompt = None,
    scorer: Annotated[list[str] | None, typer.Option(help="Scorer; can be repeated")] = None,
    steps: Steps = None,
    seed: Seed = None,
    label: Label = None,
    priority: Priority = None,
    spec: Spec = None,
    settings: Sets = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    key: Key = None,
) -> None:
    """Measure models on the same prompts and seeds, and compare them with the first one.

    Reports means with confidence intervals.

    Examples:
      dfusion evaluate shapes mdl_… --prompt-set shapes-attribute-test --follow
      dfusion evaluate shapes champion --prompt "a blue and dotted \\[star]"
    """
    options = {
        "models": models or None,
        "prompt_sets": prompt_set or None,
        "prompts": prompt_bodies(prompt),
        "samples_per_prompt": samples_per_prompt,
        "scorers": scorer or None,
        "sampling.num_steps": steps,
        "seed": seed,
        "label": label,
        "priority": priority,
    }
    _submit(ctx.obj, JobKind.EVALUATION, build_body(spec, options, settings or []), follow, dry_run, key)


COMMANDS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {"sample": sample, "fuse": fuse, "train": train, "evaluate": evaluate}
)
"""The commands that submit one job, by name."""


def _submit(
    session: Session, kind: JobKind, body: dict[str, Any], follow: bool, dry_run: bool, key: str | None
) -> None:
    with session.client() as client:
        if dry_run:
            estimate = client.estimate(kind, body)
            session.show(estimate, lambda: _estimate_sheet(estimate))
            return

        job = client.submit(kind, body, idempotency_key=key)
        if follow:
            follow_to_end(session, client, job.id)
        else:
            session.show(job, lambda: job_sheet(job))


def _estimate_sheet(estimate: EstimateOut) -> RenderableType:
    images = estimate.images
    unet = estimate.unet_evaluations
    if estimate.seconds is None:
        time = "unknown: no job of this kind has run here yet"
    else:
        time = f"{clock(estimate.seconds)} on one worker"

    costs = sheet(
        {
            "images": f"at most {images.total_at_most}: {images.sampled} sampled, {images.fused_at_most} fused, "
            f"{images.evaluated} evaluated",
            "U-Net": f"at most {unet.total_at_most} evaluations: {unet.sampling} sampling, {unet.fusion_at_most} "
            f"fusion, {unet.training_at_most} training, {unet.evaluation} evaluation",
            "time": time,
            "memory": "unknown" if estimate.memory_bytes is None else size(estimate.memory_bytes),
            "storage": "unknown" if estimate.storage_bytes is None else size(estimate.storage_bytes),
        }
    )
    if not estimate.prompts:
        return costs
    rows = [(prompt.text, ", ".join(prompt.items)) for prompt in estimate.prompts]
    return Group(costs, Text(), listing(("prompt", "items"), rows), *warning_lines(estimate.warnings))
