"""Shards of scoring and verifying stages: their results are joined without a scorer, whatever their number."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from service.jobs.kinds import ScorerRef, work
from tests import scorers
from tests.installation import Installation
from tests.service import PROMPTS, round_body, settings_for, work_until_idle
from worker.context import StageContext

EVERY_TARGET = {"adoption_threshold": 0, "max_mask_cover": 1}


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Iterator[Installation]:
    data = tmp_path_factory.mktemp("shards")
    with TestClient(create_app(settings_for(data, pipeline, shard_prompts=1))) as client:
        yield Installation(client)


@pytest.fixture
def scored_by(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kinds of the stages that have loaded a scorer."""
    kinds: set[str] = set()
    load = StageContext.load_scorer

    def load_and_note(context: StageContext, scorer: ScorerRef) -> Any:
        kinds.add(context.claim.kind)
        return load(context, scorer)

    monkeypatch.setattr(StageContext, "load_scorer", load_and_note)
    return kinds


def metrics(installation: Installation, job: dict[str, Any]) -> list[dict[str, Any]]:
    rows = installation.get(f"/jobs/{job['id']}/metrics")["data"]
    return [{name: row[name] for name in ("split", "scorer", "version", "count", "mean", "std")} for row in rows]


def pairs(installation: Installation, job: dict[str, Any]) -> list[dict[str, Any]]:
    rows = installation.all(f"/pairs?job={job['id']}")
    return [
        {name: row[name] for name in ("number", "prompt", "thresholds", "adopted", "reason", "statistics")}
        | {side: row[side]["score"] for side in ("reference", "base", "target")}
        for row in rows
    ]


def count(installation: Installation, job: dict[str, Any], kind: str) -> int:
    return len(installation.all(f"{job['links']['stages']}?kind={kind}"))


def test_a_round_has_the_same_results_with_any_number_of_shards(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, scored_by: set[str]
) -> None:
    body = round_body(watch="constant", pairing=EVERY_TARGET)
    whole = installation.done("/rounds", body)
    monkeypatch.setattr(work, "_MIN_SCORED_IMAGES", 1)  # a stage for each of the three prompts
    sharded = installation.done("/rounds", body)

    assert [count(installation, whole, kind) for kind in ("score", "verify")] == [1, 1]
    assert [count(installation, sharded, kind) for kind in ("score", "verify")] == [3, 3]
    assert whole["state"] == sharded["state"] == "succeeded"
    assert metrics(installation, sharded) == metrics(installation, whole)
    assert {row["scorer"] for row in metrics(installation, whole)} == {"brightness", "constant", "diversity"}
    assert pairs(installation, sharded) == pairs(installation, whole)
    assert installation.adapter(sharded) == installation.adapter(whole)
    assert scored_by == {"score", "verify", "evaluate"}


def test_named_pairs_are_scored_by_the_shards_that_have_them(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, scored_by: set[str]
) -> None:
    sampling = {"model": "tiny", "prompts": PROMPTS[:1], "sampling": {"num_steps": 4}, "scorers": ["constant"]}
    sampled = installation.done("/samplings", sampling | {"samples_per_prompt": 6})
    ids = [sample["id"] for sample in installation.all(f"/samples?job={sampled['id']}")]
    monkeypatch.setattr(work, "_MIN_SCORED_IMAGES", 1)  # five pairs with one reference, in shards of four
    named = [{"reference": ids[0], "base": base} for base in ids[1:]]
    fused = installation.done("/fusions", {"pairs": named, "reward": "brightness", "fusion": {"last_step": 3}})

    assert [count(installation, fused, kind) for kind in ("score", "fuse", "verify")] == [2, 2, 2]
    assert fused["state"] == "succeeded"
    assert [row["base"]["id"] for row in installation.all(f"/pairs?job={fused['id']}")] == ids[1:]
    assert scored_by == {"score", "verify"}


def test_shards_of_different_scorer_versions_are_completed(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_MIN_SCORED_IMAGES", 1)
    body = {"model": "tiny", "prompts": PROMPTS, "sampling": {"num_steps": 4}, "scorers": ["brightness"]}
    job = installation.client.post("/samplings", json=body).json()

    # the first shard is scored before an upgrade
    work_until_idle(installation.service, until=lambda claim: claim.kind == "score" and claim.shard == 1)
    monkeypatch.setattr(scorers.Brightness, "version", "2")
    work_until_idle(installation.service)

    by_scorer = {(row["scorer"], row["version"]): row["count"] for row in metrics(installation, job)}
    assert by_scorer == {("brightness", "2"): 12, ("diversity", "pixels"): 3}
