"""The paper's prompt lists (tables 4, 5, 6), and what a prompt may be. Expected values are typed from the paper."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from dfusion.errors import InvalidInputError
from dfusion.prompts import Prompt, builtin_lists, read_prompts
from dfusion.prompts.items import find_items

LISTS = builtin_lists()
TEMPLATES = ("behaviour", "attribute", "position")
TRAINED = [f"paper-{template}-train" for template in TEMPLATES]
UNSEEN = [f"paper-{template}-test" for template in TEMPLATES]
COLOURS = {"red", "green", "blue", "yellow", "black", "white"}
MATERIALS = {"woolen", "plastic", "metallic", "glass", "marble", "stone", "wooden", "leather", "fabric"}
ANIMALS = set(
    "cat dog horse monkey rabbit zebra sheep deer cow goat lion tiger bear raccoon fox wolf lizard shark whale "
    "dolphin".split()
)


def test_240_distinct_prompts_in_six_lists_of_forty() -> None:
    assert [len(LISTS[name].prompts) for name in TRAINED + UNSEEN] == [40] * 6
    assert len({prompt.text for name in TRAINED + UNSEEN for prompt in LISTS[name].prompts}) == 240


@pytest.mark.parametrize(("template", "items"), [("behaviour", 2), ("attribute", 1), ("position", 2)])
def test_training_prompts_have_a_threshold_an_item_and_unseen_ones_none(template: str, items: int) -> None:
    for prompt in LISTS[f"paper-{template}-train"].prompts:
        assert prompt.thresholds is not None and len(prompt.items) == len(prompt.thresholds) == items
        assert set(prompt.thresholds) <= {0.005, 0.01, 0.015, 0.02, 0.025, 0.03}
    for prompt in LISTS[f"paper-{template}-test"].prompts:
        assert prompt.thresholds is None and len(prompt.items) == items


@pytest.mark.parametrize(
    ("name", "text", "items", "thresholds"),
    [
        ("paper-behaviour-train", "a cat eating a sandwich", ("cat", "sandwich"), (0.03, 0.005)),
        ("paper-behaviour-train", "a horse playing basketball", ("horse", "basketball"), (0.03, 0.02)),
        ("paper-behaviour-train", "a whale driving a car", ("whale", "car"), (0.03, 0.01)),
        ("paper-behaviour-test", "a cat playing basketball", ("cat", "basketball"), None),
        ("paper-behaviour-test", "a dolphin washing dishes", ("dolphin", "dishes"), None),
        ("paper-attribute-train", "a black and woolen bus", ("bus",), (0.005,)),
        ("paper-attribute-train", "a black and stone sculpture", ("sculpture",), (0.025,)),
        ("paper-attribute-train", "a black and glass dog", ("dog",), (0.015,)),
        ("paper-attribute-train", "a green and glass sword", ("sword",), (0.03,)),
        ("paper-attribute-test", "a red and leather car", ("car",), None),
        ("paper-position-train", "the umbrella above the table", ("umbrella", "table"), (0.03, 0.01)),
        ("paper-position-train", "the engine above the wheel", ("engine", "wheel"), (0.005, 0.01)),
        ("paper-position-train", "the computer below the counter", ("computer", "counter"), (0.01, 0.005)),
        ("paper-position-train", "the dog on the left of the person", ("dog", "person"), (0.02, 0.005)),
        ("paper-position-train", "the person on the left of the bear", ("person", "bear"), (0.01, 0.03)),
        ("paper-position-test", "the bed on the left of the chair", ("bed", "chair"), None),
    ],
)
def test_rows_of_the_tables(name: str, text: str, items: tuple[str, ...], thresholds: tuple[float, ...] | None) -> None:
    (prompt,) = [prompt for prompt in LISTS[name].prompts if prompt.text == text]
    assert (prompt.items, prompt.thresholds) == (items, thresholds)


def test_table_4_is_twenty_animals_with_two_activities_each() -> None:
    thresholds = {"eating a sandwich": (0.03, 0.005), "driving a car": (0.03, 0.01), "playing basketball": (0.03, 0.02)}
    animals = []
    for prompt in LISTS["paper-behaviour-train"].prompts:
        _, animal, activity = prompt.text.split(" ", 2)
        assert prompt.thresholds == thresholds[activity]
        animals.append(animal)
    assert set(animals) == ANIMALS and all(animals.count(animal) == 2 for animal in ANIMALS)
    further = {"washing dishes", "riding a bike", "playing chess"}
    assert {p.text.split(" ", 2)[2] for p in LISTS["paper-behaviour-test"].prompts} == further | set(thresholds)


def test_table_5_has_six_colours_and_nine_materials() -> None:
    matches = [
        re.fullmatch(r"a (\w+) and (\w+) \w+", prompt.text)
        for name in ("paper-attribute-train", "paper-attribute-test")
        for prompt in LISTS[name].prompts
    ]
    assert {match and match[1] for match in matches} == COLOURS
    assert {match and match[2] for match in matches} == MATERIALS


def test_table_6_has_four_predicates() -> None:
    for name in ("paper-position-train", "paper-position-test"):
        for prompt in LISTS[name].prompts:
            match = re.fullmatch(r"the (\w+) (above|below|on the left of|on the right of) the (\w+)", prompt.text)
            assert match is not None and prompt.items == (match[1], match[3])


@pytest.mark.parametrize("name", [name for name in sorted(LISTS) if "numbers" not in name])
def test_detected_items_equal_those_of_the_lists(name: str) -> None:
    """Except for numbers: the item of `the number "47"` is 47, and not a noun."""
    assert [find_items(prompt.text) for prompt in LISTS[name].prompts] == [p.items for p in LISTS[name].prompts]


def test_all_rows_equal_the_reviewed_ones() -> None:
    """The 240 texts and 120 rows of thresholds were compared with the paper by a program; this is their hash."""
    names = sorted(TRAINED + UNSEEN)
    rows = [[name, prompt.text, prompt.items, prompt.thresholds] for name in names for prompt in LISTS[name].prompts]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == "a73130bdb1d9a84c6175246923a9b385bf3bc3d039652dab04ac7dc0f2bd6650"


def test_prompts_are_read_from_lists_and_files(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"name": "own", "prompts": [{"text": "a [cat]"}]}))
    (tmp_path / "lines.txt").write_text("\ufeffa [cat] on a [sofa]\r\n\n  a dog  \n", "utf-8")
    assert read_prompts("paper-attribute-test") == LISTS["paper-attribute-test"].prompts
    assert read_prompts(str(tmp_path / "own.json")) == (Prompt(text="a [cat]"),)
    assert read_prompts(str(tmp_path / "lines.txt")) == (Prompt(text="a [cat] on a [sofa]"), Prompt(text="a dog"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("none.txt", None), ("empty.txt", b" \n"), ("bad.json", b"{"), ("list.json", b"[]"), ("latin.txt", b"caf\xe9")],
)
def test_invalid_prompt_lists_are_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError, match=name):
        read_prompts(str(tmp_path / name))
