"""The runner against the real application, with a worker in a thread."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from api.cli import app
from api.client import NotFoundError, UnreachableError
from api.experiments import Cell, Experiment, ExperimentError, Record, RunResult, State, read_record, run
from api.experiments.format import prompt_set_name
from api.experiments.records import folder_of
from api.experiments.status import status
from api.experiments.tensorboard import export_tensorboard
from service.states import JobKind, JobState
from tests.cli import CliRunner
from tests.unit.api.conftest import Live
from tests.unit.api.experiments.examples import cells_by_name

pytestmark = pytest.mark.slow

TRAIN = ["a red and striped [circle]", "a blue and dotted [star]"]
HELD_OUT = ["a green and dotted [heart]"]
CONTENT: dict[str, Any] = {
    "name": "live",
    "model": "tiny",
    "common": {
        "rounds": 2,
        "samples_per_prompt": 4,
        "sampling": {"num_steps": 4},
        "training": {"examples_per_update": 2, "micro_batch": 4, "inner_epochs": 1},
        "reward": "brightness",
    },
    "prompt_lists": {"own": {"train": TRAIN, "held_out": HELD_OUT}},
    "seeds": [1],
    "arms": {"fused": {"fusion": {"first_step": 1, "last_step": 3}}},
    "evaluation": {"samples_per_prompt": 3, "scorers": ["brightness"]},
}


def run_with_worker(live: Live, trial: Experiment, out: Path, **options: Any) -> RunResult:
    with live.client() as client, live.working():
        return run(trial, client, out, poll_seconds=0.05, **options)


@pytest.fixture(scope="module")
def finished(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the whole experiment. Returns the folder of its records."""
    out = tmp_path_factory.mktemp("records")
    states: list[State] = []
    result = run_with_worker(live, Experiment.parse(CONTENT), out, show=states.append)
    assert result.failures == () and [cell.name for cell in result.done] == ["own/base", "own/fused/seed 1"]
    assert [state.percent for state in states] == sorted(state.percent for state in states)
    assert (states[-1].percent, len(states[-1].done)) == (pytest.approx(100), 2)
    assert max(len(state.running) for state in states) == 1  # no worker reports, so one cell runs at a time
    return out


@pytest.fixture
def fused(finished: Path) -> Record:
    return read_record(finished / "live" / "own--fused--seed1.json")


def test_scores_are_means_over_the_images_of_each_prompt(live: Live, fused: Record) -> None:
    with live.client() as client:
        samples = list(client.samples(job=fused.jobs["evaluation"].id))
    assert [(score.round, score.images, score.split) for score in fused.scores] == [
        (1, 8, "held_out"),
        (2, 16, "held_out"),
        (1, 8, "train"),
        (2, 16, "train"),
    ]
    assert fused.prompts == {
        "held_out": ("a green and dotted heart",),
        "train": ("a red and striped circle", "a blue and dotted star"),
    }
    for score in fused.scores:
        expected = [
            [s.scores[0].value for s in samples if (s.model, s.prompt) == (score.model, prompt)]
            for prompt in fused.prompts[score.split]
        ]
        assert [len(values) for values in expected] == [3] * len(expected)
        assert score.means == pytest.approx([fmean(values) for values in expected])
        assert (score.scorer, score.version) == ("brightness", "1")


def test_rounds_contain_the_numbers_of_the_service(live: Live, fused: Record) -> None:
    job = fused.jobs["round"].id
    with live.client() as client:
        pairs = [pair for pair in client.pairs(job=job) if pair.round == 2]
        models = {model.round: model for model in client.models(job=job)}
        log = json.loads(client.read(models[2].statistics["log"]))
        detail = client.job(job)
    second = fused.rounds[1]
    assert (second.pairs.pairs, second.pairs.adopted) == (len(pairs), sum(bool(pair.adopted) for pair in pairs))
    outside = [pair.statistics["ssim"]["target_to_base"]["outside"] for pair in pairs if pair.statistics]
    assert second.pairs.means["ssim.target_to_base.outside"] == pytest.approx(
        fmean([value for value in outside if value is not None])
    )
    assert second.model == models[2].id and second.training is not None
    assert [update["loss"] for update in second.training.updates] == [update["loss"] for update in log["updates"]]
    assert second.training.figures["updates"] == len(log["updates"]) and "log" not in second.training.figures
    assert detail.started_at is not None and detail.finished_at is not None
    seconds = (detail.finished_at - detail.started_at).total_seconds()
    assert fused.jobs["round"].seconds == pytest.approx(seconds, abs=1e-3)
    rollout = {(metric.scorer, metric.count) for metric in second.metrics if metric.split == "rollout"}
    assert ("brightness", 8) in rollout


def test_recorded_cells_cause_no_requests(live: Live, finished: Path) -> None:
    requests = len(live.busy.seen)
    with live.client() as client:
        result = run(Experiment.parse(CONTENT), client, finished)
    assert (len(result.done), result.recorded_before) == (2, 2)
    assert len(live.busy.seen) == requests


def test_a_lost_record_is_collected_from_the_same_jobs(live: Live, fused: Record, tmp_path: Path) -> None:
    with live.client() as client:
        before = len(list(client.jobs()))
        result = run(
            Experiment.parse(CONTENT), client, tmp_path, poll_seconds=0.01
        )  # without a worker: no job has to run
        assert len(list(client.jobs())) == before
    assert result.recorded_before == 0
    again = read_record(tmp_path / "live" / "own--fused--seed1.json")
    assert again == fused.model_copy(update={"devices": again.devices})


def test_experiments_share_the_jobs_of_equal_cells(live: Live, fused: Record, tmp_path: Path) -> None:
    wider = Experiment.parse(CONTENT | {"name": "wider", "seeds": [1, 2]})
    chosen = cells_by_name(wider)["own/fused/seed 1"]
    assert chosen.settings.key == fused.key
    with live.client() as client:
        statuses = status(wider, client, tmp_path)
    assert [(entry.cell.name, entry.state) for entry in statuses] == [
        ("own/base", "succeeded"),
        ("own/fused/seed 1", "succeeded"),
        ("own/fused/seed 2", "not started"),
    ]
    assert statuses[1].job is not None and statuses[1].job.id == fused.jobs["evaluation"].id


def test_a_failed_cell_is_reported_and_retried_by_the_next_run(live: Live, tmp_path: Path) -> None:
    trial = Experiment.parse(CONTENT | {"seeds": [5, 6], "common": CONTENT["common"] | {"rounds": 1}})
    cancelled: list[Cell] = []

    def cancel_the_first(state: State) -> None:
        for running in state.running:
            if running.cell.seed == 5 and not cancelled:
                cancelled.append(running.cell)
                with live.client() as client:
                    client.cancel(running.job.id)

    result = run_with_worker(live, trial, tmp_path, show=cancel_the_first)
    [failure] = result.failures
    assert (failure.cell.name, failure.message) == ("own/fused/seed 5", "the round cancelled: it was cancelled")
    assert [cell.name for cell in result.done] == ["own/base", "own/fused/seed 6"]

    second = run_with_worker(live, trial, tmp_path)
    assert second.failures == () and second.recorded_before == 2
    record = read_record(folder_of(tmp_path, "live") / "own--fused--seed5.json")
    assert record.jobs["round"].origin == failure.job
    with live.client() as client:
        assert len([job for job in client.jobs(kind=JobKind.ROUND) if job.origin == failure.job]) == 1


def test_a_round_without_training_is_evaluated_with_its_initial_model(live: Live, tmp_path: Path) -> None:
    common = CONTENT["common"] | {"reward": "constant"}
    arms = {"equal": {}}
    result = run_with_worker(
        live, Experiment.parse(CONTENT | {"name": "equal", "common": common, "arms": arms}), tmp_path
    )
    assert result.failures == ()
    base, equal = (read_record(tmp_path / "equal" / f"own--{name}.json") for name in ("base", "equal--seed1"))
    assert [facts.model for facts in equal.rounds] == [None, None] and equal.rounds[0].pairs.pairs == 0
    for score in equal.scores:
        expected = next(base_score for base_score in base.scores if base_score.split == score.split)
        assert (score.model, score.means) == (expected.model, expected.means)


def test_rejected_settings_start_no_job(live: Live, tmp_path: Path) -> None:
    arms = {"good": {}, "bad": {"reward": "taste"}}
    with live.client() as client:
        before = len(list(client.jobs()))
        with pytest.raises(ExperimentError, match="own/bad/seed 7: unknown scorer 'taste'") as caught:
            run(Experiment.parse(CONTENT | {"arms": arms, "seeds": [7]}), client, tmp_path)
        assert len(list(client.jobs())) == before
    assert [field.pointer for field in caught.value.errors] == ["own/bad/seed 7: /reward"]


def test_run_ends_if_the_service_stays_unreachable(live: Live, tmp_path: Path) -> None:
    with live.client(port=1) as client, pytest.raises(UnreachableError):
        run(Experiment.parse(CONTENT), client, tmp_path, patience_seconds=0)


@pytest.mark.usefixtures("finished")
def test_inline_prompts_become_a_prompt_set(live: Live) -> None:
    trial = Experiment.parse(CONTENT)
    with live.client() as client:
        [prompt] = client.prompt_set(prompt_set_name(trial.prompt_lists["own"].held_out or ())).prompts
        with pytest.raises(NotFoundError):
            client.prompt_set("prompts-0")
    assert prompt["text"] == "a green and dotted heart"


def test_experiment_commands(live: Live, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DFUSION_URL", live.url)
    file = tmp_path / "live.yaml"
    file.write_text(json.dumps(CONTENT))  # JSON is YAML

    def invoke(*words: str) -> tuple[int, Any, str]:
        result = CliRunner().invoke(app, ["experiment", *words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    code, stdout, _ = invoke("run", str(file), "--out", str(finished), "--json")
    assert (code, json.loads(stdout)["recorded_before"]) == (0, 2)
    code, stdout, _ = invoke("run", str(file), "--out", str(finished))
    assert code == 0 and "2 cells have records" in stdout
    code, stdout, _ = invoke("status", str(file), "--out", str(finished), "--json")
    assert [cell["state"] for cell in json.loads(stdout)["data"]] == ["recorded", "recorded"]
    code, stdout, _ = invoke("report", str(file), "--out", str(finished), "--json", "--no-plots")
    assert code == 0 and json.loads(stdout)["primary"] == {"split": "held_out", "scorer": "brightness"}
    code, _, stderr = invoke("run", str(file), "--arm", "x")
    assert code == 1 and "arm: expected one of base, fused, got x" in stderr
    file.write_text(json.dumps(CONTENT | {"seed": 1, "common": {"round": 2}}))
    code, _, stderr = invoke("run", str(file))
    assert code == 1 and "seed: Extra inputs are not permitted" in stderr
    code, _, stderr = invoke("report", str(tmp_path / "nowhere.yaml"))
    assert code == 1 and "nowhere.yaml" in stderr


def test_export_of_a_round_contains_its_curves(live: Live, fused: Record, tmp_path: Path) -> None:
    job = fused.jobs["round"].id
    with live.client() as client:
        folder = export_tensorboard(client, job, tmp_path)
        first = curves(folder)
        assert export_tensorboard(client, job, tmp_path) == folder == tmp_path / job
        metrics = client.metrics(job).data
    assert curves(folder) == first  # replaced, not added
    rollout = [(m.round, m.mean) for m in metrics if (m.split, m.scorer) == ("rollout", "brightness")]
    assert first["rollout/brightness"] == [(number, pytest.approx(mean)) for number, mean in rollout]
    trainings = [facts.training for facts in fused.rounds if facts.training]
    losses = [update["loss"] for training in trainings for update in training.updates]
    assert first["training/loss"] == [(n, pytest.approx(loss)) for n, loss in enumerate(losses, 1)]
    adopted = [(facts.round, facts.pairs.adopted / facts.pairs.targets) for facts in fused.rounds]
    assert first["pairs/share_adopted"] == [(number, pytest.approx(share)) for number, share in adopted]


def test_export_of_an_evaluation_has_a_run_per_model(live: Live, fused: Record, tmp_path: Path) -> None:
    with live.client() as client:
        folder = export_tensorboard(client, fused.jobs["evaluation"].id, tmp_path)
        waiting = client.start_sampling({"model": "tiny", "prompts": [{"text": "a [star]"}]})
        with pytest.raises(ExperimentError, match="no metrics, pairs or updates"):
            export_tensorboard(client, waiting.id, tmp_path)
        assert client.cancel(waiting.id).state == JobState.CANCELLED
    assert {path.name for path in folder.iterdir()} == {facts.model for facts in fused.rounds}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the scalars of all event files, by tag."""
    scalars: dict[str, list[tuple[int, float]]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        for payload in tf_records(file.read_bytes()):
            event = Event.FromString(payload)
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def tf_records(data: bytes) -> Iterator[bytes]:
    """Split TFRecord data: length, its masked CRC-32C, the payload, its masked CRC-32C."""
    while data:
        (length,) = struct.unpack_from("<Q", data)
        assert struct.unpack_from("<I", data, 8)[0] == masked_crc(data[:8])
        payload = data[12 : 12 + length]
        assert struct.unpack_from("<I", data, 12 + length)[0] == masked_crc(payload)
        yield payload
        data = data[16 + length :]


def masked_crc(data: bytes) -> int:
    """Compute CRC-32C bit by bit, rotated and offset as TensorFlow stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
