"""The six prompt lists, the captions and the tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest

import dfusion.prompts
from dfusion.shapes.captions import WRONG_SHARE, new_tokenizer, words, wrong_parts
from dfusion.shapes.prompts import named_parts, prompt_list, write_lists
from dfusion.shapes.scenes import TEMPLATES, random_scene


@pytest.mark.parametrize("template", TEMPLATES)
def test_lists_hold_forty_distinct_prompts_and_do_not_meet(template):
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
def test_an_item_is_a_word_that_the_picture_shows(template):
    for prompt in prompt_list(template, "train"):
        assert len(prompt.items) == len(prompt.thresholds)
        assert set(prompt.items) <= {*prompt.named.values()}


def test_every_word_is_one_token():
    tokenizer = new_tokenizer()
    for word in words():
        assert len(tokenizer(word).input_ids) == 3, word  # BOS, the word, EOS


def test_end_of_text_has_the_largest_id_where_open_clip_looks_for_it():
    tokenizer = new_tokenizer()
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    ids = tokenizer("a red star", padding="max_length", max_length=16).input_ids
    assert ids.index(max(ids)) == 4


def test_wrong_words_come_at_the_stated_share():
    rng = np.random.default_rng(0)
    named = named_parts(random_scene("attribute", rng))
    drawn = [wrong_parts("attribute", named, rng) for _ in range(2000)]
    share = np.mean([parts["colour"] != named["colour"] for parts in drawn])
    deviation = np.sqrt(WRONG_SHARE["colour"] * (1 - WRONG_SHARE["colour"]) / len(drawn))
    assert abs(share - WRONG_SHARE["colour"]) < 4 * deviation
    assert all(parts["shape"] == named["shape"] for parts in drawn)
