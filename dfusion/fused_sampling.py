"""D-Fusion itself: targets with the reference's content inside the mask and the base's look outside it (Eq. 4, 5).

The base is never recomputed, since its trajectory is stored. Masks come from the maps recorded when the reference was
sampled. A fused step is one U-Net call on references and targets together. A reference with several targets is
computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch

from dfusion._diffusers import DDIMScheduler, UNet2DConditionModel
from dfusion.attention.fusion import CONTROLS, Control, Fusion
from dfusion.attention.layers import Layer, find_layers, resolve_layers
from dfusion.attention.masks import merge_masks, resize_mask
from dfusion.attention.processors import AttentionContext, processors_installed
from dfusion.config import FusionConfig
from dfusion.ddim import Schedule
from dfusion.errors import InvalidInputError, NonFiniteError, ScheduleError, ShapeMismatchError, shortened
from dfusion.guidance import check_negative, placement, predict
from dfusion.inversion import invert
from dfusion.memory import to_device
from dfusion.sampling import OnStep, next_noise, noise_generators, require_finite, take_step
from dfusion.types import Conditioning, Prompts, Trajectory


@torch.no_grad()
def fuse(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    base: Trajectory,
    reference: Trajectory,
    prompt_embeds: Prompts,
    negative_prompt_embeds: Prompts | None,
    *,
    thresholds: Sequence[Sequence[float]],
    config: FusionConfig = FusionConfig(),
    on_step: OnStep | None = None,
) -> Trajectory:
    """Fuse the targets of B pairs. Pair i is base[i] and reference[i], which share prompt i.

    Implements Eq. 4 and 5, and appendix B for other values of `config.control`. Steps, guidance and eta are those of
    `base.config`. A target has its base's seed, x_T and noise. Its states up to `config.first_step` are copies of the
    base's states. The steps after the last fused step are plain.

    Args:
        unet: The denoiser that sampled base and reference.
        scheduler: The model's DDIM scheduler. It is not modified.
        base: B samples, whose appearance is kept outside the mask.
        reference: B samples with item maps; their content is taken inside the mask. A sample may occur several times.
        prompt_embeds: (B, N, C), or the Conditioning of B rows.
        negative_prompt_embeds: The same, or a single row for all pairs. Not needed at guidance_scale 1.
        thresholds: For each pair, a threshold in (0, 1) for each item of its reference.
        config: Fused steps and layers, mask and attention control.
        on_step: Called as on_step(step_index, num_steps) before each step. It may raise to cancel. An inversion takes
            the same number of steps again.

    Returns:
        The B targets, without item maps. Their `log_probs` are those of the fused network, not of the plain policy;
        training evaluates the stored states under the plain network. With `config.trajectory` "ddim_inversion", only
        the clean latents are those of the fusion; `dfusion.inversion.invert` computes the other states (section 4.4).

    Raises:
        InvalidInputError: Base and reference are incompatible, or have different prompts or items. Item maps are
            missing or were recorded with another `mask_source`. Thresholds do not fit the items.
        ShapeMismatchError, LayerNotFoundError, ScheduleError: Arguments that do not fit the model.
        NonFiniteError: The latents became NaN or infinite. The message names the step.

    Example:
        >>> from dfusion import MODELS, DiffusionModel, FusionConfig, SamplingConfig, fuse, sample
        >>> model = DiffusionModel.load(MODELS["shapes"].folder)
        >>> prompt = "a red and striped circle"
        >>> embeds = model.encode_prompts([prompt])
        >>> empty = model.encode_prompts([""])
        >>> items = [model.item_tokens(prompt, ["circle"])]
        >>> config = SamplingConfig(num_steps=4)
        >>> base = sample(model.unet, model.scheduler, embeds, empty, [1], config=config)
        >>> reference = sample(model.unet, model.scheduler, embeds, empty, [2], items=items, config=config)
        >>> target = fuse(
        ...     model.unet, model.scheduler, base, reference, embeds, empty, thresholds=[[0.3]], config=FusionConfig()
        ... )
        >>> bool((target.latents[:, :3] == base.latents[:, :3]).all())  # up to first_step, 2
        True
    """
    # Notation (<variable> -> <paper>), Eq. 1, 4 and 5:
    #   len(schedule)            -> T, number of denoising steps
    #   i                        -> step_index 0 ... T-1; the paper's t is T - i
    #   base.latents             -> x^b, states of the base
    #   reference.latents        -> x^r, states of the reference
    #   latents                  -> x^t, states of the target; x_t and x_prev are the current and the next one
    #   _item_maps(reference)    -> A^r, cross-attention maps of the reference's items
    #   thresholds               -> tau, one per item
    #   masks                    -> M, the merged mask of step i
    #   noise                    -> z, the noise that the base's step i used
    _check(base, reference, thresholds, config, Conditioning.of(prompt_embeds).texts)
    settings = base.config
    prompt = Conditioning.of(prompt_embeds)
    negative_embeds = check_negative(prompt_embeds, negative_prompt_embeds, len(base), settings)
    negative = None if negative_embeds is None else Conditioning.of(negative_embeds)
    schedule = Schedule.from_scheduler(scheduler, settings.num_steps, settings.eta)
    if not torch.equal(schedule.timesteps, base.timesteps):
        raise ScheduleError(
            f"scheduler: expected the samples' timesteps {base.timesteps.tolist()}, got {schedule.timesteps.tolist()}"
        )

    # 1. choose the fused steps, layers and rows
    fused_steps = config.steps(len(schedule))
    layers = resolve_layers(find_layers(unet), config.layers)
    control = CONTROLS[config.control]
    masks = {i: merge_masks(_item_maps(reference)[:, i], thresholds, config.merge) for i in fused_steps}
    batch = _Batch(unet, reference, prompt, negative, control, layers, masks)

    # 2. start from the base's states and replay its noise
    shape: tuple[int, int, int] = tuple(base.latents.shape[2:])  # type: ignore[assignment]
    generators = noise_generators(base.seeds)
    next_noise(generators, shape)  # x_T
    device, _ = placement(unet)
    timesteps = schedule.timesteps.to(device)
    x_t = base.latents[:, config.first_step].to(device)
    states = []
    log_probs = []

    with processors_installed(unet, fuse=layers if control.own else (), fuse_cross=layers if control.cross else ()):
        for i in range(len(schedule)):
            if on_step is not None:
                on_step(i, len(schedule))

            # 3. before the first fused step the target is its base
            noise = next_noise(generators, shape)
            if i < config.first_step:
                continue

            # 4. predict epsilon, fused within the mask (Eq. 4 and 5) or plain
            if i in fused_steps:
                noise_pred = batch.predict_fused(x_t, timesteps[i], i, settings.guidance_scale)
            else:
                noise_pred = predict(unet, x_t, timesteps[i], prompt, negative, settings.guidance_scale)

            # 5. step from x_t to x_{t-1} (Eq. 1); the device does not wait for the CPU
            x_t, log_p = take_step(schedule, i, x_t, noise_pred, to_device(noise, device))
            states.append(x_t)
            log_probs.append(log_p)

    # 6. return the fused states, or those of a DDIM inversion
    first = config.first_step
    latents = torch.cat([base.latents[:, : first + 1], torch.stack(states, 1).cpu()], 1)
    require_finite(latents)
    all_log_probs = torch.cat([base.log_probs[:, :first], torch.stack(log_probs, 1).cpu()], 1)
    target = replace(base, latents=latents, log_probs=all_log_probs, item_maps=None, items=None, mask_source=None)
    if config.trajectory == "fused":
        return target
    arguments = (unet, scheduler, target.final, prompt, negative)
    return invert(*arguments, seeds=base.seeds, config=settings, on_step=on_step).trajectory


class _Batch:
    """Distinct references and all targets as rows of one U-Net call: references first, in both guidance halves.

    `masks` are those of each fused step, (B, h_m, w_m) bool. Everything that the steps need is on the device before the
    first one.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        reference: Trajectory,
        prompt: Conditioning,
        negative: Conditioning | None,
        control: Control,
        layers: Sequence[Layer],
        masks: Mapping[int, torch.Tensor],
    ) -> None:
        self._unet = unet
        distinct, row_of = _distinct_references(reference, prompt, negative)
        rows = [*distinct, *range(len(reference))]
        self._embeds = prompt[rows]
        self._negative = None if negative is None else negative[rows]
        self._references = len(distinct)

        # a target's row reads its reference's row of the same guidance half
        device, _ = placement(unet)
        halves = 1 if negative is None else 2
        offsets = len(rows) * torch.arange(halves)[:, None]
        targets = (torch.arange(len(distinct), len(rows)) + offsets).flatten().to(device)
        sources = (torch.tensor(row_of) + offsets).flatten().to(device)

        size = reference.latent_size
        self._states = reference.latents[distinct].to(device)
        self._fusions = {}
        for step, step_masks in masks.items():
            level_masks = {}
            for layer in layers:
                resized = resize_mask(step_masks, layer.size(*size)).flatten(1)
                level_masks[layer.level] = resized.repeat(halves, 1).to(device)
            self._fusions[step] = Fusion(targets, sources, level_masks, control)

    def predict_fused(
        self, x_t: torch.Tensor, timestep: torch.Tensor, step_index: int, guidance_scale: float
    ) -> torch.Tensor:
        """The guided prediction for the targets x_t (B, C, h, w). Each target reads its reference within its mask."""
        states = torch.cat([self._states[:, step_index], x_t])
        context = AttentionContext(fusion=self._fusions[step_index])
        noise_pred = predict(self._unet, states, timestep, self._embeds, self._negative, guidance_scale, context)
        return noise_pred[self._references :]


def _distinct_references(
    reference: Trajectory, prompt: Conditioning, negative: Conditioning | None
) -> tuple[list[int], list[int]]:
    """The first pair of each distinct reference, and for every pair the index of its reference among these.

    Two references are the same if seed, embeddings and all latents are equal.
    """
    distinct: list[int] = []
    row_of: list[int] = []

    for i, seed in enumerate(reference.seeds):
        for row, j in enumerate(distinct):
            same = reference.seeds[j] == seed and prompt[j].equals(prompt[i])
            same = same and (negative is None or negative[j].equals(negative[i]))
            if same and torch.equal(reference.latents[j], reference.latents[i]):
                row_of.append(row)
                break
        else:
            row_of.append(len(distinct))
            distinct.append(i)
    return distinct, row_of


def _item_maps(reference: Trajectory) -> torch.Tensor:
    if reference.item_maps is None:
        raise InvalidInputError("reference: expected item_maps, got None; give `items` when sampling the reference")
    return reference.item_maps


def _check(
    base: Trajectory,
    reference: Trajectory,
    thresholds: Sequence[Sequence[float]],
    config: FusionConfig,
    texts: tuple[str, ...] | None,
) -> None:
    """Check that base, reference, thresholds and settings fit each other. Raises as `fuse` does."""
    if base.config != reference.config or not torch.equal(base.timesteps, reference.timesteps):
        raise InvalidInputError(f"base and reference: expected one config, got {base.config} and {reference.config}")
    if base.latents.shape != reference.latents.shape:
        raise ShapeMismatchError("reference.latents", tuple(base.latents.shape), tuple(reference.latents.shape))
    if config.first_step >= base.config.num_steps:
        raise InvalidInputError(
            f"first_step: expected less than {base.config.num_steps} steps, got {config.first_step}"
        )

    # prompts and items
    prompts = {"base": base.prompts, "reference": reference.prompts, "prompt_embeds": texts}
    known = {name: values for name, values in prompts.items() if values is not None}
    if len(set(known.values())) > 1:
        raise InvalidInputError(
            f"base and reference: expected the same prompts in the samples and in prompt_embeds, got {shortened(known)}"
        )
    if base.items is not None and reference.items is not None and base.items != reference.items:
        raise InvalidInputError(
            f"base and reference: expected samples of one prompt, got items at {shortened(base.items)} and"
            f" {shortened(reference.items)}"
        )

    # latents and maps
    for name, side in (("base", base), ("reference", reference)):
        if not bool(side.latents.isfinite().all()):
            raise NonFiniteError(f"{name}.latents: expected finite numbers, got NaN or infinity")
    maps = _item_maps(reference)
    if maps.shape[:2] != base.latents[:, 1:].shape[:2]:
        expected = f"{tuple(base.log_probs.shape)} as its first dimensions"
        raise ShapeMismatchError("reference.item_maps", expected, tuple(maps.shape))
    if reference.mask_source not in (None, config.mask_source):
        raise InvalidInputError(
            f"mask_source: expected maps recorded with {config.mask_source!r}, got {reference.mask_source!r}"
        )

    # thresholds
    counts = [maps.shape[-1]] * len(maps) if reference.items is None else [len(items) for items in reference.items]
    got = [len(sample) for sample in thresholds]
    if got != counts:
        raise InvalidInputError(
            f"thresholds: expected {shortened(counts)}, one per item of each pair, got {shortened(got)}"
        )
    if not all(0 < threshold < 1 for threshold in chain.from_iterable(thresholds)):
        raise InvalidInputError(f"thresholds: expected numbers between 0 and 1, got {shortened(list(thresholds))}")
