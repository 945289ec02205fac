"""Prompts parsed from lines, CSV and the released code's files. Expected values are written by hand."""

from collections.abc import Callable

import pytest

from dfusion.prompts import Prompt
from service.errors import InvalidRequestError
from service.prompt_files import MAX_PROMPTS, from_csv, from_lines, from_released

CAT = Prompt(text="a cat eating a sandwich", items=("cat", "sandwich"))
CAT_WITH_THRESHOLDS = CAT.model_copy(update={"thresholds": (0.03, 0.005)})
DOG = Prompt(text="a dog, eating", items=("dog",))


def pointers(read: Callable[[], object]) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        read()
    return [problem.pointer for problem in caught.value.problems]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_prompts_except_blank_lines_and_comments(end: str) -> None:
    lines = ["# animals", "a [cat]  eating a [sandwich]", "", "  # more", "\t", "a [dog], eating", "a [dog], eating"]
    assert from_lines(end.join(lines)) == (CAT, DOG, DOG)


def test_every_invalid_line_is_reported_by_its_number() -> None:
    text = "# first\na [cat\na [cat]\n\nof in\n" + "a [cat] " + "x" * 500
    assert pointers(lambda: from_lines(text)) == ["/lines/2", "/lines/5", "/lines/6/text"]


@pytest.mark.parametrize("read", [from_lines, from_csv, lambda _: from_released([], None, None)])
def test_a_file_without_prompts_is_an_empty_set(read: Callable[[str], object]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read("text\n" if read is from_csv else "# nothing\n\n")
    assert caught.value.code == "empty_prompt_set"


def test_the_number_of_prompts_is_limited() -> None:
    assert len(from_lines("a cat\n" * MAX_PROMPTS)) == MAX_PROMPTS
    assert pointers(lambda: from_lines("a cat\n" * (MAX_PROMPTS + 1))) == [""]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_cells_hold_items_and_thresholds(end: str) -> None:
    rows = [
        "text,items,thresholds",
        "a cat eating a sandwich,cat; sandwich ,0.03;0.005",
        "",
        '"a dog, eating",dog,',
        "a [cat] eating a [sandwich]",
    ]
    assert from_csv(end.join(rows)) == (CAT_WITH_THRESHOLDS, DOG, CAT)


def test_csv_accepts_columns_in_any_order_and_text_alone() -> None:
    assert from_csv("Thresholds,Text,Items\n0.03;0.005,a cat eating a sandwich,cat;sandwich") == (CAT_WITH_THRESHOLDS,)
    assert from_csv('text\n"a [dog], eating"\n') == (DOG,)


def test_every_invalid_csv_row_is_reported_by_its_first_line() -> None:
    rows = [
        "text,items,thresholds",
        '"a cat',  # 2: two lines that become one
        'eating a sandwich",cat,0.03',
        "a cat,dog,",  # 4: not in the prompt
        "a cat,cat,0.03;0.02",  # 5: more thresholds than items
        "a cat eating a sandwich,cat;sandwich,0.03",  # 6: more items than thresholds
        "a cat,cat,1",  # 7: not within (0, 1)
        "a cat,cat,nan",  # 8
        "a cat,cat,few",  # 9
        "a cat, eating,cat,0.03",  # 10: not quoted
        "a cat,cat;,0.03",  # 11: an empty item
        ",cat,0.03",  # 12: no text
        '"a cat',  # 13: not closed
    ]

    assert pointers(lambda: from_csv("\n".join(rows))) == [
        "/lines/9",
        "/lines/10",
        "/lines/13",
        "/lines/4",
        "/lines/5",
        "/lines/6",
        "/lines/7/thresholds/0",
        "/lines/8/thresholds/0",
        "/lines/11/items/1",
        "/lines/12/text",
    ]


@pytest.mark.parametrize("header", ["prompt,items", "a cat,cat", "text;items", "text,text", "text,seed", ""])
def test_csv_without_a_valid_header_raises(header: str) -> None:
    assert pointers(lambda: from_csv(f"{header}\na cat,cat\n")) == ["/lines/2" if not header else "/lines/1"]


def test_the_released_codes_indices_count_words() -> None:
    """Its template2_item.json has 4 for "a black and woolen bus", although CLIP splits "woolen" into two tokens."""
    bus = "a black and woolen bus"
    cat = "a cat eating a sandwich"
    items = {bus: [4], cat: [1, 4], "another": [0]}

    prompts = from_released([bus, cat, cat], items, {bus: [0.005], cat: [0.03, 0.005]})

    assert prompts == (
        Prompt(text=bus, items=("bus",), thresholds=(0.005,)),
        CAT_WITH_THRESHOLDS,
        CAT_WITH_THRESHOLDS,
    )
    assert from_released([cat], items, None) == (CAT,)
    assert from_released([cat], None, None) == (CAT,)


def test_thresholds_of_the_released_code_require_its_indices() -> None:
    assert pointers(lambda: from_released(["a cat"], None, {"a cat": [0.03]})) == ["/prompt_file/0"]


def test_every_invalid_entry_of_the_released_codes_files_is_reported() -> None:
    prompts = ["a cat", "a dog", "a red dog", "a dog and a dog", "a cow/pig", "a sheep", "no thing and a hen"]
    items = {
        "a cat": [2],  # past the end
        "a dog": [-1],
        "a red dog": [0],  # "a"
        "a dog and a dog": [1],  # which of the two
        "a cow/pig": [0, 1],
        "no thing and a hen": [4],
    }
    thresholds = {text: [0.02] for text in prompts} | {"no thing and a hen": [0.02, 0.03]}

    assert pointers(lambda: from_released(prompts, items, thresholds)) == [
        "/item_idx_file/a cat/0",
        "/item_idx_file/a dog/0",
        "/item_idx_file/a red dog/0",
        "/item_idx_file/a dog and a dog/0",
        "/item_idx_file/a cow~1pig/0",
        "/prompt_file/5",  # no entry
        "/prompt_file/6",  # two thresholds for one item
    ]
