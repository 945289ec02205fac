"""The judge parses prompts and judges held-out renders."""

import numpy as np
import pytest

from dfusion.errors import InvalidInputError, ModelNotFoundError, ShapeMismatchError
from dfusion.shapes.judge import Judge, read_prompt
from dfusion.shapes.prompts import prompt_list
from dfusion.shapes.scenes import TEMPLATES, random_scene, render


def test_below_is_converted_to_above():
    assert read_prompt("the red circle below the blue square") == (
        "position",
        {"colour": "blue", "shape": "square", "relation": "above", "colour2": "red", "shape2": "circle"},
    )


@pytest.mark.parametrize("text", ["a zebra driving a car", "a red star", "", "the red circle above"])
def test_other_prompts_are_rejected(text):
    with pytest.raises(InvalidInputError, match="shapes world"):
        read_prompt(text)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"gone\.safetensors"):
        Judge.load(tmp_path / "gone.safetensors")


def test_other_sizes_are_rejected():
    with pytest.raises(ShapeMismatchError, match="64"):
        Judge.load().accepts(np.zeros((1, 32, 32, 3), np.uint8), ["a red and striped circle"])


@pytest.mark.parametrize("template", TEMPLATES)
def test_accepts_images_of_the_prompt_and_rejects_others(template):
    judge = Judge.load()
    rng = np.random.default_rng(77)
    prompts = prompt_list(template, "test")
    pictures = np.stack([render(random_scene(template, rng, **p.named)) for p in prompts])
    texts = [p.text for p in prompts]
    assert np.mean(judge.accepts(pictures, texts)) >= 0.97  # 40 pictures: at most one missed
    assert not any(judge.accepts(pictures, texts[1:] + texts[:1]))
