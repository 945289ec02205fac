"""Compare automatic mask thresholds with hand-set ones: `python -m tools.shapes.thresholds_report`.

Only rendered images have true masks. Therefore scenes of every training prompt are rendered, encoded, noised to each
fused step and passed to the U-Net with their prompt. The thresholded item maps are compared with the rendered items.
The automatic thresholds come from generated samples of the prompt, as in a training, never from the renders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dfusion.attention.layers import find_layers, mask_layers
from dfusion.attention.masks import item_weights
from dfusion.attention.processors import AttentionContext, processors_installed
from dfusion.config import FusionConfig, SamplingConfig
from dfusion.ddim import Schedule
from dfusion.guidance import predict
from dfusion.models import DiffusionModel
from dfusion.sampling import next_noise, noise_generators, sample
from dfusion.shapes.judge import MODELS
from dfusion.shapes.prompts import ShapesPrompt, prompt_list
from dfusion.shapes.scenes import TEMPLATES, Scene, Template, item_masks, random_scene, render
from dfusion.thresholds import mask_iou, thresholds_of


@dataclass(frozen=True)
class Agreement:
    """One prompt: the thresholds of its K items, and the mean IoU of their masks with the true ones."""

    automatic: tuple[float, ...]
    hand_set: tuple[float, ...]
    automatic_iou: tuple[float, ...]
    hand_set_iou: tuple[float, ...]


@torch.no_grad()
def encode_images(model: DiffusionModel, images: np.ndarray) -> torch.Tensor:
    """Clean latents (B, C, h, w) float32 on the CPU of images (B, H, W, 3) uint8: the mean of the VAE's posterior."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(model.vae.device, model.vae.dtype) / 127.5 - 1
    latents = model.vae.encode(pixels).latent_dist.mean - (getattr(model.vae.config, "shift_factor", None) or 0.0)
    return (latents * model.vae.config.scaling_factor).float().cpu()  # type: ignore[no-any-return]


@torch.no_grad()
def noised_item_maps(
    model: DiffusionModel,
    clean: torch.Tensor,
    prompt: ShapesPrompt,
    schedule: Schedule,
    steps: Sequence[int],
    seed: int,
    config: FusionConfig = FusionConfig(),
) -> torch.Tensor:
    """Item maps (B, len(steps), h_m, w_m, K) of clean latents (B, C, h, w), noised to each of `steps`.

    x_t = sqrt(alpha-bar) * x_0 + sqrt(1 - alpha-bar) * z. The B rows have the seeds seed, seed + 1, ...
    """
    embeds = model.encode_prompts([prompt.text]).expand(len(clean), -1, -1)
    items = [model.item_tokens(prompt.text, prompt.items)] * len(clean)
    weights = item_weights(items, embeds.embeds.shape[1]).to(model.unet.device)
    layers = mask_layers(find_layers(model.unet), config.mask_source)
    size = layers[0].size(clean.shape[2], clean.shape[3])
    generators = noise_generators(range(seed, seed + len(clean)))

    maps = []
    with processors_installed(model.unet, capture=layers):
        for step in steps:
            alpha = schedule.alphas[step]
            noise = next_noise(generators, (clean.shape[1], clean.shape[2], clean.shape[3]))
            x_t = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).to(model.unet.device)
            context = AttentionContext(item_weights=weights)
            predict(model.unet, x_t, schedule.timesteps[step], embeds, None, 1.0, context)
            maps.append(context.item_maps(size).cpu())
    return torch.stack(maps, 1)


def true_masks(scenes: Sequence[Scene], size: int) -> torch.Tensor:
    """(B, size, size, K) bool: the cells of which an item covers at least half."""
    shares = np.stack([item_masks(scene, size) for scene in scenes])
    return torch.from_numpy(shares).movedim(1, -1) >= 0.5


def measure(
    model: DiffusionModel, prompt: ShapesPrompt, samples: int, count: int, seed: int, config: FusionConfig
) -> Agreement:
    """Compute thresholds from `samples` generated samples of a prompt, and measure them on `count` rendered scenes."""
    # 1. automatic thresholds
    settings = SamplingConfig()
    trajectory = sample(
        model.unet,
        model.scheduler,
        model.encode_prompts([prompt.text]).expand(samples, -1, -1),
        model.encode_prompts([""]),
        range(seed, seed + samples),
        items=[model.item_tokens(prompt.text, prompt.items)] * samples,
        config=settings,
        mask_source=config.mask_source,
    )
    automatic = thresholds_of(trajectory, config)

    # 2. item maps and true masks of rendered scenes
    rng = np.random.default_rng(seed)
    scenes = [random_scene(prompt.template, rng, **prompt.named) for _ in range(count)]
    schedule = Schedule.from_scheduler(model.scheduler, settings.num_steps, settings.eta)
    steps = config.steps(len(schedule))
    clean = encode_images(model, np.stack([render(scene) for scene in scenes]))
    maps = noised_item_maps(model, clean, prompt, schedule, steps, seed + samples, config)
    truth = true_masks(scenes, maps.shape[2])[:, None]

    def iou(thresholds: Sequence[float]) -> tuple[float, ...]:
        return tuple(mask_iou(maps, torch.tensor(thresholds), truth).mean((0, 1)).tolist())

    return Agreement(automatic, prompt.thresholds, iou(automatic), iou(prompt.thresholds))


def report(
    model: DiffusionModel, template: Template, prompts: int, samples: int, count: int, seed: int, config: FusionConfig
) -> list[str]:
    """The lines of one template: for each item the mean IoU and threshold, automatic and hand-set."""
    results = []
    for n, prompt in enumerate(prompt_list(template, "train")[:prompts]):
        results.append(measure(model, prompt, samples, count, seed + 1000 * n, config))
    automatic = np.array([agreement.automatic_iou for agreement in results])
    hand_set = np.array([agreement.hand_set_iou for agreement in results])

    lines = [
        f"{template}: mean IoU with the true masks, automatic {automatic.mean():.3f}, hand-set {hand_set.mean():.3f}; "
        f"automatic at least as good for {np.mean(automatic >= hand_set):.0%} of items"
    ]
    for item in range(automatic.shape[1]):
        thresholds = np.array([agreement.automatic[item] for agreement in results])
        lines.append(
            f"  item {item}: automatic {automatic[:, item].mean():.3f} (thresholds {thresholds.min():.3f} to "
            f"{thresholds.max():.3f}), hand-set {hand_set[:, item].mean():.3f} ({results[0].hand_set[item]:.3f})"
        )
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=MODELS / "pipeline")
    parser.add_argument("--prompts", type=int, default=40, help="training prompts per template")
    parser.add_argument("--samples", type=int, default=4, help="generated samples per prompt, for its thresholds")
    parser.add_argument("--scenes", type=int, default=4, help="rendered scenes per prompt, to judge the thresholds")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--template", choices=TEMPLATES, action="append")
    parser.add_argument("--mask-source", choices=["first_up", "resolution"], default=FusionConfig().mask_source)
    arguments = parser.parse_args()

    model = DiffusionModel.load(arguments.pipeline)
    config = FusionConfig(mask_source=arguments.mask_source)
    counts = (arguments.prompts, arguments.samples, arguments.scenes)
    for template in arguments.template or TEMPLATES:
        lines = report(model, template, *counts, arguments.seed, config)
        sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
