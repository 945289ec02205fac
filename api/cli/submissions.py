"""Asking for work: rounds, samplings, fusions, trainings and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import typer
from rich.console import RenderableType

from api.cli.bodies import body_of
from api.cli.jobs import followed, job_sheet
from api.cli.options import DryRun, Follow, Key, Label, Prompts, Seed, Sets, Spec, texts
from api.cli.screens import clock, sheet, size
from api.cli.session import Session
from api.wire.estimates import EstimateOut
from dfusion.algorithms import ALGORITHMS
from service.states import JobKind

rounds = typer.Typer(no_args_is_help=True, help="Online training: sample, pair, fuse, verify, train, evaluate.")
Many = Annotated[int | None, typer.Option(help="Samples of each prompt")]
Model = Annotated[str | None, typer.Option(help="A base model, an alias, or the id of a model to go on from")]
PromptSet = Annotated[str | None, typer.Option(help="Name or id of a prompt set")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps T")]
Algorithm = Annotated[
    str | None,
    typer.Option(help="Loss: Eq. 6, Eq. 8 or Eq. 9", metavar=f"<{'|'.join(ALGORITHMS)}>"),
]


@rounds.command("start")
def start(
    ctx: typer.Context,
    prompt_set: PromptSet = None,
    prompt: Prompts = None,
    model: Model = None,
    held_out: Annotated[str | None, typer.Option(help="Prompt set that is measured, never trained on")] = None,
    rounds: Annotated[int | None, typer.Option(help="How many rounds")] = None,
    samples_per_prompt: Many = None,
    steps: Steps = None,
    algorithm: Algorithm = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's")] = None,
    preset: Annotated[
        Literal["paper", "released_code"] | None, typer.Option(help="Where the paper and its code differ: which")
    ] = None,
    naive: Annotated[bool, typer.Option("--naive", help="Without fused targets")] = False,
    reward: Annotated[str | None, typer.Option(help="Scorer that is trained against")] = None,
    review: Annotated[bool, typer.Option("--review", help="Wait for people's verdicts before each training")] = False,
    seed: Seed = None,
    label: Label = None,
    spec: Spec = None,
    settings: Sets = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    key: Key = None,
) -> None:
    """Train a model online on visually consistent pairs of its own samples.

    What is not said has the paper's value. Any setting can be given with --set; /docs of the service lists them.

    Examples:
      dfusion round start --prompt-set shapes-attribute-train \\
          --held-out shapes-attribute-test --rounds 3 --follow
      dfusion round start --prompt "a \\[cat] eating a \\[sandwich]" --algorithm ddpo
      dfusion round start --spec round.json --set training.beta=0.5 --dry-run
    """
    options: dict[str, Any] = {
        "prompt_set": prompt_set,
        "prompts": texts(prompt),
        "model": model,
        "held_out_prompt_set": held_out,
        "rounds": rounds,
        "samples_per_prompt": samples_per_prompt,
        "sampling.num_steps": steps,
        "training.algorithm": algorithm,
        "training.learning_rate": learning_rate,
        "preset": preset,
        "reward": reward,
        "review": review or None,
        "seed": seed,
        "label": label,
    }
    body = body_of(spec, options, settings or [])
    if naive:
        body["fusion"] = None
    _ask(ctx.obj, JobKind.ROUND, body, follow, dry_run, key)


def sample(
    ctx: typer.Context,
    prompt_set: PromptSet = None,
    prompt: Prompts = None,
    model: Model = None,
    samples_per_prompt: Many = None,
    steps: Steps = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance")] = None,
    seed: Seed = None,
    label: Label = None,
    spec: Spec = None,
    settings: Sets = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    key: Key = None,
) -> None:
    """Sample a model; trajectories and item maps are kept, so that samples can be fused later.

    Examples:
      dfusion sample --prompt "a red and striped \\[circle]" --follow
      dfusion sample --prompt-set shapes-position-test --model mdl_… --seed 1
    """
    options = {
        "prompt_set": prompt_set,
        "prompts": texts(prompt),
        "model": model,
        "samples_per_prompt": samples_per_prompt,
        "sampling.num_steps": steps,
        "sampling.guidance_scale": guidance_scale,
        "seed": seed,
        "label": label,
    }
    _ask(ctx.obj, JobKind.SAMPLING, body_of(spec, options, settings or []), follow, dry_run, key)


def fuse(
    ctx: typer.Context,
    sampling: Annotated[
        str | None, typer.Option(metavar="JOB", help="A job whose samples are paired by their scores")
    ] = None,
    pair: Annotated[str | None, typer.Option(metavar="PAIR", help="A pair to be fused again")] = None,
    reference: Annotated[str | None, typer.Option(metavar="SAMPLE", help="The well aligned sample")] = None,
    base: Annotated[str | None, typer.Option(metavar="SAMPLE", help="The sample whose noise the target takes")] = None,
    threshold: Annotated[
        list[float] | None, typer.Option(help="Of an item's mask; once an item, in their order")
    ] = None,
    first_step: Annotated[int | None, typer.Option(help="First fused step_index")] = None,
    last_step: Annotated[int | None, typer.Option(help="Last fused step_index")] = None,
    label: Label = None,
    spec: Spec = None,
    settings: Sets = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    key: Key = None,
) -> None:
    """Fuse stored samples: a base's noise, denoised with a reference's keys and values inside the mask.

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
    }
    _ask(ctx.obj, JobKind.FUSION, body_of(spec, options, settings or []), follow, dry_run, key)


def train(
    ctx: typer.Context,
    job: Annotated[list[str] | None, typer.Option(metavar="JOB", help="All pairs of this job; may be repeated")] = None,
    pair: Annotated[list[str] | None, typer.Option(metavar="PAIR", help="This pair; may be repeated")] = None,
    model: Model = None,
    prefer: Annotated[
        Literal["adoption", "verdicts"] | None, typer.Option(help="Which side is better: by Eq. 7, or as people said")
    ] = None,
    algorithm: Algorithm = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's")] = None,
    seed: Seed = None,
    label: Label = None,
    spec: Spec = None,
    settings: Sets = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    key: Key = None,
) -> None:
    """Train an adapter on stored pairs, also on those that people judged.

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
    }
    _ask(ctx.obj, JobKind.TRAINING, body_of(spec, options, settings or []), follow, dry_run, key)


def evaluate(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="The first is what the others are held to")
    ] = None,
    prompt_set: Annotated[list[str] | None, typer.Option(help="Name or id of a prompt set; may be repeated")] = None,
    prompt: Prompts = None,
    samples_per_prompt: Many = None,
    scorer: Annotated[list[str] | None, typer.Option(help="By whom; may be repeated")] = None,
    steps: Steps = None,
    seed: Seed = None,
    label: Label = None,
    spec: Spec = None,
    settings: Sets = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    key: Key = None,
) -> None:
    """Measure models on the same prompts and seeds, with confidence intervals, and compare them with the first.

    Examples:
      dfusion evaluate shapes mdl_… --prompt-set shapes-attribute-test --follow
      dfusion evaluate shapes champion --prompt "a blue and dotted \\[star]"
    """
    options = {
        "models": models or None,
        "prompt_sets": prompt_set or None,
        "prompts": texts(prompt),
        "samples_per_prompt": samples_per_prompt,
        "scorers": scorer or None,
        "sampling.num_steps": steps,
        "seed": seed,
        "label": label,
    }
    _ask(ctx.obj, JobKind.EVALUATION, body_of(spec, options, settings or []), follow, dry_run, key)


COMMANDS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {"sample": sample, "fuse": fuse, "train": train, "evaluate": evaluate}
)
"""The commands that ask for one job, by their names."""


def _ask(session: Session, kind: JobKind, body: dict[str, Any], follow: bool, dry_run: bool, key: str | None) -> None:
    with session.client() as client:
        if dry_run:
            estimate = client.estimate(kind, body)
            session.answer(estimate, lambda: _estimate_sheet(estimate))
            return
        job = client.submit(kind, body, idempotency_key=key)
        if follow:
            followed(session, client, job.id)
        else:
            session.answer(job, lambda: job_sheet(job))


def _estimate_sheet(found: EstimateOut) -> RenderableType:
    images, rows = found.images, found.unet_evaluations
    return sheet(
        {
            "images": f"{images.total_at_most} at most: {images.sampled} sampled, {images.fused_at_most} fused, "
            f"{images.evaluated} to evaluate",
            "U-Net": f"{rows.total_at_most} evaluations at most: {rows.sampling} sampling, {rows.fusion_at_most} "
            f"fusion, {rows.training_at_most} training, {rows.evaluation} evaluation",
            "time": "unknown: nothing of the kind was done here yet"
            if found.seconds is None
            else f"{clock(found.seconds)} on one worker",
            "memory": "unknown" if found.memory_bytes is None else size(found.memory_bytes),
            "storage": "unknown" if found.storage_bytes is None else size(found.storage_bytes),
        }
    )
