"""The cost of a pair's metrics, by plain convolutions and by `dfusion`: `python -m benchmarks.pair_metrics`.

The plain way (`plain_statistics`) measures one comparison and one region after the other, with float64 convolutions for
SSIM. `dfusion.pair_metrics` measures all at once. The images are smooth with noise, and the mask is soft, so that both
regions have a part of most tiles. On a CPU the process keeps freed memory, as a worker does, and the time is that of
the processor: other programs do not count. On a GPU: `--device cuda`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from benchmarks.measuring import settled, table
from dfusion.pair_metrics import PSNR_MAX, PairSides, PairStatistics, Side, pair_statistics
from worker.allocator import keep_freed_memory


def plain_statistics(pair: PairSides) -> dict[str, dict[str, dict[str, float]]]:
    """The metrics of a pair by name, comparison and region. Each region must have a pixel."""
    measures = {
        "latent_distance": _latent_distance,
        "pixel_distance": _pixel_distance,
        "psnr": _psnr,
        "ssim": _ssim,
    }
    regions = {"inside": pair.mask, "outside": 1 - pair.mask}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for metric, measure in measures.items():
        results[metric] = {}
        for name, side in {"target_to_base": pair.target, "reference_to_base": pair.reference}.items():
            results[metric][name] = {region: measure(side, pair.base, mask) for region, mask in regions.items()}
    return results


def _latent_distance(side: Side, base: Side, mask: torch.Tensor) -> float:
    return math.sqrt(_mean((side.latents - base.latents).square().mean(0), mask))


def _pixel_distance(side: Side, base: Side, mask: torch.Tensor) -> float:
    return _mean(_difference(side, base).abs().mean(-1), mask)


def _psnr(side: Side, base: Side, mask: torch.Tensor) -> float:
    error = _mean(_difference(side, base).square().mean(-1), mask)
    return PSNR_MAX if error == 0 else min(PSNR_MAX, -10 * math.log10(error))


def _difference(side: Side, base: Side) -> torch.Tensor:
    return torch.from_numpy((side.image.astype(np.float32) - base.image.astype(np.float32)) / 255)


def _ssim(side: Side, base: Side, mask: torch.Tensor) -> float:
    x = torch.from_numpy(side.image.astype(np.float64) / 255).permute(2, 0, 1)
    y = torch.from_numpy(base.image.astype(np.float64) / 255).permute(2, 0, 1)
    weights = _resized(mask, *x.shape[1:]).double()
    window_weights = _blurred(weights[None]).clamp(min=1e-12)

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        return _blurred(weights * values) / window_weights

    mean_x = local_mean(x)
    mean_y = local_mean(y)
    variances = local_mean(x * x) - mean_x.square() + local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    means = (2 * mean_x * mean_y + 0.01**2) / (mean_x.square() + mean_y.square() + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances + 0.03**2)
    return _mean((means * structure).mean(0), mask)


def _blurred(values: torch.Tensor) -> torch.Tensor:
    window = (-torch.arange(-5.0, 6.0, dtype=torch.float64).square() / (2 * 1.5**2)).exp()
    window = window / window.sum()
    rows = functional.conv2d(values[:, None], window.reshape(1, 1, 11, 1), padding=(5, 0))
    return functional.conv2d(rows, window.reshape(1, 1, 1, 11), padding=(0, 5))[:, 0]


def _mean(values: torch.Tensor, mask: torch.Tensor) -> float:
    weights = _resized(mask, *values.shape)
    return float((values * weights).sum()) / float(weights.sum())


def _resized(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return functional.interpolate(mask[None, None], size=(height, width), mode="nearest")[0, 0]


def random_pairs(count: int, side: int) -> list[PairSides]:
    """Pairs of similar images of `side` x `side` pixels, with a soft disc as mask."""
    rng = np.random.default_rng(side)
    cells = torch.arange(16).float() - 7.5
    mask = (1.4 - (cells[:, None].square() + cells.square()).sqrt() / 5).clamp(0, 1)

    pairs = []
    for _ in range(count):
        common = torch.from_numpy(rng.normal(size=(3, side // 16, side // 16)))
        sides = []
        for _ in range(3):
            own = torch.from_numpy(rng.normal(size=common.shape))
            smooth = functional.interpolate((common + 0.4 * own)[None], size=(side, side), mode="bicubic")[0]
            noise = torch.from_numpy(rng.normal(size=smooth.shape))
            pixels = (128 + 50 * smooth + 3 * noise).clamp(0, 255).round().to(torch.uint8)
            latents = torch.from_numpy(rng.normal(size=(4, side // 8, side // 8))).float()
            sides.append(Side(latents, pixels.permute(1, 2, 0).contiguous().numpy(), float(rng.random())))
        reference, base, target = sides
        pairs.append(PairSides(reference, base, target, mask))
    return pairs


def largest_difference(plain: dict[str, dict[str, dict[str, float]]], measured: PairStatistics) -> dict[str, float]:
    """The largest difference of each metric over comparisons and regions."""
    differences: dict[str, float] = {}
    for metric, by_place in plain.items():
        for name, by_region in by_place.items():
            for region, expected in by_region.items():
                difference = abs(expected - getattr(measured, metric)[name][region])
                differences[metric] = max(difference, differences.get(metric, 0.0))
    return differences


def _seconds(work: Callable[[], object], device: str, runs: int) -> float:
    """The median time of some calls after a warm-up: of the processor on a CPU, wall time on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    wait = settled(torch.device(device))
    work()

    times = []
    for _ in range(runs):
        wait()
        started = clock()
        work()
        wait()
        times.append(clock() - started)
    return statistics.median(times)


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024], help="image sizes in pixels")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.device == "cpu":
        keep_freed_memory()

    rows = []
    for side in arguments.sides:
        pairs = random_pairs(arguments.pairs, side)
        plain = _seconds(partial(plain_statistics, pairs[0]), "cpu", 1)
        ours = _seconds(partial(pair_statistics, pairs, arguments.device), arguments.device, arguments.runs)
        ours /= len(pairs)

        [measured] = pair_statistics(pairs[:1], arguments.device)
        difference = largest_difference(plain_statistics(pairs[0]), measured)["ssim"]
        rows.append([str(side), f"{plain:.3f}", f"{ours:.4f}", f"{plain / ours:.0f}", f"{difference:.0e}"])

    columns = ["seconds a pair", "plain, one core", f"dfusion, {arguments.device}", "ratio", "SSIM differs by"]
    write(table(columns, rows))


if __name__ == "__main__":
    main()
