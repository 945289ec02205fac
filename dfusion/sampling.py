"""Sampling trajectories (Eq. 1), with the item maps that a later fusion needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dfusion._diffusers import DDIMScheduler, UNet2DConditionModel
from dfusion.attention.layers import Layer, MaskSource, find_layers, mask_layers
from dfusion.attention.masks import Item, item_weights, normalise_items
from dfusion.attention.processors import AttentionContext, processors_installed
from dfusion.config import SamplingConfig
from dfusion.ddim import Schedule, mean, recorded_log_prob
from dfusion.errors import InvalidInputError, NonFiniteError
from dfusion.guidance import check_embeds, placement, predict
from dfusion.types import Conditioning, Prompts, Trajectory

OnStep = Callable[[int, int], None]
"""Called as on_step(step_index, num_steps) before each step; it may raise to cancel."""


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a sample. First draw: x_T; then one draw a step."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(sources: Sequence[torch.Generator], shape: tuple[int, int, int]) -> torch.Tensor:
    """The next standard Gaussian of every sample, (B, C, h, w) float32 on the CPU."""
    return torch.stack([torch.randn(shape, generator=source) for source in sources])


def take_step(
    schedule: Schedule, step_index: int, x_t: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_prev = mu + sigma * z (B, C, h, w) and its log-prob (B,), of Eq. 1. Raises NonFiniteError naming the step."""
    mu = mean(schedule, step_index, x_t, noise_pred)
    x_prev = mu + schedule.sigmas[step_index].to(mu.device) * noise.to(mu.device)
    if not bool(torch.isfinite(x_prev).all()):
        raise NonFiniteError(f"latents became NaN or infinite at step_index {step_index}")
    return x_prev, recorded_log_prob(schedule, step_index, x_prev, mu)


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    prompt_embeds: Prompts,
    negative_prompt_embeds: Prompts | None,
    seeds: Sequence[int],
    *,
    items: Sequence[Sequence[Item]] | None = None,
    config: SamplingConfig = SamplingConfig(),
    on_step: OnStep | None = None,
    mask_source: MaskSource = "first_up",
    latent_size: tuple[int, int] | None = None,
) -> Trajectory:
    """Sample B trajectories by Eq. 1; with `items`, record their cross-attention maps at every step (Eq. 4).

    prompt_embeds (B, N, C) or the Conditioning of B rows; negative_prompt_embeds the same or of one row, not needed at
                  guidance_scale 1
    seeds         one in [0, 2**64) for each sample; a sample depends on its own seed alone, not on the batch it is in
                  (float32, 1e-5; on a GPU only with `torch.backends.cudnn.allow_tf32 = False`, see decision 016)
    items         for each sample its items; an item is a token index or several, counted after BOS
    on_step       called as on_step(step_index, num_steps) before each step; may raise to cancel
    mask_source   whose cross-attention the maps are: the first up layer's, or all of that resolution
    latent_size   (h, w) of the latents, `DiffusionModel.latent_size(config)`; the U-Net's `sample_size` if None. SDXL's
                  time ids (`DiffusionModel.encode_prompts`) should say the same size

    The trajectory's tensors are float32 on the CPU. Raises InvalidInputError, ScheduleError or LayerNotFoundError
    before the first step, NonFiniteError naming the step.
    """
    _require_seeds(seeds)
    negative = check_embeds(prompt_embeds, negative_prompt_embeds, len(seeds), config.guidance_scale)
    schedule = Schedule.from_scheduler(scheduler, config.num_steps, config.eta)
    if latent_size is None and (config.height, config.width) != (None, None):
        size = f"height {config.height} and width {config.width}"
        raise InvalidInputError(f"latent_size: expected model.latent_size(config) with {size} of config, got None")

    # 1. x_T, and what is captured
    shape = latent_shape(unet, latent_size)
    capture = _Capture(unet, items, Conditioning.of(prompt_embeds).embeds, mask_source, shape[1:])
    sources = generators(seeds)
    latents, log_probs = [draw(sources, shape)], []
    x_t = latents[0].to(placement(unet)[0])

    # 2. T steps of Eq. 1
    with processors_installed(unet, capture=capture.layers):
        for i in range(len(schedule)):
            if on_step is not None:
                on_step(i, len(schedule))
            context = capture.context()
            timestep = schedule.timesteps[i]
            noise_pred = predict(unet, x_t, timestep, prompt_embeds, negative, config.guidance_scale, context)
            x_t, log_p = take_step(schedule, i, x_t, noise_pred, draw(sources, shape))
            capture.keep(context)
            latents.append(x_t.cpu())
            log_probs.append(log_p.cpu())

    return Trajectory(
        latents=torch.stack(latents, 1),
        timesteps=schedule.timesteps,
        log_probs=torch.stack(log_probs, 1),
        seeds=tuple(seeds),
        config=config,
        item_maps=capture.item_maps(),
        items=capture.items,
        mask_source=None if capture.items is None else mask_source,
        prompts=Conditioning.of(prompt_embeds).texts,
    )


def _require_seeds(seeds: Sequence[int]) -> None:
    if not all(isinstance(seed, int) and 0 <= seed < 1 << 64 for seed in seeds):
        raise InvalidInputError(f"seeds: expected integers in [0, 2**64), got {list(seeds)}")


def latent_shape(unet: UNet2DConditionModel, latent_size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the U-Net's latents; h and w from `sample_size` unless given. Raises InvalidInputError."""
    size = unet.config.sample_size if latent_size is None else latent_size
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise InvalidInputError(f"latent_size: expected at least 1 x 1, got {height} x {width}")
    return unet.config.in_channels, height, width


class _Capture:
    """The item maps of one sampling run, step by step; does nothing without items."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        items: Sequence[Sequence[Item]] | None,
        prompt_embeds: torch.Tensor,
        mask_source: MaskSource,
        size: tuple[int, int],
    ) -> None:
        self.items = None if items is None else normalise_items(items, prompt_embeds.shape[1])
        self.layers: tuple[Layer, ...] = ()
        self._maps: list[torch.Tensor] = []
        if self.items is None:
            return
        if len(self.items) != len(prompt_embeds):
            raise InvalidInputError(f"items: expected those of {len(prompt_embeds)} samples, got {len(self.items)}")
        self.layers = mask_layers(find_layers(unet), mask_source)
        self._size = self.layers[0].size(*size)
        self._weights = item_weights(self.items, prompt_embeds.shape[1]).to(placement(unet)[0])

    def context(self) -> AttentionContext | None:
        return None if self.items is None else AttentionContext(item_weights=self._weights)

    def keep(self, context: AttentionContext | None) -> None:
        if context is not None:
            self._maps.append(context.item_maps(self._size).cpu())

    def item_maps(self) -> torch.Tensor | None:
        """(B, T, h_m, w_m, K)."""
        return torch.stack(self._maps, 1) if self._maps else None
