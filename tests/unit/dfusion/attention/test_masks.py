import pytest
import torch

from dfusion.attention.masks import item_weights, merge_masks, normalise_items, resize_mask
from dfusion.errors import InvalidInputError, ShapeMismatchError


def test_item_index_counts_after_bos_and_several_tokens_are_averaged() -> None:
    weights = item_weights((((0,), (1, 3)), ((2,),)), num_tokens=5)
    attention = torch.tensor([[[10.0, 1, 2, 3, 4]], [[10.0, 1, 2, 3, 4]]])
    assert (attention @ weights).tolist() == [[[1.0, 3.0]], [[3.0, 0.0]]]


@pytest.mark.parametrize(("merge", "expected"), [("xor", [[0, 1], [1, 0]]), ("or", [[0, 1], [1, 1]])])
def test_two_items(merge: str, expected: list[list[int]]) -> None:
    maps = torch.tensor([[0.1, 0.1], [0.3, 0.1], [0.1, 0.5], [0.9, 0.9]]).reshape(1, 2, 2, 2)
    assert merge_masks(maps, [[0.3, 0.5]], merge).int().tolist() == [expected]  # a map equal to its threshold counts


def test_three_items_are_merged_one_after_another() -> None:
    maps = torch.ones(1, 1, 1, 3)
    assert merge_masks(maps, [[0.5, 0.5, 0.5]], "xor").item() is True  # 1 xor 1 xor 1


def test_thresholds_are_per_sample_and_padding_is_ignored() -> None:
    maps = torch.full((2, 1, 1, 2), 0.4)
    assert merge_masks(maps, [[0.3], [0.5]]).flatten().tolist() == [True, False]
    with pytest.raises(ShapeMismatchError):
        merge_masks(maps, [[0.1, 0.2, 0.3], [0.1]])
    with pytest.raises(ShapeMismatchError):
        merge_masks(maps, [[0.1]])


def test_resize_keeps_height_and_width_apart() -> None:
    mask = torch.tensor([[[True, False, True]]])
    assert resize_mask(mask, (2, 6)).int().tolist() == [[[1, 1, 0, 0, 1, 1]] * 2]


def test_resize_takes_the_nearest_pixel() -> None:
    """From three columns to two: column x comes from floor(1.5 x), that is from 0 and 1. A mean would fill both."""
    mask = torch.tensor([[[True, False, True]]])
    assert resize_mask(mask, (1, 2)).int().tolist() == [[[1, 0]]]


@pytest.mark.parametrize("items", [[[]], [[()]], [[-1]], [[4]], [[(0, 4)]]])
def test_items_outside_the_prompt_are_rejected(items: list[list[object]]) -> None:
    with pytest.raises(InvalidInputError):
        normalise_items(items, num_tokens=5)
