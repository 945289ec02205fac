"""The paper's ablations on the shapes world, in pictures and numbers: `python -m dfusion.ablations.figures`.

    control    each attention control of appendix B on the same pairs (figure 8)
    layers     which layers are fused (figure 9)
    steps      which steps are fused (figure 9)
    grid       both for one pair (figure 9)
    inversion  targets, and what denoising makes of the noise that DDIM inversion finds for them (section 4.4)

all, or nothing: all of them. The judge rejects a pair's base and accepts its reference. Pictures go to `--out`
(docs/images by default), tables to the terminal. Everything is reproducible from `--seed`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dfusion.ablations import attention_control
from dfusion.ablations.inversion import report_inversion
from dfusion.attention.layers import find_layers
from dfusion.config import FusionConfig, SamplingConfig
from dfusion.errors import InvalidInputError
from dfusion.figures import PairFigures, Side, fusion_mask, pair_figures
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.shapes.judge import MODELS, Judge
from dfusion.shapes.prompts import ShapesPrompt, prompt_list
from dfusion.shapes.report import framed, sample_prompts, sheet
from dfusion.shapes.scenes import TEMPLATES, Template
from dfusion.types import Prompts, Trajectory

REPORTS = ("control", "layers", "steps", "grid", "inversion")
SAMPLES_A_PROMPT, PAIRS_A_PROMPT = 16, 4
SHOWN = 8
"""Pairs on a contact sheet."""
SCALE, GAP = 2, 2
HEADER, MARGIN = 62, 130
"""Pixels above a sheet and left of it, where it has labels there."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of one prompt, with the pictures of bases and references."""

    prompt: ShapesPrompt
    base: Trajectory
    reference: Trajectory
    base_pictures: np.ndarray
    reference_pictures: np.ndarray

    def first(self) -> Pairs:
        """The first pair alone."""
        sides = self.base.select([0]), self.reference.select([0])
        return Pairs(self.prompt, *sides, self.base_pictures[:1], self.reference_pictures[:1])


@dataclass(frozen=True)
class Target:
    """A target's picture, the judge's verdict and the pair's figures, under the mask of the default settings."""

    picture: np.ndarray
    accepted: bool
    figures: PairFigures


def find_pairs(model: DiffusionModel, judge: Judge, template: Template, count: int, seed: int) -> list[Pairs]:
    """At least `count` pairs of a template's training prompts, a few of each. Raises InvalidInputError for none."""
    found: list[Pairs] = []
    for sampled in sample_prompts(model, judge, prompt_list(template, "train"), SAMPLES_A_PROMPT, seed, items=True):
        good = [i for i, accepted in enumerate(sampled.accepted) if accepted]
        bad = [i for i, accepted in enumerate(sampled.accepted) if not accepted][:PAIRS_A_PROMPT]
        if good and bad:
            references = [good[i % len(good)] for i in range(len(bad))]
            sides = sampled.trajectory.select(bad), sampled.trajectory.select(references)
            found.append(Pairs(sampled.prompt, *sides, sampled.pictures[bad], sampled.pictures[references]))
        if sum(len(pairs.base) for pairs in found) >= count:
            break
    if not found:
        raise InvalidInputError(f"{template}: expected prompts with accepted and with rejected samples, found none")
    return found


def conditions(model: DiffusionModel, pairs: Pairs) -> tuple[Prompts, Prompts]:
    """What the U-Net is conditioned on for all pairs, and what guidance leads away from (one row)."""
    return model.encode_prompts([pairs.prompt.text]).expand(len(pairs.base), -1, -1), model.encode_prompts([""])


def fused(model: DiffusionModel, pairs: Pairs, config: FusionConfig) -> Trajectory:
    """The targets of `pairs`."""
    thresholds, sides = [pairs.prompt.thresholds] * len(pairs.base), (pairs.base, pairs.reference)
    embeds = conditions(model, pairs)
    return fuse(model.unet, model.scheduler, *sides, *embeds, thresholds=thresholds, config=config)


def targets(model: DiffusionModel, judge: Judge, pairs: Pairs, config: FusionConfig) -> list[Target]:
    """The targets of `pairs` under `config`, judged and measured."""
    target = fused(model, pairs, config)
    pictures = model.decode(target.final)
    accepted = judge.accepts(pictures, [pairs.prompt.text] * len(pictures))
    found = []
    for row, picture in enumerate(pictures):
        mask = fusion_mask(pairs.reference.select([row]), pairs.prompt.thresholds, FusionConfig())
        figures = pair_figures(
            Side(pairs.reference.final[row], pairs.reference_pictures[row], 1.0),
            Side(pairs.base.final[row], pairs.base_pictures[row], 0.0),
            Side(target.final[row], picture, float(accepted[row])),
            mask,
        )
        found.append(Target(picture, accepted[row], figures))
    return found


def compare(
    model: DiffusionModel, judge: Judge, found: Sequence[Pairs], variants: Mapping[str, FusionConfig]
) -> dict[str, list[Target]]:
    """The targets of all pairs under each variant."""
    return {
        name: [target for pairs in found for target in targets(model, judge, pairs, config)]
        for name, config in variants.items()
    }


def table(compared: Mapping[str, Sequence[Target]]) -> list[str]:
    """Lines of a Markdown table; the last row is the reference, measured like a target."""
    lines = [
        "| targets by | pairs | judge accepts | latent distance to the base, outside | inside | SSIM outside |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in compared.items():
        accepted = f"{np.mean([target.accepted for target in found]):.0%}"
        lines.append(f"| {name} | {len(found)} | {accepted} | {_measures(found, 'target_to_base')} |")
    found = next(iter(compared.values()))
    return [*lines, f"| (the reference itself) | {len(found)} | 100% | {_measures(found, 'reference_to_base')} |"]


def _measures(found: Sequence[Target], comparison: str) -> str:
    """Means over the pairs; a pair without such a place does not count."""
    figures = [target.figures for target in found]
    columns = (
        [figure.latent_distance[comparison]["outside"] for figure in figures],
        [figure.latent_distance[comparison]["inside"] for figure in figures],
        [figure.ssim[comparison]["outside"] for figure in figures],
    )
    known = ([value for value in column if value is not None] for column in columns)
    return " | ".join(f"{np.mean(values):.3f}" if values else "-" for values in known)


def contact_sheet(found: Sequence[Pairs], compared: Mapping[str, Sequence[Target]]) -> Image.Image:
    """A row for each of some pairs: base, reference, and its target by each variant in the frame of its verdict."""
    bases = [picture for pairs in found for picture in pairs.base_pictures]
    references = [picture for pairs in found for picture in pairs.reference_pictures]
    chosen = range(0, len(bases), max(1, len(bases) // SHOWN))[:SHOWN]
    rows = [
        [bases[i], references[i], *(framed(row[i].picture, row[i].accepted) for row in compared.values())]
        for i in chosen
    ]
    return labelled(rows, ["base", "reference", *compared])


def labelled(
    rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str], row_names: Sequence[str] = ()
) -> Image.Image:
    """`sheet` with a name above each column, and left of each row where there are names for them."""
    pictures = sheet(rows, SCALE, GAP)
    left = MARGIN if row_names else 0
    canvas = Image.new("RGB", (left + pictures.width, HEADER + pictures.height), "white")
    canvas.paste(pictures, (left, HEADER))
    draw = ImageDraw.Draw(canvas)
    height, width = (side * SCALE + GAP for side in rows[0][0].shape[:2])
    for x, name in enumerate(columns):
        draw.multiline_text((left + x * width + 2, 2), _broken(name), fill="black", font_size=14)
    for y, name in enumerate(row_names):
        draw.multiline_text((2, HEADER + y * height + 2), _broken(name), fill="black", font_size=14)
    return canvas


def _broken(name: str, length: int = 17) -> str:
    """`name` in lines of about `length` characters."""
    lines = [""]
    for word in name.replace("_", " ").split():
        if lines[-1] and len(lines[-1]) + len(word) >= length:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def report_variants(
    model: DiffusionModel, judge: Judge, found: Sequence[Pairs], out: Path, variants: Mapping[str, FusionConfig]
) -> list[str]:
    """A contact sheet at `out` and the lines of its table."""
    compared = compare(model, judge, found, variants)
    contact_sheet(found, compared).save(out)
    return table(compared)


def report_grid(model: DiffusionModel, judge: Judge, found: Sequence[Pairs], out: Path) -> list[str]:
    """Figure 9 for one pair (the first whose target is accepted): a row for each set of layers, steps from left to
    right; a table of the judge's verdicts."""
    accepted = (p for p in found if targets(model, judge, p.first(), FusionConfig())[0].accepted)
    pair = next(accepted, found[0]).first()
    layer_sets, ranges = attention_control.layers(find_layers(model.unet)), list(_step_ranges())
    blank = np.full_like(pair.base_pictures[0], 255)
    rows, lines = [], [f"| {pair.prompt.text} | " + " | ".join(ranges) + " |", "|---" * (len(ranges) + 1) + "|"]
    for number, (name, of_layers) in enumerate(layer_sets.items()):
        cells = [targets(model, judge, pair, config)[0] for config in _step_ranges(of_layers).values()]
        given = [pair.base_pictures[0], pair.reference_pictures[0]] if number == 0 else [blank, blank]
        rows.append([*given, *(framed(cell.picture, cell.accepted) for cell in cells)])
        lines.append(f"| {name} | " + " | ".join("accepted" if cell.accepted else "rejected" for cell in cells) + " |")
    labelled(rows, ["base", "reference", *(f"steps {name}" for name in ranges)], list(layer_sets)).save(out)
    return lines


def report_inversion_of_targets(model: DiffusionModel, found: Sequence[Pairs], out: Path) -> list[str]:
    """Targets above what denoising makes of their inverted noise; a table of the errors by step."""
    shown: list[list[np.ndarray]] = [[], []]
    reports = []
    for pairs in found[:SHOWN]:
        pair = pairs.first()
        target = fused(model, pair, FusionConfig())
        one = report_inversion(model.unet, model.scheduler, target, *conditions(model, pair))
        for row, latents in zip(shown, (target.final, one.denoised), strict=True):
            row.append(model.decode(latents)[0])
        reports.append(one)
    labelled(shown, [], ["target", "denoised from its DDIM inversion"]).save(out)
    noise = torch.cat([one.noise_errors for one in reports]).mean(0).tolist()
    states = torch.cat([one.state_errors for one in reports]).mean(0).tolist()
    again = torch.cat([one.reconstruction_errors for one in reports]).mean()
    lines = [
        f"{len(reports)} targets; relative errors. Denoised from the inverted noise: {again:.3f}.",
        "| step_index | noise estimate against the network's own | state against the true one |",
        "|---|---|---|",
    ]
    return lines + [f"| {i} | {noise[i]:.3f} | {states[i]:.3f} |" for i in range(len(noise))]


def _step_ranges(config: FusionConfig = FusionConfig()) -> Mapping[str, FusionConfig]:
    return attention_control.steps(SamplingConfig().num_steps, config)


def report(what: str, model: DiffusionModel, judge: Judge, found: Sequence[Pairs], out: Path) -> list[str]:
    """The picture of one ablation at `out`, and its lines."""
    if what == "grid":
        return report_grid(model, judge, found, out)
    if what == "inversion":
        return report_inversion_of_targets(model, found, out)
    variants = {
        "control": attention_control.controls(),
        "layers": attention_control.layers(find_layers(model.unet)),
        "steps": _step_ranges(),
    }
    return report_variants(model, judge, found, out, variants[what])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["all", *REPORTS])
    parser.add_argument("--pipeline", type=Path, default=MODELS / "pipeline")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--pairs", type=int, default=40, help="pairs, at least")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--template", choices=TEMPLATES, default="attribute")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, judge = DiffusionModel.load(arguments.pipeline), Judge.load()
    found = find_pairs(model, judge, arguments.template, arguments.pairs, arguments.seed)
    for what in REPORTS if arguments.what == "all" else [arguments.what]:
        lines = report(what, model, judge, found, arguments.out / f"ablations-{what}.png")
        sys.stdout.write("\n".join([f"{what}, {arguments.template}", *lines, "", ""]))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
