import runpy
import sys
from types import SimpleNamespace

import pytest

from dfusion import memory


@pytest.mark.parametrize(("platform", "expected"), [("linux", 7 * 1024), ("darwin", 7)])
def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch, platform: str, expected: int) -> None:
    """getrusage(2) counts KiB on Linux, and bytes on macOS."""
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=7))
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(memory, "sys", SimpleNamespace(platform=platform))
    assert memory.peak_bytes("cpu") == expected


def test_peak_memory_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no module `resource`."""
    monkeypatch.setitem(sys.modules, "resource", None)
    assert runpy.run_path(memory.__file__)["peak_bytes"]("cpu") == 0
