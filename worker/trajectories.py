"""Rows of several stored trajectories as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from dfusion.types import Trajectory


def join(parts: Sequence[Trajectory]) -> Trajectory:
    """The samples of all parts, which share settings and sizes, in order. Item maps get the largest K (zeros)."""
    first = parts[0]
    maps = [part.item_maps for part in parts]
    items = [part.items for part in parts]
    return replace(
        first,
        latents=torch.cat([part.latents for part in parts]),
        log_probs=torch.cat([part.log_probs for part in parts]),
        seeds=tuple(seed for part in parts for seed in part.seeds),
        item_maps=None if any(m is None for m in maps) else _padded([m for m in maps if m is not None]),
        items=None if any(i is None for i in items) else tuple(sample for i in items if i for sample in i),
    )


def _padded(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    most = max(m.shape[-1] for m in maps)
    return torch.cat([functional.pad(m, (0, most - m.shape[-1])) for m in maps])
