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
        # every preposition ends a phrase
        ("a lamp underneath a shelf amid the books", ["lamp", "shelf", "books"]),
        ("a kite above the sand", ["kite", "sand"]),
        # materials
        ("a robot built from scrap metal", ["robot", "metal"]),
        ("a vase made out of glass", ["vase", "glass"]),
        ("a spoon made of gold on a plate", ["spoon", "gold", "plate"]),
        # medium and style of the image
        ("portrait of a man, digital painting by Greg Rutkowski, trending on artstation, 8k", ["man"]),
        ("a photograph of a portrait of a queen", ["queen"]),
        ("a fox in watercolor style. ink wash.", ["fox"]),
        ("a house in the style of Van Gogh", ["house"]),
        ("a wall with a painting of a ship", ["wall", "painting", "ship"]),
        ("a watercolor painting", ["painting"]),
        ("a queen, oil on canvas", ["queen"]),
        # written text
        ("a shop with the word 'OPEN' over the door", ["shop", "door"]),
        ("a mug that says Best Dad", ["mug"]),
        ("graffiti spelling BE KIND on a train", ["graffiti", "train"]),
        ("a dog's ball and the dogs' bowl", ["ball", "bowl"]),
        # what is absent
        ("a street without any cars or people", ["street"]),
        ("a man with no hat and a dog", ["man", "dog"]),
        # places and times, unless there is nothing else
        ("a dog on a beach at sunset", ["dog"]),
        ("a beach at sunset", ["beach"]),
        ("a beach with a dog", ["beach", "dog"]),
        ("a sunset", ["sunset"]),
        # positions
        ("a cake with a cherry on top", ["cake", "cherry"]),
        ("the top of a bottle", ["bottle"]),
        ("a bottle top", ["top"]),
        # verbs
        ("A bird gives a worm to its chick", ["bird", "worm", "chick"]),
        ("a man watches the moon", ["man", "moon"]),
        ("two gold watches", ["watches"]),
        ("two dogs fight over a bone", ["dogs", "bone"]),
        ("a fight between dogs", ["fight", "dogs"]),
        ("a boy with balloons that look like planets", ["boy", "balloons", "planets"]),
        ("stars seen through a window", ["stars", "window"]),
        ("yellow leaves", ["leaves"]),
        ("a truck with a dog in its flatbed", ["truck", "dog", "flatbed"]),
        # names with digits
        ("a blue 1977 Ford F-150", ["F-150"]),
    ],
)
def test_nouns_are_detected(text: str, items: list[str]) -> None:
    assert list(find_items(text)) == items


@pytest.mark.parametrize("text", ["", "in the", "very slowly running", "highly detailed, 4k"])
def test_prompts_without_a_noun_are_rejected(text: str) -> None:
    with pytest.raises(PromptItemsError, match="names a thing"):
        find_items(text)


def test_a_tagger_replaces_the_rules_for_parts_of_speech() -> None:
    tags = {"the": "DET", "old": "NOUN", "man": "VERB", "boat": "NOUN", "a": "DET"}
    assert find_items("the old man a boat", lambda words: [tags[word] for word in words]) == ("old", "boat")
    assert find_items("the old man a boat") == ("man", "boat")
