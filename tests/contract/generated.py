"""Requests that schemathesis generates from the OpenAPI document.

Good and bad ones, by examples, by each rule of the document, by chance, and along its links. What is checked:

* no 5xx, and no response with an undocumented status, media type, header or body
* what the document forbids is refused, with 405 and Allow for a method, and 401 without a key or with a wrong one
* what was deleted stays so

`positive_data_acceptance` is off: that a request names one source and not two, or a model that there is, is beyond
what a schema can say. A long poll is kept short (`tests/contract/hooks.py`); of a stream schemathesis reads the first
events.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.contract.site import ids
from tests.deployment import ADMIN_KEY, PATIENCE_SECONDS, ROOT, Deployment

SEED = 7
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


@dataclass(frozen=True)
class Generated:
    """A finished run of schemathesis.

    Attributes:
        report: Its report.
        output: What it printed.
        statuses: The number of responses by status.
        slowest: The seconds of the slowest request, and its operation.
    """

    report: Mapping[str, Any]
    output: str
    statuses: Counter[int]
    slowest: tuple[float, str]

    @property
    def cases(self) -> int:
        return int(self.report["test_cases"]["generated"])

    @property
    def operations(self) -> int:
        return int(self.report["operations"]["tested"])

    def require_success(self, cases: int) -> None:
        """Raises AssertionError if a check failed, or less was tested than expected."""
        assert self.report["failures"] == [], self.output
        assert self.report["exit_code"] == 0, self.output
        phases = {name: phase["status"] for name, phase in self.report["phases"].items()}
        assert phases == dict.fromkeys(("examples", "coverage", "fuzzing", "stateful"), "success")
        assert self.operations == self.report["operations"]["total"] > 35
        assert self.cases >= cases
        assert self.report["test_cases"]["errored"] == 0


def known_ids(installation: Deployment) -> dict[str, list[str]]:
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
        "path.test_id": ids(installation, "/preference-tests"),
        "path.name_or_id": sets,
        "query.prompt_set": ids(installation, "/prompt-sets"),
        "body.model": ["tiny", *ids(installation, "/models")],
        "body.prompt_set": sets,
        "body.reward": ["brightness"],
        "header.accept": ["application/json", "text/event-stream"],
    }


def _configuration(known: Mapping[str, Sequence[str]], examples: int, not_covered: Sequence[str]) -> str:
    """Return the content of schemathesis.toml."""
    lines = [f"seed = {SEED}", "max-stream-events = 3", "continue-on-failure = true", "request-timeout = 30"]
    lines += ["[generation]", "deterministic = true", 'database = "none"', f"max-examples = {examples}"]
    lines += ["[auth.openapi.apiKey]", f'bearer = "{ADMIN_KEY}"']
    lines += ["[checks]", f"negative_data_rejection.expected-statuses = {json.dumps(REFUSALS)}"]
    for name, values in known.items():
        lines += [f'[dictionaries."{name}"]', f"values = {json.dumps(values)}"]
    lines += ["[parameters]"]
    lines += [f'"{name}" = {{dictionary = "{name}", probability = 0.7}}' for name in known]
    for path in not_covered:
        lines += ["[[operations]]", f'include-path = "{path}"', "phases.coverage.enabled = false"]
    return "\n".join(lines) + "\n"


def run_schemathesis(
    installation: Deployment,
    known: Mapping[str, Sequence[str]],
    examples: int,
    *,
    not_covered: Sequence[str] = (),
) -> Generated:
    """Run schemathesis.

    Args:
        installation: The installation.
        known: Existing ids by parameter, from `known_ids`.
        examples: The number of examples by chance for each operation and kind of request.
        not_covered: Paths for which the phase "coverage" is left out. It has an example for each rule of the document.
    """
    folder = installation.folder / "schemathesis"
    folder.mkdir()
    (folder / "schemathesis.toml").write_text(_configuration(known, examples, not_covered), "utf-8")
    responses = folder / "responses.jsonl"
    command = [sys.executable, "-m", "schemathesis.cli", "run"]
    command += [f"http://127.0.0.1:{installation.settings.port}/openapi.json", "--checks", ",".join(CHECKS)]
    command += ["--no-color", "--report-json-path", "report.json"]
    variables = {"NO_PROXY": "*", "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.contract.hooks"}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **variables, "CONTRACT_RESPONSES": str(responses)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS * (1 + examples),
    )
    output = done.stdout + done.stderr
    assert (folder / "report.json").exists(), output
    assert installation.get("/jobs")["data"], "the key was revoked on the way: all later responses were 401"
    assert installation.process["api"].poll() is None, "the service has ended"

    statuses: Counter[int] = Counter()
    slowest = (0.0, "")
    for line in responses.read_text("utf-8").splitlines():
        operation, status, seconds = json.loads(line)
        statuses[status] += 1
        slowest = max(slowest, (seconds, operation))
    return Generated(json.loads((folder / "report.json").read_text("utf-8")), output, statuses, slowest)
