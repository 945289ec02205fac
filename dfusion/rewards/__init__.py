"""Scorers: how well an image fits its prompt. Imports no torch until a scorer that needs it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, cast

import numpy as np

from dfusion.catalogue import SCORERS, SHAPES_CLIP_FOLDER
from dfusion.errors import InvalidInputError, ModelNotFoundError
from dfusion.rewards.config import (
    EntryPointConfig,
    HttpScorerConfig,
    OpenClipConfig,
    ScorerConfig,
    VerdictScorerConfig,
    WeightedScorerConfig,
)


class Scorer(Protocol):
    """Scores images by their prompts; higher is better. `name` and `version` are recorded with every score: a score
    of another name or version is not comparable."""

    name: str
    version: str

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """A finite score for each image: images (B, H, W, 3) uint8, one prompt for each.

        Raises ShapeMismatchError for other images, NonFiniteError, ScorerError where no scores could be had.
        """
        ...


def load_scorer(
    scorer: str | ScorerConfig,
    device: str = "cpu",
    *,
    installed: Mapping[str, ScorerConfig | str] = MappingProxyType({}),
    verdicts: Mapping[str, float] | None = None,
) -> Scorer:
    """The scorer of that name, or that those settings describe.

    installed  the installation's own scorers by name, as settings or as 'module:attribute'; they come before the
               built-in ones of `dfusion.catalogue`
    verdicts   people's verdicts for a verdict scorer, by `dfusion.rewards.verdicts.image_key`

    Raises ModelNotFoundError if there is none of that name or its files are missing, InvalidInputError for weighted
    sums that contain themselves and for verdict scorers without verdicts.
    """
    return _Loader(device, installed, verdicts).load(scorer, ())


class _Loader:
    """Loads scorers by name or settings; `within` are the names on the way to the one that is loaded."""

    def __init__(
        self, device: str, installed: Mapping[str, ScorerConfig | str], verdicts: Mapping[str, float] | None
    ) -> None:
        self._device, self._installed, self._verdicts = device, installed, verdicts

    def load(self, scorer: str | ScorerConfig, within: tuple[str, ...]) -> Scorer:
        return self._named(scorer, within) if isinstance(scorer, str) else self._made(scorer, None, within)

    def _named(self, name: str, within: tuple[str, ...]) -> Scorer:
        if name in within:
            raise InvalidInputError(f"scorer {name!r}: expected no sum that contains itself, got {(*within, name)}")
        if name in self._installed:
            found = self._installed[name]
            if isinstance(found, str):
                from dfusion.rewards.plugins import NamedScorer, load_attribute

                return cast(Scorer, NamedScorer(load_attribute(found), name))
            return self._made(found, name, (*within, name))
        if name not in _BUILT_IN:
            raise ModelNotFoundError(f"scorer: expected one of {sorted({*SCORERS, *self._installed})}, got {name!r}")
        return _BUILT_IN[name](name, self._device)

    def _made(self, config: ScorerConfig, name: str | None, within: tuple[str, ...]) -> Scorer:
        match config:
            case OpenClipConfig():
                return _open_clip(config, name, self._device)
            case HttpScorerConfig():
                from dfusion.rewards.http import HttpScorer

                return HttpScorer(config, name=name or f"http-{config.url.host}")
            case EntryPointConfig():
                from dfusion.rewards.plugins import NamedScorer, load_entry_point

                found = load_entry_point(config.entry_point)
                return found if name is None else cast(Scorer, NamedScorer(found, name))
            case VerdictScorerConfig():
                from dfusion.rewards.verdicts import VerdictScorer

                if self._verdicts is None:
                    raise InvalidInputError("verdicts: expected people's verdicts for a verdict scorer, got None")
                return VerdictScorer(self._verdicts, name=name or "verdicts")
            case WeightedScorerConfig():
                from dfusion.rewards.weighted import WeightedScorer

                parts = [(part.weight, self.load(part.scorer, within)) for part in config.parts]
                return WeightedScorer(parts, name=name)


def _open_clip(config: OpenClipConfig, name: str | None, device: str) -> Scorer:
    from dfusion.rewards.clip import ClipScorer

    if config.folder is not None:
        return ClipScorer.from_folder(config.folder, name=name or f"clip-{config.folder.name}", device=device)
    return ClipScorer.from_pretrained(config.architecture, config.weights, name=name, device=device)


def _shapes_judge(_: str, __: str) -> Scorer:
    from dfusion.shapes.judge import JudgeScorer

    return JudgeScorer.load()


_BUILT_IN: Mapping[str, Callable[[str, str], Scorer]] = MappingProxyType(
    {
        "shapes-clip": lambda name, device: _open_clip(OpenClipConfig(folder=SHAPES_CLIP_FOLDER), name, device),
        "shapes-judge": _shapes_judge,
        "clip-vit-h-14": lambda name, device: _open_clip(OpenClipConfig(), name, device),
        "clip-vit-l-14": lambda name, device: _open_clip(
            OpenClipConfig(architecture="ViT-L-14", weights="datacomp_xl_s13b_b90k"), name, device
        ),
    }
)
