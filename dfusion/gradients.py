"""Gradients of an adapter's parameters: scale, norm, and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dfusion._diffusers import UNet2DConditionModel
from dfusion.memory import free_bytes, used_bytes

_SAFETY = 1.5
"""The backward pass takes more than the activations."""


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients in place. The result is exact if `factor` is a power of two."""
    for gradient in _gradients(parameters):
        gradient.mul_(factor)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The Euclidean norm of all gradients together, () on their device."""
    norm: torch.Tensor = torch.stack([gradient.norm() for gradient in _gradients(parameters)]).norm()
    return norm


def share_below(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """The share of the gradients' non-zero elements whose absolute value is below `limit`."""
    sizes = torch.cat([gradient.abs().flatten() for gradient in _gradients(parameters)])
    nonzero = int((sizes > 0).sum())
    return int(((sizes > 0) & (sizes < limit)).sum()) / nonzero if nonzero else 0.0


def _gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def must_checkpoint(device: torch.device, rows: int, forward: Callable[[], object]) -> bool:
    """Whether the activations of `rows` rows might not fit into the memory that is free on a GPU. False on a CPU.

    `forward` is a forward pass of one row with gradients; its result holds the activations. If it runs out of memory,
    they do not fit.
    """
    if device.type != "cuda":
        return False
    before = used_bytes(device)
    try:
        held = forward()
    except torch.OutOfMemoryError:
        return True
    needed = rows * (used_bytes(device) - before)
    del held
    return needed * _SAFETY > free_bytes(device)


@contextmanager
def checkpointing(unet: UNet2DConditionModel, requested: bool) -> Iterator[None]:
    """Enable gradient checkpointing within the context if it is requested, and restore it afterwards.

    A U-Net that already checkpoints continues to do so.
    """
    enable = requested and not unet.is_gradient_checkpointing
    if enable:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if enable:
            unet.disable_gradient_checkpointing()
