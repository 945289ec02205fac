"""The captions that the shapes world's models are trained on, and their tokenizer."""

import numpy as np

from dfusion.shapes.prompts import named_parts
from dfusion.shapes.scenes import random_scene
from tools.shapes.captions import WRONG_SHARE, new_tokenizer, words, wrong_parts


def test_every_word_is_one_token():
    tokenizer = new_tokenizer()
    for word in words():
        assert len(tokenizer(word).input_ids) == 3, word  # BOS, the word, EOS


def test_end_of_text_has_the_largest_id_where_open_clip_looks_for_it():
    tokenizer = new_tokenizer()
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    ids = tokenizer("a red star", padding="max_length", max_length=16).input_ids
    assert ids.index(max(ids)) == 4


def test_wrong_words_occur_at_the_stated_rate():
    rng = np.random.default_rng(0)
    named = named_parts(random_scene("attribute", rng))
    wrong_captions = [wrong_parts("attribute", named, rng) for _ in range(2000)]
    share = np.mean([parts["colour"] != named["colour"] for parts in wrong_captions])
    deviation = np.sqrt(WRONG_SHARE["colour"] * (1 - WRONG_SHARE["colour"]) / len(wrong_captions))
    assert abs(share - WRONG_SHARE["colour"]) < 4 * deviation
    assert all(parts["shape"] == named["shape"] for parts in wrong_captions)
