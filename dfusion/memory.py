"""Memory of a torch device, and copies to it."""

from __future__ import annotations

import sys

import torch


def peak_bytes(device: torch.device | str) -> int:
    """Peak bytes allocated by tensors on a GPU since its statistics were reset.

    On a CPU, the peak memory of this process; 0 on Windows.
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
    """Bytes allocated by tensors on a GPU."""
    return torch.cuda.memory_allocated(device)


def free_bytes(device: torch.device) -> int:
    """Bytes available to new tensors on a GPU, including torch's unused cache."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to the device. A copy to a GPU does not block."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
