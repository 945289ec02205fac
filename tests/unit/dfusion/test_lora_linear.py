"""dfusion.lora_linear: adapted layers give peft's results with fewer operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfusion._diffusers import LoraLinear, peft
from dfusion.adapter import attach_lora, lora_parameters
from dfusion.config import LoraConfig
from dfusion.lora_linear import FastLoraLinear, use_fast_layers
from tests.nets import embeds, tiny_unet


def adapted(bias: bool, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """A layer of 6 inputs and 5 outputs with a random adapter of rank 2 and alpha 6, so that its scaling is 3."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5, bias=bias, dtype=dtype)).requires_grad_(False)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **settings)
    network = peft.inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape)
    use_fast_layers(network)
    return network


def weights(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, A and B in float64."""
    tensors = (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    weight, down, up = (tensor.detach().double() for tensor in tensors)
    return weight, down, up


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_formula(bias: bool) -> None:
    network = adapted(bias)
    layer = network[0]
    weight, down, up = weights(layer)
    x = torch.randn(3, 4, 6, requires_grad=True)
    output_gradient = torch.randn(3, 4, 5)

    output = network(x)
    output.backward(output_gradient)

    rows = x.detach().double().reshape(12, 6)
    gradients = output_gradient.double().reshape(12, 5)
    expected = rows @ weight.T + 3 * rows @ down.T @ up.T
    if bias:
        expected += layer.base_layer.bias.double()
    assert isinstance(layer, FastLoraLinear)
    torch.testing.assert_close(output.double().reshape(12, 5), expected, rtol=1e-5, atol=1e-5)
    for actual, formula in (
        (x.grad, gradients @ (weight + 3 * up @ down)),
        (layer.lora_A["default"].weight.grad, 3 * (gradients @ up).T @ rows),
        (layer.lora_B["default"].weight.grad, 3 * gradients.T @ (rows @ down.T)),
    ):
        torch.testing.assert_close(actual.double().reshape(formula.shape), formula, rtol=1e-5, atol=1e-4)


def test_half_precision_keeps_small_updates_and_float32_gradients() -> None:
    """An update of 0.1 % of the weights is below bfloat16's resolution of 0.4 %, so it would vanish in W + s B A."""
    network = adapted(False, torch.bfloat16)
    layer = network[0]
    layer.base_layer.weight.data = torch.ones(5, 6, dtype=torch.bfloat16)
    layer.lora_A["default"].weight.data = torch.ones(2, 6)
    layer.lora_B["default"].weight.data = torch.full((5, 2), 0.001 / 6)
    x = torch.tensor([[1.0, -1, 1, -1, 1, 0]], dtype=torch.bfloat16)  # W x = 1
    zero = torch.tensor([[1.0, -1, 1, -1, 0, 0]], dtype=torch.bfloat16)  # W x = 0, B A x = 0
    many = torch.tensor([[8.0, 8, 8, 8, 8, -40]], dtype=torch.bfloat16)

    output = network(torch.cat([x, zero, many]))
    output.float().sum().backward()

    assert output.dtype == torch.bfloat16
    assert output[:, 0].tolist() == [1.0, 0.0, 0.0]
    layer.base_layer.weight.data.zero_()
    assert network(x)[0, 0].item() == pytest.approx(0.001, rel=0.01)
    assert layer.lora_B["default"].weight.grad.dtype == torch.float32


def test_an_adapter_without_effect_changes_no_bit() -> None:
    network = adapted(True)
    layer = network[0]
    layer.lora_B["default"].weight.data.zero_()
    x = torch.randn(7, 6)

    assert torch.equal(network(x), layer.base_layer(x))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_other_adapters_take_the_way_of_peft(settings: dict[str, Any]) -> None:
    network = adapted(True, **settings).train()
    x = torch.randn(7, 6)

    torch.manual_seed(1)
    output = network(x)
    torch.manual_seed(1)
    expected = LoraLinear.forward(network[0], x)

    assert torch.equal(output, expected)


def test_a_disabled_adapter_has_no_effect() -> None:
    network = adapted(True)
    network[0].enable_adapters(False)
    x = torch.randn(7, 6)

    assert torch.equal(network(x), network[0].base_layer(x))


class Operations(TorchDispatchMode):
    """Counts operations other than views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 1), (torch.bfloat16, 4)])
def test_operations_that_an_adapter_adds_to_each_layer(dtype: torch.dtype, expected: int) -> None:
    """float32: the product B A. Half precision: the conversions of A and B, the product A x, and the sum."""
    unet = nn.Module.to(tiny_unet(), dtype)
    x = torch.randn(1, 4, 8, 8, dtype=dtype)

    def count() -> int:
        with torch.no_grad(), Operations() as operations:
            unet(x, 5, encoder_hidden_states=embeds(1).to(dtype))
        return operations.counts.total()

    without = count()
    attach_lora(unet, LoraConfig())

    assert count() - without == expected * len(lora_parameters(unet)) / 2
