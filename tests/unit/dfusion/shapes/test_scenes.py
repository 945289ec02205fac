"""The renderer is pure and draws the scene."""

import numpy as np
import pytest

from dfusion.shapes.scenes import COLOURS, TEMPLATES, Backdrop, Scene, Thing, item_masks, random_scene, render

GREY = Backdrop("flat", (100, 100, 100), (0, 0, 0), 0.0, 0)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_same_scene_gives_the_same_pixels(template):
    scene = random_scene(template, np.random.default_rng(3))
    assert np.array_equal(render(scene), render(scene))
    assert render(scene).shape == (64, 64, 3)
    assert render(scene).dtype == np.uint8


def test_a_circle_has_the_area_and_colour_of_a_circle():
    picture = render(Scene("attribute", (Thing("circle", "red", radius=16.0),), GREY))
    red = (picture == COLOURS["red"]).all(-1)
    grey = (picture == 100).all(-1)
    assert red[32, 32] and grey[2, 2]
    area = np.pi * 16**2
    edge = 2 * np.pi * 16  # pixels that the outline may mix
    assert area - edge < red.sum() < area + edge


def test_striped_differs_from_plain_inside_only():
    plain = render(Scene("attribute", (Thing("square", "blue", "plain"),), GREY))
    striped = render(Scene("attribute", (Thing("square", "blue", "striped"),), GREY))
    changed = (plain != striped).any(-1)
    assert changed[22:42, 22:42].mean() == pytest.approx(0.5, abs=0.15)
    assert not changed[:12].any()


@pytest.mark.parametrize(
    ("relation", "axis", "first_is_less"),
    [("above", 0, True), ("below", 0, False), ("on the left of", 1, True), ("on the right of", 1, False)],
)
def test_relations_place_things(relation, axis, first_is_less):
    named = {"relation": relation, "colour": "red", "colour2": "blue"}
    picture = render(random_scene("position", np.random.default_rng(0), **named))
    red = np.argwhere((picture == COLOURS["red"]).all(-1)).mean(0)[axis]
    blue = np.argwhere((picture == COLOURS["blue"]).all(-1)).mean(0)[axis]
    assert (red < blue) == first_is_less


@pytest.mark.parametrize(("prop", "row", "column"), [("hat", 14, 32), ("board", 51, 32), ("ball", 36, 52)])
def test_props_are_at_their_positions(prop, row, column):
    thing = Thing("circle", "red", x=32, y=34, radius=14)
    picture = render(Scene("behaviour", (thing,), GREY, prop=prop, prop_colour="yellow"))
    assert tuple(picture[row, column]) == COLOURS["yellow"]


def test_item_masks_cover_the_pixels_of_the_item():
    thing = Thing("circle", "red", x=32, y=34, radius=14)
    prop = {"prop": "ball", "prop_colour": "yellow"}
    picture = render(Scene("behaviour", (thing,), GREY, **prop))
    circle, ball = item_masks(Scene("behaviour", (thing,), GREY, **prop), 64)
    yellow = (picture == COLOURS["yellow"]).all(-1)
    assert (ball[yellow] == 1).all()
    assert circle.sum() == pytest.approx(np.pi * 14**2, rel=0.02)
    assert ball.sum() == pytest.approx(np.pi * (0.68 * 14) ** 2, rel=0.03)


def test_item_masks_are_in_the_order_of_the_prompt():
    scene = random_scene("position", np.random.default_rng(0), relation="below")
    first, second = item_masks(scene, 16)
    rows = np.arange(16)[:, None]
    assert (first * rows).sum() / first.sum() > (second * rows).sum() / second.sum()
