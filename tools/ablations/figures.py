"""The paper's ablations as images and tables, on any model and prompts: `python -m tools.ablations.figures`.

    control    each attention control of appendix B on the same pairs (figure 8)
    layers     sets of fused layers (as figure 9)
    steps      ranges of fused steps (as figure 9)
    grid       layers by steps for one pair (as figure 9)
    cover      masks of increasing coverage (decision 003)
    inversion  targets, and images denoised from their DDIM inversion (section 4.4)
    all        all of these (the default)

Pairs are chosen by the reward, as in a round. For prompts and images of the shapes world, the tables also contain the
judge's verdicts. Images are written to `--out` (docs/images by default), tables to the terminal. Everything is
reproducible from `--seed`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image

from dfusion.attention.layers import find_layers
from dfusion.config import FusionConfig, PairingConfig, Precision, SamplingConfig
from dfusion.fused_sampling import fuse
from dfusion.inversion import report_inversion
from dfusion.models import DiffusionModel
from dfusion.pair_metrics import PairSides, PairStatistics, Side, fusion_mask, pair_statistics
from dfusion.pairing import adopt
from dfusion.prompts import read_prompts
from dfusion.rewards import load_scorer
from dfusion.shapes.judge import MODELS
from dfusion.types import Trajectory
from tools.ablations import attention_control
from tools.ablations.cover import COVERS, Covered, covered
from tools.ablations.pairs import Bench, Pairs, conditions, find_pairs, judge_for
from tools.pictures import framed, sheet

REPORTS = ("control", "layers", "steps", "grid", "cover", "inversion")
SHOWN = 8
"""Pairs on a contact sheet."""


@dataclass(frozen=True)
class Target:
    """A target with its verdicts and metrics.

    adopted   whether its reward adopts it (Eq. 7)
    accepted  the judge's verdict; None without a judge
    statistics  the pair's metrics, under the mask of the default settings
    """

    picture: np.ndarray
    adopted: bool
    accepted: bool | None
    statistics: PairStatistics


def fused(model: DiffusionModel, pairs: Pairs, config: FusionConfig) -> Trajectory:
    """The targets of `pairs`."""
    thresholds = [pairs.thresholds] * len(pairs)
    embeds = conditions(model, pairs)
    return fuse(model.unet, model.scheduler, pairs.base, pairs.reference, *embeds, thresholds=thresholds, config=config)


def targets(bench: Bench, pairs: Pairs, config: FusionConfig) -> list[Target]:
    """The targets of `pairs` under `config`, scored and measured."""
    target = fused(bench.model, pairs, config)
    pictures = bench.model.decode(target.final)
    scores = bench.scores(pictures, pairs.prompt)
    accepted = bench.accepts(pictures, pairs.prompt)

    measured = []
    for row, picture in enumerate(pictures):
        measured.append(
            PairSides(
                Side(pairs.reference.final[row], pairs.reference_pictures[row], pairs.reference_scores[row]),
                Side(pairs.base.final[row], pairs.base_pictures[row], pairs.base_scores[row]),
                Side(target.final[row], picture, scores[row]),
                fusion_mask(pairs.reference.select([row]), pairs.thresholds, FusionConfig()),
            )
        )

    results = []
    statistics = pair_statistics(measured, bench.model.device)
    for pair, verdict, metrics in zip(measured, accepted, statistics, strict=True):
        adopted = adopt(pair.target.score, pair.base.score, pair.reference.score, PairingConfig())
        results.append(Target(pair.target.image, adopted, verdict, metrics))
    return results


def compare(
    bench: Bench, groups: Sequence[Pairs], variants: Mapping[str, FusionConfig]
) -> Mapping[str, Sequence[Target]]:
    """The targets of all pairs under each variant."""
    compared = {}
    for name, config in variants.items():
        compared[name] = list(chain.from_iterable(targets(bench, pairs, config) for pairs in groups))
    return compared


def table(compared: Mapping[str, Sequence[Target]]) -> list[str]:
    """Lines of a Markdown table. The last row is the reference, measured like a target.

    With a judge, there is a column for its verdicts.
    """
    # 1. the header
    judged = all(target.accepted is not None for target in chain.from_iterable(compared.values()))
    columns = ["targets by", "pairs", "adopted (Eq. 7)", "reward above the base"]
    columns += ["judge accepts"] if judged else []
    columns += ["latent distance to the base, outside", "inside", "SSIM outside"]
    lines = [_row(*columns), _row(*["---"] * len(columns))]

    # 2. a row per variant
    for name, results in compared.items():
        verdicts = [f"{np.mean([bool(target.accepted) for target in results]):.0%}"] if judged else []
        adopted = f"{np.mean([target.adopted for target in results]):.0%}"
        margin = _margin(results, "target_over_base")
        lines.append(_row(name, str(len(results)), adopted, margin, *verdicts, *_measures(results, "target_to_base")))

    # 3. the reference
    results = next(iter(compared.values()))
    margin = _margin(results, "reference_over_base")
    unknown = ["-"] if judged else []
    measures = _measures(results, "reference_to_base")
    return [*lines, _row("(the reference itself)", str(len(results)), "-", margin, *unknown, *measures)]


def _row(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _margin(results: Sequence[Target], name: str) -> str:
    return f"{np.mean([target.statistics.margin[name] for target in results]):.3f}"


def _measures(results: Sequence[Target], comparison: str) -> list[str]:
    """Means over the pairs. Pairs with an empty region are skipped."""
    distances = [target.statistics.latent_distance[comparison] for target in results]
    outside = [distance["outside"] for distance in distances]
    inside = [distance["inside"] for distance in distances]
    similarity = [target.statistics.ssim[comparison]["outside"] for target in results]
    return [_mean_of_known(outside), _mean_of_known(inside), _mean_of_known(similarity)]


def _mean_of_known(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else "-"


def contact_sheet(groups: Sequence[Pairs], compared: Mapping[str, Sequence[Target]]) -> Image.Image:
    """One row per shown pair: base, reference, and the target of each variant, in a green frame if adopted."""
    bases = list(chain.from_iterable(pairs.base_pictures for pairs in groups))
    references = list(chain.from_iterable(pairs.reference_pictures for pairs in groups))
    prompts = list(chain.from_iterable([pairs.prompt] * len(pairs) for pairs in groups))

    rows = []
    titles = []
    for i in range(0, len(bases), max(1, len(bases) // SHOWN))[:SHOWN]:
        variants = [results[i] for results in compared.values()]
        rows.append([bases[i], references[i], *(framed(target.picture, target.adopted) for target in variants)])
        titles.append([prompts[i]])
    return sheet(rows, columns=_columns(compared), titles=titles)


def _columns(variants: Iterable[str]) -> list[str]:
    return ["base", "reference", *(name.replace("_", " ") for name in variants)]


def report_variants(
    bench: Bench, groups: Sequence[Pairs], out: Path, variants: Mapping[str, FusionConfig]
) -> list[str]:
    """Write a contact sheet to `out`. Returns the lines of its table."""
    compared = compare(bench, groups, variants)
    contact_sheet(groups, compared).save(out)
    return table(compared)


def _single_pairs(groups: Sequence[Pairs]) -> list[Pairs]:
    """All pairs, one by one."""
    singles = []
    for pairs in groups:
        singles += [pairs.single(row) for row in range(len(pairs))]
    return singles


def report_grid(bench: Bench, groups: Sequence[Pairs], out: Path) -> list[str]:
    """Write figure 9 for one pair, the first whose target is adopted: layers by steps. Returns a table of adoption."""
    # 1. the pair and the variants
    pairs = _single_pairs(groups)
    adopted = (pair for pair in pairs if targets(bench, pair, FusionConfig())[0].adopted)
    pair = next(adopted, pairs[0])
    layer_sets = attention_control.layers(find_layers(bench.model.unet))
    ranges = list(_step_ranges())
    blank = np.full_like(pair.base_pictures[0], 255)

    # 2. a row per set of layers
    rows = []
    lines = [_row(pair.prompt, *ranges), _row("---", *["---"] * len(ranges))]
    for number, (name, config) in enumerate(layer_sets.items()):
        cells = [targets(bench, pair, variant)[0] for variant in _step_ranges(config).values()]
        sides = [pair.base_pictures[0], pair.reference_pictures[0]] if number == 0 else [blank, blank]
        rows.append([*sides, *(framed(cell.picture, cell.adopted) for cell in cells)])
        lines.append(_row(name, *("adopted" if cell.adopted else "not" for cell in cells)))

    columns = _columns(f"steps {name}" for name in ranges)
    titles = [[pair.prompt], *[[""]] * (len(rows) - 1)]
    sheet(rows, columns=columns, names=list(layer_sets), titles=titles).save(out)
    return lines


def report_cover(bench: Bench, groups: Sequence[Pairs], out: Path, first_step: int) -> list[str]:
    """The effect of masks of increasing coverage, with fusion from `first_step` on.

    Writes a row of images per shown pair to `out`. Returns the lines of a table.
    """
    # 1. the images
    config = FusionConfig(merge="or", first_step=first_step)
    pairs = _single_pairs(groups)
    rows = [covered(bench, pair, config) for pair in pairs]
    pictures = []
    titles = []
    for i in range(0, len(rows), max(1, len(rows) // SHOWN))[:SHOWN]:
        sides = [pairs[i].base_pictures[0], pairs[i].reference_pictures[0]]
        pictures.append([*sides, *(framed(target.picture, target.adopted) for target in rows[i])])
        titles.append([pairs[i].prompt])
    columns = _columns(f"{share:.0%} covered" for share in COVERS)
    sheet(pictures, columns=columns, titles=titles).save(out)

    # 2. the table
    own = [float(fusion_mask(pair.reference, pair.thresholds, FusionConfig()).mean()) for pair in pairs]
    headings = ["the mask covers", "pairs", "adopted (Eq. 7)", "reward above the base", "judge accepts"]
    headings += ["distance to the base", "to the reference", "nearer to the base"]
    lines = [
        f"Fused from step {first_step} on. The masks of the pairs themselves cover {np.mean(own):.2f} of the image on"
        f" average, {min(own):.2f} to {max(own):.2f}.",
        _row(*headings),
        _row(*["---"] * len(headings)),
    ]
    return [*lines, *(_cover_row(column) for column in zip(*rows, strict=True))]


def _cover_row(column: Sequence[Covered]) -> str:
    """The row of the targets of one coverage."""
    judged = [bool(target.accepted) for target in column if target.accepted is not None]
    cover = np.mean([target.cover for target in column])
    adopted = np.mean([target.adopted for target in column])
    margin = np.mean([target.margin for target in column])
    to_base = np.mean([target.to_base for target in column])
    to_reference = np.mean([target.to_reference for target in column])
    nearer = np.mean([target.to_base < target.to_reference for target in column])

    return _row(
        f"{cover:.2f}",
        str(len(column)),
        f"{adopted:.0%}",
        f"{margin:.3f}",
        f"{np.mean(judged):.0%}" if judged else "-",
        f"{to_base:.2f}",
        f"{to_reference:.2f}",
        f"{nearer:.0%}",
    )


def report_inversion_of_targets(model: DiffusionModel, groups: Sequence[Pairs], out: Path) -> list[str]:
    """Write targets above the images denoised from their inversion. Returns a table of the errors by step."""
    # 1. the images
    shown: list[list[np.ndarray]] = [[], []]
    reports = []
    for pairs in groups[:SHOWN]:
        pair = pairs.single(0)
        target = fused(model, pair, FusionConfig())
        inversion = report_inversion(model.unet, model.scheduler, target, *conditions(model, pair))
        for row, latents in zip(shown, (target.final, inversion.denoised), strict=True):
            row.append(model.decode(latents)[0])
        reports.append(inversion)
    columns = [pairs.prompt for pairs in groups[:SHOWN]]
    sheet(shown, columns=columns, names=["target", "denoised from its DDIM inversion"]).save(out)

    # 2. the table
    noise = torch.cat([inversion.noise_errors for inversion in reports]).mean(0).tolist()
    states = torch.cat([inversion.state_errors for inversion in reports]).mean(0).tolist()
    reconstruction = torch.cat([inversion.reconstruction_errors for inversion in reports]).mean()
    lines = [
        f"{len(reports)} targets; relative errors. Denoised from the inverted noise: {reconstruction:.3f}.",
        "| step_index | noise estimate against the network's own | state against the true one |",
        "|---|---|---|",
    ]
    return lines + [f"| {i} | {noise[i]:.3f} | {states[i]:.3f} |" for i in range(len(noise))]


def _step_ranges(config: FusionConfig = FusionConfig()) -> Mapping[str, FusionConfig]:
    return attention_control.steps(SamplingConfig().num_steps, config)


def report(what: str, bench: Bench, groups: Sequence[Pairs], out: Path, first_step: int) -> list[str]:
    """Write the image of one ablation to `out`. Returns its lines."""
    if what == "grid":
        return report_grid(bench, groups, out)
    if what == "cover":
        return report_cover(bench, groups, out, first_step)
    if what == "inversion":
        return report_inversion_of_targets(bench.model, groups, out)

    variants = {
        "control": attention_control.controls(),
        "layers": attention_control.layers(find_layers(bench.model.unet)),
        "steps": _step_ranges(),
    }
    return report_variants(bench, groups, out, variants[what])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["all", *REPORTS])
    parser.add_argument(
        "--pipeline",
        default=str(MODELS / "pipeline"),
        help="a folder in diffusers' layout, a name such as sd-2.1-base, or owner/name@revision",
    )
    parser.add_argument("--prompts", default="shapes-attribute-train", help="built-in prompt list, or a file")
    parser.add_argument("--reward", default="shapes-clip", help="scorer that chooses the pairs")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--pairs", type=int, default=40, help="minimum number of pairs")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--first-step", type=int, default=FusionConfig().first_step, help="first fused step of cover")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=get_args(Precision), default="float32")
    options = parser.parse_args(arguments)

    prompts = read_prompts(options.prompts)
    model = DiffusionModel.load(options.pipeline, options.device, options.dtype)
    bench = Bench(model, load_scorer(options.reward, options.device), judge_for(model, prompts))
    options.out.mkdir(parents=True, exist_ok=True)
    groups = find_pairs(bench, prompts, options.pairs, options.seed)

    for what in REPORTS if options.what == "all" else [options.what]:
        lines = report(what, bench, groups, options.out / f"ablations-{what}.png", options.first_step)
        sys.stdout.write("\n".join([f"{what}, {options.prompts}, {options.reward}", *lines, "", ""]))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
