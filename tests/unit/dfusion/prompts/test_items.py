import pytest

from dfusion.errors import PromptItemsError
from dfusion.prompts.items import find_items, parse_marked


@pytest.mark.parametrize(
    ("text", "plain", "items"),
    [
        ("a [cat] eating a [sandwich]", "a cat eating a sandwich", ("cat", "sandwich")),
        ("a [ red  mat ]", "a red mat", ("red mat",)),
        ("[cat]", "cat", ("cat",)),
        ("a [cat] chasing a [Cat]", "a cat chasing a Cat", ("cat",)),
        ("a cat", "a cat", ()),
        ("", "", ()),
    ],
)
def test_marked_items(text: str, plain: str, items: tuple[str, ...]) -> None:
    assert parse_marked(text) == (plain, items)


@pytest.mark.parametrize(
    ("text", "problem", "position"),
    [
        ("a [cat", "unclosed", 6),
        ("a cat]", "unmatched closing", 5),
        ("a [big [cat]]", "nested", 7),
        ("a [] cat", "empty", 3),
        ("a [  ] cat", "empty", 5),
        ("]cat[", "unmatched closing", 0),
    ],
)
def test_unpaired_brackets_are_rejected(text: str, problem: str, position: int) -> None:
    with pytest.raises(PromptItemsError, match=rf"{problem}.* at character {position} "):
        parse_marked(text)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a black and woolen bus", ["bus"]),
        ("a teddy bear riding a red bike", ["bear", "bike"]),
        ("cat and dog", ["cat", "dog"]),
        ("a running dog", ["dog"]),
        ("the man is running", ["man"]),
        ("a cat sits on the mat", ["cat", "mat"]),
        ("a red car parked in front of a house", ["car", "house"]),
        ("a photo of an astronaut riding a horse on Mars", ["astronaut", "horse", "Mars"]),
        ("a painting on the wall", ["painting", "wall"]),
        ("an oil painting of a castle", ["castle"]),
        ("a tall building on top of a hill", ["building", "hill"]),
        ("an orange on a plate", ["orange", "plate"]),
        ("an orange cat", ["cat"]),
        ("an orange and white cat", ["cat"]),
        ("a dog's bowl", ["bowl"]),
        ("a man in a t-shirt, smiling happily, 4k, highly detailed", ["man", "t-shirt"]),
        ("a cup of coffee", ["cup", "coffee"]),
        ("a pair of shoes", ["shoes"]),
        ("two cats and a cat", ["cats", "cat"]),
        ("A CAT chasing a cat", ["CAT"]),
        ("a seed in a bed", ["seed", "bed"]),
        ("a butterfly", ["butterfly"]),
    ],
)
def test_nouns_are_detected(text: str, items: list[str]) -> None:
    assert list(find_items(text)) == items


@pytest.mark.parametrize("text", ["", "in the", "very slowly running", "highly detailed, 4k"])
def test_prompts_without_a_noun_are_rejected(text: str) -> None:
    with pytest.raises(PromptItemsError, match="names a thing"):
        find_items(text)
