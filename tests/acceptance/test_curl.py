"""The commands of docs/curl.md, and of the page on exports, run in a shell against the service of `make serve`."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from api.main import create_app
from service.jobs import execution
from service.jobs.execution import StageFailure
from service.jobs.kinds import RoundSpec
from service.service import Service, cancel_job, create_job
from tests.deployment import Deployment
from tests.live_service import serving
from tests.pages import ROOT, blocks
from tests.service import round_body, settings_for

BLOCKS = blocks("docs/curl.md", "bash")
EXPORT = blocks("docs/how-to/use-an-exported-model.md", "bash")
COMMAND = f'export DFUSION_URL=http://127.0.0.1:8000\ndfusion() {{ {sys.executable} -m dfusion "$@"; }}'


def fail(service: Service, _job_id: str) -> None:
    """Fail the first stage of the only job, and so the job."""
    held = execution.claim(service.uow, service.settings, "w")
    assert held is not None
    execution.fail(service.uow, service.settings, held, StageFailure("non_finite", "the loss is NaN", retryable=False))


pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")


def run(script: str, folder: Path, port: int) -> subprocess.CompletedProcess[str]:
    """Run lines of the page against the service on this port."""
    script = "set -euo pipefail\n" + script.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{port}")
    environment = {**os.environ, "no_proxy": "*", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (fail, "is failed: {'code': 'non_finite', 'message': 'the loss is NaN'}"),
        (cancel_job, "is cancelled: None"),
    ],
)
@pytest.mark.parametrize("state", ["waiting", "succeeded"])
def test_the_page_stops_at_a_job_that_fails(
    tmp_path: Path, end: Callable[[Service, str], None], message: str, state: str
) -> None:
    app = create_app(settings_for(tmp_path / "data", tmp_path / "tiny"))
    with serving(app) as port:
        job_id = create_job(app.state.service, RoundSpec.model_validate(round_body()))
        end(app.state.service, job_id)
        done = run(f"{BLOCKS[0]}\nreach {job_id} {state}\necho continued", tmp_path, port)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{job_id} {message}" in done.stderr


def test_every_line_of_the_page_works(tmp_path: Path, embedded: Deployment) -> None:
    done = run("\n".join([*BLOCKS, COMMAND, *EXPORT]), tmp_path, embedded.settings.port)
    embedded.accept_all()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert all(f'"kind":"{kind}"' in done.stdout for kind in ("job.created", "stage.started", "job.succeeded"))
    assert "event: end\n" in done.stdout
    assert re.search(r"^-?\d+\.\d+(e-\d+)?$", done.stdout, re.MULTILINE), done.stdout
    for image in ("target.png", "preview.png", "flowers.preview.png"):
        assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")
    assert load_file(tmp_path / "adapter.safetensors")
    for lora in ("lora-for-comfyui.safetensors", "flowers.safetensors"):
        assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / lora))
    assert json.loads((tmp_path / "flowers.recipe.json").read_text())["base"] == "shapes"
