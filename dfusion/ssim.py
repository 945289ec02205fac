"""Structural similarity of images under weights."""

from __future__ import annotations

import torch
from torch.nn import functional

_RADIUS = 5
_SIGMA = 1.5
_C1 = (0.01 * 255) ** 2
_C2 = (0.03 * 255) ** 2
_TILE = 32
"""Side of a tile. With its border of `_RADIUS` pixels, all that is computed from it fits into the cache of a core."""
_CPU_TILES = 8
_GPU_TILES = 256
"""Tiles in one operation: the memory does not grow with the images."""


@torch.no_grad()
def ssim(bases: torch.Tensor, others: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Structural similarity of S images to each base, weighted by R weights per pixel.

    Wang et al. 2004: Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, mean of the channels. The
    weights also apply within a window, so a pixel with weight 0 has no influence. With all weights 1 this is the usual
    index, with windows cut off at the image's edges.

    The window is applied to tiles by two matrix products, which is several times faster than a convolution on a CPU.
    The moments are float64: in float32, flat regions lose more than four digits to cancellation.

    Args:
        bases: (B, C, H, W) uint8.
        others: (B, S, C, H, W) uint8.
        weights: (B, R, H, W) float in [0, 1].

    Returns:
        (B, S, R) float64 in [-1, 1]. NaN where all weights are 0.
    """
    # 1. the tiles in which a pixel counts
    images = _tiles(torch.cat([bases[:, None], others], 1))
    weight_tiles = _tiles(weights)
    occupied = (_without_border(weight_tiles).amax((-1, -2)) > 0).nonzero()

    # 2. the weighted sums of their pixels' similarities, (B, R, S)
    window = _window(weights.device)
    sums = torch.zeros(*weights.shape[:2], others.shape[1], dtype=torch.float64, device=weights.device)
    for batch in occupied.split(_CPU_TILES if weights.device.type == "cpu" else _GPU_TILES):
        image, region, row, column = batch.unbind(1)
        tile_sums = _weighted_sums(images[image, :, :, row, column], weight_tiles[image, region, row, column], window)
        sums.index_put_((image, region), tile_sums, accumulate=True)

    totals = weights.double().sum((-1, -2))
    return (sums / totals[..., None]).transpose(1, 2)


def _weighted_sums(images: torch.Tensor, weights: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each tile's similarities, (N, S), mean of the channels.

    Args:
        images: (N, 1 + S, C, side, side) uint8, the base first.
        weights: (N, side, side).
        window: As `_window` returns it.
    """
    # Notation (<variable> -> <Wang et al.>): means -> mu_x, mu_y; _C1, _C2 -> C_1, C_2. With
    # means_upper = 2 mu_x mu_y + C_1 and means_lower = mu_x^2 + mu_y^2 + C_1, the other factors are
    # 2 sigma_xy + C_2 = E[2xy] - means_upper + C_1 + C_2, and
    # sigma_x^2 + sigma_y^2 + C_2 = E[x^2] + E[y^2] - means_lower + C_1 + C_2.
    values = images.double()
    tile_weights = weights.double()[:, None, None]
    count, sides = values.shape[:2]
    others = sides - 1

    # 1. the moments under the window: E[x] and E[y], E[2xy], E[x^2] + E[y^2]
    moments = values.new_empty(count, sides + 2 * others, *values.shape[2:])
    means, products, squares = moments.split([sides, others, others], 1)
    torch.mul(values, tile_weights, out=means)
    torch.mul(means[:, 1:], 2 * values[:, :1], out=products)
    weighted_squares = means * values
    torch.add(weighted_squares[:, 1:], weighted_squares[:, :1], out=squares)

    moments = _blurred(moments, window)
    moments *= _blurred(tile_weights, window).clamp_(min=1e-12).reciprocal_()
    means, products, squares = moments.split([sides, others, others], 1)

    # 2. the index of each pixel; in place, since most of the time is for memory
    means_upper = (means[:, 1:] * (2 * means[:, :1])).add_(_C1)
    squared_means = means.square()
    means_lower = squared_means[:, 1:].add_(squared_means[:, :1] + _C1)
    upper = products.sub_(means_upper).add_(_C1 + _C2).mul_(means_upper)
    lower = squares.sub_(means_lower).add_(_C1 + _C2).mul_(means_lower)

    weighted_index: torch.Tensor = upper.div_(lower).mul_(_without_border(tile_weights))
    return weighted_index.sum((-1, -2)).mean(-1)


def _window(device: torch.device) -> torch.Tensor:
    """(side, _TILE) float64: a row of a tile with its border, times this, is the row under the Gaussian window."""
    gaussian = (-torch.arange(-_RADIUS, _RADIUS + 1, dtype=torch.float64).square() / (2 * _SIGMA**2)).exp()
    gaussian = gaussian / gaussian.sum()

    window = torch.zeros(_TILE + 2 * _RADIUS, _TILE, dtype=torch.float64)
    for column in range(_TILE):
        window[column : column + len(gaussian), column] = gaussian
    return window.to(device)


def _blurred(tiles: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """(..., _TILE, _TILE) from (..., side, side)."""
    blurred: torch.Tensor = window.T @ (tiles @ window)
    return blurred


def _tiles(values: torch.Tensor) -> torch.Tensor:
    """(..., rows, columns, side, side): a view of (..., H, W) in overlapping tiles, with zeros beyond the edges."""
    height, width = values.shape[-2:]
    padded = functional.pad(values, (_RADIUS, _RADIUS + -width % _TILE, _RADIUS, _RADIUS + -height % _TILE))
    side = _TILE + 2 * _RADIUS
    return padded.unfold(-2, side, _TILE).unfold(-2, side, _TILE)


def _without_border(tiles: torch.Tensor) -> torch.Tensor:
    return tiles[..., _RADIUS:-_RADIUS, _RADIUS:-_RADIUS]
