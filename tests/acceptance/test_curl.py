"""The commands of docs/curl.md, run in a shell against the service that `make serve` starts."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.deployment import Deployment
from tests.pages import blocks

BLOCKS = blocks("docs/curl.md", "bash")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_every_line_of_the_page_works(tmp_path: Path, embedded: Deployment) -> None:
    script = "set -euo pipefail\n" + "\n".join(BLOCKS).replace(
        "http://127.0.0.1:8000", f"http://127.0.0.1:{embedded.settings.port}"
    )
    environment = {**os.environ, "no_proxy": "*"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    embedded.accept_all()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert all(f'"kind":"{kind}"' in done.stdout for kind in ("job.created", "stage.started", "job.succeeded"))
    assert "event: end\n" in done.stdout
    assert re.search(r"^-?\d+\.\d+(e-\d+)?$", done.stdout, re.MULTILINE), done.stdout
    assert (tmp_path / "target.png").read_bytes().startswith(b"\x89PNG")
    assert load_file(tmp_path / "adapter.safetensors")
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / "lora-for-comfyui.safetensors"))
