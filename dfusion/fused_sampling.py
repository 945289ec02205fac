"""D-Fusion itself: targets that take the reference's content inside the mask and keep the base's look (Eq. 4, 5).

The base is never computed again (its trajectory is stored) and masks come from the maps recorded when the reference
was sampled. A fused step is one U-Net call on references and targets together; a reference with several targets
goes through once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dfusion._diffusers import DDIMScheduler, UNet2DConditionModel
from dfusion.attention.fusion import CONTROLS, Control, Fusion
from dfusion.attention.layers import Layer, find_layers, resolve_layers
from dfusion.attention.masks import merge_masks, resize_mask
from dfusion.attention.processors import AttentionContext, processors_installed
from dfusion.config import FusionConfig
from dfusion.ddim import Schedule
from dfusion.errors import InvalidInputError, NonFiniteError, ScheduleError, ShapeMismatchError
from dfusion.guidance import check_embeds, placement, predict
from dfusion.inversion import invert
from dfusion.sampling import OnStep, draw, generators, take_step
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
    """The targets of B pairs: pair i is base[i] and reference[i], which share prompt i (Eq. 4 and 5; appendix B for
    another `config.control`).

    prompt_embeds (B, N, C) or the Conditioning of B rows; negative_prompt_embeds the same or of one row, not needed at
                  guidance_scale 1
    thresholds    for each pair a threshold in (0, 1) for each item of its reference
    on_step       called as on_step(step_index, num_steps) before each step; may raise to cancel. An inversion goes
                  through as many steps again

    Steps, guidance and eta are those of `base.config`. Targets have the base's seeds, x_T and noise; their states
    up to `config.first_step` are copies of the base's; after the last fused one steps are plain.
    The target's `log_probs` are those of the network that made it (fused within the fused steps), not of the plain
    policy: training evaluates the stored states under the plain network instead. It has no item maps.

    With `config.trajectory` "ddim_inversion" only the clean latents of the targets are kept, and their other states
    are what `dfusion.inversion.invert` makes of them (section 4.4).

    Raises InvalidInputError where base and reference do not fit or are of other prompts or items, item maps are
    missing or were recorded with another `mask_source`, or thresholds do not fit the items; ShapeMismatchError,
    LayerNotFoundError, ScheduleError, NonFiniteError.
    """
    _check(base, reference, thresholds, config, Conditioning.of(prompt_embeds).texts)
    settings = base.config
    found = check_embeds(prompt_embeds, negative_prompt_embeds, len(base), settings.guidance_scale)
    prompt, negative = Conditioning.of(prompt_embeds), None if found is None else Conditioning.of(found)
    schedule = Schedule.from_scheduler(scheduler, settings.num_steps, settings.eta)
    if not torch.equal(schedule.timesteps, base.timesteps):
        raise ScheduleError(f"scheduler: expected the samples' timesteps {base.timesteps.tolist()}, got others")

    # 1. what is fused, and where
    fused_steps = config.steps(len(schedule))
    layers = resolve_layers(find_layers(unet), config.layers)
    control = CONTROLS[config.control]
    batch = _Batch(unet, reference, prompt, negative, control)

    # 2. the base's states and noise
    shape: tuple[int, int, int] = tuple(base.latents.shape[2:])  # type: ignore[assignment]
    sources = generators(base.seeds)
    latents, log_probs = base.latents.clone(), base.log_probs.clone()
    draw(sources, shape)  # x_T
    device, _ = placement(unet)

    # 3. the steps: copied before the first fused one, plain after the last
    with processors_installed(unet, fuse=layers if control.own else (), fuse_cross=layers if control.cross else ()):
        for i in range(len(schedule)):
            if on_step is not None:
                on_step(i, len(schedule))
            noise = draw(sources, shape)
            if i < config.first_step:
                continue

            x_t = latents[:, i].to(device)
            if i in fused_steps:
                masks = merge_masks(_item_maps(reference)[:, i], thresholds, config.merge)
                noise_pred = batch.predict_fused(x_t, schedule, i, settings.guidance_scale, masks, layers)
            else:
                timestep = schedule.timesteps[i]
                noise_pred = predict(unet, x_t, timestep, prompt, negative, settings.guidance_scale)
            x_prev, log_p = take_step(schedule, i, x_t, noise_pred, noise)
            latents[:, i + 1] = x_prev.cpu()
            log_probs[:, i] = log_p.cpu()

    # 4. the target, or its inversion
    target = replace(base, latents=latents, log_probs=log_probs, item_maps=None, items=None, mask_source=None)
    if config.trajectory == "fused":
        return target
    arguments = (unet, scheduler, target.final, prompt, negative)
    return invert(*arguments, seeds=base.seeds, config=settings, on_step=on_step).trajectory


class _Batch:
    """Distinct references and all targets as rows of one U-Net call: references first, in both guidance halves."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        reference: Trajectory,
        prompt: Conditioning,
        negative: Conditioning | None,
        control: Control,
    ) -> None:
        self._unet, self._reference, self._control = unet, reference, control
        self._distinct, self._row_of = _distinct_references(reference, prompt, negative)
        rows = [*self._distinct, *range(len(reference))]
        self._embeds = prompt[rows]
        self._negative = None if negative is None else negative[rows]
        self._halves = 1 if negative is None else 2

    def predict_fused(
        self,
        x_t: torch.Tensor,
        schedule: Schedule,
        step_index: int,
        guidance_scale: float,
        masks: torch.Tensor,
        layers: Sequence[Layer],
    ) -> torch.Tensor:
        """The guided prediction for the targets x_t (B, C, h, w), each reading its reference within masks
        (B, h_m, w_m) bool."""
        references = self._reference.latents[self._distinct, step_index].to(x_t.device)
        states = torch.cat([references, x_t])
        fusion = self._fusion(masks.to(x_t.device), layers, (x_t.shape[2], x_t.shape[3]))
        context = AttentionContext(fusion=fusion)
        timestep = schedule.timesteps[step_index]
        noise_pred = predict(self._unet, states, timestep, self._embeds, self._negative, guidance_scale, context)
        return noise_pred[len(self._distinct) :]

    def _fusion(self, masks: torch.Tensor, layers: Sequence[Layer], latent_size: tuple[int, int]) -> Fusion:
        """Rows and masks of both guidance halves: a target's row reads its reference's row of the same half."""
        first, device = len(self._distinct), masks.device
        targets = torch.arange(first, first + len(masks), device=device)
        sources = torch.tensor(self._row_of, device=device)
        halves = [half * (first + len(masks)) for half in range(self._halves)]
        resized = {layer.level: resize_mask(masks, layer.size(*latent_size)).flatten(1) for layer in layers}
        return Fusion(
            targets=torch.cat([targets + offset for offset in halves]),
            sources=torch.cat([sources + offset for offset in halves]),
            masks={level: mask.repeat(self._halves, 1) for level, mask in resized.items()},
            control=self._control,
        )


def _distinct_references(
    reference: Trajectory, prompt: Conditioning, negative: Conditioning | None
) -> tuple[list[int], list[int]]:
    """Pairs that hold each distinct reference first, and for every pair the place of its reference among them.

    Two references are one where seed, embeddings and all latents are equal.
    """
    distinct: list[int] = []
    row_of: list[int] = []
    for i, seed in enumerate(reference.seeds):
        for place, j in enumerate(distinct):
            same = reference.seeds[j] == seed and prompt[j].equals(prompt[i])
            same = same and (negative is None or negative[j].equals(negative[i]))
            if same and torch.equal(reference.latents[j], reference.latents[i]):
                row_of.append(place)
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
    """Whether base, reference, thresholds and settings fit each other; see `fuse` for what is raised."""
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
    known = {name: found for name, found in prompts.items() if found is not None}
    if len(set(known.values())) > 1:
        raise InvalidInputError(f"base and reference: expected samples of the prompts they are fused for, got {known}")
    if base.items is not None and reference.items is not None and base.items != reference.items:
        raise InvalidInputError(
            f"base and reference: expected samples of one prompt, got items at {base.items} and {reference.items}"
        )

    # latents and maps
    for name, side in (("base", base), ("reference", reference)):
        if not bool(side.latents.isfinite().all()):
            raise NonFiniteError(f"{name}.latents: expected finite numbers, got NaN or infinity")
    maps = _item_maps(reference)
    if maps.shape[:2] != base.latents[:, 1:].shape[:2]:
        raise ShapeMismatchError("reference.item_maps", f"{tuple(base.log_probs.shape)} first", tuple(maps.shape))
    if reference.mask_source not in (None, config.mask_source):
        raise InvalidInputError(
            f"mask_source: expected maps recorded with {config.mask_source!r}, got {reference.mask_source!r}"
        )

    # thresholds
    counts = [maps.shape[-1]] * len(maps) if reference.items is None else [len(items) for items in reference.items]
    got = [len(sample) for sample in thresholds]
    if got != counts:
        raise InvalidInputError(f"thresholds: expected {counts}, one for each item of each pair, got {got}")
    if not all(0 < threshold < 1 for sample in thresholds for threshold in sample):
        raise InvalidInputError(f"thresholds: expected numbers between 0 and 1, got {list(thresholds)}")
