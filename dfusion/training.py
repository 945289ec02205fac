"""Training on preference pairs: DPO over the transitions of stored trajectories (Eq. 6)."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dfusion.adapter import lora_parameters
from dfusion.config import SamplingConfig, TrainingConfig
from dfusion.ddim import Schedule
from dfusion.errors import CheckpointError, InvalidInputError, NonFiniteError
from dfusion.files import read_tensors, write_tensors
from dfusion.losses.dpo import dpo_loss, dpo_margin
from dfusion.models import DiffusionModel
from dfusion.policy import transition_log_prob
from dfusion.types import Trajectory

FORMAT = "dfusion-dpo-trainer-1"
STATE_FILE = "trainer.safetensors"
OnRows = Callable[[int], None]
"""Called as on_rows(done_rows) after each micro-batch; it may raise to cancel."""


@dataclass(frozen=True)
class TrainingPair:
    """A preferred and a rejected trajectory of one prompt, each of one sample.

    first_step  transitions before it are shared and skipped: FusionConfig.first_step for a fused pair (their
                gradient is zero), 0 for a pair with the reference itself
    """

    preferred: Trajectory
    rejected: Trajectory
    prompt: str
    first_step: int

    def __post_init__(self) -> None:
        if len(self.preferred) != 1 or len(self.rejected) != 1:
            raise InvalidInputError(
                f"pair: expected trajectories of 1 sample, got {len(self.preferred)} and {len(self.rejected)}"
            )
        if not 0 <= self.first_step < self.preferred.config.num_steps:
            raise InvalidInputError(f"first_step: expected a step of the trajectory, got {self.first_step}")


@dataclass(frozen=True)
class UpdateReport:
    """One optimiser update.

    update        its number, from 1
    rows          rows (pair x step) whose gradients it took the mean of
    loss          mean of Eq. 6 over the rows, before the update; ln 2 in the first
    margin        mean of beta * (log-ratio of the preferred - log-ratio of the rejected transition)
    accuracy      share of rows with a positive margin
    grad_norm     norm of the gradient before clipping
    ratio_max     largest p / pref or its inverse over all transitions; 1 in the first
    loss_by_step  mean loss of the rows of each step_index
    """

    update: int
    rows: int
    loss: float
    margin: float
    accuracy: float
    grad_norm: float
    ratio_max: float
    loss_by_step: Mapping[int, float]


@dataclass(frozen=True)
class TrainerState:
    """Everything that a trainer needs to go on: tensors by name, and plain values (JSON)."""

    tensors: Mapping[str, torch.Tensor]
    about: Mapping[str, object]


@dataclass(frozen=True)
class _Row:
    """One term of Eq. 6: the transition `step` of both trajectories of `pair`."""

    pair: int
    step: int


class DpoTrainer:
    """Trains the adapter attached to `model.unet` on `pairs`; one call of `step` is one optimiser update.

    pref is the policy as it is when the trainer is made: its log-probs of all rows are evaluated once, before the
    first update (`cache_reference`; the adapter must not change until then). With a loaded state, pref is the saved
    one. For fused targets both policies in the loss are the plain network on the stored states.
    """

    def __init__(self, model: DiffusionModel, pairs: Sequence[TrainingPair], config: TrainingConfig, seed: int) -> None:
        """Raises InvalidInputError without pairs, without an adapter, or for pairs sampled with different settings;
        ScheduleError for a schedule that Eq. 1 has no density for."""
        if not pairs:
            raise InvalidInputError("pairs: expected at least one, got none")
        self.model, self.pairs, self.config, self.seed = model, tuple(pairs), config, seed
        self.sampling = _common_config(pairs)
        self.schedule = Schedule.from_scheduler(model.scheduler, self.sampling.num_steps, self.sampling.eta)
        self._rows = _rows_of(pairs, self.schedule)
        self._parameters = lora_parameters(model.unet)
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        texts = sorted({pair.prompt for pair in pairs})
        self._embeds = dict(zip(texts, model.encode_prompts(texts), strict=True))
        self._negative = model.encode_prompts([""])
        self._reference: torch.Tensor | None = None
        self.updates_done = 0

    @property
    def rows_total(self) -> int:
        """Rows of one inner epoch: pairs x their steps."""
        return len(self._rows)

    @property
    def updates_total(self) -> int:
        """Updates of all inner epochs; the last of an epoch may have fewer rows."""
        return self.config.inner_epochs * math.ceil(self.rows_total / self.config.rows_per_update)

    def cache_reference(self, on_rows: OnRows | None = None) -> None:
        """Evaluate log pref of all rows, unless it is there. `step` does it if nobody did."""
        if self._reference is not None:
            return
        found = torch.empty(self.rows_total, 2)
        for numbers in _split(list(range(self.rows_total)), self.config.micro_batch):
            with torch.no_grad():
                found[numbers] = torch.stack(self._log_probs(numbers), 1).cpu()
            if on_rows is not None:
                on_rows(numbers[-1] + 1)
        self._reference = found

    def step(self, on_rows: OnRows | None = None) -> UpdateReport:
        """One optimiser update: the mean gradient of its rows, clipped, by AdamW.

        `on_rows(done_rows)` is called after each micro-batch and may raise: nothing has changed then. Raises
        NonFiniteError naming update and step, InvalidInputError when all updates are done.
        """
        if self.updates_done >= self.updates_total:
            raise InvalidInputError(f"expected at most {self.updates_total} updates, all are done")
        self.cache_reference(on_rows)
        numbers = self._rows_of_update(self.updates_done)
        self._optimizer.zero_grad(set_to_none=True)
        tally = _Tally()
        done = 0
        for part in _split(numbers, self.config.micro_batch):
            self._accumulate(part, len(numbers), tally)
            done += len(part)
            if on_rows is not None:
                on_rows(done)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise NonFiniteError(f"gradient became NaN or infinite in update {self.updates_done + 1}")
        self._optimizer.step()
        self.updates_done += 1
        return tally.report(self.updates_done, norm)

    def _accumulate(self, numbers: list[int], rows_of_update: int, tally: _Tally) -> None:
        """Add the gradient of some rows, weighted for the mean over the update."""
        assert self._reference is not None  # for the type checker: `step` has cached it
        preferred, rejected = self._log_probs(numbers)
        ref_preferred, ref_rejected = self._reference[numbers].to(preferred.device).unbind(1)
        terms = (preferred, ref_preferred, rejected, ref_rejected, self.config.beta)
        losses = dpo_loss(*terms)
        steps = [self._rows[n].step for n in numbers]
        for step, loss in zip(steps, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise NonFiniteError(f"loss became {loss} in update {self.updates_done + 1} at step_index {step}")
        (losses.sum() / rows_of_update).backward()
        ratios = torch.cat([preferred - ref_preferred, rejected - ref_rejected]).detach().abs().max().exp()
        tally.add(steps, losses.tolist(), dpo_margin(*terms).tolist(), float(ratios))

    def _log_probs(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """log p of the preferred and of the rejected transition of each row, (rows,) each, in one U-Net call."""
        rows = [self._rows[n] for n in numbers]
        sides = [self.pairs[r.pair].preferred for r in rows], [self.pairs[r.pair].rejected for r in rows]
        steps = [row.step for row in rows] * 2
        trajectories = [*sides[0], *sides[1]]
        both = zip(trajectories, steps, strict=True)
        x_t, x_prev = zip(*((t.latents[0, i], t.latents[0, i + 1]) for t, i in both), strict=True)
        embeds = torch.stack([self._embeds[self.pairs[row.pair].prompt] for row in rows] * 2)
        found = transition_log_prob(
            self.model.unet,
            self.schedule,
            torch.stack(x_t),
            torch.stack(x_prev),
            torch.tensor(steps),
            embeds,
            self._negative,
            self.sampling.guidance_scale,
        )
        preferred, rejected = found.chunk(2)
        return preferred, rejected

    def _rows_of_update(self, update: int) -> list[int]:
        """The row numbers of an update: a slice of its inner epoch's permutation, which `seed` alone determines."""
        per_epoch = self.updates_total // self.config.inner_epochs
        epoch, place = divmod(update, per_epoch)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(epoch + 1):
            order = torch.randperm(self.rows_total, generator=generator).tolist()
        size = self.config.rows_per_update
        return order[place * size : (place + 1) * size]

    def state(self) -> TrainerState:
        """Adapter, optimiser, log pref and progress; a trainer of the same pairs that loads it goes on bit for bit."""
        tensors = {f"adapter.{name}": value.detach().cpu().clone() for name, value in self._parameters.items()}
        for number, values in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value.cpu().clone() for key, value in values.items()}
        if self._reference is not None:
            tensors["reference"] = self._reference.clone()
        return TrainerState(tensors, self._about() | {"updates_done": self.updates_done})

    def _about(self) -> dict[str, object]:
        """What a state must have been made with to be loaded here."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(json.dumps([pair.prompt, pair.first_step]).encode())
            for side in (pair.preferred, pair.rejected):
                digest.update(side.latents.contiguous().numpy().tobytes())
        config = self.config.model_dump(exclude={"micro_batch"})
        return {"format": FORMAT, "seed": self.seed, "config": config, "pairs": digest.hexdigest()}

    def load_state(self, state: TrainerState) -> None:
        """Go on from `state`. Raises CheckpointError if it is of other pairs, settings, seed or another adapter."""
        for key, expected in self._about().items():
            if state.about.get(key) != expected:
                raise CheckpointError(f"trainer state: expected {key} {expected!r}, got {state.about.get(key)!r}")
        adapter = {name: state.tensors.get(f"adapter.{name}") for name in self._parameters}
        for name, parameter in self._parameters.items():
            saved = adapter[name]
            if saved is None or saved.shape != parameter.shape:
                raise CheckpointError(f"trainer state: no adapter weights of the right shape for {name}")
            parameter.data.copy_(saved)
        moments: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, value in state.tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                moments[int(number)][key] = value.clone()
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
        reference = state.tensors.get("reference")
        self._reference = None if reference is None else reference.clone()
        self.updates_done = int(str(state.about["updates_done"]))

    def save(self, folder: Path) -> None:
        """Write the state into `folder`: one safetensors file with JSON metadata, whole or not at all."""
        state = self.state()
        write_tensors(folder / STATE_FILE, state.tensors, {"trainer": json.dumps(state.about)})

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises CheckpointError if it is missing, damaged or of something else."""
        tensors, metadata = read_tensors(folder / STATE_FILE)
        try:
            about = json.loads(metadata["trainer"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{folder / STATE_FILE}: expected a trainer's state: {error!r}") from error
        self.load_state(TrainerState(tensors, about))


class _Tally:
    """Figures of one update, gathered over its micro-batches."""

    def __init__(self) -> None:
        self.losses: dict[int, list[float]] = defaultdict(list)
        self.margins: list[float] = []
        self.ratio_max = 1.0

    def add(self, steps: Sequence[int], losses: Sequence[float], margins: Sequence[float], ratio: float) -> None:
        for step, loss in zip(steps, losses, strict=True):
            self.losses[step].append(loss)
        self.margins += margins
        self.ratio_max = max(self.ratio_max, ratio)

    def report(self, update: int, grad_norm: float) -> UpdateReport:
        rows = len(self.margins)
        return UpdateReport(
            update=update,
            rows=rows,
            loss=sum(sum(losses) for losses in self.losses.values()) / rows,
            margin=sum(self.margins) / rows,
            accuracy=sum(margin > 0 for margin in self.margins) / rows,
            grad_norm=grad_norm,
            ratio_max=self.ratio_max,
            loss_by_step={step: sum(losses) / len(losses) for step, losses in sorted(self.losses.items())},
        )


def _common_config(pairs: Sequence[TrainingPair]) -> SamplingConfig:
    """The SamplingConfig that all trajectories share."""
    configs = {side.config for pair in pairs for side in (pair.preferred, pair.rejected)}
    if len(configs) != 1:
        raise InvalidInputError(f"pairs: expected one sampling config, got {configs}")
    return configs.pop()


def _rows_of(pairs: Sequence[TrainingPair], schedule: Schedule) -> list[_Row]:
    """All rows in order: pair by pair, steps from the pair's first one on; steps without noise are left out."""
    return [
        _Row(n, step) for n, pair in enumerate(pairs) for step in schedule.trainable_steps if step >= pair.first_step
    ]


def _split(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
