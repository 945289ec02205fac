"""Train the model of numbers from the shipped shapes pipeline: `python -m tools.shapes.numbers --out BUILD`.

The U-Net and the text encoder continue from the shapes world's; the VAE is the same. It is resumable, as the parts of
`tools.shapes.build`. As there, the last captions have mistakes, so the model draws clean digits that do not always
match the prompt. The shipped model is the folder `pipeline` of BUILD, trained with `--threads 1`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dfusion._diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from dfusion.shapes.judge import MODELS
from dfusion.shapes.numbers import NumberScene, caption, digit_boxes, random_number, render_number
from tools.shapes.build import GROUNDING_WEIGHT, SEED, save_pipeline, to_tensor, train
from tools.shapes.captions import MAX_TOKENS, new_tokenizer
from tools.shapes.denoiser import TrainingAttention, grounding_loss, new_scheduler

DATASET_SIZE = 6000
BATCH = 16
NOISY_STEPS = 300
"""The last steps have captions with mistakes. Earlier captions are correct."""
WRONG_SHARE = 0.4
"""The share of digits that are wrong in these captions."""


@torch.no_grad()
def latent_dataset(vae: Any) -> tuple[dict[str, torch.Tensor], list[NumberScene]]:
    """The scaled latents and digit boxes (in [0, 1]) of `DATASET_SIZE` rendered numbers, and their scenes."""
    rng = np.random.default_rng([SEED, 4])
    scenes = [random_number(rng) for _ in range(DATASET_SIZE)]

    latents = []
    for start in range(0, DATASET_SIZE, 64):
        x = to_tensor([render_number(scene) for scene in scenes[start : start + 64]])
        latents.append(vae.encode(x).latent_dist.mean * vae.config.scaling_factor)
    boxes = np.stack([digit_boxes(scene, 16) for scene in scenes])
    return {"latents": torch.cat(latents), "masks": torch.from_numpy(boxes)}, scenes


def wrong_digits(number: str, rng: np.random.Generator) -> str:
    """`number` with each digit replaced by another one at the rate of `WRONG_SHARE`."""
    digits = []
    for digit in number:
        others = [other for other in "0123456789" if other != digit]
        digits.append(others[int(rng.integers(9))] if rng.random() < WRONG_SHARE else digit)
    return "".join(digits)


def build(out: Path, steps: int) -> None:
    """Train the U-Net and the text encoder, each digit's token grounded in that digit."""
    from transformers import CLIPTextModel

    # 1. the shapes world's weights
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_pretrained(MODELS / "pipeline" / "vae", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(MODELS / "pipeline" / "unet", torch_dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(MODELS / "pipeline" / "text_encoder", dtype=torch.float32)
    attention = TrainingAttention()
    unet.set_attn_processor(attention)
    model = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).train()

    dataset, scenes = latent_dataset(vae)
    tokenizer = new_tokenizer()
    scheduler = new_scheduler()
    alphas = scheduler.alphas_cumprod
    first_digit = len(tokenizer(caption("")[:-1], add_special_tokens=False).input_ids) + 1

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        # 2. captions, some of them wrong or empty
        rng = np.random.default_rng([SEED, 5, step])
        generator = torch.Generator().manual_seed(step)
        indices = rng.integers(len(scenes), size=BATCH)
        captions = [""] * BATCH
        columns = torch.full((BATCH, 2), -1)
        for row, index in enumerate(indices):
            number = scenes[index].text
            if step >= steps - NOISY_STEPS:
                number = wrong_digits(number, rng)
            if rng.random() >= 0.1:
                captions[row] = caption(number)
                columns[row] = torch.tensor([first_digit, first_digit + 1])

        # 3. the prediction
        tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        x0 = dataset["latents"][indices]
        t = (torch.rand(BATCH, generator=generator) * 1000).long()
        noise = torch.randn(x0.shape, generator=generator)
        attention.maps.clear()
        states = text_encoder(tokens).last_hidden_state
        predicted = unet(scheduler.add_noise(x0, noise, t), t, states).sample

        # 4. the loss
        snr = alphas[t] / (1 - alphas[t])
        error = (predicted - noise).square().mean((1, 2, 3))
        grounding = grounding_loss(attention.maps, dataset["masks"][indices], columns)
        weight = torch.where(snr > 1, (5 / snr).clamp(max=1), snr.rsqrt())
        loss = (error * weight).mean() + GROUNDING_WEIGHT * grounding
        return loss, {"plain": error.mean().item(), "grounding": grounding.item()}

    train("numbers", out, model, step_loss, steps=steps, learning_rate=4e-4, ema_decay=0.995, decay_steps=NOISY_STEPS)

    # 5. the pipeline
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_config(unet.config),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.unet.load_state_dict(unet.state_dict())
    save_pipeline(pipeline, out / "pipeline")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/shapes-numbers"))
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    build(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
