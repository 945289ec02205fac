"""The OpenAPI document: its golden copy and the validity of its examples."""

import json
import re
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from api.examples import REQUESTS, RESPONSES
from service.ids import kind_of
from tests.openapi import COMMAND, GOLDEN, document, text
from tests.unit.api.conftest import Live

DOCUMENT = document()
OPERATIONS: dict[str, dict[str, Any]] = {
    operation["operationId"]: operation for path in DOCUMENT["paths"].values() for operation in path.values()
}


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    """Create a validator for a part of the document, which may refer to its components."""
    return Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def json_of(content: dict[str, Any]) -> dict[str, Any]:
    json_content = content.get("content", {}).get("application/json", {})
    assert isinstance(json_content, dict)
    return json_content


def test_document_equals_its_golden_copy() -> None:
    assert text() == GOLDEN.read_text("utf-8"), f"the API has changed: review the difference, then run `{COMMAND}`"


def test_every_request_with_a_body_has_an_example() -> None:
    assert {name for name, operation in OPERATIONS.items() if "requestBody" in operation} == set(REQUESTS)


@pytest.mark.parametrize("name", REQUESTS)
def test_request_examples_are_valid(name: str) -> None:
    content = json_of(OPERATIONS[name]["requestBody"])
    for example in content["examples"].values():
        validator(content["schema"]).validate(example["value"])


@pytest.mark.parametrize("name", RESPONSES)
def test_response_examples_are_valid_and_complete(name: str) -> None:
    schema = DOCUMENT["components"]["schemas"][name]
    validator(schema).validate(schema["examples"][0])
    assert set(schema["examples"][0]) == set(schema["properties"])


def test_every_json_response_has_an_example() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    without = [
        (name, status)
        for name, operation in OPERATIONS.items()
        for status, response in operation["responses"].items()
        if (schema := json_of(response).get("schema")) is not None
        and "examples" not in schemas[schema["$ref"].rpartition("/")[2]]
    ]
    assert without == []


def test_ids_in_examples_are_valid() -> None:
    words = set(re.findall(r"\b(?:job|stg|smp|pair|mdl|art|set|exp|key)_\w{20,}", json.dumps([RESPONSES, REQUESTS])))
    assert len(words) > 10
    assert [word for word in words if kind_of(word) is None] == []


def test_links_refer_to_operations_and_their_parameters() -> None:
    links = [
        link
        for operation in OPERATIONS.values()
        for response in operation["responses"].values()
        for link in response.get("links", {}).values()
    ]
    assert len(links) > 40
    for link in links:
        parameters = {parameter["name"] for parameter in OPERATIONS[link["operationId"]]["parameters"]}
        assert set(link["parameters"]) <= parameters


SUBMISSIONS = [
    pytest.param(path, example["value"], id=f"{path} {name}")
    for path, operations in DOCUMENT["paths"].items()
    if any(parameter["name"] == "dry_run" for parameter in operations.get("post", {}).get("parameters", ()))
    for name, example in REQUESTS[operations["post"]["operationId"]].items()
]


@pytest.fixture(scope="module")
def real_ids(live: Live) -> dict[str, str]:
    """Ids that exist in the live service, by the id in the examples."""
    with live.client() as client:
        pair = next(client.pairs(job=live.done_job))
        example = RESPONSES["PairOut"]
        return {
            RESPONSES["JobOut"]["id"]: live.done_job,
            RESPONSES["JobOut"]["model"]: client.model("tiny").id,
            RESPONSES["ModelOut"]["id"]: next(client.models(job=live.done_job)).id,
            example["id"]: pair.id,
            example["reference"]["id"]: pair.reference.id,
            example["base"]["id"]: pair.base.id,
        }


@pytest.mark.parametrize(("path", "body"), SUBMISSIONS)
def test_submission_examples_are_accepted(
    live: Live, real_ids: dict[str, str], path: str, body: dict[str, Any]
) -> None:
    text = json.dumps(body)
    for example_id, real_id in real_ids.items():
        text = text.replace(example_id, real_id)
    response = httpx.post(f"{live.url}{path}?dry_run=true", json=json.loads(text), trust_env=False)
    assert (response.status_code, response.json().get("detail")) == (200, None)
    assert response.json()["dry_run"] is True


def test_all_submissions_have_examples() -> None:
    assert len(SUBMISSIONS) > 10
