"""One thread, since more threads only slow these small nets down."""

import torch

from dfusion import _torchvision_ops  # noqa: F401  (before test modules import diffusers or peft)

torch.set_num_threads(1)
