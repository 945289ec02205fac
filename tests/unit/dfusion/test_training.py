import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfusion.adapter import attach_lora, lora_parameters
from dfusion.config import LoraConfig, SamplingConfig, TrainingConfig
from dfusion.ddim import Schedule
from dfusion.errors import CheckpointError, InvalidInputError, NonFiniteError, PolicyMismatchError
from dfusion.models import DiffusionModel
from dfusion.optimizer_state import load_optimizer, save_optimizer
from dfusion.policy import log_probs, transition_mean
from dfusion.sampling import sample
from dfusion.trainer_state import TrainerState
from dfusion.training import Trainer
from dfusion.training_data import Example, TrainingPair, TrainingSample
from dfusion.types import Trajectory
from tests.nets import sd_scheduler, tiny_model, tiny_xl_model
from tests.training_loop import DpoLoop

ALGORITHMS = ("dpo", "ddpo", "dpok")
PROMPTS = ("a red circle", "a red circle", "a blue square", "a blue square")
ADVANTAGES = (1.0, -1.5, 0.75, -0.5)
FOUR = SamplingConfig(num_steps=4)
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 5.0},
    "ddpo": {"clip_range": 0.9},
    "dpok": {"clip_range": 0.9, "policy_weight": 2.0, "kl_weight": 3.0},
}

ALL_AT_ONCE: dict[str, Any] = {"examples_per_update": 16, "micro_batch": 16, "log_gradient_norms": False}


def trained_model(has_middle: bool = False) -> DiffusionModel:
    """With an adapter that already changes the policy, as in later rounds."""
    model = tiny_model(has_middle)
    attach_lora(model.unet, seed=1)
    shake(model, 0.05)
    return model


@pytest.fixture
def model() -> DiffusionModel:
    return trained_model()


def shake(model: DiffusionModel, by: float, seed: int = 5) -> None:
    """Add noise to the adapter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model.unet).values():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)


def trajectories_of(model: DiffusionModel) -> list[Trajectory]:
    embeds = model.encode_prompts(PROMPTS)
    negative = model.encode_prompts([""])
    trajectory = sample(model.unet, model.scheduler, embeds, negative, [1, 2, 3, 4], config=FOUR)
    return [trajectory.select([i]) for i in range(4)]


def examples_of(model: DiffusionModel, algorithm: str = "dpo") -> list[Example]:
    """Two pairs or four samples: 8 or 16 rows."""
    trajectories = trajectories_of(model)
    if algorithm == "dpo":
        return [TrainingPair(trajectories[i], trajectories[i + 1], PROMPTS[i]) for i in (0, 2)]
    return [TrainingSample(*each) for each in zip(trajectories, PROMPTS, ADVANTAGES, strict=True)]


def config(algorithm: str = "dpo", **changes: Any) -> TrainingConfig:
    settings = {"examples_per_update": 1, "micro_batch": 2, "inner_epochs": 2, "learning_rate": 1e-3}
    return TrainingConfig(algorithm=algorithm, **(settings | SETTINGS[algorithm] | changes))


def trainer_of(model: DiffusionModel, algorithm: str = "dpo", seed: int = 0, **changes: Any) -> Trainer:
    return Trainer(model, examples_of(model, algorithm), config(algorithm, **changes), seed)


def weights(model: DiffusionModel) -> list[torch.Tensor]:
    return [value.detach().clone() for value in lora_parameters(model.unet).values()]


def put(model: DiffusionModel, values: Sequence[torch.Tensor]) -> None:
    """Set the adapter's weights to `values`."""
    for parameter, value in zip(lora_parameters(model.unet).values(), values, strict=True):
        parameter.data = value.clone()


def gradient(model: DiffusionModel) -> torch.Tensor:
    """The gradient of the last update, as one vector."""
    return torch.cat([value.grad.flatten() for value in lora_parameters(model.unet).values()])


def same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def max_difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


class Replayed:
    """All transitions of `trajectories` under the current policy, without the trainer: (4, T) log-probs, and means."""

    def __init__(self, model: DiffusionModel, trajectories: Sequence[Trajectory]) -> None:
        schedule = Schedule.from_scheduler(model.scheduler, 4, 1.0)
        embeds = model.encode_prompts(PROMPTS)
        negative = model.encode_prompts([""])
        self.sigmas = schedule.sigmas
        self.log_probs = torch.cat(
            [
                log_probs(model.unet, model.scheduler, trajectory, embeds[[i]], negative)
                for i, trajectory in enumerate(trajectories)
            ]
        )
        x = torch.cat([trajectory.latents for trajectory in trajectories])
        steps = [torch.full((4,), i) for i in range(4)]
        means = [transition_mean(model.unet, schedule, x[:, i], steps[i], embeds, negative, 5.0) for i in range(4)]
        self.means = torch.stack(means, 1)

    def divergence(self, other: "Replayed") -> torch.Tensor:
        """(4, T): mean over C*h*w of (mu - mu')^2 / (2 sigma^2)."""
        return (self.means - other.means).square().flatten(2).mean(2) / (2 * self.sigmas.square())


def expected_losses(algorithm: str, now: Replayed, old: Replayed, reference: Replayed) -> torch.Tensor:
    """Eq. 6, 8 and 9 written out: (2, T) for pairs, (4, T) for samples. No ratio reaches the clip."""
    log_ratio = now.log_probs - old.log_probs
    if algorithm == "dpo":
        return torch.log1p(torch.exp(-SETTINGS["dpo"]["beta"] * (log_ratio[0::2] - log_ratio[1::2])))
    policy = -torch.tensor(ADVANTAGES)[:, None] * log_ratio.exp()
    if algorithm == "ddpo":
        return policy
    return SETTINGS["dpok"]["policy_weight"] * policy + SETTINGS["dpok"]["kl_weight"] * now.divergence(reference)


def test_first_loss_is_ln_2_and_the_margin_grows(model: DiffusionModel) -> None:
    trainer = trainer_of(model, **ALL_AT_ONCE, inner_epochs=6)
    reports = [trainer.step() for _ in range(trainer.updates_total)]
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert reports[0].ratio_max == pytest.approx(1, abs=1e-5) and reports[0].kl == pytest.approx(0, abs=1e-6)
    assert reports[-1].loss < reports[0].loss and reports[-1].margin > 0 and reports[-1].accuracy > 0.5
    assert [step.step_index for step in reports[0].steps] == [0, 1, 2, 3] and reports[0].grad_norm > 0
    assert reports[-1].kl > 0 and reports[0].clipped is None


def test_the_self_test_reports_steps_without_density(model: DiffusionModel) -> None:
    silent = replace(model, scheduler=sd_scheduler(set_alpha_to_one=True))
    for each, expected in ((silent, (3,)), (model, ())):
        trainer = trainer_of(each)
        trainer.prepare()
        assert trainer.self_test is not None and trainer.self_test.without_noise == expected


def test_after_one_update_the_preferred_side_is_more_likely(model: DiffusionModel) -> None:
    trainer = Trainer(model, examples_of(model)[:1], config(**ALL_AT_ONCE, inner_epochs=2), seed=0)
    assert trainer.step().margin == pytest.approx(0, abs=1e-6)
    assert trainer.step().margin > 1e-4  # a report is of the policy before its update


@pytest.mark.parametrize(("algorithm", "weight"), [("ddpo", 1.0), ("dpok", 2.0)])
def test_first_loss_is_the_mean_advantage_and_good_samples_become_more_likely(
    model: DiffusionModel, algorithm: str, weight: float
) -> None:
    """-alpha * (1 - 1.5 + 0.75 - 0.5) / 4 = alpha / 16; it decreases as better samples become more likely."""
    trainer = trainer_of(model, algorithm, **ALL_AT_ONCE, inner_epochs=5)
    reports = [trainer.step() for _ in range(trainer.updates_total)]
    assert reports[0].loss == pytest.approx(weight / 16, abs=1e-5)
    assert reports[0].ratio_max == pytest.approx(1, abs=1e-5) and reports[0].kl == pytest.approx(0, abs=1e-6)
    assert reports[-1].loss < reports[0].loss and reports[-1].kl > 0
    assert reports[0].margin is None and reports[0].accuracy is None


@pytest.mark.slow
def test_the_divergence_limits_dpok(model: DiffusionModel) -> None:
    before = weights(model)
    last = []
    for kl_weight in (0.0, 1000.0):
        trainer = trainer_of(model, "dpok", **ALL_AT_ONCE, inner_epochs=5, kl_weight=kl_weight)
        last.append([trainer.step().kl for _ in range(5)][-1])
        put(model, before)
    assert 0 < last[1] < last[0] / 2


def test_the_clip_stops_rows_beyond_the_range(model: DiffusionModel) -> None:
    """Transitions whose ratio exceeds 1 + 1e-4 after one update have no gradient; the others have one."""
    samples = [TrainingSample(trajectories_of(model)[0], PROMPTS[0], 1.0)]
    trainer = Trainer(model, samples, config("ddpo", clip_range=1e-4), seed=0)
    first = trainer.step()
    second = trainer.step()
    assert first.clipped == 0 and first.grad_norm > 0
    assert second.clipped == 0.5 and {step.ratio > 1 + 1e-4 for step in second.steps} == {True, False}
    assert all((step.grad_norm == 0) is (step.ratio > 1 + 1e-4) for step in second.steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "most", "per_epoch"),
    [("dpo", 1, [4, 4]), ("dpo", 320, [8]), ("ddpo", 3, [8, 8]), ("ddpo", 320, [16])],
)
def test_rows_and_updates_are_counted(model: DiffusionModel, algorithm: str, most: int, per_epoch: list[int]) -> None:
    """2 pairs or 4 samples of 4 steps; 4 samples, at most 3 per update: 2 and 2, not 3 and 1."""
    seen: list[int] = []
    trainer = trainer_of(model, algorithm, log_gradient_norms=False, examples_per_update=most, micro_batch=3)
    rows = sum(per_epoch)
    assert (len(trainer._rows), trainer.updates_total) == (rows, 2 * len(per_epoch))
    assert [trainer.step(seen.append).rows for _ in range(trainer.updates_total)] == per_epoch * 2
    assert seen[:2] == [3, min(6, per_epoch[0])]
    with pytest.raises(InvalidInputError, match=f"{trainer.updates_total} updates"):
        trainer.step()


def test_every_epoch_uses_each_example_once_in_its_own_order(model: DiffusionModel) -> None:
    """4 samples, one per update: rows 0-3, 4-7, 8-11 and 12-15, in another order for each epoch and seed."""
    trainer = trainer_of(model, "ddpo", inner_epochs=4)
    epochs = [trainer._updates[start : start + 4] for start in range(0, 16, 4)]
    samples = [list(range(first, first + 4)) for first in range(0, 16, 4)]
    assert all(sorted(epoch) == samples for epoch in epochs)
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) > 1
    assert trainer_of(model, "ddpo", seed=1, inner_epochs=4)._updates != trainer._updates


def test_a_fused_pair_is_trained_on_under_the_plain_network(model: DiffusionModel) -> None:
    """The target shares its base's first two transitions, which are skipped; its recorded log-probs are ignored."""
    base, other = trajectories_of(model)[:2]
    latents = torch.cat([base.latents[:, :3], other.latents[:, 3:]], 1)
    target = replace(base, latents=latents, log_probs=base.log_probs + 1)
    pair = TrainingPair(target, base, PROMPTS[0], on_policy=False)
    trainer = Trainer(model, [pair], config(examples_per_update=99), seed=0)
    first = trainer.step()
    report = trainer.self_test

    assert report is not None and (len(trainer._rows), report.compared, report.replayed) == (2, 2, 2)
    assert [step.step_index for step in first.steps] == [2, 3] and first.loss == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(PolicyMismatchError):
        Trainer(model, [replace(pair, on_policy=True)], config(), seed=0).step()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.slow
def test_loss_divergence_and_gradient_are_those_of_the_equations(model: DiffusionModel, algorithm: str) -> None:
    """In the third update, at a distance from the old policy: against the equations in numpy.

    The gradient is compared with finite differences along it. Both need forward passes only.
    """
    trajectories = trajectories_of(model)
    trainer = trainer_of(model, algorithm, examples_per_update=16, inner_epochs=3, max_grad_norm=1e9)
    with torch.no_grad():
        old = Replayed(model, trajectories)
    for _ in range(2):
        trainer.step()
    with torch.no_grad():
        now = Replayed(model, trajectories)
        here = weights(model)
    report = trainer.step()
    actual = gradient(model)

    assert report.loss == pytest.approx(expected_losses(algorithm, now, old, old).mean().item(), abs=2e-6)
    assert report.kl == pytest.approx(now.divergence(old).mean().item(), rel=1e-3) and report.kl > 0
    assert report.ratio_max == pytest.approx((now.log_probs - old.log_probs).abs().max().exp().item(), rel=1e-5)
    assert report.grad_norm == pytest.approx(actual.norm().item(), rel=1e-5)

    width = 1e-2
    sides = []
    for sign in (1, -1):
        shifts = (sign * width * actual / actual.norm()).split([value.numel() for value in here])
        put(model, [value + shift.reshape(value.shape) for value, shift in zip(here, shifts, strict=True)])
        with torch.no_grad():
            losses = expected_losses(algorithm, Replayed(model, trajectories), old, old)
        sides.append(np.mean(losses.double().numpy()))

    assert (sides[0] - sides[1]) / (2 * width) == pytest.approx(report.grad_norm, rel=1e-2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.slow
def test_batches_and_checkpointing_change_nothing(model: DiffusionModel, algorithm: str) -> None:
    """All agree with batch 1 and accumulation, and with autograd on the equations for all rows at once.

    `scale` is the gradient's size before the examples cancel each other. Convolutions of other batch sizes round
    differently, by up to 1e-5 of it. DPOK's divergence is from the base model, so that it has a gradient here.
    """
    from_base = {"kl_reference": "base"} if algorithm == "dpok" else {}
    examples = examples_of(model, algorithm)
    before = weights(model)
    trajectories = trajectories_of(model)
    with torch.no_grad():
        old = Replayed(model, trajectories)
        attach_lora(model.unet, seed=1)  # adds nothing: the base model
        base = Replayed(model, trajectories)
    put(model, before)
    losses = expected_losses(algorithm, Replayed(model, trajectories), old, base)
    parameters = list(lora_parameters(model.unet).values())
    pulls = []
    for own in losses.sum(1) / losses.numel():
        parts = torch.autograd.grad(own, parameters, retain_graph=True)
        pulls.append(torch.cat([part.flatten() for part in parts]))
    expected = sum(pulls)
    scale = sum(pull.norm() for pull in pulls)
    one_by_one = None
    for changes in (
        {"micro_batch": 1, "log_gradient_norms": False},
        {"micro_batch": 1},
        {"micro_batch": 3, "log_gradient_norms": False},
        {"micro_batch": 16},
        {"micro_batch": 5, "gradient_checkpointing": True},
    ):
        put(model, before)
        settings = config(algorithm, examples_per_update=16, max_grad_norm=1e9, **from_base, **changes)
        report = Trainer(model, examples, settings, seed=0).step()
        assert report.loss == pytest.approx(losses.mean().item(), rel=1e-5)
        one_by_one = gradient(model) if one_by_one is None else one_by_one
        assert (gradient(model) - one_by_one).abs().max() < 1e-5 and (
            gradient(model) - one_by_one
        ).norm() < 3e-5 * scale
        assert (gradient(model) - expected).norm() < 1e-4 * scale


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dpo", "dpok"])
def test_gradient_norms_are_reported_by_step(algorithm: str) -> None:
    """Autograd on the rows of each step, in a U-Net with a middle block; together they are the whole gradient."""
    model = trained_model(has_middle=True)
    trajectories = trajectories_of(model)
    trainer = trainer_of(model, algorithm, examples_per_update=16)
    with torch.no_grad():
        old = Replayed(model, trajectories)
    losses = expected_losses(algorithm, Replayed(model, trajectories), old, old)
    parameters = list(lora_parameters(model.unet).values())
    expected = []
    for step in range(4):
        parts = torch.autograd.grad(losses[:, step].sum() / losses.numel(), parameters, retain_graph=True)
        expected.append(torch.cat([part.flatten() for part in parts]))
    report = trainer.step()

    assert [step.grad_norm for step in report.steps] == pytest.approx([e.norm().item() for e in expected], rel=1e-4)
    assert report.grad_norm == pytest.approx(sum(expected).norm().item(), rel=1e-4)
    assert {step.grad_norm for step in trainer_of(model, algorithm, log_gradient_norms=False).step().steps} == {None}


def test_the_divergence_can_be_from_the_base_model(model: DiffusionModel) -> None:
    """With a changed adapter it is positive before the first update; p_old is still the policy that sampled."""
    trainer = trainer_of(model, "dpok", kl_reference="base", examples_per_update=16)
    first = trainer.step()
    assert trainer.self_test is not None and len(trainer.self_test.ratio_by_step) == 4
    assert all(abs(ratio - 1) < 1e-5 for ratio in trainer.self_test.ratio_by_step.values())
    assert first.kl > 1e-4 and first.ratio_max == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resume_is_bit_exact_at_every_update(model: DiffusionModel, algorithm: str, tmp_path: Path) -> None:
    examples = examples_of(model, algorithm)
    # two updates in each of two epochs: of one pair, or of two samples
    settings = config(algorithm, micro_batch=8, examples_per_update=1 if algorithm == "dpo" else 2)
    through = Trainer(model, examples, settings, seed=0)
    states = []
    reports = []
    after = []
    for _ in range(through.updates_total):
        states.append(through.state())
        reports.append(through.step())
        after.append(weights(model))
    for done, state in enumerate(states):
        attach_lora(model.unet, seed=77)
        resumed = Trainer(model, examples, settings, seed=0)
        resumed.load_state(state)
        assert resumed.reports == reports[:done] and resumed.updates_done == done
        assert resumed.step() == reports[done] and resumed.self_test == through.self_test
        assert same(weights(model), after[done])
    through.load_state(states[1])
    through.state().save(tmp_path)
    attach_lora(model.unet, seed=77)
    from_file = Trainer(model, examples, settings, seed=0)
    from_file.load_state(TrainerState.load(tmp_path))

    assert [from_file.step() for _ in reports[1:]] == reports[1:] and same(weights(model), after[-1])


@pytest.mark.slow
def test_a_cancelled_update_changes_nothing(model: DiffusionModel) -> None:
    pairs = [replace(pair, on_policy=False) for pair in examples_of(model)]
    trainer = Trainer(model, pairs, config(), seed=0)
    before = weights(model)

    def cancel(_: int) -> None:
        raise KeyboardInterrupt

    for _ in range(2):  # while log p_old is evaluated, then in the update itself
        with pytest.raises(KeyboardInterrupt):
            trainer.step(cancel)
        assert same(weights(model), before) and trainer.updates_done == 0
        trainer.prepare()
    report = trainer.step()
    put(model, before)
    assert Trainer(model, pairs, config(), seed=0).step() == report


def test_the_network_is_restored(model: DiffusionModel) -> None:
    """Checkpointing is disabled again after an update, also after a cancelled one."""
    trainer = trainer_of(model, gradient_checkpointing=True)

    def cancel(_: int) -> None:
        assert model.unet.is_gradient_checkpointing
        raise KeyboardInterrupt

    trainer.prepare()
    with pytest.raises(KeyboardInterrupt):
        trainer.step(cancel)
    assert not model.unet.is_gradient_checkpointing


def test_states_of_other_trainings_are_rejected(model: DiffusionModel, tmp_path: Path) -> None:
    examples = examples_of(model)
    trainer = Trainer(model, examples, config(), seed=0)

    with pytest.raises(CheckpointError):
        trainer.load_state(TrainerState.load(tmp_path))

    trainer.state().save(tmp_path)
    for other in (
        Trainer(model, examples, config(), seed=1),
        Trainer(model, examples[::-1], config(), seed=0),
        Trainer(model, examples, config(beta=0.2), seed=0),
    ):
        with pytest.raises(CheckpointError, match="expected"):
            other.load_state(TrainerState.load(tmp_path))

    cheaper = Trainer(model, examples, config(micro_batch=1, gradient_checkpointing=True), seed=0)
    cheaper.load_state(TrainerState.load(tmp_path))


@pytest.mark.slow
def test_a_damaged_state_does_not_change_the_trainer(model: DiffusionModel) -> None:
    trainer = trainer_of(model)
    trainer.step()
    state = trainer.state()
    before = weights(model)
    shake(model, 0.1)
    moved = weights(model)
    for name in state.tensors:
        rest = {key: value for key, value in state.tensors.items() if key != name}
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            trainer.load_state(TrainerState(rest, state.about))
    with pytest.raises(CheckpointError, match="self-test"):
        trainer.load_state(TrainerState(state.tensors, {**state.about, "self_test": {}}))
    saved_reports = state.about["reports"]

    for reports in (None, "1", [None], [{}], [{"steps": 1}], saved_reports * 99, saved_reports * 2):  # type: ignore[operator]
        with pytest.raises(CheckpointError, match="reports"):
            trainer.load_state(TrainerState(state.tensors, {**state.about, "reports": reports}))
    assert same(weights(model), moved) and trainer.updates_done == 1

    trainer.load_state(state)
    assert same(weights(model), before)


def test_a_loss_that_is_not_finite_is_named(model: DiffusionModel) -> None:
    trainer = trainer_of(model)
    trainer.step()
    before = weights(model)
    lora_parameters(model.unet).popitem()[1].data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"loss became nan in update 2 at step_index \d"):
        trainer.step()
    assert same(weights(model)[:-1], before[:-1]) and trainer.updates_done == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_self_test_compares_every_transition(model: DiffusionModel, algorithm: str) -> None:
    trainer = trainer_of(model, algorithm, examples_per_update=16)
    trainer.step()
    report = trainer.self_test
    assert report is not None and (report.compared, report.replayed, report.tolerance) == (16, 0, 1e-3)
    assert sorted(report.ratio_by_step) == [0, 1, 2, 3]
    assert all(abs(ratio - 1) < 1e-5 for ratio in report.ratio_by_step.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_policy_than_the_sampling_one_is_rejected(model: DiffusionModel, algorithm: str) -> None:
    examples = examples_of(model, algorithm)
    shake(model, 0.2)
    before = weights(model)
    with pytest.raises(PolicyMismatchError, match=r"recorded.*within 0\.001 at step_index \d"):
        Trainer(model, examples, config(algorithm), seed=0).step()
    assert same(weights(model), before)
    Trainer(model, examples, config(algorithm, ratio_tolerance=1e3), seed=0).step()


@pytest.mark.parametrize("weight", [{"beta": 1e-3}, {"beta": 1e4}, {"algorithm": "dpok", "policy_weight": 1e4}])
@pytest.mark.slow
def test_gradients_neither_vanish_nor_overflow_in_float16(weight: dict[str, Any]) -> None:
    """Against the same weights in float32. Without scaling, the first is off by 0.4 and the others are infinite."""
    examples = None
    gradients = []
    for dtype in (torch.float16, torch.float32):
        model = tiny_model()
        model.unet.half().to(dtype)
        attach_lora(model.unet, seed=1)
        shake(model, 0.05)
        examples = examples or examples_of(model, weight.get("algorithm", "dpo"))
        Trainer(model, examples, TrainingConfig(ratio_tolerance=1e3, **weight, **ALL_AT_ONCE), seed=0).step()
        gradients.append(gradient(model))

    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("float16", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.slow
def test_the_ratios_tolerance_depends_on_the_precision(model: DiffusionModel, dtype: str, tolerance: float) -> None:
    model.unet.to(getattr(torch, dtype))
    attach_lora(model.unet, seed=1)
    originals = examples_of(model, "ddpo")

    def recorded_off_by(ratio: float) -> Trainer:
        shifted = [
            replace(original.trajectory, log_probs=original.trajectory.log_probs - math.log(ratio))
            for original in originals
        ]
        examples = [
            replace(original, trajectory=trajectory) for original, trajectory in zip(originals, shifted, strict=True)
        ]
        return Trainer(model, examples, config("ddpo"), seed=0)

    trainer = recorded_off_by(1 + tolerance * 2)
    with pytest.raises(PolicyMismatchError):
        trainer.step()
    accepted = recorded_off_by(1 + tolerance / 2)
    accepted.step()
    assert accepted.self_test is not None and accepted.self_test.tolerance == tolerance


@pytest.mark.parametrize(
    ("algorithm", "on_policy", "changes", "extra"),
    [
        ("dpo", True, {}, 0),
        ("dpo", False, {}, 1),  # the preferred side of the second update
        ("ddpo", True, {}, 0),
        ("dpok", True, {}, 3),  # the means of the last three updates of the epoch
        ("dpo", True, {"credit": "mask"}, 1),
        ("dpo", True, {"lora": LoraConfig(dropout=0.5)}, 1),  # for the self-test
    ],
)
def test_p_old_is_evaluated_only_where_it_is_needed(
    model: DiffusionModel, algorithm: str, on_policy: bool, changes: dict[str, Any], extra: int
) -> None:
    """One U-Net call an update, one example an update, 2 epochs; `extra` calls of 4 transitions, or of 8 of pairs."""
    calls: list[int] = []
    examples = [replace(each, on_policy=on_policy) for each in examples_of(model, algorithm)]
    settings = config(algorithm, **changes, micro_batch=4, log_gradient_norms=False)
    trainer = Trainer(model, examples, settings, seed=0)
    hook = model.unet.register_forward_hook(lambda *_: calls.append(1))
    prepared = trainer.rows_to_prepare
    trainer.prepare()
    assert len(calls) == extra and (prepared > 0) == (extra > 0) and trainer.rows_to_prepare == 0

    reports = [trainer.step() for _ in range(trainer.updates_total)]
    hook.remove()
    assert len(calls) == extra + trainer.updates_total
    assert reports[0].ratio_max == pytest.approx(1, abs=1e-5) or "lora" in changes


def test_later_updates_use_recorded_log_probs(model: DiffusionModel) -> None:
    """The second update's example is not in the first one. Its records are off by less than the tolerance."""
    trainer = trainer_of(model, inner_epochs=1)
    later = trainer._rows[trainer._updates[1][0]].example
    off = 5e-4
    examples = examples_of(model)
    pair = examples[later]
    assert isinstance(pair, TrainingPair)
    before = weights(model)
    shifted = [*examples]
    shifted[later] = replace(pair, rejected=replace(pair.rejected, log_probs=pair.rejected.log_probs - off))
    reports = []
    for each in (examples, shifted):
        put(model, before)
        trainer = Trainer(model, each, config(inner_epochs=1), seed=0)
        trainer.step()
        reports.append(trainer.step())

    assert reports[1].log_ratio_rejected - reports[0].log_ratio_rejected == pytest.approx(off, rel=1e-2)
    assert reports[1].log_ratio_preferred == reports[0].log_ratio_preferred
    assert reports[0].kl is None
    log_probs = torch.full_like(pair.rejected.log_probs, math.nan)
    shifted[later] = replace(pair, rejected=replace(pair.rejected, log_probs=log_probs))
    with pytest.raises(NonFiniteError, match=rf"examples\[{later}\] at step_index 0"):
        Trainer(model, shifted, config(inner_epochs=1), seed=0).step()


def test_steps_can_be_left_out(model: DiffusionModel) -> None:
    half = trainer_of(model, timestep_fraction=0.5, inner_epochs=1, examples_per_update=8)
    assert (len(half._rows), half.rows_by_update) == (4, (4,))  # 2 pairs, 2 of 4 steps
    epochs = trainer_of(model, timestep_fraction=0.5, inner_epochs=9, examples_per_update=8)
    assert (len(epochs._rows), epochs.rows_by_update) == (8, (4,) * 9)  # other steps each epoch: all 8 rows
    report = trainer_of(model, skip_dominant_step=True, examples_per_update=8).step()
    assert [step.step_index for step in report.steps] == [0, 1, 3]


@pytest.mark.slow
def test_sdxl_is_conditioned_as_it_was_sampled() -> None:
    """Two text encoders, pooled embeddings and time ids reach the U-Net: otherwise the ratio would not be 1."""
    model = tiny_xl_model()
    attach_lora(model.unet, seed=1)
    shake(model, 0.05)
    trainer = trainer_of(model, examples_per_update=8)
    assert trainer.step().loss == pytest.approx(math.log(2), abs=1e-5)
    assert trainer.self_test is not None and trainer.self_test.compared == 16
    assert all(abs(ratio - 1) < 1e-5 for ratio in trainer.self_test.ratio_by_step.values())


def test_the_papers_defaults_make_two_updates_a_round(model: DiffusionModel) -> None:
    """Table 3: 640 images are 320 pairs, one update in each of two inner epochs; 321 pairs need two.

    As samples of DDPO they are 640 examples, two updates in each.
    """
    pair = examples_of(model)[0]
    assert Trainer(model, [pair] * 320, TrainingConfig(), seed=0).updates_total == 2
    more = Trainer(model, [pair] * 321, TrainingConfig(), seed=0)
    assert [len(update) for update in more._updates] == [160 * 4, 161 * 4] * 2
    samples = examples_of(model, "ddpo")[:1] * 640
    assert Trainer(model, samples, TrainingConfig(algorithm="ddpo"), seed=0).updates_total == 4


@pytest.mark.slow
def test_rounds_with_a_carried_optimizer_are_one_loop_with_one_adamw(model: DiffusionModel, tmp_path: Path) -> None:
    """Three rounds, each on samples of the model after the previous one; moments are saved and loaded.

    The epsilon limits the step of elements near 0, whose sign is due to rounding.
    """
    settings = config(**ALL_AT_ONCE, learning_rate=1e-4, adam_epsilon=1e-3)
    start = weights(model)
    optimizer = None
    scale = 0.0
    for number in range(3):
        trainer = Trainer(model, examples_of(model), settings, number, optimizer)
        for _ in range(trainer.updates_total):
            trainer.step()
        save_optimizer(trainer.optimizer_state(), tmp_path / "optimizer.safetensors")
        optimizer = load_optimizer(tmp_path / "optimizer.safetensors")
        scale = trainer.gradient_scale
    carried = weights(model)

    assert optimizer is not None and optimizer.updates == 6

    put(model, start)
    loop = DpoLoop(model, settings, scale)
    for _ in range(3):
        loop.round([pair for pair in examples_of(model) if isinstance(pair, TrainingPair)])

    assert max_difference(carried, weights(model)) < 1e-6
    assert max_difference(carried, start) > 1e-4  # six steps of about the learning rate


@pytest.mark.slow
def test_a_fresh_optimizer_forgets(model: DiffusionModel) -> None:
    start = weights(model)
    first = trainer_of(model, **ALL_AT_ONCE)
    first.step()
    moments = first.optimizer_state()
    results = []
    for settings in ({}, {"optimizer_start": "fresh"}):
        put(model, start)
        trainer = Trainer(model, first.examples, config(**ALL_AT_ONCE, **settings), 0, moments)
        trainer.step()
        results.append((weights(model), trainer.optimizer_state().updates))
    put(model, start)
    trainer_of(model, **ALL_AT_ONCE).step()

    assert (results[0][1], results[1][1]) == (2, 1)
    assert same(results[1][0], weights(model)) and not same(results[0][0], weights(model))


@pytest.mark.slow
def test_resume_is_bit_exact_with_carried_moments(model: DiffusionModel) -> None:
    """Also before the first update: the state then has the moments that the training started with."""
    first = trainer_of(model, **ALL_AT_ONCE)
    first.step()
    moments = first.optimizer_state()
    examples = examples_of(model)
    settings = config()
    through = Trainer(model, examples, settings, 0, moments)
    states = []
    after = []
    for _ in range(2):
        states.append(through.state())
        through.step()
        after.append(weights(model))
    for state, expected in zip(states, after, strict=True):
        attach_lora(model.unet, seed=77)
        resumed = Trainer(model, examples, settings, seed=0)
        resumed.load_state(state)
        resumed.step()
        assert same(weights(model), expected)


def test_moments_of_another_adapter_are_rejected(model: DiffusionModel) -> None:
    first = trainer_of(model, **ALL_AT_ONCE)
    first.step()
    moments = first.optimizer_state()
    attach_lora(model.unet, LoraConfig(rank=2), seed=1)
    with pytest.raises(InvalidInputError, match="optimizer state"):
        Trainer(model, first.examples, config(ratio_tolerance=1e3), 0, moments)


@pytest.mark.slow
def test_beta_does_not_scale_the_step(model: DiffusionModel) -> None:
    """At margin 0 the gradient of Eq. 6 is beta times the same vector, and AdamW's step does not depend on its length.

    It depends on epsilon only, 1e-8, and hardly any element may be below it.
    """
    start = weights(model)
    moved = []
    for beta in (1e-3, 0.1, 10.0):
        put(model, start)
        report = trainer_of(model, **ALL_AT_ONCE, beta=beta, max_grad_norm=1e9).step()
        assert report.below_epsilon < 1e-2
        moved.append([after - before for after, before in zip(weights(model), start, strict=True)])
    for other in (moved[0], moved[2]):
        assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(moved[1], other, strict=True))


def test_the_share_below_epsilon_is_counted(model: DiffusionModel) -> None:
    """An epsilon at the median of the gradient's absolute values, at AdamW's scale."""
    before = weights(model)
    trainer = trainer_of(model, **ALL_AT_ONCE)
    trainer.step()
    sizes = gradient(model).abs()
    median = float(sizes[sizes > 0].median()) * trainer.gradient_scale
    put(model, before)
    share = trainer_of(model, **ALL_AT_ONCE, adam_epsilon=median).step().below_epsilon
    assert share == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
def test_sides_are_reported_separately(model: DiffusionModel) -> None:
    trajectories = trajectories_of(model)
    trainer = trainer_of(model, **ALL_AT_ONCE)
    with torch.no_grad():
        old = Replayed(model, trajectories)
    trainer.step()
    with torch.no_grad():
        log_ratios = Replayed(model, trajectories).log_probs - old.log_probs
    report = trainer.step()

    assert report.log_ratio_preferred == pytest.approx(log_ratios[0::2].mean().item(), abs=1e-6)
    assert report.log_ratio_rejected == pytest.approx(log_ratios[1::2].mean().item(), abs=1e-6)


@pytest.mark.slow
def test_masked_credit_uses_the_elements_inside_the_mask(model: DiffusionModel) -> None:
    """Eq. 6 on log-probs that are means over the masked elements: the upper left quarter, and half of the right one.

    The self-test still compares all elements, as recorded.
    """
    trajectories = trajectories_of(model)
    mask = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    pairs = [replace(pair, mask=mask) for pair in examples_of(model)]
    trainer = Trainer(model, pairs, config(**ALL_AT_ONCE, credit="mask"), seed=0)

    def masked(replayed: Replayed) -> torch.Tensor:
        x_prev = torch.cat([trajectory.latents for trajectory in trajectories])[:, 1:]
        sigmas = replayed.sigmas.reshape(1, 4, 1, 1, 1)
        densities = -((x_prev - replayed.means) ** 2) / (2 * sigmas**2) - sigmas.log() - 0.5 * math.log(2 * math.pi)
        half = densities.shape[-1] // 2
        upper = densities[..., :half, :]
        return (upper[..., :half].mean((2, 3, 4)) + 0.5 * upper[..., half:].mean((2, 3, 4))) / 1.5

    with torch.no_grad():
        old = masked(Replayed(model, trajectories))
    assert trainer.step().loss == pytest.approx(math.log(2), abs=1e-5)
    assert trainer.self_test is not None and trainer.self_test.compared == 16
    with torch.no_grad():
        log_ratios = masked(Replayed(model, trajectories)) - old
    margins = SETTINGS["dpo"]["beta"] * (log_ratios[0::2] - log_ratios[1::2])
    report = trainer.step()
    assert report.margin == pytest.approx(margins.mean().item(), rel=1e-4)
    assert report.loss == pytest.approx(torch.log1p((-margins).exp()).mean().item(), abs=2e-6)


@pytest.mark.parametrize("credit", ["all", "mask"])
@pytest.mark.slow
def test_the_safeguard_uses_the_credited_elements(model: DiffusionModel, credit: str) -> None:
    """The first gradient of Eq. 6, beta / 2 of each side's, with the rejected side's times
    min(1, (1 - mu) |g_w|^2 / (g_w . g_l)), where g is the gradient of -log p by what the network predicts. As a target
    has its base's, the preferred side has part of the rejected side's noise: without, the two are nearly orthogonal."""
    trajectories = trajectories_of(model)
    for place in (0, 2):
        mixed = 0.8 * trajectories[place].latents + 0.6 * trajectories[place + 1].latents
        trajectories[place] = replace(trajectories[place], latents=mixed)
    mask = torch.tensor([[1.0, 0.25], [0.0, 0.0]])
    counts = mask.repeat_interleave(4, 0).repeat_interleave(4, 1) if credit == "mask" else torch.ones(8, 8)
    now = Replayed(model, trajectories)
    residuals = now.means - torch.cat([trajectory.latents for trajectory in trajectories])[:, 1:]
    log_probs = -(counts * (residuals / now.sigmas.reshape(4, 1, 1, 1)) ** 2).mean((2, 3, 4)) / counts.mean() / 2

    pulls = (counts * residuals).detach().flatten(2)
    common = (pulls[0::2] * pulls[1::2]).sum(2)
    bound = 0.1 * pulls[0::2].square().sum(2) / common
    share = torch.where((common > 0) & (bound < 1), bound, 1.0)
    assert share.min() < 0.5
    expected_loss = -SETTINGS["dpo"]["beta"] / 2 * (log_probs[0::2] - share * log_probs[1::2]).mean()
    parameters = list(lora_parameters(model.unet).values())
    expected = torch.cat([value.flatten() for value in torch.autograd.grad(expected_loss, parameters)])

    pairs = [TrainingPair(trajectories[i], trajectories[i + 1], PROMPTS[i], on_policy=False, mask=mask) for i in (0, 2)]
    settings = config(**ALL_AT_ONCE, max_grad_norm=1e9, safeguard=0.9, credit=credit)
    Trainer(model, pairs, settings, seed=0).step()
    assert (gradient(model) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.slow
def test_without_a_mask_all_elements_count(model: DiffusionModel) -> None:
    """A reference in place of a target, or an empty mask."""
    before = weights(model)
    results = []
    pairs = examples_of(model)
    for examples, credit in (
        (pairs, "all"),
        (pairs, "mask"),
        ([replace(p, mask=torch.zeros(2, 2)) for p in pairs], "mask"),
    ):
        put(model, before)
        trainer = Trainer(model, examples, config(**ALL_AT_ONCE, credit=credit), seed=0)
        trainer.step()
        results.append(weights(model))

    for other in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results[0], other, strict=True))


def test_invalid_trainings_are_rejected(model: DiffusionModel) -> None:
    examples = examples_of(model)
    with pytest.raises(InvalidInputError, match="at least one"):
        Trainer(model, [], config(), seed=0)
    with pytest.raises(InvalidInputError, match="LoRA"):
        Trainer(tiny_model(), examples, config(), seed=0)
    with pytest.raises(InvalidInputError, match="ddpo learns from TrainingSample"):
        Trainer(model, examples, config("ddpo"), seed=0)
