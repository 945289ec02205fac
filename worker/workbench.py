"""What all stages share: the installation, its models and its scorers, loaded once and kept."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field

import torch

from dfusion.rewards import Scorer, load_scorer
from service.catalogue import Catalogue
from service.db.unit_of_work import UnitOfWork
from service.jobs.kinds import ScorerRef
from service.service import Service
from service.settings import Settings
from service.storage import Store
from worker.allocator import keep_freed_memory
from worker.model_cache import ModelCache


def device_of(settings: Settings) -> str:
    """The torch device of a worker with these settings."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def set_up_torch(settings: Settings) -> None:
    """Configure torch for this process: number of threads, no TF32 (decision 016), and on a CPU memory that is kept for
    the next layer."""
    if device_of(settings) == "cpu":
        keep_freed_memory()
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


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
        device = device_of(service.settings)
        models = ModelCache(service.catalogue, service.store, device)
        return cls(service.settings, service.uow, service.store, service.catalogue, device, models)

    def about(self) -> tuple[str, str | None, int | None]:
        """The device, the loaded base model, and the bytes of GPU memory that torch holds."""
        memory_bytes = torch.cuda.memory_reserved(self.device) if self._on_gpu else None
        return self.device, self.models.loaded, memory_bytes

    @property
    def _on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def forget_peak_memory(self) -> None:
        """Measure `peak_memory` from now on, if the device supports it."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """The most bytes of GPU memory that tensors took; without a GPU, of main memory since the process started."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB

    def scorer(self, scorer: ScorerRef) -> Scorer:
        """The scorer of that name, or that weighted sum. Raises ModelNotFoundError."""
        key = scorer if isinstance(scorer, str) else scorer.model_dump_json()
        if key not in self._scorers:
            self._scorers[key] = load_scorer(scorer, self.device, installed=self.catalogue.installed)
        return self._scorers[key]
