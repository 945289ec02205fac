"""The variants of appendix B: attention controls (figure 8), fused layers and fused steps (as figure 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from dfusion.attention.layers import Layer
from dfusion.config import AttentionControl, FusionConfig

STEP_RANGES = ((0.0, 1.0), (0.1, 1.0), (0.25, 1.0), (0.5, 1.0), (0.1, 0.75), (0.1, 0.5))
"""First and one past the last fused step, as shares of T. (0.1, 1.0) is the paper's t = 18 ... 1 of T = 20. The others
are ours, since the paper's text does not give the ranges of figure 9."""


def controls(config: FusionConfig = FusionConfig()) -> Mapping[str, FusionConfig]:
    """`config` with each attention control, by its name (figure 8)."""
    return {control: _with(config, control=control) for control in get_args(AttentionControl)}


def layers(available: Sequence[Layer], config: FusionConfig = FusionConfig()) -> Mapping[str, FusionConfig]:
    """`config` with each set of layers of figure 9 (appendix B) and with all layers, by name.

    `available` are the U-Net's layers (`find_layers`). For Stable Diffusion the sets are 3, 2-4, 3-5, 3-6, and 0-6
    (appendix C.1). Empty and duplicate sets are left out.
    """
    down = [layer.index for layer in available if layer.part == "down"]
    middle = [layer.index for layer in available if layer.part == "middle"]
    up = [layer.index for layer in available if layer.part == "up"]
    sets = {
        "middle": middle,
        "middle and its neighbours": down[-1:] + middle + up[:1],
        "middle and up but the last": middle + up[:-1],
        "middle and up": middle + up,
        "all": down + middle + up,
    }

    distinct: dict[str, tuple[int, ...]] = {}
    for name, indices in sets.items():
        if indices and tuple(indices) not in distinct.values():
            distinct[name] = tuple(indices)
    return {name: _with(config, layers=indices) for name, indices in distinct.items()}


def steps(num_steps: int, config: FusionConfig = FusionConfig()) -> Mapping[str, FusionConfig]:
    """`config` with each range of STEP_RANGES for `num_steps` steps, by "first-last" step_index."""
    ranges = [(round(first * num_steps), round(stop * num_steps) - 1) for first, stop in STEP_RANGES]
    return {
        f"{first}-{last}": _with(config, first_step=first, last_step=last) for first, last in ranges if first <= last
    }


def _with(config: FusionConfig, **changes: object) -> FusionConfig:
    """A validated copy of `config` with some settings changed."""
    return FusionConfig.model_validate(config.model_dump() | changes)
