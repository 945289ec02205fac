import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from dfusion.errors import InvalidInputError, NonFiniteError, ShapeMismatchError
from dfusion.evaluation import (
    Bootstrap,
    Counts,
    ScoreRow,
    ScoreTable,
    compare,
    summarise,
)


def table(values: Sequence[object], models: tuple[str, ...] = ("base", "tuned")) -> ScoreTable:
    """A table of one scorer from values (M, P, S)."""
    array = np.asarray(values, np.float64)[..., None]
    prompts, seeds = array.shape[1:3]
    names = tuple(f"p{i}" for i in range(prompts))
    return ScoreTable(models, names, tuple(tuple(range(seeds)) for _ in names), ("clip",), array)


def test_means_by_hand() -> None:
    base, tuned = summarise(table([[[1, 3], [5, 7]], [[2, 2], [10, 30]]]))
    assert (base.model, base.scorer, base.overall.mean, base.overall.count) == ("base", "clip", 4.0, 4)
    assert (tuned.overall.mean, tuned.prompts["p1"].mean, tuned.prompts["p1"].count) == (11.0, 20.0, 2)
    assert tuned.prompts["p0"].interval == (2.0, 2.0)


def test_the_interval_is_that_of_all_resamples() -> None:
    values = np.array([0.0, 1.0, 5.0])
    means = np.sort([np.mean(resample) for resample in product(values, repeat=3)])  # all 27, equally likely
    for confidence in (0.95, 0.8, 0.6):
        tail = (1 - confidence) / 2
        # the least mean that at least `tail` of the resamples do not exceed, and the greatest likewise
        expected = means[math.ceil(27 * tail) - 1], means[-math.ceil(27 * tail)]
        assert Bootstrap(confidence).interval(values) == pytest.approx(expected)


def test_the_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = Bootstrap().interval(values) or (0, 0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_intervals_are_reproducible_and_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=9)
    first = Bootstrap(seed=1, resamples=200).interval(values)
    assert Bootstrap(seed=2, resamples=200).interval(values) != first
    monkeypatch.setattr("dfusion.evaluation._CHUNK", 100)  # in chunks: the same
    assert Bootstrap(seed=1, resamples=200).interval(values) == first


def test_prompts_are_resampled_not_images() -> None:
    # Two prompts, a hundred equal images each: by prompt, a quarter of the resamples hold one prompt only.
    overall = summarise(table([[[0.0] * 100, [1.0] * 100]], models=("one",)))[0].overall
    assert overall.interval == (0.0, 1.0)


def test_trainings_and_prompts_are_resampled_independently() -> None:
    values = np.array([[0.0, 1.0, 5.0], [2.0, 4.0, 9.0]])
    means = np.sort(  # all 4 x 27 resamples, equally likely
        [
            values[np.ix_(rows, columns)].mean()
            for rows in product(range(2), repeat=2)
            for columns in product(range(3), repeat=3)
        ]
    )
    for confidence in (0.95, 0.8):
        tail = (1 - confidence) / 2
        expected = means[math.ceil(108 * tail) - 1], means[-math.ceil(108 * tail)]
        assert Bootstrap(confidence, resamples=100_000).crossed_interval(values) == pytest.approx(expected)


def test_a_single_training_leaves_the_prompts_to_resample() -> None:
    values = np.random.default_rng(0).normal(size=(1, 400))
    half = 1.96 * values.std() / 20
    expected = pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert Bootstrap().crossed_interval(values) == expected
    assert Bootstrap().crossed_interval(values.T) == expected
    assert Bootstrap().crossed_interval(np.ones((1, 1))) is None


def test_trainings_that_disagree_widen_the_interval() -> None:
    # Three trainings 1 apart, equal on all prompts: the interval is that of the trainings alone, 0 and 2 at its ends.
    values = np.repeat([[0.0], [1.0], [2.0]], 50, axis=1)
    assert Bootstrap().crossed_interval(values) == pytest.approx((0.0, 2.0))
    assert Bootstrap(seed=1).crossed_interval(values) == pytest.approx((0.0, 2.0))


def test_one_value_has_no_interval() -> None:
    (summary,) = summarise(table([[[0.5]]], models=("one",)))
    assert summary.overall.interval is None and summary.prompts["p0"].interval is None


def test_the_difference_is_paired() -> None:
    # Prompts and seeds differ by far more than the models do; pairing takes that away.
    base = np.random.default_rng(0).normal(scale=10, size=(6, 4))
    comparison = compare(table(np.stack([base, base + 0.25])), "tuned", "base", "clip")
    assert comparison.difference.mean == pytest.approx(0.25)
    assert comparison.difference.interval == pytest.approx((0.25, 0.25))
    assert (comparison.prompts, comparison.images) == (Counts(6, 0, 0), Counts(24, 0, 0))
    reverse = compare(table(np.stack([base, base + 0.25])), "base", "tuned", "clip")
    assert reverse.difference.mean == pytest.approx(-0.25) and reverse.images == Counts(0, 24, 0)


def test_counts_of_wins_by_hand() -> None:
    comparison = compare(table([[[1, 1], [2, 2], [3, 3]], [[2, 1], [0, 3], [3, 3]]]), "tuned", "base", "clip")
    assert comparison.images == Counts(better=2, worse=1, equal=3)
    assert comparison.prompts == Counts(better=1, worse=1, equal=1)
    assert comparison.difference.mean == pytest.approx(0.0)


def test_the_sign_test_by_hand() -> None:
    assert Counts(5, 1, 3).chance == Counts(1, 5, 0).chance == 2 * (1 + 6) / 64
    assert Counts(10, 0, 0).chance == 2 / 1024
    assert Counts(3, 3, 0).chance == Counts(0, 0, 4).chance == 1.0
    assert 0 < Counts(700, 580, 0).chance < 0.001  # z = 3.35


@pytest.mark.parametrize(("better", "worse"), [(500, 501), (700, 580), (1400, 100), (0, 1001), (0, 100_000)])
def test_the_sign_test_of_many_decisions(better: int, worse: int) -> None:
    decided = better + worse
    tail = sum(math.comb(decided, k) for k in range(min(better, worse) + 1))
    assert Counts(better, worse, 0).chance == pytest.approx(float(min(1, 2 * Fraction(tail, 2**decided))), rel=1e-9)


def test_lists_are_summarised_separately() -> None:
    score_table = table([[[1, 1], [2, 2], [6, 6]]], models=("one",))
    trained, unseen = (summarise(score_table.of_prompts(prompts)) for prompts in (["p0"], ["p2", "p1"]))
    assert (trained[0].overall.mean, unseen[0].overall.mean) == (1.0, 4.0)
    assert list(unseen[0].prompts) == ["p2", "p1"] and unseen[0].prompts["p2"].mean == 6.0


def rows(*left_out: tuple[str, str, int, str]) -> list[ScoreRow]:
    """Two models, two prompts with different seeds, two scorers; values count up."""
    seeds = {"a cat": (11, 12), "a dog": (21, 22)}
    keys = [
        (model, prompt, seed, scorer)
        for seed_of in (0, 1)
        for prompt in seeds
        for model in ("base", "tuned")
        for scorer in ("clip@1", "judge@1")
        for seed in [seeds[prompt][seed_of]]
    ]
    return [ScoreRow(*key, float(i)) for i, key in enumerate(keys) if key not in left_out]


def test_rows_are_placed_in_the_table() -> None:
    score_table = ScoreTable.from_rows(rows())
    assert (score_table.models, score_table.prompts, score_table.scorers) == (
        ("base", "tuned"),
        ("a cat", "a dog"),
        ("clip@1", "judge@1"),
    )
    assert score_table.seeds == ((11, 12), (21, 22))

    for row in rows():
        prompt = score_table.prompts.index(row.prompt)
        place = prompt, score_table.seeds[prompt].index(row.seed)
        assert score_table.scores(row.model, row.scorer)[place] == row.value


def test_every_model_needs_the_same_images() -> None:
    with pytest.raises(InvalidInputError, match=r"\('tuned', 'a dog', 22, 'clip@1'\)"):
        ScoreTable.from_rows(rows(("tuned", "a dog", 22, "clip@1")))
    with pytest.raises(InvalidInputError, match="got two"):
        ScoreTable.from_rows([*rows(), rows()[3]])
    with pytest.raises(InvalidInputError, match="at least one"):
        ScoreTable.from_rows([])
    with pytest.raises(InvalidInputError, match=r"same number of seeds.*\[1, 2\]"):
        ScoreTable.from_rows([ScoreRow("m", p, s, "c", 0.0) for p, s in (("a", 1), ("a", 2), ("b", 1))])
    with pytest.raises(NonFiniteError):
        ScoreTable.from_rows([ScoreRow("m", "a", 1, "c", math.nan)])


def test_inconsistent_tables_are_rejected() -> None:
    values = np.zeros((1, 1, 2, 1))
    for models, prompts, seeds in (((), ("a",), ((1, 2),)), (("m",), ("a", "a"), ((1, 2),) * 2), (("m",), ("a",), ())):
        with pytest.raises(InvalidInputError):
            ScoreTable(models, prompts, seeds, ("c",), values)
    with pytest.raises(ShapeMismatchError, match="values"):
        ScoreTable(("m",), ("a",), ((1, 2, 3),), ("c",), values)
    with pytest.raises(InvalidInputError, match="seeds"):
        ScoreTable(("m",), ("a",), ((),), ("c",), np.zeros((1, 1, 0, 1)))


def test_unknown_names_and_invalid_settings_are_rejected() -> None:
    score_table = table([[[1.0, 2.0]], [[1.0, 2.0]]])
    for model, baseline, scorer in (("x", "base", "clip"), ("base", "x", "clip"), ("tuned", "base", "x")):
        with pytest.raises(InvalidInputError, match="'x'"):
            compare(score_table, model, baseline, scorer)
    with pytest.raises(InvalidInputError, match="a model other than"):
        compare(score_table, "base", "base", "clip")
    with pytest.raises(InvalidInputError, match="'p9'"):
        score_table.of_prompts(["p9"])
    for settings in ({"confidence": 1.0}, {"resamples": 0}, {"seed": -1}):
        with pytest.raises(InvalidInputError):
            Bootstrap(**settings)  # type: ignore[arg-type]
