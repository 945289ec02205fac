"""The additional processes of a training: their errors, and their end."""

import json
import os
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dfusion.errors import RankLostError
from service.errors import RankFailedError
from tests.forking import Forked
from worker import rank as rank_program
from worker import training_ranks
from worker.runner import failure_of
from worker.training_ranks import JOB_FILE, TrainingRanks


def run_rank(folder: str) -> None:
    """Run `python -m worker.rank FOLDER 1` with the named pipe `stdin` of the folder as its standard input."""
    os.dup2(os.open(f"{folder}/stdin", os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = ["rank", folder, "1"]
    runpy.run_module("worker.rank", run_name="__main__", alter_sys=True)


def fail_for_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run rank 1 of `folder`, whose GPU is too small for the model."""

    def fail(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("tried to allocate 2 GiB")

    folder.mkdir(exist_ok=True)
    (folder / JOB_FILE).write_text(json.dumps({"devices": ["cuda:1"], "threads": 1}), "utf-8")
    monkeypatch.setattr(rank_program, "_end_with_parent", lambda: None)
    monkeypatch.setattr(rank_program, "set_up_torch_on", fail)
    monkeypatch.setattr(sys, "argv", ["rank", str(folder), "1"])
    with pytest.raises(SystemExit):
        rank_program.main()


@pytest.fixture
def ranks(tmp_path: Path) -> TrainingRanks:
    settings = SimpleNamespace(training_devices=("cuda:1",), stuck_seconds=60)
    context: Any = SimpleNamespace(bench=SimpleNamespace(settings=settings), scratch=tmp_path)
    return TrainingRanks(context, "tiny")


def test_a_rank_ends_with_its_worker(tmp_path: Path) -> None:
    """It waits for its job, a named pipe that has no writer, until its standard input closes."""
    for name in ("stdin", JOB_FILE):
        os.mkfifo(tmp_path / name)
    process = Forked(run_rank, str(tmp_path))
    try:
        with (tmp_path / "stdin").open("wb"):  # when the rank has opened it, too
            assert process.poll() is None
        assert process.wait(60) == 1
    finally:
        process.kill()


def test_the_error_of_a_rank_is_that_of_the_stage(
    tmp_path: Path, ranks: TrainingRanks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ranks.require_alive()
    fail_for_memory(tmp_path / "ranks", monkeypatch)
    with pytest.raises(RankFailedError) as raised:
        ranks.require_alive()
    failure = failure_of(raised.value)
    assert (failure.code, failure.retryable) == ("out_of_memory", False)
    assert failure.message.startswith("rank 1 of the training, on cuda:1: out of GPU memory: lower ")
    assert "tried to allocate 2 GiB" in caplog.text and "Traceback" in caplog.text


@pytest.mark.parametrize(("fails", "expected"), [(True, RankFailedError), (False, RankLostError)])
def test_an_interrupted_exchange_has_the_cause_that_the_rank_reports(
    tmp_path: Path, ranks: TrainingRanks, monkeypatch: pytest.MonkeyPatch, fails: bool, expected: type[Exception]
) -> None:
    process = SimpleNamespace(kill=lambda: None, wait=lambda _: None, stdin=None)
    monkeypatch.setattr("worker.training_ranks.subprocess.Popen", lambda *_, **__: process)
    monkeypatch.setattr(training_ranks, "process_group", lambda *_: nullcontext())
    for name in ("_write_job", "_wait_until_ready"):
        monkeypatch.setattr(ranks, name, lambda *_: None)

    model: Any = None
    with pytest.raises(expected), ranks.running(model, model):
        if fails:
            fail_for_memory(tmp_path / "ranks", monkeypatch)
        raise RankLostError("expected 2 ranks")
