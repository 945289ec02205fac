"""How often a reward agrees with labelled pairs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dfusion.errors import NonFiniteError, ScorerError
from dfusion.labelled_pairs import LabelledPair
from dfusion.rewards.agreement import agreement, as_json, main
from tests.scorers import Brightness, Constant


def picture(grey: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(first: int, second: int, label: float | None, **changes: Any) -> LabelledPair:
    return LabelledPair("mine", "a cat", (picture(first), picture(second, **changes)), label)


PAIRS = [
    pair(200, 100, 1),  # the brighter image is preferred
    pair(100, 200, 0),
    pair(200, 100, 1, size=(4, 6)),
    pair(100, 200, 1),
    pair(100, 100, 0),
    pair(100, 200, 0.5),
    pair(100, 200, None),
]


def test_agreement_counts_pairs_with_a_preferred_image() -> None:
    result = agreement(Brightness(), PAIRS)
    assert (result.scorer, result.version) == ("brightness", "1")
    assert (result.agrees.count, result.agrees.total) == (3, 5)
    assert (result.equal, result.ties, result.unlabelled) == (1, 1, 1)
    assert as_json(result)["rate"] == 0.6
    low, high = as_json(result)["interval"]
    assert low == pytest.approx(0.2307, abs=1e-4) and high == pytest.approx(0.8824, abs=1e-4)  # Wilson's, 3 of 5


def test_a_scorer_that_scores_all_images_the_same_agrees_with_nobody() -> None:
    result = agreement(Constant(), PAIRS)
    assert (result.agrees.count, result.agrees.total, result.equal) == (0, 5, 5)


def test_ties_alone_have_no_rate() -> None:
    assert as_json(agreement(Brightness(), PAIRS[5:])) == {
        "scorer": "brightness",
        "version": "1",
        "pairs": 0,
        "agrees": 0,
        "equal": 0,
        "rate": None,
        "interval": None,
        "ties": 1,
        "unlabelled": 1,
    }


class Broken:
    name = "broken"
    version = "1"

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    def score(self, _images: np.ndarray, _prompts: Sequence[str]) -> list[float]:
        return self.scores


def test_a_scorer_that_fails_is_an_error_and_no_disagreement() -> None:
    with pytest.raises(ScorerError, match="expected 2 scores"):
        agreement(Broken([1.0]), PAIRS)
    with pytest.raises(NonFiniteError):
        agreement(Broken([1.0, float("nan")]), PAIRS)


def test_an_image_in_several_pairs_is_scored_once_and_memory_is_bounded() -> None:
    calls: list[int] = []

    class Counting(Brightness):
        def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
            calls.append(len(images))
            return super().score(images, prompts)

    many = [pair(n, n + 1, 0) for n in range(100)]
    result = agreement(Counting(), [*many, many[-1], many[-1]])
    assert (result.agrees.count, len(calls)) == (102, 100)


def test_the_program_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "picks.parquet"
    rows = [
        {"jpg_0": picture(200), "jpg_1": picture(9), "label_0": float(n), "label_1": 1.0 - n, "caption": "a"}
        for n in (1, 1, 0)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    installed = {"bright": "tests.scorers:Brightness"}
    main([str(path), "--scorer", "bright"], installed)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["scorer"], printed["agrees"], printed["pairs"]) == ("bright", 2, 3)
    main([str(path), "--scorer", "bright", "--limit", "2"], installed)
    assert json.loads(capsys.readouterr().out)["rate"] == 1

    with pytest.raises(SystemExit, match=r"none.parquet, got none"):
        main([str(tmp_path / "none.parquet"), "--scorer", "bright"], installed)
    with pytest.raises(SystemExit):
        main([str(path), "--scorer", "bright", "--limit", "0"], installed)
    assert "--limit: expected 1 or more, got 0" in capsys.readouterr().err
