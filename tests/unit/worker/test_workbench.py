from pathlib import Path

import torch

from tests.service import settings_for
from worker.workbench import set_up_torch


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
