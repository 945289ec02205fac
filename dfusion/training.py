"""Training on trajectories: DPO, DDPO and DPOK over the transitions of a round (Eq. 6, 8, 9)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import cast

import torch

from dfusion.adapter import lora_dropout, lora_parameters, weights_as, without_effect
from dfusion.algorithms import ALGORITHMS
from dfusion.attention.processors import fast_backward
from dfusion.config import TrainingConfig
from dfusion.ddim import Schedule
from dfusion.distributed import SINGLE_PROCESS, Ranks
from dfusion.errors import InvalidInputError, NonFiniteError
from dfusion.gradients import checkpointing, gradient_norm, must_checkpoint, scale_gradients, share_below
from dfusion.guidance import placement
from dfusion.learning_rate import learning_rate
from dfusion.losses.dpok import divergence
from dfusion.losses.objective import RowTerms, row_losses
from dfusion.memory import peak_bytes, to_device
from dfusion.models import DiffusionModel
from dfusion.old_policy import OldPolicy
from dfusion.optimizer_state import OptimizerState, adamw, restore, state_of
from dfusion.seeds import dropout_seed
from dfusion.trainer_state import FORMAT, TrainerState
from dfusion.training_data import Example, Row, check_examples, digest, plan_epoch, rows_of
from dfusion.training_report import Replayed, SelfTest, Tally, UpdateReport, ratio_tolerance_of, self_test
from dfusion.transitions import Evaluated, Transitions

OnRows = Callable[[int], None]
"""Called as on_rows(done_rows) after each micro-batch; it may raise to cancel."""
_WITHOUT_EFFECT = {"micro_batch", "gradient_checkpointing", "log_gradient_norms", "ratio_tolerance"}
"""Settings that do not change what is learned. A state can be loaded although they differ."""


class Trainer:
    """Trains the adapter attached to `model.unet` with the algorithm of `config`. Each call of `step` is one update.

    The algorithm determines whether the examples are TrainingPairs or TrainingSamples (`dfusion.algorithms`). The
    examples determine whether the training is naive or with D-Fusion. Naive examples are references and bases, or
    plain samples. With D-Fusion, fused targets are among them.

    A row holds S transitions: two for pairs, one for samples. Both policies in the loss are the plain network on the
    stored states, also for fused targets. p_old (pref of Eq. 6) is the policy when the trainer is constructed, or the
    saved one after `load_state`. A transition's log p_old is

    * in the first update: its log-prob there, since the policy is still p_old;
    * later: the same value, or for transitions that were not in the first update, the recorded log-prob. Where another
      network sampled the trajectory, where log-probs are masked, and where the loss has a KL, `prepare` evaluates it.

    Memory: besides the model, the examples and the means of p_old that are used again (at most rows x S latents,
    float32, on the CPU). With examples from a `TrajectorySpool` and a `spool`, these are in files; memory then holds
    one micro-batch of them.

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
        ranks: Ranks = SINGLE_PROCESS,
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
            ranks: The processes that train together. All must have the same model, examples, settings and seed.

        Raises:
            InvalidInputError: No examples; no adapter; examples that do not fit the algorithm or each other; moments of
                another adapter or optimizer; an optimizer that is not installed.
            ScheduleError: A schedule for which Eq. 1 has no density, or timesteps that differ from the examples'.
        """
        self.sampling = check_examples(examples, config, model.unet.config.in_channels)
        self.model = model
        self.examples = tuple(examples)
        self.config = config
        self.seed = seed
        self._spool = spool
        self._ranks = ranks
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

        # the stored transitions
        self._transitions = Transitions(
            model, self.examples, self._rows, self.schedule, self.sampling, masked=config.credit == "mask"
        )
        self._old: OldPolicy | None = None
        self._checkpoints: bool | None = config.gradient_checkpointing
        self.self_test: SelfTest | None = None
        """How far recorded and replayed log-probs differ. Complete after the first update; a saved state has it."""
        self.reports: list[UpdateReport] = []
        """One report per completed update, including updates before a state was loaded."""

    @property
    def updates_done(self) -> int:
        return len(self.reports)

    @property
    def rows_by_update(self) -> tuple[int, ...]:
        """The number of rows of each update."""
        return tuple(map(len, self._updates))

    @property
    def updates_total(self) -> int:
        """Updates of all inner epochs."""
        return len(self._updates)

    @property
    def rows_to_prepare(self) -> int:
        """The number of rows that this rank evaluates in `prepare`, rounded up; 0 after it was called."""
        if self._old is not None:
            return 0
        transitions = sum(map(len, [*self._old_batches(), *self._base_batches()]))
        return math.ceil(transitions / self._transitions.sides)

    def prepare(self, on_rows: OnRows | None = None) -> None:
        """Evaluate the log-probs and means, under p_old or the base model, that later updates need.

        `step` calls it if needed.

        Args:
            on_rows: Called as on_rows(done_rows) after each micro-batch. It may raise to cancel.

        Raises:
            PolicyMismatchError: A recorded log-prob differs from the policy's by more than the tolerance on the ratio.
            NonFiniteError: A log-prob is NaN or infinite. The message names the step.
            InvalidInputError: The adapters or the rows of the ranks differ.
            RankLostError: Another rank has ended.
        """
        if self._old is not None:
            return
        if self._ranks.size > 1:
            self._ranks.require_equal("adapter", self._start_bytes())
            self._ranks.require_equal("number of rows", str(len(self._rows)).encode())

        # 1. recorded log-probs
        shape = self.examples[0].sides[0].latents.shape[2:]
        old = OldPolicy(self._recorded_log_probs(), self._kept_means(), shape, self._transitions.device, self._spool)

        # 2. p_old of transitions that have none, and the means of the base model
        done = 0
        for batches, evaluate in (
            (self._old_batches(), self._evaluate_old),
            (self._base_batches(), self._evaluate_base),
        ):
            for numbers in batches:
                evaluate(old, numbers)
                done += len(numbers)
                if on_rows is not None:
                    on_rows(math.ceil(done / self._transitions.sides))

        # 3. the self-test of what was evaluated
        self._test(old)
        self._old = old

    def _start_bytes(self) -> bytes:
        """The adapter before the first update."""
        weights = [weight.cpu().contiguous().view(torch.uint8) for _, weight in sorted(self._start.items())]
        return torch.cat([part.flatten() for part in weights]).numpy().tobytes()

    @torch.no_grad()
    def _evaluate_old(self, old: OldPolicy, numbers: list[int]) -> None:
        """Evaluate transitions under the policy before the first update."""
        with weights_as(self._parameters, self._start):
            evaluated = self._transitions.evaluate(numbers)
        old.put(numbers, evaluated.indices, evaluated.log_probs, evaluated.plain)
        if not self._kl_from_base:
            old.put_means(numbers, evaluated.means)

    @torch.no_grad()
    def _evaluate_base(self, old: OldPolicy, numbers: list[int]) -> None:
        """Evaluate the means of transitions under the base model."""
        with without_effect(self.model.unet):
            old.put_means(numbers, self._transitions.evaluate(numbers).means)

    @property
    def _starts_at_old(self) -> bool:
        """Whether the next update's forward passes are those of p_old: it is the first one, without dropout."""
        return self.updates_done == 0 and self.config.lora.dropout == 0

    @property
    def _kl_from_base(self) -> bool:
        return self.config.kl_reference == "base"

    def _old_batches(self) -> list[list[int]]:
        """The transitions to evaluate under p_old before the next update.

        The batches are those of the first evaluation, so that a resumed training has the same bits.
        """
        # 1. the first update's, unless it evaluates them itself
        micro_batch = self.config.micro_batch
        groups = [self._own(group) for _, group in self._groups(self._updates[0])]
        parts = chain.from_iterable(_split(group, micro_batch) for group in groups)
        first = [self._transitions.of_rows(part) for part in parts]
        in_first = set(self._transitions.of_rows(self._updates[0]))

        # 2. others without a recorded log-prob that can be used
        unrecorded = []
        for number in self._of_updates(0):
            if number not in in_first and not self._is_recorded(number):
                unrecorded.append(number)
        batches = list(_split(unrecorded, micro_batch * self._transitions.sides))

        if not self._starts_at_old:
            batches += first
        return self._remaining(batches)

    def _base_batches(self) -> list[list[int]]:
        """The transitions to evaluate under the base model before the next update."""
        if not self._kl_from_base:
            return []
        batches = _split(self._of_updates(0), self.config.micro_batch * self._transitions.sides)
        return self._remaining(list(batches))

    def _remaining(self, batches: list[list[int]]) -> list[list[int]]:
        """The batches with transitions of the remaining updates."""
        remaining = set(self._of_updates(self.updates_done))
        return [batch for batch in batches if not remaining.isdisjoint(batch)]

    def _of_updates(self, start: int) -> list[int]:
        """This rank's transitions of the updates from `start` on."""
        numbers = set(chain.from_iterable(self._updates[start:]))
        return self._transitions.of_rows(self._own(sorted(numbers)))

    def _own(self, numbers: Sequence[int]) -> list[int]:
        """The rows among these that this rank evaluates."""
        return [number for number in numbers if self._ranks.owns(self._rows[number])]

    def _is_recorded(self, number: int) -> bool:
        """Whether the recorded log-prob of a transition is all that the loss needs to know of p_old."""
        uses_records = self.config.credit == "all" and not ALGORITHMS[self.config.algorithm].has_kl
        return uses_records and self._transitions.recorded(number) is not None

    def _recorded_log_probs(self) -> torch.Tensor:
        """The recorded log-probs of all transitions, (N,); NaN where they cannot be used.

        Raises NonFiniteError for one that is NaN or infinite.
        """
        log_probs = torch.full((len(self._transitions),), torch.nan)
        for number in range(len(self._transitions)):
            recorded = self._transitions.recorded(number)
            if recorded is None or not self._is_recorded(number):
                continue
            if not math.isfinite(recorded):
                row = self._transitions.row(number)
                where = f"examples[{row.example}] at step_index {row.step}"
                raise NonFiniteError(f"log_probs: expected finite numbers, got {recorded} for {where}")
            log_probs[number] = recorded
        return log_probs

    def _kept_means(self) -> frozenset[int]:
        """The transitions whose means are used after they were evaluated."""
        next_has_them = self._starts_at_old and not self._kl_from_base
        return frozenset(self._of_updates(self.updates_done + 1 if next_has_them else self.updates_done))

    def _test(self, old: OldPolicy) -> None:
        """Compare all transitions that were evaluated under p_old with their records."""
        numbers = torch.tensor(sorted(old.evaluated), dtype=torch.int64)
        log_probs = torch.stack([numbers.double(), old.replayed.cpu()[numbers].double()], 1)
        replayed = []
        for place, log_prob in self._ranks.all_gather(log_probs).tolist():
            number = int(place)
            replayed.append(Replayed(self._transitions.row(number), log_prob, self._transitions.recorded(number)))
        without_noise = sorted(set(range(len(self.schedule))) - set(self.schedule.trainable_steps))
        report = self_test(replayed, self._ratio_tolerance, without_noise)
        if self.updates_done == 0:
            self.self_test = report

    def step(self, on_rows: OnRows | None = None) -> UpdateReport:
        """Do one optimiser update.

        Args:
            on_rows: Called as on_rows(done_rows) after each micro-batch of this rank, with the approximate number of
                rows of all ranks. It may raise to cancel.

        Returns:
            The update's report: loss, ratio, KL and gradient norm, in total and by step.

        Raises:
            InvalidInputError: All updates are done.
            NonFiniteError: A loss or a gradient is NaN or infinite. The message names update and step.
            PolicyMismatchError: In the first update, a recorded log-prob differs from the policy's by more than the
                tolerance on the ratio.
            RankLostError: Another rank has ended.

        After an error, or if `on_rows` raises, the adapter is unchanged.
        """
        # Notation (<variable> -> <paper>), Eq. 6, 8 and 9:
        #   the current adapter  -> theta of p_theta
        #   old.log_probs        -> log p_old, which is log pref in Eq. 6
        #   old.means            -> mu of pref in the KL term of Eq. 9
        #   self._updates[k]     -> the transitions (x_t, x_{t-1}) of update k; a row holds those of all its sides
        #   norm                 -> |grad L| before clipping
        if self.updates_done >= self.updates_total:
            raise InvalidInputError(f"step: expected at most {self.updates_total} updates, got one more")
        self.prepare(on_rows)
        old = cast(OldPolicy, self._old)
        number = self.updates_done + 1
        started = time.perf_counter()
        tally = Tally(self._transitions.sides, self._ranks)

        # 1. compute the rows' losses (Eq. 6, 8 or 9) and their mean gradient, in micro-batches
        self._choose_checkpointing(self._updates[self.updates_done])
        seed = dropout_seed(self.seed, self.updates_done) + self._ranks.rank
        with lora_dropout(self.model.unet, self.config.lora.dropout, seed):
            self._add_gradients(self._updates[self.updates_done], old, tally, on_rows)

        # 2. verify that all values are finite, and in the first update that p is p_old
        tally.require_finite(number, self._in_float16)
        if self._starts_at_old:
            self._test(old)

        # 3. clip the gradient's norm
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise NonFiniteError(f"gradient became {norm} in update {number}{self._in_float16}")

        # 4. step AdamW with the gradient at the scale that suits its epsilon (`gradient_scale`)
        scale = self.gradient_scale
        parameters = self._parameters.values()
        below_epsilon = share_below(parameters, self.config.adam_epsilon / scale)
        scale_gradients(parameters, scale)
        self._set_learning_rate()
        self._optimizer.step()
        scale_gradients(parameters, 1 / scale)

        # 5. report, and update the average, which the trained model has after the last update
        report = tally.report(number, norm, below_epsilon)
        seconds = time.perf_counter() - started
        self.reports.append(replace(report, seconds=seconds, peak_bytes=peak_bytes(self._transitions.device)))
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

    def _add_gradients(self, numbers: Sequence[int], old: OldPolicy, tally: Tally, on_rows: OnRows | None) -> None:
        """Compute the rows' mean gradient in the parameters, and add their metrics to the tally.

        During the computation the gradient is scaled by a power of two near rows x C x h x w / weight. The gradient
        that reaches the U-Net then has the size of one element's log p, which float16 can represent.
        """
        parameters = list(self._parameters.values())
        scale = self.gradient_scale * 2.0 ** round(math.log2(len(numbers)))
        unet = self.model.unet
        done = 0

        self._optimizer.zero_grad(set_to_none=True)
        with fast_backward(unet), checkpointing(unet, bool(self._checkpoints)):
            for step, group in self._groups(numbers):
                # 1. the group's own gradient, in micro-batches, and the sum over all ranks
                before = [parameter.grad for parameter in parameters]
                self._optimizer.zero_grad(set_to_none=True)
                for part in _split(self._own(group), self.config.micro_batch):
                    self._backward(part, scale / len(numbers), old, tally)
                    done += len(part)
                    if on_rows is not None:
                        on_rows(min(done * self._ranks.size, len(numbers)))
                self._ranks.all_reduce_gradients(parameters)
                if step is not None:
                    tally.add_grad_norm(step, gradient_norm(parameters) / scale)

                # 2. add the gradient of the earlier groups
                for parameter, earlier in zip(parameters, before, strict=True):
                    if earlier is not None:
                        parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)
        scale_gradients(parameters, 1 / scale)

    def _choose_checkpointing(self, numbers: Sequence[int]) -> None:
        """Decide once whether to recompute activations, from those of the first row, unless it is set.

        All ranks do so if one must. Otherwise the others would wait for it in each update.
        """
        if self._checkpoints is None:
            rows = min(self.config.micro_batch, len(numbers))
            first = self._transitions.of_rows(numbers[:1])
            with fast_backward(self.model.unet):
                needed = must_checkpoint(self._transitions.device, rows, lambda: self._transitions.evaluate(first))
            self._checkpoints = self._ranks.any(needed)

    @property
    def _in_float16(self) -> str:
        """Advice for an error message, if the U-Net's dtype can overflow."""
        _, dtype = placement(self.model.unet)
        advice = "; float16 may have overflowed: use a bfloat16 or float32 U-Net"
        return advice if dtype == torch.float16 else ""

    def _groups(self, numbers: Sequence[int]) -> list[tuple[int | None, list[int]]]:
        """The rows grouped by step if each step's gradient norm is logged, otherwise in one group."""
        if not self.config.log_gradient_norms:
            return [(None, list(numbers))]
        by_step: dict[int | None, list[int]] = {step: [] for step in range(len(self.schedule))}
        for number in numbers:
            by_step[self._rows[number].step].append(number)
        return [(step, group) for step, group in by_step.items() if group]

    def _backward(self, numbers: list[int], weight: float, old: OldPolicy, tally: Tally) -> None:
        """Add the gradient of these rows, each with this weight. Does not wait for a GPU."""
        # 1. the current policy, which is p_old in the first update
        transitions = self._transitions.of_rows(numbers)
        new = self._transitions.evaluate(transitions)
        if self._starts_at_old:
            old.put(transitions, new.indices, new.log_probs.detach(), new.plain)
            if not self._kl_from_base:
                old.put_means(transitions, new.means.detach())

        # 2. the losses
        shape = (len(numbers), -1)
        log_probs = new.log_probs.unflatten(0, shape)
        old_log_probs = old.log_probs[new.indices].unflatten(0, shape)
        kl = self._divergences(transitions, new, old).unflatten(0, shape).nanmean(1)
        rows = new.indices.unflatten(0, shape)[:, 0] // self._transitions.sides
        residuals = self._residuals(new).unflatten(0, shape)
        terms = RowTerms(log_probs, old_log_probs, kl, self._transitions.advantages[rows], residuals)
        results = row_losses(terms, self.config)

        # 3. the gradient
        (results.losses.sum() * weight).backward()
        steps = [self._rows[number].step for number in numbers]
        tally.add(steps, results, (log_probs - old_log_probs).detach(), kl.detach())

    def _divergences(self, numbers: Sequence[int], new: Evaluated, old: OldPolicy) -> torch.Tensor:
        """KL(p || pref) of transitions, (N,); NaN where the means of pref are not known."""
        if self._starts_at_old and not self._kl_from_base:
            return divergence(new.means, new.means.detach(), new.sigmas)

        places = [place for place, known in enumerate(old.known_means(numbers)) if known]
        unknown = torch.full_like(new.plain, torch.nan)
        if not places:
            return unknown
        means = to_device(old.means([numbers[place] for place in places]), unknown.device)
        indices = self._transitions.indices(places)
        return unknown.index_copy(0, indices, divergence(new.means[indices], means, new.sigmas[indices]))

    def _residuals(self, new: Evaluated) -> torch.Tensor:
        """mu - x_prev of transitions, (N, C, h, w), each element weighted as in log p."""
        residuals = (new.means - new.x_prev).detach()
        masks = self._transitions.masks(new.indices)
        return residuals if masks is None else residuals * masks[:, None]

    def optimizer_state(self) -> OptimizerState:
        """AdamW's current moments, for the round that continues from this adapter."""
        return state_of(self._optimizer, self._parameters)

    def state(self) -> TrainerState:
        """Adapter and average, optimiser, the policy before the first update, and the reports of completed updates.

        A trainer of the same examples that loads the state continues bit for bit (on a CPU, with the same
        `micro_batch`). Its `prepare` evaluates again what the remaining updates need of the saved p_old.
        """
        return TrainerState.of(
            self._about,
            self._parameters,
            self._start,
            self.optimizer_state(),
            self.reports,
            self.self_test,
            self._average,
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
        tested = state.self_test()
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
        self._old = None
        self.self_test = tested
        self.reports = reports


def _split(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
