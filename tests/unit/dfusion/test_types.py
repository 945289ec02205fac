from dataclasses import replace

import pytest
import torch

from dfusion.config import SamplingConfig
from dfusion.errors import InvalidInputError, ShapeMismatchError
from dfusion.types import Conditioning, Trajectory


def numbered(rows: int, xl: bool = True) -> Conditioning:
    """Row i holds the number i everywhere."""
    row = torch.arange(rows, dtype=torch.float32)
    embeds = row[:, None, None].expand(rows, 3, 2)
    return (
        Conditioning(embeds, row[:, None].expand(rows, 4), row[:, None].expand(rows, 6)) if xl else Conditioning(embeds)
    )


def rows_of(conditioning: Conditioning) -> list[list[float]]:
    """The number of each row, by each part."""
    return [part.flatten(1)[:, 0].tolist() for part in conditioning.tensors]


def test_a_plain_tensor_is_the_conditioning_of_sd() -> None:
    embeds = torch.randn(2, 3, 4)
    plain = Conditioning.of(embeds)
    assert plain.embeds is embeds and plain.pooled is None and plain.time_ids is None and len(plain) == 2
    assert Conditioning.of(plain) is plain


@pytest.mark.parametrize("xl", [False, True])
def test_rows_are_chosen_in_all_parts(xl: bool) -> None:
    parts = 3 if xl else 1
    conditioning = numbered(3, xl)
    assert rows_of(conditioning[[2, 0, 2]]) == [[2, 0, 2]] * parts
    assert rows_of(conditioning[1]) == [[1]] * parts
    assert rows_of(conditioning[1:]) == [[1, 2]] * parts
    assert [rows_of(row) for row in conditioning] == [[[n]] * parts for n in range(3)]
    assert rows_of(Conditioning.cat([conditioning[2], conditioning])) == [[2, 0, 1, 2]] * parts
    assert rows_of(conditioning[1].expand(3)) == rows_of(conditioning[1].expand(3, -1, -1)) == [[1, 1, 1]] * parts


def test_equal_means_all_parts() -> None:
    conditioning = numbered(2)
    assert conditioning[0].equals(conditioning[[0]]) and not conditioning[0].equals(conditioning[1])
    other_pool = Conditioning(conditioning.embeds, conditioning.pooled + 1, conditioning.time_ids)
    assert not conditioning.equals(other_pool)
    assert not conditioning.equals(Conditioning(conditioning.embeds))


def test_parts_that_do_not_fit_are_named() -> None:
    embeds, pooled, sizes = numbered(2).tensors
    with pytest.raises(ShapeMismatchError, match="prompt_embeds"):
        Conditioning(embeds[0])
    with pytest.raises(InvalidInputError, match="time_ids"):
        Conditioning(embeds, pooled)
    with pytest.raises(ShapeMismatchError, match="pooled"):
        Conditioning(embeds, pooled[:1], sizes)
    with pytest.raises(ShapeMismatchError, match="one model"):
        Conditioning.cat([numbered(1), numbered(1, xl=False)])


def _trajectory(seeds: tuple[int, ...], items: int) -> Trajectory:
    batch = len(seeds)
    return Trajectory(
        torch.full((batch, 3, 4, 2, 2), float(seeds[0])),
        torch.tensor([501, 1]),
        torch.zeros(batch, 2),
        seeds,
        SamplingConfig(num_steps=2),
        torch.full((batch, 2, 1, 1, items), 0.5),
        tuple(tuple((k,) for k in range(items)) for _ in seeds),
    )


def test_different_parts_are_not_concatenated() -> None:
    with_items = _trajectory((1,), items=1)
    with pytest.raises(InvalidInputError, match="at least one"):
        Trajectory.cat([])
    for other in (
        replace(with_items, config=SamplingConfig(num_steps=2, eta=0.5)),
        replace(with_items, mask_source="resolution"),
        replace(with_items, timesteps=torch.tensor([500, 1])),
    ):
        with pytest.raises(InvalidInputError, match="expected"):
            Trajectory.cat([with_items, other])
    with pytest.raises(ShapeMismatchError):
        Trajectory.cat([with_items, replace(with_items, latents=torch.zeros(1, 3, 4, 4, 4))])


def test_texts_stay_with_their_rows() -> None:
    with_texts = replace(numbered(3), texts=("a", "b", "c"))
    assert (
        with_texts[[2, 0]].texts == ("c", "a") and with_texts[1].texts == ("b",) and with_texts[1:].texts == ("b", "c")
    )
    assert with_texts[0].expand(2, -1, -1).texts == ("a", "a")
    assert Conditioning.cat([with_texts, with_texts[:1]]).texts == ("a", "b", "c", "a")
    assert Conditioning.cat([with_texts, numbered(1)]).texts is None
    with pytest.raises(ShapeMismatchError, match="texts"):
        replace(numbered(2), texts=("a",))


def test_concatenated_rows_keep_their_order_and_maps_have_the_largest_k() -> None:
    joined = Trajectory.cat([_trajectory((1, 2), items=1), _trajectory((3,), items=2)])
    assert joined.seeds == (1, 2, 3)
    assert joined.latents[:, 0, 0, 0, 0].tolist() == [1.0, 1.0, 3.0]
    assert joined.items == (((0,),), ((0,),), ((0,), (1,)))
    assert joined.item_maps is not None
    assert joined.item_maps[:, 0, 0, 0].tolist() == [[0.5, 0.0], [0.5, 0.0], [0.5, 0.5]]
