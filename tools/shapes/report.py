"""The quality of the shapes world, in numbers and images: `python -m tools.shapes.report [models|fusion]`.

    models   the judge and the CLIP model on held-out renders; how often the judge accepts the base pipeline's samples
    fusion   targets of pairs whose base the judge rejects and whose reference it accepts

Contact sheets are written to `--out` (docs/images by default). Everything is reproducible from `--seed`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfusion.attention.masks import merge_masks, resize_mask
from dfusion.config import FusionConfig, SamplingConfig
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.rewards import load_scorer
from dfusion.sampling import sample
from dfusion.shapes.judge import MODELS, Judge
from dfusion.shapes.prompts import FUSION, ShapesPrompt, caption, named_parts, prompt_list
from dfusion.shapes.scenes import TEMPLATES, Template, render
from dfusion.types import Trajectory
from tools.pictures import framed, sheet
from tools.shapes.build import hard_negatives, scenes

HELD_OUT_STREAM = 4 * 10**7


@dataclass(frozen=True)
class Sampled:
    """The samples of one prompt: a trajectory of B samples, their images, and the judge's verdicts."""

    prompt: ShapesPrompt
    trajectory: Trajectory
    pictures: np.ndarray
    accepted: list[bool]


def sample_prompts(
    model: DiffusionModel,
    judge: Judge,
    prompts: Sequence[ShapesPrompt],
    count: int,
    seed: int,
    items: bool = False,
    config: SamplingConfig = SamplingConfig(),
) -> Iterator[Sampled]:
    """`count` samples of each prompt, with seeds from `seed` on."""
    negative = model.encode_prompts([""])
    for number, prompt in enumerate(prompts):
        seeds = [seed + number * 1000 + i for i in range(count)]
        trajectory = sample(
            model.unet,
            model.scheduler,
            model.encode_prompts([prompt.text]).expand(count, -1, -1),
            negative.expand(count, -1, -1),
            seeds,
            items=[model.item_tokens(prompt.text, prompt.items)] * count if items else None,
            config=config,
        )
        pictures = model.decode(trajectory.final)
        yield Sampled(prompt, trajectory, pictures, judge.accepts(pictures, [prompt.text] * count))


def grouped_sheet(groups: Sequence[Sequence[np.ndarray]], prompts: Sequence[str], heads: Sequence[str]) -> Image.Image:
    """Groups of images, three per row, each below its prompt. `heads` name the images of every group."""
    rows = []
    titles = []
    for start in range(0, len(groups), 3):
        rows.append(list(chain.from_iterable(groups[start : start + 3])))
        titles.append([*prompts[start : start + 3], "", ""][:3])
    return sheet(rows, columns=[*heads] * 3, titles=titles)


def judge_accuracy(judge: Judge, count: int) -> tuple[float, float]:
    """The share of held-out renders that the judge accepts with their own caption, and rejects with a wrong one."""
    stream = scenes(HELD_OUT_STREAM)
    rng = np.random.default_rng(1)
    held_out = [next(stream) for _ in range(count)]
    pictures = np.stack([render(scene) for scene in held_out])

    right = [caption(scene.template, named_parts(scene)) for scene in held_out]
    wrong = []
    for scene in held_out:
        options = hard_negatives(scene.template, named_parts(scene), rng)
        wrong.append(options[int(rng.integers(len(options)))])

    return float(np.mean(judge.accepts(pictures, right))), 1 - float(np.mean(judge.accepts(pictures, wrong)))


def clip_accuracy(count: int) -> dict[Template, float]:
    """The share of held-out renders whose own caption scores above all its hard negatives, by template."""
    scorer = load_scorer("shapes-clip")
    stream = scenes(HELD_OUT_STREAM + 1)
    rng = np.random.default_rng(2)

    right: dict[Template, list[bool]] = {template: [] for template in TEMPLATES}
    for _ in range(count):
        scene = next(stream)
        named = named_parts(scene)
        captions = [caption(scene.template, named), *hard_negatives(scene.template, named, rng)]
        scores = scorer.score(np.stack([render(scene)] * len(captions)), captions)
        right[scene.template].append(scores[0] > max(scores[1:]))
    return {template: float(np.mean(rows)) for template, rows in right.items()}


def report_models(model: DiffusionModel, out: Path, samples: int, seed: int, config: SamplingConfig) -> list[str]:
    """Write one contact sheet per template. Returns the lines of the "models" report."""
    # 1. the judge and CLIP
    judge = Judge.load()
    accepts, rejects = judge_accuracy(judge, 1500)
    lines = [
        f"judge on 1500 held-out renders: accepts the right caption {accepts:.1%}, rejects a wrong one {rejects:.1%}"
    ]
    for template, share in clip_accuracy(900).items():
        lines.append(f"CLIP picks the right caption among its hard negatives, {template}: {share:.1%}")

    # 2. the base pipeline
    for template in TEMPLATES:
        accepted: list[bool] = []
        rows = []
        prompts = []
        for sampled in sample_prompts(model, judge, prompt_list(template, "train"), samples, seed, config=config):
            accepted += sampled.accepted
            rows.append([framed(p, a) for p, a in zip(sampled.pictures[:4], sampled.accepted, strict=False)])
            prompts.append(sampled.prompt.text)
        lines.append(f"base pipeline, judge accepts, {template}: {np.mean(accepted):.1%} of {len(accepted)}")
        grouped_sheet(rows[:24], prompts[:24], ()).save(out / f"samples-{template}.png")
    return lines


@dataclass(frozen=True)
class Carried:
    """One fused pair: the judge's verdict on the target, and distances (latent RMS) outside the mask."""

    accepted: bool
    target_distance: float
    reference_distance: float
    cover: float
    prompt: str
    pictures: list[np.ndarray]
    """Base, reference, target in the frame of its verdict, and mask; (H, W, 3) uint8 each."""


def fused_pairs(model: DiffusionModel, judge: Judge, sampled: Sampled, config: FusionConfig) -> list[Carried]:
    """Fuse every rejected sample of a prompt with an accepted one. A reference may be used for several bases."""
    # 1. the pairs
    good = [i for i, accepted in enumerate(sampled.accepted) if accepted]
    bad = [i for i, accepted in enumerate(sampled.accepted) if not accepted]
    if not good or not bad:
        return []
    references = [good[i % len(good)] for i in range(len(bad))]
    base = sampled.trajectory.select(bad)
    reference = sampled.trajectory.select(references)

    # 2. the targets
    prompt = sampled.prompt
    embeds = model.encode_prompts([prompt.text]).expand(len(bad), -1, -1)
    negative = model.encode_prompts([""]).expand(len(bad), -1, -1)
    thresholds = [prompt.thresholds] * len(bad)
    target = fuse(model.unet, model.scheduler, base, reference, embeds, negative, thresholds=thresholds, config=config)
    pictures = model.decode(target.final)
    accepted = judge.accepts(pictures, [prompt.text] * len(bad))

    # 3. the distances outside the mask
    carried = []
    for row, (b, r) in enumerate(zip(bad, references, strict=True)):
        mask = union_mask(reference, row, prompt.thresholds, config)
        outside = 1 - mask
        share = outside.sum().clamp(min=1)
        to_target = ((target.final[row] - base.final[row]).square() * outside).sum() / share
        to_reference = ((reference.final[row] - base.final[row]).square() * outside).sum() / share
        shown = (mask[..., None].numpy() * 255).astype(np.uint8).repeat(3, -1).repeat(4, 0).repeat(4, 1)
        shown_pictures = [sampled.pictures[b], sampled.pictures[r], framed(pictures[row], accepted[row]), shown]
        distances = (to_target.sqrt().item(), to_reference.sqrt().item())
        carried.append(Carried(accepted[row], *distances, mask.mean().item(), prompt.text, shown_pictures))
    return carried


def union_mask(reference: Trajectory, row: int, thresholds: Sequence[float], config: FusionConfig) -> torch.Tensor:
    """The union of the masks of all fused steps, (h, w) of 0 and 1."""
    if reference.item_maps is None:
        raise ValueError("expected a reference with item maps")

    fused = config.steps(len(reference.timesteps))
    maps = reference.item_maps[row, fused.start : fused.stop]
    masks = merge_masks(maps, [thresholds] * len(maps), config.merge)
    return resize_mask(masks.any(0, keepdim=True), (reference.final.shape[-2], reference.final.shape[-1]))[0].float()


def _endless_samples(
    model: DiffusionModel, judge: Judge, template: Template, seed: int, config: SamplingConfig
) -> Iterator[Sampled]:
    """16 new samples of each training prompt, repeatedly."""
    prompts = prompt_list(template, "train")
    while True:
        yield from sample_prompts(model, judge, prompts, 16, seed, items=True, config=config)
        seed += 1000 * len(prompts)


def report_fusion(
    model: DiffusionModel,
    out: Path,
    pairs: int,
    seed: int,
    sampling: SamplingConfig,
    config: FusionConfig,
    templates: Sequence[Template],
) -> list[str]:
    """Write a sheet of base / reference / target / mask per template. Returns the lines of the "fusion" report."""
    judge = Judge.load()
    lines = []
    for template in templates:
        # 1. the pairs
        carried: list[Carried] = []
        for sampled in _endless_samples(model, judge, template, seed, sampling):
            carried += fused_pairs(model, judge, sampled, config)
            if len(carried) >= pairs:
                break

        # 2. their means
        target = np.mean([c.target_distance for c in carried])
        reference = np.mean([c.reference_distance for c in carried])
        accepted = np.mean([c.accepted for c in carried])
        cover = np.mean([c.cover for c in carried])
        lines.append(
            f"{template}: {len(carried)} pairs (base rejected, reference accepted): targets accepted {accepted:.1%}; "
            f"outside the mask target-base {target:.3f}, reference-base {reference:.3f}, "
            f"{reference / target:.1f} times closer; mask covers {cover:.0%}"
        )

        # 3. the sheet
        shown = carried[:: max(1, len(carried) // 24)][:24]
        pictures = [pair.pictures for pair in shown]
        prompts = [pair.prompt for pair in shown]
        grouped_sheet(pictures, prompts, ("base", "reference", "target", "mask")).save(out / f"fusion-{template}.png")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="models", choices=["models", "fusion"])
    parser.add_argument("--pipeline", type=Path, default=MODELS / "pipeline")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--samples", type=int, default=8, help="samples per prompt (models)")
    parser.add_argument("--pairs", type=int, default=200, help="minimum number of pairs per template (fusion)")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--template", choices=TEMPLATES, action="append")
    parser.add_argument("--steps", type=int, default=SamplingConfig().num_steps)
    parser.add_argument("--first-step", type=int, default=FUSION.first_step)
    parser.add_argument("--merge", choices=["xor", "or"], default=FUSION.merge)
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    model = DiffusionModel.load(arguments.pipeline)
    sampling = SamplingConfig(num_steps=arguments.steps)
    if arguments.what == "models":
        lines = report_models(model, arguments.out, arguments.samples, arguments.seed, sampling)
    else:
        config = FUSION.model_copy(update={"first_step": arguments.first_step, "merge": arguments.merge})
        templates = arguments.template or TEMPLATES
        lines = report_fusion(model, arguments.out, arguments.pairs, arguments.seed, sampling, config, templates)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
