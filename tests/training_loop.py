"""DPO's training loop in plain torch, as a reference for the trainer and the service."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from dfusion.adapter import lora_parameters
from dfusion.config import TrainingConfig
from dfusion.models import DiffusionModel
from dfusion.policy import log_probs
from dfusion.training_data import TrainingPair


class DpoLoop:
    """One AdamW for all rounds; Eq. 6 by autograd on all pairs at once, one update per inner epoch.

    `scale` multiplies the gradient before AdamW (`Trainer.gradient_scale`).
    """

    def __init__(self, model: DiffusionModel, settings: TrainingConfig, scale: float) -> None:
        self._model = model
        self._settings = settings
        self._scale = scale
        self._parameters = list(lora_parameters(model.unet).values())
        self._adamw = torch.optim.AdamW(
            self._parameters,
            settings.learning_rate,
            (settings.adam_beta1, settings.adam_beta2),
            settings.adam_epsilon,
            settings.weight_decay,
        )

    def round(self, pairs: Sequence[TrainingPair]) -> None:
        """Run all inner epochs of a round."""
        with torch.no_grad():
            old = self._log_ratios(pairs)
        for _ in range(self._settings.inner_epochs):
            self._adamw.zero_grad()
            margins = self._settings.beta * (self._log_ratios(pairs) - old)
            functional.softplus(-margins).mean().backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad *= self._scale
            self._adamw.step()

    def _log_ratios(self, pairs: Sequence[TrainingPair]) -> torch.Tensor:
        """log p of the preferred transition minus that of the rejected one, for all steps that differ."""
        rows = []
        for pair in pairs:
            steps = sorted(set(range(pair.preferred.config.num_steps)) - pair.shared_steps())
            prompt, negative = self._model.encode_prompts([pair.prompt]), self._model.encode_prompts([""])
            preferred, rejected = (
                log_probs(self._model.unet, self._model.scheduler, side, prompt, negative, steps) for side in pair.sides
            )
            rows.append((preferred - rejected)[0])
        return torch.cat(rows)
