"""The effect of one AdamW step on the prediction, by LoRA initialisation: `python -m benchmarks.lora_init`.

B starts at 0, so the first step changes B only, each element by the learning rate. Its effect on the prediction depends
on the size of A. The loss is the denoising error of one row of noise. The paper's model in full size (several GB of
memory, minutes on a CPU): `--unet sd-2.1-base`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Literal, get_args

import torch

from benchmarks.nets import SD_LAYOUTS, TOKENS, random_unet
from dfusion.adapter import attach_lora, detach, lora_parameters
from dfusion.config import LoraConfig

Init = Literal["gaussian", "kaiming"]


def change(name: str, init: Init, learning_rate: float) -> float:
    """The relative change of the prediction, ||after - before|| / ||before||, by one AdamW step."""
    unet = random_unet(name, "cpu", torch.float32)
    attach_lora(unet, LoraConfig(init=init), seed=1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 64, 64, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    prompt = torch.randn(1, TOKENS[name], unet.config.cross_attention_dim, generator=generator)

    before = unet(x, 501, prompt).sample
    (before - noise).square().mean().backward()
    torch.optim.AdamW(lora_parameters(unet).values(), learning_rate, eps=1e-30).step()
    with torch.no_grad():
        after = unet(x, 501, prompt).sample
    detach(unet)
    return float((after - before.detach()).norm() / before.detach().norm())


def main(write: Callable[[str], object] = sys.stdout.write) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", choices=SD_LAYOUTS, default="small")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    arguments = parser.parse_args()
    write(
        f"{arguments.unet}, rank 4, one AdamW step of {arguments.learning_rate:g}: relative change of the prediction\n"
    )
    for init in get_args(Init):
        write(f"{init:10}{change(arguments.unet, init, arguments.learning_rate):10.2e}\n")


if __name__ == "__main__":
    main()
