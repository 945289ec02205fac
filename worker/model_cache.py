"""A cache of the loaded base model, on which adapters are exchanged."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dfusion.adapter import detach, load_adapter
from dfusion.errors import ModelNotFoundError
from dfusion.models import DiffusionModel
from service.catalogue import Catalogue, InstalledModel
from service.db.tables import Artifact
from service.storage import Store

_PREFER_SECONDS = 30.0
_logger = logging.getLogger(__name__)


class ModelCache:
    """Keeps the last base model, with its current adapter. `compiled` models are compiled when they are loaded."""

    def __init__(self, catalogue: Catalogue, store: Store, device: str, compiled: bool = False) -> None:
        self._catalogue = catalogue
        self._store = store
        self._device = device
        self._compiled = compiled
        self._name: str | None = None
        self._model: DiffusionModel | None = None
        self._adapter: str | None = None
        self._loaded_at = -math.inf

    @property
    def preferred(self) -> str | None:
        """The loaded base model within half a minute after it was loaded, so that two models do not alternate.

        None later, since other jobs must not wait longer for their model, and if no model is loaded.
        """
        return self.loaded if time.monotonic() - self._loaded_at < _PREFER_SECONDS else None

    @property
    def loaded(self) -> str | None:
        """The name of the loaded base model; None if there is none."""
        return None if self._model is None else self._name

    def with_adapter(self, base: str, adapter: Artifact | None) -> DiffusionModel:
        """The base model with the adapter on its U-Net and text encoders. Raises ModelNotFoundError, AdapterError.

        Without an adapter it has the one that its setting names, if any.
        """
        model = self._base(base)
        own = self._entry(base).adapter
        wanted = str(own) if own is not None else None
        if adapter is not None:
            wanted = adapter.sha256
        if wanted != self._adapter:
            self._detach(model)
            self._adapter = None if wanted is None else "incomplete"  # until it is attached
            if adapter is not None:
                with self._store.borrow(adapter.key, adapter.sha256) as path:
                    load_adapter(model.unet, path, model.text_encoders)
            elif own is not None:
                load_adapter(model.unet, own, model.text_encoders)
            self._adapter = wanted
        return model

    @contextmanager
    def for_training(self, base: str, adapter: Artifact | None) -> Iterator[DiffusionModel]:
        """Like `with_adapter`, for a training. The training changes the adapter, so it is detached at the end."""
        model = self.with_adapter(base, adapter)
        self._adapter = "in training"
        try:
            yield model
        finally:
            self._detach(model)

    def source(self, name: str) -> str:
        """The source of a base model: a folder, or a repository of the Hugging Face Hub. Raises ModelNotFoundError."""
        return self._entry(name).source

    def _entry(self, name: str) -> InstalledModel:
        entry = self._catalogue.models.get(name)
        if entry is None:
            raise ModelNotFoundError(f"model: expected one of {sorted(self._catalogue.models)}, got {name!r}")
        return entry

    def _base(self, name: str) -> DiffusionModel:
        if self._model is None or self._name != name:
            entry = self._entry(name)
            self._model = None  # frees its memory before the next one is loaded
            self._model = DiffusionModel.load(entry.source, self._device, entry.dtype, vae_dtype=entry.vae_dtype)
            if self._compiled:
                self._model.compile()
            self._name = name
            self._adapter = None
            self._loaded_at = time.monotonic()
            _logger.info("the model %s is loaded", name)
            for note in self._model.notes:
                _logger.info("the model %s: %s", name, note)
        return self._model

    def _detach(self, model: DiffusionModel) -> None:
        if self._adapter is not None:
            detach(model.unet)
            self._adapter = None
