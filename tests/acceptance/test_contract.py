"""The service does what its OpenAPI document says: thousands of requests that schemathesis makes from the document.

DFUSION_CONTRACT_EXAMPLES makes more of them (`make test-contract`).

Good and bad ones, by examples, by each rule of the document, by chance, and along its links. What is checked:

* no 5xx, and no response with an undocumented status, media type, header or body
* what the document forbids is refused, with 405 and Allow for a method, and 401 without a key or with a wrong one
* what was deleted stays so

`positive_data_acceptance` is off: that a request names one source and not two, or a model that there is, is beyond
what a schema can say. A long poll is kept short (`tests/contract_hooks.py`);
of a stream schemathesis reads the first events.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import ADMIN_KEY, EMBEDDED, PATIENCE_SECONDS, ROOT, Deployment, deployment
from tests.service import round_body, work_until_idle

EXAMPLES = int(os.environ.get("DFUSION_CONTRACT_EXAMPLES", "3"))
"""By chance, for each operation and kind of request."""
CASES = 2000 if EXAMPLES >= 12 else 1300
"""At least; most do not depend on chance."""
SEED = 7
MANY = 1_000_000
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "ignored_auth",
)
REFUSALS = ("400", "401", "403", "404", "405", "409", "412", "413", "415", "422")


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Iterator[Deployment]:
    """A service with API keys and without a worker, with one finished round and queued jobs."""
    folder = tmp_path_factory.mktemp("contract")
    settings = {"embedded_worker": False, "auth": True, "max_queued_jobs": MANY, "max_queued_jobs_per_key": MANY}
    with deployment(EMBEDDED, folder, pipeline, **settings) as started:
        job = started.post("/rounds", round_body())
        work_until_idle(started.service)
        assert started.get(f"/jobs/{job}")["state"] == "succeeded"
        started.post("/samplings", {"model": "tiny", "prompt_set": "shapes-attribute-train", "scorers": ["brightness"]})
        yield started


def ids(installation: Deployment, path: str) -> list[str]:
    return [entry["id"] for entry in installation.get(f"{path}?limit=5")["data"]]


def known(installation: Deployment) -> dict[str, list[str]]:
    """Existing ids by path parameter. Without them, almost all requests would return 404."""
    jobs = ids(installation, "/jobs")
    images = [sample["image"].removeprefix("/artifacts/") for sample in installation.get("/samples?limit=5")["data"]]
    sets = ["shapes-attribute-train", *ids(installation, "/prompt-sets")]
    return {
        "path.job_id": jobs,
        "query.job": jobs,
        "query.parent": jobs,
        "path.sample_id": ids(installation, "/samples"),
        "path.pair_id": ids(installation, "/pairs"),
        "path.model": ["tiny", *ids(installation, "/models")],
        "path.artifact_id": images,
        "path.name_or_id": sets,
        "query.prompt_set": ids(installation, "/prompt-sets"),
        "body.model": ["tiny", *ids(installation, "/models")],
        "body.prompt_set": sets,
        "body.reward": ["brightness"],
        "header.accept": ["application/json", "text/event-stream"],
    }


def configuration(installation: Deployment) -> str:
    """Return the content of schemathesis.toml."""
    lines = [f"seed = {SEED}", "max-stream-events = 3", "continue-on-failure = true", "request-timeout = 30"]
    lines += ["[generation]", "deterministic = true", 'database = "none"', f"max-examples = {EXAMPLES}"]
    lines += ["[auth.openapi.apiKey]", f'bearer = "{ADMIN_KEY}"']
    lines += ["[checks]", f"negative_data_rejection.expected-statuses = {json.dumps(REFUSALS)}"]
    values = known(installation)
    for name, known_ids in values.items():
        lines += [f'[dictionaries."{name}"]', f"values = {json.dumps(known_ids)}"]
    lines += ["[parameters]"]
    lines += [f'"{name}" = {{dictionary = "{name}", probability = 0.7}}' for name in values]
    return "\n".join(lines) + "\n"


def run_schemathesis(installation: Deployment) -> tuple[dict[str, Any], str]:
    """Run schemathesis. Returns its report and its output."""
    folder = installation.folder / "schemathesis"
    folder.mkdir()
    (folder / "schemathesis.toml").write_text(configuration(installation), "utf-8")
    options = ["--checks", ",".join(CHECKS), "--no-color", "--report-json-path", "report.json"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            f"http://127.0.0.1:{installation.settings.port}/openapi.json",
            *options,
        ],
        cwd=folder,
        env={**os.environ, "NO_PROXY": "*", "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.contract_hooks"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS * (1 + EXAMPLES),
    )
    written = done.stdout + done.stderr
    assert (folder / "report.json").exists(), written
    return json.loads((folder / "report.json").read_text("utf-8")), written


def test_the_service_does_what_its_openapi_document_says(installation: Deployment) -> None:
    report, written = run_schemathesis(installation)
    assert report["failures"] == [], written
    assert report["exit_code"] == 0, written
    assert {name: phase["status"] for name, phase in report["phases"].items()} == dict.fromkeys(
        ("examples", "coverage", "fuzzing", "stateful"), "success"
    )
    assert report["operations"]["tested"] == report["operations"]["total"] > 35
    assert report["test_cases"]["generated"] >= CASES
    assert report["test_cases"]["errored"] == 0
    assert installation.get("/jobs")["data"], "the key was revoked on the way: what came after it was 401 alone"
    assert installation.process["api"].poll() is None
