"""Complete rounds on the tiny pipeline, run in this process and inspected through the API."""

import io
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from api.main import create_app
from dfusion.models import DiffusionModel
from dfusion.seeds import sample_seed
from service.db.queries.stages import StopRequest
from service.errors import StorageError
from service.service import cancel_job
from service.storage import StoredObject
from service.storage.files import FileStore
from tests.installation import Installation
from tests.scorers import Brightness
from tests.service import PROMPTS, round_body, settings_for, work_until_idle
from worker.heartbeat import Heartbeat
from worker.stages import fuse, sample, train

HELD_OUT = [
    {"text": f"a {color} square", "items": ["square"]} for color in "red blue green pink gray black white".split()
]
on_both_databases = pytest.mark.parametrize("installation", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def installation(tmp_path: Path, pipeline: Path, request: pytest.FixtureRequest) -> Iterator[Installation]:
    url = request.getfixturevalue("postgres_url") if getattr(request, "param", "sqlite") == "postgresql" else ""
    settings = settings_for(tmp_path / "data", pipeline, checkpoint_seconds=1e-6, database_url=url)
    with TestClient(create_app(settings)) as client:
        yield Installation(client)


@on_both_databases
def test_two_rounds_make_all_that_a_round_makes(installation: Installation) -> None:
    assert installation.client.post("/prompt-sets", json={"name": "held-out", "prompts": HELD_OUT}).status_code == 201
    job = installation.run(rounds=2, held_out_prompt_set="held-out")
    assert (job["state"], job["error"], job["progress"]["percent"]) == ("succeeded", None, 100.0)
    # 2 rounds x (12 samples + 6 targets) and 3 evaluations of 3 + 7 prompts
    assert job["outputs"] == {"samples": 2 * 18 + 3 * 10, "pairs": 12, "models": 2}
    _check_metrics(installation, job)
    _check_pairs(installation, job)
    _check_models(installation, job)
    _check_filters(installation, job)


def _check_filters(installation: Installation, job: dict[str, Any]) -> None:
    def count(path: str) -> int:
        return len(installation.all(path))

    trained_on, held_out = job["prompt_set"], job["held_out_prompt_set"]
    assert count(f"/samples?prompt_set={held_out}") == count("/samples?prompt_set=held-out") == 3 * 7
    for kind in ("jobs", "samples", "pairs"):
        response = installation.client.get(f"/{kind}?prompt_set=held-ou")
        assert (
            response.status_code,
            "expected the name or id (set_…) of a prompt set" in response.json()["detail"],
        ) == (
            404,
            True,
        )
    assert count(f"/samples?prompt_set={trained_on}") == 2 * 18 + 3 * 3
    assert (
        count(f"/samples?prompt_set={trained_on}&role=target&round=2") == count(f"/pairs?prompt_set={trained_on}") / 2
    )
    assert count(f"/samples?job={job['id']}&round=1&role=target") == 6
    everything = installation.all("/samples")
    for filters in ("role=target", f"job={job['id']}&round=2", f"prompt_set={held_out}&round=1&role=evaluation"):
        filter_values = {name: int(value) if name == "round" else value for name, value in parse_qsl(filters)}
        filter_values.pop("prompt_set", None)
        split = ("held_out",) if "prompt_set" in filters else ("train", "held_out")
        expected = [s["id"] for s in everything if filter_values.items() <= s.items() and s["split"] in split]
        assert [s["id"] for s in _pages(installation, f"/samples?{filters}&limit=5")] == expected != []
    adopted = [pair["id"] for pair in installation.all(job["links"]["pairs"]) if pair["adopted"]]
    assert [pair["id"] for pair in installation.all("/pairs?adopted=true")] == adopted


def _pages(installation: Installation, path: str) -> Iterator[dict[str, Any]]:
    cursor = ""
    while cursor is not None:
        page = installation.get(f"{path}{cursor and f'&cursor={cursor}'}")
        yield from page["data"]
        cursor = page["next_cursor"]


def _check_metrics(installation: Installation, job: dict[str, Any]) -> None:
    metrics = installation.get(job["links"]["metrics"])["data"]
    spread = [(m["round"], m["split"], m["version"]) for m in metrics if m["scorer"] == "diversity"]
    assert spread == [(1, "rollout", "pixels"), (2, "rollout", "pixels")]
    metrics = [m for m in metrics if m["scorer"] != "diversity"]
    evaluated = [(m["round"], m["split"], m["count"], m["training_images"]) for m in metrics]
    assert evaluated == [
        (0, "held_out", 7, 0),
        (0, "train", 3, 0),
        (1, "held_out", 7, 12),
        (1, "rollout", 12, 0),
        (1, "train", 3, 12),
        (2, "held_out", 7, 24),
        (2, "rollout", 12, 12),
        (2, "train", 3, 24),
    ]
    samples = installation.all(f"/samples?job={job['id']}&role=evaluation&round=1")
    values = [s["scores"][0]["value"] for s in samples if s["split"] == "train"]
    measured = next(m for m in metrics if (m["round"], m["split"]) == (1, "train"))
    assert measured["mean"] == pytest.approx(sum(values) / 3)
    seeds = [
        [s["seed"] for s in installation.all(f"/samples?job={job['id']}&role=evaluation&round={n}")] for n in (0, 1, 2)
    ]
    assert seeds[0] == seeds[1] == seeds[2]


def _check_pairs(installation: Installation, job: dict[str, Any]) -> None:
    pairs = installation.all(job["links"]["pairs"])
    assert [(p["round"], p["number"]) for p in pairs] == [(r, n) for r in (1, 2) for n in range(6)]
    for pair in pairs:
        assert pair["reference"]["score"] > pair["base"]["score"]
        copied = pair["statistics"]["mask_cover"] == 0  # identical to its base
        filled = pair["statistics"]["mask_cover"] > 0.7  # almost identical to its reference
        scores_enough = pair["target"]["score"] >= pair["base"]["score"]
        assert pair["adopted"] is (scores_enough and not copied and not filled)
        assert pair["base"]["seed"] == pair["target"]["seed"]
        margin = pair["statistics"]["margin"]["target_over_base"]
        assert margin == pytest.approx(pair["target"]["score"] - pair["base"]["score"])
        assert 0 <= pair["statistics"]["mask_cover"] <= 1
        assert any(pair["statistics"]["latent_distance"]["reference_to_base"].values())
    assert any(pair["statistics"]["mask_cover"] > 0 for pair in pairs)
    detail = installation.get(pairs[0]["target"]["href"])
    assert (detail["role"], detail["pairs"]) == ("target", [pairs[0]])
    reference = installation.get(pairs[0]["reference"]["href"])
    assert reference["role"] == "reference"
    assert reference["seed"] == sample_seed(7, 1, 0, str(PROMPTS[0]["text"]), reference["number"])
    for path in (pairs[0]["mask"], pairs[0]["target"]["image"]):
        image = Image.open(io.BytesIO(installation.client.get(path).content))
        assert image.size == (16, 16)


def _check_models(installation: Installation, job: dict[str, Any]) -> None:
    second, first = installation.all(job["links"]["models"])
    assert (first["round"], second["round"], second["parent"]) == (1, 2, first["id"])
    assert job["last_model"] == second["id"]
    detail = installation.get(second["links"]["self"])
    assert detail["lineage"] == [second["id"], first["id"], job["model"]]
    log = installation.get(second["statistics"]["log"])
    assert len(log["updates"]) == second["statistics"]["updates"] > 0


@pytest.mark.parametrize("installation", ["postgresql"], indirect=True)
def test_the_same_seed_gives_the_same_model(installation: Installation) -> None:
    """On PostgreSQL, which returns rows without an order as it likes."""
    few = {"prompts": PROMPTS[:2], "evaluation": None}
    first, again, other = (installation.run(seed=seed, **few) for seed in (7, 7, 8))
    assert installation.adapter(first) == installation.adapter(again) != installation.adapter(other)


def test_raised_rounds_equal_those_of_a_job_that_had_them_from_the_start(installation: Installation) -> None:
    """DDPO, whose updates depend on AdamW's moments and on the scores of each prompt in all rounds before."""
    body = {"prompts": PROMPTS[:2], "training": {"algorithm": "ddpo", "inner_epochs": 1}, "evaluation": None}
    straight = installation.run(rounds=2, **body)
    short = installation.run(rounds=1, **body)

    response = installation.client.patch(f"/jobs/{short['id']}", json={"rounds": 2})
    assert (response.status_code, response.json()["state"], response.json()["spec"]["rounds"]) == (202, "running", 2)
    assert response.json()["progress"]["percent"] == 50.0
    work_until_idle(installation.service)
    raised = installation.get(f"/jobs/{short['id']}")
    assert (raised["state"], raised["progress"]["percent"], raised["outputs"]) == (
        "succeeded",
        100.0,
        straight["outputs"],
    )
    assert installation.adapter(raised) == installation.adapter(straight) != installation.adapter(short)
    first, second = (installation.all(job["links"]["samples"]) for job in (straight, raised))
    assert [(s["seed"], s["scores"]) for s in first] == [(s["seed"], s["scores"]) for s in second]
    lineage = installation.get(f"/models/{raised['last_model']}")["lineage"]
    assert lineage == [raised["last_model"], short["last_model"], short["model"]]


def test_a_round_can_go_on_from_a_model(installation: Installation) -> None:
    few = {"prompts": PROMPTS[:1], "evaluation": None}
    first = installation.run(**few)
    second = installation.run(**few, model=first["last_model"], seed=9)
    lineage = installation.get(f"/models/{second['last_model']}")["lineage"]
    assert lineage == [second["last_model"], first["last_model"], first["model"]]


def test_naive_dpo_prefers_references(installation: Installation) -> None:
    job = installation.run(fusion=None, evaluation=None)
    assert job["state"] == "succeeded"
    pairs = installation.all(job["links"]["pairs"])
    assert {(p["adopted"], p["target"]) for p in pairs} == {(False, None)}
    assert {p["reason"] for p in pairs} == {"fusion is off: the reference is preferred"}
    assert job["last_model"] is not None


def test_a_round_without_pairs_says_so_and_trains_nothing(installation: Installation) -> None:
    job = installation.run(reward="constant", rounds=2)
    assert (job["state"], job["outputs"]["pairs"], job["last_model"]) == ("succeeded", 0, None)
    assert installation.events(job).count("round.without_pairs") == 2

    events = installation.all(f"/jobs/{job['id']}/events")
    first = next(event for event in events if event["kind"] == "round.paired")
    assert first["message"].startswith("0 pairs from 12 samples; prompts whose best samples score no more")
    assert first["data"]["prompts_without_pair"] == 3
    pairings = installation.get(job["links"]["metrics"])["pairings"]
    assert pairings == [{"round": number, "pairs": 0, "samples": 12, "without_pair": 3} for number in (1, 2)]
    assert first["data"]["examples"] == [{"prompt": prompt["text"], "score": 0.5} for prompt in PROMPTS]


def test_a_prompt_that_the_tokenizer_cannot_take_is_refused(installation: Installation) -> None:
    prompt = {"text": "a circle " * 50, "items": ["circle"], "thresholds": [0.1]}
    response = installation.client.post("/rounds", json=round_body(prompts=[prompt]))
    assert (response.status_code, response.json()["code"]) == (422, "prompt_too_long")


def test_a_missing_model_fails_with_a_reason(tmp_path: Path) -> None:
    with TestClient(create_app(settings_for(tmp_path / "data", tmp_path / "nothing"))) as client:
        job = Installation(client).run()
    assert (job["state"], job["error"]["code"]) == ("failed", "model_not_found")


def test_batches_that_do_not_fit_into_gpu_memory_are_halved(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU with memory for one image gives the results of whole batches, up to rounding.

    Sampling and fusing run out of memory in their first step, an evaluation while it decodes, scoring in the scorer.
    """
    whole = installation.run()
    _limit_memory(monkeypatch, sample, "sample", 4)
    _limit_memory(monkeypatch, fuse, "fuse", 2)
    _limit_memory(monkeypatch, DiffusionModel, "decode", 1)
    _limit_memory(monkeypatch, Brightness, "score", 1)
    job = installation.run()
    assert (job["state"], job["progress"]["percent"]) == ("succeeded", 100.0)

    # each kind of stage halves its batches once: 4 samples, 4 targets, their scores, 3 evaluation images
    events = installation.all(job["links"]["events"])
    messages = Counter(event["message"] for event in events if event["kind"] == "stage.smaller_batches")
    halved = "out of GPU memory with a batch of {}: continuing with batches of {}"
    assert messages == {halved.format(4, 2): 4, halved.format(2, 1): 4, halved.format(3, 1): 1}

    def scores(of: dict[str, Any]) -> list[float]:
        return [each["scores"][0]["value"] for each in installation.all(of["links"]["samples"])]

    assert scores(job) == pytest.approx(scores(whole), abs=1e-4)


def _limit_memory(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, position: int) -> None:
    """Let a function run out of GPU memory, after a step, if its argument at `position` has several rows."""
    call = getattr(owner, name)

    def limited(*arguments: Any, **options: Any) -> Any:
        if len(arguments[position]) > 1:
            if "on_step" in options:
                options["on_step"](0, 1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(*arguments, **options)

    monkeypatch.setattr(owner, name, limited)


def test_an_interrupted_training_continues_from_its_checkpoint(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = installation.run(evaluation=None)
    save, calls = train.save_adapter, []

    def fail_once(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(train, "save_adapter", fail_once)
    job_id = installation.post(evaluation=None)
    while installation.get(f"/jobs/{job_id}")["state"] in ("queued", "running"):
        work_until_idle(installation.service)
    job = installation.get(f"/jobs/{job_id}")
    assert job["state"] == "succeeded"
    assert "training.resumed" in installation.events(job)
    assert installation.adapter(job) == installation.adapter(straight)


def test_a_training_goes_on_while_its_checkpoints_cannot_be_stored(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = installation.run(evaluation=None)
    put = FileStore.put
    refused = []

    def refuse_checkpoints(self: FileStore, job_id: str, stage_id: str, slot: str, source: Path) -> StoredObject:
        if slot == "checkpoint":
            refused.append(stage_id)
            raise StorageError("unavailable")
        return put(self, job_id, stage_id, slot, source)

    monkeypatch.setattr(FileStore, "put", refuse_checkpoints)
    job = installation.run(evaluation=None)
    trained = next(stage for stage in installation.all(job["links"]["stages"]) if stage["kind"] == "train")
    assert (trained["state"], trained["attempts"], trained["failures"]) == ("succeeded", 1, 0)
    assert refused
    assert installation.adapter(job) == installation.adapter(straight)


def test_a_cancel_stops_a_stage_within_a_step(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = installation.post()
    step, steps = Heartbeat.step, []

    def cancel_at_the_second_step(self: Heartbeat, count: int = 1) -> None:
        step(self, count)
        steps.append(count)
        if len(steps) == 2:
            cancel_job(installation.service, job_id)
            deadline = time.monotonic() + 10
            while self._stop_request is not StopRequest.CANCEL and time.monotonic() < deadline:
                time.sleep(0.01)
            assert self._stop_request is StopRequest.CANCEL

    monkeypatch.setattr(Heartbeat, "step", cancel_at_the_second_step)
    work_until_idle(installation.service)
    job = installation.get(f"/jobs/{job_id}")
    assert (job["state"], len(steps)) == ("cancelled", 2)
    assert job["outputs"] == {"samples": 0, "pairs": 0, "models": 0}


def test_artifacts_are_served_whole_in_part_and_not_twice(installation: Installation) -> None:
    job = installation.done("/samplings", {"model": "tiny", "prompts": PROMPTS[:1], "sampling": {"num_steps": 2}})
    path = installation.all(job["links"]["samples"])[0]["image"]
    get = installation.client.get
    whole = get(path)
    assert (whole.status_code, whole.headers["content-type"]) == (200, "image/png")
    data, etag = whole.content, whole.headers["etag"]
    for byte_range, start, stop in (("0-9", 0, 10), ("10-", 10, len(data)), ("-5", len(data) - 5, len(data))):
        part = get(path, headers={"Range": f"bytes={byte_range}"})
        assert (part.status_code, part.content) == (206, data[start:stop])
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(data)}"
    assert get(path, headers={"If-None-Match": etag}).status_code == 304
    assert get(path, headers={"Range": "bytes=0-1", "If-Range": '"other"'}).status_code == 200
    assert get(path, headers={"Range": "pages=1"}).status_code == 200
    beyond = get(path, headers={"Range": f"bytes={len(data)}-"})
    assert (beyond.status_code, beyond.json()["code"]) == (416, "range_not_satisfiable")
