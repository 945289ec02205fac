"""Checks of requests against the files of a model. The tiny pipeline accepts 14 tokens and has 3 layers."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from dfusion.rewards.config import OcrConfig, WeightedPart, WeightedScorerConfig
from tests.nets import tiny_pipeline
from tests.service import PROMPTS, SCORERS, round_body, settings_for

SUM = WeightedScorerConfig(parts=tuple(WeightedPart(scorer=name, weight=1) for name in ("brightness", "mine", "mixed")))
FITS = {"text": "red " * 13 + "circle", "items": ["circle"]}
TOO_LONG = {"text": "red " * 14 + "circle", "items": ["circle"]}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("facts")
    tiny_pipeline().save_pretrained(folder / "tiny")
    settings = settings_for(folder / "data", folder / "tiny")
    models = {"tiny": str(folder / "tiny"), "far": f"nobody/nothing@{'0' * 40}"}
    scorers = SCORERS | {"mine": OcrConfig(exact=True), "mixed": SUM}
    changed = settings.model_copy(update={"models": models, "scorers": scorers})
    with TestClient(create_app(changed)) as opened:
        opened.post("/prompt-sets", json={"name": "long", "prompts": [FITS, TOO_LONG]})
        yield opened


def problems_of(client: TestClient, path: str, body: dict[str, Any]) -> tuple[int, list[tuple[str, str]]]:
    """The status of a dry run, and the code and pointer of each problem."""
    response = client.post(path, json=body, params={"dry_run": True})
    problem = response.json()
    return response.status_code, [(problem["code"], error["pointer"]) for error in problem.get("errors", ())]


EVALUATION: dict[str, Any] = {"models": ["tiny"], "scorers": ["brightness"]}
NO_PROMPTS = {"prompts": None, "prompt_set": "long"}


@pytest.mark.parametrize(
    ("path", "body", "pointer"),
    [
        ("/rounds", round_body(prompts=[FITS, PROMPTS[0], TOO_LONG]), "/prompts/2/text"),
        ("/rounds", round_body(**NO_PROMPTS), "/prompt_set"),
        ("/rounds", round_body(held_out_prompt_set="long"), "/held_out_prompt_set"),
        ("/samplings", {"model": "tiny", "prompts": [TOO_LONG], "scorers": ["brightness"]}, "/prompts/0/text"),
        ("/samplings", {"model": "tiny", "prompt_set": "long", "scorers": ["brightness"]}, "/prompt_set"),
        ("/evaluations", EVALUATION | {"prompts": [TOO_LONG]}, "/prompts/0/text"),
        ("/evaluations", EVALUATION | {"prompt_sets": ["long"]}, "/prompt_sets/0"),
    ],
)
def test_prompts_longer_than_the_tokenizers_limit_are_refused(
    client: TestClient, path: str, body: dict[str, Any], pointer: str
) -> None:
    assert problems_of(client, path, body) == (422, [("prompt_too_long", pointer)])


def test_prompts_of_exactly_the_limit_are_accepted(client: TestClient) -> None:
    assert problems_of(client, "/rounds", round_body(prompts=[FITS])) == (200, [])


@pytest.mark.parametrize("layers", [[], [3], [-1], [0, 9]])
def test_layers_that_the_unet_lacks_are_refused(client: TestClient, layers: list[int]) -> None:
    fusion = round_body()["fusion"] | {"layers": layers}
    assert problems_of(client, "/rounds", round_body(fusion=fusion)) == (422, [("unknown_layer", "/fusion/layers")])


def test_existing_layers_and_no_fusion_are_accepted(client: TestClient) -> None:
    assert problems_of(client, "/rounds", round_body(fusion=round_body()["fusion"] | {"layers": [0, 1, 2]})) == (
        200,
        [],
    )
    assert problems_of(client, "/rounds", round_body(fusion=None)) == (200, [])


@pytest.mark.parametrize(
    ("sampling", "pointers"),
    [
        ({"num_steps": 1}, ["/sampling/num_steps"]),
        ({"num_steps": 4, "height": 13}, ["/sampling/height"]),
        ({"num_steps": 4, "negative_prompt": "a blurry dog " * 30}, ["/sampling/negative_prompt"]),
        ({"num_steps": 1, "height": 1, "width": 31}, ["/sampling/num_steps", "/sampling/height", "/sampling/width"]),
    ],
)
def test_sampling_settings_that_the_model_does_not_support_are_refused(
    client: TestClient, sampling: dict[str, int], pointers: list[str]
) -> None:
    """The tiny scheduler has leading timesteps; the tiny VAE decodes one latent into 2 pixels."""
    problems = [("unsuitable_sampling", pointer) for pointer in pointers]
    samples = {"model": "tiny", "prompts": PROMPTS, "scorers": ["brightness"], "sampling": sampling}

    assert problems_of(client, "/rounds", round_body(sampling=sampling, fusion=None)) == (422, problems)
    assert problems_of(client, "/samplings", samples) == (422, problems)
    assert problems_of(client, "/evaluations", EVALUATION | {"prompts": PROMPTS, "sampling": sampling}) == (
        422,
        problems,
    )


def test_sizes_that_the_vae_supports_are_accepted(client: TestClient) -> None:
    assert problems_of(client, "/rounds", round_body(sampling={"num_steps": 4, "height": 12, "width": 22})) == (200, [])


def test_a_model_that_is_not_on_this_machine_is_not_checked(client: TestClient) -> None:
    fusion = round_body()["fusion"] | {"layers": [99]}
    assert problems_of(client, "/rounds", round_body(model="far", prompts=[TOO_LONG], fusion=fusion)) == (200, [])
    assert problems_of(client, "/rounds", round_body(model="far", sampling={"num_steps": 4, "height": 13})) == (200, [])


QUOTED = {"text": 'a sign "5"', "items": ["sign"]}
BY_OCR = {"samples_per_prompt": 1, "scorers": ["shapes-ocr-exact"]}


@pytest.mark.parametrize(
    "reward", ["ocr", "mine", "mixed", {"kind": "weighted", "parts": [{"scorer": "ocr", "weight": 1}]}]
)
def test_a_scorer_that_reads_text_needs_prompts_that_quote_one(client: TestClient, reward: Any) -> None:
    refused = round_body(prompts=[QUOTED, FITS, FITS], reward=reward)
    assert problems_of(client, "/rounds", refused) == (422, [("prompt_without_text", "/prompts/1/text")])
    assert problems_of(client, "/rounds", round_body(prompts=[QUOTED], reward=reward)) == (200, [])


@pytest.mark.parametrize(
    ("path", "body", "pointer"),
    [
        ("/rounds", round_body(prompts=[FITS], watch="ocr"), "/prompts/0/text"),
        ("/rounds", round_body(prompts=[FITS], evaluation=BY_OCR), "/prompts/0/text"),
        (
            "/rounds",
            round_body(prompts=[QUOTED], held_out_prompt_set="shapes-attribute-test", evaluation=BY_OCR),
            "/held_out_prompt_set",
        ),
        ("/samplings", {"model": "tiny", "prompts": [FITS], "scorers": ["ocr"]}, "/prompts/0/text"),
        ("/evaluations", EVALUATION | {"prompts": [FITS], "scorers": ["ocr"]}, "/prompts/0/text"),
    ],
)
def test_every_scorer_and_prompt_set_is_checked_for_quotes(
    client: TestClient, path: str, body: dict[str, Any], pointer: str
) -> None:
    status, problems = problems_of(client, path, body)
    assert status == 422 and ("prompt_without_text", pointer) in problems
