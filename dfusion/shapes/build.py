"""Train the shapes world's models from nothing: `python -m dfusion.shapes.build all --out BUILD`.

Each part is resumable: it saves its state every minute beside its log and goes on from there.
    vae     AutoencoderKL, 64x64 RGB <-> 16x16x4 latents
    unet    U-Net and text encoder, on captions in which a share of words is wrong (see `captions.py`)
    clip    the open_clip model that gives the reward
    judge   the independent judge
    ship    everything into the package's `models` folder, in half precision
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dfusion import _torchvision_ops  # noqa: F401

from dfusion.shapes.scenes import TEMPLATES, Scene, random_scene, render

SEED = 20260


def scenes(seed: int) -> Iterator[Scene]:
    """An endless stream of scenes, the three templates in turn, reproducible from `seed`."""
    rng = np.random.default_rng([SEED, seed])
    while True:
        for template in TEMPLATES:
            yield random_scene(template, rng)


def to_tensor(pixels: list[np.ndarray]) -> torch.Tensor:
    """uint8 (H, W, 3) pictures to one float32 (B, 3, H, W) tensor in [-1, 1]."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(
    name: str,
    folder: Path,
    model: nn.Module,
    step_loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 1e-4,
    ema_decay: float | None = None,
) -> None:
    """AdamW with warm-up and cosine decay; checkpoint every minute, log every 50 steps, resume where it stopped.

    `step_loss(step)` computes the loss of one step and must depend on `step` alone (not on what ran before).
    With `ema_decay` the averaged weights are the ones left in `model` at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file, log_file = folder / f"{name}.train.pt", folder / f"{name}.log.jsonl"
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
    average = {k: v.clone() for k, v in model.state_dict().items()} if ema_decay else None
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    started = saved = time.monotonic()
    for step in range(first, steps):
        warm = min(1.0, (step + 1) / 200)
        rate = learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, figures = step_loss(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss at step {step} is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if average is not None and ema_decay:
            decay = min(ema_decay, (step + 1) / (step + 10))
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)
        if step % 50 == 0 or step == steps - 1:
            row = {"step": step, "loss": round(loss.item(), 5), "seconds": round(time.monotonic() - started, 1)}
            with log_file.open("a") as log:
                log.write(json.dumps(row | {k: round(v, 5) for k, v in figures.items()}) + "\n")
        if time.monotonic() - saved > 60 or step == steps - 1:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step + 1}
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").rename(state_file)
            saved = time.monotonic()
    if average is not None:
        model.load_state_dict(average)


def new_vae() -> Any:
    """AutoencoderKL, factor 4, 4 latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def build_vae(out: Path, steps: int) -> None:
    """Reconstruction (L1 + L2) with a slight pull of the latents to the unit Gaussian."""
    torch.manual_seed(SEED)
    vae = new_vae()

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        stream = scenes(step)
        x = to_tensor([render(next(stream)) for _ in range(18)])
        generator = torch.Generator().manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(generator)).sample.float()
        error = y - x
        l1, l2 = error.abs().mean(), error.square().mean()
        kl = posterior.kl().float().mean() / x[0].numel()
        return l1 + 2 * l2 + 1e-4 * kl, {"l1": l1.item(), "l2": l2.item(), "kl": kl.item()}

    train("vae", out, vae, step_loss, steps=steps, learning_rate=2e-3, ema_decay=0.99)
    measure_latents(vae)
    vae.save_pretrained(out / "vae")


@torch.no_grad()
def measure_latents(vae: Any, count: int = 300) -> None:
    """Set the scaling factor so that latents have unit standard deviation over all channels."""
    stream = scenes(10**6)
    x = to_tensor([render(next(stream)) for _ in range(count)])
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(60)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["vae"])
    parser.add_argument("--out", type=Path, default=Path("build/shapes"))
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    build_vae(arguments.out, arguments.steps or 2800)


if __name__ == "__main__":
    main()
