"""The models and scorers of this installation: dfusion's and those that the settings add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from api.core.settings import ModelSetting, Settings
from dfusion.catalogue import MODELS, SCORERS
from dfusion.config import Precision
from dfusion.rewards.config import ScorerConfig


@dataclass(frozen=True)
class BaseModel:
    """A base model.

    source   as for `DiffusionModel.load`
    reward   the scorer that trains it unless another is asked for; `watch` the one that watches beside it
    scorers  those that judge its images
    """

    name: str
    source: str
    dtype: Precision
    reward: str | None
    watch: str | None
    scorers: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """Models and scorers by name. `installed` are the scorers that the settings add."""

    models: Mapping[str, BaseModel]
    scorers: frozenset[str]
    installed: Mapping[str, str | ScorerConfig]

    @classmethod
    def of(cls, settings: Settings) -> Catalogue:
        """What this installation has."""
        own = {
            name: BaseModel(
                name, str(entry.folder), "float32", entry.default_reward, entry.held_out, tuple(entry.scorers)
            )
            for name, entry in MODELS.items()
        }
        added = {name: _added(name, setting) for name, setting in settings.models.items()}
        return cls({**own, **added}, frozenset(SCORERS) | frozenset(settings.scorers), settings.scorers)


def _added(name: str, setting: str | ModelSetting) -> BaseModel:
    if isinstance(setting, str):
        setting = ModelSetting(source=setting)
    return BaseModel(name, setting.source, setting.dtype, setting.reward, setting.watch, setting.scorers)
