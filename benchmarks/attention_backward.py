"""Attention's forward and backward pass on a CPU, by dtype: `python -m benchmarks.attention_backward`.

It prints milliseconds for the shapes world's U-Net with 64 rows: in float32, in bfloat16, and in bfloat16 with the
backward pass in float32 (`dfusion.attention.processors.fast_backward`). Times are the best of `--repeats`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from dfusion.attention.processors import attention_with_float32_backward

SHAPES = {
    "self, 256 pixels": (256, 256, 16),
    "cross, 256 pixels": (256, 77, 16),
    "self, 64 pixels": (64, 64, 32),
}
"""Queries, keys, channels per head."""
ROWS = 64
HEADS = 4


def milliseconds(
    shape: tuple[int, int, int], dtype: torch.dtype, attend: Callable[..., torch.Tensor], repeats: int
) -> float:
    """The best time of one forward and backward pass."""
    queries, keys, channels = shape
    generator = torch.Generator().manual_seed(0)
    parts = []
    for length in (queries, keys, keys):
        part = torch.randn(ROWS, HEADS, length, channels, generator=generator)
        parts.append(part.to(dtype).requires_grad_())

    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        attend(*parts).sum().backward()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    write(f"{'':20}{'float32':>12}{'bfloat16':>12}{'mixed':>12}\n")
    variants = (
        (torch.float32, scaled_dot_product_attention),
        (torch.bfloat16, scaled_dot_product_attention),
        (torch.bfloat16, attention_with_float32_backward),
    )
    for name, shape in SHAPES.items():
        times = [milliseconds(shape, dtype, attend, arguments.repeats) for dtype, attend in variants]
        write(f"{name:20}" + "".join(f"{ms:12.1f}" for ms in times) + "\n")


if __name__ == "__main__":
    main()
