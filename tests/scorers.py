"""Scorers for tests, registered by the setting DFUSION_SCORERS. They import no torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class Brightness:
    """Mean brightness in [0, 1], which differs between images of any net."""

    name = "brightness"
    version = "1"

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        assert len(images) == len(prompts)
        return [float(image.mean()) / 255 for image in images]


class LostDevice:
    """Raises the error of torch after a GPU failure."""

    name = "lost-device"
    version = "1"

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        raise RuntimeError(f"CUDA error: an illegal memory access was encountered, {len(images)} of {len(prompts)}")


class Constant:
    """Constant scores, from which no pairs can be selected."""

    name = "constant"
    version = "1"

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        assert len(images) == len(prompts)
        return [0.5] * len(images)


class Partial:
    """Brightness, but None for each image of the prompt about a star."""

    name = "partial"
    version = "1"

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float | None]:
        scores = Brightness().score(images, prompts)
        return [None if "star" in prompt else score for score, prompt in zip(scores, prompts, strict=True)]


class Hanging:
    """Brightness. The fourth batch never ends, once until the file `hung` in the data folder is removed."""

    name = "hanging"
    version = "1"

    def __init__(self) -> None:
        self.calls = 0

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        marker = Path(os.environ["DFUSION_DATA_DIR"]) / "hung"
        self.calls = 0 if marker.exists() else self.calls + 1
        if self.calls == 4:
            marker.touch()
            threading.Event().wait()
        return Brightness().score(images, prompts)


class Aborting:
    """Aborts the process, as a fault in native code does."""

    name = "aborting"
    version = "1"

    def score(self, _images: np.ndarray, _prompts: Sequence[str]) -> list[float]:
        os.abort()


class Rising:
    """Brightness plus the number of batches scored before, so that the mean rises with any images."""

    name = "rising"
    version = "1"
    slope = 1.0

    def __init__(self) -> None:
        self.calls = 0

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        self.calls += 1
        return [self.slope * self.calls + value for value in Brightness().score(images, prompts)]


class Falling(Rising):
    """Like `Rising`, but the mean falls."""

    name = "falling"
    slope = -1.0
