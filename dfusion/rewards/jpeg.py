"""The size of an image as JPEG, the reward of DDPO (Black et al., arXiv 2305.13301): needs no model.

A small file means a simple image. Use it to test a training: the reward rises without limit, and images change visibly.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dfusion.rewards.checks import check_images


class JpegScorer:
    """The negative size in kB ("compressible"), or the size ("incompressible"). The prompt does not count."""

    def __init__(self, *, name: str = "jpeg", prefer: str = "compressible", quality: int = 95) -> None:
        self.name = name
        self.version = f"pillow-{prefer}-{quality}"
        self._sign = -1 if prefer == "compressible" else 1
        self._quality = quality

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """The score of each image (B, H, W, 3) uint8. Raises ShapeMismatchError."""
        check_images(images, prompts)
        return [self._sign * self._size(image) / 1000 for image in images]

    def _size(self, image: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=self._quality)
        return len(buffer.getvalue())
