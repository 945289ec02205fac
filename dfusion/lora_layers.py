"""Which layers of a U-Net the LoRA settings adapt, and with which rank and alpha. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from typing import TypeVar

from dfusion.config import GROUPS, LoraConfig
from dfusion.errors import LoraSettingError

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a U-Net's parameters by name, without an adapter."""


@dataclass(frozen=True)
class LayerSettings:
    """Rank and alpha of an adapted layer, and the factor of B A."""

    rank: int
    alpha: float
    scale: float


def adapted_layers(shapes: Shapes, config: LoraConfig) -> dict[str, LayerSettings]:
    """The layers of a U-Net that `config` adapts, by name.

    Raises:
        LoraSettingError: A target or a pattern matches no layer; a target is not a linear or convolution layer. The
            error names the setting.
    """
    # 1. the targets
    all_layers = _layers(shapes)
    targets: set[str] = set()
    for target in config.targets:
        layers = set(_matching(GROUPS.get(target, (target,)), all_layers))
        if not layers:
            raise LoraSettingError("targets", f"expected layers of the U-Net, got {target!r}, which matches none")
        unsuitable = sorted(name for name in layers if len(shapes[f"{name}.weight"]) not in (2, 4))
        if unsuitable:
            raise LoraSettingError("targets", f"expected linear or convolution layers, got {unsuitable[0]}")
        targets |= layers

    # 2. their ranks and alphas; the last pattern that matches counts
    ranks = dict.fromkeys(targets, config.rank)
    alphas = dict.fromkeys(targets, config.alpha)
    for name, value in _patterns("rank_pattern", config.rank_pattern, targets):
        ranks[name] = value
    for name, number in _patterns("alpha_pattern", config.alpha_pattern, targets):
        alphas[name] = number

    def settings(name: str) -> LayerSettings:
        divisor = math.sqrt(ranks[name]) if config.use_rslora else ranks[name]
        return LayerSettings(ranks[name], alphas[name], alphas[name] / divisor)

    return {name: settings(name) for name in sorted(targets)}


def _patterns(setting: str, pattern: Mapping[str, T], targets: Collection[str]) -> Iterator[tuple[str, T]]:
    for key, value in pattern.items():
        layers = list(_matching(GROUPS.get(key, (key,)), targets))
        if not layers:
            raise LoraSettingError(setting, f"expected adapted layers, got {key!r}, which matches none")
        for name in layers:
            yield name, value


def _matching(patterns: Iterable[str], names: Collection[str]) -> Iterator[str]:
    """The names that one of the patterns is, or else that end with it, as whole parts.

    A pattern with * must match the whole name.
    """
    for pattern in patterns:
        yield from [pattern] if pattern in names else (name for name in names if _matches(pattern, name))


def _layers(shapes: Shapes) -> set[str]:
    """The layers with a weight."""
    return {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}


def _matches(pattern: str, name: str) -> bool:
    if "*" in pattern:
        return fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def groups_of(shapes: Shapes, layers: Collection[str]) -> tuple[str, ...] | None:
    """The groups of layers whose layers are exactly these; None if there are none."""
    names = _layers(shapes)
    for count in range(1, len(GROUPS) + 1):
        for groups in combinations(GROUPS, count):
            patterns = [pattern for group in groups for pattern in GROUPS[group]]
            if set(_matching(patterns, names)) == set(layers):
                return groups
    return None
