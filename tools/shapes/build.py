"""Train the shapes world's models from scratch: `python -m tools.shapes.build all --out BUILD`.

Each part is resumable: it saves its state every minute, next to its log.
    vae     AutoencoderKL, 64x64 RGB <-> 16x16x4 latents
    clip    the open_clip model of the reward
    judge   the independent judge
    unet    U-Net and text encoder (initialised from CLIP's), finally on captions with wrong words (see `captions.py`)
    ship    copy everything into the package's `models` folder, in half precision
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dfusion._diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from dfusion.shapes.judge import MODELS, PARTS, JudgeNet, canonical_parts, mirrored_parts
from dfusion.shapes.prompts import caption, named_parts
from dfusion.shapes.scenes import MIRRORED, TEMPLATES, Scene, Template, item_masks, random_scene, render
from tools.shapes.captions import MAX_TOKENS, new_tokenizer, wrong_parts
from tools.shapes.denoiser import (
    TEXT_LAYERS,
    TEXT_WIDTH,
    TrainingAttention,
    grounding_loss,
    item_columns,
    new_scheduler,
    new_text_encoder,
    new_unet,
    noisy_timesteps,
)

SEED = 20260
DATASET_SIZE = 36_000
UNET_BATCH = 32
NOISY_STEPS = 1000
"""The last steps of the U-Net's training have captions with mistakes (`WRONG_SHARE`). Earlier captions are correct."""
GROUNDING_WEIGHT = 0.04
CLIP_MEAN = 0.5
CLIP_STD = 0.3
CLIP_WEIGHTS = "open_clip_model.safetensors"


def scenes(seed: int, templates: Sequence[Template] = TEMPLATES) -> Iterator[Scene]:
    """An infinite stream of scenes that cycles through the templates, reproducible from `seed`."""
    rng = np.random.default_rng([SEED, seed])
    while True:
        for template in templates:
            yield random_scene(template, rng)


def to_tensor(pixels: list[np.ndarray]) -> torch.Tensor:
    """Convert uint8 images (H, W, 3) to one float32 tensor (B, 3, H, W) in [-1, 1]."""
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
    decay_steps: int | None = None,
) -> None:
    """Train with AdamW, warm-up, and cosine decay over the last `decay_steps` (all steps by default).

    It saves a checkpoint every minute, logs every 50 steps, and resumes from the checkpoint. `step_loss(step)` computes
    the loss of one step and must depend on `step` only. With `ema_decay`, `model` has the averaged weights at the end.
    """
    # 1. start or resume
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / f"{name}.train.pt"
    log_file = folder / f"{name}.log.jsonl"
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
    average = {k: v.clone() for k, v in model.state_dict().items()} if ema_decay else None
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        first = state["step"]

    started = saved = time.monotonic()
    for step in range(first, steps):
        # 2. the learning rate
        warm = min(1.0, (step + 1) / 200)
        decayed = max(0.0, 1 - (steps - step) / (decay_steps or steps))
        rate = learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * decayed)))
        for group in optimizer.param_groups:
            group["lr"] = rate

        # 3. the update
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

        # 4. log and checkpoint
        if step % 50 == 0 or step == steps - 1:
            row = {"step": step, "loss": round(loss.item(), 5), "seconds": round(time.monotonic() - started, 1)}
            with log_file.open("a") as log:
                log.write(json.dumps(row | {k: round(v, 5) for k, v in figures.items()}) + "\n")
        if time.monotonic() - saved > 60 or step == steps - 1:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save(state | {"step": step + 1}, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").rename(state_file)
            saved = time.monotonic()

    if average is not None:
        model.load_state_dict(average)


def new_vae() -> Any:
    """AutoencoderKL, factor 4, 4 latent channels."""
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
    """Train the VAE: reconstruction (L1 + L2) with a weak KL term towards the unit Gaussian."""
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
        l1 = error.abs().mean()
        l2 = error.square().mean()
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


@torch.no_grad()
def latent_dataset(out: Path, vae: Any) -> tuple[dict[str, torch.Tensor], list[Scene]]:
    """The latents of `DATASET_SIZE` rendered scenes, half of them with two objects, and the scenes.

    The tensors are scaled latents and item masks (uint8, 255: fully covered). They are computed once and stored in
    `out`.
    """
    stream = scenes(10**7, ("position", "behaviour", "position", "attribute"))
    dataset_scenes = [next(stream) for _ in range(DATASET_SIZE)]
    file = out / "latents.pt"
    if file.exists():
        return torch.load(file, weights_only=True), dataset_scenes

    parts = []
    for start in range(0, DATASET_SIZE, 64):
        x = to_tensor([render(scene) for scene in dataset_scenes[start : start + 64]])
        with torch.autocast("cpu", torch.bfloat16):
            parts.append((vae.encode(x).latent_dist.mean.float() * vae.config.scaling_factor).half())

    masks = torch.zeros(DATASET_SIZE, 2, 16, 16, dtype=torch.uint8)
    for row, scene in enumerate(dataset_scenes):
        covered = item_masks(scene, 16)
        masks[row, : len(covered)] = torch.from_numpy((covered * 255).astype(np.uint8))

    torch.save({"latents": torch.cat(parts), "masks": masks}, file)
    return torch.load(file, weights_only=True), dataset_scenes


def build_unet(out: Path, steps: int) -> None:
    """Train the U-Net and the text encoder: epsilon prediction, with item words grounded in their items.

    A tenth of the captions is empty. At low noise the loss weights are those of min-SNR (arXiv 2303.09556). At high
    noise, which determines the layout, they grow.
    """
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_pretrained(out / "vae")
    dataset, dataset_scenes = latent_dataset(out, vae)
    parts = [(scene.template, named_parts(scene)) for scene in dataset_scenes]
    tokenizer = new_tokenizer()
    scheduler = new_scheduler()
    text_encoder = new_text_encoder(load_file(out / "clip" / CLIP_WEIGHTS))
    unet = new_unet()
    attention = TrainingAttention()
    unet.set_attn_processor(attention)
    model = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    alphas = scheduler.alphas_cumprod

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        # 1. captions, some of them wrong or empty
        rng = np.random.default_rng([SEED, 1, step])
        generator = torch.Generator().manual_seed(step)
        indices = rng.integers(len(parts), size=UNET_BATCH)
        captions = [""] * UNET_BATCH
        columns = torch.full((UNET_BATCH, 2), -1)
        for row, index in enumerate(indices):
            template, named = parts[index]
            if step >= steps - NOISY_STEPS:
                named = wrong_parts(template, named, rng)
            if rng.random() >= 0.1:
                captions[row] = caption(template, named)
                own_columns = item_columns(template, named, captions[row])
                columns[row, : len(own_columns)] = torch.tensor(own_columns)

        # 2. the prediction
        tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        x0 = dataset["latents"][indices].float()
        masks = dataset["masks"][indices].float() / 255
        t = noisy_timesteps([parts[index][0] for index in indices], generator)
        noise = torch.randn(x0.shape, generator=generator)
        attention.maps.clear()
        with torch.autocast("cpu", torch.bfloat16):
            states = text_encoder(tokens).last_hidden_state
            predicted = unet(scheduler.add_noise(x0, noise, t), t, states).sample.float()

        # 3. the loss
        snr = alphas[t] / (1 - alphas[t])
        error = (predicted - noise).square().mean((1, 2, 3))
        grounding = grounding_loss(attention.maps, masks, columns)
        weight = torch.where(snr > 1, (5 / snr).clamp(max=1), snr.rsqrt())
        loss = (error * weight).mean() + GROUNDING_WEIGHT * grounding
        return loss, {"plain": error.mean().item(), "grounding": grounding.item()}

    train("unet", out, model, step_loss, steps=steps, learning_rate=6e-4, ema_decay=0.998, decay_steps=NOISY_STEPS)
    unet.save_pretrained(out / "unet")
    text_encoder.save_pretrained(out / "text_encoder")


def spoiled(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Slightly blurred and noisy images, similar to decoded ones."""
    share = torch.rand(len(x), 1, 1, 1, generator=generator)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), "replicate"), 3, stride=1)
    noise = torch.randn(x.shape, generator=generator) * 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x + share * (blurred - x) + noise


def build_judge(out: Path, steps: int) -> None:
    """Train the judge: cross-entropy on every part that a scene's template names."""
    torch.manual_seed(SEED + 1)
    net = JudgeNet()

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        stream = scenes(2 * 10**7 + step)
        batch = [next(stream) for _ in range(48)]
        generator = torch.Generator().manual_seed(step)
        logits = net(spoiled(to_tensor([render(scene) for scene in batch]), generator))

        labels: dict[str, list[int]] = {name: [-100] * len(batch) for name in logits}
        for row, scene in enumerate(batch):
            labels["template"][row] = TEMPLATES.index(scene.template)
            named = canonical_parts(named_parts(scene))
            for part, options in PARTS[scene.template].items():
                labels[f"{scene.template}_{part}"][row] = options.index(named[part])

        losses = [nn.functional.cross_entropy(logits[name], torch.tensor(rows)) for name, rows in labels.items()]
        return torch.stack(losses).sum(), {}

    train("judge", out, net, step_loss, steps=steps, learning_rate=1e-3, ema_decay=0.995)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, out / "judge.safetensors")


def hard_negatives(template: Template, named: dict[str, str], rng: np.random.Generator) -> list[str]:
    """Captions that are wrong in a single part, or in which two objects have swapped colours or places."""
    wrong = []
    for part, options in PARTS[template].items():
        if part == "relation":
            continue
        others = [o for o in options if o not in (named[part], named.get("colour2" if part == "colour" else "colour"))]
        wrong.append(named | {part: others[int(rng.integers(len(others)))]})

    if template == "position":
        wrong.append(named | {"relation": MIRRORED[named["relation"]]})
        wrong.append(named | {"colour": named["colour2"], "colour2": named["colour"]})
    return [caption(template, parts) for parts in wrong]


def clip_config(vocabulary: int) -> dict[str, Any]:
    """The open_clip model: a small ResNet and a small text transformer."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 2, 1], "width": 16, "patch_size": None, "head_width": 64},
        "text_cfg": {
            "context_length": MAX_TOKENS,
            "vocab_size": vocabulary,
            "width": TEXT_WIDTH,
            "heads": 4,
            "layers": TEXT_LAYERS,
            "hf_tokenizer_name": "in-this-folder",
        },
    }


def build_clip(out: Path, steps: int) -> None:
    """Train CLIP: contrastive, each image against its own hard negatives and the other images' captions."""
    from open_clip import CLIP

    torch.manual_seed(SEED + 2)
    tokenizer = new_tokenizer()
    config = clip_config(len(tokenizer))
    model = CLIP(**{**config, "text_cfg": config["text_cfg"] | {"hf_tokenizer_name": None}})

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        # 1. captions and hard negatives
        rng = np.random.default_rng([SEED, 3, step])
        stream = scenes(3 * 10**7 + step)
        batch = [next(stream) for _ in range(48)]
        captions: list[str] = []
        keys: list[str] = []
        negatives: list[str] = []
        owners: list[int] = []
        for row, scene in enumerate(batch):
            named = named_parts(scene)
            keys.append(caption(scene.template, canonical_parts(named)))
            if scene.template == "position" and rng.random() < 0.5:
                named = mirrored_parts(named)
            captions.append(caption(scene.template, named))
            wrong = hard_negatives(scene.template, named, rng)
            negatives += wrong
            owners += [row] * len(wrong)

        # 2. embeddings
        tokens = tokenizer(captions + negatives, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        x = spoiled(to_tensor([render(scene) for scene in batch]), torch.Generator().manual_seed(step)) * 0.5 + 0.5
        with torch.autocast("cpu", torch.bfloat16):
            images = model.encode_image((x - CLIP_MEAN) / CLIP_STD, normalize=True).float()
            texts = model.encode_text(tokens.input_ids, normalize=True).float()

        # 3. logits, without other images' equal captions and other images' negatives
        logits = images @ texts.T * model.logit_scale.exp().clamp(max=50)
        key_ids = torch.tensor([keys.index(key) for key in keys])
        same_caption = (key_ids[:, None] == key_ids) & ~torch.eye(len(keys), dtype=torch.bool)
        foreign_negative = torch.tensor(owners)[None] != torch.arange(len(keys))[:, None]
        logits = logits.masked_fill(torch.cat([same_caption, foreign_negative], 1), -1e4)

        # 4. the loss
        target = torch.arange(len(keys))
        loss = nn.functional.cross_entropy(logits, target) + 0.5 * nn.functional.cross_entropy(
            logits[:, : len(keys)].T, target
        )
        return loss, {"right": (logits.argmax(1) == target).float().mean().item()}

    train("clip", out, model, step_loss, steps=steps, learning_rate=1e-3, ema_decay=0.995)

    folder = out / "clip"
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    preprocess = {"mean": [CLIP_MEAN] * 3, "std": [CLIP_STD] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1) + "\n"
    )
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / CLIP_WEIGHTS)


def ship(out: Path, _: int, models: Path = MODELS) -> None:
    """Copy everything into the package in half precision, as stock diffusers and open_clip load it."""
    from transformers import CLIPTextModel

    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder"),
        tokenizer=new_tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(out / "unet"),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_pipeline(pipeline, models / "pipeline")

    shutil.copytree(out / "clip", models / "clip", dirs_exist_ok=True)
    for source, target in ((out / "judge.safetensors", models), (out / "clip" / CLIP_WEIGHTS, models / "clip")):
        halves = {key: value.half() if value.is_floating_point() else value for key, value in load_file(source).items()}
        save_file(halves, target / source.name)
    for name in ("vae", "unet", "judge", "clip"):
        shutil.copy(out / f"{name}.log.jsonl", models / f"{name}.log.jsonl")


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Save a pipeline in half precision, without the build folder's path in its settings."""
    pipeline.to(torch.float16).save_pretrained(folder)
    for file in folder.glob("*/config.json"):
        settings = json.loads(file.read_text())
        settings.pop("_name_or_path", None)  # the build folder
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def build_all(out: Path, _: int) -> None:
    """Build all parts in order."""
    for name in ("vae", "clip", "judge", "unet", "ship"):
        function, steps = BUILDERS[name]
        function(out, steps)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(BUILDERS))
    parser.add_argument("--out", type=Path, default=Path("build/shapes"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    function, steps = BUILDERS[arguments.part]
    function(arguments.out, arguments.steps or steps)


BUILDERS: dict[str, tuple[Callable[[Path, int], None], int]] = {
    "vae": (build_vae, 2800),
    "unet": (build_unet, 6800),
    "judge": (build_judge, 3000),
    "clip": (build_clip, 2000),
    "ship": (ship, 0),
    "all": (build_all, 0),
}

if __name__ == "__main__":
    main()
