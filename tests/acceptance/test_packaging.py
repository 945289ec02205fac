"""Packaging: the wheel installs the library alone, which can train; an editable install includes the service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.deployment import ROOT
from tests.packages import build, clean_environment, closure, copy_checkout, outsiders, run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SERVICE = ("api", "service", "worker", "migrations", "tools", "tests", "benchmarks")
PRESENT = """
import json, sys
from importlib.util import find_spec
print(json.dumps([name for name in json.loads(sys.argv[1]) if find_spec(name)]))
"""
TRAIN = """
import dfusion

model = dfusion.DiffusionModel.load(dfusion.MODELS["shapes"].folder)
config = dfusion.RoundConfig(
    samples_per_prompt=3,
    sampling=dfusion.SamplingConfig(num_steps=4),
    fusion=dfusion.FusionConfig(first_step=1),
    training=dfusion.TrainingConfig(inner_epochs=1, timestep_fraction=0.5),
)
prompts = [dfusion.Prompt(text="a red and striped [circle]")]
result = dfusion.run_round(model, prompts, dfusion.load_scorer("shapes-clip"), config, seed=1)
dfusion.save_adapter(model.unet, "adapter.safetensors")
trained = any(bool(value.any()) for name, value in model.unet.named_parameters() if "lora_B" in name)
print(len(result.updates), trained)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("packaging") / "checkout")


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return build(checkout, checkout.parent / "wheel")


def present(python: Path, folder: Path, names: set[str]) -> set[str]:
    """Return the names of the modules that the environment can import."""
    modules: list[str] = json.loads(run(python, folder, "-c", PRESENT, json.dumps(sorted(names))))
    return set(modules)


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (file for file in (ROOT / "dfusion").rglob("*") if file.is_file() and file.suffix != ".pyc")
    assert names == {file.relative_to(ROOT).as_posix() for file in files}
    assert {
        "dfusion/py.typed",
        "dfusion/prompts/paper-position-test.json",
        "dfusion/shapes/models/pipeline/model_index.json",
    } <= names


def test_the_library_alone_trains_an_update(wheel: Path, tmp_path: Path) -> None:
    """In an environment with only the library's requirements."""
    names = closure(PROJECT["dependencies"])
    python = clean_environment(tmp_path / "venv", names, wheel)
    assert {"fastapi", "sqlalchemy", "celery", "pytest"} <= outsiders(names)
    assert present(python, tmp_path, {*outsiders(names), *SERVICE}) == set()

    assert run(python, tmp_path, "-c", TRAIN) == "1 True"
    assert (tmp_path / "adapter.safetensors").stat().st_size > 10_000


def test_the_command_line_says_where_the_service_is(wheel: Path, tmp_path: Path) -> None:
    clean_environment(tmp_path / "venv", set(), wheel)
    ended = subprocess.run([tmp_path / "venv" / "bin" / "dfusion", "--help"], capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("dfusion: expected the service, got only the library. The command line and")


def test_the_extra_of_the_service_suffices_for_the_api(checkout: Path, tmp_path: Path) -> None:
    """As in its Dockerfile: the extra without the library's dependencies, and the checkout as an editable install."""
    names = closure(PROJECT["optional-dependencies"]["service"])
    assert not {"torch", "diffusers", "transformers", "peft", "open-clip-torch"} & names
    python = clean_environment(tmp_path / "venv", names, build(checkout, tmp_path / "wheel", editable=True))
    assert present(python, tmp_path, outsiders(names)) == set()

    start = "import api.main, worker.sweeper, worker.health; print(api.main.create_app().title)"
    assert run(python, tmp_path, "-c", start) == "D-Fusion"
    run(python, tmp_path, "-m", "service.db.migrate")
    assert (tmp_path / "dfusion-data" / "dfusion.db").exists()
    command_line = subprocess.run([tmp_path / "venv" / "bin" / "dfusion", "--help"], capture_output=True, text=True)
    assert command_line.returncode == 0 and "round" in command_line.stdout


@pytest.mark.skipif(
    os.environ.get("CHECK_DOCKER") != "1", reason="installs torch and more, which takes minutes: make check-docker"
)
def test_pip_installs_the_library_alone(wheel: Path, tmp_path: Path) -> None:
    """TORCH_INDEX sets the index for torch."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    index = os.environ.get("TORCH_INDEX", "")
    options = ["--extra-index-url", index] if index else []
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    run(python, tmp_path, "-m", "pip", "install", "--quiet", *constraints, *options, str(wheel))

    assert present(python, tmp_path, {*SERVICE, "fastapi", "sqlalchemy", "celery"}) == set()
    assert run(python, tmp_path, "-c", TRAIN) == "1 True"
