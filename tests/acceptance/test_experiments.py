"""The experiment runner as a process against the embedded service: interrupted experiments resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from api.experiments.format import CellSettings
from tests.deployment import EMBEDDED, PATIENCE_SECONDS, ROOT, Deployment, deployment, until
from tests.forking import Forked, fork
from tests.service import settings_for

EXPERIMENT: dict[str, Any] = {
    "name": "matrix",
    "model": "tiny",
    "common": {
        "samples_per_prompt": 4,
        "sampling": {"num_steps": 6},
        "training": {"examples_per_update": 2, "micro_batch": 4, "inner_epochs": 1},
        "reward": "brightness",
    },
    "prompt_lists": {"own": {"train": ["a red [circle]", "a blue [star]"], "held_out": ["a green [heart]"]}},
    "seeds": [1],
    "arms": {"naive": {"fusion": None}, "fused": {"fusion": {"first_step": 1}}},
    "evaluation": {"samples_per_prompt": 2, "scorers": ["brightness"]},
}
CELLS = 2
RECORDS = {"own--base.json", "own--naive--seed1.json", "own--fused--seed1.json"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "matrix.yaml"
    path.write_text(json.dumps(EXPERIMENT))
    return path


def start(service: Deployment, file: Path, out: Path, *options: str) -> Forked:
    """Start `dfusion experiment run`."""
    command = ["-m", "dfusion", "experiment", "run", str(file), *options, "--out", str(out)]
    environment = service.settings.for_child() | {
        "DFUSION_URL": f"http://127.0.0.1:{service.settings.port}",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    return fork(command, out, environment, out / "runner.log")


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text("utf-8")) for path in (out / "matrix").glob("own--*.json")}


def jobs(service: Deployment, kind: str) -> list[dict[str, Any]]:
    return service.all(f"/jobs?kind={kind}")


def test_a_run_that_is_killed_twice_ends_as_one_that_is_not(file: Path, tmp_path: Path, pipeline: Path) -> None:
    """The runner is killed in its first training and again after some records; in between, a worker is killed."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for folder in (killed, undisturbed):
        folder.mkdir()
    with (
        deployment(EMBEDDED, killed, pipeline) as service,
        deployment(EMBEDDED, undisturbed, pipeline) as other,
    ):
        runner = start(other, file, undisturbed)  # at the same time
        run_with_kills(service, file, killed)
        assert runner.wait(PATIENCE_SECONDS) == 0
        require_one_job_a_cell(service)
        require_one_job_a_cell(other)
    assert records(killed).keys() == RECORDS
    assert {name: findings(record) for name, record in records(killed).items()} == {
        name: findings(record) for name, record in records(undisturbed).items()
    }


def run_with_kills(service: Deployment, file: Path, killed: Path) -> None:
    """Start the runner three times. The first two are killed, the third ends normally."""
    runner = start(service, file, killed)
    until(lambda: [job for job in jobs(service, "round") if job["state"] == "running"])
    kill(runner)
    assert not (killed / "matrix" / "own--naive--seed1.json").exists()

    runner = start(service, file, killed)
    until(lambda: len(jobs(service, "round")) >= 2)
    worker = service.embedded_worker()
    assert worker is not None
    worker.kill()
    until(lambda: len(records(killed)) >= 2)
    kill(runner)
    assert len(records(killed)) < len(RECORDS)

    runner = start(service, file, killed)
    assert runner.wait(PATIENCE_SECONDS) == 0


def require_one_job_a_cell(service: Deployment) -> None:
    """No cell ran twice: one round job per cell, and one more evaluation, of the model before training."""
    rounds, evaluations = jobs(service, "round"), jobs(service, "evaluation")
    assert (len(rounds), len(evaluations)) == (CELLS, CELLS + 1)
    assert {job["state"] for job in (*rounds, *evaluations)} == {"succeeded"}
    assert len({job["label"] for job in rounds}) == CELLS


def kill(runner: subprocess.Popen[bytes] | Forked) -> None:
    assert runner.poll() is None, "it has ended before it could be killed"
    runner.kill()
    assert runner.wait() == -signal.SIGKILL


def findings(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without the ids, times and memory, which differ between runs."""
    without = {name: value for name, value in record.items() if name not in ("jobs", "devices")}
    for part in (*without["rounds"], *without["scores"]):
        del part["model"]
    for part in without["rounds"]:
        training = part["training"]
        for figures in (training["figures"], *training["updates"]):
            for name in ("rows_per_second", "seconds", "peak_bytes"):
                figures.pop(name, None)
    return without


def test_the_service_of_a_killed_runner_ends_and_the_next_continues(file: Path, tmp_path: Path, pipeline: Path) -> None:
    """`make experiments` starts its own service. After SIGKILL of the runner, neither service nor worker remains."""
    content = EXPERIMENT | {"arms": {"naive": {"fusion": None}}}
    file.write_text(json.dumps(content))
    out = tmp_path / "records"
    command = [sys.executable, "-m", "api.experiments", str(file), "--data", str(tmp_path / "data"), "--out", str(out)]
    environment = settings_for(tmp_path / "data", pipeline).for_child() | {"PYTHONPATH": str(ROOT)}

    runner = subprocess.Popen(command, env=environment)
    until(lambda: (out / "matrix" / "own--base.json").exists())
    family = psutil.Process(runner.pid).children(recursive=True)
    assert len(family) >= 3  # guard, service, worker
    kill(runner)
    until(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family))
    assert records(out).keys() == {"own--base.json"}

    assert subprocess.run(command, env=environment, timeout=PATIENCE_SECONDS).returncode == 0
    assert records(out).keys() == {"own--base.json", "own--naive--seed1.json"}
    report = json.loads((out / "matrix" / "report.json").read_text("utf-8"))
    assert report["missing"] == [] and len(report["scores"]) == 2


def test_a_committed_record_comes_out_again(tmp_path: Path, embedded: Deployment) -> None:
    """One cell of experiments/smoke.yaml reproduces its scores and training, up to rounding on other machines."""
    folder = ROOT / "experiments"
    runner = start(embedded, folder / "smoke.yaml", tmp_path, "--arm", "fused", "--seed", "1")
    assert runner.wait(PATIENCE_SECONDS) == 0
    embedded.accept_all()

    name = "smoke/attribute--fused--seed1.json"
    again = json.loads((tmp_path / name).read_text("utf-8"))
    committed = json.loads((folder / "records" / name).read_text("utf-8"))
    assert again["key"] == CellSettings.model_validate(committed["settings"]).key  # with the defaults of newer settings
    assert again["prompts"] == committed["prompts"]
    assert clip_scores(again) == pytest.approx(clip_scores(committed), abs=1e-3)
    assert len(clip_scores(committed)) == 4  # two prompts of each split
    assert last_update(again)["rows"] == last_update(committed)["rows"]
    for figure in ("loss", "log_ratio_preferred", "log_ratio_rejected", "grad_norm"):
        assert last_update(again)[figure] == pytest.approx(last_update(committed)[figure], rel=0.02)


def clip_scores(record: dict[str, Any]) -> list[float]:
    """Return the mean CLIP scores by prompt, of both splits."""
    return [mean for scores in record["scores"] if scores["scorer"] == "shapes-clip" for mean in scores["means"]]


def last_update(record: dict[str, Any]) -> dict[str, float]:
    update: dict[str, float] = record["rounds"][-1]["training"]["updates"][-1]
    return update
