"""How stages use the database, and which pairs a training uses."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Connection, event

from api.main import create_app
from dfusion.types import Trajectory
from service.db.queries import training_pairs
from service.jobs import execution
from service.service import Service
from tests.installation import Installation
from tests.service import PROMPTS, round_body, settings_for
from worker.runner import run_stage
from worker.stages import STAGES, fuse
from worker.workbench import Workbench

FUSION = {"first_step": 1, "last_step": 3}
DDPO = {"algorithm": "ddpo", "clip_range": 0.1, "inner_epochs": 1}
EVERY_TARGET = {"adoption_threshold": 0, "max_mask_cover": 1}
UNKNOWN_PAIR = f"pair_{'0' * 26}"


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Iterator[Installation]:
    data = tmp_path_factory.mktemp("stages")
    with TestClient(create_app(settings_for(data, pipeline))) as client:
        yield Installation(client)


def transactions_by_kind(service: Service) -> dict[str, set[tuple[str, ...]]]:
    """Run all stages. Returns the transactions of each kind of stage, in order: read-only or read-write.

    Transactions of the heartbeat, which has its own thread, are excluded.
    """
    worker = threading.get_ident()
    begun: list[str] = []

    def note(connection: Connection) -> None:
        if threading.get_ident() == worker:
            begun.append("read" if connection.get_execution_options().get("reads_only") else "write")

    by_kind = defaultdict(set)
    bench = Workbench.of(service)
    event.listen(service.uow.engine, "begin", note)
    try:
        while claim := execution.claim(service.uow, service.settings, "test"):
            begun.clear()
            run_stage(bench, claim, threading.Event())
            by_kind[str(claim.kind)].add(tuple(begun))
    finally:
        event.remove(service.uow.engine, "begin", note)
    return dict(by_kind)


@pytest.fixture(scope="module")
def fused(installation: Installation) -> list[dict[str, Any]]:
    """The six pairs of a round, without verdicts."""
    job = installation.run(evaluation=None, pairing=EVERY_TARGET)
    return installation.all(job["links"]["pairs"])


def test_every_stage_reads_in_one_transaction_and_writes_in_another(
    installation: Installation, fused: list[dict[str, Any]]
) -> None:
    """One read-only transaction before the computation, one write transaction after it, and none in between."""
    job_id = fused[0]["job"]
    sides = [{"reference": pair["reference"]["id"], "base": pair["base"]["id"]} for pair in fused[:2]]
    requests = [
        installation.post(training={"credit": "mask", "inner_epochs": 1}),
        installation.post(training=DDPO, fusion=None, evaluation=None),
        installation.ask("/fusions", {"pairs": sides, "fusion": FUSION, "reward": "constant"}),
        installation.ask("/trainings", {"jobs": [job_id], "training": DDPO}),
        installation.ask("/exports", {"job": job_id, "format": "parquet"}),
        installation.ask("/previews", {"pair": fused[0]["id"]}),
        installation.ask("/evaluations", {"models": ["tiny"], "prompts": PROMPTS, "scorers": ["brightness"]}),
    ]
    expected = {str(kind): {("read", "write")} for kind in STAGES}
    assert transactions_by_kind(installation.service) == expected
    assert [installation.get(f"/jobs/{job_id}")["state"] for job_id in requests] == ["succeeded"] * len(requests)


def test_a_fused_step_computes_each_reference_once(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 samples give 4 references with 2 targets each. A call of 4 pairs has 2 references."""
    references: list[int] = []
    original = fuse.fuse

    def recorded(
        unet: Any, scheduler: Any, base: Any, reference: Trajectory, *rest: Any, **settings: Any
    ) -> Trajectory:
        references.append(len(set(reference.seeds)))
        return original(unet, scheduler, base, reference, *rest, **settings)

    monkeypatch.setattr(fuse, "fuse", recorded)
    installation.run(evaluation=None, prompts=PROMPTS[:1], samples_per_prompt=16, pairing=EVERY_TARGET)

    assert references == [2, 2]


def test_named_pairs_come_in_their_order(installation: Installation, fused: list[dict[str, Any]]) -> None:
    ids = [pair["id"] for pair in fused]
    other = installation.run(evaluation=None, fusion=None)
    of_other = [pair["id"] for pair in installation.all(other["links"]["pairs"])]

    def named(pair_ids: list[str], job_ids: list[str]) -> list[str]:
        with installation.service.uow.reading() as session:
            return [pair.id for pair in training_pairs.named(session, pair_ids, job_ids)]

    assert named([ids[4], UNKNOWN_PAIR, ids[1], ids[4]], []) == [ids[4], ids[1], ids[4]]
    assert named([], [other["id"], fused[0]["job"]]) == [*of_other, *ids]


def test_a_verdict_prefers_a_side_or_none(installation: Installation, fused: list[dict[str, Any]]) -> None:
    """The check counts the pairs that the worker trains on: the first two of five verdicts, and none without."""
    ids = [pair["id"] for pair in fused]
    body = {"pairs": ids, "prefer": "verdicts", "training": {"examples_per_update": 2, "inner_epochs": 1}}
    for pair_id, verdict in zip(ids, ["base", "target", "tie", "reject", None], strict=False):
        installation.client.put(f"/pairs/{pair_id}/verdict", json={"prefer": verdict})

    with installation.service.uow.reading() as session:
        pairs = training_pairs.named(session, ids, [])
        assert [pair.id for pair in training_pairs.with_preferred_side(pairs)] == ids[:2]
    assert problems(installation, body | {"pairs": ids[2:]}) == ("no_pairs", ["/prefer"])
    job = installation.done("/trainings", body)
    assert installation.get(f"/models/{job['last_model']}")["statistics"]["pairs"] == 2


def problems(installation: Installation, body: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the error code and the pointers to invalid fields."""
    response = installation.client.post("/trainings", json=body)
    assert response.status_code == 422, response.text
    return response.json()["code"], [error["pointer"] for error in response.json()["errors"]]


def test_every_name_of_pairs_that_is_wrong_is_reported(installation: Installation, fused: list[dict[str, Any]]) -> None:
    pair_id, job_id = fused[0]["id"], fused[0]["job"]
    without_pairs = installation.ask("/rounds", round_body())
    repeated = {"pairs": [pair_id, UNKNOWN_PAIR, pair_id, "no_id"]}
    assert problems(installation, repeated) == ("unknown_pair", ["/pairs/1", "/pairs/2", "/pairs/3"])
    assert problems(installation, {"jobs": [job_id, without_pairs, job_id]}) == ("no_pairs", ["/jobs/1", "/jobs/2"])
    installation.client.post(f"/jobs/{without_pairs}/cancel")
