"""The models and scorers of this installation: those of dfusion and those added by the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dfusion.adapter_files import layers_per_block, read_layout, read_shapes
from dfusion.catalogue import MODELS, SCORERS
from dfusion.config import Precision
from dfusion.errors import AdapterError
from dfusion.facts import PipelineFacts, read_facts
from dfusion.lora_layers import Shapes
from dfusion.rewards.config import OcrConfig, ScorerConfig, WeightedScorerConfig
from dfusion.sources import find_local
from service.errors import StartError
from service.settings import ModelSetting, Settings

_Version = tuple[tuple[str, int, int], ...]
"""The names, times and sizes of an adapter's files."""


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
        adapter: The file or folder of the adapter that it starts from; None for none.
    """

    name: str
    source: str
    dtype: Precision
    reward: str | None
    watch: str | None
    scorers: tuple[str, ...]
    vae_dtype: Precision | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class Catalogue:
    """Models and scorers by name. `installed` are the scorers added by the settings."""

    models: Mapping[str, InstalledModel]
    scorers: frozenset[str]
    installed: Mapping[str, str | ScorerConfig]
    _facts: dict[str, PipelineFacts] = field(default_factory=dict)
    _shapes: dict[str, Shapes | None] = field(default_factory=dict)
    _adapters: dict[str, tuple[_Version, str | None]] = field(default_factory=dict)

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

    def reads_text(self, scorer: str | WeightedScorerConfig, within: frozenset[str] = frozenset()) -> bool:
        """Whether a scorer, or a part of it, needs prompts that quote a text. `within`: the sums that contain it."""
        config: str | ScorerConfig | None = self.installed.get(scorer) if isinstance(scorer, str) else scorer
        if isinstance(config, WeightedScorerConfig):
            names = within | {scorer} if isinstance(scorer, str) else within
            return any(self.reads_text(part.scorer, names) for part in config.parts if part.scorer not in names)
        if config is None and isinstance(scorer, str) and scorer in SCORERS:
            return SCORERS[scorer].reads_text
        return isinstance(config, OcrConfig)

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

    def shapes(self, name: str) -> Shapes | None:
        """The shapes of the U-Net's parameters of a base model, read once. None if its files are not here."""
        if self._shapes.get(name) is None:
            folder = find_local(self.models[name].source)
            self._shapes[name] = None if folder is None else read_shapes(folder)
        return self._shapes[name]

    def adapter_problem(self, name: str) -> str | None:
        """Why a model's own adapter cannot be loaded. None if it can, has none, or its file is not on this machine.

        The file is read once, and again after it has changed.
        """
        adapter = self.models[name].adapter
        if adapter is None:
            return None

        try:
            files = sorted(adapter.iterdir()) if adapter.is_dir() else [adapter]
            version = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
        except OSError:  # not here, or not readable here
            return None
        if name not in self._adapters or self._adapters[name][0] != version:
            self._adapters[name] = version, self._problem_of(name, adapter)
        return self._adapters[name][1]

    def _problem_of(self, name: str, adapter: Path) -> str | None:
        shapes = self.shapes(name)
        folder = find_local(self.models[name].source)
        try:
            layout = read_layout(adapter, 2 if folder is None else layers_per_block(folder))
            if shapes is not None:
                layout.require_fit(shapes)
            if folder is not None:
                present = [part for part in layout.text_encoders if (folder / part).is_dir()]
                layout.require_text_encoders({part: read_shapes(folder, part) for part in present})
        except AdapterError as error:
            return str(error)
        return None


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
        name,
        setting.source,
        setting.dtype,
        setting.reward,
        setting.watch,
        setting.scorers,
        setting.vae_dtype,
        setting.adapter,
    )
