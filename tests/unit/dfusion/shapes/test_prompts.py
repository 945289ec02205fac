"""The six prompt lists."""

import json
from pathlib import Path

import pytest

import dfusion.prompts
from dfusion.shapes.prompts import prompt_list, write_lists
from dfusion.shapes.scenes import TEMPLATES


@pytest.mark.parametrize("template", TEMPLATES)
def test_lists_have_forty_distinct_prompts_and_are_disjoint(template):
    train = [p.text for p in prompt_list(template, "train")]
    held_out = [p.text for p in prompt_list(template, "test")]
    assert len(train) == len(held_out) == 40
    assert len({*train, *held_out}) == 80


def test_shipped_lists_are_those_of_the_code(tmp_path):
    write_lists(tmp_path)
    shipped = Path(dfusion.prompts.__file__).parent
    for file in tmp_path.iterdir():
        assert json.loads(file.read_text()) == json.loads((shipped / file.name).read_text())
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("template", TEMPLATES)
def test_items_are_words_for_objects_in_the_image(template):
    for prompt in prompt_list(template, "train"):
        assert len(prompt.items) == len(prompt.thresholds)
        assert set(prompt.items) <= {*prompt.named.values()}
