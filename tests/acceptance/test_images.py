"""The Dockerfiles' installs, run in clean environments: `make check-docker`. Takes minutes and needs a network.

Each line `RUN pip install …` or `RUN python -c …` is run unchanged, in a folder with the files that .dockerignore
admits. TORCH_INDEX sets the index for torch; the default is a folder that has torch and torchvision alone, as pip finds
them. Nothing else can be installed from it, so the tests fail if the Dockerfile takes another package from that index.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.deployment import ROOT
from tests.packages import copy_checkout, run

pytestmark = pytest.mark.skipif(
    os.environ.get("CHECK_DOCKER") != "1",
    reason="installs each image's packages, which takes minutes: make check-docker",
)
HEAVY = ("torch", "torchvision", "diffusers", "transformers", "peft", "open_clip")


@pytest.fixture
def context(tmp_path: Path) -> Path:
    return copy_checkout(tmp_path / "context")


def install(dockerfile: str, context: Path, folder: Path) -> Path:
    """Create an environment and run the file's installs. Returns its Python."""
    text = (ROOT / "docker" / dockerfile).read_text("utf-8")
    steps = re.findall(r"^RUN ((?:pip install|python -c|python -m compileall) .*)$", text, re.MULTILINE)
    assert len(steps) >= 3
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    for step in steps:
        own = environment
        if "TORCH_INDEX" in step:
            own = {name: value for name, value in environment.items() if not name.startswith("PIP_")}
            index = os.environ.get("TORCH_INDEX") or torch_index(folder.with_name("index"))
            own |= {"PIP_CONFIG_FILE": os.devnull, "TORCH_INDEX": index}
        subprocess.run(["/bin/sh", "-c", step], cwd=context, env=own, check=True)
    return folder / "bin" / "python"


def torch_index(folder: Path) -> str:
    """Create a package index with torch and torchvision. Returns its URL."""
    for name in ("torch", "torchvision"):
        files = folder / name
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(files), name]
        subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt")], check=True)
        links = [f'<a href="{quote(file.name)}">{file.name}</a>' for file in files.iterdir()]
        (files / "index.html").write_text("\n".join(links), "utf-8")
    return folder.as_uri()


def test_the_apis_image_starts_without_torch(tmp_path: Path, context: Path) -> None:
    python = install("api.Dockerfile", context, tmp_path / "venv")
    code = f"from importlib.util import find_spec; print([name for name in {HEAVY} if find_spec(name)])"
    assert run(python, tmp_path, "-c", code) == "[]"
    names = "import api.main, worker.sweeper, worker.health; print(api.main.create_app().title)"
    assert run(python, tmp_path, "-c", names) == "D-Fusion"
    run(python, tmp_path, "-m", "service.db.migrate")
    assert (tmp_path / "dfusion-data" / "dfusion.db").exists()


def test_the_workers_image_can_run_stages(tmp_path: Path, context: Path) -> None:
    python = install("worker.Dockerfile", context, tmp_path / "venv")
    load = "from dfusion.catalogue import MODELS; from dfusion.models import DiffusionModel"
    run(python, tmp_path, "-c", f"import worker.celery_app, worker.runner, worker.workbench; {load}")
