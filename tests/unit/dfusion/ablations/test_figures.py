"""The ablations' pictures and tables, on a random pipeline and a judge that accepts every second picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfusion.ablations.figures import (
    GAP,
    HEADER,
    MARGIN,
    Pairs,
    Target,
    find_pairs,
    labelled,
    report_inversion_of_targets,
    report_variants,
    table,
)
from dfusion.config import FusionConfig
from dfusion.errors import InvalidInputError
from dfusion.figures import PairFigures
from dfusion.models import DiffusionModel
from dfusion.shapes.prompts import prompt_list
from tests.nets import tiny_model


class EverySecond:
    """Accepts the first, third, ... of the pictures that it is shown at once."""

    def accepts(self, images: np.ndarray, prompts: Sequence[str]) -> list[bool]:
        assert len(images) == len(prompts)
        return [i % 2 == 0 for i in range(len(images))]


class Never:
    def accepts(self, images: np.ndarray, _prompts: Sequence[str]) -> list[bool]:
        return [False] * len(images)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return tiny_model()


@pytest.fixture(scope="module")
def found(model: DiffusionModel) -> list[Pairs]:
    return find_pairs(model, EverySecond(), "attribute", 4, seed=1)


def test_pairs_are_of_rejected_bases_and_accepted_references(found: list[Pairs]) -> None:
    """16 samples with seeds 1 to 16 of the first prompt, every second accepted; the first four rejected are bases."""
    (pairs,) = found
    assert pairs.base.seeds == (2, 4, 6, 8) and pairs.reference.seeds == (1, 3, 5, 7)
    assert pairs.base_pictures.shape == (4, 16, 16, 3) and pairs.first().base.seeds == (2,)


def test_a_prompt_without_pairs_is_an_error(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    one = prompt_list("attribute", "train")[:1]
    monkeypatch.setattr("dfusion.ablations.figures.prompt_list", lambda *_: one)
    with pytest.raises(InvalidInputError, match="attribute"):
        find_pairs(model, Never(), "attribute", 4, seed=1)


def test_variants_give_a_sheet_and_a_table(model: DiffusionModel, found: list[Pairs], tmp_path: Path) -> None:
    variants = {"masked_kv": FusionConfig(first_step=18), "kv": FusionConfig(first_step=18, control="kv")}
    lines = report_variants(model, EverySecond(), found, tmp_path / "sheet.png", variants)
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| masked_kv", "4", "50%"],
        ["| kv", "4", "50%"],
        ["| (the reference itself)", "4", "100%"],
    ]
    with Image.open(tmp_path / "sheet.png") as image:  # base, reference and two targets of four pairs
        assert image.size == (4 * (32 + GAP), HEADER + 4 * (32 + GAP))


def test_inversion_gives_both_pictures_and_a_line_a_step(
    model: DiffusionModel, found: list[Pairs], tmp_path: Path
) -> None:
    lines = report_inversion_of_targets(model, found, tmp_path / "sheet.png")
    assert lines[0].startswith("1 targets") and len(lines) == 3 + 20
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (MARGIN + 32 + GAP, HEADER + 2 * (32 + GAP))


def test_tables_are_means_over_the_pairs_that_have_such_a_place() -> None:
    def target(accepted: bool, outside: float | None) -> Target:
        places = {"inside": 2.0, "outside": outside}
        by_place = {"target_to_base": places, "reference_to_base": {"inside": 4.0, "outside": 3.0}}
        figures = PairFigures({}, 0.5, by_place, by_place, by_place, by_place)
        return Target(np.zeros((16, 16, 3), np.uint8), accepted, figures)

    lines = table({"ours": [target(True, 1.0), target(False, 0.5), target(False, None), target(False, None)]})
    assert lines[2:] == [
        "| ours | 4 | 25% | 0.750 | 2.000 | 0.750 |",
        "| (the reference itself) | 4 | 100% | 3.000 | 4.000 | 3.000 |",
    ]


def test_labels_leave_the_pictures_as_they_are() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = np.asarray(labelled([[picture]], ["a_long_name of a column"], ["row"]))
    assert (image[HEADER : HEADER + 32 : 2, MARGIN : MARGIN + 32 : 2] == picture).all()
    assert (image[:HEADER] < 128).any() and (image[HEADER:, :MARGIN] < 128).any()
