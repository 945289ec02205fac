"""Models that start from an adapter of another program, through the service: the table "Adapters" of the cases."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from fastapi.testclient import TestClient
from PIL import Image

from api.main import create_app
from dfusion.adapter_files import read_layout
from tests.adapters import (
    ATTENTION,
    REFUSED,
    TEXT_LAYERS,
    Lora,
    diffusers_file,
    file_of,
    kohya_file,
    merged,
    peft_file,
    random_lora,
)
from tests.installation import Installation
from tests.service import PROMPTS, settings_for

TRAINING = {"examples_per_update": 2, "micro_batch": 4, "inner_epochs": 1}
LOADED = ("rsLoRA: alpha 16, rank 4", "alpha_pattern and rank_pattern", "kohya file, alpha per module", "PEFT file")
WITH_TEXT_ENCODER = "kohya file with a text encoder"
KINDS = (
    "text encoder alone, kohya",
    "text encoder, PEFT",
    "text encoder, no such layer",
    "text encoder, another width",
    "text encoder, LoHa",
    "a second text encoder",
    "LoHa",
    "LoKr",
    "DoRA",
    "(IA)3",
    "OFT",
    "full weights",
    "LoCon, Tucker",
    "NaN in the weights",
    "another width",
    "no such layer",
)
"""Of each kind of file that is refused, one."""


def name_of(row: str) -> str:
    """The name of the model whose adapter is this row's file."""
    return re.sub(r"\W+", "-", row).strip("-")


def loras(weights: dict[str, Any]) -> dict[str, Lora]:
    patterns = Lora(2, 4, ranks={"attn2.to_k": 8}, alphas={"attn2.to_k": 24.0})
    return {
        row: random_lora(weights, ATTENTION, lora)
        for row, lora in zip(
            LOADED,
            (Lora(4, 16, use_rslora=True), patterns, Lora(4, 2, alphas={"attn1.to_q": 8.0}), Lora(2, 6)),
            strict=True,
        )
    }


def text_lora(encoder: Any) -> Lora:
    """An adapter of the text encoder whose alpha is not its rank."""
    return random_lora(encoder.state_dict(), TEXT_LAYERS, Lora(2, 5))


@pytest.fixture(scope="module")
def pipeline(whole_pipeline: Path) -> Path:
    """With the middle block: files name its layers."""
    return whole_pipeline


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Iterator[Installation]:
    """With a model for each row, and for each loaded one a model with merged weights."""
    folder = tmp_path_factory.mktemp("adapters")
    merged_pipeline = StableDiffusionPipeline.from_pretrained(pipeline)
    weights = {name: value.clone() for name, value in merged_pipeline.unet.state_dict().items()}
    writers = dict(zip(LOADED, (diffusers_file, diffusers_file, kohya_file, peft_file), strict=True))
    models: dict[str, Any] = {"tiny": str(pipeline)}
    for row, lora in loras(weights).items():
        file = writers[row](lora, folder / name_of(row))
        models[name_of(row)] = {"source": str(pipeline), "adapter": str(file)}
        merged_pipeline.unet.load_state_dict(merged(weights, lora))
        merged_pipeline.save_pretrained(folder / f"merged-{name_of(row)}")
        models[f"merged-{name_of(row)}"] = str(folder / f"merged-{name_of(row)}")
    row = WITH_TEXT_ENCODER
    unet = loras(weights)["kohya file, alpha per module"]
    encoder = merged_pipeline.text_encoder
    text = text_lora(encoder)
    file = kohya_file(unet, folder / name_of(row), text={"text_encoder": text})
    models[name_of(row)] = {"source": str(pipeline), "adapter": str(file)}
    merged_pipeline.unet.load_state_dict(merged(weights, unet))
    encoder.load_state_dict(merged(encoder.state_dict(), text))
    merged_pipeline.save_pretrained(folder / f"merged-{name_of(row)}")
    models[f"merged-{name_of(row)}"] = str(folder / f"merged-{name_of(row)}")
    for row in KINDS:
        file = file_of(REFUSED[row][0], folder / name_of(row))
        models[name_of(row)] = {"source": str(pipeline), "adapter": str(file)}
    (folder / "pickle.bin").write_bytes(b"\x80\x04N.")
    models["pickle"] = {"source": str(pipeline), "adapter": str(folder / "pickle.bin")}
    models["elsewhere"] = {"source": str(pipeline), "adapter": str(folder / "elsewhere.safetensors")}
    with TestClient(create_app(settings_for(tmp_path_factory.mktemp("data"), pipeline, models=models))) as client:
        yield Installation(client)


def sampling(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompts": PROMPTS[:1],
        "samples_per_prompt": 1,
        "sampling": {"num_steps": 4},
        "scorers": ["brightness"],
    }


def image_of(installation: Installation, model: str) -> np.ndarray:
    """An image by the model, as floats."""
    job = installation.done("/samplings", sampling(model))
    assert job["state"] == "succeeded", job["error"]
    [sample] = installation.all(f"/samples?job={job['id']}")
    content = installation.client.get(sample["image"]).content
    return np.asarray(Image.open(io.BytesIO(content)), dtype=np.float32)


@pytest.fixture(scope="module")
def image_without_adapter(installation: Installation) -> np.ndarray:
    return image_of(installation, "tiny")


@pytest.mark.parametrize("row", [*LOADED, WITH_TEXT_ENCODER])
def test_models_with_an_adapter_sample_as_their_merged_weights(
    installation: Installation, image_without_adapter: np.ndarray, row: str
) -> None:
    image = image_of(installation, name_of(row))
    assert np.abs(image - image_of(installation, f"merged-{name_of(row)}")).max() <= 1
    assert np.abs(image - image_without_adapter).max() > 3


@pytest.mark.parametrize("row", KINDS)
def test_models_whose_adapter_cannot_be_loaded_are_refused_at_submission(installation: Installation, row: str) -> None:
    response = installation.client.post("/samplings", json=sampling(name_of(row)))
    assert (response.status_code, response.json()["code"]) == (422, "unsuitable_adapter")
    [problem] = response.json()["errors"]
    assert problem["pointer"] == "/model" and re.search(REFUSED[row][1], problem["message"])
    assert installation.client.post("/rounds", json=sampling(name_of(row)) | {"scorers": None}).status_code == 422


def test_a_pickle_is_refused_and_a_missing_file_fails_by_name(installation: Installation) -> None:
    response = installation.client.post("/samplings", json=sampling("pickle"))
    assert response.status_code == 422 and "got a pickle" in response.json()["detail"]

    job = installation.done("/samplings", sampling("elsewhere"))  # it might be on the worker's machine
    assert job["state"] == "failed" and "elsewhere.safetensors: cannot be read" in job["error"]["message"]


def test_a_round_continues_the_adapter_with_its_ranks_and_alphas(installation: Installation, tmp_path: Path) -> None:
    model = name_of("kohya file, alpha per module")
    few = {"prompts": PROMPTS[:1], "evaluation": None}
    job = installation.run(model=model, training=TRAINING | {"lora": {"dropout": 0.2}}, **few)
    assert (job["state"], job["error"]) == ("succeeded", None)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(installation.client.get(f"/models/{job['last_model']}/download").content)
    alphas = {
        name.partition("transformer_blocks.0.")[2]: layer.alpha for name, layer in read_layout(file).layers.items()
    }
    assert (alphas["attn1.to_q"], alphas["attn1.to_k"]) == (8.0, 2.0)

    again = installation.run(model=job["last_model"], training=TRAINING, **few)
    assert again["state"] == "succeeded"


def test_a_text_encoder_is_used_in_sampling_and_exported_unchanged(
    installation: Installation, pipeline: Path, tmp_path: Path
) -> None:
    """Images differ from those of the U-Net's part alone. Exports of the trained model have the text encoder's part."""
    with_text = image_of(installation, name_of(WITH_TEXT_ENCODER))
    assert np.abs(with_text - image_of(installation, name_of("kohya file, alpha per module"))).max() > 3

    model = name_of(WITH_TEXT_ENCODER)
    job = installation.run(model=model, prompts=PROMPTS[:1], evaluation=None, training=TRAINING)
    assert (job["state"], job["error"]) == ("succeeded", None)
    model = job["last_model"]
    export = installation.done("/exports", {"model": model, "format": "kohya", "sampling": {"num_steps": 2}})
    assert (export["state"], export["error"]) == ("succeeded", None)

    stock = StableDiffusionPipeline.from_pretrained(pipeline)
    expected = merged(stock.text_encoder.state_dict(), text_lora(stock.text_encoder))
    for form in ("diffusers", "kohya"):
        content = installation.client.get(f"/models/{model}/download", params={"format": form}).content
        (tmp_path / f"{form}.safetensors").write_bytes(content)
        stock = StableDiffusionPipeline.from_pretrained(pipeline)
        stock.load_lora_weights(tmp_path, weight_name=f"{form}.safetensors")
        stock.fuse_lora()
        stock.unload_lora_weights()
        torch.testing.assert_close(dict(stock.text_encoder.state_dict()), expected, atol=1e-5, rtol=1e-4)

    failed = installation.done("/exports", {"model": model, "format": "peft", "sampling": {"num_steps": 2}})
    assert failed["state"] == "failed" and "U-Net only, got one of text_encoder too" in failed["error"]["message"]


@pytest.mark.parametrize(
    ("model", "training", "code", "pointer"),
    [
        (name_of("PEFT file"), {"lora": {"rank": 8}}, "adapter_is_kept", "/training/lora"),
        (name_of("PEFT file"), {"lora": {"targets": ["feed_forward"]}}, "adapter_is_kept", "/training/lora"),
        ("tiny", {"lora": {"targets": ["attn3"]}}, "unsuitable_lora", "/training/lora/targets"),
        ("tiny", {"lora": {"rank_pattern": {"ff.net.2": 8}}}, "unsuitable_lora", "/training/lora/rank_pattern"),
        ("tiny", {"lora": {"alpha_pattern": {"conv_in": 8}}}, "unsuitable_lora", "/training/lora/alpha_pattern"),
        ("tiny", {"lora": {"rank_pattern": {"to_q": "8"}}}, "invalid_request", "/training/lora/rank_pattern/to_q"),
        ("tiny", {"lora": {"targets": []}}, "invalid_request", "/training/lora/targets"),
        ("tiny", {"lora": {"dropout": 1}}, "invalid_request", "/training/lora/dropout"),
        ("tiny", {"ema_decay": 1}, "invalid_request", "/training/ema_decay"),
        ("tiny", {"schedule": "step"}, "invalid_request", "/training/schedule"),
        ("tiny", {"schedule_updates": 9}, "invalid_request", "/training/schedule_updates"),
        (
            "tiny",
            {"schedule": "linear", "warmup_updates": 9, "schedule_updates": 9},
            "invalid_request",
            "/training/schedule_updates",
        ),
        ("tiny", {"optimizer": "adafactor"}, "invalid_request", "/training/optimizer"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_field(
    installation: Installation, model: str, training: dict[str, Any], code: str, pointer: str
) -> None:
    response = installation.client.post("/rounds", json=sampling_of_round(model, training)).json()
    assert (response["code"], response["errors"][0]["pointer"]) == (code, pointer), json.dumps(response)


def sampling_of_round(model: str, training: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "prompts": PROMPTS[:1],
        "samples_per_prompt": 2,
        "reward": "brightness",
        "training": training,
    }


def test_moments_are_continued_by_their_optimizer_only(installation: Installation) -> None:
    """6 pairs are three updates in each of two rounds."""
    training = TRAINING | {
        "ema_decay": 0.9,
        "schedule": "cosine",
        "warmup_updates": 1,
        "schedule_updates": 8,
        "lora": {"targets": ["attention", "feed_forward"], "rank_pattern": {"feed_forward": 2}, "use_dora": True},
    }
    job = installation.run(rounds=2, evaluation=None, training=training)
    assert (job["state"], job["error"]) == ("succeeded", None)
    statistics = installation.get(f"/models/{job['last_model']}")["statistics"]
    assert (statistics["optimizer"], statistics["optimizer_updates"]) == ("adamw", 6)

    body = sampling_of_round(job["last_model"], {"optimizer": "adamw_8bit"})
    response = installation.client.post("/rounds", json=body).json()
    assert (response["code"], response["errors"][0]["pointer"]) == ("optimizer_is_kept", "/training/optimizer")
    fresh = sampling_of_round(job["last_model"], {"optimizer": "adamw_8bit", "optimizer_start": "fresh"})
    assert installation.client.post("/rounds?dry_run=true", json=fresh).status_code == 200
