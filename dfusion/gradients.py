"""Gradients of an adapter's parameters: scale, norm, and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dfusion._diffusers import UNet2DConditionModel
from dfusion.guidance import placement


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients in place. The result is exact if `factor` is a power of two."""
    for gradient in _gradients(parameters):
        gradient.mul_(factor)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The Euclidean norm of all gradients together."""
    return float(torch.stack([gradient.norm() for gradient in _gradients(parameters)]).norm())


def share_below(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """The share of the gradients' non-zero elements whose absolute value is below `limit`."""
    sizes = torch.cat([gradient.abs().flatten() for gradient in _gradients(parameters)])
    nonzero = int((sizes > 0).sum())
    return int(((sizes > 0) & (sizes < limit)).sum()) / nonzero if nonzero else 0.0


def _gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@contextmanager
def checkpointing(unet: UNet2DConditionModel, setting: bool | None) -> Iterator[None]:
    """Enable gradient checkpointing within the context if `setting` is true, and restore it afterwards.

    None enables it on a GPU only. A U-Net that already checkpoints continues to do so.
    """
    device, _ = placement(unet)
    requested = device.type != "cpu" if setting is None else setting
    enable = requested and not unet.is_gradient_checkpointing

    if enable:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if enable:
            unet.disable_gradient_checkpointing()
