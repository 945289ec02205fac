"""Sample trajectories (Eq. 1) and record the item maps that a later fusion needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dfusion._diffusers import DDIMScheduler, UNet2DConditionModel
from dfusion.attention.layers import Layer, MaskSource, find_layers, mask_layers
from dfusion.attention.masks import Item, item_weights, normalise_items
from dfusion.attention.processors import AttentionContext, processors_installed
from dfusion.config import SamplingConfig
from dfusion.ddim import Schedule, mean, recorded_log_prob
from dfusion.errors import InvalidInputError, NonFiniteError, shortened
from dfusion.guidance import check_negative, placement, predict
from dfusion.memory import to_device
from dfusion.types import Conditioning, Prompts, Trajectory

OnStep = Callable[[int, int], None]
"""Called as on_step(step_index, num_steps) before each step; it may raise to cancel."""


def noise_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample. Its first noise is x_T, then one noise per step follows."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def next_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> torch.Tensor:
    """The next standard Gaussian noise of every sample, (B, C, h, w) float32 on the CPU."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def take_step(
    schedule: Schedule, step_index: int, x_t: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of Eq. 1: x_prev = mu + sigma * z, (B, C, h, w), and its log-prob, (B,)."""
    mu = mean(schedule, step_index, x_t, noise_pred)
    x_prev = mu + schedule.sigmas[step_index] * noise
    return x_prev, recorded_log_prob(schedule, step_index, x_prev, mu)


def require_finite(latents: torch.Tensor) -> None:
    """Raise NonFiniteError naming the first step after which a state of (B, T+1, C, h, w) is NaN or infinite."""
    finite = latents.isfinite().transpose(0, 1).flatten(1).all(1).tolist()
    if not all(finite):
        raise NonFiniteError(f"latents became NaN or infinite at step_index {finite.index(False) - 1}")


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
    """Sample B trajectories by Eq. 1. With `items`, record their cross-attention maps at every step (Eq. 4).

    Args:
        unet: The denoiser, with or without an adapter.
        scheduler: The model's DDIM scheduler. It is not modified.
        prompt_embeds: (B, N, C), or the Conditioning of B rows.
        negative_prompt_embeds: As `prompt_embeds`, for config.negative_prompt; or a single row for all samples. Not
            needed at guidance_scale 1.
        seeds: One in [0, 2**64) per sample. A sample depends on its own seed, not on the batch it is in (float32,
            1e-5; on a GPU only with `torch.backends.cudnn.allow_tf32 = False`, see decision 016).
        items: The items of each sample. An item is one token index or several, counted after BOS.
        config: Number of steps, guidance scale, eta and negative prompt.
        on_step: Called as on_step(step_index, num_steps) before each step. It may raise to cancel.
        mask_source: The layers whose cross-attention is recorded: the first up layer, or all of its resolution.
        latent_size: (h, w) of the latents, from `DiffusionModel.latent_size(config)`. None: the U-Net's
            `sample_size`. SDXL's time ids (`DiffusionModel.encode_prompts`) should be for the same size.

    Returns:
        The trajectory of B samples; its tensors are float32 on the CPU.

    Raises:
        InvalidInputError, ScheduleError, LayerNotFoundError: Invalid arguments; raised before the first step.
        NonFiniteError: The latents became NaN or infinite. The message names the step.

    Example:
        >>> from dfusion import MODELS, DiffusionModel, SamplingConfig, sample
        >>> model = DiffusionModel.load(MODELS["shapes"].folder)
        >>> trajectory = sample(
        ...     model.unet,
        ...     model.scheduler,
        ...     model.encode_prompts(["a red circle", "a blue star"]),
        ...     model.encode_prompts([""]),
        ...     seeds=[1, 2],
        ...     config=SamplingConfig(num_steps=4),
        ... )
        >>> model.decode(trajectory.final).shape
        (2, 64, 64, 3)
    """
    # Notation (<variable> -> <paper>), Eq. 1 and 4:
    #   len(schedule)  -> T, number of denoising steps
    #   i              -> step_index 0 ... T-1; the paper's t is T - i
    #   x_t            -> x_t before step i, x_{t-1} after it; latents[0] is x_T
    #   noise_pred     -> epsilon_theta(x_t, t, c), guided
    #   next_noise()   -> z ~ N(0, I)
    #   log_p          -> log p_theta(x_{t-1} | x_t, c), mean over C*h*w
    #   capture        -> A, the cross-attention maps of the items
    _require_seeds(seeds)
    negative = check_negative(prompt_embeds, negative_prompt_embeds, len(seeds), config)
    schedule = Schedule.from_scheduler(scheduler, config.num_steps, config.eta)
    if latent_size is None and (config.height, config.width) != (None, None):
        size = f"height {config.height} and width {config.width}"
        raise InvalidInputError(f"latent_size: expected model.latent_size(config), since config sets {size}; got None")

    # 1. draw x_T and prepare the recording of item maps
    shape = latent_shape(unet, latent_size)
    capture = _Capture(unet, items, Conditioning.of(prompt_embeds).embeds, mask_source, shape[1:])
    generators = noise_generators(seeds)
    device, _ = placement(unet)
    timesteps = schedule.timesteps.to(device)
    x_t = next_noise(generators, shape).to(device)
    states = [x_t]
    log_probs = []

    with processors_installed(unet, capture=capture.layers):
        for i in range(len(schedule)):
            if on_step is not None:
                on_step(i, len(schedule))

            # 2. predict epsilon; the U-Net call fills the context with item maps
            context = capture.context()
            noise_pred = predict(unet, x_t, timesteps[i], prompt_embeds, negative, config.guidance_scale, context)

            # 3. step from x_t to x_{t-1} (Eq. 1)
            noise = to_device(next_noise(generators, shape), device)
            x_t, log_p = take_step(schedule, i, x_t, noise_pred, noise)

            # 4. record the state, its log-prob and the item maps; the device does not wait for the CPU
            capture.keep(context)
            states.append(x_t)
            log_probs.append(log_p)

    latents = torch.stack(states, 1).cpu()
    require_finite(latents)
    return Trajectory(
        latents=latents,
        timesteps=schedule.timesteps,
        log_probs=torch.stack(log_probs, 1).cpu(),
        seeds=tuple(seeds),
        config=config,
        item_maps=capture.item_maps(),
        items=capture.items,
        mask_source=None if capture.items is None else mask_source,
        prompts=Conditioning.of(prompt_embeds).texts,
    )


def _require_seeds(seeds: Sequence[int]) -> None:
    if not all(isinstance(seed, int) and 0 <= seed < 1 << 64 for seed in seeds):
        raise InvalidInputError(f"seeds: expected integers in [0, 2**64), got {shortened(list(seeds))}")


def latent_shape(unet: UNet2DConditionModel, latent_size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the U-Net's latents. h and w come from `sample_size` unless given. Raises InvalidInputError."""
    size = unet.config.sample_size if latent_size is None else latent_size
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise InvalidInputError(f"latent_size: expected at least 1 x 1, got {height} x {width}")
    return unet.config.in_channels, height, width


class _Capture:
    """Records the item maps of one sampling run, step by step. Without items it does nothing."""

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
            raise InvalidInputError(
                f"items: expected one entry per sample ({len(prompt_embeds)}), got {len(self.items)}"
            )

        self.layers = mask_layers(find_layers(unet), mask_source)
        self._size = self.layers[0].size(*size)
        self._weights = item_weights(self.items, prompt_embeds.shape[1]).to(placement(unet)[0])

    def context(self) -> AttentionContext | None:
        return None if self.items is None else AttentionContext(item_weights=self._weights)

    def keep(self, context: AttentionContext | None) -> None:
        if context is not None:
            self._maps.append(context.item_maps(self._size))

    def item_maps(self) -> torch.Tensor | None:
        """(B, T, h_m, w_m, K), on the CPU."""
        return torch.stack(self._maps, 1).cpu() if self._maps else None
