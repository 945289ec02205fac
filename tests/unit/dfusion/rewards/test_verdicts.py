import numpy as np
import pytest

from dfusion.errors import NonFiniteError, ScorerError, ShapeMismatchError
from dfusion.rewards.verdicts import ImageVerdict, VerdictScorer, image_key, win_shares

IMAGES = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)


def test_a_verdict_is_found_by_pixels_and_prompt() -> None:
    keys = [image_key(image, "a cat") for image in IMAGES]
    scorer = VerdictScorer({keys[0]: 1, keys[1]: 0.25}, name="people")
    assert scorer.score(IMAGES[::-1], ["a cat", "a cat"]) == [0.25, 1.0]  # a view with other strides
    with pytest.raises(ScorerError, match=r"people: .* none for images \[1\]"):
        scorer.score(IMAGES, ["a cat", "a dog"])
    with pytest.raises(ShapeMismatchError):
        scorer.score(IMAGES, ["a cat"])


def test_images_of_different_shape_have_different_keys() -> None:
    assert image_key(IMAGES[0], "a") != image_key(IMAGES[0].reshape(6, 4, 3), "a")
    assert len(image_key(IMAGES[0], "a")) == 64


def test_the_version_changes_with_the_verdicts_and_not_with_their_order() -> None:
    version = VerdictScorer({"a": 1.0, "b": 0.0}).version
    assert VerdictScorer({"b": 0.0, "a": 1.0}).version == version
    assert VerdictScorer({"a": 1.0, "b": 0.5}).version != version
    with pytest.raises(NonFiniteError):
        VerdictScorer({"a": float("nan")})


def test_shares_of_wins_by_hand() -> None:
    verdicts = [
        ImageVerdict("a", "b", "first"),
        ImageVerdict("a", "b", "second"),
        ImageVerdict("a", "c", "tie"),
        ImageVerdict("c", "b", "reject"),
    ]
    assert win_shares(verdicts) == {"a": 0.5, "b": pytest.approx(1 / 3), "c": 0.25}
    assert win_shares([]) == {}
