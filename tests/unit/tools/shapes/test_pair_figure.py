"""The README's picture shows base, reference, target and mask in that order."""

import numpy as np
import torch

from dfusion.rounds import Rollout, RoundPair
from tools.shapes.pair_figure import GAP, HEAD, HEADS, SIDE, row


def sample(grey: int) -> Rollout:
    return Rollout(None, np.full((64, 64, 3), grey, np.uint8), 0.0)  # type: ignore[arg-type]


def test_columns_are_in_the_order_of_their_heads() -> None:
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    pair = RoundPair("a star", reference=sample(80), base=sample(40), target=sample(120), adopted=True, mask=mask)
    picture = row(pair)
    assert picture.size == (4 * SIDE + 3 * GAP, HEAD + SIDE)

    def pixel(column: int, x: int) -> tuple[int, ...]:
        value = picture.getpixel((column * (SIDE + GAP) + x, HEAD + SIDE // 2))
        assert isinstance(value, tuple)
        return value

    assert [name for name, _ in HEADS] == ["base", "reference", "target", "mask"]
    assert [pixel(column, SIDE // 2)[0] for column in range(3)] == [40, 80, 120]
    assert pixel(3, SIDE // 4) == (0, 0, 0) and pixel(3, 3 * SIDE // 4) == (255, 255, 255)
