"""The command line against the real application on a real port."""

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from rich.console import Console, RenderableType
from typer.main import get_command

from api.cli import app
from api.cli.bodies import build_body, parse_value
from api.cli.doctor import torch_check
from api.cli.live import changes, screen
from api.cli.root import hoist_root_options
from api.cli.screens import clock, listing, size
from api.examples import RESPONSES
from api.wire.health import CheckOut
from api.wire.jobs import JobDetail, MetricOut
from dfusion.catalogue import MODELS
from tests.cli import CliRunner, Result
from tests.drawn_results import draw_evaluation
from tests.model_check import run_in_this_process
from tests.pages import blocks
from tests.service import PROMPTS, round_body
from tests.unit.api.conftest import Live, add_export

Run = Callable[..., Result]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line against `live`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DFUSION_URL", live.url)

    def invoke(*words: str, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(app, list(words), input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


def of_api(live: Live, path: str, **params: Any) -> Any:
    return httpx.get(f"{live.url}{path}", params=params, trust_env=False).json()


def queued(live: Live) -> str:
    with live.client() as client:
        return client.start_round(round_body()).id


@pytest.mark.slow
def test_json_output_equals_the_api_response(live: Live, run: Run) -> None:
    job = live.done_job
    pair, sample = (of_api(live, path, job=job)["data"][0]["id"] for path in ("/pairs", "/samples"))
    model = of_api(live, f"/jobs/{job}")["last_model"]
    reads = [
        ("jobs list --limit 20", "/jobs", {"limit": 20}),
        ("jobs list --state succeeded --kind round", "/jobs", {"limit": 20, "state": "succeeded", "kind": "round"}),
        (f"jobs show {job}", f"/jobs/{job}", {}),
        (f"jobs stages {job}", f"/jobs/{job}/stages", {"limit": 50}),
        (
            f"jobs stages {job} --kind train --round 1",
            f"/jobs/{job}/stages",
            {"limit": 50, "kind": "train", "round": 1},
        ),
        (f"jobs metrics {job}", f"/jobs/{job}/metrics", {}),
        (f"jobs logs {job}", f"/jobs/{job}/events", {"limit": 200}),
        (f"pairs list --job {job} --round 1", "/pairs", {"job": job, "round": 1, "limit": 20}),
        ("pairs list --not-adopted --judged --limit 1", "/pairs", {"adopted": False, "judged": True, "limit": 1}),
        (f"pairs show {pair}", f"/pairs/{pair}", {}),
        (f"samples list --job {job} --role base", "/samples", {"job": job, "role": "base", "limit": 20}),
        (
            f"samples list --job {job} --role base --role target --scorer brightness --score-min 0.1 --score-max 0.9",
            "/samples",
            {
                "job": job,
                "role": ["base", "target"],
                "scorer": "brightness",
                "score_min": 0.1,
                "score_max": 0.9,
                "limit": 20,
            },
        ),
        (
            "pairs list --created-after 2020-01-31 --created-before 2100-01-31T12:00:00 --prompt circle --limit 5",
            "/pairs",
            {
                "created_after": datetime(2020, 1, 31).astimezone().isoformat(),
                "created_before": datetime(2100, 1, 31, 12).astimezone().isoformat(),
                "prompt": "circle",
                "limit": 5,
            },
        ),
        ("jobs list --created-before 2020-01-31", "/jobs", {"limit": 20, "created_before": "2020-01-31T00:00:00Z"}),
        (f"samples show {sample}", f"/samples/{sample}", {}),
        ("models list", "/models", {"limit": 20}),
        (f"models show {model}", f"/models/{model}", {}),
        (f"models lineage {model}", f"/models/{model}/lineage", {}),
        (f"models exports {model}", "/exports", {"model": model, "limit": 20}),
        ("prompt-sets list", "/prompt-sets", {"limit": 50}),
        ("prompt-sets show paper-position-train", "/prompt-sets/paper-position-train", {}),
    ]
    for line, path, params in reads:
        result = run(*line.split(), "--json")
        assert (result.exit_code, json.loads(result.stdout)) == (0, of_api(live, path, **params)), line
        assert run(*line.split()).exit_code == 0, line
    followed = run("--json", "jobs", "follow", job)
    assert json.loads(followed.stdout) == of_api(live, f"/jobs/{job}")
    assert "stage.succeeded" in followed.stderr


def test_preference_tests(live: Live, run: Run) -> None:
    drawn = draw_evaluation(live.service)
    created = run("preference", "create", drawn.job_id, "--name", "figure 6", "--questions", "2", "--json")
    test = json.loads(created.stdout)
    path = f"/preference-tests/{test['id']}"
    assert (test["name"], test["questions"], of_api(live, path)) == ("figure 6", 2, test)
    with live.client() as client:
        client.answer_preference_question(test["id"], 0, 1, rater="ann")

    listed = run("preference", "list", "--evaluation", drawn.job_id, "--json")
    assert json.loads(listed.stdout)["data"] == [of_api(live, path)]
    assert "figure 6" in run("preference", "list").stdout
    results = run("preference", "results", test["id"], "--json")
    assert json.loads(results.stdout) == of_api(live, f"{path}/results")
    table = run("preference", "results", test["id"]).stdout
    assert "80% interval" in run("preference", "results", test["id"], "--confidence", "0.8").stdout
    assert "tiny, round 1" in table and "100.0%" in table and "20.7% to 100.0%" in table  # 1 / (1 + 3.841459)
    assert run("preference", "results", test["id"], "--csv").stdout.startswith("prompt_set,model,")
    assert run("preference", "answers", test["id"]).stdout.splitlines()[1].startswith("ann,0,")
    assert run("preference", "delete", test["id"]).exit_code == 0
    assert run("preference", "results", test["id"]).exit_code == 1


@pytest.mark.slow
def test_json_output_of_commands_that_change_state(live: Live, run: Run, tmp_path: Path) -> None:
    job = live.done_job
    model = of_api(live, f"/jobs/{job}")["last_model"]
    pair = of_api(live, "/pairs", job=job)["data"][1]["id"]

    def output_of(line: str) -> Any:
        result = run(*shlex.split(line), "--json")
        assert (result.exit_code, result.stderr) == (0, ""), result.stderr
        return json.loads(result.stdout)

    assert output_of(f"pairs verdict {pair} target --reviewer ann")["verdict"]["prefer"] == "target"
    assert output_of(f"pairs verdict {pair} none --reviewer ann")["verdict"] is None
    assert output_of(f"pairs gold {pair} base") == {"pair": pair, "expected": "base"}
    assert output_of(f"pairs agreement --job {job}").keys() >= {"alpha", "reviewers"}
    assert output_of(f"models alias best {model}")["aliases"] == ["best"]
    assert output_of("models alias best --remove") is None
    saved = output_of(f"samples save --job {job} --role reference --to images")["data"]
    assert {Path(entry["file"]).read_bytes()[:4] for entry in saved} == {b"\x89PNG"}
    file = output_of(f"models download {model} out/adapter.safetensors")
    assert (tmp_path / "out" / "adapter.safetensors").stat().st_size > 0 and len(file["sha256"]) == 64
    with live.client() as client:
        add_export(live, client.model(model), next(client.samples(job=job)).image, RESPONSES["ExportOut"]["recipe"])
    paths = output_of(f"models download {model} out/flowers.safetensors --format kohya")
    assert (paths["preview"], paths["recipe"]) == ("out/flowers.preview.png", "out/flowers.recipe.json")
    assert all((tmp_path / paths[name]).is_file() for name in ("file", "preview", "recipe"))
    assert output_of(f"round extend {job} --rounds 1 --to-the-end")["state"] == "succeeded"
    signs = "--stop-when saturation --stop-when collapse"
    watched = output_of(f"round start --model tiny --prompt 'a red [circle]' --reward brightness {signs}")
    assert watched["spec"]["stop_when"] == ["saturation", "collapse"]
    jobs = [
        output_of("sample --model tiny --prompt 'a red [circle]' --samples-per-prompt 2 --steps 3"),
        output_of(f"fuse --pair {pair} --first-step 2 --set reward=brightness"),
        output_of(f"train --job {job} --learning-rate 1e-3 --set training.lora.rank=2"),
        output_of(f"evaluate tiny {model} --prompt 'a red circle' --scorer constant"),
        output_of(f"models export {model} --prompt 'a green star' --seed 3"),
        output_of(f"pairs export {job}"),
    ]
    assert [created["kind"] for created in jobs] == ["sampling", "fusion", "training", "evaluation", "export", "export"]
    assert (jobs[4]["spec"]["prompt"], jobs[4]["spec"]["seed"]) == ("a green star", 3)
    sampling, fusion, training = (created["spec"] for created in jobs[:3])
    assert sampling["sampling"]["num_steps"] == 3
    assert fusion["fusion"]["first_step"] == 2
    assert (training["training"]["learning_rate"], training["training"]["lora"]["rank"]) == (1e-3, 2)

    assert output_of(f"jobs pause {jobs[0]['id']}")["state"] == "paused"
    assert output_of(f"jobs resume {jobs[0]['id']}")["state"] == "queued"
    for created in jobs:
        assert output_of(f"jobs cancel {created['id']}")["state"] == "cancelled"
    retried = output_of(f"jobs retry {jobs[0]['id']}")
    assert retried["origin"] == jobs[0]["id"]
    output_of(f"jobs cancel {retried['id']}")

    in_use = run("jobs", "delete", job)
    assert in_use.exit_code == 1 and f"{job} is used by" in in_use.stderr
    deleted = run("jobs", "delete", retried["id"], jobs[0]["id"])
    assert (deleted.exit_code, deleted.stdout) == (0, f"deleted {retried['id']}, {jobs[0]['id']}\n")
    assert run("jobs", "show", retried["id"]).exit_code == 1


@pytest.mark.slow
def test_round_start_follows_a_round_to_its_end(live: Live, run: Run, tmp_path: Path) -> None:
    body = round_body(seed=11, prompts=PROMPTS[:1], samples_per_prompt=2, evaluation=None)
    (tmp_path / "round.json").write_text(json.dumps(body))

    line = ("round", "start", "--spec", "round.json", "--rounds", "2", "--set", "training.beta=0.5", "--label", "[b]")
    line += ("--priority", "-3")
    dry = run(*line, "--dry-run", "--json")
    assert json.loads(dry.stdout)["images"]["sampled"] == 4  # 1 prompt, 2 samples, 2 rounds
    shown = run(*line, "--dry-run").stdout
    assert all(word in shown for word in (PROMPTS[0]["text"], ", ".join(PROMPTS[0]["items"]), "prompt", "items"))
    with live.working():
        result = run(*line, "--follow")
    assert result.exit_code == 0, result.output
    assert "job.succeeded" in result.stdout and "train of round 2 done" in result.stdout
    job = of_api(live, "/jobs")["data"][0]
    spec = of_api(live, f"/jobs/{job['id']}")["spec"]
    assert (spec["rounds"], spec["training"]["beta"], spec["label"], spec["seed"]) == (2, 0.5, "[b]", 11)
    assert (spec["priority"], job["priority"]) == (-3, -3)


def test_exit_codes(live: Live, run: Run) -> None:
    job = queued(live)
    assert run("jobs", "cancel", job).exit_code == 0
    ended = run("jobs", "follow", job)
    assert (ended.exit_code, "cancelled" in ended.stdout) == (3, True)
    assert json.loads(run("jobs", "follow", job, "--json").stdout)["state"] == "cancelled"
    missing = run("jobs", "show", "job_" + "0" * 26)
    assert (missing.exit_code, missing.stdout) == (1, "") and "dfusion:" in missing.stderr
    for line in (
        "jobs shwo",
        "jobs list --state done",
        "round start --set beta",
        "round start --spec nowhere.json",
        "round start --set training=1 --set training.beta=1",
        "fuse --base smp_1",
        "prompt-sets add x",
        "samples save",
        "models alias x",
    ):
        assert run(*line.split()).exit_code == 2, line


@pytest.mark.slow
def test_pairs_check_scores_a_file_on_this_machine(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the scorers of the settings, and without the service."""
    image = BytesIO()
    Image.new("RGB", (4, 4), "white").save(image, "PNG")
    black = BytesIO()
    Image.new("RGB", (6, 4)).save(black, "JPEG")
    sides = {"jpg_0": image.getvalue(), "jpg_1": black.getvalue(), "caption": "a"}
    rows = [{**sides, "label_0": label, "label_1": 1 - label} for label in (1.0, 1.0, 0.0, 0.5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")

    monkeypatch.setenv("DFUSION_SCORERS", json.dumps({"bright": "tests.scorers:Brightness"}))
    monkeypatch.setenv("DFUSION_URL", "http://127.0.0.1:1")
    found = json.loads(run("pairs", "check", "pairs.parquet", "--scorer", "bright", "--json").stdout)
    assert (found["scorer"], found["agrees"], found["pairs"], found["ties"]) == ("bright", 2, 3, 1)
    (tmp_path / "votes.json").write_text("[[1, 0]]")
    refused = run("pairs", "check", "votes.json", "--scorer", "bright")
    assert refused.exit_code == 2 and "D3PO's JSON has votes only" in " ".join(refused.stderr.split())


def test_rejected_request_names_each_field(run: Run) -> None:
    line = ("round", "start", "--prompt", "a red circle", "--rounds", "0", "--set", "training.beta=-1")
    shown = run(*line)
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert "/rounds: " in shown.stderr and "/training/beta: " in shown.stderr
    problem = json.loads(run(*line, "--json").stderr)
    assert {error["pointer"] for error in problem["errors"]} == {"/rounds", "/training/beta"}


def test_unreachable_service_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.cli.session._RETRIES", 0)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # a reserved port without a listener
        url = f"127.0.0.1:{held.getsockname()[1]}"
        shown = run("jobs", "list", "--url", url)
        assert shown.exit_code == 1 and "python -m api" in shown.stderr and url in shown.stderr
        problem = run("--url", url, "--json", "jobs", "list")
        assert (problem.exit_code, problem.stdout) == (1, "")
        assert json.loads(problem.stderr)["code"] == "unreachable"
        monkeypatch.setattr("api.cli.doctor.torch_check", quick_torch_check)
        report = run("doctor", "--url", url, "--json")
        checks = {check["name"]: check["state"] for check in json.loads(report.stdout)["data"]}
        assert (report.exit_code, checks["service"]) == (1, "failed")


@pytest.mark.slow
def test_doctor(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    styled = {"source": str(MODELS["shapes"].folder), "adapter": str(tmp_path / "a.safetensors")}
    models = {"gone": str(tmp_path / "gone"), "hub": "sd-1.5", "styled": styled}
    monkeypatch.setenv("DFUSION_MODELS", json.dumps(models))
    report = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(report.stdout)["data"]}
    states = {name: check["state"] for name, check in checks.items()}
    service_checks = ("database", "migrations", "storage", "disk")
    expected = ["service", *(f"service: {name}" for name in service_checks), "access", "files", "here: model shapes"]
    assert {name: states[name] for name in expected} == dict.fromkeys(expected, "ok")
    assert (states["here: model gone"], states["here: model hub"]) == ("failed", "ok")
    assert states["service: worker"] == "warning"
    assert "DFUSION_MODELS" in checks["here: model gone"]["detail"]
    assert states["here: adapter of styled"] == "failed"
    assert "complete safetensors file" in checks["here: adapter of styled"]["detail"]
    assert {"here: disk", "here: torch"} <= states.keys()
    assert report.exit_code == 1

    monkeypatch.setattr("api.cli.doctor.torch_check", quick_torch_check)
    monkeypatch.setenv("DFUSION_MODELS", "{}")
    assert run("doctor").exit_code == 0
    monkeypatch.setenv("DFUSION_PORT", "many")
    assert "DFUSION_PORT" in run("doctor").stdout


def quick_torch_check(_python: str) -> CheckOut:
    """Stand-in for the check that imports torch for seconds; one doctor test runs the real check."""
    return CheckOut(name="here: torch", state="ok", detail="")


@pytest.mark.slow
def test_models_are_checked(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, and models of the settings; refused ones with the cause and exit code 1."""
    from dfusion import _torchvision_ops  # noqa: F401  (before diffusers or peft)
    from tests.adapters import ATTENTION, Lora, kohya_file, random_lora
    from tests.model_folders import scheduler
    from tests.nets import tiny_pipeline

    for name in ("good", "lcm"):
        tiny_pipeline().save_pretrained(tmp_path / name)
    scheduler("LCMScheduler")(tmp_path / "lcm")
    half = {"source": str(tmp_path / "good"), "dtype": "bfloat16", "vae_dtype": "float32"}
    pipeline = tiny_pipeline()
    lora = random_lora(pipeline.unet.state_dict(), ATTENTION, Lora(2, 8))
    style = {"source": str(tmp_path / "good"), "adapter": str(kohya_file(lora, tmp_path / "style"))}
    models = {"half": half, "lcm": str(tmp_path / "lcm"), "style": style}
    monkeypatch.setenv("DFUSION_MODELS", json.dumps(models))
    monkeypatch.setattr("api.cli.doctor.torch_check", quick_torch_check)

    with run_in_this_process():
        size = ("--steps", "4", "--height", "12", "--width", "20")
        shown = run("models", "check", "half", *size, "--image", "new/image.png")
        assert shown.exit_code == 0 and "bfloat16, VAE float32" in shown.stdout
        assert "1 mid_block, 2 up_blocks.1" in shown.stdout and "12 x 20 pixels, 4 steps" in shown.stdout
        assert Path("new/image.png").is_file()
        same = json.loads(run("models", "check", str(tmp_path / "good"), "--json").stdout)
        assert (same["dtype"], same["num_steps"], same["image"]) == ("float32", 20, "model-check.png")

        plain = Path("model-check.png").read_bytes()
        with_style = json.loads(run("models", "check", "style", "--json").stdout)
        styled = Path("model-check.png").read_bytes()
        assert (with_style["adapter"], with_style["parameters"]) == (style["adapter"], same["parameters"])
        assert "adapter" in run("models", "check", str(tmp_path / "good"), "--adapter", style["adapter"]).stdout
        assert styled == Path("model-check.png").read_bytes() != plain

        refused = run("models", "check", "lcm", "--json")
        assert refused.exit_code == 1 and "LCMScheduler" in json.loads(refused.stderr)["detail"]

        report = run("doctor", "--model", "half", "--model", "lcm", "--json")
        checks = {check["name"]: check for check in json.loads(report.stdout)["data"]}
        assert checks["here: image of half"]["state"] == "ok"
        assert "s an image on cpu" in checks["here: image of half"]["detail"]
        assert {checks[f"here: {what} lcm"]["state"] for what in ("image of", "model")} == {"failed"}
        assert "LCMScheduler" in checks["here: model lcm"]["detail"]


def test_a_size_is_a_setting_of_a_sampling(run: Run) -> None:
    """The command of docs/how-to/use-your-own-model.md, with the model of this service."""
    [command] = [block for block in blocks("docs/how-to/use-your-own-model.md", "bash") if "sampling.height" in block]
    shown = run(*shlex.split(command.replace("--model mine", "--model tiny"))[1:], "--set", 'scorers=["brightness"]')
    assert shown.exit_code == 0, shown.stderr


def test_a_model_check_that_ends_without_a_report_is_an_error(run: Run) -> None:
    def broken(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -9, "", "Killed")

    with patch("api.cli.model_check.subprocess.run", broken):
        shown = run("models", "check", "shapes")
    assert shown.exit_code == 1 and "exited with code -9: Killed" in shown.stderr


def test_torch_check_reports_missing_and_broken_installations(tmp_path: Path) -> None:
    bare = script(tmp_path / "bare", f'exec {sys.executable} -I -S "$@"')
    assert torch_check(bare).state == "ok" and "not installed" in torch_check(bare).detail
    broken = script(tmp_path / "broken", "echo 'ImportError: libcudart' >&2; exit 1")
    assert torch_check(broken).state == "failed" and "libcudart" in torch_check(broken).detail
    assert torch_check(str(tmp_path / "nowhere")).state == "warning"


def script(file: Path, line: str) -> str:
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)
    return str(file)


def test_root_options_are_accepted_anywhere() -> None:
    assert (
        hoist_root_options("jobs list --url x --json --api-key=k".split())
        == "--url x --json --api-key=k jobs list".split()
    )
    assert hoist_root_options(["a", "--", "--json"]) == ["a", "--", "--json"]
    assert hoist_root_options(["a", "--url"]) == ["--url", "a"]


def test_options_override_the_file_and_settings_override_both(tmp_path: Path) -> None:
    assert [parse_value(text) for text in ("0.5", "null", "[3, 4]", "dpo")] == [0.5, None, [3, 4], "dpo"]
    (tmp_path / "a.json").write_text('{"seed": 1, "training": {"beta": 1, "lora": {"rank": 8}}}')
    options = {"seed": 2, "label": None, "training.algorithm": "dpo"}
    assert build_body(tmp_path / "a.json", options, ["training.beta=0.5", "label=a=b"]) == {
        "seed": 2,
        "label": "a=b",
        "training": {"beta": 0.5, "lora": {"rank": 8}, "algorithm": "dpo"},
    }


def test_formats_of_durations_and_sizes() -> None:
    assert [clock(None), clock(0), clock(61.9), clock(3723)] == ["-:--", "0:00", "1:01", "1:02:03"]
    assert [size(None), size(999), size(1500), size(2.5e9), size(3e12)] == ["-", "999 B", "1.5 KB", "2.5 GB", "3.0 TB"]


def metric(number: int, split: str, mean: float) -> MetricOut:
    return MetricOut(
        round=number,
        split=split,
        scorer="clip",
        version="1",
        model="mdl_1",
        training_images=0,
        count=1,
        mean=mean,
        std=0,
    )


def test_live_screen_fits_a_narrow_terminal(live: Live) -> None:
    with live.client() as client:
        done = client.job(live.done_job)
    progress = done.progress.model_copy(
        update={"stage": "sample", "done": 3, "total": 9, "percent": 42.0, "eta_seconds": 3723.0, "round": 1}
    )
    job = JobDetail.model_validate(
        done.model_dump() | {"state": "running", "rounds": 3, "label": "[red]no markup", "progress": progress}
    )
    metrics = [metric(0, "train", 0.2), metric(2, "train", 0.5), metric(1, "rollout", 0.1)]
    assert [(row.latest, row.change) for row in changes(metrics)] == [(0.5, 0.3), (0.1, None)]

    lines = rendered(screen(job, metrics), 46)
    assert lines[0] == f"round {job.id} running"
    assert lines[1] == "[red]no markup"
    assert lines[2].endswith(" 42 %")
    assert lines[3] == "round 1 of 3  sample 3/9  1:02:03 left"
    assert [line.split() for line in lines[5:7]] == [
        ["training", "clip", "0.5000", "+0.3000"],
        ["samples", "clip", "0.1000"],
    ]
    assert max(map(len, lines)) <= 46

    job.progress.shard = 1
    job.progress.shards = 2
    assert rendered(screen(job, metrics), 60)[3] == "round 1 of 3  sample 2 of 2, 3/9  1:02:03 left"


def test_ids_are_not_wrapped_in_narrow_tables() -> None:
    name = "job_" + "0" * 26
    lines = rendered(listing(("round>", "job", "prompt"), [(1, name, "[red]a very long prompt " * 5)]), 60)
    assert name in lines[1] and "[red]a very" in lines[1]


def rendered(renderable: RenderableType, width: int) -> list[str]:
    console = Console(width=width, record=True, file=StringIO())
    console.print(renderable)
    return [line.rstrip() for line in console.export_text().splitlines()]


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    command = command or get_command(app)
    subcommands = getattr(command, "commands", None)
    if subcommands is None:
        yield path, command
    for name, subcommand in (subcommands or {}).items():
        yield from commands(subcommand, (*path, name))


COMMANDS = dict(commands())


def check_line(line: str) -> tuple[str, ...]:
    """Parse a documented line with its command, which must accept it. Returns the command's path."""
    words = hoist_root_options(shlex.split(line, comments=True)[1:])
    while words[0].startswith("--"):
        del words[: 1 if words[0] == "--json" else 2]
    path = next(path for path in COMMANDS if tuple(words[: len(path)]) == path)
    context = COMMANDS[path].make_context("dfusion", words[len(path) :], resilient_parsing=False)
    assert context.params is not None
    return path


def test_every_documented_line_is_a_valid_command() -> None:
    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    dfusion ")]
    readme = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
    shown = [line.strip() for line in readme.splitlines() if line.startswith("    dfusion ")]
    assert shown
    assert {check_line(line) for line in lines} == COMMANDS.keys()
    for line in shown:
        check_line(line)


@pytest.mark.slow
def test_the_commands_about_a_watched_run(run: Run, live: Live) -> None:
    """Those of docs/how-to/watch-a-run.md on a finished run, whose best round is that of the installation."""
    [*commands] = "".join(blocks("docs/how-to/watch-a-run.md", "bash")).replace("\\\n", " ").splitlines()
    assert len(commands) == 6
    for command in commands:
        words = command.replace("JOB", live.done_job).replace("--rounds 40 --to-the-end", "--rounds 1 --to-the-end")
        if "round start" not in words and "evaluate" not in words:
            words += " --json"
        shown = run(*shlex.split(words)[1:])
        assert (shown.exit_code, shown.stderr) == (0, ""), command
    best = of_api(live, f"/jobs/{live.done_job}")["best"]
    assert best["round"] in (0, 1) and of_api(live, "/models/best")["id"]


def test_every_example_in_the_help_is_a_valid_command() -> None:
    count = 0
    for path, command in COMMANDS.items():
        text = command.help.replace("\\\n", " ").replace("\\[", "[").replace("Example: ", "\n")
        for line in map(str.strip, text.splitlines()):
            if line.startswith("dfusion "):
                check_line(line)
                count += 1
        assert command.help, path
    assert count > 15


def test_prompt_sets_are_added_from_rows(run: Run) -> None:
    Path("pets.jsonl").write_text('\ufeff{"prompt": "a cat on a mat", "seed": 1}\n"a [brown dog]"\n', "utf-8")
    Path("pets.json").write_text(json.dumps({"templates": ["a {pet} in a hat"], "lists": {"pet": ["cat", "dog"]}}))
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["a [cow]"]}), "pets.parquet")
    expected = {
        "jsonl": [["cat", "mat"], ["brown dog"]],
        "json": [["cat", "hat"], ["dog", "hat"]],
        "parquet": [["cow"]],
    }
    for suffix, items in expected.items():
        added = run("prompt-sets", "add", f"pets-{suffix}", f"pets.{suffix}", "--json")
        assert [prompt["items"] for prompt in json.loads(added.stdout)["prompts"]] == items


def test_items_and_warnings_of_an_added_set_are_printed(run: Run) -> None:
    Path("pets.txt").write_text("a (blue bird:1.2) in a tree\n")
    printed = run("prompt-sets", "add", "birds", "pets.txt").stdout
    assert "bird, tree" in printed
    warning = "warning: a (blue bird:1.2) in a tree: weighting syntax is read as plain text: '(blue bird:1.2)'"
    assert warning in " ".join(printed.split())


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("pets.txt", "a café".encode("cp1252"), "0xe9 at line 1, byte 6"),
        ("pets.csv", "text\na cat".encode("utf-16"), "UTF-16"),
        ("pets.json", b'{"templates": ["a {pet}"]}', "expected a list of values 'pet'"),
        ("pets.jsonl", b'{"text": "a cat"}\n{', "line 2: expected JSON"),
        ("pets.parquet", b"", "expected a parquet file"),
        ("nowhere.jsonl", None, "cannot read nowhere.jsonl"),
        (".", None, "state.json"),
    ],
)
def test_prompt_files_of_another_form_are_refused(run: Run, name: str, content: bytes | None, problem: str) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    refused = run("prompt-sets", "add", "pets", name)
    assert refused.exit_code == 2
    assert problem in " ".join(re.sub(r"[│╭╮╰╯─]", " ", refused.stderr).split())


def test_prompt_sets_are_added_from_files_and_options(run: Run) -> None:
    Path("pets.json").write_text(json.dumps({"description": "three", "prompts": PROMPTS}))
    Path("pets.txt").write_text("a [cat] on a [sofa]\n")
    assert json.loads(run("prompt-sets", "add", "shapes-of-mine", "pets.json", "--json").stdout)["size"] == 3
    assert json.loads(run("prompt-sets", "add", "pets", "pets.txt", "--json").stdout)["prompts"][0]["items"] == [
        "cat",
        "sofa",
    ]
    added = run("prompt-sets", "add", "pets", "--prompt", "a [dog] on a [sofa]", "--json")
    assert json.loads(added.stdout)["version"] == 2
    assert run("prompt-sets", "delete", "pets", "--json").stdout == "null\n"
    assert run("prompt-sets", "show", "pets").exit_code == 1


def test_api_keys_are_created_listed_and_revoked(live: Live, run: Run) -> None:
    line = "api-keys create ann --scope submit --scope review --expires-at 2099-12-31"
    created = json.loads(run(*line.split(), "--json").stdout)
    assert (created["name"], created["scopes"], created["active"]) == ("ann", ["review", "submit"], True)
    assert created["expires_at"].startswith(("2099-12-30", "2099-12-31"))
    assert json.loads(run("api-keys", "list", "--limit", "1", "--json").stdout) == of_api(live, "/api-keys", limit=1)
    shown = run("api-keys", "list").stdout
    assert created["id"] in shown and created["prefix"] in shown and created["key"] not in shown
    assert run("api-keys", "revoke", created["id"], "--json").stdout == "null\n"
    assert of_api(live, "/api-keys", limit=1)["data"][0]["active"] is False


def test_a_new_api_key_is_shown_in_full(live: Live, run: Run) -> None:
    shown = run("api-keys", "create", "bob", "--scope", "read").stdout
    with live.client() as client:
        newest = next(client.api_keys())
    key = next(word for word in shown.split() if word.startswith("dfk_"))
    assert len(key) == len("dfk_") + 51
    assert newest.prefix == key[:12] and newest.id in shown and "never" in shown
    assert run("api-keys", "create", "eve").exit_code == 2
    assert run("api-keys", "create", "eve", "--scope", "all").exit_code == 2
    assert run("api-keys", "revoke", live.done_job).exit_code == 1


@pytest.mark.slow
def test_webhooks_are_created_listed_replayed_and_removed(live: Live, run: Run) -> None:
    line = "webhooks create https://example.org/dfusion --event job.cancelled --event job.waiting"
    created = json.loads(run(*line.split(), "--json").stdout)
    assert (created["url"], created["events"]) == ("https://example.org/dfusion", ["job.cancelled", "job.waiting"])
    assert json.loads(run("webhooks", "list", "--limit", "1", "--json").stdout) == of_api(live, "/webhooks", limit=1)
    assert created["secret"] not in run("webhooks", "list").stdout

    job = queued(live)
    with live.client() as client:
        client.cancel(job)
    listed = json.loads(run("webhooks", "deliveries", "--webhook", created["id"], "--json").stdout)
    assert listed == of_api(live, "/webhook-deliveries", webhook=created["id"], limit=50)
    [delivery] = listed["data"]
    assert (delivery["job"], delivery["event"]) == (job, "job.cancelled")
    assert delivery["id"] in run("webhooks", "deliveries").stdout
    assert json.loads(run("webhooks", "replay", delivery["id"], "--json").stdout)["state"] == "pending"

    assert run("webhooks", "remove", created["id"], "--json").stdout == "null\n"
    assert "removed" in run("webhooks", "list").stdout
    assert run("webhooks", "replay", delivery["id"]).exit_code == 1


def test_the_secret_of_a_new_webhook_is_shown_in_full(run: Run) -> None:
    shown = run("webhooks", "create", "https://example.org/").stdout
    secret = next(word for word in shown.split() if word.startswith("whsec_"))
    assert len(secret) == len("whsec_") + 44  # 32 bytes in base64
    assert run("webhooks", "remove", next(word for word in shown.split() if word.startswith("whk_"))).exit_code == 0
    assert run("webhooks", "create", "http://example.org/").exit_code == 1
