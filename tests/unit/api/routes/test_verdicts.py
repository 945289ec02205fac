"""Verdicts of several reviewers on the same pairs."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from service.db.queries import agreement, verdicts
from service.db.tables import Pair, PairVerdict
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


def test_spaces_around_a_name_make_no_other_reviewer(client: TestClient, pair: str) -> None:
    judge(client, pair, "target", "ann")
    assert given(judge(client, pair, "base", " ann ")) == [("ann", "base")]
    mine = {"judged_by_me": True, "job": client.get(pair).json()["job"]}
    assert len(client.get("/pairs", params=mine | {"reviewer": "ann "}).json()["data"]) == 1

    refused = client.put(f"{pair}/verdict", json={"prefer": "tie", "reviewer": "  "})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/reviewer")


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


PUBLISHED = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)
"""The data of Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", part C: four observers, twelve units.

By hand. The last unit has one value and is not compared: n = 40 values, of which 9, 13, 10, 5 and 3 are 1 to 5. Unit 2
(2 2 3 2) and unit 8 (1 1 2 1) have (4^2 - 3^2 - 1^2) / 3 = 2 each, unit 6 (1 2 3 4) has (4^2 - 4) / 3 = 4, the others
0: D_o = 8 / 40 = 0.2. D_e = (40^2 - 9^2 - 13^2 - 10^2 - 5^2 - 3^2) / (40 * 39) = 1216 / 1560 = 0.7795.
Then alpha = 1 - 0.2 / 0.7795 = 0.743, as published.
"""


def test_alpha_of_the_published_example(client: TestClient, service: Service) -> None:
    ids = add_pairs(service, 12)
    with service.uow.writing() as session:
        for observer, line in enumerate(PUBLISHED):
            for pair_id, value in zip(ids, line.split(), strict=True):
                if value != ".":
                    row = PairVerdict(
                        pair_id=pair_id, reviewer=f"r{observer}", prefer=value, revision=1, created_at=1.0
                    )
                    session.add(row)
        for pair_id, values in zip(ids, zip(*map(str.split, PUBLISHED), strict=True), strict=True):
            number = len(values) - values.count(".")
            session.execute(update(Pair).where(Pair.id == pair_id).values(reviewers=number))

    measured = client.get("/verdicts/agreement").json()
    assert round(measured["alpha"], 3) == 0.743
    assert (measured["pairs"], measured["compared"], measured["verdicts"]) == (12, 11, 40)
    assert [(row["reviewer"], row["judged"]) for row in measured["reviewers"]] == [
        ("r1", 11),
        ("r3", 11),
        ("r2", 10),
        ("r0", 9),
    ]


def test_agreement_is_that_of_the_chosen_pairs(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job: ann and bob agree on two pairs and differ on one. n D_o = 2, n_c = (3, 3):
    alpha = 1 - 5 * 2 / (36 - 18) = 4 / 9. In another job, they have one verdict each."""
    first = [f"/pairs/{pair_id}" for pair_id in add_pairs(service, 4)]
    other = f"/pairs/{add_pairs(service, 1)[0]}"
    for pair, of_ann, of_bob in zip(first, ("target", "base", "base"), ("target", "base", "target"), strict=False):
        judge(client, pair, of_ann, "ann")
        judge(client, pair, of_bob, "bob")
    judge(client, other, "tie", "ann")
    judge(client, other, "tie", "eve")
    judge(client, other, None, "eve")

    def measured(**filters: str) -> tuple[Any, ...]:
        result = client.get("/verdicts/agreement", params=filters).json()
        alpha = None if result["alpha"] is None else round(result["alpha"], 6)
        return result["pairs"], result["compared"], result["verdicts"], alpha

    assert measured(job=client.get(first[0]).json()["job"]) == (3, 3, 6, round(4 / 9, 6))
    assert measured(job=client.get(other).json()["job"]) == (1, 0, 0, None)
    assert measured() == (4, 3, 6, round(4 / 9, 6))
    monkeypatch.setattr(agreement, "MAX_PAIRS", 2)
    assert measured() == (2, 1, 2, 0.0)  # the newest: that of the other job, and the one on which they differ
    assert client.get("/verdicts/agreement", params={"prompt_set": "unknown"}).status_code == 404


def test_perfect_agreement_is_one_and_a_single_choice_undefined(client: TestClient, service: Service) -> None:
    pairs = [f"/pairs/{pair_id}" for pair_id in add_pairs(service, 2)]
    for reviewer in ("ann", "bob"):
        judge(client, pairs[0], "target", reviewer)
    assert client.get("/verdicts/agreement").json()["alpha"] is None
    for reviewer in ("ann", "bob"):
        judge(client, pairs[1], "base", reviewer)
    assert client.get("/verdicts/agreement").json()["alpha"] == 1.0


def test_reviewers_are_measured_on_gold_pairs(client: TestClient, service: Service) -> None:
    pairs = [f"/pairs/{pair_id}" for pair_id in add_pairs(service, 3)]
    for pair, expected in zip(pairs, ("target", "base"), strict=False):
        assert client.put(f"{pair}/gold", json={"expected": expected}).json()["expected"] == expected
    for pair in pairs:
        judge(client, pair, "target", "ann")
    judge(client, pairs[1], "base", "bob")

    def counts() -> list[tuple[Any, ...]]:
        rows = client.get("/verdicts/agreement").json()["reviewers"]
        return [(row["reviewer"], row["judged"], row["gold_judged"], row["gold_right"]) for row in rows]

    assert counts() == [("ann", 3, 2, 1), ("bob", 1, 1, 1)]
    assert [pair["links"]["self"] for pair in client.get("/pairs?gold=true").json()["data"]] == pairs[:2]
    assert [pair["links"]["self"] for pair in client.get("/pairs?gold=false").json()["data"]] == pairs[2:]
    client.put(f"{pairs[1]}/gold", json={"expected": None})
    assert client.get(f"{pairs[1]}/gold").json()["expected"] is None
    assert counts() == [("ann", 3, 1, 1), ("bob", 1, 0, 0)]
    assert client.get(pairs[0]).json()["verdict"]["prefer"] == "target"  # the expected verdict is none of its own
