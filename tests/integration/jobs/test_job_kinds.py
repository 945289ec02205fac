"""All kinds of jobs on the tiny pipeline, run in this process and inspected through the API."""

import io
import math
import statistics
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from diffusers import StableDiffusionPipeline
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy import update

from api.main import create_app
from dfusion.training_data import TrainingSample
from service.db.tables import Stage
from service.jobs import execution
from tests.installation import Installation
from tests.nets import overflowing_pipeline
from tests.service import PROMPTS, round_body, service_of, settings_for, work_until_idle
from worker.runner import run_stage
from worker.stages import train
from worker.training_examples import TrainingExamples, training_examples
from worker.workbench import Workbench

STEPS = {"num_steps": 4}
FUSION = {"first_step": 1, "last_step": 3}
TRAINING = {"examples_per_update": 2, "micro_batch": 4, "inner_epochs": 1}
EVERY_TARGET = {"adoption_threshold": 0, "max_mask_cover": 1}


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Iterator[Installation]:
    data = tmp_path_factory.mktemp("kinds")
    with TestClient(create_app(settings_for(data, pipeline))) as client:
        yield Installation(client)


@pytest.fixture(scope="module")
def sampled(installation: Installation) -> dict[str, Any]:
    body = {"model": "tiny", "prompts": PROMPTS, "samples_per_prompt": 4, "seed": 3, "sampling": STEPS}
    return installation.done("/samplings", body | {"scorers": ["brightness", "constant"]})


@pytest.fixture(scope="module")
def fused(installation: Installation, sampled: dict[str, Any]) -> dict[str, Any]:
    body = {"sampling": sampled["id"], "fusion": FUSION, "reward": "brightness", "pairing": EVERY_TARGET}
    return installation.done("/fusions", body)


@pytest.fixture(scope="module")
def trained(installation: Installation, fused: dict[str, Any]) -> dict[str, Any]:
    return installation.done("/trainings", {"jobs": [fused["id"]], "training": TRAINING, "seed": 5})


def test_a_sampling_makes_scored_samples_and_their_figures(installation: Installation, sampled: dict[str, Any]) -> None:
    assert (sampled["state"], sampled["outputs"]) == ("succeeded", {"samples": 12, "pairs": 0, "models": 0})
    samples = installation.all(f"/samples?job={sampled['id']}")
    assert {tuple(sorted(s["scorer"] for s in sample["scores"])) for sample in samples} == {("brightness", "constant")}
    metrics = {m["scorer"]: m for m in installation.get(f"/jobs/{sampled['id']}/metrics")["data"]}
    bright = [s["value"] for sample in samples for s in sample["scores"] if s["scorer"] == "brightness"]
    assert metrics["brightness"]["mean"] == pytest.approx(statistics.fmean(bright))
    assert metrics["diversity"]["mean"] > 0


def test_a_sampling_is_paired_best_against_worst(installation: Installation, fused: dict[str, Any]) -> None:
    assert (fused["state"], fused["outputs"]["pairs"]) == ("succeeded", 6)
    pairs = installation.all(f"/pairs?job={fused['id']}")
    assert all(pair["reference"]["score"] > pair["base"]["score"] for pair in pairs)
    assert all(pair["target"] for pair in pairs)
    assert [pair["adopted"] for pair in pairs] == [pair["statistics"]["mask_cover"] > 0 for pair in pairs]
    assert sum(pair["adopted"] for pair in pairs) >= 4
    assert {tuple(pair["thresholds"]) for pair in pairs} == {tuple(p["thresholds"]) for p in PROMPTS}


def test_a_pair_is_fused_again_from_its_stored_trajectories(installation: Installation, fused: dict[str, Any]) -> None:
    pair = next(p for p in installation.all(f"/pairs?job={fused['id']}") if p["target"])
    same = installation.done("/fusions", {"pair": pair["id"], "fusion": FUSION, "reward": "brightness"})
    other = installation.done(
        "/fusions", {"pair": pair["id"], "fusion": {"first_step": 2, "last_step": 2}, "reward": "brightness"}
    )
    [again], [different] = (installation.all(f"/pairs?job={job['id']}") for job in (same, other))
    picture = installation.client.get(pair["target"]["image"]).content
    assert installation.client.get(again["target"]["image"]).content == picture
    assert again["base"]["id"] == different["base"]["id"] == pair["base"]["id"]
    assert again["target"]["score"] == pair["target"]["score"] != different["target"]["score"]


def test_named_pairs_are_scored_by_a_scorer_that_had_not_seen_them(
    installation: Installation, sampled: dict[str, Any]
) -> None:
    first, second = installation.all(f"/samples?job={sampled['id']}")[:2]
    weighted = {"kind": "weighted", "parts": [{"scorer": "brightness", "weight": -2}]}
    body = {"pairs": [{"reference": first["id"], "base": second["id"]}], "fusion": FUSION, "reward": weighted}
    job = installation.done("/fusions", body | {"thresholds": [0.5]})
    [pair] = installation.all(f"/pairs?job={job['id']}")
    bright = {s["scorer"]: s["value"] for s in first["scores"]}["brightness"]
    assert (pair["reference"]["score"], pair["thresholds"]) == (pytest.approx(-2 * bright), [0.5])


@pytest.mark.parametrize("changes", [{"trajectory": "ddim_inversion"}, {"control": "masactrl"}])
def test_the_papers_ablations_are_settings_of_a_fusion(
    installation: Installation, fused: dict[str, Any], changes: dict[str, str]
) -> None:
    pair = installation.all(f"/pairs?job={fused['id']}")[0]
    job = installation.done("/fusions", {"pair": pair["id"], "fusion": FUSION | changes, "reward": "brightness"})
    assert (job["state"], job["error"]) == ("succeeded", None)
    fuse = installation.all(job["links"]["stages"])[2]
    assert fuse["done"] == fuse["total"] == (8 if "trajectory" in changes else 4)


def test_a_vae_that_overflows_fails_every_stage_that_decodes(tmp_path: Path) -> None:
    """Sampling, evaluation, and fusion of samples that the same VAE decoded in float32."""
    overflowing_pipeline().save_pretrained(tmp_path / "pipeline")

    def opened(vae_dtype: str) -> TestClient:
        models = {"tiny": {"source": str(tmp_path / "pipeline"), "vae_dtype": vae_dtype}}
        return TestClient(create_app(settings_for(tmp_path / "data", tmp_path / "pipeline", models=models)))

    sampling = {"model": "tiny", "prompts": PROMPTS[:1], "sampling": STEPS, "scorers": ["brightness"]}
    evaluation = {"models": ["tiny"], "prompts": PROMPTS[:1], "sampling": STEPS, "scorers": ["brightness"]}
    with opened("float32") as client:
        good = Installation(client).done("/samplings", sampling)
        assert good["state"] == "succeeded"
    fusion = {"sampling": good["id"], "fusion": FUSION, "reward": "brightness"}
    with opened("float16") as client:
        installation = Installation(client)
        for path, body in (("/samplings", sampling), ("/evaluations", evaluation), ("/fusions", fusion)):
            failed = installation.done(path, body)
            assert (failed["state"], failed["error"]["code"]) == ("failed", "non_finite")
            assert "VAE in float16" in failed["error"]["message"] and "vae_dtype" in failed["error"]["message"]
            assert failed["outputs"]["samples"] == 0


def test_stored_pairs_are_trained_on_alone(installation: Installation, trained: dict[str, Any]) -> None:
    assert (trained["state"], trained["outputs"]["models"]) == ("succeeded", 1)
    model = installation.get(f"/models/{trained['last_model']}")
    assert (model["statistics"]["pairs"], model["statistics"]["examples"], model["base"]) == (6, 6, "tiny")
    [child, base] = installation.get(f"/models/{model['id']}/lineage")["data"]
    assert (child["seed"], child["job"], base["name"]) == (5, trained["id"], "tiny")


def test_verdicts_decide_which_side_is_better(installation: Installation, fused: dict[str, Any]) -> None:
    pairs = installation.all(f"/pairs?job={fused['id']}")
    body = {"pairs": [p["id"] for p in pairs], "prefer": "verdicts", "training": TRAINING}
    assert installation.client.post("/trainings", json=body).json()["code"] == "no_pairs"
    for pair, verdict in zip(pairs, ["target", "base", "tie", "reject"], strict=False):
        response = installation.client.put(f"/pairs/{pair['id']}/verdict", json={"prefer": verdict, "reviewer": "ann"})
        assert (response.status_code, response.json()["verdict"]["prefer"]) == (200, verdict)
    job = installation.done("/trainings", body)
    assert installation.get(f"/models/{job['last_model']}")["statistics"]["examples"] == 2  # ties are not trained on
    assert len(installation.all(f"/pairs?job={fused['id']}&judged=true")) == 4
    reversed_alone = installation.done("/trainings", body | {"pairs": [pairs[1]["id"]]})
    straight = installation.done("/trainings", {"pairs": [pairs[1]["id"]], "training": TRAINING})
    assert installation.adapter(reversed_alone) != installation.adapter(straight)


def test_a_verdict_on_what_has_changed_is_refused(installation: Installation, fused: dict[str, Any]) -> None:
    path = installation.all(f"/pairs?job={fused['id']}")[5]["links"]["self"]
    etag = installation.client.get(path).headers["etag"]
    put = lambda body, **headers: installation.client.put(f"{path}/verdict", json=body, headers=headers)  # noqa: E731
    assert put({"prefer": "tie"}, **{"If-Match": etag}).status_code == 200
    late = put({"prefer": "base"}, **{"If-Match": etag})
    assert (late.status_code, late.json()["code"]) == (412, "changed_meanwhile")
    assert put({"prefer": None}).json()["verdict"] is None
    assert put({"prefer": "me"}).status_code == put({}).status_code == 422
    assert put({"prefer": "tie"}, **{"If-Match": "x"}).status_code == 422


def test_models_are_compared_on_the_same_images(installation: Installation, trained: dict[str, Any]) -> None:
    body = {"models": ["tiny", trained["last_model"]], "prompts": PROMPTS, "samples_per_prompt": 2, "sampling": STEPS}
    job = installation.done("/evaluations", body | {"scorers": ["brightness"], "resamples": 200})
    assert (job["state"], job["error"]) == ("succeeded", None)
    samples = installation.all(f"/samples?job={job['id']}")
    base_id = installation.get("/models/tiny")["id"]
    by_model = {
        model: {(s["prompt_index"], s["seed"]): s["scores"][0]["value"] for s in samples if s["model"] == model}
        for model in (base_id, trained["last_model"])
    }
    assert by_model[base_id].keys() == by_model[trained["last_model"]].keys()
    result = job["result"]["splits"]["prompts"]
    means = {row["model"]: row["mean"] for row in result["models"]}
    assert means == {model: pytest.approx(statistics.fmean(values.values())) for model, values in by_model.items()}
    [compared] = result["compared_with_the_first"]
    assert compared["baseline"] == base_id
    assert compared["difference"]["mean"] == pytest.approx(means[trained["last_model"]] - means[base_id])
    low, high = compared["difference"]["interval"]
    assert low <= compared["difference"]["mean"] <= high
    assert len(installation.get(f"/jobs/{job['id']}/metrics")["data"]) == 2


def test_an_adapter_is_exported_in_every_form(
    installation: Installation, trained: dict[str, Any], pipeline: Path, tmp_path: Path
) -> None:
    model = trained["last_model"]
    early = installation.client.get(f"/models/{model}/download?format=kohya", follow_redirects=False)
    assert (early.status_code, early.json()["code"]) == (409, "conflict")
    for form in ("diffusers", "kohya", "peft", "merged"):
        job = installation.done("/exports", {"model": model, "format": form})
        assert (job["state"], job["error"]) == ("succeeded", None)
        response = installation.client.get(f"/models/{model}/download?format={form}")
        assert response.status_code == 200
        (tmp_path / f"{form}.bin").write_bytes(response.content)
    exports = installation.get(f"/models/{model}")["exports"]
    assert all(export["statistics"]["difference"] <= 1 / 255 for export in exports)
    assert {export["format"] for export in exports} == {"diffusers", "kohya", "peft", "merged"}
    stock = StableDiffusionPipeline.from_pretrained(str(pipeline), safety_checker=None)
    (tmp_path / "kohya.safetensors").write_bytes((tmp_path / "kohya.bin").read_bytes())
    stock.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
    assert stock.get_active_adapters()
    for form, part in (("merged", "model_index.json"), ("peft", "adapter_config.json")):
        with zipfile.ZipFile(tmp_path / f"{form}.bin") as packed:
            assert {part, "recipe.json", "preview.png", "README.md"} <= set(packed.namelist())


def test_a_preview_has_the_settings_of_the_training_or_of_the_request(installation: Installation) -> None:
    sampling = {"num_steps": 3, "guidance_scale": 2.0, "eta": 0.5, "negative_prompt": "blurry"}
    job = installation.run(prompts=PROMPTS[:1], rounds=1, evaluation=None, sampling=sampling)
    export = {"model": job["last_model"], "format": "kohya", "seed": 3}
    installation.done("/exports", export)
    installation.done("/exports", export | {"prompt": "a green star", "sampling": {"num_steps": 2, "width": 24}})

    for wrong, pointer in (({"prompt": "a " * 99}, "/prompt"), ({"sampling": {"width": 61}}, "/sampling/width")):
        refused = installation.client.post("/exports", json=export | wrong)
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, pointer)

    asked, default = installation.get(f"/exports?model={job['last_model']}")["data"]
    recipe = default["recipe"]
    assert (recipe["base"], recipe["seed"], recipe["format"]) == ("tiny", 3, "kohya")
    size = {"height": 16, "width": 16}
    of_training = sampling | size | {"prompt": PROMPTS[0]["text"]}
    of_training["num_inference_steps"] = of_training.pop("num_steps")
    assert recipe["call"] == of_training

    assert (asked["recipe"]["call"]["prompt"], asked["recipe"]["call"]["width"]) == ("a green star", 24)
    for row in (asked, default):
        image = Image.open(io.BytesIO(installation.client.get(row["preview"]).content))
        assert image.size == (row["recipe"]["call"]["width"], 16)


def test_pairs_become_a_data_set(installation: Installation, fused: dict[str, Any]) -> None:
    job = installation.done("/exports", {"job": fused["id"], "format": "parquet"})
    [export] = installation.get(f"/exports?job={fused['id']}")["data"]
    assert (export["statistics"], job["state"]) == ({"pairs": 6}, "succeeded")
    table = pyarrow.parquet.read_table(io.BytesIO(installation.client.get(export["artifact"]).content))
    pairs = installation.all(f"/pairs?job={fused['id']}")
    assert table["pair_id"].to_pylist() == [pair["id"] for pair in pairs]
    assert table["jpg_0"][0].as_py() == installation.client.get(pairs[0]["target"]["image"]).content
    assert table["label_0"].to_pylist() == [1.0] * 6
    assert set(table["scorer"].to_pylist()) == {"brightness@1"}


@pytest.mark.parametrize("fusion", [None, FUSION])
@pytest.mark.parametrize("algorithm", ["ddpo", "dpok"])
def test_policy_gradients_learn_from_samples_and_their_whole_history(
    installation: Installation, algorithm: str, fusion: dict[str, int] | None
) -> None:
    training = TRAINING | {"algorithm": algorithm, "clip_range": 0.1}
    body = round_body(prompts=PROMPTS[:1], fusion=fusion, training=training, rounds=2, evaluation=None)
    job = installation.done("/rounds", body)
    assert (job["state"], job["error"]) == ("succeeded", None)
    second, first = installation.all(f"/models?job={job['id']}")
    assert first["statistics"]["examples"] == second["statistics"]["examples"] == 4
    assert math.isfinite(second["statistics"]["last_loss"])


def test_the_adapter_that_a_training_continues_from_is_kept(
    installation: Installation, trained: dict[str, Any]
) -> None:
    body = round_body(model=trained["last_model"], training=TRAINING | {"lora": {"rank": 8}})
    response = installation.client.post("/rounds", json=body).json()
    assert (response["code"], response["errors"][0]["pointer"]) == ("adapter_is_kept", "/training/lora")


def test_a_model_can_have_a_name(installation: Installation, trained: dict[str, Any]) -> None:
    put = installation.client.put("/aliases/champion", json={"model": trained["last_model"]})
    assert (put.status_code, put.json()["aliases"]) == (200, ["champion"])
    assert installation.get("/models/champion")["id"] == trained["last_model"]
    job = installation.done("/samplings", {"model": "champion", "prompts": PROMPTS[:1], "sampling": STEPS})
    assert job["model"] == trained["last_model"]
    assert installation.client.put("/aliases/tiny", json={"model": trained["last_model"]}).status_code == 409
    assert installation.client.delete("/aliases/champion").status_code == 204
    assert installation.client.get("/models/champion").status_code == 404


def test_a_round_waits_for_review_if_requested(installation: Installation) -> None:
    job_id = installation.post(review="required", evaluation=None)
    work_until_idle(installation.service)
    assert installation.get(f"/jobs/{job_id}")["state"] == "waiting"
    pairs = installation.all(f"/pairs?job={job_id}")
    for pair in pairs:
        assert installation.get(f"/jobs/{job_id}")["state"] == "waiting"
        installation.client.put(f"/pairs/{pair['id']}/verdict", json={"prefer": "target"})
    assert installation.get(f"/jobs/{job_id}")["state"] == "running"
    work_until_idle(installation.service)
    assert installation.get(f"/jobs/{job_id}")["state"] == "succeeded"


def judge(installation: Installation, pair: dict[str, Any], prefer: str) -> None:
    assert installation.client.put(f"/pairs/{pair['id']}/verdict", json={"prefer": prefer}).status_code == 200


def test_a_sample_of_a_round_is_reviewed(installation: Installation) -> None:
    """Two of six pairs wait. A rejected one is not trained on, and the others are, as scored."""
    body = {"review": "sample", "review_pairs": 2, "evaluation": None}
    job_id, same = installation.post(**body), installation.post(**body)
    work_until_idle(installation.service)
    job = installation.get(f"/jobs/{job_id}")
    path = f"/pairs?job={job_id}&round=1&in_review=true"
    assert (job["state"], job["review"]) == ("waiting", {"round": 1, "pairs": 2, "judged": 0, "href": path})
    waiting = installation.all(path)
    others = installation.all(f"/pairs?job={job_id}&in_review=false")
    assert (len(waiting), len(others)) == (2, 4)
    chosen = [pair["number"] for pair in waiting]
    assert [pair["number"] for pair in installation.all(f"/pairs?job={same}&in_review=true")] == chosen  # by the seed

    judge(installation, others[0], "target")
    judge(installation, waiting[0], "reject")
    assert installation.get(f"/jobs/{job_id}")["review"]["judged"] == 1
    judge(installation, waiting[1], "target")
    job = installation.get(f"/jobs/{job_id}")
    assert (job["state"], job["review"]) == ("running", None)
    work_until_idle(installation.service)
    job = installation.get(f"/jobs/{job_id}")
    assert job["state"] == "succeeded"
    assert installation.get(f"/models/{job['last_model']}")["statistics"]["pairs"] == 5

    assert installation.client.post(f"/jobs/{same}/cancel").json()["state"] == "cancelled"
    judge(installation, installation.all(f"/pairs?job={same}&in_review=true")[0], "target")
    assert installation.client.delete(f"/jobs/{same}").status_code == 204


def test_a_large_sample_is_all_pairs_and_a_removed_verdict_is_missing(installation: Installation) -> None:
    job_id = installation.post(review="sample", review_pairs=50, evaluation=None)
    work_until_idle(installation.service)
    pairs = installation.all(f"/pairs?job={job_id}")
    for pair in pairs[:-1]:
        judge(installation, pair, "tie")
    installation.client.put(f"/pairs/{pairs[0]['id']}/verdict", json={"prefer": None})
    judge(installation, pairs[-1], "tie")
    job = installation.get(f"/jobs/{job_id}")
    assert (job["state"], job["review"]["judged"], job["review"]["pairs"]) == ("waiting", 5, 6)
    judge(installation, pairs[0], "tie")
    assert installation.get(f"/jobs/{job_id}")["state"] == "running"
    installation.client.post(f"/jobs/{job_id}/cancel")


@pytest.mark.parametrize(
    ("prefer", "of_target", "of_base"), [("target", 1, -1), ("base", -1, 1), ("tie", 0, 0), ("reject", -1, -1)]
)
def test_verdicts_are_the_reward_of_an_update(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, prefer: str, of_target: float, of_base: float
) -> None:
    advantages: list[tuple[bool, float]] = []

    def noted(*arguments: Any) -> TrainingExamples:
        learned = training_examples(*arguments)
        for example in learned.examples:
            assert isinstance(example, TrainingSample)
            advantages.append((example.on_policy, example.advantage))  # the model sampled bases, but not targets
        return learned

    monkeypatch.setattr(train, "training_examples", noted)
    training = TRAINING | {"algorithm": "ddpo"}
    body = {"prompts": PROMPTS[:1], "review": "required", "evaluation": None}
    job_id = installation.post(**body, update_reward="verdict", training=training)
    work_until_idle(installation.service)
    for pair in installation.all(f"/pairs?job={job_id}"):
        judge(installation, pair, prefer)
    work_until_idle(installation.service)

    job = installation.get(f"/jobs/{job_id}")
    assert job["state"] == "succeeded"
    assert advantages == [(False, of_target), (True, of_base)] * 2
    statistics = installation.get(f"/models/{job['last_model']}")["statistics"]
    assert (statistics["pairs"], statistics["adopted"]) == (2, 2 if prefer == "target" else 0)
    assert (statistics["last_grad_norm"] == 0.0) == (prefer == "tie")


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"review": "sample"}, "/review_pairs"),
        ({"review": "required", "review_pairs": 3}, "/review_pairs"),
        ({"review": "some"}, "/review"),
        ({"review": "required", "training": {"algorithm": "ddpo"}}, "/review"),
        ({"update_reward": "verdict", "training": {"algorithm": "ddpo"}}, "/update_reward"),
        ({"review": "required", "update_reward": "verdict"}, "/update_reward"),
    ],
)
def test_a_review_fits_the_training(installation: Installation, changes: dict[str, Any], pointer: str) -> None:
    response = installation.client.post("/rounds", json=round_body(**changes))
    assert response.status_code == 422
    assert pointer in [problem["pointer"] for problem in response.json()["errors"]], response.text


def judge_all(installation: Installation, job_id: str) -> None:
    for pair in installation.all(f"/pairs?job={job_id}"):
        put = installation.client.put(f"/pairs/{pair['id']}/verdict", json={"prefer": "target"})
        assert put.status_code == 200


def test_verdicts_given_while_a_job_is_paused_end_its_review(installation: Installation) -> None:
    job_id = installation.post(review=True, evaluation=None)
    work_until_idle(installation.service)
    assert installation.client.post(f"/jobs/{job_id}/pause").json()["state"] == "paused"
    judge_all(installation, job_id)
    assert installation.get(f"/jobs/{job_id}")["state"] == "paused"
    assert installation.client.post(f"/jobs/{job_id}/resume").json()["state"] == "running"
    work_until_idle(installation.service)
    assert installation.get(f"/jobs/{job_id}")["state"] == "succeeded"


def test_verdicts_given_while_something_else_still_runs_end_a_review(installation: Installation) -> None:
    job_id = installation.post(review=True)
    service = installation.service
    held = execution.claim(service.uow, service.settings, "slow")
    assert held is not None and held.kind == "evaluate"
    work_until_idle(service)
    assert installation.get(f"/jobs/{job_id}")["state"] == "running"
    judge_all(installation, job_id)
    run_stage(Workbench.of(service), held, threading.Event())
    work_until_idle(service)
    assert installation.get(f"/jobs/{job_id}")["state"] == "succeeded"


def test_events_can_be_polled_for_from_the_first_on(installation: Installation) -> None:
    job_id = installation.post(evaluation=None)
    events = f"/jobs/{job_id}/events"
    first = installation.get(events)
    assert ([event["kind"] for event in first["data"]], first["has_more"]) == (["job.created"], False)
    started = time.monotonic()
    nothing = installation.get(f"{events}?wait=0.3&cursor={first['next_cursor']}")
    assert (nothing["data"], nothing["next_cursor"]) == ([], first["next_cursor"])
    assert time.monotonic() - started >= 0.3
    work_until_idle(installation.service)
    rest = installation.get(f"{events}?wait=30&limit=200&cursor={nothing['next_cursor']}")
    assert [rest["data"][0]["kind"], rest["data"][-1]["kind"]] == ["stage.started", "job.succeeded"]


def test_a_review_can_be_skipped(installation: Installation) -> None:
    job_id = installation.post(review=True, evaluation=None)
    early = installation.client.post(f"/jobs/{job_id}/skip-review")
    assert (early.status_code, "is queued" in early.json()["detail"]) == (409, True)
    work_until_idle(installation.service)
    resumed = installation.client.post(f"/jobs/{job_id}/resume")
    assert (resumed.status_code, "skip-review ends its review" in resumed.json()["detail"]) == (409, True)

    skipped = installation.client.post(f"/jobs/{job_id}/skip-review")
    assert (skipped.status_code, skipped.json()["state"]) == (202, "running")
    work_until_idle(installation.service)
    assert installation.get(f"/jobs/{job_id}")["state"] == "succeeded"


def test_presets_fill_in_missing_values(installation: Installation) -> None:
    body = round_body(preset="released_code", fusion={"first_step": 1})
    spec = installation.client.post("/rounds", json=body).json()["spec"]
    assert (spec["fusion"]["merge"], spec["fusion"]["mask_source"], spec["fusion"]["first_step"]) == (
        "or",
        "resolution",
        1,
    )
    pairing = spec["pairing"]
    assert (pairing["dealing"], pairing["adoption_threshold"], pairing["max_mask_cover"]) == ("rank_order", 0, 1)


@pytest.mark.usefixtures("sampled")
def test_an_estimate_knows_what_past_jobs_took(installation: Installation) -> None:
    body = {"model": "tiny", "prompts": PROMPTS, "samples_per_prompt": 8, "sampling": STEPS, "scorers": ["brightness"]}
    estimate = installation.client.post("/samplings?dry_run=true", json=body).json()
    assert estimate["images"]["sampled"] == 24
    assert estimate["unet_evaluations"]["sampling"] == 24 * 4 * 2
    assert estimate["seconds"] > 0 and estimate["storage_bytes"] > 0
    assert 10**8 < estimate["memory_bytes"] < 2**36  # a process with torch takes hundreds of megabytes
    with installation.service.uow.writing() as session:
        session.execute(update(Stage).where(Stage.kind == "sample").values(memory_bytes=2**40))
    assert installation.client.post("/samplings?dry_run=true", json=body).json()["memory_bytes"] == 2**40


@pytest.mark.parametrize(
    ("path", "body", "code", "pointer"),
    [
        ("/fusions", {}, "invalid_request", ""),
        ("/fusions", {"pair": "pair_x"}, "unknown_pair", "/pair"),
        ("/fusions", {"pairs": [{"reference": "a", "base": "b"}]}, "unknown_sample", "/pairs/0/reference"),
        ("/fusions", {"sampling": "job_x"}, "unknown_job", "/sampling"),
        ("/trainings", {"pairs": ["x"], "jobs": ["y"]}, "invalid_request", ""),
        ("/trainings", {"pairs": []}, "invalid_request", "/pairs"),
        ("/trainings", {"jobs": ["job_x"]}, "unknown_job", "/jobs/0"),
        ("/evaluations", {"models": [], "prompt_sets": ["paper-position-test"]}, "invalid_request", "/models"),
        ("/evaluations", {"models": ["who"], "prompt_sets": ["shapes-position-test"]}, "unknown_model", "/models/0"),
        ("/evaluations", {"models": ["shapes"], "prompt_sets": ["what"]}, "unknown_prompt_set", "/prompt_sets/0"),
        ("/evaluations", {"models": ["shapes", "shapes"], "prompts": PROMPTS}, "invalid_request", ""),
        ("/exports", {"model": "shapes", "format": "parquet"}, "invalid_request", ""),
        ("/exports", {"model": "shapes", "format": "kohya"}, "no_adapter", "/model"),
        ("/exports", {"job": "job_x", "format": "parquet"}, "unknown_job", "/job"),
        ("/exports", {"job": "job_x", "format": "parquet", "prompt": "a"}, "invalid_request", "/prompt"),
        ("/samplings", {"prompts": PROMPTS, "scorers": ["nobody"]}, "unknown_scorer", "/scorers/0"),
        (
            "/samplings",
            {"prompts": PROMPTS, "scorers": [{"kind": "http", "url": "http://127.0.0.1"}]},
            "invalid_request",
            "/scorers/0",
        ),
    ],
)
def test_bad_requests_are_named_and_leave_nothing(
    installation: Installation, path: str, body: dict[str, Any], code: str, pointer: str
) -> None:
    before = len(installation.all("/jobs"))
    response = installation.client.post(path, json=body)
    assert (response.status_code, response.json()["code"]) == (422, code), response.text
    assert any(error["pointer"].startswith(pointer) for error in response.json()["errors"])
    assert len(installation.all("/jobs")) == before


def test_samples_of_different_prompts_are_no_pair(installation: Installation, sampled: dict[str, Any]) -> None:
    samples = installation.all(f"/samples?job={sampled['id']}")
    body = {"pairs": [{"reference": samples[0]["id"], "base": samples[-1]["id"]}], "fusion": FUSION}
    response = installation.client.post("/fusions", json=body | {"reward": "brightness"}).json()
    assert (response["code"], response["errors"][0]["pointer"]) == ("prompts_differ", "/pairs/0")
    late = {"pair": "pair_x", "sampling": sampled["id"]}
    assert installation.client.post("/fusions", json=late).status_code == 422
    steps = {"sampling": sampled["id"], "fusion": {"first_step": 7}, "reward": "brightness"}
    assert installation.client.post("/fusions", json=steps).json()["errors"][0]["pointer"] == "/fusion/first_step"


def test_advantages_use_all_that_a_prompt_ever_got_also_after_a_restart(
    tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[list[Any]] = []

    class Recording(train.Trainer):
        def __init__(self, model: Any, examples: Any, *rest: Any) -> None:
            learned.append(list(examples))
            super().__init__(model, examples, *rest)

    monkeypatch.setattr(train, "Trainer", Recording)
    training = TRAINING | {"algorithm": "ddpo", "clip_range": 0.1}
    settings = settings_for(tmp_path / "data", pipeline)
    with TestClient(create_app(settings)) as client:
        options = {"prompts": PROMPTS[:2], "fusion": None, "training": training, "evaluation": None}
        job_id = Installation(client).post(rounds=2, **options)
        work_until_idle(service_of(client), until=lambda held: held.round == 2)
    with TestClient(create_app(settings)) as client:  # a new process has only the database
        again = Installation(client)
        work_until_idle(again.service)
        samples = again.all(f"/samples?job={job_id}")
    scores = {(s["prompt"], s["round"], s["number"]): s["scores"][0]["value"] for s in samples}
    expected = []
    for prompt in (p["text"] for p in PROMPTS[:2]):
        history = [scores[prompt, r, n] for r in (1, 2) for n in range(4)]
        mean, std = statistics.fmean(history), statistics.pstdev(history)
        expected += [(scores[prompt, 2, n] - mean) / std for n in range(4)]
    assert [example.advantage for example in learned[1]] == pytest.approx(expected)


def test_the_baseline_is_the_requests_first_model_whoever_is_done_first(
    installation: Installation, trained: dict[str, Any]
) -> None:
    work_until_idle(installation.service)  # jobs of other tests
    body = {"models": ["tiny", trained["last_model"]], "prompts": PROMPTS[:1], "samples_per_prompt": 2}
    job_id = installation.ask("/evaluations", body | {"sampling": STEPS, "scorers": ["brightness"], "resamples": 100})
    service, stop = installation.service, threading.Event()
    bench = Workbench.of(service)
    held = [execution.claim(service.uow, service.settings, "test") for _ in range(2)]
    for claim in reversed(held):
        assert claim is not None and claim.kind == "evaluate"
        run_stage(bench, claim, stop)
    work_until_idle(service)
    [compared] = installation.get(f"/jobs/{job_id}")["result"]["splits"]["prompts"]["compared_with_the_first"]
    assert (compared["baseline"], compared["model"]) == (installation.get("/models/tiny")["id"], trained["last_model"])


def test_a_pair_is_fused_again_with_its_own_thresholds(installation: Installation, sampled: dict[str, Any]) -> None:
    reference, base = installation.all(f"/samples?job={sampled['id']}")[:2]
    body = {"pairs": [{"reference": reference["id"], "base": base["id"]}], "fusion": FUSION, "reward": "brightness"}
    first = installation.done("/fusions", body | {"thresholds": [0.5]})
    [pair] = installation.all(f"/pairs?job={first['id']}")
    again = installation.done("/fusions", {"pair": pair["id"], "fusion": FUSION, "reward": "brightness"})
    assert installation.all(f"/pairs?job={again['id']}")[0]["thresholds"] == [0.5]


def test_the_same_text_twice_keeps_its_own_thresholds(installation: Installation) -> None:
    prompts = [PROMPTS[0], {**PROMPTS[0], "thresholds": [0.4]}]
    job = installation.done("/rounds", round_body(prompts=prompts, evaluation=None, pairing=EVERY_TARGET))
    thresholds = {(p["prompt_index"], p["thresholds"][0]) for p in installation.all(f"/pairs?job={job['id']}")}
    assert thresholds == {(0, 0.02), (1, 0.4)}


def test_a_fusion_leaves_the_roles_of_other_jobs_samples(installation: Installation, sampled: dict[str, Any]) -> None:
    roles = {sample["role"] for sample in installation.all(f"/samples?job={sampled['id']}")}
    assert roles == {"plain"}


def test_a_review_without_pairs_does_not_wait(installation: Installation) -> None:
    job = installation.done("/rounds", round_body(review=True, reward="constant", evaluation=None))
    assert (job["state"], job["outputs"]["pairs"]) == ("succeeded", 0)


def test_targets_that_copy_their_bases_teach_nothing_and_end_nothing(installation: Installation) -> None:
    prompts = [{**PROMPTS[0], "thresholds": [0.999999]}]  # an empty mask
    job = installation.done("/rounds", round_body(prompts=prompts, evaluation=None, pairing=EVERY_TARGET))
    assert (job["state"], job["error"]) == ("succeeded", None)
    assert {pair["statistics"]["mask_cover"] for pair in installation.all(f"/pairs?job={job['id']}")} == {0}


def test_targets_whose_masks_fill_the_image_are_not_adopted_and_say_why(installation: Installation) -> None:
    """The threshold is below all attention values, so that the mask of every pair covers the whole image."""
    body = round_body(prompts=[{**PROMPTS[0], "thresholds": [1e-9]}], evaluation=None)
    refused = installation.done("/rounds", body | {"pairing": {"adoption_threshold": 0}})
    assert (refused["state"], refused["error"]) == ("succeeded", None)
    pairs = installation.all(refused["links"]["pairs"])
    assert len(pairs) == 2 and {pair["statistics"]["mask_cover"] for pair in pairs} == {1}
    assert not any(pair["adopted"] for pair in pairs)
    assert {pair["reason"] for pair in pairs} == {
        "the mask covers 1 of the image, max_mask_cover is 0.7: too little of the base is kept"
    }
    [verified] = [e for e in installation.all(refused["links"]["events"]) if e["kind"] == "round.verified"]
    assert verified["data"] == {"adopted": 0, "wide_masks": 2}
    assert "2 masks cover more than 0.7 of the image" in verified["message"]
    assert installation.get(f"/models/{refused['last_model']}")["statistics"]["adopted"] == 0
    kept = installation.done("/rounds", body | {"pairing": EVERY_TARGET})
    assert all(pair["adopted"] for pair in installation.all(kept["links"]["pairs"]))


def test_masks_that_a_control_does_not_use_are_not_counted_as_wide(installation: Installation) -> None:
    """The masks cover the whole image, but "kv" uses all keys and values of the reference, without masks."""
    body = round_body(prompts=[{**PROMPTS[0], "thresholds": [1e-9]}], evaluation=None)
    fusion = FUSION | {"control": "kv"}
    job = installation.done("/rounds", body | {"fusion": fusion, "pairing": {"adoption_threshold": 0}})
    assert all(pair["adopted"] for pair in installation.all(job["links"]["pairs"]))
    [verified] = [e for e in installation.all(job["links"]["events"]) if e["kind"] == "round.verified"]
    assert (verified["data"], verified["message"]) == ({"adopted": 2, "wide_masks": 0}, "2 of 2 targets adopted")


def test_an_export_by_verdicts_contains_the_sides_that_people_prefer(
    installation: Installation, fused: dict[str, Any]
) -> None:
    pairs = installation.all(f"/pairs?job={fused['id']}")
    for pair, verdict in zip(pairs, ["base", "reject", *["target"] * 4], strict=True):
        installation.client.put(f"/pairs/{pair['id']}/verdict", json={"prefer": verdict, "reviewer": "ann"})
    installation.done("/exports", {"job": fused["id"], "format": "parquet", "prefer": "verdicts"})
    newest = installation.get(f"/exports?job={fused['id']}")["data"][0]
    table = pyarrow.parquet.read_table(io.BytesIO(installation.client.get(newest["artifact"]).content))
    assert table["pair_id"].to_pylist() == [pair["id"] for pair in pairs if pair is not pairs[1]]
    assert (table["role_0"][0].as_py(), table["role_1"][0].as_py()) == ("base", "target")


@pytest.mark.parametrize(
    ("path", "changes", "pointer"),
    [
        ("/rounds", {"preset": []}, "/preset"),
        ("/rounds", {"review": True, "training": {"algorithm": "ddpo"}}, "/review"),
        ("/rounds", {"evaluation": {"scorers": ["brightness", "brightness"]}}, "/evaluation/scorers"),
        ("/evaluations", {"prompt_sets": ["shapes-position-test"] * 2}, "/prompt_sets"),
    ],
)
def test_what_could_only_fail_later_is_refused_at_once(
    installation: Installation, path: str, changes: dict[str, Any], pointer: str
) -> None:
    body = round_body() if path == "/rounds" else {"models": ["tiny"], "scorers": ["brightness"]}
    response = installation.client.post(path, json=body | changes)
    assert response.status_code == 422, response.text
    assert any(error["pointer"] == pointer for error in response.json()["errors"]), response.text


def test_latents_of_another_base_model_are_refused(
    installation: Installation, sampled: dict[str, Any], fused: dict[str, Any]
) -> None:
    other = installation.client.post("/trainings", json={"jobs": [fused["id"]], "model": "shapes"}).json()
    assert (other["code"], other["errors"][0]["pointer"]) == ("models_differ", "/jobs")
    layers = {"sampling": sampled["id"], "fusion": FUSION | {"mask_source": "resolution"}, "reward": "brightness"}
    response = installation.client.post("/fusions", json=layers).json()
    assert response["errors"][0]["pointer"] == "/fusion/mask_source"
