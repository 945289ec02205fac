"""The commands of docs/how-to, run in a shell: a service on a custom S3 server accepts custom prompts, adapters
and LoRA settings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dfusion.catalogue import MODELS
from dfusion.models import DiffusionModel
from tests.adapters import ATTENTION, Lora, kohya_file, random_lora
from tests.pages import ROOT, blocks, replaced
from tests.servers import free_port, s3_server


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_commands_of_the_pages_work(tmp_path: Path) -> None:
    settings, start = blocks("docs/how-to/use-your-own-s3.md", "bash")
    prompts = blocks("docs/how-to/use-your-own-prompts.md", "bash")
    models, adapter = blocks("docs/how-to/start-from-an-adapter.md", "bash")
    lora = blocks("docs/how-to/choose-lora-settings.md", "bash")
    objects, work = tmp_path / "objects", tmp_path / "work"
    objects.mkdir()
    work.mkdir()
    models = replaced(models, {"/models/sd": str(MODELS["shapes"].folder), "/models/my-style": f"{work}/my-style"})
    unet = DiffusionModel.load(MODELS["shapes"].folder).unet
    kohya_file(random_lora(unet.state_dict(), ATTENTION, Lora(8, 4)), work).rename(work / "my-style.safetensors")
    command = tmp_path / "bin" / "dfusion"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m dfusion "$@"\n', "utf-8")
    command.chmod(0o755)

    with s3_server(objects) as s3:
        port = free_port()
        server = {"127.0.0.1:9000": f"127.0.0.1:{s3.port}", "my-access-key": s3.access_key}
        settings = replaced(settings, server | {"my-secret-key": s3.secret_key})
        start = replaced(start, {"127.0.0.1:8000": f"127.0.0.1:{port}", "python -m": f"{sys.executable} -m"})
        environment = {
            **os.environ,
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DFUSION_PORT": str(port),
            "DFUSION_URL": f"http://127.0.0.1:{port}",
            "DFUSION_EMBEDDED_WORKER": "false",
            "no_proxy": "*",
        }
        script = "\n".join(["set -euo pipefail", settings, models, start, *prompts, adapter, *lora])
        ran = subprocess.run(
            ["bash", "-c", script], cwd=work, env=environment, capture_output=True, text=True, timeout=300
        )

    assert ran.returncode == 0, ran.stdout + ran.stderr + (work / "service.log").read_text("utf-8")
    assert (objects / "dfusion").is_dir()  # the bucket
    assert "a dog in a hat" in ran.stdout and "dog, hat" in ran.stdout
