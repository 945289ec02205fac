"""What appendix B varies: how attention is controlled (figure 8), which layers and steps are fused (as figure 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from dfusion.attention.layers import Layer
from dfusion.config import AttentionControl, FusionConfig

STEP_RANGES = ((0.0, 1.0), (0.1, 1.0), (0.25, 1.0), (0.5, 1.0), (0.1, 0.75), (0.1, 0.5))
"""First and one past the last fused step as shares of T. (0.1, 1.0) is the paper's t = 18 ... 1 of T = 20; the others
are ours, since the ranges on figure 9's axis are not in the paper's text."""


def controls(config: FusionConfig = FusionConfig()) -> Mapping[str, FusionConfig]:
    """`config` with each attention control, by its name (figure 8)."""
    return {control: _with(config, control=control) for control in get_args(AttentionControl)}


def layers(found: Sequence[Layer], config: FusionConfig = FusionConfig()) -> Mapping[str, FusionConfig]:
    """`config` on the sets of layers that appendix B names for figure 9 and on all layers, by name; `found` are the
    U-Net's (`find_layers`).

    For Stable Diffusion these are 3, 2-4, 3-5 and 3-6, and 0-6, which appendix C.1 speaks of. Sets that a U-Net lacks,
    or has twice, are left out.
    """
    down, middle, up = ([layer.index for layer in found if layer.part == p] for p in ("down", "middle", "up"))
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
    """`config` on ranges of steps of a trajectory of `num_steps`, by "first-last" step_index: STEP_RANGES."""
    ranges = [(round(first * num_steps), round(stop * num_steps) - 1) for first, stop in STEP_RANGES]
    return {
        f"{first}-{last}": _with(config, first_step=first, last_step=last) for first, last in ranges if first <= last
    }


def _with(config: FusionConfig, **changes: object) -> FusionConfig:
    """`config` with some settings changed, checked."""
    return FusionConfig.model_validate(config.model_dump() | changes)
