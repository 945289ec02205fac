"""The adapted linear layers of a U-Net, with fewer operations than peft's and the same results.

peft computes W x + s B A x in four steps: the layer, A, B and the sum. If the U-Net is in half precision, it converts x
and the result to float32 on the way. Here a float32 layer has one matrix, W + s B A. Its sum costs less than 1 % of a
call, which has hundreds of rows. In half precision the sum would be rounded, and small updates of the adapter would be
lost. Such a layer adds s B A x to W x, with A and B rounded. Weights and gradients of the adapter are always float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dfusion._diffusers import LoraLinear, UNet2DConditionModel


class _MergedLinear(torch.autograd.Function):
    """x (W + s B A)^T + bias for x (..., in), W (out, in), A (r, in) and B (out, r), with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scaling = scaling
        return functional.linear(x, torch.addmm(weight, up, down, alpha=scaling), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        inputs = x.flatten(0, -2)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ torch.addmm(weight, up, down, alpha=ctx.scaling)

        down_gradient = ctx.scaling * ((rows @ up).T @ inputs)
        up_gradient = ctx.scaling * (rows.T @ (inputs @ down.T))
        return x_gradient, None, None, down_gradient, up_gradient, None


class FastLoraLinear(LoraLinear):  # type: ignore[misc]
    """peft's adapted linear layer with another forward pass, which has the same output.

    It falls back to peft's for DoRA, dropout, a disabled adapter and several adapters.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self._only_adapter()
        base = self.base_layer
        if args or kwargs or name is None or base.weight.dtype != x.dtype:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]

        down = self.lora_A[name].weight
        up = self.lora_B[name].weight
        scaling = self.scaling[name]
        if x.dtype == down.dtype:
            return _MergedLinear.apply(x, base.weight, base.bias, down, up, scaling)  # type: ignore[no-any-return, no-untyped-call]

        output = base(x)
        low_rank = x.flatten(0, -2) @ down.to(x.dtype).T
        return torch.addmm(output.flatten(0, -2), low_rank, up.to(x.dtype).T, alpha=scaling).reshape(output.shape)

    def _only_adapter(self) -> str | None:
        """The name of the adapter, if the output is that of a single LoRA without dropout."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        [name] = self.active_adapters
        plain = name in self.lora_A and name not in self.lora_variant
        plain = plain and isinstance(self.lora_dropout[name], nn.Identity) and not self.lora_bias[name]
        return name if plain else None


def use_fast_layers(unet: UNet2DConditionModel) -> None:
    """Change peft's adapted linear layers of `unet` to FastLoraLinear. Convolutions stay peft's."""
    for module in unet.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            module.__class__ = FastLoraLinear
