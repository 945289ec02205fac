"""For how long a worker prefers stages on its loaded model."""

from types import SimpleNamespace
from typing import Any

import pytest

from worker import model_cache
from worker.model_cache import ModelCache


class Clock:
    """A monotonic clock that the tests set."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


def test_a_loaded_model_is_preferred_for_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    loaded = SimpleNamespace(notes=("sampled by DDIM",))
    monkeypatch.setattr(model_cache, "time", clock)
    monkeypatch.setattr(model_cache, "DiffusionModel", SimpleNamespace(load=lambda *_arguments, **_options: loaded))
    entry = SimpleNamespace(source="", dtype=None, vae_dtype=None, adapter=None)
    catalogue: Any = SimpleNamespace(models={"tiny": entry, "other": entry})
    cache = ModelCache(catalogue, store=SimpleNamespace(), device="cpu")  # type: ignore[arg-type]
    assert cache.preferred is None

    cache.with_adapter("tiny", None)
    clock.seconds = 129.0
    cache.with_adapter("tiny", None)  # it is loaded already
    assert cache.preferred == "tiny"
    clock.seconds = 130.0
    assert (cache.preferred, cache.loaded) == (None, "tiny")

    cache.with_adapter("other", None)
    assert cache.preferred == "other"


@pytest.mark.parametrize("compiled", [True, False])
def test_a_model_is_compiled_once_if_the_setting_says_so(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    calls: list[str] = []
    loaded = SimpleNamespace(notes=(), compile=lambda: calls.append("compile"))
    monkeypatch.setattr(model_cache, "DiffusionModel", SimpleNamespace(load=lambda *_arguments, **_options: loaded))
    entry = SimpleNamespace(source="", dtype=None, vae_dtype=None, adapter=None)
    catalogue: Any = SimpleNamespace(models={"tiny": entry})
    cache = ModelCache(catalogue, SimpleNamespace(), "cpu", compiled)  # type: ignore[arg-type]

    cache.with_adapter("tiny", None)
    cache.with_adapter("tiny", None)

    assert calls == ["compile"] * compiled
