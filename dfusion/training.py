"""Training on trajectories: DPO, DDPO and DPOK over the transitions of a round (Eq. 6, 8, 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch

from dfusion.adapter import lora_dropout, lora_parameters, weights_as, without_effect
from dfusion.attention.processors import fast_backward
from dfusion.config import TrainingConfig
from dfusion.ddim import Schedule, log_prob
from dfusion.errors import InvalidInputError, NonFiniteError
from dfusion.gradients import checkpointing, gradient_norm, scale_gradients, share_below
from dfusion.guidance import placement
from dfusion.learning_rate import learning_rate
from dfusion.losses.dpok import gaussian_kl
from dfusion.losses.objective import RowTerms, row_losses
from dfusion.models import DiffusionModel
from dfusion.optimizer_state import OptimizerState, adamw, restore, state_of
from dfusion.policy import transition_mean
from dfusion.seeds import dropout_seed
from dfusion.spool import RowFile
from dfusion.trainer_state import FORMAT, TrainerState
from dfusion.training_data import Example, Row, TrainingPair, check_examples, digest, plan_epoch, rows_of
from dfusion.training_report import SelfTest, Tally, UpdateReport, ratio_tolerance_of, require_ratio_one, self_test

OnRows = Callable[[int], None]
"""Called as on_rows(done_rows) after each micro-batch; it may raise to cancel."""
_WITHOUT_EFFECT = {"micro_batch", "gradient_checkpointing", "log_gradient_norms", "ratio_tolerance"}
"""Settings that do not change what is learned. A state can be loaded although they differ."""


@dataclass(frozen=True)
class _Reference:
    """All rows evaluated under the policy before the first update, on the CPU; the means may be in a file.

    log_probs  (rows, S), log p_old, which is log pref in Eq. 6, over the credited elements (`credit`)
    means      (rows, S, C, h, w), mu of the policy from which the KL is measured
    """

    log_probs: torch.Tensor
    means: torch.Tensor | RowFile
    self_test: SelfTest


@dataclass(frozen=True)
class _Transitions:
    """R rows evaluated under the current policy, with gradients.

    log_probs  (R, S) log p over the credited elements (`credit`)
    means      (R, S, C, h, w) mu
    x_prev     (R, S, C, h, w) the stored next states
    """

    log_probs: torch.Tensor
    means: torch.Tensor
    x_prev: torch.Tensor


class Trainer:
    """Trains the adapter attached to `model.unet` with the algorithm of `config`. Each call of `step` is one update.

    The algorithm determines whether the examples are TrainingPairs or TrainingSamples (`dfusion.algorithms`). The
    examples determine whether the training is naive or with D-Fusion. Naive examples are references and bases, or
    plain samples. With D-Fusion, fused targets are among them.

    p_old (pref of Eq. 6) is the policy when the trainer is constructed, or the saved one after `load_state`. All rows
    are evaluated under it once, before the first update (`prepare`). Both policies in the loss are the plain network
    on the stored states, also for fused targets. A row holds S transitions: two for pairs, one for samples.

    Memory: besides the model, the examples and the means of p_old (rows x S latents, float32, on the CPU). With
    examples from a `TrajectorySpool` and a `spool`, these are in files; memory then holds one micro-batch of them.

    Example:
        >>> from dfusion import MODELS, DiffusionModel, SamplingConfig, Trainer, TrainingConfig, TrainingPair
        >>> from dfusion import attach_lora, sample
        >>> model = DiffusionModel.load(MODELS["shapes"].folder)
        >>> attach_lora(model.unet)
        >>> embeds = model.encode_prompts(["a red circle"])
        >>> empty = model.encode_prompts([""])
        >>> config = SamplingConfig(num_steps=4)
        >>> preferred = sample(model.unet, model.scheduler, embeds, empty, [1], config=config)
        >>> rejected = sample(model.unet, model.scheduler, embeds, empty, [2], config=config)
        >>> examples = [TrainingPair(preferred, rejected, "a red circle")]
        >>> trainer = Trainer(model, examples, TrainingConfig(inner_epochs=1), seed=0)
        >>> report = trainer.step()
        >>> report.rows, round(report.loss, 3)  # 4 steps of one pair; ln 2 in the first update
        (4, 0.693)
    """

    def __init__(
        self,
        model: DiffusionModel,
        examples: Sequence[Example],
        config: TrainingConfig,
        seed: int,
        optimizer: OptimizerState | None = None,
        spool: Path | None = None,
    ) -> None:
        """Set up a training without evaluating anything.

        Args:
            model: The model whose adapter is trained.
            examples: The pairs or samples to learn from.
            config: The algorithm and its settings.
            seed: Seed of the order of examples and of the random steps of `timestep_fraction`.
            optimizer: AdamW's moments from earlier rounds (`optimizer_state`). None or an empty state starts at 0;
                `optimizer_start="fresh"` ignores it.
            spool: A folder for the means of p_old. None = in memory.

        Raises:
            InvalidInputError: No examples; no adapter; examples that do not fit the algorithm or each other; moments of
                another adapter or optimizer; an optimizer that is not installed.
            ScheduleError: A schedule for which Eq. 1 has no density, or other timesteps than the examples'.
        """
        self.sampling = check_examples(examples, config, model.unet.config.in_channels)
        self.model = model
        self.examples = tuple(examples)
        self.config = config
        self.seed = seed
        self._spool = spool
        self.schedule = Schedule.from_scheduler(model.scheduler, self.sampling.num_steps, self.sampling.eta)

        # the rows of each update
        generator = torch.Generator().manual_seed(seed)
        usable = rows_of(self.examples, self.schedule, config)
        updates: list[list[Row]] = []
        for _ in range(config.inner_epochs):
            updates += plan_epoch(usable, config, generator)
        self._rows = sorted(set(chain.from_iterable(updates)))
        numbers = {row: number for number, row in enumerate(self._rows)}
        self._updates = [list(map(numbers.__getitem__, update)) for update in updates]

        # the adapter and its optimiser
        self._ratio_tolerance = config.ratio_tolerance or ratio_tolerance_of(placement(model.unet)[1])
        self._parameters = lora_parameters(model.unet)
        if not all(parameter.requires_grad for parameter in self._parameters.values()):
            raise InvalidInputError(
                "unet: expected a trainable adapter, got a frozen one; see attach_lora and load_adapter"
            )
        self._start = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._average = None if config.ema_decay is None else dict(self._start)
        self._optimizer = adamw(self._parameters.values(), config)
        self._updates_before = 0  # in AdamW's moments
        if optimizer is not None and config.optimizer_start == "carried":
            restore(self._optimizer, self._parameters, optimizer)
            self._updates_before = optimizer.updates

        # the prompts' embeddings
        texts = sorted({example.prompt for example in examples})
        height, width = examples[0].sides[0].latents.shape[3:]
        self._prompt_index = {text: index for index, text in enumerate(texts)}
        self._embeds = model.encode_prompts(texts, (height, width))
        self._negative = model.encode_prompts([self.sampling.negative_prompt], (height, width))
        self._reference: _Reference | None = None
        self.reports: list[UpdateReport] = []
        """One report per completed update, including updates before a state was loaded."""

    @property
    def updates_done(self) -> int:
        return len(self.reports)

    @property
    def rows_total(self) -> int:
        """Rows in at least one update. `prepare` evaluates each once."""
        return len(self._rows)

    @property
    def rows_by_update(self) -> tuple[int, ...]:
        """The number of rows of each update."""
        return tuple(map(len, self._updates))

    @property
    def updates_total(self) -> int:
        """Updates of all inner epochs."""
        return len(self._updates)

    def prepare(self, on_rows: OnRows | None = None) -> SelfTest:
        """Evaluate all rows under the policy before the first update, and verify that this policy sampled them.

        The first `step` calls it if needed. Further calls return the same report.

        Args:
            on_rows: Called as on_rows(done_rows) after each micro-batch. It may raise to cancel.

        Returns:
            The self-test: how far recorded and replayed log-probs differ.

        Raises:
            PolicyMismatchError: They differ by more than the ratio's tolerance.
            NonFiniteError: A log-prob is NaN or infinite. The message names the step.
        """
        return self._prepared(on_rows).self_test

    def _prepared(self, on_rows: OnRows | None) -> _Reference:
        if self._reference is None:
            log_probs, means, plain = self._evaluate_reference(on_rows)
            without_noise = sorted(set(range(len(self.schedule))) - set(self.schedule.trainable_steps))
            report = self_test(self._rows, self.examples, plain, self._ratio_tolerance, without_noise)
            self._reference = _Reference(log_probs, means, report)
        return self._reference

    @torch.no_grad()
    def _evaluate_reference(self, on_rows: OnRows | None) -> tuple[torch.Tensor, torch.Tensor | RowFile, torch.Tensor]:
        """Evaluate p_old on all rows. Returns on the CPU, the means in a file if there is a folder for it:

        log p_old (rows, S) over the credited elements, the means from which the KL is measured (rows, S, C, h, w), and
        log p_old (rows, S) over all elements, as trajectories record it.
        """
        sides = self.examples[0].sides
        log_probs = torch.empty(self.rows_total, len(sides))
        plain = torch.empty_like(log_probs)
        shape = (len(sides), *sides[0].latents.shape[2:])
        in_memory = torch.empty(self.rows_total if self._spool is None else 0, *shape)
        in_file = None if self._spool is None else RowFile(self._spool, shape)

        for numbers in _split(list(range(self.rows_total)), self.config.micro_batch):
            with weights_as(self._parameters, self._start):
                old = self._evaluate(numbers)
            log_probs[numbers] = old.log_probs.cpu()
            plain[numbers] = self._log_probs(numbers, old.x_prev, old.means, credited=False).cpu()

            if self.config.kl_reference == "base":
                with without_effect(self.model.unet):
                    old = self._evaluate(numbers)
            if in_file is None:
                in_memory[numbers] = old.means.cpu()
            else:
                for row in old.means:
                    in_file.append(row)
            if on_rows is not None:
                on_rows(numbers[-1] + 1)
        return log_probs, in_memory if in_file is None else in_file, plain

    def step(self, on_rows: OnRows | None = None) -> UpdateReport:
        """Do one optimiser update.

        Args:
            on_rows: Called as on_rows(done_rows) after each micro-batch. It may raise to cancel.

        Returns:
            The update's report: loss, ratio, KL and gradient norm, in total and by step.

        Raises:
            InvalidInputError: All updates are done.
            NonFiniteError: A loss or a gradient is NaN or infinite. The message names update and step.
            PolicyMismatchError: p / p_old is not 1 in the first update.

        After an error, or if `on_rows` raises, the adapter is unchanged.
        """
        # Notation (<variable> -> <paper>), Eq. 6, 8 and 9:
        #   the current adapter  -> theta of p_theta
        #   reference.log_probs  -> log p_old, which is log pref in Eq. 6
        #   reference.means      -> mu of pref in the KL term of Eq. 9
        #   self._updates[k]     -> the transitions (x_t, x_{t-1}) of update k; a row holds those of all its sides
        #   norm                 -> |grad L| before clipping
        if self.updates_done >= self.updates_total:
            raise InvalidInputError(
                f"expected at most {self.updates_total} updates, got a call of step after the last one"
            )
        reference = self._prepared(on_rows)
        tally = Tally()

        # 1. compute the rows' losses (Eq. 6, 8 or 9) and their mean gradient, in micro-batches
        dropout = self.config.lora.dropout
        with lora_dropout(self.model.unet, dropout, dropout_seed(self.seed, self.updates_done)):
            self._add_gradients(self._updates[self.updates_done], reference, tally, on_rows)

        # 2. in the first update, verify that p / p_old is 1, which dropout changes
        if self.updates_done == 0 and dropout == 0:
            require_ratio_one(tally.ratio_by_step(), self._ratio_tolerance, "log-probs of the first update")

        # 3. clip the gradient's norm
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise NonFiniteError(f"gradient became {norm} in update {self.updates_done + 1}{self._in_float16}")

        # 4. step AdamW with the gradient at the scale that suits its epsilon (`gradient_scale`)
        scale = self.gradient_scale
        parameters = self._parameters.values()
        below_epsilon = share_below(parameters, self.config.adam_epsilon / scale)
        scale_gradients(parameters, scale)
        self._set_learning_rate()
        self._optimizer.step()
        scale_gradients(parameters, 1 / scale)

        # 5. update the average, which the trained model has after the last update
        self.reports.append(tally.report(self.updates_done + 1, norm, below_epsilon))
        self._update_average()
        return self.reports[-1]

    def _set_learning_rate(self) -> None:
        """Set the learning rate of the next update."""
        before = self._updates_before
        rate = learning_rate(self.config, before + self.updates_done + 1, before + 1, before + self.updates_total)
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is None or self.config.ema_decay is None:
            return
        decay = min(self.config.ema_decay, (1 + self.updates_done) / (10 + self.updates_done))
        for name, parameter in self._parameters.items():
            self._average[name] = decay * self._average[name] + (1 - decay) * parameter
        if self.updates_done == self.updates_total:
            for name, parameter in self._parameters.items():
                parameter.copy_(self._average[name])

    @property
    def gradient_scale(self) -> float:
        """The factor of the gradient before AdamW's step: a power of two near C x h x w / weight.

        The loss is a mean over C x h x w, times the algorithm's weight (beta of Eq. 6, alpha of Eq. 9). Its gradient is
        so small that AdamW's epsilon, 1e-8, would shorten the step. A smaller beta shortens it more (decision 017).
        """
        elements = math.prod(self.examples[0].sides[0].latents.shape[2:])
        return 2.0 ** round(math.log2(elements / self.config.loss_weight))

    def _add_gradients(
        self, numbers: Sequence[int], reference: _Reference, tally: Tally, on_rows: OnRows | None
    ) -> None:
        """Compute the rows' mean gradient in the parameters, and add their metrics to the tally.

        During the computation the gradient is scaled by a power of two near rows x C x h x w / weight. The gradient
        that reaches the U-Net then has the size of one element's log p, which float16 can represent.
        """
        parameters = list(self._parameters.values())
        scale = self.gradient_scale * 2.0 ** round(math.log2(len(numbers)))
        unet = self.model.unet
        done = 0

        self._optimizer.zero_grad(set_to_none=True)
        with checkpointing(unet, self.config.gradient_checkpointing), fast_backward(unet):
            for step, group in self._groups(numbers):
                # 1. the group's own gradient, in micro-batches
                before = [parameter.grad for parameter in parameters]
                self._optimizer.zero_grad(set_to_none=True)
                for part in _split(group, self.config.micro_batch):
                    self._backward(part, scale / len(numbers), reference, tally)
                    done += len(part)
                    if on_rows is not None:
                        on_rows(done)
                if step is not None:
                    tally.add_grad_norm(step, self._grad_norm(step) / scale)

                # 2. add the gradient of the earlier groups
                for parameter, earlier in zip(parameters, before, strict=True):
                    if earlier is not None:
                        parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)
        scale_gradients(parameters, 1 / scale)

    @property
    def _in_float16(self) -> str:
        """Advice for an error message, if the U-Net's dtype can overflow."""
        _, dtype = placement(self.model.unet)
        return "; a bfloat16 or float32 U-Net takes larger ones" if dtype == torch.float16 else ""

    def _groups(self, numbers: Sequence[int]) -> list[tuple[int | None, list[int]]]:
        """The rows grouped by step if each step's gradient norm is logged, otherwise in one group."""
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
        """Add the gradient of these rows, each with this weight."""
        # 1. the policy before the first update
        rows = [self._rows[number] for number in numbers]
        device, _ = placement(self.model.unet)
        old = reference.log_probs[numbers].to(device)
        old_means = reference.means[numbers].to(device)
        advantages = torch.tensor([self.examples[row.example].advantage for row in rows], device=device)
        sigmas = self.schedule.sigmas[[row.step for row in rows]].to(device)

        # 2. the losses under the current policy
        new = self._evaluate(numbers)
        kl = gaussian_kl(new.means, old_means, sigmas)
        terms = RowTerms(new.log_probs, old, kl, advantages, self._residuals(numbers, new))
        results = row_losses(terms, self.config)
        for row, loss in zip(rows, results.losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise NonFiniteError(f"loss became {loss} in update {self.updates_done + 1} at step_index {row.step}")

        # 3. the gradient
        (results.losses.sum() * weight).backward()
        tally.add([row.step for row in rows], results, (new.log_probs - old).detach(), kl.detach())

    def _evaluate(self, numbers: Sequence[int]) -> _Transitions:
        """The transitions of these rows under the current policy, in one U-Net call."""
        # 1. the stored transitions, R x S in one batch
        steps: list[int] = []
        states: list[torch.Tensor] = []
        next_states: list[torch.Tensor] = []
        prompts: list[int] = []
        for number in numbers:
            row = self._rows[number]
            example = self.examples[row.example]
            for side in example.sides:
                latents = side.latents[0]
                steps.append(row.step)
                states.append(latents[row.step])
                next_states.append(latents[row.step + 1])
                prompts.append(self._prompt_index[example.prompt])

        # 2. mu and log p of each
        means = transition_mean(
            self.model.unet,
            self.schedule,
            torch.stack(states),
            torch.tensor(steps),
            self._embeds[prompts],
            self._negative,
            self.sampling.guidance_scale,
        )
        shape = (len(numbers), -1)
        means = means.unflatten(0, shape)
        x_prev = torch.stack(next_states).to(means.device).unflatten(0, shape)
        log_probs = self._log_probs(numbers, x_prev, means, credited=self.config.credit == "mask")
        return _Transitions(log_probs, means, x_prev)

    def _residuals(self, numbers: Sequence[int], transitions: _Transitions) -> torch.Tensor:
        """mu - x_prev of rows, (R, S, C, h, w), each element weighted as in the row's log p."""
        residuals = (transitions.means - transitions.x_prev).detach()
        return residuals if self.config.credit == "all" else residuals * self._masks(numbers)[:, None, None]

    def _log_probs(
        self, numbers: Sequence[int], x_prev: torch.Tensor, means: torch.Tensor, *, credited: bool
    ) -> torch.Tensor:
        """log p (R, S) of rows from x_prev and means (R, S, C, h, w).

        It is a mean over all elements or, if `credited`, over those that the pairs' masks cover.
        """
        rows = [self._rows[number] for number in numbers]
        sides = x_prev.shape[1]
        sigmas = self.schedule.sigmas[[row.step for row in rows]].repeat_interleave(sides).to(means.device)
        weights = self._masks(numbers).repeat_interleave(sides, 0) if credited else None
        log_probs = log_prob(x_prev.flatten(0, 1), means.flatten(0, 1), sigmas, weights)
        return log_probs.reshape(len(rows), sides)

    def _masks(self, numbers: Sequence[int]) -> torch.Tensor:
        """The credit weights of each row's latent elements, (R, h, w)."""
        device, _ = placement(self.model.unet)
        return torch.stack([self._credit_weights[self._rows[number].example] for number in numbers]).to(device)

    @cached_property
    def _credit_weights(self) -> list[torch.Tensor]:
        """The credit weights of each pair's latent elements, (h, w)."""
        return [example.credit_weights() for example in self.examples if isinstance(example, TrainingPair)]

    def optimizer_state(self) -> OptimizerState:
        """AdamW's current moments, for the round that continues from this adapter."""
        return state_of(self._optimizer, self._parameters)

    def state(self) -> TrainerState:
        """Adapter and average, optimiser, the policy before the first update, and the reports of completed updates.

        A trainer of the same examples that loads the state continues bit for bit (on a CPU, with the same
        `micro_batch`). Its `prepare` evaluates all rows under the saved policy again.
        """
        return TrainerState.of(
            self._about, self._parameters, self._start, self.optimizer_state(), self.reports, self._average
        )

    @cached_property
    def _about(self) -> dict[str, object]:
        """The description of this training. A state must have the same one to be loaded."""
        config = self.config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
        return {"format": FORMAT, "seed": self.seed, "config": config, "examples": digest(self.examples)}

    def load_state(self, state: TrainerState) -> None:
        """Continue from `state`.

        Raises:
            CheckpointError: The state belongs to other examples, settings, another seed or adapter. Nothing is changed.
        """
        state.require_training(self._about)
        reports = state.reports(self.updates_total)
        adapter = state.weights("adapter", self._parameters)
        start = state.weights("start", self._parameters)
        moments = state.moments(self._parameters)
        average = None if self._average is None else state.weights("average", self._parameters)

        for name, parameter in self._parameters.items():
            parameter.data.copy_(adapter[name])
            self._start[name] = start[name].to(parameter.device)
            if self._average is not None and average is not None:
                self._average[name] = average[name].to(parameter.device)
        restore(self._optimizer, self._parameters, moments)
        self._updates_before = moments.updates - len(reports)
        self._reference = None
        self.reports = reports


def _split(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
