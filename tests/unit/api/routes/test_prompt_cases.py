"""The rows of the cases page about prompts, through the service."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from tests.prompt_cases import CASES, ENCODED, MARKED_COMMENT, PromptCase
from tests.service import round_body, settings_for


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One application for all rows: a dry run stores nothing, and each prompt set has its own name."""
    folder = tmp_path_factory.mktemp("prompt-cases")
    app = create_app(settings_for(folder / "data", Path("tiny")))
    with TestClient(app, raise_server_exceptions=False) as opened:
        yield opened


def check_warnings(shown: dict[str, Any], case: PromptCase) -> None:
    messages = [f"weighting syntax is read as plain text: {part!r}" for part in case.warned_of]
    assert shown["warnings"] == [{"prompt": case.text, "message": message} for message in messages]


@pytest.mark.parametrize("row", CASES)
def test_a_prompt_set(row: str, client: TestClient) -> None:
    """As lines, as CSV and as JSON, which give the same prompt."""
    case = CASES[row]
    name = row.replace("_", "-")
    quoted = '"' + case.given.replace('"', '""') + '"'
    uploads: list[dict[str, Any]] = [
        {"content": case.given.encode(), "headers": {"Content-Type": "text/plain"}, "params": {"name": name}},
        {"content": f"text\n{quoted}\n".encode(), "headers": {"Content-Type": "text/csv"}, "params": {"name": name}},
        {"json": {"name": name, "prompts": [{"text": case.given}]}},
    ]
    for upload in uploads:
        response = client.post("/prompt-sets", **upload)
        if case.refused:
            assert response.status_code == 422
            assert case.refused in response.json()["errors"][0]["message"]
            continue

        stored = response.json()
        assert response.status_code in (200, 201), stored
        [prompt] = stored["prompts"]
        assert (prompt["text"], tuple(prompt["items"])) == (case.text, case.items)
        check_warnings(stored, case)
        assert stored["version"] == 1  # all three are equal


@pytest.mark.parametrize("row", CASES)
def test_a_prompt_of_a_round(row: str, client: TestClient) -> None:
    """The dry run shows the items before work begins, or the field that is refused."""
    case = CASES[row]
    response = client.post("/rounds?dry_run=true", json=round_body(prompts=[{"text": case.given}]))
    if case.refused:
        [problem] = response.json()["errors"]
        assert (response.status_code, problem["pointer"]) == (422, "/prompts/0")
        assert case.refused in problem["message"]
        return
    assert response.json()["prompts"] == [{"text": case.text, "items": list(case.items)}]
    check_warnings(response.json(), case)


@pytest.mark.parametrize("path", ["/rounds", "/samplings", "/evaluations"])
def test_a_negative_prompt_with_weights(path: str, client: TestClient) -> None:
    negative = "(worst quality:1.4), blurry"
    names = {"models": ["tiny"]} if path == "/evaluations" else {"model": "tiny"}
    scorers = {"reward": "brightness"} if path == "/rounds" else {"scorers": ["brightness"]}
    body = {
        **names,
        **scorers,
        "prompts": [{"text": "a cat"}],
        "sampling": {"negative_prompt": negative},
    }
    response = client.post(f"{path}?dry_run=true", json=body)
    message = "weighting syntax is read as plain text: '(worst quality:1.4)'"
    assert response.json()["warnings"] == [{"prompt": negative, "message": message}]


def test_a_byte_order_mark_before_a_comment(client: TestClient) -> None:
    stored = client.post(
        "/prompt-sets",
        content=MARKED_COMMENT.encode(),
        headers={"Content-Type": "text/plain"},
        params={"name": "marked"},
    ).json()
    assert [(prompt["text"], prompt["items"]) for prompt in stored["prompts"]] == [("a cat", ["cat"])]


@pytest.mark.parametrize("encoding", ENCODED)
def test_a_text_file_in_another_encoding(encoding: str, client: TestClient) -> None:
    content, message = ENCODED[encoding]
    for media_type in ("text/plain", "text/csv", "application/json"):
        response = client.post(
            "/prompt-sets", content=content, headers={"Content-Type": media_type}, params={"name": "encoded"}
        )
        assert response.status_code in (400, 422)
        assert f"expected text in UTF-8, {message}" in response.text, media_type


def generated_files() -> Iterator[tuple[PromptCase, str, bytes]]:
    """Lines and JSON of every prompt in some encodings and with some line ends, in turn."""
    encodings = itertools.cycle(["utf-8", "utf-16", "utf-8-sig", "cp1252", "utf-8", "utf-16-le"])
    ends = itertools.cycle(["\n", "\r\n", "\r"])
    for case, _ in itertools.product(CASES.values(), range(5)):
        end = next(ends)
        forms = {
            "text/plain": "\n".join(["# a comment", "", case.given, "a [hat]"]),
            "application/json": json.dumps({"prompts": [{"text": case.given}, {"text": "a [hat]"}]}, indent=1),
        }
        for media_type, text in forms.items():
            encoding = next(encodings)
            yield case, media_type, text.replace("\n", end).encode(encoding, "replace")


@pytest.mark.slow
def test_generated_files_are_stored_or_refused_at_their_line_or_prompt(client: TestClient) -> None:
    outcomes = {"stored": 0, "encoding": 0, "refused": 0}
    for case, media_type, content in generated_files():
        headers = {"Content-Type": media_type}
        response = client.post("/prompt-sets", content=content, headers=headers, params={"name": "generated"})
        try:
            readable = b"\0" not in content and bool(content.decode("utf-8"))
        except UnicodeDecodeError:
            readable = False

        if not readable:
            assert response.status_code in (400, 422) and "expected text in UTF-8, got byte" in response.text
            outcomes["encoding"] += 1
        elif "?" in content.decode("utf-8"):  # letters that the encoding lacks were replaced
            assert response.status_code in (200, 201, 422)
        elif case.refused:
            [problem] = response.json()["errors"]
            assert problem["pointer"] == {"text/plain": "/lines/3", "application/json": "/prompts/0"}[media_type]
            outcomes["refused"] += 1
        else:
            assert response.status_code in (200, 201), response.text
            assert [tuple(prompt["items"]) for prompt in response.json()["prompts"]] == [case.items, ("hat",)]
            outcomes["stored"] += 1
    assert sum(outcomes.values()) > 100 and min(outcomes.values()) > 10
