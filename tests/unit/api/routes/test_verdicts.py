"""Verdicts of several reviewers on the same pairs."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from service.db.queries import verdicts
from service.db.tables import Pair
from service.service import Service
from tests.stored_pairs import add_pairs


@pytest.fixture
def pair(service: Service) -> str:
    """The path of a pair without verdicts."""
    return f"/pairs/{add_pairs(service, 1)[0]}"


def judge(client: TestClient, pair: str, prefer: str | None, reviewer: str | None, **headers: str) -> dict[str, Any]:
    body = {"prefer": prefer, "reviewer": reviewer}
    response = client.put(f"{pair}/verdict", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return dict(response.json())


def given(pair: dict[str, Any]) -> list[tuple[str | None, str]]:
    return [(verdict["reviewer"], verdict["prefer"]) for verdict in pair["verdicts"]]


def test_each_reviewer_has_a_verdict(client: TestClient, pair: str) -> None:
    one = judge(client, pair, "target", "ann")
    assert one["verdict"] == one["verdicts"][0] == {**one["verdict"], "prefer": "target", "reviewer": "ann"}

    two = judge(client, pair, "base", None)
    assert given(two) == [("ann", "target"), (None, "base")]
    assert two["verdict"] == {"prefer": "tie", "reviewer": None, "created_at": two["verdicts"][1]["created_at"]}

    three = judge(client, pair, "base", "bob")
    assert (three["verdict"]["prefer"], three["revision"]) == ("base", 3)
    changed = judge(client, pair, "target", None)
    assert changed["verdict"]["prefer"] == "target"
    assert given(changed) == [("ann", "target"), ("bob", "base"), (None, "target")]  # the changed one is the last

    judge(client, pair, None, None)
    judge(client, pair, None, "bob")
    left = client.get(pair).json()
    assert left["verdicts"] == [left["verdict"]]
    assert (left["verdict"]["reviewer"], left["verdict"]["prefer"], left["revision"]) == ("ann", "target", 6)
    assert judge(client, pair, None, "ann")["verdict"] is None


def test_only_own_changes_conflict(client: TestClient, pair: str) -> None:
    """ann judges at revision 1, bob at revision 2; both then change what they saw before."""
    seen = client.get(pair).headers["etag"]
    judge(client, pair, "target", "ann", **{"If-Match": seen})
    judge(client, pair, "base", "bob", **{"If-Match": seen})

    for revision, status in ((0, 412), (1, 200), (4, 412)):  # ann's own change; bob's is none; not yet reached
        body = {"prefer": "tie", "reviewer": "ann"}
        response = client.put(f"{pair}/verdict", json=body, headers={"If-Match": f'"{revision}"'})
        assert (revision, response.status_code) == (revision, status)
    assert response.json()["code"] == "changed_meanwhile"

    judge(client, pair, None, "bob")
    late = client.put(f"{pair}/verdict", json={"prefer": "tie", "reviewer": "bob"}, headers={"If-Match": '"2"'})
    assert late.status_code == 412  # bob has removed it in the meantime


def test_pairs_are_filtered_by_reviewers(client: TestClient, service: Service) -> None:
    ids = add_pairs(service, 4)
    paths = [f"/pairs/{pair_id}" for pair_id in ids]
    judge(client, paths[0], "target", "ann")
    judge(client, paths[0], "base", "bob")
    judge(client, paths[1], "tie", "ann")
    judge(client, paths[2], "tie", None)
    judge(client, paths[3], "tie", "ann")
    judge(client, paths[3], None, "ann")

    def listed(**filters: Any) -> list[int]:
        pairs = client.get("/pairs", params=filters).json()["data"]
        return [ids.index(pair["id"]) for pair in pairs]

    assert listed(judged_by_me=False, reviewer="ann") == [2, 3]
    assert listed(judged_by_me=True, reviewer="ann") == [0, 1]
    assert listed(judged_by_me=False, reviewer="bob") == [1, 2, 3]
    assert listed(judged_by_me=True) == [2]
    assert listed(reviewers_below=1) == listed(judged=False) == [3]
    assert listed(reviewers_below=2) == [1, 2, 3]
    assert listed(reviewers_below=2, judged_by_me=False, reviewer="ann") == [2, 3]


def test_a_pair_has_a_limited_number_of_reviewers(
    client: TestClient, pair: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "MAX_REVIEWERS", 2)
    judge(client, pair, "tie", "ann")
    judge(client, pair, "tie", "bob")
    third = client.put(f"{pair}/verdict", json={"prefer": "tie", "reviewer": "eve"})
    assert (third.status_code, "has 2 reviewers" in third.json()["detail"]) == (409, True)
    assert judge(client, pair, "base", "ann")["revision"] == 3


def test_a_verdict_by_a_process_of_the_version_before_is_kept(client: TestClient, service: Service, pair: str) -> None:
    old = {"verdict": "base", "verdict_by": "ann", "verdict_at": 5.0, "revision": 1}
    with service.uow.writing() as session:
        session.execute(update(Pair).where(Pair.id == pair.removeprefix("/pairs/")).values(old))
    assert given(judge(client, pair, "base", "bob")) == [("ann", "base"), ("bob", "base")]
