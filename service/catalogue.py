"""The models and scorers of this installation: dfusion's and those that the settings add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dfusion.catalogue import MODELS, SCORERS
from dfusion.config import Precision
from dfusion.facts import PipelineFacts, read_facts
from dfusion.rewards.config import ScorerConfig
from dfusion.sources import find_local
from service.settings import ModelSetting, Settings


@dataclass(frozen=True)
class InstalledModel:
    """A base model.

    source     as for `DiffusionModel.load`, and so are dtype and vae_dtype
    reward     the scorer that trains it unless another is asked for; `watch` the one that watches beside it
    scorers    those that judge its images
    """

    name: str
    source: str
    dtype: Precision
    reward: str | None
    watch: str | None
    scorers: tuple[str, ...]
    vae_dtype: Precision | None = None


@dataclass(frozen=True)
class Catalogue:
    """Models and scorers by name. `installed` are the scorers that the settings add."""

    models: Mapping[str, InstalledModel]
    scorers: frozenset[str]
    installed: Mapping[str, str | ScorerConfig]
    _facts: dict[str, PipelineFacts] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings) -> Catalogue:
        """What this installation has."""
        own = {
            name: InstalledModel(name, str(entry.folder), entry.dtype, entry.reward, entry.watch, tuple(entry.scorers))
            for name, entry in MODELS.items()
        }
        added = {name: _added(name, setting) for name, setting in settings.models.items()}
        return cls({**own, **added}, frozenset(SCORERS) | frozenset(settings.scorers), settings.scorers)

    def facts(self, name: str) -> PipelineFacts | None:
        """What a base model's files say of it; None while they are not on this machine. They are read once."""
        if name not in self._facts:
            folder = find_local(self.models[name].source)
            if folder is None:
                return None
            self._facts[name] = read_facts(folder)
        return self._facts[name]


def _added(name: str, setting: str | ModelSetting) -> InstalledModel:
    if isinstance(setting, str):
        setting = ModelSetting(source=setting)
    return InstalledModel(
        name, setting.source, setting.dtype, setting.reward, setting.watch, setting.scorers, setting.vae_dtype
    )
