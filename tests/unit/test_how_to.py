"""The code of docs/how-to: diffs apply to the library, and the Python code runs, with fewer steps."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow
import pytest
import torch
from PIL import Image, ImageDraw
from pyarrow import parquet
from safetensors.torch import load_file

from api.cli import app
from api.wire.health import CheckOut
from dfusion.catalogue import MODELS, SCORERS
from dfusion.config import TrainingConfig
from dfusion.models import DiffusionModel
from dfusion.prompts import Prompt, read_prompts
from dfusion.rewards.config import WeightedScorerConfig
from dfusion.rewards.http import ScoreRequest, ScoreResponse
from service.settings import Settings
from tests.adapters import ATTENTION, Lora, kohya_file, random_lora
from tests.cli import CliRunner
from tests.model_check import run_in_this_process
from tests.pages import ROOT, apply_diff, blocks, replaced

REWARD = "docs/how-to/add-a-reward.md"
CHOOSE = "docs/how-to/choose-a-reward.md"
CONTROL = "docs/how-to/add-an-attention-control.md"
MODEL = "docs/how-to/use-your-own-model.md"
PROMPTS = "docs/how-to/use-your-own-prompts.md"
WATCH = "docs/how-to/watch-a-run.md"
PREFERENCES = "docs/how-to/use-preference-data.md"
ADAPTER = "docs/how-to/start-from-an-adapter.md"
LORA = "docs/how-to/choose-lora-settings.md"
SCORE = """
import numpy as np
red = np.zeros((1, 4, 4, 3), np.uint8)
red[..., 0] = 255
print(scorer.name, scorer.score(red, ["red"]))
"""


def printed(folder: Path, code: str, *path: Path, **environment: str) -> str:
    """Run the code in `folder`, which is first on the import path. Returns its output."""
    (folder / "page.py").write_text(code, "utf-8")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DFUSION_")}
    clean["PYTHONPATH"] = os.pathsep.join(map(str, [*path, ROOT]))
    ran = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def changed_library(folder: Path, page: str) -> Path:
    """Copy the library and apply the page's diffs."""
    being_compiled = shutil.ignore_patterns("*.pyc.*")
    shutil.copytree(ROOT / "dfusion", folder / "dfusion", ignore=being_compiled)
    for diff in blocks(page, "diff"):
        apply_diff(diff, folder)
    return folder


@pytest.mark.slow
def test_a_reward_is_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, use = blocks(REWARD, "python")
    (tmp_path / "my_rewards.py").write_text(module, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    fewer = {"FusionConfig(first_step=10)": "FusionConfig(first_step=1), sampling=dfusion.SamplingConfig(num_steps=3)"}
    page = tmp_path / "page.py"
    page.write_text(replaced(use, fewer), "utf-8")

    runpy.run_path(str(page), run_name="__main__")
    assert capsys.readouterr().out == "{True}\n"


@pytest.mark.slow
def test_a_reward_is_installed_as_a_package(tmp_path: Path) -> None:
    """By its entry point, and under a name from the settings."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "my_rewards.py").write_text(blocks(REWARD, "python")[0], "utf-8")
    [about] = blocks(REWARD, "toml")
    (package / "pyproject.toml").write_text(about, "utf-8")
    [shell] = blocks(REWARD, "bash")
    setting = re.findall(r"^export DFUSION_SCORERS='(.*)'$", shell, re.MULTILINE)

    site = tmp_path / "site"
    install = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site), str(package)]
    subprocess.run([sys.executable, "-m", "pip", "install", *install], check=True)

    load = "from dfusion import load_scorer\nfrom service.settings import Settings\n"
    load += "scorer = load_scorer('redness', installed=Settings.read().scorers)\n"
    assert printed(tmp_path, load + SCORE, site, DFUSION_SCORERS=setting[0]) == "redness [1.0]\n"


def test_a_reward_of_the_library(tmp_path: Path) -> None:
    library = changed_library(tmp_path, REWARD)
    (library / "dfusion" / "rewards" / "redness.py").write_text(blocks(REWARD, "python")[0], "utf-8")
    load = "import dfusion.catalogue\nscorer = dfusion.load_scorer('redness')\n"
    load += "print(dfusion.catalogue.SCORERS['redness'].description)\n"
    assert printed(library, load + SCORE) == "How red an image is\nredness [1.0]\n"


@pytest.mark.slow
def test_an_attention_control(tmp_path: Path) -> None:
    """It fuses, with a result that differs from D-Fusion's."""
    library = changed_library(tmp_path, CONTROL)
    [use] = blocks(CONTROL, "python")
    output = printed(library, replaced(use, {"num_steps=10": "num_steps=4", "first_step=3": "first_step=1"}))
    lines = re.findall(r"^(\w+): (\d\.\d{3}) from the base$", output, re.MULTILINE)
    assert [name for name, _ in lines] == ["masked_kv", "masked_v"]
    assert len({distance for _, distance in lines} - {"0.000"}) == 2


def test_a_reward_that_needs_no_weights(tmp_path: Path) -> None:
    [code] = blocks(CHOOSE, "python")
    documented = re.findall(r"^prints `(.+)`: ", (ROOT / CHOOSE).read_text("utf-8"), re.MULTILINE)
    assert printed(tmp_path, code) == f"{documented[0]}\n"


def test_the_settings_of_rewards_are_accepted_and_name_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    shells = blocks(CHOOSE, "bash")
    setting = re.search(r"^export DFUSION_SCORERS='(.*)'$", shells[1], re.MULTILINE | re.DOTALL)
    assert setting is not None
    monkeypatch.setenv("DFUSION_SCORERS", setting[1])
    scorers = Settings.read().scorers
    kinds = {config.kind for config in scorers.values() if not isinstance(config, str)}
    assert kinds == {"pickscore", "open_clip", "image_reward", "aesthetic", "vqa", "http"}

    # built-in names, and kinds of settings
    text = (ROOT / CHOOSE).read_text("utf-8")
    listed = set(re.findall(r"`([^`]+)`", text.partition("| you want")[2].partition("\n\n")[0])) - {"file"}
    assert {name for name in listed if "-" in name} < set(SCORERS) and "ocr" in SCORERS
    assert kinds | {"weighted", "ocr"} == {name for name in listed if "-" not in name}

    request, response, total = (json.loads(block) for block in blocks(CHOOSE, "json"))
    assert set(request) == set(ScoreRequest.__annotations__) and set(response) == set(ScoreResponse.__annotations__)
    assert {part.scorer for part in WeightedScorerConfig.model_validate(total).parts} < set(SCORERS)


def test_a_pickle_is_converted_by_the_documented_command(tmp_path: Path) -> None:
    command = shlex.split(blocks(CHOOSE, "bash")[0])
    assert command[0] == "python"
    torch.save({"mlp.layers.0.weight": torch.ones(1, 2)}, tmp_path / command[3])
    (tmp_path / command[4]).parent.mkdir()
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert load_file(tmp_path / command[4])["mlp.layers.0.weight"].tolist() == [[1, 1]]


@pytest.mark.slow
def test_a_model_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the library, in the terminal, and in the settings. tests/unit/api/test_cli.py runs the command with a size."""
    from tests.model_folders import as_variant, both, scheduler
    from tests.nets import tiny_pipeline

    tiny_pipeline().save_pretrained(tmp_path / "my-model")
    both(as_variant("unet", "fp16"), scheduler("PNDMScheduler"))(tmp_path / "my-model")
    check, settings, _ = blocks(MODEL, "bash")
    [code] = blocks(MODEL, "python")
    monkeypatch.chdir(tmp_path)
    Path("page.py").write_text(code, "utf-8")
    runpy.run_path("page.py")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("epsilon leading") and (tmp_path / "sample.png").is_file()
    assert "DDIM (Eq. 1)" in lines[1] and "only fp16 weights of unet" in lines[2]

    (tmp_path / "sample.png").unlink()
    with run_in_this_process():
        checked = CliRunner().invoke(app, [*shlex.split(check)[1:], "--json"])
    assert checked.exit_code == 0 and json.loads(checked.stdout)["scheduler"] == "PNDMScheduler"
    assert (tmp_path / "sample.png").is_file()

    value = re.findall(r"^export DFUSION_MODELS='(.*)'$", settings, re.MULTILINE)[0]
    monkeypatch.setenv("DFUSION_MODELS", value)
    monkeypatch.setattr("api.cli.doctor.torch_check", lambda _python: CheckOut(name="torch", state="ok", detail=""))
    report = CliRunner().invoke(
        app, [*shlex.split(settings.splitlines()[-1])[1:], "--url", "http://127.0.0.1:9", "--json"]
    )
    checks = {check["name"]: check for check in json.loads(report.stdout)["data"]}
    assert checks["here: model mine"]["state"] == "ok" and "DDIM" in checks["here: model mine"]["detail"]


def test_prompts_of_a_file(tmp_path: Path) -> None:
    [code] = blocks(PROMPTS, "python")
    text = (ROOT / PROMPTS).read_text("utf-8")
    documented = re.findall(r"`([^`\n]+ \('[^`]+\))`", text)
    assert printed(tmp_path, code) == "".join(f"{line}\n" for line in documented) and len(documented) == 2

    listed, templates = blocks(PROMPTS, "json")
    (tmp_path / "templates.json").write_text(templates, "utf-8")
    expanded = read_prompts(str(tmp_path / "templates.json"))
    assert [prompt.text for prompt in expanded] == ["a cat in a hat", "a cat asleep", "a dog in a hat", "a dog asleep"]
    assert expanded[0].items == ("cat", "hat")

    (tmp_path / "pets.json").write_text(listed, "utf-8")
    [prompt] = read_prompts(str(tmp_path / "pets.json"))
    assert (prompt.items, prompt.thresholds) == (("cat", "sofa"), (0.02, 0.05))
    assert ast.literal_eval(documented[0].removeprefix(f"{prompt.text} ")) == prompt.items
    assert json.loads(listed)["name"] == "pets"


def test_prompts_are_warned_about_or_refused_as_documented() -> None:
    rows = [line.split("|")[1] for line in (ROOT / PROMPTS).read_text("utf-8").splitlines() if line.startswith("| ")]
    [weighting] = [row for row in rows if "weighting" in row]
    [refused] = [row for row in rows if "lora" in row]
    for syntax in re.findall("`([^`]+)`", weighting):
        assert Prompt(text=f"a dog {syntax}").warnings, syntax
    for syntax in re.findall("`([^`]+)`", refused):
        with pytest.raises(ValueError, match="loads nothing here"):
            Prompt(text=f"a dog {syntax}")


@pytest.mark.slow
def test_a_run_is_watched_in_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rounds on a prompt, with fewer steps."""
    [code] = blocks(WATCH, "python")
    small = "samples_per_prompt=2, sampling=dfusion.SamplingConfig(num_steps=2), fusion=None"
    small += ", training=dfusion.TrainingConfig(inner_epochs=1)"
    fewer = {
        'dfusion.read_prompts("shapes-attribute-train")': 'dfusion.read_prompts("shapes-attribute-train")[:1]',
        "dfusion.RoundConfig()": f"dfusion.RoundConfig({small})",
        "range(1, 41)": "range(1, 3)",
    }
    monkeypatch.chdir(tmp_path)
    Path("page.py").write_text(replaced(code, fewer), "utf-8")
    runpy.run_path("page.py", run_name="__main__")
    output = capsys.readouterr().out
    assert re.fullmatch(r"best: the model after round [01], shapes-judge [01]\.\d\d\n", output)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "round-1.safetensors",
        "round-2.safetensors",
    ]


def picks(folder: Path) -> None:
    """A file of Pick-a-Pic's layout: a red circle is preferred to a blue one, and a tie."""
    sides = {}
    for name, colour in {"jpg_0": "red", "jpg_1": "blue"}.items():
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill=colour)
        image.save(folder / "side.png")
        sides[name] = (folder / "side.png").read_bytes()
    rows = [sides | {"caption": "a red circle", "label_0": label, "label_1": 1 - label} for label in (1.0, 0.5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet")


@pytest.mark.slow
def test_a_reward_is_checked_with_labelled_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command and by the code of the page, which agree."""
    picks(tmp_path)
    [command] = [line for block in blocks(PREFERENCES, "bash") for line in block.splitlines() if "pairs check" in line]
    [code] = blocks(PREFERENCES, "python")
    monkeypatch.chdir(tmp_path)
    Path("page.py").write_text(code, "utf-8")
    runpy.run_path("page.py", run_name="__main__")
    assert capsys.readouterr().out == "agrees on 1 of 1 pairs, 1 ties\n"

    monkeypatch.setattr("api.cli.local.subprocess.run", code_in_this_process)
    result = json.loads(CliRunner().invoke(app, [*command.split()[1:], "--json"]).stdout)
    assert (result["scorer"], result["agrees"], result["pairs"], result["ties"]) == ("shapes-clip", 1, 1, 1)
    refused = CliRunner().invoke(app, ["pairs", "check", "none.parquet", "--scorer", "shapes-clip"])
    assert refused.exit_code == 2 and "none.parquet, got none" in " ".join(refused.output.split())


def code_in_this_process(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -c CODE ARGUMENT…` without a process, which would import torch for seconds."""
    _, option, code, *arguments = command
    assert option == "-c"
    output = io.StringIO()
    try:
        with redirect_stdout(output), patch.object(sys, "argv", ["-c", *arguments]):
            exec(code, {})
    except SystemExit as end:
        return subprocess.CompletedProcess(command, 1, output.getvalue(), str(end))
    return subprocess.CompletedProcess(command, 0, output.getvalue(), "")


@pytest.mark.slow
@pytest.mark.parametrize(("page", "pattern"), [(ADAPTER, r"prints `([^`]+)`"), (LORA, r"`(\w+\S* \d+ \d\.\d)`")])
def test_adapters_have_the_printed_settings(
    page: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = DiffusionModel.load(MODELS["shapes"].folder).unet
    lora = random_lora(unet.state_dict(), ATTENTION, Lora(8, 4))
    kohya_file(lora, tmp_path).rename(tmp_path / "my-style.safetensors")
    (tmp_path / "page.py").write_text(blocks(page, "python")[0], "utf-8")

    monkeypatch.chdir(tmp_path)
    runpy.run_path("page.py", run_name="__main__")
    documented = re.findall(pattern, (ROOT / page).read_text("utf-8"))
    assert documented and capsys.readouterr().out.splitlines() == documented


def test_the_settings_of_the_page_have_the_documented_defaults() -> None:
    """All settings of LoRA are on the page."""
    defaults = TrainingConfig().model_dump(mode="json")
    rows = [row.split("|") for row in (ROOT / LORA).read_text("utf-8").splitlines() if row.startswith("| `")]
    documented = {}
    for _, names, values, *_ in rows:
        cells = [cell.strip().strip("`") for cell in values.split(", ")]
        settings = re.findall("`([^`]+)`", names)
        documented |= dict(zip(settings, cells * (len(settings) // len(cells)), strict=True))
    assert documented.keys() >= defaults["lora"].keys()
    for name, value in documented.items():
        expected = defaults["lora"].get(name, defaults.get(name))
        assert value in (json.dumps(expected), str(expected), f"{expected:g}" if isinstance(expected, float) else "")
