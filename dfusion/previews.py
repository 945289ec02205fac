"""Small images of a stored trajectory: its latents decoded at several steps, and the masks of its items by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from dfusion.attention.masks import merge_masks
from dfusion.config import FusionConfig
from dfusion.errors import InvalidInputError
from dfusion.pair_metrics import fusion_mask
from dfusion.types import Trajectory

MAX_TILES = 16
MAX_TILE_PIXELS = 256
"""The largest side of a decoded tile."""
MAX_MASK_PIXELS = 64
"""The largest side of a mask."""
Decode = Callable[[torch.Tensor], np.ndarray]
"""Images (B, H, W, 3) uint8 of latents (B, C, h, w), as `DiffusionModel.decode`."""


def preview_steps(num_steps: int) -> tuple[int, ...]:
    """The states of a trajectory of T steps that a preview shows, from 0 (x_T) to T (the clean latent).

    All T + 1 states if there are at most `MAX_TILES`. Otherwise `MAX_TILES` evenly spaced ones, the first and the last
    included; halves are rounded up.
    """
    if num_steps < MAX_TILES:
        return tuple(range(num_steps + 1))
    gaps = MAX_TILES - 1
    return tuple((2 * tile * num_steps + gaps) // (2 * gaps) for tile in range(MAX_TILES))


def denoising_strip(trajectory: Trajectory, steps: Sequence[int], decode: Decode) -> np.ndarray:
    """The states of a sample at `steps`, decoded, as one image with tiles from left to right.

    Args:
        trajectory: A trajectory of one sample.
        steps: States from 0 to T.
        decode: Decodes one state at a time.

    Returns:
        (H, len(steps) * W, 3) uint8, with H and W at most `MAX_TILE_PIXELS`.
    """
    tiles = [_scaled(decode(trajectory.latents[:, step])[0]) for step in steps]
    return np.concatenate(tiles, axis=1)


def _scaled(image: np.ndarray) -> np.ndarray:
    """The image, (H, W, 3) uint8, reduced to at most `MAX_TILE_PIXELS`."""
    size = _reduced(image.shape[0], image.shape[1], MAX_TILE_PIXELS)
    if size == image.shape[:2]:
        return image
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    smaller = functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0]
    return smaller.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def mask_grid(
    reference: Trajectory, thresholds: Sequence[float], config: FusionConfig, steps: Sequence[int]
) -> np.ndarray:
    """The masks of a reference by item and step (Eq. 4), as one grey image.

    Rows are the items, then the merged mask. Columns are `steps`, then the mean over the fused steps, as in
    `dfusion.pair_metrics.fusion_mask`. A mask belongs to the step from its state. The last state, after which there is
    no step, has the mask of the last step.

    Args:
        reference: A trajectory of one sample with item maps.
        thresholds: A threshold for each item.
        config: The fusion: merge, and fused steps.
        steps: States from 0 to T.

    Returns:
        ((K + 1) * H, (len(steps) + 1) * W) uint8 with 255 inside a mask, and H and W at most `MAX_MASK_PIXELS`.

    Raises:
        InvalidInputError: No item maps, no fused step, or a number of thresholds that is not that of the items.
    """
    if reference.item_maps is None:
        raise InvalidInputError("reference: expected item_maps, got None; give `items` when sampling the reference")

    # 1. the merged mask, which also checks the arguments
    merged = _mask_row(reference, thresholds, config, steps)

    # 2. each item alone, as a reference with one item
    rows = []
    for item, threshold in enumerate(thresholds):
        maps = reference.item_maps[..., item : item + 1]
        alone = replace(reference, item_maps=maps, items=None)
        rows.append(_mask_row(alone, [threshold], config, steps))
    return np.concatenate([*rows, merged])


def _mask_row(
    reference: Trajectory, thresholds: Sequence[float], config: FusionConfig, steps: Sequence[int]
) -> np.ndarray:
    """The masks at `steps`, then their mean over the fused steps, from left to right: (H, (len(steps) + 1) * W)."""
    mean = fusion_mask(reference, thresholds, config)
    last = len(reference.timesteps) - 1
    maps = reference.item_maps[0, [min(step, last) for step in steps]]  # type: ignore[index]  # fusion_mask requires it
    masks = merge_masks(maps, [thresholds] * len(steps), config.merge).float()

    tiles = torch.cat([masks, mean[None]])[:, None]
    size = _reduced(tiles.shape[2], tiles.shape[3], MAX_MASK_PIXELS)
    smaller = functional.interpolate(tiles, size=size, mode="nearest")[:, 0]
    return (smaller * 255).round().to(torch.uint8).permute(1, 0, 2).flatten(1).numpy()


def _reduced(height: int, width: int, limit: int) -> tuple[int, int]:
    """A size with the same proportions and sides of at most `limit`."""
    longest = max(height, width)
    if longest <= limit:
        return height, width
    return max(1, round(height * limit / longest)), max(1, round(width * limit / longest))
