import math

import numpy as np
import torch

from dfusion.ssim import ssim


def noise_image(seed: int, height: int = 9, width: int = 14) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def measured(base: np.ndarray, others: list[np.ndarray], weights: list[np.ndarray]) -> list[list[float]]:
    """The similarity of each other image to the base, under each of the weights."""
    images = torch.from_numpy(np.stack([base, *others])).permute(0, 3, 1, 2)
    values: list[list[float]] = ssim(images[:1], images[None, 1:], torch.from_numpy(np.stack(weights))[None])[
        0
    ].tolist()
    return values


def plain_ssim(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> float:
    """SSIM of Wang et al. pixel by pixel, from sums over explicit windows."""
    height, width, channels = first.shape
    total = 0.0
    similarity = 0.0
    for y in range(height):
        for x in range(width):
            window = [
                (v, u, weights[v, u] * math.exp(-((v - y) ** 2 + (u - x) ** 2) / (2 * 1.5**2)))
                for v in range(max(0, y - 5), min(height, y + 6))
                for u in range(max(0, x - 5), min(width, x + 6))
            ]
            norm = sum(g for _, _, g in window)
            total += weights[y, x]
            if weights[y, x] == 0:
                continue
            for c in range(channels):
                p = [first[v, u, c] / 255 for v, u, _ in window]
                q = [second[v, u, c] / 255 for v, u, _ in window]
                g = [g / norm for _, _, g in window]
                mean_p = sum(a * b for a, b in zip(g, p, strict=True))
                mean_q = sum(a * b for a, b in zip(g, q, strict=True))
                var_p = sum(a * (b - mean_p) ** 2 for a, b in zip(g, p, strict=True))
                var_q = sum(a * (b - mean_q) ** 2 for a, b in zip(g, q, strict=True))
                cov = sum(a * (b - mean_p) * (d - mean_q) for a, b, d in zip(g, p, q, strict=True))
                upper = (2 * mean_p * mean_q + 1e-4) * (2 * cov + 9e-4)
                lower = (mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4)
                similarity += weights[y, x] * upper / lower / channels
    return similarity / total


def test_ssim_equals_explicit_windows() -> None:
    base = noise_image(1)
    similar = noise_image(2)
    similar[:5] = base[:5] // 2 + 30
    weights = [
        np.ones((9, 14)),
        np.repeat([[1.0] * 6 + [0.0] * 8], 9, 0),
        np.random.default_rng(3).random((9, 14)),
    ]
    other, same = measured(base, [similar, base], weights)

    assert np.allclose(other, [plain_ssim(base, similar, each) for each in weights], rtol=0, atol=1e-6)
    assert np.allclose(same, 1, rtol=0, atol=1e-6)


def test_flat_regions_beside_the_strongest_edge() -> None:
    """The worst case for float32: variances of about 1 next to squares of 127.5, and images far from each other."""
    rng = np.random.default_rng(4)
    base = rng.integers(0, 3, (12, 24, 3)).astype(np.uint8)
    base[:, 12:] += 253
    base[..., 1] = 255 - base[..., 1]  # saturated colours: channels of a tile have different means
    near = base + rng.integers(0, 2, base.shape).astype(np.uint8) * (base < 255)
    far = 255 - base
    weights = np.ones((12, 24))

    [[with_near], [with_far]] = measured(base, [near, far], [weights])
    assert math.isclose(with_near, plain_ssim(base, near, weights), abs_tol=1e-5)
    assert math.isclose(with_far, plain_ssim(base, far, weights), abs_tol=1e-5)


def test_tiles_of_an_image_join_without_a_seam() -> None:
    """The weights are 0 except in a part that lies on four tiles: the result is that of this part alone."""
    base = noise_image(1, 40, 70)
    other = noise_image(2, 40, 70)
    other[:32] = base[:32] // 2 + 30
    part = np.s_[27:36, 25:39]
    weights = np.zeros((40, 70))
    weights[part] = np.random.default_rng(3).random((9, 14))

    [[actual]] = measured(base, [other], [weights])
    assert math.isclose(actual, plain_ssim(base[part], other[part], weights[part]), abs_tol=1e-6)


def test_a_region_does_not_depend_on_the_other() -> None:
    base = noise_image(1)
    other = noise_image(2)
    weights = np.zeros((9, 14))
    weights[:, 7:] = 1
    before = measured(base, [other], [weights])
    other[:, :7] = 255
    assert measured(base, [other], [weights]) == before


def test_a_region_without_weight_has_no_similarity() -> None:
    image = noise_image(1)
    [[all_weights, no_weights]] = measured(image, [image], [np.ones((9, 14)), np.zeros((9, 14))])
    assert math.isclose(all_weights, 1, abs_tol=1e-6)
    assert math.isnan(no_weights)
