"""The models and scorers of this installation: dfusion's and those that the settings add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from api.core.settings import Settings
from dfusion.catalogue import MODELS, SCORERS


@dataclass(frozen=True)
class BaseModel:
    """A base model: its folder, the scorer that trains it unless another is asked for, and those that judge it."""

    name: str
    folder: Path
    reward: str | None
    scorers: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """Models and scorers by name. `plugins` are the scorers that the settings add, as 'module:factory'."""

    models: Mapping[str, BaseModel]
    scorers: frozenset[str]
    plugins: Mapping[str, str]

    @classmethod
    def of(cls, settings: Settings) -> Catalogue:
        """What this installation has."""
        own = {
            name: BaseModel(name, Path(entry.folder), entry.default_reward, tuple(entry.scorers))
            for name, entry in MODELS.items()
        }
        added = {name: BaseModel(name, folder, None, ()) for name, folder in settings.models.items()}
        return cls({**own, **added}, frozenset(SCORERS) | frozenset(settings.scorers), settings.scorers)
