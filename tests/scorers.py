"""Scorers for tests, registered by the setting DFUSION_SCORERS. They import no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Brightness:
    """The image's mean brightness in [0, 1]: differs from image to image, whatever the net."""

    name = "brightness"
    version = "1"

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        assert len(images) == len(prompts)
        return [float(image.mean()) / 255 for image in images]


class LostDevice:
    """Fails as torch does when the GPU has failed under it."""

    name = "lost-device"
    version = "1"

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        raise RuntimeError(f"CUDA error: an illegal memory access was encountered, {len(images)} of {len(prompts)}")


class Constant:
    """The same for all images: no pair can be made."""

    name = "constant"
    version = "1"

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        assert len(images) == len(prompts)
        return [0.5] * len(images)


class Rising:
    """Brightness, and 1 more for every batch that it has scored: its mean rises whatever the images."""

    name = "rising"
    version = "1"
    slope = 1.0

    def __init__(self) -> None:
        self.calls = 0

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        self.calls += 1
        return [self.slope * self.calls + value for value in Brightness().score(images, prompts)]


class Falling(Rising):
    """The same the other way."""

    name = "falling"
    slope = -1.0
