"""The template of numbers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

import dfusion.prompts
from dfusion.shapes.numbers import digit_boxes, number_prompts, random_number, render_number, write_lists
from dfusion.shapes.scenes import Backdrop


def test_lists_have_forty_distinct_prompts_and_are_disjoint() -> None:
    train = [prompt.text for prompt in number_prompts("train")]
    held_out = [prompt.text for prompt in number_prompts("test")]
    assert len(train) == len(held_out) == 40
    assert len({*train, *held_out}) == 80


def test_shipped_lists_are_those_of_the_code(tmp_path: Path) -> None:
    write_lists(tmp_path)
    shipped = Path(dfusion.prompts.__file__).parent
    names = [file.name for file in sorted(tmp_path.iterdir())]
    assert names == ["shapes-numbers-test.json", "shapes-numbers-train.json"]
    for name in names:
        assert json.loads((tmp_path / name).read_text()) == json.loads((shipped / name).read_text())


def test_a_prompts_item_is_its_number() -> None:
    [prompt] = number_prompts("train")[:1]
    assert prompt.text == f'the number "{prompt.number}"' and prompt.items == (prompt.number,)


def test_digit_boxes_contain_the_ink_of_their_digit() -> None:
    black = Backdrop("flat", (0, 0, 0), (0, 0, 0), 0.0, 0)
    scene = replace(random_number(np.random.default_rng(1), "88"), colour="white", backdrop=black)
    first, second = digit_boxes(scene, 64)
    ink = render_number(scene)[..., 0] > 0
    assert ink.sum() > 400
    assert not (ink & (first + second == 0)).any()
    assert abs(int(ink[first > 0].sum()) - int(ink[second > 0].sum())) < 40  # two equal digits

    assert digit_boxes(scene, 16).shape == (2, 16, 16)
    assert abs(digit_boxes(scene, 16).mean() - np.stack([first, second]).mean()) < 1 / 255  # images of 8 bits
