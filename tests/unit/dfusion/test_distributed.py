"""Training by two processes over gloo. Each trains its own copy of a model on the same examples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from dfusion import training
from dfusion.adapter import lora_parameters
from dfusion.config import TrainingConfig
from dfusion.distributed import SINGLE_PROCESS, Ranks, process_group
from dfusion.errors import InvalidInputError, RankLostError
from dfusion.shared_examples import load_shared_examples, share_examples
from dfusion.spool import TrajectorySpool
from dfusion.training import Trainer
from dfusion.training_data import Example, Row, TrainingPair, digest
from dfusion.training_report import UpdateReport
from tests.forking import Forked
from tests.unit.dfusion.test_training import config, examples_of, max_difference, trained_model, weights

SETTINGS: dict[str, Any] = {"examples_per_update": 2, "adam_epsilon": 1e-3, "micro_batch": 2}
"""Several updates. The epsilon limits the step of elements near 0, whose sign is due to rounding."""

ONE_ROW: dict[str, Any] = {
    "examples_per_update": 1,
    "inner_epochs": 1,
    "timestep_fraction": 0.25,
    "kl_reference": "base",
    "adam_epsilon": 1e-3,
}
"""Updates of one step of one example, so that one of two ranks has no row."""


def trained_as(
    ranks: Ranks, model: Any, examples: list[Example], settings: TrainingConfig, last: int
) -> list[UpdateReport]:
    """Train, and end this process in the middle of update `last`, unless it is 0.

    All ranks must recompute activations, since rank 1 has to.
    """
    trainer = Trainer(model, examples, settings, 0, None, None, ranks)
    checkpointed: list[bool] = []

    def end(_done: int) -> None:
        checkpointed.append(model.unet.is_gradient_checkpointing)
        if trainer.updates_done == last - 1:
            os._exit(9)

    reports = [trainer.step(end) for _ in range(trainer.updates_total)]
    assert any(checkpointed) is (ranks.size > 1)
    return reports


def refused(ranks: Ranks, model: Any) -> None:
    """Expect that a training refuses the adapter, which another rank does not have."""
    trainer = Trainer(model, examples_for(model, "dpo"), config("dpo", **SETTINGS), 0, None, None, ranks)
    different = r"expected the same adapter on all ranks, got a different one on ranks \[1\] than on rank 0"
    with pytest.raises(InvalidInputError, match=different):
        trainer.prepare()


def examples_for(model: Any, algorithm: str) -> list[Example]:
    """Half of the trajectories are not on-policy, so that some log-probs are evaluated before the updates."""
    return [replace(example, on_policy=False) for example in examples_of(model, algorithm)]


def second_rank(folder: str, last: int) -> None:
    """Take part in the trainings below as rank 1, and end in the middle of update `last` of the last one."""
    torch.set_num_threads(1)
    training.must_checkpoint = lambda *_: True
    ranks = Ranks(1, 2)
    with process_group(Path(folder, "group"), 1, 2, 60):
        negated = trained_model()
        for weight in lora_parameters(negated.unet).values():
            weight.data.neg_()
        refused(ranks, negated)
        for algorithm, settings, ends_in in (("dpo", SETTINGS, 0), ("dpok", ONE_ROW, 0), ("dpok", SETTINGS, last)):
            model = trained_model()
            trained_as(ranks, model, examples_for(model, algorithm), config(algorithm, **settings), ends_in)


@pytest.mark.slow
def test_two_ranks_train_the_adapter_of_one_and_notice_a_killed_one(tmp_path: Path) -> None:
    """Two trainings to their end. Of the third, rank 1 ends in the second update; this process resumes it alone."""
    waits: list[bool] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        waits.append(True)
        yield

    process = Forked(second_rank, str(tmp_path), 2)
    with process_group(tmp_path / "group", 0, 2, 60):
        joined = Ranks.from_default_group()
        assert (joined.rank, joined.size) == (0, 2)
        ranks = Ranks(0, 2, waiting)
        refused(ranks, trained_model())
        assert waits

        # 1. to the end: dpo, and updates with fewer rows than ranks
        for algorithm, changes in (("dpo", SETTINGS), ("dpok", ONE_ROW)):
            together, alone = trained_model(), trained_model()
            examples = examples_for(alone, algorithm)
            settings = config(algorithm, **changes)
            reports = trained_as(ranks, together, examples, settings, 0)
            expected = trained_as(SINGLE_PROCESS, alone, examples, settings, 0)
            assert max_difference(weights(together), weights(alone)) < 1e-5
            for report, other in zip(reports, expected, strict=True):
                assert (report.rows, report.update, len(report.steps)) == (other.rows, other.update, len(other.steps))
                assert report.loss == pytest.approx(other.loss, abs=1e-6)
                assert report.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-8)
                assert report.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
                norms = [[step.grad_norm for step in steps] for steps in (report.steps, other.steps)]
                assert norms[0] == pytest.approx(norms[1], rel=1e-3)
        assert {report.rows for report in reports} == {1}

        # 2. dpok, until rank 1 ends
        together, alone = trained_model(), trained_model()
        examples = examples_for(alone, "dpok")
        settings = config("dpok", **SETTINGS)
        trainer = Trainer(together, examples, settings, 0, None, None, ranks)
        first = trainer.step()
        before = weights(together)
        with pytest.raises(RankLostError, match="2 ranks"):
            trainer.step()
        assert trainer.updates_done == 1 and max_difference(weights(together), before) == 0

    # 3. the rest, by this process alone
    assert process.wait(60) == 9
    resumed = Trainer(together, examples, settings, 0)
    resumed.load_state(trainer.state())
    reports = [first, *(resumed.step() for _ in range(resumed.updates_total - 1))]
    expected = trained_as(SINGLE_PROCESS, alone, examples, settings, 0)
    assert max_difference(weights(together), weights(alone)) < 1e-5
    assert [report.kl for report in reports] == pytest.approx([report.kl for report in expected], rel=1e-3, abs=1e-8)


def test_a_process_group_of_one_host_listens_on_the_loopback_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo reads the interface when the group is created."""
    interfaces: list[str | None] = []
    create = distributed.init_process_group

    def recording(*arguments: Any, **options: Any) -> None:
        interfaces.append(os.environ.get("GLOO_SOCKET_IFNAME"))
        create(*arguments, **options)

    monkeypatch.setattr(distributed, "init_process_group", recording)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    with process_group(tmp_path / "group", 0, 1, 60):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert interfaces == ["lo"]


def test_every_row_has_one_rank_and_steps_are_spread() -> None:
    rows = [Row(example, step) for example in range(4) for step in range(20)]
    shares = [[row for row in rows if Ranks(rank, 2).owns(row)] for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == rows
    for share in shares:
        assert [sum(row.step == step for row in share) for step in range(20)] == [2] * 20
        assert [sum(row.example == example for row in share) for example in range(4)] == [10] * 4
    with pytest.raises(InvalidInputError, match="rank: expected 0 to 1, got 2"):
        Ranks(2, 2)


def test_examples_are_shared_by_their_spool(tmp_path: Path) -> None:
    model = trained_model()
    spool = TrajectorySpool(tmp_path)
    [pair, *_] = examples_of(model)
    assert isinstance(pair, TrainingPair)
    with pytest.raises(InvalidInputError, match="in memory"):
        share_examples([pair], tmp_path / "shared")

    preferred, rejected = (spool.add(side, 0) for side in (pair.preferred, pair.rejected))  # type: ignore[arg-type]
    mask = torch.tensor([[1.0, 0.5]])
    pairs = [TrainingPair(preferred, rejected, "a", True, False, mask), TrainingPair(rejected, preferred, "b")]
    [sample, *_] = examples_of(model, "ddpo")
    samples = [replace(sample, trajectory=preferred, on_policy=False)]
    for number, examples in enumerate((pairs, samples)):
        share_examples(examples, tmp_path / f"shared-{number}")
        assert digest(load_shared_examples(tmp_path / f"shared-{number}")) == digest(examples)
