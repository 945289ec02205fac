"""One thread, since more threads only slow these small nets down. Keep freed memory, since otherwise each matrix of
explicit attention would page-fault again."""

import torch

from dfusion import _torchvision_ops  # noqa: F401  (before test modules import diffusers or peft)
from worker.allocator import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()
