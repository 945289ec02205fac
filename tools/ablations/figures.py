"""The paper's ablations in pictures and numbers, on any model and prompts: `python -m tools.ablations.figures`.

    control    each attention control of appendix B on the same pairs (figure 8)
    layers     which layers are fused (as figure 9)
    steps      which steps are fused (as figure 9)
    grid       both for one pair (as figure 9)
    cover      masks that cover ever more of the image (decision 003)
    inversion  targets, and what denoising makes of the noise that DDIM inversion finds for them (section 4.4)

all, or nothing: all of them. Pairs are chosen by the reward, as a round chooses them. Where prompts and pictures are
those of the shapes world, the tables also say what its judge accepts. Pictures go to `--out` (docs/images by default),
tables to the terminal. Everything is reproducible from `--seed`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image, ImageDraw

from dfusion.attention.layers import find_layers
from dfusion.config import FusionConfig, PairingConfig, Precision, SamplingConfig
from dfusion.figures import PairFigures, Side, fusion_mask, pair_figures
from dfusion.fused_sampling import fuse
from dfusion.inversion import report_inversion
from dfusion.models import DiffusionModel
from dfusion.pairing import adopt
from dfusion.prompts import read_prompts
from dfusion.rewards import load_scorer
from dfusion.shapes.judge import MODELS
from dfusion.types import Trajectory
from tools.ablations import attention_control
from tools.ablations.cover import COVERS, covered
from tools.ablations.pairs import Bench, Pairs, conditions, find_pairs, judge_for
from tools.shapes.report import framed, sheet

REPORTS = ("control", "layers", "steps", "grid", "cover", "inversion")
SHOWN = 8
"""Pairs on a contact sheet."""
SCALE, GAP = 2, 2
HEADER, MARGIN = 62, 130
"""Pixels above a sheet and left of it, where it has labels there."""


@dataclass(frozen=True)
class Target:
    """A target's picture, whether its reward adopts it (Eq. 7), the judge's verdict (None without a judge) and the
    pair's figures, under the mask of the default settings."""

    picture: np.ndarray
    adopted: bool
    accepted: bool | None
    figures: PairFigures


def fused(model: DiffusionModel, pairs: Pairs, config: FusionConfig) -> Trajectory:
    """The targets of `pairs`."""
    thresholds, sides = [pairs.thresholds] * len(pairs), (pairs.base, pairs.reference)
    embeds = conditions(model, pairs)
    return fuse(model.unet, model.scheduler, *sides, *embeds, thresholds=thresholds, config=config)


def targets(bench: Bench, pairs: Pairs, config: FusionConfig) -> list[Target]:
    """The targets of `pairs` under `config`, scored and measured."""
    target = fused(bench.model, pairs, config)
    pictures = bench.model.decode(target.final)
    scores = bench.scores(pictures, pairs.prompt)
    accepted = bench.accepts(pictures, pairs.prompt)
    results = []
    for row, picture in enumerate(pictures):
        mask = fusion_mask(pairs.reference.select([row]), pairs.thresholds, FusionConfig())
        base_score, reference_score = pairs.base_scores[row], pairs.reference_scores[row]
        figures = pair_figures(
            Side(pairs.reference.final[row], pairs.reference_pictures[row], reference_score),
            Side(pairs.base.final[row], pairs.base_pictures[row], base_score),
            Side(target.final[row], picture, scores[row]),
            mask,
        )
        adopted = adopt(scores[row], base_score, reference_score, PairingConfig())
        results.append(Target(picture, adopted, accepted[row], figures))
    return results


def compare(
    bench: Bench, found: Sequence[Pairs], variants: Mapping[str, FusionConfig]
) -> Mapping[str, Sequence[Target]]:
    """The targets of all pairs under each variant."""
    return {
        name: [target for pairs in found for target in targets(bench, pairs, config)]
        for name, config in variants.items()
    }


def table(compared: Mapping[str, Sequence[Target]]) -> list[str]:
    """Lines of a Markdown table; the last row is the reference, measured like a target. The judge has a column where
    there is one."""
    judged = all(target.accepted is not None for found in compared.values() for target in found)
    columns = ["targets by", "pairs", "adopted (Eq. 7)", "reward above the base"]
    columns += ["judge accepts"] if judged else []
    columns += ["latent distance to the base, outside", "inside", "SSIM outside"]
    lines = [_row(*columns), _row(*["---"] * len(columns))]
    for name, found in compared.items():
        verdicts = [f"{np.mean([bool(target.accepted) for target in found]):.0%}"] if judged else []
        adopted = f"{np.mean([target.adopted for target in found]):.0%}"
        margin = _margin(found, "target_over_base")
        lines.append(_row(name, str(len(found)), adopted, margin, *verdicts, *_measures(found, "target_to_base")))
    found = next(iter(compared.values()))
    margin, unknown = _margin(found, "reference_over_base"), ["-"] if judged else []
    measures = _measures(found, "reference_to_base")
    return [*lines, _row("(the reference itself)", str(len(found)), "-", margin, *unknown, *measures)]


def _row(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _margin(found: Sequence[Target], name: str) -> str:
    return f"{np.mean([target.figures.margin[name] for target in found]):.3f}"


def _measures(found: Sequence[Target], comparison: str) -> list[str]:
    """Means over the pairs; a pair without such a place does not count."""
    figures = [target.figures for target in found]
    columns = (
        [figure.latent_distance[comparison]["outside"] for figure in figures],
        [figure.latent_distance[comparison]["inside"] for figure in figures],
        [figure.ssim[comparison]["outside"] for figure in figures],
    )
    known = ([value for value in column if value is not None] for column in columns)
    return [f"{np.mean(values):.3f}" if values else "-" for values in known]


def contact_sheet(found: Sequence[Pairs], compared: Mapping[str, Sequence[Target]]) -> Image.Image:
    """A row for each of some pairs: base, reference, and its target by each variant in a green frame where adopted."""
    bases = [picture for pairs in found for picture in pairs.base_pictures]
    references = [picture for pairs in found for picture in pairs.reference_pictures]
    chosen = range(0, len(bases), max(1, len(bases) // SHOWN))[:SHOWN]
    rows = [
        [bases[i], references[i], *(framed(row[i].picture, row[i].adopted) for row in compared.values())]
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


def report_variants(bench: Bench, found: Sequence[Pairs], out: Path, variants: Mapping[str, FusionConfig]) -> list[str]:
    """A contact sheet at `out` and the lines of its table."""
    compared = compare(bench, found, variants)
    contact_sheet(found, compared).save(out)
    return table(compared)


def report_grid(bench: Bench, found: Sequence[Pairs], out: Path) -> list[str]:
    """As figure 9, for one pair (the first whose target is adopted): a row for each set of layers, steps from left to
    right; a table of what is adopted."""
    pairs = [several.one(row) for several in found for row in range(len(several))]
    adopted = (pair for pair in pairs if targets(bench, pair, FusionConfig())[0].adopted)
    pair = next(adopted, pairs[0])
    layer_sets = attention_control.layers(find_layers(bench.model.unet))
    ranges = list(_step_ranges())
    blank = np.full_like(pair.base_pictures[0], 255)
    rows = []
    lines = [_row(pair.prompt, *ranges), _row("---", *["---"] * len(ranges))]
    for number, (name, of_layers) in enumerate(layer_sets.items()):
        cells = [targets(bench, pair, config)[0] for config in _step_ranges(of_layers).values()]
        given = [pair.base_pictures[0], pair.reference_pictures[0]] if number == 0 else [blank, blank]
        rows.append([*given, *(framed(cell.picture, cell.adopted) for cell in cells)])
        lines.append(_row(name, *("adopted" if cell.adopted else "not" for cell in cells)))
    labelled(rows, ["base", "reference", *(f"steps {name}" for name in ranges)], list(layer_sets)).save(out)
    return lines


def report_cover(bench: Bench, found: Sequence[Pairs], out: Path, first_step: int) -> list[str]:
    """What a mask that covers ever more of the image does, with fusion from `first_step` on: a row of pictures for each
    of some pairs, and a table."""
    config = FusionConfig(merge="or", first_step=first_step)
    pairs = [several.one(row) for several in found for row in range(len(several))]
    rows = [covered(bench, pair, config) for pair in pairs]
    shown = range(0, len(rows), max(1, len(rows) // SHOWN))[:SHOWN]
    pictures = [
        [pairs[i].base_pictures[0], pairs[i].reference_pictures[0], *(framed(t.picture, t.adopted) for t in rows[i])]
        for i in shown
    ]
    labelled(pictures, ["base", "reference", *(f"{share:.0%} covered" for share in COVERS)]).save(out)

    own = [float(fusion_mask(pair.reference, pair.thresholds, FusionConfig()).mean()) for pair in pairs]
    columns = ["the mask covers", "pairs", "adopted (Eq. 7)", "reward above the base", "judge accepts"]
    columns += ["distance to the base", "to the reference", "nearer to the base"]
    lines = [
        f"Fused from step {first_step} on. The masks of the pairs themselves cover {np.mean(own):.2f} of the image on"
        f" average, {min(own):.2f} to {max(own):.2f}.",
        _row(*columns),
        _row(*["---"] * len(columns)),
    ]
    for column in zip(*rows, strict=True):
        judged = [bool(target.accepted) for target in column if target.accepted is not None]
        lines.append(
            _row(
                f"{np.mean([target.cover for target in column]):.2f}",
                str(len(column)),
                f"{np.mean([target.adopted for target in column]):.0%}",
                f"{np.mean([target.margin for target in column]):.3f}",
                f"{np.mean(judged):.0%}" if judged else "-",
                f"{np.mean([target.to_base for target in column]):.2f}",
                f"{np.mean([target.to_reference for target in column]):.2f}",
                f"{np.mean([target.to_base < target.to_reference for target in column]):.0%}",
            )
        )
    return lines


def report_inversion_of_targets(model: DiffusionModel, found: Sequence[Pairs], out: Path) -> list[str]:
    """Targets above what denoising makes of their inverted noise; a table of the errors by step."""
    shown: list[list[np.ndarray]] = [[], []]
    reports = []
    for pairs in found[:SHOWN]:
        pair = pairs.one(0)
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


def report(what: str, bench: Bench, found: Sequence[Pairs], out: Path, first_step: int) -> list[str]:
    """The picture of one ablation at `out`, and its lines."""
    if what == "grid":
        return report_grid(bench, found, out)
    if what == "cover":
        return report_cover(bench, found, out, first_step)
    if what == "inversion":
        return report_inversion_of_targets(bench.model, found, out)
    variants = {
        "control": attention_control.controls(),
        "layers": attention_control.layers(find_layers(bench.model.unet)),
        "steps": _step_ranges(),
    }
    return report_variants(bench, found, out, variants[what])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["all", *REPORTS])
    parser.add_argument(
        "--pipeline",
        default=str(MODELS / "pipeline"),
        help="a folder in diffusers' layout, a name such as sd-2.1-base, or owner/name@revision",
    )
    parser.add_argument("--prompts", default="shapes-attribute-train", help="a list that comes with dfusion, or a file")
    parser.add_argument("--reward", default="shapes-clip", help="scorer that chooses the pairs")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--pairs", type=int, default=40, help="pairs, at least")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--first-step", type=int, default=FusionConfig().first_step, help="first fused step of cover")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=get_args(Precision), default="float32")
    given = parser.parse_args(arguments)

    prompts = read_prompts(given.prompts)
    model = DiffusionModel.load(given.pipeline, given.device, given.dtype)
    bench = Bench(model, load_scorer(given.reward, given.device), judge_for(model, prompts))
    given.out.mkdir(parents=True, exist_ok=True)
    found = find_pairs(bench, prompts, given.pairs, given.seed)
    for what in REPORTS if given.what == "all" else [given.what]:
        lines = report(what, bench, found, given.out / f"ablations-{what}.png", given.first_step)
        sys.stdout.write("\n".join([f"{what}, {given.prompts}, {given.reward}", *lines, "", ""]))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
