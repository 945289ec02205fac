"""The rows of the cases page about models, and a part of the sweep, through the service.

Whatever the files show is refused when a job is submitted. What only loading shows fails the job by name.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from api.main import create_app
from dfusion.facts import read_facts
from tests.installation import Installation
from tests.model_folders import (
    VARIANTS,
    WEIGHTS,
    Change,
    Templates,
    Variant,
    as_variant,
    both,
    file_of,
    nothing,
    schedule,
    scheduler,
)
from tests.service import PROMPTS, settings_for

REFUSED: dict[str, tuple[Change, str]] = {
    "flow-matching": (scheduler("FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler: a flow-matching"),
    "flow-prediction": (scheduler("UniPCMultistepScheduler", prediction_type="flow_prediction"), "flow_prediction"),
    "zero-snr-epsilon": (schedule(rescale_betas_zero_snr=True), "v-prediction and trailing spacing"),
    "lcm": (scheduler("LCMScheduler"), "a distilled few-step model is not a policy of Eq. 1"),
    "single-file": (file_of("a.safetensors", ("model.diffusion_model.x", "cond_stage_model.x")), "Convert it: python"),
    "ckpt": (file_of("a.ckpt"), "a pickle, which can run code and is never loaded"),
}
RUNNING = {
    "fp16-only": Variant("", both(*(as_variant(part, "fp16") for part in WEIGHTS))),
    "pndm": Variant("", scheduler("PNDMScheduler")),
    "xl": Variant("", nothing, xl=True),
}
SWEPT = VARIANTS[::16]
STEPS = {"num_steps": 3}


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("cases")
    templates = Templates(folder / "templates")
    refused = {row: Variant("", change) for row, (change, _) in REFUSED.items()}
    swept = {f"swept-{n}": variant for n, variant in enumerate(SWEPT)}
    variants = refused | RUNNING | swept
    models: dict[str, Any] = {
        name: str(templates.create(variant, folder / name / "model")) for name, variant in variants.items()
    }
    models |= {"too-long-a-name": "a" * 300, "no-name-on-the-hub": "a b/c@main"}
    models["too-long-an-adapter"] = {"source": models["pndm"], "adapter": "a" * 300}
    models["overflowing"] = {"source": str(templates.overflowing), "vae_dtype": "float16"}
    with TestClient(create_app(settings_for(folder / "data", folder, models=models))) as client:
        yield Installation(client)


def sampling_of(model: str, **sampling: Any) -> dict[str, Any]:
    body = {"model": model, "prompts": PROMPTS[:1], "samples_per_prompt": 2, "scorers": ["brightness"]}
    return body | {"sampling": STEPS | sampling}


@pytest.mark.parametrize("row", REFUSED)
def test_refused_at_submission(row: str, installation: Installation) -> None:
    evaluation = {"models": [row], "prompts": PROMPTS[:1], "scorers": ["brightness"]}
    for path, body, pointer in (
        ("/samplings", sampling_of(row), "/model"),
        ("/rounds", sampling_of(row) | {"reward": "brightness", "scorers": ...}, "/model"),
        ("/evaluations", evaluation, "/models/0"),
    ):
        sent = {name: value for name, value in body.items() if value is not ...}
        response = installation.client.post(path, json=sent)
        assert (response.status_code, response.json()["code"]) == (422, "unsupported_model"), response.text
        problems = {error["pointer"]: error["message"] for error in response.json()["errors"]}
        assert REFUSED[row][1] in problems[pointer]


@pytest.mark.parametrize("row", ["too-long-a-name", "no-name-on-the-hub"])
def test_names_that_no_file_has_fail_by_name(row: str, installation: Installation) -> None:
    """They might be files of a worker's machine."""
    job = installation.done("/samplings", sampling_of(row))
    assert (job["state"], job["error"]["code"]) == ("failed", "model_not_found")


def test_an_adapter_whose_name_no_file_has_fails_by_name(installation: Installation) -> None:
    job = installation.done("/samplings", sampling_of("too-long-an-adapter"))
    assert (job["state"], job["error"]["code"]) == ("failed", "adapter")
    assert "File name too long" in job["error"]["message"]


def test_num_steps_1_with_leading_spacing(installation: Installation) -> None:
    response = installation.client.post("/samplings", json=sampling_of("pndm", num_steps=1))
    [error] = response.json()["errors"]
    assert (response.status_code, error["pointer"]) == (422, "/sampling/num_steps")
    assert "expected at least 2" in error["message"]


@pytest.mark.parametrize("row", ["fp16-only", "pndm"])
def test_runs(row: str, installation: Installation) -> None:
    job = installation.done("/samplings", sampling_of(row))
    assert (job["state"], job["outputs"]["samples"]) == ("succeeded", 2)


def test_vae_in_float16_that_overflows(installation: Installation) -> None:
    job = installation.done("/samplings", sampling_of("overflowing"))
    assert (job["state"], job["error"]["code"]) == ("failed", "non_finite")
    assert "VAE in float16" in job["error"]["message"] and "vae_dtype" in job["error"]["message"]


def test_image_size_other_than_the_models_own(installation: Installation) -> None:
    """Base, reference and target of SDXL have 16 x 24 pixels; a side of 23 is refused."""
    response = installation.client.post("/samplings", json=sampling_of("xl", height=16, width=23))
    assert [error["pointer"] for error in response.json()["errors"]] == ["/sampling/width"]

    sampling = installation.done("/samplings", sampling_of("xl", height=16, width=24))
    fusion = {"first_step": 1, "last_step": 2}
    body = {"sampling": sampling["id"], "fusion": fusion, "reward": "brightness"}
    fused = installation.done("/fusions", body | {"pairing": {"adoption_threshold": 0, "max_mask_cover": 1}})
    assert (sampling["state"], fused["state"]) == ("succeeded", "succeeded")

    [pair] = installation.all(f"/pairs?job={fused['id']}")
    for side in ("base", "reference", "target"):
        content = installation.client.get(pair[side]["image"]).content
        assert Image.open(io.BytesIO(content)).size == (24, 16)


@pytest.mark.parametrize("n", range(len(SWEPT)), ids=[variant.name.replace(" ", "-") for variant in SWEPT])
def test_swept(n: int, installation: Installation) -> None:
    """422 where the files show it, otherwise the job succeeds, or fails with an error of dfusion."""
    source = installation.service.catalogue.models[f"swept-{n}"].source
    problem = read_facts(Path(source)).problem
    body = sampling_of(f"swept-{n}")
    if problem is not None:
        response = installation.client.post("/samplings", json=body)
        assert (response.status_code, response.json()["code"]) == (422, "unsupported_model")
        assert problem in response.json()["errors"][0]["message"]
        return

    job = installation.done("/samplings", body)
    if SWEPT[n].refusal is None:
        assert (job["state"], job["outputs"]["samples"]) == ("succeeded", 2)
    else:
        assert (job["state"], job["error"]["code"]) in (("failed", "model_not_found"), ("failed", "non_finite"))
