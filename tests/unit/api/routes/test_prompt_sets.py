"""POST /prompt-sets: JSON, lines, CSV, versions and invalid bodies."""

import json
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from dfusion.prompts import Prompt, PromptList
from service.db.queries import prompt_sets
from service.db.tables import PromptSet
from service.service import Service
from tests.service import service_of
from tests.statements import statements
from tests.unit.api.test_bad_input import row_counts

CAT = {"text": "a cat eating a sandwich", "items": ["cat", "sandwich"], "thresholds": None}
LINES = "a [cat] eating a [sandwich]\n"


def post(client: TestClient, body: str | bytes, media_type: str = "text/plain", **query: str) -> httpx.Response:
    headers = {"Content-Type": media_type}
    return client.post("/prompt-sets", content=body, params=query, headers=headers)


@pytest.mark.parametrize(
    ("media_type", "body"),
    [
        ("text/plain", LINES),
        ("text/plain; charset=utf-8", "\ufeff# a comment\r\n" + LINES.replace("\n", "\r\n")),
        ("text/csv", "\ufefftext,items\r\na cat eating a sandwich,cat;sandwich\r\n"),
        ("application/json", '["a cat eating a sandwich"]'),
    ],
)
def test_text_takes_its_name_from_the_query(client: TestClient, media_type: str, body: str) -> None:
    response = post(client, body.encode(), media_type, name="mine", description="of mine")
    assert response.status_code == 201
    created = response.json()
    assert (created["name"], created["version"], created["description"], created["builtin"]) == (
        "mine",
        1,
        "of mine",
        False,
    )
    assert created["prompts"] == [CAT]
    assert client.get(response.headers["location"]).json() == client.get("/prompt-sets/mine").json() == created
    assert "mine" in [entry["name"] for entry in client.get("/prompt-sets?limit=200").json()["data"]]


@pytest.mark.parametrize(
    "content",
    [
        {"prompts": [CAT]},
        {"text": LINES},
        {"prompt_file": [CAT["text"]], "item_idx_file": {CAT["text"]: [1, 4]}},
    ],
)
def test_json_contains_the_name(client: TestClient, content: dict[str, Any]) -> None:
    response = client.post("/prompt-sets", json={"name": "mine", "description": "of mine", **content})
    assert (response.status_code, response.json()["prompts"]) == (201, [CAT])
    assert (response.json()["name"], response.json()["description"]) == ("mine", "of mine")


@pytest.mark.parametrize(
    ("media_type", "body"),
    [
        ("text/plain", "# pets\r\ufeffa [cafe\u0301]\r\ufeff# comment\r"),
        ("text/csv", "\ufefftext,items\r\n\ufeffa cafe\u0301,\ufeffcafe\u0301\r\n"),
        ("application/json", '\ufeff["\ufeffa cafe\u0301"]'),
        ("application/json", '[" \u200ba [cafe\u0301]"]'),
    ],
)
def test_prompts_are_stored_in_normal_form_without_marks(client: TestClient, media_type: str, body: str) -> None:
    created = post(client, body.encode(), media_type, name="mine")
    assert created.status_code == 201, created.json()
    assert [(prompt["text"], prompt["items"]) for prompt in created.json()["prompts"]] == [("a café", ["café"])]


@pytest.mark.parametrize(
    ("text", "items", "syntax"),
    [
        ("a (blue bird:1.2) in a tree", ["bird", "tree"], ["(blue bird:1.2)"]),
        ("((a fox)) BREAK a hen", ["fox", "hen"], ["((a fox))", "BREAK"]),
        ("a [hat:0.8]", ["hat"], ["hat:0.8"]),
        ("a lamp beneath a shelf made of oak, watercolor, trending on artstation", ["lamp", "shelf", "oak"], []),
    ],
)
def test_items_and_warnings_are_shown(client: TestClient, text: str, items: list[str], syntax: list[str]) -> None:
    created = client.post("/prompt-sets", json={"name": "mine", "text": text}).json()
    [prompt] = created["prompts"]
    assert prompt["items"] == items
    assert created["warnings"] == [
        {"prompt": prompt["text"], "message": f"weighting syntax is read as plain text: {part!r}"} for part in syntax
    ]
    assert client.get("/prompt-sets/mine").json() == created


def test_at_most_100_warnings_are_listed(client: TestClient) -> None:
    created = client.post("/prompt-sets", json={"name": "mine", "text": "a (cat:1.2)\n" * 101}).json()
    assert (created["size"], len(created["warnings"])) == (101, 100)


def test_changed_prompts_create_a_version_and_equal_ones_do_not(client: TestClient, service: Service) -> None:
    first = post(client, LINES, name="mine")
    before = row_counts(service)
    again = client.post("/prompt-sets", json={"name": "mine", "prompts": [CAT]})
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["location"] == first.headers["location"]
    assert row_counts(service) == before
    second = post(client, LINES + LINES, name="mine")  # the same prompt twice is allowed
    assert (second.status_code, second.json()["version"], second.json()["size"]) == (201, 2, 2)
    reverted = post(client, LINES, name="mine")
    assert (reverted.status_code, reverted.json()["version"]) == (201, 3)
    assert client.get("/prompt-sets/mine").json() == reverted.json()
    assert client.get(first.headers["location"]).json() == first.json()


def test_a_prompt_set_is_deleted_unless_a_job_uses_it(client: TestClient) -> None:
    post(client, LINES, name="mine")
    body = {"model": "tiny", "prompt_set": "mine", "sampling": {"num_steps": 4}, "scorers": ["brightness"]}
    job_id = client.post("/samplings", json=body).json()["id"]
    refused = client.delete("/prompt-sets/mine")
    assert (refused.status_code, refused.json()["code"]) == (409, "prompt_set_in_use")
    assert refused.json()["errors"] == [{"pointer": "/name_or_id", "message": f"used by {job_id}"}]

    client.post(f"/jobs/{job_id}/cancel")
    client.delete(f"/jobs/{job_id}")
    assert [client.delete("/prompt-sets/mine").status_code for _ in range(2)] == [204, 404]
    assert client.get("/prompt-sets/mine").status_code == 404
    assert client.delete("/prompt-sets/paper-position-train").json()["code"] == "conflict"


@pytest.mark.parametrize("path", ["/prompt-sets?limit=200", "/jobs?prompt_set=mine", "/pairs?prompt_set=mine"])
def test_lists_do_not_read_the_prompts(client: TestClient, service: Service, path: str) -> None:
    post(client, LINES * 3, name="mine")
    with statements(service.uow.engine) as seen:
        listed = client.get(path)
    assert listed.status_code == 200
    assert any("prompt_sets" in statement for statement, _ in seen)
    assert not [statement for statement, _ in seen if "prompt_sets.prompts," in statement]


def test_the_list_shows_the_number_of_prompts(client: TestClient) -> None:
    post(client, LINES * 3, name="mine")
    listed = client.get("/prompt-sets", params={"limit": 200}).json()["data"]
    assert {row["name"]: row["size"] for row in listed}["mine"] == 3


def test_names_of_built_in_sets_are_reserved(client: TestClient, service: Service) -> None:
    before = row_counts(service)
    response = post(client, LINES, name="paper-position-train")
    assert (response.status_code, response.json()["code"]) == (409, "conflict")
    assert row_counts(service) == before


@pytest.mark.parametrize(
    ("media_type", "body", "query", "status", "code", "pointers"),
    [
        ("text/plain", LINES + "a [dog\nof\n", {"name": "x"}, 422, "invalid_request", ["/lines/2", "/lines/3"]),
        ("text/csv", "text,items\na cat,dog\n", {"name": "x"}, 422, "invalid_request", ["/lines/2"]),
        ("text/plain", LINES, {}, 422, "invalid_parameter", ["/name"]),
        ("text/plain", LINES, {"name": "A b"}, 422, "invalid_parameter", ["/name"]),
        ("text/plain", LINES, {"name": "x", "seed": "1"}, 422, "invalid_parameter", ["/seed"]),
        ("text/plain", "# nothing", {"name": "x"}, 422, "empty_prompt_set", [""]),
        ("text/plain", "", {"name": "x"}, 422, "empty_prompt_set", [""]),
        ("text/plain", b"a caf\xe9", {"name": "x"}, 400, "malformed_text", []),
        ("text/plain", "a cat\0", {"name": "x"}, 400, "malformed_text", []),
        ("text/plain", "a cat\n".encode("utf-16"), {"name": "x"}, 400, "malformed_text", []),
        ("text/plain", "a cat\n<lora:fox:1> a fox", {"name": "x"}, 422, "invalid_request", ["/lines/2"]),
        ("text/plain; charset=latin-1", LINES, {"name": "x"}, 400, "malformed_text", []),
        ("text/plain", LINES * 50_000, {"name": "x"}, 413, "body_too_large", []),
        ("text/html", LINES, {"name": "x"}, 415, "unsupported_media_type", []),
        ("application/json", "", {}, 422, "invalid_request", [""]),
        ("application/json", "null", {}, 422, "invalid_request", [""]),
        ("application/json", "{}", {}, 422, "invalid_request", ["/name"]),
        ("application/json", '{"name": "x"}', {}, 422, "invalid_request", ["/prompts", "/text", "/prompt_file"]),
        ("application/json", '{"name": "x", "prompts": []}', {}, 422, "empty_prompt_set", ["/prompts"]),
        ("application/json", "[]", {"name": "x"}, 422, "empty_prompt_set", [""]),
        ("application/json", '{"name": "x", "text": "a cat"}', {"name": "x"}, 422, "invalid_request", ["/name"]),
        ("application/json", '{"name": "x", "text": "a [cat"}', {}, 422, "invalid_request", ["/lines/1"]),
        ("application/json", '{"name": "x", "text": "a cat", "prompts": []}', {}, 422, "empty_prompt_set", None),
        ("application/json", '{"a cat": [1], "a dog": [1]}', {"name": "x"}, 422, "invalid_request", [""]),
        (
            "application/json",
            json.dumps({"name": "x", "prompt_file": ["a cat"], "mask_thr_file": {"a cat": [0]}}),
            {},
            422,
            "invalid_request",
            ["/mask_thr_file/a cat/0"],
        ),
        (
            "application/json",
            json.dumps({"name": "x", "prompts": [CAT, {**CAT, "items": ["dog"]}, {**CAT, "thresholds": [0.5, 1]}]}),
            {},
            422,
            "invalid_request",
            ["/prompts/1", "/prompts/2/thresholds/1"],
        ),
    ],
)
def test_invalid_bodies_are_rejected_with_pointers_and_not_stored(
    client: TestClient,
    service: Service,
    media_type: str,
    body: str | bytes,
    query: dict[str, str],
    status: int,
    code: str,
    pointers: list[str] | None,
) -> None:
    before = row_counts(service)
    response = post(client, body, media_type, **query)
    assert (response.status_code, response.json()["code"]) == (status, code)
    if pointers is not None:
        assert [error["pointer"] for error in response.json()["errors"]] == pointers
    assert row_counts(service) == before


@pytest.mark.parametrize(
    ("media_type", "body", "code", "place"),
    [
        ("text/plain", "a cat\na café".encode("cp1252"), "malformed_text", "0xe9 at line 2, byte 6"),
        ("text/csv", "text\r\na dog\r\na “cat”".encode("cp1252"), "malformed_text", "0x93 at line 3, byte 3"),
        (
            "text/plain",
            "a cat".encode("utf-16"),
            "malformed_text",
            "0xff at line 1, byte 1; the file is probably UTF-16",
        ),
        ("application/json", '{\n"name": "ü"}'.encode("cp1252"), "malformed_json", "0xfc at line 2, byte 10"),
    ],
)
def test_another_encoding_is_reported_with_line_and_byte(
    client: TestClient, media_type: str, body: bytes, code: str, place: str
) -> None:
    response = post(client, body, media_type, name="x")
    assert (response.status_code, response.json()["code"]) == (400, code)
    assert place in response.json()["detail"]


def test_prompts_of_other_languages_are_asked_to_be_marked(client: TestClient) -> None:
    response = post(client, "a cat\nein Hund auf einem Sofa\n一只猫\n[一只猫]\n", name="x")
    assert [error["pointer"] for error in response.json()["errors"]] == ["/lines/2", "/lines/3"]
    assert all("mark them in brackets" in error["message"] for error in response.json()["errors"])


def test_a_single_file_of_the_released_code_is_rejected_with_the_expected_fields(client: TestClient) -> None:
    response = post(client, '{"a cat": [1]}', "application/json", name="x")
    assert '"prompt_file"' in response.json()["detail"]
    assert '"item_idx_file"' in response.json()["detail"]


def test_other_routes_reject_text(client: TestClient) -> None:
    response = client.post("/rounds", content=LINES, headers={"Content-Type": "text/plain"})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


def test_openapi_describes_three_media_types_with_working_examples(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    content = document["paths"]["/prompt-sets"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "text/plain", "text/csv"}
    for example in content["application/json"]["examples"].values():
        assert client.post("/prompt-sets", json=example["value"]).status_code in (200, 201)
    for media_type in ("text/plain", "text/csv"):
        assert post(client, content[media_type]["example"], media_type, name=media_type[5:]).status_code == 201
    references = _references(content)
    assert references
    for reference in references:
        name = reference.removeprefix("#/components/schemas/")
        assert name in document["components"]["schemas"]


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        references = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return references.union(*map(_references, value.values()))
    if isinstance(value, list):
        return set().union(*map(_references, value))
    return set()


def test_a_changed_built_in_list_is_a_new_version(client: TestClient) -> None:
    """Two lists at once. A set that a user has given one of their names stays the newest."""

    def ensure(text: str) -> list[tuple[str | None, int, str]]:
        prompts = (Prompt(text=text, items=(text.removeprefix("a "),)),)
        lists = [PromptList(name=name, prompts=prompts) for name in ("first-list", "second-list")]
        with service_of(client).uow.writing() as session:
            prompt_sets.ensure_builtin(session, lists)
            query = select(PromptSet).where(PromptSet.name.in_(("first-list", "second-list")))
            rows = session.scalars(query.order_by(PromptSet.name, PromptSet.version))
            return [(row.name, row.version, row.prompts[0]["text"]) for row in rows]

    own = {"name": "second-list", "prompts": [{"text": "a dog"}]}
    assert client.post("/prompt-sets", json=own).status_code == 201
    assert ensure("a cat") == ensure("a cat") == [("first-list", 1, "a cat"), ("second-list", 1, "a dog")]
    changed = [("first-list", 1, "a cat"), ("first-list", 2, "a bird"), ("second-list", 1, "a dog")]
    assert ensure("a bird") == ensure("a bird") == changed
