"""One thread: the nets are so small that more only get in each other's way."""

import torch

from dfusion import _torchvision_ops  # noqa: F401  (before test modules import diffusers or peft)

torch.set_num_threads(1)
