"""Contact sheets: images and labels stand where they belong."""

import numpy as np

from tools.pictures import GAP, LINE, MARGIN, framed, sheet

STEP = 2 * 32 + GAP
"""Pixels from one image to the next: 32 pixels, enlarged twice."""


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8))


def test_without_labels_there_are_images_alone() -> None:
    rows = [pictures(2), pictures(1, seed=1)]
    image = np.asarray(sheet(rows))
    assert image.shape == (2 * STEP, 2 * STEP, 3)
    assert (image[0:64:2, STEP : STEP + 64 : 2] == rows[0][1]).all()
    assert (image[STEP : STEP + 64 : 2, 0:64:2] == rows[1][0]).all()
    assert (image[STEP:, STEP:] == 255).all()


def test_labels_stand_around_the_images() -> None:
    rows = [pictures(4), pictures(4, seed=1)]
    image = np.asarray(
        sheet(rows, columns=["one", "", "three", ""], names=["first", ""], titles=[["left", ""], ["", "right"]])
    )
    assert image.shape == (LINE + 2 * (LINE + STEP), MARGIN + 4 * STEP, 3)

    # column names: above the first and the third column
    dark = image[:LINE].min(axis=(0, 2)) < 128
    columns = [dark[MARGIN + column * STEP :][:STEP].any() for column in range(4)]
    assert columns == [True, False, True, False] and not dark[:MARGIN].any()

    for row, top in enumerate([2 * LINE, 2 * LINE + STEP + LINE]):
        # the name of the first row, and a title above the left group, then above the right one
        assert (image[top : top + STEP, :MARGIN] < 128).any() == (row == 0)
        title = image[top - LINE : top, MARGIN:].min(axis=(0, 2)) < 128
        assert (title[: 2 * STEP].any(), title[2 * STEP :].any()) == (row == 0, row == 1)
        for column, picture in enumerate(rows[row]):
            left = MARGIN + column * STEP
            assert (image[top : top + 64 : 2, left : left + 64 : 2] == picture).all()


def test_long_names_take_several_lines() -> None:
    image = np.asarray(sheet([pictures(1)], columns=["several words"]))
    assert image.shape == (2 * LINE + STEP, STEP, 3)
    assert (image[:LINE] < 128).any() and (image[LINE : 2 * LINE] < 128).any()


def test_frames_are_green_or_red_and_leave_the_middle() -> None:
    picture = pictures(1)[0]
    good = framed(picture, True)
    assert good[0, 0].tolist() == [0, 200, 0] and framed(picture, False)[-1, -1].tolist() == [230, 0, 0]
    assert (good[2:-2, 2:-2] == picture[2:-2, 2:-2]).all() and (picture[0, 0] != good[0, 0]).any()
