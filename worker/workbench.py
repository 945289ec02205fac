"""What every stage is given: the installation, its models and its scorers, loaded once and kept."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import torch

from api.core.catalogue import Catalogue
from api.core.service import Service
from api.core.settings import Settings
from api.core.storage import Store
from api.core.unit_of_work import UnitOfWork
from dfusion.errors import ModelNotFoundError
from dfusion.rewards import Scorer, load_scorer
from worker.model_cache import ModelCache


@dataclass
class Workbench:
    """An installation as a worker uses it."""

    settings: Settings
    uow: UnitOfWork
    store: Store
    catalogue: Catalogue
    device: str
    models: ModelCache
    _scorers: dict[str, Scorer] = field(default_factory=dict)

    @classmethod
    def of(cls, service: Service) -> Workbench:
        """The workbench of an opened installation."""
        device = service.settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        models = ModelCache(service.catalogue, service.store, device)
        return cls(service.settings, service.uow, service.store, service.catalogue, device, models)

    def scorer(self, name: str) -> Scorer:
        """The scorer of that name. Raises ModelNotFoundError."""
        if name not in self._scorers:
            plugin = self.catalogue.plugins.get(name)
            self._scorers[name] = load_scorer(name, self.device) if plugin is None else _load_plugin(name, plugin)
        return self._scorers[name]


def _load_plugin(name: str, where: str) -> Scorer:
    """A scorer that the settings add, from 'module:factory'."""
    module, _, factory = where.partition(":")
    try:
        scorer: Scorer = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise ModelNotFoundError(f"scorer {name!r}: expected 'module:factory', got {where!r}: {error}") from error
    return scorer
