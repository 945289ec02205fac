"""One thread, and freed memory is kept, as for the library's tests (tests/unit/dfusion/conftest.py)."""

import torch

from dfusion import _torchvision_ops  # noqa: F401  (before test modules import diffusers or open_clip)
from tests.unit.api.conftest import live as live
from worker.allocator import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()
