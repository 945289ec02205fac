"""Human preference tests over HTTP: questions in blind order, answers, results and who may do what."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import func, select

from api.csv_text import csv_text
from api.main import create_app
from dfusion.preference_test import Rate
from service import preference_tests
from service.db.queries import results
from service.db.tables import PreferenceAnswer, PreferenceQuestion
from service.service import Service
from tests.drawn_results import DrawnEvaluation, draw_evaluation
from tests.service import round_body, row_counts, service_of, settings_for
from tests.unit.api.pages.conftest import ADMIN


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The application, shared: each test makes a preference test."""
    folder = tmp_path_factory.mktemp("preference")
    with TestClient(create_app(settings_for(folder, folder / "tiny"))) as client:
        yield client


@pytest.fixture(scope="module")
def drawn(client: TestClient) -> DrawnEvaluation:
    return draw_evaluation(service_of(client))


@pytest.fixture
def test(client: TestClient, drawn: DrawnEvaluation) -> dict[str, Any]:
    """A preference test with three models and eight questions: two prompt sets, two prompts, two seeds."""
    return created(client, drawn)


def created(client: TestClient, drawn: DrawnEvaluation, **body: Any) -> dict[str, Any]:
    response = client.post("/preference-tests", json={"evaluation": drawn.job_id, **body})
    assert response.status_code == 201, response.text
    return dict(response.json())


def path_of(test: dict[str, Any], number: int) -> str:
    return f"/preference-tests/{test['id']}/questions/{number}"


def put(client: TestClient, test: dict[str, Any], number: int, choice: Any, rater: str = "ann") -> Any:
    return client.put(f"{path_of(test, number)}/answer", json={"choice": choice, "rater": rater})


def models_shown(client: TestClient, test: dict[str, Any], number: int, rater: str) -> list[str]:
    """The models of the images of a question in the rater's order, which the API does not tell."""
    shown = client.get(path_of(test, number), params={"rater": rater}).json()["images"]
    with service_of(client).uow.reading() as session:
        question = session.get(PreferenceQuestion, (test["id"], number))
        assert question is not None
        samples = results.samples(session, question.samples)
    by_image = {f"/artifacts/{row.image_artifact_id}": row.model_id for row in samples.values()}
    return [by_image[image] for image in shown]


def choose(client: TestClient, test: dict[str, Any], number: int, model: str | None, rater: str) -> None:
    """Choose the image of a model."""
    choice = "none" if model is None else models_shown(client, test, number, rater).index(model) + 1
    assert put(client, test, number, choice, rater).status_code == 200


def test_a_test_asks_for_every_prompt_and_seed(client: TestClient, drawn: DrawnEvaluation) -> None:
    test = created(client, drawn, name="figure 6")
    assert (test["name"], test["evaluation"], test["models"]) == ("figure 6", drawn.job_id, drawn.models)
    assert (test["questions"], test["answers"]) == (8, 0)
    assert client.get(f"/preference-tests/{test['id']}").json() == test
    assert client.get("/preference-tests", params={"evaluation": drawn.job_id}).json()["data"][0] == test

    asked = set()
    for number in range(8):
        question = client.get(path_of(test, number), params={"rater": "ann"}).json()
        assert len(question["images"]) == 3 and question["choice"] is None
        assert set(question) == {
            "test", "number", "place", "prompt", "images", "choice", "answered_at", "links"
        }  # fmt: skip
        asked.add((question["prompt"], tuple(sorted(question["images"]))))
    assert len({prompt for prompt, _ in asked}) == 4


def test_questions_are_drawn_evenly_from_the_prompt_sets(client: TestClient, drawn: DrawnEvaluation) -> None:
    test = created(client, drawn, questions=4, models=drawn.models[1:])
    assert (test["questions"], test["models"]) == (4, drawn.models[1:])
    with service_of(client).uow.reading() as session:
        query = select(PreferenceQuestion).where(PreferenceQuestion.test_id == test["id"])
        questions = session.scalars(query).all()
        samples = results.samples(session, [sample for row in questions for sample in row.samples])
    assert sorted(Counter(row.split for row in questions).values()) == [2, 2]
    for row in questions:
        of_question = [samples[sample] for sample in row.samples]
        assert [sample.model_id for sample in of_question] == drawn.models[1:]
        assert len({(sample.split, sample.prompt_index, sample.seed) for sample in of_question}) == 1

    split = questions[0].split
    assert created(client, drawn, prompt_sets=[split])["questions"] == 4


def test_the_order_is_blind_stable_and_balanced(client: TestClient, test: dict[str, Any]) -> None:
    first = [models_shown(client, test, number, "ann") for number in range(8)]
    assert [models_shown(client, test, number, "ann") for number in range(8)] == first
    assert [models_shown(client, test, number, "bob") for number in range(8)] != first

    with service_of(client).uow.reading() as session:
        questions = [session.get_one(PreferenceQuestion, (test["id"], number)) for number in range(8)]
    places: Counter[tuple[str, int]] = Counter()
    for number in range(150):
        for question in questions:
            order = preference_tests.image_order(question, f"rater {number}")
            assert sorted(order) == sorted(question.samples)
            model_of = dict(zip(question.samples, test["models"], strict=True))
            places.update((model_of[sample], place) for place, sample in enumerate(order))
    # 1200 orders: each model is 400 times at each place, with a deviation of 16
    assert len(places) == 9 and all(abs(count - 400) < 80 for count in places.values())


def test_a_rater_gets_all_questions_in_an_order_of_their_own(client: TestClient, test: dict[str, Any]) -> None:
    visited: dict[str, list[int]] = {"ann": [], "bob": []}
    for rater, numbers in visited.items():
        while True:
            following = client.get(f"/preference-tests/{test['id']}/next", params={"rater": rater}).json()
            assert (following["answered"], following["questions"]) == (len(numbers), 8)
            question = following["question"]
            if question is None:
                break
            numbers.append(question["number"])
            assert question["place"] == len(numbers)
            put(client, test, question["number"], "none", rater)
    assert sorted(visited["ann"]) == sorted(visited["bob"]) == list(range(8))
    assert visited["ann"] != visited["bob"]


def test_answers_can_be_repeated_changed_and_removed(client: TestClient, test: dict[str, Any]) -> None:
    for choice in (2, 2, 3, "none"):
        answered = put(client, test, 5, choice)
        assert (answered.status_code, answered.json()["choice"]) == (200, choice)
        assert client.get(f"/preference-tests/{test['id']}").json()["answers"] == 1
    for _ in range(2):
        assert put(client, test, 5, None).json()["choice"] is None
        assert client.get(f"/preference-tests/{test['id']}").json()["answers"] == 0


def test_two_raters_answer_at_once(client: TestClient, test: dict[str, Any]) -> None:
    statuses = []

    def rate(rater: str) -> None:
        for number in range(8):
            statuses.append(put(client, test, number, 1, rater).status_code)

    threads = [Thread(target=rate, args=(rater,)) for rater in ("ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 16
    assert client.get(f"/preference-tests/{test['id']}").json()["answers"] == 16
    assert client.get(f"/preference-tests/{test['id']}/results").json()["raters"] == 2


def test_results_count_models_pairs_prompt_sets_and_positions(
    client: TestClient, test: dict[str, Any], drawn: DrawnEvaluation
) -> None:
    base, first, second = drawn.models
    positions = []
    for rater, chosen in (("ann", [second, second, first, None]), ("bob", [second, base, first, second])):
        for number, model in enumerate(chosen):
            choose(client, test, number, model, rater)
            positions.append(client.get(path_of(test, number), params={"rater": rater}).json()["choice"])

    found = client.get(f"/preference-tests/{test['id']}/results").json()
    assert (found["questions"], found["answers"], found["raters"], found["confidence"]) == (8, 8, 2, 0.95)
    overall, *by_set = found["groups"]
    assert overall["prompt_set"] is None
    assert [(rate["model"], rate["count"], rate["share"]) for rate in overall["models"]] == [
        (base, 1, 0.125),
        (first, 2, 0.25),
        (second, 4, 0.5),
    ]
    assert overall["models"][2]["interval"] == pytest.approx(Rate(4, 8, 0.95).interval)
    assert overall["models"][0]["name"] == "tiny"
    assert overall["none"]["count"] == 1
    pairs = [(pair["model"], pair["other"], pair["wins"], pair["losses"]) for pair in overall["pairs"]]
    assert pairs == [(base, first, 1, 2), (base, second, 1, 4), (first, second, 2, 4)]
    assert [group["answers"] for group in by_set] == [4, 4]
    for place in (1, 2, 3):
        assert found["positions"][place - 1]["count"] == positions.count(place)
    narrow = client.get(f"/preference-tests/{test['id']}/results", params={"confidence": 0.8}).json()
    assert narrow["groups"][0]["models"][2]["interval"] == pytest.approx(Rate(4, 8, 0.8).interval)


def test_results_as_csv(client: TestClient, test: dict[str, Any], drawn: DrawnEvaluation) -> None:
    rater = '=cmd|"/c calc"!A1'
    choose(client, test, 0, drawn.models[1], rater)
    choose(client, test, 1, None, rater)

    response = client.get(f"/preference-tests/{test['id']}/answers.csv")
    assert response.headers["content-type"].startswith("text/csv")
    assert response.headers["content-disposition"] == f'attachment; filename="{test["id"]}-answers.csv"'
    chosen, none = csv.DictReader(io.StringIO(response.text, newline=""))
    assert chosen["rater"] == "'" + rater
    assert (chosen["model"], chosen["name"]) == (drawn.models[1], "tiny, round 1")
    assert chosen["shown"].split(";")[int(chosen["position"]) - 1] == drawn.models[1]
    assert (none["model"], none["name"], none["position"], none["sample"]) == ("", "none", "", "")

    table = client.get(f"/preference-tests/{test['id']}/results.csv")
    assert table.headers["content-type"].startswith("text/csv")
    lines = list(csv.DictReader(io.StringIO(table.text, newline="")))
    assert len(lines) == 3 * 4  # all and two prompt sets; three models and none
    assert [(line["prompt_set"], line["name"], line["wins"], line["share"]) for line in lines[:4]] == [
        ("", "tiny", "0", "0.0"),
        ("", "tiny, round 1", "1", "0.5"),
        ("", "tiny, round 2", "0", "0.0"),
        ("", "none", "1", "0.5"),
    ]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(text: str) -> None:
    [[cell, harmless]] = csv.reader(io.StringIO(csv_text([[text, f"a {text}"]]), newline=""))
    assert (cell, harmless) == (f"'{text}", f"a {text}")


def test_all_pages_of_answers_are_in_the_csv(
    client: TestClient, test: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.routes.preference_tests._ANSWERS_PER_READ", 3)
    for rater in ("ann", "bob"):
        for number in range(3):
            put(client, test, number, 1, rater)
    lines = list(csv.DictReader(io.StringIO(client.get(f"/preference-tests/{test['id']}/answers.csv").text)))
    assert [(line["rater"], line["question"]) for line in lines] == [
        (rater, str(number)) for rater in ("ann", "bob") for number in range(3)
    ]


@pytest.mark.parametrize(
    ("body", "pointer", "code"),
    [
        ({"evaluation": "job_x"}, "/evaluation", "unknown_job"),
        ({"models": ["tiny"]}, "/models", "invalid_request"),
        ({"models": ["tiny"] * 9}, "/models", "invalid_request"),
        ({"models": ["tiny", "tiny"]}, "/models", "invalid_request"),
        ({"models": ["tiny", "nobody-knows"]}, "/models/1", "unknown_model"),
        ({"prompt_sets": ["nobody-knows"]}, "/prompt_sets/0", "unknown_prompt_set"),
        ({"questions": 9}, "/questions", "invalid_request"),
        ({"questions": 1001}, "/questions", "invalid_request"),
        ({"surprise": 1}, "/surprise", "invalid_request"),
        ({"name": " "}, "/name", "invalid_request"),
    ],
)
def test_invalid_tests_are_refused(
    client: TestClient, drawn: DrawnEvaluation, body: dict[str, Any], pointer: str, code: str
) -> None:
    before = row_counts(service_of(client))
    response = client.post("/preference-tests", json={"evaluation": drawn.job_id, **body})
    assert (response.status_code, response.json()["code"]) == (422, code)
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]
    assert row_counts(service_of(client)) == before


def test_only_an_evaluation_that_has_succeeded_has_a_test(client: TestClient, drawn: DrawnEvaluation) -> None:
    round_job = client.post("/rounds", json=round_body()).json()["id"]
    response = client.post("/preference-tests", json={"evaluation": round_job})
    assert response.status_code == 422
    assert "expected an evaluation" in response.json()["detail"]

    spec = client.get(f"/jobs/{drawn.job_id}").json()["spec"]
    queued = client.post("/evaluations", json=spec).json()["id"]
    response = client.post("/preference-tests", json={"evaluation": queued})
    assert (response.status_code, response.json()["code"]) == (409, "conflict")


@pytest.mark.parametrize(
    ("number", "body", "status", "pointer"),
    [
        (0, {"choice": 4, "rater": "ann"}, 422, "/choice"),
        (0, {"choice": 0, "rater": "ann"}, 422, "/choice"),
        (0, {"choice": True, "rater": "ann"}, 422, "/choice"),
        (0, {"choice": 1}, 422, "/rater"),
        (0, {"choice": 1, "rater": "  "}, 422, "/rater"),
        (8, {"choice": 1, "rater": "ann"}, 404, None),
    ],
)
def test_invalid_answers_are_refused(
    client: TestClient, test: dict[str, Any], number: int, body: dict[str, Any], status: int, pointer: str | None
) -> None:
    response = client.put(f"{path_of(test, number)}/answer", json=body)
    assert response.status_code == status, response.text
    if pointer is not None:
        assert pointer in [error["pointer"] for error in response.json()["errors"]]
    assert client.get(f"/preference-tests/{test['id']}").json()["answers"] == 0


def test_an_evaluation_cannot_be_deleted_before_its_tests(client: TestClient) -> None:
    service: Service = service_of(client)
    drawn = draw_evaluation(service)
    test = created(client, drawn)
    put(client, test, 0, 1)
    response = client.delete(f"/jobs/{drawn.job_id}")
    assert (response.status_code, response.json()["code"]) == (409, "job_in_use")
    assert test["id"] in response.json()["detail"]

    assert client.delete(f"/preference-tests/{test['id']}").status_code == 204
    assert client.get(f"/preference-tests/{test['id']}").status_code == 404
    assert client.delete(f"/preference-tests/{test['id']}").status_code == 404
    assert put(client, test, 0, 1).status_code == 404
    with service.uow.reading() as session:
        for table in (PreferenceQuestion, PreferenceAnswer):
            assert session.scalar(select(func.count()).select_from(table).where(table.test_id == test["id"])) == 0
    assert client.delete(f"/jobs/{drawn.job_id}").status_code == 204


def test_scopes_decide_who_creates_answers_and_reads(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, tmp_path / "tiny", auth=True, bootstrap_admin_key=SecretStr(ADMIN))
    with TestClient(create_app(settings)) as client:
        drawn = draw_evaluation(service_of(client))
        keys = {}
        for scope in ("read", "review", "submit"):
            admin = {"Authorization": f"Bearer {ADMIN}"}
            key = client.post("/api-keys", json={"name": f"{scope}er", "scopes": [scope]}, headers=admin).json()["key"]
            keys[scope] = {"Authorization": f"Bearer {key}"}

        body = {"evaluation": drawn.job_id}
        assert client.post("/preference-tests", json=body, headers=keys["review"]).status_code == 403
        made = client.post("/preference-tests", json=body, headers=keys["submit"])
        assert made.status_code == 201
        path = made.headers["location"]

        answer = f"{path}/questions/0/answer"
        assert client.put(answer, json={"choice": 1}, headers=keys["read"]).status_code == 403
        assert client.put(answer, json={"choice": 1, "rater": "other"}, headers=keys["review"]).status_code == 422
        assert client.put(answer, json={"choice": 1}, headers=keys["review"]).status_code == 200
        lines = client.get(f"{path}/answers.csv", headers=keys["read"]).text.splitlines()
        assert lines[1].startswith("reviewer,0,")

        assert client.get(f"{path}/results", headers=keys["read"]).json()["answers"] == 1
        assert client.delete(path, headers=keys["review"]).status_code == 403
        assert client.delete(path, headers=keys["submit"]).status_code == 204
