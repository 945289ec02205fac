"""Stored transitions of training examples, evaluated under the current weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dfusion.config import SamplingConfig
from dfusion.ddim import Schedule, log_density, mean
from dfusion.guidance import check_embeds, placement, predict
from dfusion.memory import to_device
from dfusion.models import DiffusionModel
from dfusion.training_data import AnyTrajectory, Example, Row, TrainingPair
from dfusion.types import Conditioning


@dataclass(frozen=True)
class Evaluated:
    """N transitions under one policy.

    indices    (N,) int64, their numbers on the device
    log_probs  (N,) log p over the credited elements (`credit`)
    plain      (N,) log p over all elements, as trajectories record it; without gradients
    means      (N, C, h, w) mu
    x_prev     (N, C, h, w) the stored next states
    sigmas     (N,) of Eq. 1
    """

    indices: torch.Tensor
    log_probs: torch.Tensor
    plain: torch.Tensor
    means: torch.Tensor
    x_prev: torch.Tensor
    sigmas: torch.Tensor


class Transitions:
    """The transitions of a training's rows, one for each side, numbered row by row: S * row + side.

    All constants are copied to the U-Net's device once. An evaluation then copies the states only, and the CPU does not
    wait for a GPU.

    Args:
        model: The model, on its device.
        examples: The examples.
        rows: Rows of the examples whose steps have noise.
        schedule: The sampler's schedule.
        sampling: The sampling settings of all examples.
        masked: Whether log-probs are weighted by the pairs' masks.
    """

    def __init__(
        self,
        model: DiffusionModel,
        examples: Sequence[Example],
        rows: Sequence[Row],
        schedule: Schedule,
        sampling: SamplingConfig,
        *,
        masked: bool,
    ) -> None:
        self.rows = rows
        self.examples = examples
        self.sides = len(examples[0].sides)
        self.device, _ = placement(model.unet)
        self._model = model
        self._guidance_scale = sampling.guidance_scale

        # 1. the schedule, and the step and the example of each transition
        on_device = {
            name: getattr(schedule, name).to(self.device) for name in ("timesteps", "alphas", "prev_alphas", "sigmas")
        }
        self._schedule = replace(schedule, **on_device)
        self._steps = torch.tensor([row.step for row in rows], device=self.device).repeat_interleave(self.sides)
        example_of_row = torch.tensor([row.example for row in rows], device=self.device)
        self._examples = example_of_row.repeat_interleave(self.sides)

        # 2. what the examples have in common for all their steps
        advantages = torch.tensor([example.advantage for example in examples], device=self.device)
        self.advantages = advantages[example_of_row]
        masks = [example.credit_weights() for example in examples if masked and isinstance(example, TrainingPair)]
        self._masks = torch.stack(masks).to(self.device) if masks else None

        self._recorded = [list(map(_log_probs, example.sides, example.sides_on_policy)) for example in examples]

        # 3. the prompts' embeddings
        texts = sorted({example.prompt for example in examples})
        index = {text: number for number, text in enumerate(texts)}
        height, width = examples[0].sides[0].latents.shape[3:]
        self._embeds = model.encode_prompts(texts, (height, width)).tensors
        self._negative = Conditioning(*model.encode_prompts([sampling.negative_prompt], (height, width)).tensors)
        self._prompts = torch.tensor([index[example.prompt] for example in examples], device=self.device)

    def __len__(self) -> int:
        return self.sides * len(self.rows)

    def of_rows(self, numbers: Sequence[int]) -> list[int]:
        """The transitions of rows, row by row."""
        return [self.sides * number + side for number in numbers for side in range(self.sides)]

    def row(self, number: int) -> Row:
        """The row of a transition."""
        return self.rows[number // self.sides]

    def recorded(self, number: int) -> float | None:
        """The recorded log-prob of a transition. None if the policy to be trained did not sample its trajectory."""
        row = self.row(number)
        return self._recorded[row.example][number % self.sides][row.step]

    def indices(self, numbers: Sequence[int]) -> torch.Tensor:
        """The numbers on the device, (N,) int64."""
        return to_device(torch.tensor(numbers, dtype=torch.int64), self.device)

    def evaluate(self, numbers: Sequence[int]) -> Evaluated:
        """These transitions under the current policy, in one U-Net call."""
        # 1. the stored states
        states: list[torch.Tensor] = []
        next_states: list[torch.Tensor] = []
        for number in numbers:
            row = self.row(number)
            latents = self.examples[row.example].sides[number % self.sides].latents[0]
            states.append(latents[row.step])
            next_states.append(latents[row.step + 1])
        x_t, x_prev = to_device(torch.stack(states + next_states), self.device).chunk(2)

        # 2. mu
        indices = self.indices(numbers)
        steps = self._steps[indices]
        prompts = self._prompts[self._examples[indices]]
        embeds = Conditioning(*(part[prompts] for part in self._embeds))
        negative = check_embeds(embeds, self._negative, len(numbers), self._guidance_scale)
        timesteps = self._schedule.timesteps[steps]
        noise_pred = predict(self._model.unet, x_t, timesteps, embeds, negative, self._guidance_scale)
        means = mean(self._schedule, steps, x_t, noise_pred)

        # 3. log p
        sigmas = self._schedule.sigmas[steps]
        masks = self.masks(indices)
        log_probs = log_density(x_prev, means, sigmas, masks)
        plain = log_probs if masks is None else log_density(x_prev, means, sigmas)
        return Evaluated(indices, log_probs, plain.detach(), means, x_prev, sigmas)

    def masks(self, indices: torch.Tensor) -> torch.Tensor | None:
        """The credit weights of the latent elements of transitions, (N, h, w). None if all elements count."""
        return None if self._masks is None else self._masks[self._examples[indices]]


def _log_probs(side: AnyTrajectory, on_policy: bool) -> list[float | None]:
    """The recorded log-prob of each step; None if another network sampled the trajectory."""
    return list(side.log_probs[0].tolist()) if on_policy else [None] * len(side.timesteps)
