"""Training on trajectories: DPO, DDPO and DPOK over the transitions of a round (Eq. 6, 8, 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from dfusion.adapter import lora_parameters, weights_as
from dfusion.attention.processors import fast_backward
from dfusion.config import TrainingConfig
from dfusion.ddim import Schedule, log_prob
from dfusion.errors import InvalidInputError, NonFiniteError
from dfusion.gradients import checkpointing, gradient_norm, scale_gradients, share_below
from dfusion.guidance import placement
from dfusion.losses.dpok import gaussian_kl
from dfusion.losses.objective import RowTerms, row_losses
from dfusion.models import DiffusionModel
from dfusion.optimizer_state import OptimizerState, restore, state_of
from dfusion.policy import transition_mean
from dfusion.trainer_state import FORMAT, TrainerState
from dfusion.training_data import Example, TrainingPair, check_examples, digest, draw_epoch, rows_of
from dfusion.training_report import SelfTest, Tally, UpdateReport, ratio_tolerance_of, require_ratio_one, self_test

OnRows = Callable[[int], None]
"""Called as on_rows(done_rows) after each micro-batch; it may raise to cancel."""
_WITHOUT_EFFECT = {"micro_batch", "gradient_checkpointing", "log_gradient_norms", "ratio_tolerance"}
"""Settings that do not change what is learned: a state may be loaded where they differ."""


@dataclass(frozen=True)
class _Reference:
    """All rows under the policy before the first update, on the CPU.

    log_probs  (rows, S), log p_old, which is log pref in Eq. 6, over the elements that count (`credit`)
    means      (rows, S, C, h, w), mu of the policy that the KL is measured from
    """

    log_probs: torch.Tensor
    means: torch.Tensor
    self_test: SelfTest


@dataclass(frozen=True)
class _Transitions:
    """R rows under the policy of the moment, with gradients.

    log_probs  (R, S) log p over the elements that count (`credit`)
    means      (R, S, C, h, w) mu
    x_prev     (R, S, C, h, w) the stored next states
    """

    log_probs: torch.Tensor
    means: torch.Tensor
    x_prev: torch.Tensor


class Trainer:
    """Trains the adapter attached to `model.unet` by the algorithm of `config`; a call of `step` is one update.

    `examples` are TrainingPairs or TrainingSamples, as the algorithm learns from (`dfusion.algorithms`). Naive or with
    D-Fusion is a matter of what they are: without it references and bases, or plain samples; with it fused targets
    among them.

    p_old (pref of Eq. 6) is the policy as it is when the trainer is made; with a loaded state, the saved one. All rows
    are evaluated under it once, before the first update (`prepare`). For fused targets, too, both policies in the loss
    are the plain network on the stored states. Rows hold S transitions: two for pairs, one for samples.

    Besides the model, memory holds the examples and means of the same size (rows x S latents, float32, on the CPU).
    """

    def __init__(
        self,
        model: DiffusionModel,
        examples: Sequence[Example],
        config: TrainingConfig,
        seed: int,
        optimizer: OptimizerState | None = None,
    ) -> None:
        """Set up a training; nothing is evaluated yet.

        Args:
            model: Whose adapter is trained.
            examples: What it is trained on.
            config: How.
            seed: Of the order of examples, and of the steps that `timestep_fraction` draws.
            optimizer: AdamW's moments from the rounds before (`optimizer_state`); not used with
                `optimizer_start="fresh"`. None or an empty one: from 0.

        Raises:
            InvalidInputError: No examples, no adapter, examples that do not fit the algorithm or each other, or moments
                of another adapter.
            ScheduleError: A schedule that Eq. 1 has no density for, or that is not the examples'.
        """
        self.sampling = check_examples(examples, config, model.unet.config.in_channels)
        self.model, self.examples, self.config, self.seed = model, tuple(examples), config, seed
        self.schedule = Schedule.from_scheduler(model.scheduler, self.sampling.num_steps, self.sampling.eta)
        generator = torch.Generator().manual_seed(seed)
        usable = rows_of(self.examples, self.schedule, config)
        updates = [update for _ in range(config.inner_epochs) for update in draw_epoch(usable, config, generator)]
        self._rows = sorted({row for update in updates for row in update})
        numbers = {row: number for number, row in enumerate(self._rows)}
        self._updates = [[numbers[row] for row in update] for update in updates]
        self._ratio_tolerance = config.ratio_tolerance or ratio_tolerance_of(placement(model.unet)[1])
        self._parameters = lora_parameters(model.unet)
        if not all(parameter.requires_grad for parameter in self._parameters.values()):
            raise InvalidInputError("unet: expected an adapter that can be trained: see attach_lora and load_adapter")
        self._start = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        if optimizer is not None and config.optimizer_start == "carried":
            restore(self._optimizer, self._parameters, optimizer)

        texts = sorted({example.prompt for example in examples})
        height, width = examples[0].sides[0].latents.shape[3:]
        self._places = {text: place for place, text in enumerate(texts)}
        self._embeds = model.encode_prompts(texts, (height, width))
        self._negative = model.encode_prompts([""], (height, width))
        self._reference: _Reference | None = None
        self.reports: list[UpdateReport] = []
        """Of all updates that are done, also of those before a state was loaded."""

    @property
    def updates_done(self) -> int:
        return len(self.reports)

    @property
    def rows_total(self) -> int:
        """Rows that some update takes; `prepare` evaluates each once."""
        return len(self._rows)

    @property
    def rows_by_update(self) -> tuple[int, ...]:
        """How many rows each update takes."""
        return tuple(map(len, self._updates))

    @property
    def updates_total(self) -> int:
        """Updates of all inner epochs."""
        return len(self._updates)

    def prepare(self, on_rows: OnRows | None = None) -> SelfTest:
        """Evaluate all rows under the policy before the first update, and test that it is the one that sampled.

        `step` does it if nobody did; a second call only gives the report again. Raises PolicyMismatchError where
        recorded and replayed log-probs differ by more than the ratio's tolerance, NonFiniteError naming the step.
        """
        return self._prepared(on_rows).self_test

    def _prepared(self, on_rows: OnRows | None) -> _Reference:
        if self._reference is None:
            log_probs, means, plain = self._evaluate_reference(on_rows)
            silent = sorted(set(range(len(self.schedule))) - set(self.schedule.trainable_steps))
            report = self_test(self._rows, self.examples, plain, self._ratio_tolerance, silent)
            self._reference = _Reference(log_probs, means, report)
        return self._reference

    @torch.no_grad()
    def _evaluate_reference(self, on_rows: OnRows | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log p_old (rows, S) over the elements that count, the means that the KL is measured from (rows, S, C, h, w),
        and log p_old over all elements, as trajectories record it; on the CPU."""
        sides = self.examples[0].sides
        log_probs = torch.empty(self.rows_total, len(sides))
        plain = torch.empty_like(log_probs)
        means = torch.empty(self.rows_total, len(sides), *sides[0].latents.shape[2:])
        base = {name: torch.zeros_like(value) for name, value in self._start.items()}  # an adapter that adds nothing

        for numbers in _split(list(range(self.rows_total)), self.config.micro_batch):
            with weights_as(self._parameters, self._start):
                old = self._evaluate(numbers)
            log_probs[numbers] = old.log_probs.cpu()
            plain[numbers] = self._log_probs(numbers, old.x_prev, old.means, credited=False).cpu()
            if self.config.kl_reference == "base":
                with weights_as(self._parameters, base):
                    old = self._evaluate(numbers)
            means[numbers] = old.means.cpu()
            if on_rows is not None:
                on_rows(numbers[-1] + 1)
        return log_probs, means, plain

    def step(self, on_rows: OnRows | None = None) -> UpdateReport:
        """One optimiser update, in four steps:

        1. the losses of the update's rows (Eq. 6, 8 or 9) and their mean gradient, in micro-batches;
        2. in the first update, a check that p / p_old is 1;
        3. the gradient's norm, clipped to `max_grad_norm`;
        4. AdamW's step, with the gradient at the scale that its epsilon is meant for (`gradient_scale`).

        `on_rows(done_rows)` is called after each micro-batch and may raise: nothing has changed then. Raises
        NonFiniteError naming update and step, PolicyMismatchError where p / p_old is not 1 in the first update,
        InvalidInputError when all updates are done; the adapter is as before then.
        """
        if self.updates_done >= self.updates_total:
            raise InvalidInputError(f"expected at most {self.updates_total} updates, all are done")
        reference = self._prepared(on_rows)
        tally = Tally()

        # 1. losses and gradients
        self._add_gradients(self._updates[self.updates_done], reference, tally, on_rows)

        # 2. the ratio starts at 1
        if self.updates_done == 0:
            require_ratio_one(tally.ratio_by_step(), self._ratio_tolerance, "log-probs of the first update")

        # 3. the norm
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise NonFiniteError(f"gradient became {norm} in update {self.updates_done + 1}{self._in_float16}")

        # 4. AdamW
        scale = self.gradient_scale
        parameters = self._parameters.values()
        below_epsilon = share_below(parameters, self.config.adam_epsilon / scale)
        scale_gradients(parameters, scale)
        self._optimizer.step()
        scale_gradients(parameters, 1 / scale)

        self.reports.append(tally.report(self.updates_done + 1, norm, below_epsilon))
        return self.reports[-1]

    @property
    def gradient_scale(self) -> float:
        """What the gradient is multiplied by before AdamW sees it: a power of two near C x h x w / weight.

        The loss is a mean over C x h x w, times the algorithm's weight (beta of Eq. 6, alpha of Eq. 9). Its gradient is
        so small that AdamW's epsilon, 1e-8, would shorten the step, and more so the smaller beta is (decision 017).
        """
        elements = math.prod(self.examples[0].sides[0].latents.shape[2:])
        return 2.0 ** round(math.log2(elements / self.config.loss_weight))

    def _add_gradients(
        self, numbers: Sequence[int], reference: _Reference, tally: Tally, on_rows: OnRows | None
    ) -> None:
        """Leave the mean gradient of the rows in the parameters, and their figures in the tally.

        Until the end it is larger by a power of two near rows x C x h x w / weight: what comes back to the U-Net then
        has the size that one element's log p alone gives, which float16 can hold.
        """
        parameters = list(self._parameters.values())
        self._optimizer.zero_grad(set_to_none=True)
        done = 0
        scale = self.gradient_scale * 2.0 ** round(math.log2(len(numbers)))
        unet = self.model.unet
        with checkpointing(unet, self.config.gradient_checkpointing), fast_backward(unet):
            for step, group in self._groups(numbers):
                before = [parameter.grad for parameter in parameters]
                self._optimizer.zero_grad(set_to_none=True)
                for part in _split(group, self.config.micro_batch):
                    self._backward(part, scale / len(numbers), reference, tally)
                    done += len(part)
                    if on_rows is not None:
                        on_rows(done)
                if step is not None:
                    tally.add_grad_norm(step, self._grad_norm(step) / scale)
                for parameter, earlier in zip(parameters, before, strict=True):
                    if earlier is not None:
                        parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)
        scale_gradients(parameters, 1 / scale)

    @property
    def _in_float16(self) -> str:
        """What an error says beside, where numbers may have been too large for the U-Net's dtype."""
        _, dtype = placement(self.model.unet)
        return "; a bfloat16 or float32 U-Net takes larger ones" if dtype == torch.float16 else ""

    def _groups(self, numbers: Sequence[int]) -> list[tuple[int | None, list[int]]]:
        """The rows grouped by step if each step's gradient norm is logged, else in one group."""
        if not self.config.log_gradient_norms:
            return [(None, list(numbers))]
        by_step: dict[int | None, list[int]] = {step: [] for step in range(len(self.schedule))}
        for number in numbers:
            by_step[self._rows[number].step].append(number)
        return [(step, group) for step, group in by_step.items() if group]

    def _grad_norm(self, step: int) -> float:
        norm = gradient_norm(self._parameters.values())
        if not math.isfinite(norm):
            where = f"in update {self.updates_done + 1} at step_index {step}"
            raise NonFiniteError(f"gradient became {norm} {where}{self._in_float16}")
        return norm

    def _backward(self, numbers: list[int], weight: float, reference: _Reference, tally: Tally) -> None:
        """Add the gradient of some rows, each of that weight."""
        rows = [self._rows[number] for number in numbers]
        device, _ = placement(self.model.unet)
        old = reference.log_probs[numbers].to(device)
        old_means = reference.means[numbers].to(device)
        advantages = torch.tensor([self.examples[row.example].advantage for row in rows], device=device)
        sigmas = self.schedule.sigmas[[row.step for row in rows]].to(device)

        new = self._evaluate(numbers)
        kl = gaussian_kl(new.means, old_means, sigmas)
        terms = RowTerms(new.log_probs, old, kl, advantages, self._residuals(numbers, new))
        results = row_losses(terms, self.config)
        for row, loss in zip(rows, results.losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise NonFiniteError(f"loss became {loss} in update {self.updates_done + 1} at step_index {row.step}")

        (results.losses.sum() * weight).backward()
        tally.add([row.step for row in rows], results, (new.log_probs - old).detach(), kl.detach())

    def _evaluate(self, numbers: Sequence[int]) -> _Transitions:
        """The transitions of some rows under the policy, in one U-Net call."""
        chosen = [(self.examples[row.example], row.step) for row in (self._rows[n] for n in numbers)]
        flat = [(example.prompt, side.latents[0], step) for example, step in chosen for side in example.sides]
        steps = torch.tensor([step for *_, step in flat])
        means = transition_mean(
            self.model.unet,
            self.schedule,
            torch.stack([latents[step] for _, latents, step in flat]),
            steps,
            self._embeds[[self._places[prompt] for prompt, *_ in flat]],
            self._negative,
            self.sampling.guidance_scale,
        )
        x_prev = torch.stack([latents[step + 1] for _, latents, step in flat]).to(means.device)
        shape = len(chosen), -1
        x_prev, means = x_prev.unflatten(0, shape), means.unflatten(0, shape)
        log_probs = self._log_probs(numbers, x_prev, means, credited=self.config.credit == "mask")
        return _Transitions(log_probs, means, x_prev)

    def _residuals(self, numbers: Sequence[int], transitions: _Transitions) -> torch.Tensor:
        """mu - x_prev of rows, (R, S, C, h, w), each element weighted as it is in the row's log p."""
        residuals = (transitions.means - transitions.x_prev).detach()
        return residuals if self.config.credit == "all" else residuals * self._masks(numbers)[:, None, None]

    def _log_probs(
        self, numbers: Sequence[int], x_prev: torch.Tensor, means: torch.Tensor, *, credited: bool
    ) -> torch.Tensor:
        """log p (R, S) of rows from x_prev and means (R, S, C, h, w): over all elements, or, if `credited`, over those
        that the pairs' masks cover."""
        rows = [self._rows[number] for number in numbers]
        sides = x_prev.shape[1]
        sigmas = self.schedule.sigmas[[row.step for row in rows]].repeat_interleave(sides).to(means.device)
        weights = self._masks(numbers).repeat_interleave(sides, 0) if credited else None
        log_probs = log_prob(x_prev.flatten(0, 1), means.flatten(0, 1), sigmas, weights)
        return log_probs.reshape(len(rows), sides)

    def _masks(self, numbers: Sequence[int]) -> torch.Tensor:
        """The latent elements that count in each row, (R, h, w)."""
        device, _ = placement(self.model.unet)
        return torch.stack([self._credit_weights[self._rows[number].example] for number in numbers]).to(device)

    @cached_property
    def _credit_weights(self) -> list[torch.Tensor]:
        """Of each pair, the latent elements that count, (h, w)."""
        return [example.credit_weights() for example in self.examples if isinstance(example, TrainingPair)]

    def optimizer_state(self) -> OptimizerState:
        """AdamW's moments now, for the round that continues from this adapter."""
        return state_of(self._optimizer, self._parameters)

    def state(self) -> TrainerState:
        """Adapter, optimiser, the policy before the first update, and the reports of the updates that are done.

        A trainer of the same examples that loads it goes on bit for bit (on a CPU, with the same `micro_batch`): its
        `prepare` evaluates all rows under the saved policy again.
        """
        return TrainerState.of(self._about, self._parameters, self._start, self.optimizer_state(), self.reports)

    @cached_property
    def _about(self) -> dict[str, object]:
        """What a state must have been made with to be loaded here."""
        config = self.config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
        return {"format": FORMAT, "seed": self.seed, "config": config, "examples": digest(self.examples)}

    def load_state(self, state: TrainerState) -> None:
        """Go on from `state`. Raises CheckpointError, with nothing changed, if it is of other examples, settings, seed
        or another adapter."""
        state.require_training(self._about)
        reports = state.reports(self.updates_total)
        adapter = state.weights("adapter", self._parameters)
        start = state.weights("start", self._parameters)
        moments = state.moments(self._parameters)

        for name, parameter in self._parameters.items():
            parameter.data.copy_(adapter[name])
            self._start[name] = start[name].to(parameter.device)
        restore(self._optimizer, self._parameters, moments)
        self._reference = None
        self.reports = reports


def _split(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
