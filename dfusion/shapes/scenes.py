"""Scenes of the shapes world, and how to render them. An image is a pure function of its scene.

A scene describes everything in the image. A prompt names some of its parts (shape, colour, texture, prop, relation).
The others (background, position, size, tilt) are sampled independently, so two images of one prompt differ in much that
the prompt does not name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
SUPERSAMPLING = 3

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (224, 32, 36),
    "green": (30, 168, 62),
    "blue": (36, 72, 226),
    "yellow": (248, 214, 40),
    "purple": (158, 44, 190),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
TEXTURES = ("plain", "striped", "dotted", "checkered")
PROPS: dict[str, str] = {"hat": "wearing", "board": "riding", "ball": "carrying"}
"""Each prop with its verb in prompts."""
RELATIONS = ("above", "below", "on the left of", "on the right of")
MIRRORED = {
    "above": "below",
    "below": "above",
    "on the left of": "on the right of",
    "on the right of": "on the left of",
}
Ink = int | tuple[int, int, int]
"""A fill colour of a greyscale or an RGB image."""
Template = Literal["behaviour", "attribute", "position"]
TEMPLATES: tuple[Template, ...] = ("behaviour", "attribute", "position")


@dataclass(frozen=True)
class Thing:
    """One object: the parts that a prompt may name, and its position (in pixels; `tilt` in radians)."""

    shape: str
    colour: str
    texture: str = "plain"
    x: float = 32.0
    y: float = 32.0
    radius: float = 15.0
    tilt: float = 0.0


@dataclass(frozen=True)
class Backdrop:
    """A background of two tones, muted so that an object of any colour is visible."""

    kind: Literal["flat", "gradient", "noise"]
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """One image. `relation` is the position of the first object relative to the second; `prop` belongs to the first."""

    template: Template
    things: tuple[Thing, ...]
    backdrop: Backdrop
    prop: str | None = None
    prop_colour: str | None = None
    relation: str | None = None


def random_backdrop(rng: np.random.Generator) -> Backdrop:
    """A muted two-tone background."""

    def tone() -> tuple[int, int, int]:
        grey = rng.uniform(35, 180)
        tint = rng.uniform(-45, 45, size=3)
        r, g, b = np.clip(grey + tint, 0, 255).astype(int)
        return int(r), int(g), int(b)

    kind: Literal["flat", "gradient", "noise"] = ("flat", "gradient", "noise")[int(rng.integers(3))]
    return Backdrop(kind, tone(), tone(), float(rng.uniform(0, 2 * math.pi)), int(rng.integers(2**31)))


def random_scene(template: Template, rng: np.random.Generator, **named: str) -> Scene:
    """A random scene of `template`. `named` fixes the parts that a prompt names; `rng` gives everything else.

    Names: shape, colour, texture, prop, prop_colour, relation, and shape2, colour2 for the second object.
    """

    def pick(name: str, options: tuple[str, ...], without: str | None = None) -> str:
        choice = options[int(rng.integers(len(options)))]
        while choice == without:
            choice = options[int(rng.integers(len(options)))]
        return named.get(name, choice)

    # the first object and the background
    colours = tuple(COLOURS)
    shape = pick("shape", SHAPES)
    colour = pick("colour", colours)
    tilt = float(rng.uniform(-0.18, 0.18))
    backdrop = random_backdrop(rng)

    if template == "attribute":
        place: dict[str, Any] = {
            "x": 32 + rng.uniform(-4, 4),
            "y": 32 + rng.uniform(-4, 4),
            "radius": rng.uniform(15, 19),
        }
        return Scene(template, (Thing(shape, colour, pick("texture", TEXTURES), tilt=tilt, **place),), backdrop)

    if template == "behaviour":
        prop = pick("prop", tuple(PROPS))
        prop_colour = pick("prop_colour", colours, without=colour)
        place = {"x": 29 + rng.uniform(-3, 3), "y": 33 + rng.uniform(-2, 2), "radius": rng.uniform(12, 14)}
        return Scene(template, (Thing(shape, colour, tilt=tilt, **place),), backdrop, prop, prop_colour)

    # the second object and the positions of both
    relation = pick("relation", RELATIONS)
    shape2 = pick("shape2", SHAPES, without=shape)
    colour2 = pick("colour2", colours, without=colour)
    near = 17 + rng.uniform(-1.5, 1.5)
    far = 47 + rng.uniform(-1.5, 1.5)
    if relation in ("below", "on the right of"):
        near, far = far, near
    across = rng.uniform(-2.5, 2.5, size=2) + 32
    radii = rng.uniform(11, 12.5, size=2)
    vertical = relation in ("above", "below")
    places = [(across[0], near), (across[1], far)] if vertical else [(near, across[0]), (far, across[1])]
    tilts = (tilt, float(rng.uniform(-0.18, 0.18)))
    looks = ((shape, colour), (shape2, colour2))

    things = tuple(
        Thing(s, c, x=float(p[0]), y=float(p[1]), radius=float(r), tilt=t)
        for (s, c), p, r, t in zip(looks, places, radii, tilts, strict=True)
    )
    return Scene(template, things, backdrop, relation=relation)


def _turned(points: list[tuple[float, float]], thing: Thing) -> list[tuple[float, float]]:
    """The points of the unit circle at the object's tilt, size and position, in pixels of the canvas."""
    cos = math.cos(thing.tilt)
    sin = math.sin(thing.tilt)
    k = SUPERSAMPLING
    r = thing.radius
    return [((thing.x + r * (px * cos - py * sin)) * k, (thing.y + r * (px * sin + py * cos)) * k) for px, py in points]


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corner points of a shape in the unit circle, y downwards."""
    if shape == "circle":
        turns = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        return [(math.cos(a), math.sin(a)) for a in turns]

    if shape == "square":
        return [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]

    if shape == "triangle":
        return [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]

    if shape == "star":
        radii = [1.1, 0.46] * 5
        return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5) + 0.06) for i, r in enumerate(radii)]

    if shape == "heart":
        turns = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        return [
            (
                math.sin(a) ** 3 * 1.02,
                -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 15.5 - 0.08,
            )
            for a in turns
        ]

    w = 0.36  # half the width of the cross's arms
    return [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]


def backdrop_pixels(backdrop: Backdrop) -> np.ndarray:
    """The background's pixels (64, 64, 3) float32, in [0, 255] before rounding."""
    first = np.array(backdrop.first, np.float32)
    second = np.array(backdrop.second, np.float32)

    if backdrop.kind == "flat":
        share = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    elif backdrop.kind == "gradient":
        ys, xs = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] / (IMAGE_SIZE - 1) - 0.5
        share = (0.5 + 0.7 * (xs * math.cos(backdrop.angle) + ys * math.sin(backdrop.angle))).clip(0, 1)
    else:
        coarse = np.random.default_rng(backdrop.seed).random((6, 6), np.float32)
        blotches = Image.fromarray(coarse)
        share = np.asarray(blotches.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)).clip(0, 1)

    return first + (second - first) * share[..., None]


def _paint(thing: Thing) -> np.ndarray:
    """The object's surface over the whole canvas: colour and texture."""
    size = IMAGE_SIZE * SUPERSAMPLING
    colour = np.array(COLOURS[thing.colour], np.float32)
    dark = colour * 0.22

    # coordinates of each pixel in the object's own frame
    ys, xs = (np.mgrid[0:size, 0:size] + 0.5) / SUPERSAMPLING
    u = (xs - thing.x) * math.cos(thing.tilt) + (ys - thing.y) * math.sin(thing.tilt)
    v = -(xs - thing.x) * math.sin(thing.tilt) + (ys - thing.y) * math.cos(thing.tilt)

    if thing.texture == "striped":
        marked = (v / 8 + 0.25) % 1 < 0.5
    elif thing.texture == "dotted":
        marked = (((u / 9 + 0.5) % 1 - 0.5) ** 2 + ((v / 9 + 0.5) % 1 - 0.5) ** 2) < 0.29**2
    else:
        marked = ((u // 6.5) + (v // 6.5)) % 2 == 0
    return np.where(marked[..., None], dark, colour)


def _draw_thing(canvas: Image.Image, thing: Thing) -> None:
    corners = _turned(_outline(thing.shape), thing)
    if thing.texture == "plain":
        ImageDraw.Draw(canvas).polygon(corners, fill=COLOURS[thing.colour])
        return
    mask = Image.new("L", canvas.size)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    canvas.paste(Image.fromarray(_paint(thing).astype(np.uint8)), mask=mask)


def _draw_prop(canvas: Image.Image, scene: Scene, colour: Ink, wheels: Ink) -> None:
    """Draw the prop of the first object: a hat on top, a board with wheels below, or a ball on the right."""
    owner = scene.things[0]
    draw = ImageDraw.Draw(canvas)
    x = owner.x * SUPERSAMPLING
    y = owner.y * SUPERSAMPLING
    r = owner.radius * SUPERSAMPLING

    if scene.prop == "hat":
        brim = y - 0.72 * r
        draw.rectangle((x - 1.0 * r, brim - 0.3 * r, x + 1.0 * r, brim), fill=colour)
        draw.rectangle((x - 0.62 * r, brim - 1.2 * r, x + 0.62 * r, brim - 0.3 * r), fill=colour)
    elif scene.prop == "board":
        top = y + 1.02 * r
        draw.rounded_rectangle((x - 1.35 * r, top, x + 1.35 * r, top + 0.5 * r), 0.2 * r, fill=colour)
        for side in (-0.8, 0.8):
            cx = x + side * r
            cy = top + 0.66 * r
            draw.ellipse((cx - 0.24 * r, cy - 0.24 * r, cx + 0.24 * r, cy + 0.24 * r), fill=wheels)
    else:
        cx = x + 1.4 * r
        cy = y + 0.15 * r
        rb = 0.68 * r
        draw.ellipse((cx - rb, cy - rb, cx + rb, cy + rb), fill=colour)


def render(scene: Scene) -> np.ndarray:
    """Render `scene` as (64, 64, 3) uint8 RGB. The same scene always gives the same pixels."""
    pixels = backdrop_pixels(scene.backdrop).clip(0, 255).astype(np.uint8)
    size = IMAGE_SIZE * SUPERSAMPLING
    canvas = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
    for thing in scene.things:
        _draw_thing(canvas, thing)
    if scene.prop is not None:
        _draw_prop(canvas, scene, COLOURS[scene.prop_colour or "white"], (15, 15, 15))
    return np.asarray(canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def item_masks(scene: Scene, size: int) -> np.ndarray:
    """The share of each cell that each item covers, (K, size, size) float32.

    Items are in the prompt's order: the objects, then the prop. `size` must divide 64.
    """
    full = (IMAGE_SIZE * SUPERSAMPLING,) * 2
    canvases = []
    for thing in scene.things:
        canvas = Image.new("L", full)
        ImageDraw.Draw(canvas).polygon(_turned(_outline(thing.shape), thing), fill=255)
        canvases.append(canvas)
    if scene.prop is not None:
        canvas = Image.new("L", full)
        _draw_prop(canvas, scene, 255, 255)
        canvases.append(canvas)

    return np.stack(
        [np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255 for canvas in canvases]
    )
