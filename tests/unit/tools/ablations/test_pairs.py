"""Pairs for ablations: any model and prompts, chosen by the reward."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dfusion.catalogue import MODELS
from dfusion.errors import InvalidInputError, NonFiniteError
from dfusion.models import DiffusionModel
from dfusion.pairing import choose_pairs
from dfusion.prompts import Prompt, builtin_lists
from dfusion.thresholds import thresholds_of
from tests.nets import tiny_model, tiny_xl_model
from tests.scorers import Brightness, Constant
from tools.ablations.pairs import Bench, find_pairs, judge_for

PROMPTS = [Prompt(text="a red [circle]"), Prompt(text="a blue [star]", thresholds=(0.03,))]


class Broken(Brightness):
    def score(self, images: np.ndarray, prompts: object) -> list[float]:  # noqa: ARG002
        return [float("nan")] * len(images)


@pytest.mark.parametrize("make", [tiny_model, tiny_xl_model])
@pytest.mark.slow
def test_pairs_are_those_of_a_round(make: object) -> None:
    """16 samples of each prompt, seeds 7 to 22 and 1007 to 1022; the first four of the 8 pairs by the reward.

    The second prompt is not sampled if the first gives enough.
    """
    model = make()  # type: ignore[operator]
    bench = Bench(model, Brightness())
    groups = find_pairs(bench, PROMPTS, 8, seed=7)

    assert [pairs.prompt for pairs in groups] == ["a red circle", "a blue star"]

    for number, pairs in enumerate(groups):
        assert len(pairs) == 4
        assert set(pairs.base.seeds + pairs.reference.seeds) <= set(range(7 + 1000 * number, 23 + 1000 * number))
        pictures = np.concatenate([pairs.base_pictures, pairs.reference_pictures])
        assert np.array_equal(pictures[:4], model.decode(pairs.base.final))
        scores = Brightness().score(pictures, [""] * 8)
        assert pairs.base_scores + pairs.reference_scores == tuple(scores)
        assert all(better > worse for better, worse in zip(scores[4:], scores[:4], strict=True))

    assert groups[1].thresholds == (0.03,)
    assert [pairs.prompt for pairs in find_pairs(bench, PROMPTS, 4, seed=7)] == ["a red circle"]


@pytest.mark.slow
def test_the_best_is_paired_with_the_worst_and_thresholds_use_all_samples() -> None:
    model = tiny_model()
    [pairs] = find_pairs(Bench(model, Brightness()), PROMPTS[:1], 4, seed=7)
    pair = pairs.single(2)
    assert (len(pair), pair.base.seeds, pair.base_scores) == (1, pairs.base.seeds[2:3], pairs.base_scores[2:3])
    assert pairs.base_scores[0] == min(pairs.base_scores)
    assert pairs.reference_scores[0] == max(pairs.reference_scores)
    assert len(pairs.thresholds) == 1 and pairs.thresholds != thresholds_of(pairs.reference)  # not of the four alone
    assert len(choose_pairs(list(range(16)))) == 8


@pytest.mark.slow
def test_equal_or_broken_rewards_are_errors() -> None:
    bench = Bench(tiny_model(), Constant())
    with pytest.raises(InvalidInputError, match="constant"):
        find_pairs(bench, PROMPTS, 4, seed=7)
    with pytest.raises(NonFiniteError):
        find_pairs(replace(bench, scorer=Broken()), PROMPTS, 4, seed=7)


def test_the_judge_applies_to_the_shapes_world_only() -> None:
    shapes = DiffusionModel.load(MODELS["shapes"].folder)
    known = builtin_lists()["shapes-attribute-test"].prompts
    assert judge_for(shapes, known) is not None
    assert judge_for(shapes, [*known, Prompt(text="a [cat]")]) is None
    assert judge_for(tiny_model(), known) is None  # 16 x 16 pixels
