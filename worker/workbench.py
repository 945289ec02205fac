"""Shared state of all stages: the installation, and its models and scorers, which are loaded once."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

import torch

from dfusion._diffusers import disable_progress_bar
from dfusion.memory import peak_bytes
from dfusion.rewards import Scorer, load_scorer
from dfusion.rewards.weighted import WeightedScorer
from service.catalogue import Catalogue
from service.db.unit_of_work import UnitOfWork
from service.errors import StartError
from service.jobs.execution import Claim
from service.jobs.kinds import ScorerRef
from service.service import Service
from service.settings import Settings
from service.storage import Store
from worker.allocator import keep_freed_memory
from worker.model_cache import ModelCache
from worker.watchdog import Watchdog

_KEPT_BATCH_SIZES = 1000
_COMPILERS = ("g++", "clang++")


def device_of(settings: Settings) -> str:
    """The torch device of a worker with these settings."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_devices(settings: Settings) -> None:
    """Check what the settings expect of this host.

    Raises:
        StartError: torch cannot use a device; a training would use a GPU twice; a required compiler is missing.
    """
    if settings.compile_models and not any(map(shutil.which, _COMPILERS)):
        raise StartError(f"DFUSION_COMPILE_MODELS: expected a C++ compiler ({' or '.join(_COMPILERS)}), got none")
    _require_usable("DFUSION_DEVICE", device_of(settings))

    used = [_numbered(device_of(settings))]
    for device in settings.training_devices:
        _require_usable("DFUSION_TRAINING_DEVICES", device)
        if _numbered(device) in used and device != "cpu":
            expected = f"expected each device once, without the worker's own ({used[0]})"
            raise StartError(f"DFUSION_TRAINING_DEVICES: {expected}, got {device!r}")
        used.append(_numbered(device))


def _numbered(device: str) -> torch.device:
    """The device with its number: a GPU without one is the first."""
    kind = torch.device(device)
    return kind if kind.type == "cpu" else torch.device(kind.type, kind.index or 0)


def _require_usable(setting: str, device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts that it has it
        reason = str(error).partition("\n")[0]
        raise StartError(f"{setting}: torch cannot use {device!r}: {reason}") from error


def set_up_torch(settings: Settings) -> None:
    """Configure torch for this process.

    Sets the number of threads and disables TF32 (decision 016). On a CPU, freed memory is kept for the next layer.
    Loading a model and downloading one draw no progress bars, which would be lines of the log.
    """
    set_up_torch_on(device_of(settings), settings.torch_threads)


def set_up_torch_on(device: str, threads: int) -> None:
    """`set_up_torch` for a process on this device. 0 threads: torch's default."""
    if device == "cpu":
        keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    disable_progress_bar()


@dataclass
class Workbench:
    """The state of an installation that a worker uses."""

    settings: Settings
    uow: UnitOfWork
    store: Store
    catalogue: Catalogue
    device: str
    models: ModelCache
    watchdog: Watchdog
    _scorers: dict[str, Scorer] = field(default_factory=dict)
    _batch_sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    """The sizes smaller than the setting, by job and kind of stage."""

    @classmethod
    def of(cls, service: Service, watchdog: Watchdog | None = None) -> Workbench:
        """The workbench of an opened installation, in a process with this watchdog."""
        device = device_of(service.settings)
        models = ModelCache(service.catalogue, service.store, device, service.settings.compile_models)
        watchdog = watchdog or Watchdog(service.settings)
        return cls(service.settings, service.uow, service.store, service.catalogue, device, models, watchdog)

    def about(self) -> tuple[str, str | None, int | None]:
        """The device, the loaded base model, and the bytes of GPU memory that torch holds."""
        memory_bytes = torch.cuda.memory_reserved(self.device) if self._on_gpu else None
        return self.device, self.models.loaded, memory_bytes

    @property
    def _on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def forget_peak_memory(self) -> None:
        """Reset `peak_memory`, if the device supports it."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Peak memory of tensors on the GPU in bytes. Without a GPU, peak memory of this process since it started."""
        return peak_bytes(self.device)

    def batch_size(self, claim: Claim) -> int:
        """The images in one batch of this stage: DFUSION_BATCH_SIZE, or less if that did not fit into memory."""
        return self._batch_sizes.get((claim.job_id, claim.kind), self.settings.batch_size)

    def shrink_batches(self, claim: Claim, size: int) -> None:
        """Set a smaller batch size for the stages of the same kind and job."""
        if len(self._batch_sizes) >= _KEPT_BATCH_SIZES:  # most of these jobs have ended
            self._batch_sizes.clear()
        self._batch_sizes[claim.job_id, claim.kind] = size

    def scorer(self, scorer: ScorerRef) -> Scorer:
        """The scorer of this name, or this weighted sum. Raises ModelNotFoundError."""
        key = scorer if isinstance(scorer, str) else scorer.model_dump_json()
        if key not in self._scorers:
            self._scorers[key] = self._load(scorer)
        return self._scorers[key]

    def _load(self, scorer: ScorerRef) -> Scorer:
        if isinstance(scorer, str):
            return load_scorer(scorer, self.device, installed=self.catalogue.installed)
        # the parts of a sum are shared with the jobs that name them
        parts = [(part.weight, self.scorer(part.scorer)) for part in scorer.parts]
        return WeightedScorer(parts, normalise=scorer.normalise)
