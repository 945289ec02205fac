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
    The moments are float32, of pixels minus the base's mean in their tile and channel. Of pixels themselves, they would
    lose more than four digits to cancellation in flat regions. An index differs by less than 1e-4 from its value in
    float64, on a GPU only with `torch.backends.cuda.matmul.allow_tf32 = False`, torch's default.

    Args:
        bases: (B, C, H, W) uint8.
        others: (B, S, C, H, W) uint8.
        weights: (B, R, H, W) float in [0, 1].

    Returns:
        (B, S, R) float64 in [-1, 1]. NaN where all weights are 0.
    """
    weights = weights.float()

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
    return (sums / totals[..., None]).transpose(1, 2).clamp(-1, 1)


def _weighted_sums(images: torch.Tensor, weights: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each tile's similarities, (N, S), mean of the channels.

    Args:
        images: (N, 1 + S, C, side, side) uint8, the base first.
        weights: (N, side, side).
        window: As `_window` returns it.
    """
    # Notation (<variable> -> <Wang et al.>): means -> mu_x, mu_y; _C1, _C2 -> C_1, C_2. With
    # upper_means = 2 mu_x mu_y and lower_means = mu_x^2 + mu_y^2, the other factors are
    # 2 sigma_xy + C_2 = E[2xy] - upper_means + C_2, and
    # sigma_x^2 + sigma_y^2 + C_2 = E[x^2] + E[y^2] - lower_means + C_2. They are the same for pixels minus a constant.
    values = images.float()
    tile_weights = weights[:, None, None]
    count, sides = values.shape[:2]
    others = sides - 1

    # 1. subtract the base's mean in the tile, as an integer: the differences are exact
    weighted_base = (values[:, :1] * tile_weights).sum((-1, -2), keepdim=True)
    centre = (weighted_base / tile_weights.sum((-1, -2), keepdim=True)).round()
    values -= centre

    # 2. the moments under the window: E[x] and E[y], E[2xy], E[x^2] + E[y^2]
    moments = values.new_empty(count, sides + 2 * others, *values.shape[2:])
    means, products, squares = moments.split([sides, others, others], 1)
    torch.mul(values, tile_weights, out=means)
    torch.mul(means[:, 1:], 2 * values[:, :1], out=products)
    weighted_squares = means * values
    torch.add(weighted_squares[:, 1:], weighted_squares[:, :1], out=squares)

    moments = _blurred(moments, window)
    moments *= _blurred(tile_weights, window).clamp_(min=1e-12).reciprocal_()
    means, products, squares = moments.split([sides, others, others], 1)

    # 3. the index of each pixel; in place, since most of the time is for memory
    upper_means, lower_means = _products_of_means(means)
    upper = products.sub_(upper_means).add_(_C2)
    lower = squares.sub_(lower_means).add_(_C2)
    upper_means, lower_means = _products_of_means(means.add_(centre))
    upper.mul_(upper_means.add_(_C1))
    lower.mul_(lower_means.add_(_C1))

    weighted_index: torch.Tensor = upper.div_(lower).mul_(_without_border(tile_weights))
    return weighted_index.sum((-1, -2)).mean(-1).double()


def _products_of_means(means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """2 mu_x mu_y and mu_x^2 + mu_y^2 of each other image, from (N, 1 + S, C, h, w) with the base first."""
    squares = means.square()
    return means[:, 1:] * (2 * means[:, :1]), squares[:, 1:].add_(squares[:, :1])


def _window(device: torch.device) -> torch.Tensor:
    """(side, _TILE) float32: a row of a tile with its border, times this, is the row under the Gaussian window."""
    gaussian = (-torch.arange(-_RADIUS, _RADIUS + 1, dtype=torch.float64).square() / (2 * _SIGMA**2)).exp()
    gaussian = gaussian / gaussian.sum()

    window = torch.zeros(_TILE + 2 * _RADIUS, _TILE, dtype=torch.float64)
    for column in range(_TILE):
        window[column : column + len(gaussian), column] = gaussian
    return window.float().to(device)


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
