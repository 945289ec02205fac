"""The README's requests, sent by curl to the real application."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.api.conftest import Live

README = (Path(__file__).parents[3] / "README.md").read_text("utf-8")


def curl_commands() -> list[str]:
    """The lines of the README that begin with curl, each with its continuation."""
    return re.findall(r"^ {4}(curl .*(?:\n {6}.*)*)$", README, re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_every_request_is_accepted(live: Live) -> None:
    """The first one as a dry run, because its round takes minutes; the others on a finished job."""
    with live.client() as client:
        ids = {
            "job_…": live.done_job,
            "smp_…": next(client.samples(job=live.done_job)).id,
            "mdl_…": next(client.models(job=live.done_job)).id,
        }
    start, *reads = curl_commands()
    assert len(reads) == 5 and "/rounds " in start

    responses = []
    for command in (start.replace("/rounds ", "/rounds?dry_run=true "), *reads):
        command = command.replace("localhost:8000", f"127.0.0.1:{live.port}")
        for placeholder, row_id in ids.items():
            command = command.replace(placeholder, row_id)
        run = subprocess.run(["sh", "-c", f"no_proxy='*' {command} --fail"], capture_output=True, text=True)
        assert run.returncode == 0, f"{command}: {run.stderr}"
        responses.append(json.loads(run.stdout))

    estimate, job, metrics, pairs, sample, model = responses
    assert estimate["images"]["sampled"] == 40 * 4
    assert (job["id"], sample["id"], model["id"]) == tuple(ids.values())
    assert metrics and pairs["data"]
