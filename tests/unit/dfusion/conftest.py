"""One thread: the nets are so small that more only get in each other's way. And memory that stays: each matrix of
explicit attention would fault all its pages anew."""

import torch

from dfusion import _torchvision_ops  # noqa: F401  (before test modules import diffusers or peft)
from worker.allocator import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()
