"""Invalid requests are rejected with their error code and change nothing in the database."""

import json
import re
from collections.abc import Iterator
from time import process_time
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from service.ids import IdKind
from service.service import Service
from tests.service import PROMPTS, round_body, row_counts, settings_for


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The application, shared by all tests: rejected requests change nothing. It checks every 422 of theirs."""
    folder = tmp_path_factory.mktemp("refusing")
    with TestClient(create_app(settings_for(folder, folder / "tiny")), raise_server_exceptions=False) as opened:
        opened.event_hooks = {"response": [_require_pointer]}
        yield opened


def _require_pointer(response: httpx.Response) -> None:
    """Each 422 points to what is wrong."""
    if response.status_code == 422:
        response.read()
        assert response.json()["errors"], response.text


def unknown(kind: IdKind) -> str:
    """Return an unused id of this kind. It is constant, because it is part of test names."""
    return f"{kind}_{'0' * 26}"


@pytest.mark.parametrize(
    ("changes", "code", "pointer"),
    [
        ({"surprise": 1}, "invalid_request", "/surprise"),
        ({"sampling": {"nm_steps": 4}}, "invalid_request", "/sampling/nm_steps"),
        ({"prompts": []}, "empty_prompt_set", "/prompts"),
        ({"prompts": None}, "invalid_request", "/prompt_set"),
        ({"prompt_set": "shapes-attribute-train"}, "invalid_request", "/prompts"),
        ({"training": {"algorithm": "ddpo", "beta": 2}}, "invalid_request", "/training/beta"),
        ({"reward": {"kind": "weighted", "parts": []}}, "invalid_request", "/reward"),
        ({"prompts": None, "prompt_set": "nobody-knows"}, "unknown_prompt_set", "/prompt_set"),
        ({"prompts": None, "prompt_set": unknown(IdKind.PROMPT_SET)}, "unknown_prompt_set", "/prompt_set"),
        ({"held_out_prompt_set": "nobody-knows"}, "unknown_prompt_set", "/held_out_prompt_set"),
        ({"model": "nobody-knows"}, "unknown_model", "/model"),
        ({"model": unknown(IdKind.MODEL)}, "unknown_model", "/model"),
        ({"model": unknown(IdKind.JOB)}, "unknown_model", "/model"),
        ({"reward": "nobody-knows"}, "unknown_scorer", "/reward"),
        ({"reward": None}, "unknown_scorer", "/reward"),
        ({"evaluation": {"scorers": ["brightness", "x"]}}, "unknown_scorer", "/evaluation/scorers/1"),
        ({"evaluation": {"samples_per_prompt": 257}}, "invalid_request", "/evaluation/samples_per_prompt"),
        ({"evaluation": {"every_round": "often"}}, "invalid_request", "/evaluation/every_round"),
        ({"evaluation": {"seed": -1}}, "invalid_request", "/evaluation/seed"),
        ({"evaluation": []}, "invalid_request", "/evaluation"),
        ({"fusion": []}, "invalid_request", "/fusion"),
        ({"watch": 1}, "invalid_request", "/watch"),
        ({"stop_when": ["rain"]}, "invalid_request", "/stop_when/0"),
        ({"review": "maybe"}, "invalid_request", "/review"),
        ({"review": "sample", "review_pairs": 0}, "invalid_request", "/review_pairs"),
        ({"update_reward": "praise"}, "invalid_request", "/update_reward"),
        ({"sampling": {"num_steps": 0}}, "invalid_request", "/sampling/num_steps"),
        ({"sampling": {"num_steps": 2.5}}, "invalid_request", "/sampling/num_steps"),
        ({"sampling": {"eta": 0}}, "invalid_request", "/sampling/eta"),
        ({"prompts": [{**PROMPTS[1], "thresholds": [0.02]}]}, "invalid_request", "/prompts/0"),
        ({"sampling": {"num_steps": 1}}, "invalid_request", "/fusion/first_step"),
        ({"fusion": {"first_step": 3, "last_step": 2}}, "invalid_request", "/fusion/last_step"),
        ({"rounds": 0}, "invalid_request", "/rounds"),
        ({"training": {"inner_epochs": 10**400}}, "invalid_request", "/training/inner_epochs"),
        ({"training": {"examples_per_update": 1 << 63}}, "invalid_request", "/training/examples_per_update"),
        ({"pairing": {"reference_uses": 1 << 64}}, "invalid_request", "/pairing/reference_uses"),
        ({"samples_per_prompt": 1}, "invalid_request", "/samples_per_prompt"),
        ({"seed": -1}, "invalid_request", "/seed"),
        ({"seed": 1 << 53}, "invalid_request", "/seed"),
        ({"label": "x" * 201}, "invalid_request", "/label"),
        ({"priority": 101}, "invalid_request", "/priority"),
        ({"priority": -101}, "invalid_request", "/priority"),
        ({"prompts": [{**PROMPTS[0], "items": ["cat"]}]}, "invalid_request", "/prompts/0"),
        ({"prompts": [{**PROMPTS[0], "items": ["  "]}]}, "invalid_request", "/prompts/0"),
        ({"prompts": [{**PROMPTS[0], "thresholds": [1.0]}]}, "invalid_request", "/prompts/0/thresholds/0"),
        ({"prompts": [{**PROMPTS[0], "thresholds": []}]}, "invalid_request", "/prompts/0"),
        ({"prompts": [{**PROMPTS[0], "items": []}]}, "invalid_request", "/prompts/0/items"),
        ({"prompts": [{**PROMPTS[0], "text": ""}]}, "invalid_request", "/prompts/0/text"),
        ({"prompts": PROMPTS * 40, "samples_per_prompt": 1024}, "too_many_images", "/samples_per_prompt"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_invalid_rounds_are_rejected_with_code_and_pointer(
    client: TestClient, service: Service, changes: dict[str, Any], code: str, pointer: str, dry_run: bool
) -> None:
    before = row_counts(service)
    response = client.post("/rounds", json=round_body(**changes), params={"dry_run": dry_run})
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["code"] == code
    assert pointer in [error["pointer"] for error in problem["errors"]]
    assert row_counts(service) == before


@pytest.mark.parametrize(
    ("path", "body", "pointers"),
    [
        ("/evaluations", {"models": ["tiny"]}, {"/prompt_sets", "/prompts"}),
        ("/evaluations", {"models": ["tiny", "tiny"], "prompts": PROMPTS}, {"/models"}),
        ("/fusions", {}, {"/pair", "/pairs", "/sampling"}),
        ("/fusions", {"pair": unknown(IdKind.PAIR), "sampling": unknown(IdKind.JOB)}, {"/pair", "/sampling"}),
        ("/trainings", {}, {"/pairs", "/jobs"}),
        ("/exports", {"model": "tiny", "format": "parquet"}, {"/format"}),
        ("/exports", {"model": "tiny", "format": "kohya"}, {"/model"}),
        ("/prompt-sets", {"name": "x"}, {"/prompts", "/text", "/prompt_file"}),
        ("/prompt-sets", {"name": "x", "text": "a [cat]", "mask_thr_file": {}}, {"/prompt_file"}),
    ],
)
def test_fields_that_do_not_fit_together_are_named(
    client: TestClient, path: str, body: dict[str, Any], pointers: set[str]
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 422
    assert {error["pointer"] for error in response.json()["errors"]} == pointers


def test_every_field_of_every_request_is_pointed_to(client: TestClient, service: Service) -> None:
    """Each field in turn has a value that none accepts."""
    before = row_counts(service)
    document = client.get("/openapi.json").json()
    checked = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content is None:
                continue
            body = next(iter(content["examples"].values()))["value"]
            schema = content["schema"]
            name = schema.get("$ref", "").rpartition("/")[2]
            fields = document["components"]["schemas"][name]["properties"] if name else schema.get("properties", {})
            for field in fields:
                wrong = {**body, field: {"surprise": []}}
                response = client.request(method, re.sub(r"{\w+}", "x", path), json=wrong)
                pointers = [error["pointer"] for error in response.json()["errors"]]
                assert response.status_code == 422, (path, field, response.text)
                assert any(f"{pointer}/".startswith(f"/{field}/") for pointer in pointers), (path, field, pointers)
                checked += 1
    assert checked > 60
    assert row_counts(service) == before


def test_a_reused_idempotency_key_is_pointed_to(client: TestClient) -> None:
    headers = {"Idempotency-Key": "used"}
    assert client.post("/rounds", json=round_body(), headers=headers).status_code == 202
    response = client.post("/rounds", json=round_body(seed=8), headers=headers)
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == ["/idempotency-key"]


def test_an_alias_refers_to_a_model_by_name_alias_or_id(client: TestClient) -> None:
    by_name = client.put("/aliases/first", json={"model": "tiny"}).json()
    for model in ("first", by_name["id"]):
        again = client.put("/aliases/second", json={"model": model})
        assert (again.status_code, again.json()["id"]) == (200, by_name["id"])
    response = client.put("/aliases/second", json={"model": "nobody-knows"})
    assert (response.status_code, response.json()["code"]) == (422, "unknown_model")
    assert [error["pointer"] for error in response.json()["errors"]] == ["/model"]


def _body_with_guidance(number: str) -> bytes:
    return json.dumps(round_body(sampling={"guidance_scale": "?"})).replace('"?"', number).encode()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "malformed_json"),
        (b"", 422, "invalid_request"),
        (b"null", 422, "invalid_request"),
        (b"[]", 422, "invalid_request"),
        (b"[" * 100_000, 400, "malformed_json"),
        (b'{"seed": 1, "seed": 2}', 400, "malformed_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "malformed_json"),
        (b'{"label": "\xff"}', 400, "malformed_json"),
        (b'{"label": "\\ud800"}', 400, "malformed_json"),
        (b'{"label": "\\u0000"}', 400, "malformed_json"),
        (b"[" * 500 + b"]" * 500, 400, "malformed_json"),
        (b"[" * 900 + b"]" * 900, 400, "malformed_json"),
        (b"[" * 101 + b"]" * 101, 400, "malformed_json"),
        (b"[" * 100 + b"]" * 100, 422, "invalid_request"),
        (b'{"\\u0000": 1}', 400, "malformed_json"),
        (b"[" + b"1," * (1 << 17) + b"1]", 413, "body_too_large"),  # 131,072 values may be in 1 MiB
        (b"[" + b"1," * ((1 << 17) - 2) + b"1]", 422, "invalid_request"),
        (_body_with_guidance("1e999"), 422, "invalid_request"),
        (b" " * ((1 << 20) + 1), 413, "body_too_large"),
    ],
)
def test_malformed_bodies_are_rejected(
    client: TestClient, service: Service, body: bytes, status: int, code: str
) -> None:
    before = row_counts(service)
    response = client.post("/rounds", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert row_counts(service) == before


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_rejected(client: TestClient, number: str) -> None:
    body = _body_with_guidance(number)
    response = client.post("/rounds", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert [error["pointer"] for error in response.json()["errors"]] == ["/sampling/guidance_scale"]


def test_a_streamed_body_above_the_limit_is_rejected(client: TestClient) -> None:
    def stream() -> Any:
        for _ in range(20):
            yield b" " * (1 << 16)

    response = client.post("/rounds", content=stream(), headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip"])
def test_compressed_bodies_are_rejected(client: TestClient, coding: str) -> None:
    response = client.post("/rounds", json=round_body(), headers={"Content-Encoding": coding})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
    assert response.headers["accept-encoding"] == "identity"


def test_unsupported_content_types_are_rejected(client: TestClient) -> None:
    response = client.post("/rounds", data={"prompts": "a cat"})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/nowhere", 404, "not_found"),
        ("/jobs/", 404, "not_found"),
        ("/jobs/x", 404, "not_found"),
        ("/jobs/%00", 404, "not_found"),
        (f"/jobs/{unknown(IdKind.JOB)}", 404, "not_found"),
        (f"/jobs/{unknown(IdKind.SAMPLE)}", 404, "not_found"),
        (f"/jobs/{unknown(IdKind.JOB)}/events", 404, "not_found"),
        (f"/jobs/{unknown(IdKind.JOB)}/metrics", 404, "not_found"),
        (f"/samples/{unknown(IdKind.PAIR)}", 404, "not_found"),
        (f"/pairs/{unknown(IdKind.PAIR)}", 404, "not_found"),
        (f"/models/{unknown(IdKind.SAMPLE)}", 404, "not_found"),
        (f"/artifacts/{unknown(IdKind.ARTIFACT)}", 404, "not_found"),
        ("/artifacts/..%2f..%2fdfusion.db", 404, "not_found"),
        ("/prompt-sets/nobody-knows", 404, "not_found"),
        (f"/pairs?job={unknown(IdKind.SAMPLE)}", 404, "not_found"),
        ("/jobs?limit=0", 422, "invalid_parameter"),
        ("/jobs?limit=201", 422, "invalid_parameter"),
        ("/jobs?state=tired", 422, "invalid_parameter"),
        ("/jobs?stat=queued", 422, "invalid_parameter"),
        ("/jobs?cursor=!", 422, "invalid_cursor"),
        ("/jobs?cursor=%FF", 422, "invalid_cursor"),
        ("/jobs?cursor=eA", 422, "invalid_cursor"),  # "x"
        ("/samples?cursor=c21wXzA", 422, "invalid_cursor"),  # "smp_0"
        ("/samples?role=hero", 422, "invalid_parameter"),
        ("/samples?round=99999999999999999999", 422, "invalid_parameter"),
        (f"/jobs/{unknown(IdKind.JOB)}?wait=nan", 422, "invalid_parameter"),
    ],
)
def test_invalid_paths_and_parameters_are_rejected(client: TestClient, path: str, status: int, code: str) -> None:
    response = client.get(path)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"


def test_an_event_cursor_that_is_no_number_is_rejected(client: TestClient) -> None:
    job = client.post("/rounds", json=round_body()).json()["id"]
    for cursor in ("YQ", "LTE", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5"):  # "a", "-1", and a number past 64 bits
        response = client.get(f"/jobs/{job}/events", params={"cursor": cursor})
        assert (response.status_code, response.json()["code"]) == (422, "invalid_cursor")


def test_many_parameters_take_time_in_proportion(client: TestClient) -> None:
    """A request line of 64 KB has room for 20,000. Comparing each with all others took seconds."""
    query = "&".join(f"{number:x}" for number in range(12_000))
    started = process_time()
    assert client.get(f"/healthz?{query}").status_code == 200
    assert process_time() - started < 1


@pytest.mark.parametrize("path", ["/jobs?limit=1&limit=2", "/samples?job=a&job=b", "/workers?state=idle&x=1&x=2"])
def test_a_repeated_parameter_is_rejected_with_its_name(client: TestClient, path: str) -> None:
    """Of its values all but the last would be ignored."""
    response = client.get(path)
    name = path.split("&")[-1].split("=")[0]
    assert (response.status_code, response.json()["code"]) == (422, "invalid_parameter")
    assert response.json()["errors"] == [{"pointer": f"/{name}", "message": "expected one value, got several"}]


def test_an_unsupported_method_is_rejected_as_a_problem(client: TestClient) -> None:
    response = client.delete("/jobs")
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")


def test_allow_names_all_methods_of_a_path(client: TestClient) -> None:
    """A path may belong to several routes."""
    allowed = {
        path: client.patch(path).headers["allow"]
        for path in ("/jobs", "/prompt-sets", "/aliases/champion", f"/artifacts/{unknown(IdKind.ARTIFACT)}")
    }
    assert list(allowed.values()) == ["GET, HEAD", "GET, HEAD, POST", "DELETE, PUT", "GET, HEAD"]
