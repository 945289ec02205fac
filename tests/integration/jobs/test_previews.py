"""Preview jobs on the tiny pipeline: what they store, that it is stored once, and that it goes with the samples."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from diffusers import UNet2DConditionModel
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy import update

from api.main import create_app
from service.db.tables import Sample
from service.jobs.collector import collect
from service.states import JobState
from service.transfer.exporting import export_project
from service.transfer.importing import import_project
from tests.installation import Installation
from tests.service import PROMPTS, row_counts, service_of, settings_for, work_until_idle

STEPS = {"num_steps": 4}
FUSION = {"first_step": 1, "last_step": 2}


@pytest.fixture
def installation(tmp_path: Path, pipeline: Path) -> Iterator[Installation]:
    with TestClient(create_app(settings_for(tmp_path, pipeline, collect_after_seconds=0.01))) as client:
        yield Installation(client)


@pytest.fixture
def pair(installation: Installation) -> dict[str, Any]:
    """A pair whose prompt has two items."""
    body = {"model": "tiny", "prompts": PROMPTS[1:2], "samples_per_prompt": 2, "sampling": STEPS}
    sampled = installation.done("/samplings", body | {"scorers": ["brightness"]})
    installation.done("/fusions", {"sampling": sampled["id"], "fusion": FUSION, "reward": "brightness"})
    [pair] = installation.all("/pairs")
    return pair


def image_of(installation: Installation, path: str) -> Image.Image:
    return Image.open(io.BytesIO(installation.client.get(path).content))


def previews_of(installation: Installation, side: dict[str, Any]) -> Any:
    return installation.get(side["href"])["previews"]


def fuse_again(installation: Installation, pair: dict[str, Any], **changes: Any) -> dict[str, Any]:
    job = installation.done("/fusions", {"pair": pair["id"], "fusion": FUSION, "reward": "brightness", **changes})
    [again] = installation.all(f"/pairs?job={job['id']}")
    return again


def test_previews_of_a_pair_show_its_steps_and_masks(installation: Installation, pair: dict[str, Any]) -> None:
    assert previews_of(installation, pair["base"]) is None
    with patch.object(UNet2DConditionModel, "forward", side_effect=AssertionError("the U-Net ran")):
        job = installation.done("/previews", {"pair": pair["id"]})
    assert (job["state"], job["error"]) == ("succeeded", None)

    for side in ("base", "reference", "target"):
        shown = previews_of(installation, pair[side])
        assert (shown["num_steps"], shown["steps"], shown["job"]) == (4, [0, 1, 2, 3, 4], job["id"])
        strip = image_of(installation, shown["strip"])
        image = image_of(installation, pair[side]["image"])
        assert strip.size == (5 * image.width, image.height)
        last_tile = strip.crop((4 * image.width, 0, 5 * image.width, image.height))
        assert last_tile.tobytes() == image.convert("RGB").tobytes()
        assert (shown["mask"] is not None) == (side == "reference")

    mask = previews_of(installation, pair["reference"])["mask"]
    assert mask | {"image": ""} == {"image": "", "thresholds": [0.02, 0.03], "merge": "xor", **FUSION}
    grid = image_of(installation, mask["image"])
    width, height = grid.width // 6, grid.height // 3
    stored = image_of(installation, pair["mask"]).resize((width, height), Image.Resampling.NEAREST)
    merged_mean = grid.crop((5 * width, 2 * height, 6 * width, 3 * height))
    assert merged_mean.tobytes() == stored.tobytes()  # the mask of the pair


def test_previews_are_made_once(installation: Installation, pair: dict[str, Any]) -> None:
    """A request for samples that have previews returns their job. Other masks are made, but no strip again."""
    first = installation.ask("/previews", {"pair": pair["id"]})
    assert installation.ask("/previews", {"pair": pair["id"]}) == first  # it has not started
    work_until_idle(installation.service)
    assert installation.ask("/previews", {"pair": pair["id"]}) == first
    sides = [pair["base"]["id"], pair["target"]["id"]]
    assert installation.ask("/previews", {"samples": sides}) == first

    again = fuse_again(installation, pair, thresholds=[0.5, 0.6])
    second = installation.done("/previews", {"pair": again["id"]})
    assert second["id"] != first
    assert previews_of(installation, pair["base"])["job"] == first
    assert previews_of(installation, pair["reference"])["mask"]["thresholds"] == [0.5, 0.6]
    assert row_counts(installation.service)["previews"] == 3 + 2  # the reference and the new target
    assert installation.ask("/previews", {"pair": pair["id"]}) == first
    assert installation.ask("/previews", {"samples": [pair["reference"]["id"]]}) == second["id"]  # of the newest pair


def test_samples_without_trajectories_have_no_previews(installation: Installation, pair: dict[str, Any]) -> None:
    base = pair["base"]["id"]
    with installation.service.uow.writing() as session:
        session.execute(update(Sample).where(Sample.id == base).values(trajectory_artifact_id=None))
    for body, pointer in (({"pair": pair["id"]}, "/pair"), ({"samples": [base]}, "/samples")):
        response = installation.client.post("/previews", json=body)
        assert (response.status_code, response.json()["code"]) == (422, "trajectory_gone")
        assert [problem["pointer"] for problem in response.json()["errors"]] == [pointer]
    unknown = installation.client.post("/previews", json={"pair": "pair_" + 26 * "0"})
    assert (unknown.status_code, unknown.json()["code"]) == (422, "unknown_pair")


@pytest.mark.parametrize("ends", [True, False])
def test_previews_go_with_their_samples(installation: Installation, pair: dict[str, Any], ends: bool) -> None:
    """Whether or not their job has ended; they prevent no deletion."""
    job_id = installation.ask("/previews", {"pair": pair["id"]})
    if ends:
        work_until_idle(installation.service)
    assert installation.client.delete(f"/jobs/{pair['job']}").status_code == 204

    service = service_of(installation.client)
    for _ in range(3):  # each removes a job, or its last rows, before those that it uses
        collect(service.uow, service.store, service.settings)
    assert installation.client.get(f"/jobs/{job_id}").status_code == 404
    counts = row_counts(service)
    assert (counts["previews"], counts["pairs"], counts["job_sources"]) == (0, 0, 0)
    left = {str(path) for path in service.settings.data_dir.rglob("*.png")}
    assert not [path for path in left if "strip" in path or "mask" in path]
    assert [job["kind"] for job in installation.all("/jobs")] == ["sampling"]


def test_previews_of_a_deleted_job_are_not_exported(
    installation: Installation, pair: dict[str, Any], tmp_path: Path
) -> None:
    """They are still there until the next collection, without the samples that they reference."""
    installation.done("/previews", {"pair": pair["id"]})
    exported = tmp_path / "with-previews.tar"
    assert export_project(installation.service, exported).jobs == 3
    assert installation.client.delete(f"/jobs/{pair['job']}").status_code == 204
    export_project(installation.service, tmp_path / "without.tar")

    for archive, previews in ((tmp_path / "without.tar", 0), (exported, 3)):
        folder = tmp_path / archive.stem
        with TestClient(create_app(settings_for(folder, folder / "tiny"))) as client:
            import_project(service_of(client), archive)
            assert row_counts(service_of(client))["previews"] == previews


def test_previews_are_deleted_alone(installation: Installation, pair: dict[str, Any]) -> None:
    job = installation.done("/previews", {"pair": pair["id"]})
    assert job["state"] == JobState.SUCCEEDED
    assert installation.client.delete(f"/jobs/{job['id']}").status_code == 204
    assert previews_of(installation, pair["base"]) is None
    assert installation.ask("/previews", {"pair": pair["id"]}) != job["id"]
