"""Scaled and tinted copies of stored images."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

_MAX_PIXELS = 64_000_000
_TINT = (255, 0, 144)
_MAX_OPACITY = 0.7


class UnreadableImageError(ValueError):
    """The file is no image, or too large to be scaled."""


def thumbnail(path: Path, size: int) -> bytes:
    """The image as WebP, at most `size` pixels wide and high. Raises UnreadableImageError."""
    image = _open(path)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return _encoded(image, "WEBP", quality=85, method=2)


def overlay(path: Path) -> bytes:
    """A mask as a PNG that is coloured where the mask is white, and transparent where it is black.

    Raises UnreadableImageError.
    """
    mask = _open(path).convert("L")
    image = Image.new("RGBA", mask.size, (*_TINT, 0))
    image.putalpha(mask.point(lambda value: round(value * _MAX_OPACITY)))
    return _encoded(image, "PNG")


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path, formats=["PNG"])
        if image.width * image.height > _MAX_PIXELS:
            raise UnreadableImageError(f"expected at most {_MAX_PIXELS} pixels, got {image.width} x {image.height}")
        image.load()
    except (OSError, Image.DecompressionBombError) as error:
        raise UnreadableImageError("expected a PNG file") from error
    return image


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
