from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from service.errors import StartError
from service.settings import Settings
from tests.service import settings_for
from worker import workbench
from worker.workbench import require_devices, set_up_torch


@pytest.fixture
def allocator_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the calls of allocator settings, without changing this process."""
    calls: list[str] = []
    monkeypatch.setattr(workbench, "keep_freed_memory", lambda: calls.append("keep"))
    return calls


@pytest.mark.parametrize(("device", "expected"), [("cpu", ["keep"]), ("cuda", [])])
def test_a_worker_keeps_freed_memory_where_it_computes_in_it(
    tmp_path: Path, allocator_calls: list[str], device: str, expected: list[str]
) -> None:
    set_up_torch(settings_for(tmp_path, tmp_path, device=device))
    assert allocator_calls == expected


@pytest.mark.usefixtures("allocator_calls")
def test_float32_is_not_rounded_in_a_worker(tmp_path: Path) -> None:
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        set_up_torch(settings_for(tmp_path, tmp_path))
        assert [switch.allow_tf32 for switch in switches] == [False, False]
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was


@pytest.mark.usefixtures("allocator_calls")
def test_a_worker_draws_no_progress_bars(tmp_path: Path) -> None:
    logging.enable_progress_bar()
    try:
        set_up_torch(settings_for(tmp_path, tmp_path))
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_a_device_that_torch_cannot_use_is_named() -> None:
    with pytest.raises(StartError, match=r"^DFUSION_DEVICE: torch cannot use 'cuda:99': "):
        require_devices(Settings(device="cuda:99"))
    with pytest.raises(StartError, match=r"^DFUSION_TRAINING_DEVICES: torch cannot use 'cuda:99': "):
        require_devices(Settings(device="cpu", training_devices=("cpu", "cuda:99")))


@pytest.mark.parametrize("devices", [("meta:0",), ("meta:1", "meta:1")])
def test_a_training_uses_each_device_once(devices: tuple[str, ...]) -> None:
    """Meta is a device that torch has everywhere. Processes may share a CPU."""
    message = rf"^DFUSION_TRAINING_DEVICES: .* each device once, .*own \(meta:0\), got '{devices[-1]}'"
    with pytest.raises(StartError, match=message):
        require_devices(Settings(device="meta", training_devices=devices))
    require_devices(Settings(device="meta", training_devices=("meta:1", "meta:2", "cpu", "cpu")))
