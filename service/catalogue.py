"""The models and scorers of this installation: those of dfusion and those added by the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dfusion.catalogue import MODELS, SCORERS
from dfusion.config import Precision
from dfusion.facts import PipelineFacts, read_facts
from dfusion.rewards.config import ScorerConfig
from dfusion.sources import find_local
from service.errors import StartError
from service.settings import ModelSetting, Settings


@dataclass(frozen=True)
class InstalledModel:
    """A base model of this installation.

    Attributes:
        name: The name that requests use.
        source: The source of its files, as for `DiffusionModel.load`.
        dtype: The precision of the U-Net and text encoder.
        reward: The default reward of trainings.
        watch: The default held-out scorer of trainings.
        scorers: The default scorers of its images.
        vae_dtype: The precision of the VAE; None chooses by its config.
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
    """Models and scorers by name. `installed` are the scorers added by the settings."""

    models: Mapping[str, InstalledModel]
    scorers: frozenset[str]
    installed: Mapping[str, str | ScorerConfig]
    _facts: dict[str, PipelineFacts] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings) -> Catalogue:
        """The catalogue of an installation with these settings.

        Raises:
            StartError: A model of the settings has an unknown scorer.
        """
        builtin = {
            name: InstalledModel(name, str(entry.folder), entry.dtype, entry.reward, entry.watch, tuple(entry.scorers))
            for name, entry in MODELS.items()
        }
        added = {name: _added(name, setting) for name, setting in settings.models.items()}
        scorers = frozenset(SCORERS) | frozenset(settings.scorers)
        for model in added.values():
            _require_scorers(model, scorers)
        return cls({**builtin, **added}, scorers, settings.scorers)

    def facts(self, name: str) -> PipelineFacts | None:
        """Facts about a base model, read from its files. None if the files are not on this machine.

        They are read once if the model can be loaded, otherwise each time, so that files can be repaired.
        """
        if name in self._facts:
            return self._facts[name]
        folder = find_local(self.models[name].source)
        if folder is None:
            return None

        facts = read_facts(folder)
        if facts.problem is None:
            self._facts[name] = facts
        return facts


def _require_scorers(model: InstalledModel, scorers: frozenset[str]) -> None:
    """Raises StartError if a default scorer of the model does not exist."""
    for field_name, named in (("reward", [model.reward]), ("watch", [model.watch]), ("scorers", model.scorers)):
        for scorer in named:
            if scorer is not None and scorer not in scorers:
                expected = ", ".join(sorted(scorers))
                raise StartError(
                    f"DFUSION_MODELS: {model.name}: {field_name}: expected one of {expected}, got {scorer!r}"
                )


def _added(name: str, setting: str | ModelSetting) -> InstalledModel:
    if isinstance(setting, str):
        setting = ModelSetting(source=setting)
    return InstalledModel(
        name, setting.source, setting.dtype, setting.reward, setting.watch, setting.scorers, setting.vae_dtype
    )
