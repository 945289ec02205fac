"""Memory of a torch device, and copies to it."""

from __future__ import annotations

import sys

import torch


def peak_bytes(device: torch.device | str) -> int:
    """Peak memory of tensors on a GPU, since its statistics were reset.

    For a CPU, peak memory of this process; 0 on Windows, where Python cannot read it.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def used_bytes(device: torch.device) -> int:
    """Memory of tensors on a GPU."""
    return torch.cuda.memory_allocated(device)


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that tensors can still take, including what torch holds for them."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to the device. On a GPU, it does not wait for the work that is queued there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
