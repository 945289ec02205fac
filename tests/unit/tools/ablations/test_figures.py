"""The ablations' images and tables, on a random pipeline and a reward for any image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfusion.config import FusionConfig
from dfusion.pair_metrics import PairStatistics
from dfusion.prompts import Prompt
from tests.nets import tiny_model, tiny_pipeline
from tests.scorers import Brightness
from tools.ablations.cover import COVERS
from tools.ablations.figures import (
    REPORTS,
    Target,
    main,
    report_cover,
    report_grid,
    report_inversion_of_targets,
    report_variants,
    table,
)
from tools.ablations.pairs import Bench, Pairs, find_pairs
from tools.pictures import GAP, MARGIN


class EverySecond:
    """Accepts the first, third, ... image of a batch."""

    def accepts(self, images: np.ndarray, prompts: Sequence[str]) -> list[bool]:
        assert len(images) == len(prompts)
        return [i % 2 == 0 for i in range(len(images))]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(tiny_model(has_middle=True), Brightness())


@pytest.fixture(scope="module")
def groups(bench: Bench) -> list[Pairs]:
    return find_pairs(bench, [Prompt(text="a red [circle]")], 4, seed=1)


def cells(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


@pytest.mark.slow
def test_variants_give_a_sheet_and_a_table(bench: Bench, groups: list[Pairs], tmp_path: Path) -> None:
    variants = {"masked_kv": FusionConfig(first_step=18), "kv": FusionConfig(first_step=18, control="kv")}
    lines = report_variants(bench, groups, tmp_path / "sheet.png", variants)
    assert "judge" not in lines[0] and len({len(cells(line)) for line in lines}) == 1
    assert [cells(line)[:2] for line in lines[2:]] == [["masked_kv", "4"], ["kv", "4"], ["(the reference itself)", "4"]]
    gain = np.mean(np.subtract(groups[0].reference_scores, groups[0].base_scores))
    assert cells(lines[-1])[3] == f"{gain:.3f}"
    with Image.open(tmp_path / "sheet.png") as image:  # base, reference and two targets of four pairs
        assert image.width == 4 * (32 + GAP) and image.height > 4 * (32 + GAP)


def test_the_judge_has_a_column(bench: Bench, groups: list[Pairs], tmp_path: Path) -> None:
    judged = Bench(bench.model, bench.scorer, EverySecond())  # type: ignore[arg-type]
    lines = report_variants(judged, groups, tmp_path / "sheet.png", {"kv": FusionConfig(first_step=18, control="kv")})
    place = cells(lines[0]).index("judge accepts")
    assert [cells(line)[place] for line in lines[2:]] == ["50%", "-"]


@pytest.mark.slow
def test_the_grid_has_a_row_for_each_set_of_layers(bench: Bench, groups: list[Pairs], tmp_path: Path) -> None:
    lines = report_grid(bench, groups, tmp_path / "sheet.png")
    assert cells(lines[0]) == ["a red circle", "0-19", "2-19", "5-19", "10-19", "2-14", "2-9"]
    assert [cells(line)[0] for line in lines[2:]] == ["middle", "middle and its neighbours", "middle and up"]
    assert {cell for line in lines[2:] for cell in cells(line)[1:]} <= {"adopted", "not"}


@pytest.mark.slow
def test_covers_give_a_sheet_and_a_line_each(bench: Bench, groups: list[Pairs], tmp_path: Path) -> None:
    lines = report_cover(bench, groups, tmp_path / "sheet.png", first_step=18)
    assert len(lines) == 3 + len(COVERS) and lines[0].startswith("Fused from step 18 on.")
    assert cells(lines[-1])[:2] == ["1.00", "4"] and cells(lines[-1])[4] == "-"
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width == (2 + len(COVERS)) * (32 + GAP) and image.height > 4 * (32 + GAP)


@pytest.mark.slow
def test_inversion_gives_both_images_and_a_line_per_step(bench: Bench, groups: list[Pairs], tmp_path: Path) -> None:
    lines = report_inversion_of_targets(bench.model, groups, tmp_path / "sheet.png")
    assert lines[0].startswith("1 targets") and len(lines) == 3 + 20
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width == MARGIN + 32 + GAP and image.height > 2 * (32 + GAP)


def test_tables_are_means_over_the_pairs_with_a_non_empty_region() -> None:
    def target(accepted: bool, outside: float | None) -> Target:
        places = {"inside": 2.0, "outside": outside}
        by_place = {"target_to_base": places, "reference_to_base": {"inside": 4.0, "outside": 3.0}}
        margin = {"target_over_base": 0.5 if accepted else -0.1, "reference_over_base": 1.0}
        statistics = PairStatistics(margin, 0.5, by_place, by_place, by_place, by_place)
        return Target(np.zeros((16, 16, 3), np.uint8), not accepted, accepted, statistics)

    lines = table({"ours": [target(True, 1.0), target(False, 0.5), target(False, None), target(False, None)]})

    assert lines[2:] == [
        "| ours | 4 | 75% | 0.050 | 25% | 0.750 | 2.000 | 0.750 |",
        "| (the reference itself) | 4 | - | 1.000 | - | 3.000 | 4.000 | 3.000 |",
    ]


def command(folder: Path, what: str) -> list[str]:
    """The first lines of what the command prints: of each report, what it is of.

    It gets a folder that is no shapes world, a file of prompts, and a reward that scores pictures of any size.
    """
    tiny_pipeline().save_pretrained(folder / "pipeline")
    (folder / "prompts.json").write_text(json.dumps({"name": "own", "prompts": [{"text": "a big [cat]"}]}))
    arguments = [what, "--pipeline", str(folder / "pipeline"), "--prompts", str(folder / "prompts.json")]
    with redirect_stdout(StringIO()) as printed:
        main(
            [*arguments, "--reward", "shapes-clip", "--out", str(folder / "out"), "--pairs", "1", "--first-step", "18"]
        )
    return [line for line in printed.getvalue().splitlines() if line.endswith(f", {folder}/prompts.json, shapes-clip")]


@pytest.mark.long
def test_the_command_makes_every_report_of_any_pipeline_and_prompts(tmp_path: Path) -> None:
    heads = command(tmp_path, "all")
    assert [line.partition(",")[0] for line in heads] == list(REPORTS)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"ablations-{what}.png" for what in REPORTS}


@pytest.mark.slow
def test_the_command_makes_one_report_alone(tmp_path: Path) -> None:
    assert [line.partition(",")[0] for line in command(tmp_path, "steps")] == ["steps"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["ablations-steps.png"]
