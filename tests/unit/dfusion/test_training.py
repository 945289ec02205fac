import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dfusion.adapter import attach_lora, lora_parameters
from dfusion.config import SamplingConfig, TrainingConfig
from dfusion.errors import CheckpointError, InvalidInputError, NonFiniteError
from dfusion.models import DiffusionModel
from dfusion.policy import log_probs
from dfusion.sampling import sample
from dfusion.training import DpoTrainer, TrainingPair
from tests.nets import tiny_model

PROMPTS = ("a red circle", "a blue square")
FOUR = SamplingConfig(num_steps=4)


@pytest.fixture
def model() -> DiffusionModel:
    made = tiny_model()
    attach_lora(made.unet, seed=1)
    return made


def pairs_of(model: DiffusionModel, first_step: int = 0) -> list[TrainingPair]:
    embeds = model.encode_prompts([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]])
    made = sample(model.unet, model.scheduler, embeds, model.encode_prompts([""]), [1, 2, 3, 4], config=FOUR)
    return [
        TrainingPair(made.select([2 * i]), made.select([2 * i + 1]), prompt, first_step)
        for i, prompt in enumerate(PROMPTS)
    ]


def config(**changes: object) -> TrainingConfig:
    settings = {"rows_per_update": 3, "micro_batch": 2, "inner_epochs": 2, "learning_rate": 1e-3, "beta": 5.0}
    return TrainingConfig(**(settings | changes))


def weights(model: DiffusionModel) -> list[torch.Tensor]:
    return [value.detach().clone() for value in lora_parameters(model.unet).values()]


def same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_first_loss_is_ln_2_and_the_margin_grows(model: DiffusionModel) -> None:
    trainer = DpoTrainer(model, pairs_of(model), config(rows_per_update=8, inner_epochs=12), seed=0)
    reports = [trainer.step() for _ in range(trainer.updates_total)]
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert reports[0].ratio_max == pytest.approx(1, abs=1e-5)
    assert reports[-1].loss < reports[0].loss and reports[-1].margin > 0 and reports[-1].accuracy > 0.5
    assert sorted(reports[0].loss_by_step) == [0, 1, 2, 3] and reports[0].grad_norm > 0


def test_rows_and_updates_are_counted(model: DiffusionModel) -> None:
    """2 pairs x 4 steps = 8 rows, 3 an update: 3, 3 and the last 2, in each of 2 inner epochs."""
    trainer, seen = DpoTrainer(model, pairs_of(model), config(), seed=0), []
    trainer.cache_reference()
    assert (trainer.rows_total, trainer.updates_total) == (8, 6)
    assert [trainer.step(seen.append).rows for _ in range(6)] == [3, 3, 2, 3, 3, 2]
    assert seen[:5] == [2, 3, 2, 3, 2]
    with pytest.raises(InvalidInputError, match="6 updates"):
        trainer.step()


def test_every_epoch_takes_each_row_once_in_its_own_order(model: DiffusionModel) -> None:
    trainer = DpoTrainer(model, pairs_of(model), config(), seed=0)
    epochs = [[n for u in range(3 * e, 3 * e + 3) for n in trainer._rows_of_update(u)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(8)) and epochs[0] != epochs[1]
    other = DpoTrainer(model, pairs_of(model), config(), seed=1)
    assert other._rows_of_update(0) != trainer._rows_of_update(0)


def test_shared_steps_are_skipped(model: DiffusionModel) -> None:
    trainer = DpoTrainer(model, pairs_of(model, first_step=2), config(rows_per_update=99), seed=0)
    assert trainer.rows_total == 4
    assert sorted(trainer.step().loss_by_step) == [2, 3]


def test_the_gradient_is_the_mean_over_rows_whatever_the_micro_batch(model: DiffusionModel) -> None:
    """Against autograd on Eq. 6 written out for all rows at once."""
    pairs = pairs_of(model)
    negative, parameters = model.encode_prompts([""]), list(lora_parameters(model.unet).values())
    terms = []
    for pair in pairs:
        embeds = model.encode_prompts([pair.prompt])
        w, loser = (
            log_probs(model.unet, model.scheduler, side, embeds, negative) for side in (pair.preferred, pair.rejected)
        )
        terms.append(-torch.log(torch.sigmoid(5.0 * ((w - w.detach()) - (loser - loser.detach())))))
    expected = torch.autograd.grad(torch.cat(terms).mean(), parameters)
    norm = torch.cat([g.flatten() for g in expected]).norm().item()
    for micro_batch in (3, 8):
        attach_lora(model.unet, seed=1)
        trainer = DpoTrainer(
            model, pairs, config(rows_per_update=8, micro_batch=micro_batch, max_grad_norm=1e9), seed=0
        )
        assert trainer.step().grad_norm == pytest.approx(norm, rel=1e-3)
        for parameter, gradient in zip(lora_parameters(model.unet).values(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * norm)


def test_resume_is_bit_exact(model: DiffusionModel, tmp_path: Path) -> None:
    pairs = pairs_of(model)
    through = DpoTrainer(model, pairs, config(), seed=0)
    reports = [through.step() for _ in range(2)]
    through.save(tmp_path)
    reports += [through.step() for _ in range(4)]
    expected = weights(model)
    attach_lora(model.unet, seed=77)
    resumed = DpoTrainer(model, pairs, config(), seed=0)
    resumed.load(tmp_path)
    assert resumed.updates_done == 2
    assert [resumed.step() for _ in range(4)] == reports[2:]
    assert same(weights(model), expected)


def test_a_cancelled_update_changes_nothing(model: DiffusionModel) -> None:
    trainer = DpoTrainer(model, pairs_of(model), config(), seed=0)
    trainer.cache_reference()
    before = weights(model)

    def cancel(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.step(cancel)
    assert same(weights(model), before) and trainer.updates_done == 0
    report = trainer.step()
    attach_lora(model.unet, seed=1)
    assert DpoTrainer(model, trainer.pairs, config(), seed=0).step() == report


def test_states_of_something_else_are_refused(model: DiffusionModel, tmp_path: Path) -> None:
    pairs = pairs_of(model)
    trainer = DpoTrainer(model, pairs, config(), seed=0)
    with pytest.raises(CheckpointError):
        trainer.load(tmp_path)
    trainer.save(tmp_path)
    for other in (
        DpoTrainer(model, pairs, config(), seed=1),
        DpoTrainer(model, pairs[::-1], config(), seed=0),
        DpoTrainer(model, pairs, config(beta=0.2), seed=0),
    ):
        with pytest.raises(CheckpointError, match="expected"):
            other.load(tmp_path)
    DpoTrainer(model, pairs, config(micro_batch=1), seed=0).load(tmp_path)


def test_a_loss_that_is_not_finite_is_named(model: DiffusionModel) -> None:
    trainer = DpoTrainer(model, pairs_of(model), config(), seed=0)
    trainer.step()
    before = weights(model)
    lora_parameters(model.unet).popitem()[1].data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"update 2 at step_index \d"):
        trainer.step()
    assert same(weights(model)[:-1], before[:-1])


def test_what_cannot_be_trained(model: DiffusionModel) -> None:
    pairs = pairs_of(model)
    with pytest.raises(InvalidInputError, match="at least one"):
        DpoTrainer(model, [], config(), seed=0)
    with pytest.raises(InvalidInputError, match="LoRA"):
        DpoTrainer(tiny_model(), pairs, config(), seed=0)
    with pytest.raises(InvalidInputError, match="first_step"):
        TrainingPair(pairs[0].preferred, pairs[0].rejected, "a", 4)
