"""The training data of rounds and the models that create their images, compared with the functions of `dfusion`."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from api.main import create_app
from dfusion.adapter import attach_lora, load_adapter, lora_parameters
from dfusion.config import FusionConfig, SamplingConfig, TrainingConfig
from dfusion.ddim import recorded_log_prob
from dfusion.errors import InvalidInputError
from dfusion.fused_sampling import fuse
from dfusion.models import DiffusionModel
from dfusion.sampling import sample
from dfusion.seeds import evaluation_seed, training_seed
from dfusion.thresholds import thresholds_of
from dfusion.training import Trainer
from dfusion.training_data import Example, TrainingPair
from dfusion.trajectories import load_trajectory
from dfusion.types import Conditioning, Trajectory
from service.errors import StageStoppedError, StorageCorruptError, StorageError, StorageGoneError
from service.storage.files import FileStore
from tests.forking import Forked
from tests.installation import Installation
from tests.nets import tiny_xl_pipeline
from tests.scorers import Brightness
from tests.service import PROMPTS, settings_for, work_until_idle
from tests.training_loop import DpoLoop
from worker import rank as rank_program
from worker.stages import fuse as fuse_stage
from worker.stages import train
from worker.watchdog import Watchdog

FOUR = SamplingConfig(num_steps=4)
FUSION = FusionConfig(first_step=1, last_step=3)
TRAINING: dict[str, Any] = {"examples_per_update": 2, "micro_batch": 4, "inner_epochs": 1, "learning_rate": 0.01}
EVERY_TARGET = {"adoption_threshold": 0, "max_mask_cover": 1}
OPEN = [{"text": prompt["text"], "items": prompt["items"]} for prompt in PROMPTS[:2]]
"""Two prompts without thresholds."""


@pytest.fixture(scope="module")
def pipeline(whole_pipeline: Path) -> Path:
    """With the middle block: its updates show in pixels."""
    return whole_pipeline


@pytest.fixture
def installation(tmp_path: Path, pipeline: Path) -> Iterator[Installation]:
    with TestClient(create_app(settings_for(tmp_path / "data", pipeline))) as client:
        yield Installation(client)


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[list[Example]]:
    """The training examples of each training."""
    trainings: list[list[Example]] = []

    class Recording(Trainer):
        def __init__(self, model: DiffusionModel, examples: Any, *rest: Any) -> None:
            trainings.append(list(examples))
            super().__init__(model, examples, *rest)

    monkeypatch.setattr(train, "Trainer", Recording)
    return trainings


def trajectory_of(installation: Installation, sample_id: str, folder: Path) -> Trajectory:
    """Return the stored trajectory of a sample."""
    stored = installation.get(f"/samples/{sample_id}")["trajectory"]
    file = folder / "trajectory"
    file.write_bytes(installation.client.get(stored["artifact"]).content)
    return load_trajectory(file).select([stored["row"]])


def picture(installation: Installation, path: str) -> np.ndarray:
    with Image.open(io.BytesIO(installation.client.get(path).content)) as image:
        return np.asarray(image)


def updates_of(installation: Installation, model_id: str) -> dict[str, Any]:
    """Return the self-test and the reports of a training, without their durations and memory."""
    statistics = installation.get(f"/models/{model_id}")["statistics"]
    log = dict(json.loads(installation.client.get(statistics["log"]).content))
    for update in log["updates"]:
        assert update.pop("seconds") > 0 and update.pop("peak_bytes") > 0
    return log


def take_part(folder: str, rank: str) -> None:
    """Run `python -m worker.rank FOLDER RANK` in a fork, whose standard input stays open."""
    torch.set_num_threads(1)
    reading, _writing = os.pipe()
    os.dup2(reading, 0)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = ["rank", folder, rank]
    rank_program.main()


def stop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the next training after its first update, with a checkpoint."""
    stopped: list[bool] = []

    class Stopping(Trainer):
        def step(self, on_rows: Any = None) -> Any:
            if self.updates_done == 1 and not stopped:
                stopped.append(True)
                raise StageStoppedError
            return super().step(on_rows)

    monkeypatch.setattr(train, "Trainer", Stopping)


@pytest.mark.parametrize("fusion", [None, FUSION.model_dump()])
def test_pairs_say_which_sides_the_policy_drew(
    installation: Installation, learned: list[list[Example]], fusion: dict[str, Any] | None, tmp_path: Path
) -> None:
    job = installation.run(prompts=OPEN, fusion=fusion, evaluation=None, pairing=EVERY_TARGET, training=TRAINING)
    pairs = installation.all(job["links"]["pairs"])
    for pair, example in zip(pairs, learned[0], strict=True):
        assert isinstance(example, TrainingPair)
        better = pair["reference"] if fusion is None else pair["target"]
        for side, expected in ((example.preferred, better), (example.rejected, pair["base"])):
            assert side.latents.equal(trajectory_of(installation, expected["id"], tmp_path).latents)
        assert example.sides_on_policy == ((True, True) if fusion is None else (False, True))
    tested = updates_of(installation, job["last_model"])["self_test"]
    # 2 of 4 pairs in the first update: naive at all 4 steps, both sides drawn; fused at the 3 that are not shared, one
    # side drawn; the targets of the second update are replayed as well
    assert (tested["compared"], tested["replayed"]) == ((16, 0) if fusion is None else (6, 12))
    assert all(abs(ratio - 1) < 1e-5 for ratio in tested["ratio_by_step"].values())


def weights_of(installation: Installation, model_id: str, unet: Any, folder: Path) -> list[torch.Tensor]:
    """The model's adapter, put on `unet`: its weights."""
    file = folder / "adapter.safetensors"
    file.write_bytes(installation.client.get(f"/models/{model_id}/download").content)
    load_adapter(unet, file)
    return [value.detach().clone() for value in lora_parameters(unet).values()]


def test_one_adamw_goes_through_all_rounds(
    installation: Installation, learned: list[list[Example]], pipeline: Path, tmp_path: Path
) -> None:
    """Two rounds of a job, and one of another job from its model, equal a loop with one AdamW on the same pairs.

    The epsilon limits the step of elements near 0, whose sign is due to rounding.
    """
    training = {"learning_rate": 1e-4, "adam_epsilon": 1e-3, "inner_epochs": 2}
    options = {"prompts": OPEN[:1], "evaluation": None, "pairing": EVERY_TARGET, "training": training}
    first = installation.run(rounds=2, **options)
    second = installation.run(model=first["last_model"], **options)
    assert installation.get(f"/models/{first['last_model']}")["statistics"]["optimizer_updates"] == 4
    assert installation.get(f"/models/{second['last_model']}")["statistics"]["optimizer_updates"] == 6

    model = DiffusionModel.load(pipeline)
    trained = weights_of(installation, second["last_model"], model.unet, tmp_path)
    attach_lora(model.unet, seed=training_seed(7, 1))
    start = [value.detach().clone() for value in lora_parameters(model.unet).values()]
    settings = TrainingConfig(**training)
    loop = DpoLoop(model, settings, Trainer(model, learned[0], settings, seed=0).gradient_scale)
    for examples in learned:
        loop.round([pair for pair in examples if isinstance(pair, TrainingPair)])
    expected = [value.detach() for value in lora_parameters(model.unet).values()]
    assert max((a - b).abs().max().item() for a, b in zip(trained, expected, strict=True)) < 1e-6
    assert max((a - b).abs().max().item() for a, b in zip(trained, start, strict=True)) > 1e-4


def test_a_fresh_optimizer_can_be_requested(installation: Installation) -> None:
    training = TRAINING | {"examples_per_update": 320, "optimizer_start": "fresh"}
    job = installation.run(prompts=OPEN[:1], rounds=2, evaluation=None, pairing=EVERY_TARGET, training=training)
    assert installation.get(f"/models/{job['last_model']}")["statistics"]["optimizer_updates"] == 1


def test_a_fresh_optimizer_does_not_need_the_file_of_the_old_one(installation: Installation, tmp_path: Path) -> None:
    options = {"prompts": OPEN[:1], "evaluation": None, "pairing": EVERY_TARGET}
    first = installation.run(training=TRAINING, **options)
    [file] = (tmp_path / "data").rglob("optimizer/*")
    file.unlink()
    fresh = installation.run(model=first["last_model"], training=TRAINING | {"optimizer_start": "fresh"}, **options)
    assert (fresh["state"], fresh["outputs"]["models"]) == ("succeeded", 1)


def test_masked_credit_takes_each_pairs_own_mask(installation: Installation, learned: list[list[Example]]) -> None:
    """The mask is the pair's mask image. A reference in place of a target has no mask."""
    training = TRAINING | {"credit": "mask"}
    job = installation.run(prompts=OPEN, evaluation=None, training=training)
    pairs = installation.all(job["links"]["pairs"])
    assert {pair["adopted"] for pair in pairs} == {True, False}
    for pair, example in zip(pairs, learned[0], strict=True):
        assert isinstance(example, TrainingPair) and (example.mask is not None) == pair["adopted"]
        if example.mask is not None:
            grey = picture(installation, pair["mask"])
            nearest = grey[::2, ::2]  # a latent covers 2 x 2 pixels
            assert example.mask.numpy() == pytest.approx((nearest if grey.ndim == 2 else nearest[..., 0]) / 255)


def test_a_falling_preferred_side_is_an_event(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics also contain the statistics of each round's last update."""
    monkeypatch.setattr(train, "falling_preferred", lambda reports: (0.0, reports[-1].log_ratio_preferred))
    job = installation.run(prompts=OPEN, evaluation=None, pairing=EVERY_TARGET, training=TRAINING)
    [event] = [e for e in installation.all(job["links"]["events"]) if e["kind"] == "training.preferred_falls"]
    [statistics] = installation.get(job["links"]["metrics"])["trainings"]
    last = updates_of(installation, job["last_model"])["updates"][-1]
    assert event["data"]["before"] == 0 and event["data"]["after"] == last["log_ratio_preferred"]
    assert (statistics["round"], statistics["model"], statistics["updates"]) == (1, job["last_model"], last["update"])
    for side in ("log_ratio_preferred", "log_ratio_rejected", "below_epsilon", "accuracy"):
        assert statistics[side] == last[side]


def test_images_of_another_size_go_through_a_whole_job(
    installation: Installation, learned: list[list[Example]], tmp_path: Path
) -> None:
    """12 x 20 pixels, 6 x 10 latents; the model's defaults are 16 x 16 and 8 x 8."""
    sampling = {"num_steps": 4, "height": 12, "width": 20}
    job = installation.run(prompts=OPEN, sampling=sampling, pairing=EVERY_TARGET, training=TRAINING)
    assert (job["state"], job["error"]) == ("succeeded", None)
    samples = installation.all(job["links"]["samples"])
    assert {row["role"] for row in samples} >= {"reference", "base", "target", "evaluation"}
    for row in samples:
        with Image.open(io.BytesIO(installation.client.get(row["image"]).content)) as image:
            assert image.size == (20, 12)
    [pair, *_] = installation.all(job["links"]["pairs"])
    for side in ("reference", "base", "target"):
        stored = trajectory_of(installation, pair[side]["id"], tmp_path)
        assert (stored.config.height, stored.config.width, stored.latent_size) == (12, 20, (6, 10))
    assert {side.latent_size for example in learned[0] for side in example.sides} == {(6, 10)}


def test_every_stage_uses_the_size_and_the_negative_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL is conditioned on the original and the target size, uncropped."""
    tiny_xl_pipeline().save_pretrained(tmp_path / "xl")
    sizes: set[tuple[float, ...]] = set()
    texts: set[str] = set()
    encode = DiffusionModel.encode_prompts

    def recorded(model: DiffusionModel, *arguments: Any) -> Conditioning:
        conditioning = encode(model, *arguments)
        assert conditioning.time_ids is not None
        sizes.update(tuple(row) for row in conditioning.time_ids.tolist())
        texts.update(conditioning.texts or ())
        return conditioning

    monkeypatch.setattr(DiffusionModel, "encode_prompts", recorded)
    with TestClient(create_app(settings_for(tmp_path / "data", tmp_path / "xl"))) as client:
        sampling = {"num_steps": 4, "height": 12, "width": 20, "negative_prompt": "a blurry dog"}
        job = Installation(client).run(prompts=OPEN[:1], sampling=sampling, pairing=EVERY_TARGET, training=TRAINING)
    assert (job["state"], job["outputs"]["models"]) == ("succeeded", 1)
    assert sizes == {(12, 20, 0, 0, 12, 20)}
    assert "a blurry dog" in texts and "" not in texts


def test_pairs_of_images_of_two_sizes_are_not_trained_on_together(installation: Installation) -> None:
    pairs: list[str] = []
    for sampling in ({"num_steps": 4}, {"num_steps": 4, "width": 20}):
        body = {"model": "tiny", "prompts": OPEN[:1], "sampling": sampling, "scorers": ["brightness"]}
        sampled = installation.done("/samplings", body)
        fusion = {"sampling": sampled["id"], "reward": "brightness", "fusion": FUSION.model_dump()}
        fused = installation.done("/fusions", fusion)
        pairs.append(installation.all(fused["links"]["pairs"])[0]["id"])
    response = installation.client.post("/trainings", json={"pairs": pairs, "training": TRAINING})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/pairs")
    assert "same steps, guidance, eta, size and negative prompt" in response.json()["detail"]


def test_advantages_of_fused_pairs_by_hand(installation: Installation, learned: list[list[Example]]) -> None:
    training = TRAINING | {"algorithm": "ddpo", "clip_range": 0.1}
    job = installation.run(prompts=OPEN[:1], rounds=2, evaluation=None, pairing=EVERY_TARGET, training=training)
    samples = installation.all(job["links"]["samples"])
    sampled = [s for s in samples if s["role"] in ("plain", "reference", "base")]
    expected = []
    for pair in installation.all(f"/pairs?job={job['id']}&round=2"):
        history = [s["scores"][0]["value"] for s in sampled if s["prompt"] == pair["prompt"]]
        mean, std = statistics.fmean(history), statistics.pstdev(history)
        assert len(history) == 8
        for side, own in (("target", False), ("base", True)):
            expected.append((pytest.approx((pair[side]["score"] - mean) / std), (own,)))
    assert [(example.advantage, example.sides_on_policy) for example in learned[1]] == expected


def test_a_training_on_an_early_round_knows_nothing_of_later_scores(
    installation: Installation, learned: list[list[Example]]
) -> None:
    job = installation.run(prompts=OPEN[:1], rounds=2, evaluation=None, pairing=EVERY_TARGET, training=TRAINING)
    pairs = installation.all(f"/pairs?job={job['id']}&round=1")
    training = TRAINING | {"algorithm": "ddpo", "clip_range": 0.1}
    installation.done("/trainings", {"pairs": [pair["id"] for pair in pairs], "training": training})
    samples = installation.all(f"/samples?job={job['id']}&round=1")
    for pair, (better, _) in zip(pairs, zip(*[iter(learned[-1])] * 2, strict=True), strict=True):
        sampled = [s for s in samples if s["role"] in ("plain", "reference", "base") and s["prompt"] == pair["prompt"]]
        history = [s["scores"][0]["value"] for s in sampled]
        mean, std = statistics.fmean(history), statistics.pstdev(history)
        assert len(history) == 4
        assert better.advantage == pytest.approx((pair["target"]["score"] - mean) / std)


def test_named_pairs_have_thresholds_of_their_own_samples(installation: Installation) -> None:
    """Even if the request also names other pairs."""
    body = {"model": "tiny", "prompts": OPEN[:1], "sampling": {"num_steps": 4}, "scorers": ["brightness"]}
    sampled = installation.done("/samplings", body)
    ids = [entry["id"] for entry in installation.all(sampled["links"]["samples"])]
    pairs = [{"reference": ids[0], "base": ids[1]}, {"reference": ids[2], "base": ids[3]}]
    options = {"reward": "brightness", "fusion": FUSION.model_dump()}

    def fuse(named: list[dict[str, str]]) -> list[list[float]]:
        job = installation.done("/fusions", options | {"pairs": named})
        return [pair["thresholds"] for pair in installation.all(job["links"]["pairs"])]

    together = fuse(pairs)
    assert together == [*fuse(pairs[:1]), *fuse(pairs[1:])] and together[0] != together[1]


def test_verdicts_select_the_preferred_side(
    installation: Installation, learned: list[list[Example]], tmp_path: Path
) -> None:
    job = installation.run(evaluation=None, pairing=EVERY_TARGET, training=TRAINING)
    pairs = installation.all(job["links"]["pairs"])
    for pair, verdict in zip(pairs, ["target", "base", "tie", "reject", "base", "target"], strict=True):
        installation.client.put(f"/pairs/{pair['id']}/verdict", json={"prefer": verdict})
    body = {"jobs": [job["id"]], "prefer": "verdicts", "training": TRAINING}
    trained = installation.done("/trainings", body)
    expected = [("target", "base", pairs[0]), ("base", "target", pairs[1])]
    expected += [("base", "target", pairs[4]), ("target", "base", pairs[5])]
    for example, (better, worse, pair) in zip(learned[-1], expected, strict=True):
        for side, role in zip(example.sides, (better, worse), strict=True):
            assert side.latents.equal(trajectory_of(installation, pair[role]["id"], tmp_path).latents)
        assert example.sides_on_policy == (better == "base", worse == "base")
    statistics = installation.get(f"/models/{trained['last_model']}")["statistics"]
    assert (statistics["pairs"], statistics["examples"], statistics["adopted"]) == (4, 4, 2)


def test_a_later_round_is_sampled_fused_and_measured_with_the_adapter(
    installation: Installation, pipeline: Path, tmp_path: Path
) -> None:
    job = installation.run(prompts=PROMPTS[:2], rounds=2, pairing=EVERY_TARGET, training=TRAINING)
    _, first = installation.all(job["links"]["models"])  # newest first
    model = DiffusionModel.load(pipeline)
    (tmp_path / "adapter").write_bytes(installation.client.get(first["adapter"]["artifact"]).content)
    load_adapter(model.unet, tmp_path / "adapter")
    plain = DiffusionModel.load(pipeline)

    def render(by: DiffusionModel, row: dict[str, Any]) -> np.ndarray:
        embeds, negative = by.encode_prompts([row["prompt"]]), by.encode_prompts([""])
        return by.decode(sample(by.unet, by.scheduler, embeds, negative, [row["seed"]], config=FOUR).final)[0]

    own = installation.all(f"/samples?job={job['id']}&round=2&role=base")[0]
    measured = installation.all(f"/samples?job={job['id']}&round=1&role=evaluation")[0]
    assert measured["seed"] == evaluation_seed(0, "train", 0, PROMPTS[0]["text"], 0)
    for row in (own, measured):
        stored = picture(installation, row["image"]).astype(int)
        assert np.abs(stored - render(model, row)).max() <= 1  # another batch may round a pixel the other way
        assert np.abs(stored - render(plain, row)).max() > 3
    pair = installation.all(f"/pairs?job={job['id']}&round=2")[0]
    sides = [trajectory_of(installation, pair[side]["id"], tmp_path) for side in ("base", "reference")]
    embeds, negative = model.encode_prompts([pair["prompt"]]), model.encode_prompts([""])
    target = fuse(model.unet, model.scheduler, *sides, embeds, negative, thresholds=[pair["thresholds"]], config=FUSION)
    stored = picture(installation, pair["target"]["image"]).astype(int)
    assert np.abs(stored - model.decode(target.final)[0]).max() <= 1


def test_a_reward_that_rises_alone_is_reported(installation: Installation) -> None:
    same = {"rounds": 4, "evaluation": None, "fusion": None, "prompts": PROMPTS[:1], "training": TRAINING}
    same |= {"sampling": {"num_steps": 2}, "samples_per_prompt": 2}
    job = installation.run(**same, reward="rising", watch="falling")
    metrics = installation.get(job["links"]["metrics"])["data"]
    falling = [entry["mean"] for entry in metrics if entry["scorer"] == "falling"]
    assert len(falling) == 4 and falling == sorted(falling, reverse=True)
    # diversity has no trend, otherwise the message would name it as well
    warnings = [e for e in installation.all(job["links"]["events"]) if e["kind"] == "round.reward_misleads"]
    [message] = [event["message"] for event in warnings]
    start = "the reward rising rises while falling falls: possible reward hacking; best so far: the model before"
    assert message.startswith(start) and message.endswith(" on the samples of the rounds)")
    assert warnings[0]["data"] == {"round": 4, "falling": ["falling"], "best_round": 0}
    assert job["best"] is None  # no evaluation
    together = installation.run(**same, reward="rising", watch="rising")
    assert "round.reward_misleads" not in installation.events(together)


def test_missing_thresholds_are_derived_from_the_prompts_paired_samples(
    installation: Installation, tmp_path: Path
) -> None:
    job = installation.run(prompts=OPEN, evaluation=None, pairing=EVERY_TARGET)
    pairs = installation.all(job["links"]["pairs"])
    for text in (prompt["text"] for prompt in OPEN):
        of_prompt = [pair for pair in pairs if pair["prompt"] == text]
        ids = dict.fromkeys(pair[side]["id"] for pair in of_prompt for side in ("reference", "base"))
        assert len(ids) == 3  # one reference of two bases
        maps = Trajectory.cat([trajectory_of(installation, sample_id, tmp_path) for sample_id in ids])
        expected = pytest.approx(thresholds_of(maps, FUSION))
        assert [pair["thresholds"] for pair in of_prompt] == [expected, expected]
        assert all(pair["target"] for pair in of_prompt)


def test_a_pair_whose_masks_cannot_be_found_goes_without_a_target(
    installation: Installation, learned: list[list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def for_two_items(trajectory: Trajectory, config: FusionConfig) -> tuple[float, ...]:
        if trajectory.items is not None and len(trajectory.items[0]) == 1:
            raise InvalidInputError("item_maps: no threshold for item 0")
        return thresholds_of(trajectory, config)

    monkeypatch.setattr(fuse_stage, "thresholds_of", for_two_items)
    job = installation.run(prompts=OPEN[:2], evaluation=None, pairing=EVERY_TARGET)
    assert (job["state"], job["error"]) == ("succeeded", None)
    pairs = installation.all(job["links"]["pairs"])
    assert [(pair["target"] is None, pair["adopted"]) for pair in pairs] == [(True, False)] * 2 + [(False, True)] * 2
    assert pairs[0]["reason"] == "nothing was fused: item_maps: no threshold for item 0"
    assert [example.sides_on_policy for example in learned[0]] == [(True, True)] * 2 + [(False, True)] * 2


def test_a_rounds_reward_may_be_a_sum(installation: Installation) -> None:
    weighted = {
        "kind": "weighted",
        "parts": [{"scorer": "brightness", "weight": -2}, {"scorer": "constant", "weight": 1}],
    }
    job = installation.run(prompts=PROMPTS[:1], reward=weighted, evaluation=None)
    pair = installation.all(job["links"]["pairs"])[0]
    bright = Brightness().score(picture(installation, pair["base"]["image"])[None], [""])[0]
    assert pair["base"]["score"] == pytest.approx(0.5 - 2 * bright)
    assert (pair["scorer"], pair["scorer_version"]) == (
        "-2.0*brightness+1.0*constant",
        "-2.0*brightness@1+1.0*constant@1",
    )


def test_a_sum_is_normalised_by_the_scores_of_the_run_so_far(installation: Installation) -> None:
    weighted = {
        "kind": "weighted",
        "normalise": True,
        "parts": [{"scorer": "brightness", "weight": -2}, {"scorer": "constant", "weight": 1}],
    }
    options = {"prompts": PROMPTS[:1], "evaluation": None, "rounds": 2, "pairing": EVERY_TARGET}
    job = installation.run(**options, reward=weighted, watch="brightness")
    assert job["state"] == "succeeded", job["error"]
    pairs = installation.all(job["links"]["pairs"])
    samples = [sample for sample in installation.all(f"/samples?job={job['id']}") if sample["role"] != "target"]

    # 1. scores of sampled images and of targets, by the images of their rounds and the rounds before
    for round_number in (1, 2):
        so_far = [sample["image"] for sample in samples if sample["round"] <= round_number]
        scale = [Brightness().score(picture(installation, image)[None], [""])[0] for image in so_far]
        mean = statistics.fmean(scale)
        deviation = statistics.pstdev(scale)
        sides = [pair[side] for pair in pairs if pair["round"] == round_number for side in ("base", "target")]
        assert any(side is not None for side in sides)
        for side in filter(None, sides):
            bright = Brightness().score(picture(installation, side["image"])[None], [""])[0]
            # a constant part is 0.5 - 0.5, whatever its weight
            assert side["score"] == pytest.approx(-2 * (bright - mean) / deviation, abs=1e-6)

    # 2. each part's curve, and its share of the variance
    name = "-2.0*z(brightness)+1.0*z(constant)"
    assert {pair["scorer"] for pair in pairs} == {name}
    curves: dict[str, list[float]] = {}
    for entry in installation.get(job["links"]["metrics"])["data"]:
        curves.setdefault(entry["scorer"], []).append(entry["mean"])
    assert curves["constant"] == [0.5, 0.5]
    assert curves["share:brightness"] == pytest.approx([1, 1]) and curves["share:constant"] == [0, 0]
    assert curves[name][0] == pytest.approx(0, abs=1e-9)
    assert len(curves["brightness"]) == 2


def test_a_score_that_is_no_number_fails_the_stage_and_names_the_sample(installation: Installation) -> None:
    job = installation.run(reward="partial", evaluation=None)
    assert job["state"] == "failed"
    star = next(s for s in installation.all(f"/samples?job={job['id']}") if "star" in s["prompt"])
    message = job["error"]["message"]
    assert "partial: image" in message and "expected a score that is a number, got None" in message
    assert f"sample {star['id']}, prompt {star['prompt_index']}, seed {star['seed']}" in message
    assert all(sample["scores"] == [] for sample in installation.all(f"/samples?job={job['id']}&prompt=star"))


def test_only_the_reward_of_a_round_may_be_normalised(installation: Installation) -> None:
    weighted = {"kind": "weighted", "normalise": True, "parts": [{"scorer": "brightness", "weight": 1}]}
    body = {"model": "tiny", "prompts": PROMPTS[:1], "scorers": [weighted]}
    response = installation.client.post("/samplings", json=body)
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == ["/scorers/0/normalise"]


def test_a_training_that_is_not_of_its_policy_is_refused_with_its_report(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded log-probs are 0.1 too high, as if another policy had sampled: p / p_old is exp(-0.1)."""
    monkeypatch.setattr("dfusion.sampling.recorded_log_prob", lambda *arguments: recorded_log_prob(*arguments) + 0.1)
    job = installation.run(evaluation=None, fusion=None, training=TRAINING)
    assert (job["state"], job["error"]["code"]) == ("failed", "policy_mismatch")
    [refused] = [e for e in installation.all(job["links"]["events"]) if e["kind"] == "training.refused"]
    assert refused["data"]["tolerance"] == 1e-3
    ratios = refused["data"]["ratio_by_step"]
    assert list(ratios) == ["0", "1", "2", "3"]
    assert list(ratios.values()) == pytest.approx([math.exp(-0.1)] * 4, abs=1e-4)


def test_an_interrupted_training_keeps_the_reports_of_all_updates(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = installation.run(evaluation=None, training=TRAINING)
    stop_once(monkeypatch)
    again = installation.run(evaluation=None, training=TRAINING)
    assert "training.resumed" in installation.events(again)
    logs = [updates_of(installation, job["last_model"]) for job in (through, again)]
    assert [update["update"] for update in logs[1]["updates"]] == [1, 2, 3] and logs[0] == logs[1]


def test_a_training_over_two_processes_survives_a_killed_one(
    tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The additional process of the first attempt is killed after the first update; the second attempt resumes from it.

    The adapter is that of one process. The epsilon limits the step of elements near 0, whose sign is due to rounding.
    """

    class ForkedRank(Forked):
        stdin = None

    started: list[ForkedRank] = []

    def start(command: list[str], stdin: int) -> ForkedRank:
        assert stdin == subprocess.PIPE and command[1:3] == ["-m", "worker.rank"]
        started.append(ForkedRank(take_part, *command[3:]))
        return started[-1]

    class Killing(Trainer):
        def step(self, on_rows: Any = None) -> Any:
            if self.updates_done == 1 and len(started) == 1:
                started[0].kill()
                started[0].wait(60)
            return super().step(on_rows)

    activities: list[str] = []
    monkeypatch.setattr(Watchdog, "expect", lambda _watchdog, activity, _seconds: activities.append(activity))
    monkeypatch.setattr("worker.training_ranks.subprocess.Popen", start)
    monkeypatch.setattr(train, "Trainer", Killing)
    options = {"prompts": OPEN, "evaluation": None, "pairing": EVERY_TARGET}
    options["training"] = TRAINING | {"adam_epsilon": 1e-3, "learning_rate": 1e-3}
    trained = []
    for number, devices in enumerate(((), ("cpu",))):
        settings = settings_for(tmp_path / str(number), pipeline, training_devices=devices)
        with TestClient(create_app(settings)) as client:
            installation = Installation(client)
            job_id = installation.post(**options)
            for _ in range(3):  # a retry starts after a pause
                work_until_idle(installation.service)
                time.sleep(0.2)
            job = installation.get(f"/jobs/{job_id}")
            assert (job["state"], job["error"]) == ("succeeded", None)
            trained.append((installation.adapter(job), updates_of(installation, job["last_model"])))
            retried = [event for event in installation.all(job["links"]["events"]) if event["kind"] == "stage.retried"]
            assert [event["data"]["code"] for event in retried] == ["rank_lost"] * number
            assert ("training.resumed" in installation.events(job)) is bool(devices)
            assert ("waiting for the other ranks of the training" in activities) is bool(devices)

    assert started[0].wait(60) == -signal.SIGKILL and started[1].wait(60) in (0, -signal.SIGKILL)  # ended or killed
    (alone, log), (together, other) = trained
    for name, values in alone.items():
        pair = [np.frombuffer(each, np.float32) for each in (values, together[name])]
        assert np.abs(pair[0] - pair[1]).max() < 1e-5
    assert (
        [update["update"] for update in other["updates"]] == [update["update"] for update in log["updates"]] == [1, 2]
    )
    losses = [[update["loss"] for update in each["updates"]] for each in (log, other)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [
        (StorageError("cannot read it: SlowDown"), True),
        (StorageGoneError("cannot read it: NoSuchKey"), False),
        (StorageCorruptError("other bytes"), False),
    ],
)
def test_a_checkpoint_is_given_up_only_where_it_is_gone(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, error: StorageError, goes_on: bool
) -> None:
    """A temporary storage error causes a retry and does not restart the training."""
    stop_once(monkeypatch)
    borrow, failed = FileStore.borrow, []

    def failing(store: FileStore, key: str, sha256: str) -> Any:
        if "checkpoint" in key and not failed:
            failed.append(key)
            raise error
        return borrow(store, key, sha256)

    monkeypatch.setattr(FileStore, "borrow", failing)
    job_id = installation.post(prompts=OPEN, evaluation=None, training=TRAINING)
    for _ in range(3):  # retries start after a pause
        work_until_idle(installation.service)
        time.sleep(0.2)
    job = installation.get(f"/jobs/{job_id}")
    assert (job["state"], job["error"]) == ("succeeded", None) and failed
    events = installation.events(job)
    assert ("training.resumed" in events, "training.restarted" in events) == (goes_on, not goes_on)


def test_scores_of_another_version_of_a_scorer_are_not_mixed_in(
    tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is upgraded in the middle of a round. All scores that it compares are from one version."""
    with TestClient(create_app(settings_for(tmp_path / "data", pipeline))) as client:
        installation = Installation(client)
        few: dict[str, Any] = {"prompts": PROMPTS[:1], "evaluation": None}
        job_id = installation.post(**few)
        work_until_idle(installation.service, until=lambda held: held.kind == "select")
        monkeypatch.setattr(Brightness, "version", "2")
        work_until_idle(installation.service)
        job = installation.get(f"/jobs/{job_id}")
        assert (job["state"], job["error"]) == ("succeeded", None)
        assert {pair["scorer_version"] for pair in installation.all(job["links"]["pairs"])} == {"2"}
        base = installation.all(f"/samples?job={job_id}&role=base")[0]
        assert [score["version"] for score in base["scores"]] == ["1", "2"]

        other_id = installation.post(**few)
        work_until_idle(installation.service, until=lambda held: held.kind == "verify")
        monkeypatch.setattr(Brightness, "version", "3")
        work_until_idle(installation.service)
        other = installation.get(f"/jobs/{other_id}")
        assert (other["state"], other["error"]) == ("succeeded", None)
        assert {pair["scorer_version"] for pair in installation.all(other["links"]["pairs"])} == {"3"}

        # by the last version, references score no more than bases: their pairs were selected by another measure
        last_id = installation.post(**few)
        work_until_idle(installation.service, until=lambda held: held.kind == "verify")
        monkeypatch.setattr(Brightness, "version", "4")
        monkeypatch.setattr(Brightness, "score", lambda _self, images, _prompts: [0.5] * len(images))
        work_until_idle(installation.service)
        failed = installation.get(f"/jobs/{last_id}")
        assert (failed["state"], failed["error"]["code"]) == ("failed", "scorer")
        assert "selected by brightness 3, but by this worker's brightness 4" in failed["error"]["message"]


def test_a_policy_gradient_continues_after_an_upgrade_of_the_scorer(
    installation: Installation, learned: list[list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TRAINING | {"algorithm": "ddpo", "clip_range": 0.1}
    job_id = installation.post(prompts=PROMPTS[:1], evaluation=None, fusion=None, training=training)
    work_until_idle(installation.service, until=lambda held: held.kind == "train")
    upgrade(monkeypatch)
    work_until_idle(installation.service)
    job = installation.get(f"/jobs/{job_id}")
    assert (job["state"], job["error"]) == ("succeeded", None)
    assert sum(example.advantage for example in learned[0]) == pytest.approx(0, abs=1e-6)


def test_an_evaluation_is_by_one_version_of_a_scorer(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"samples_per_prompt": 2, "sampling": {"num_steps": 4}, "scorers": ["brightness"]}
    trained = installation.run(prompts=PROMPTS[:1], evaluation=None, training=TRAINING)["last_model"]
    job_id = installation.ask("/evaluations", {"models": ["tiny", trained], "prompts": PROMPTS, **few})
    done: list[str] = []
    work_until_idle(installation.service, until=lambda held: bool(done) or done.append(held.stage_id))
    upgrade(monkeypatch)
    work_until_idle(installation.service)
    job = installation.get(f"/jobs/{job_id}")
    assert (job["state"], job["error"]) == ("succeeded", None)
    assert {m["version"] for m in installation.get(job["links"]["metrics"])["data"]} == {"2"}
    assert [row["count"] for row in job["result"]["splits"]["prompts"]["models"]] == [6, 6]


def upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upgrade workers to version 2 of the scorer."""
    monkeypatch.setattr(Brightness, "version", "2")


def test_a_job_that_is_tried_again_means_what_it_meant(installation: Installation) -> None:
    """A retried job keeps its models and prompt sets, even if their aliases and names have moved in the meantime."""
    trained = installation.run(prompts=PROMPTS[:1], evaluation=None, training=TRAINING)["last_model"]
    put_set = lambda prompts: installation.client.post("/prompt-sets", json={"name": "mine", "prompts": prompts})  # noqa: E731
    put_alias = lambda model: installation.client.put("/aliases/best", json={"model": model})  # noqa: E731
    base = installation.get("/models/tiny")["id"]
    assert put_set(PROMPTS[:1]).status_code in (200, 201) and put_alias(trained).status_code == 200
    few = {"samples_per_prompt": 2, "sampling": {"num_steps": 4}}
    requests = {
        "/samplings": {"model": "best", "prompt_set": "mine", "scorers": ["lost-device"], **few},
        "/evaluations": {
            "models": ["best", "tiny"],
            "prompt_sets": ["mine"],
            "prompts": PROMPTS[1:],
            "scorers": ["lost-device"],
            **few,
        },
    }
    failed = {path: installation.done(path, body) for path, body in requests.items()}
    assert put_set(PROMPTS).status_code in (200, 201) and put_alias(base).status_code == 200
    for path, first in failed.items():
        assert first["state"] == "failed"
        again = installation.client.post(f"{first['links']['self']}/retry").json()
        assert again["origin"] == first["id"]
        kinds = [
            [stage["kind"] for stage in installation.all(job["links"]["stages"]) if stage["kind"] != "score"]
            for job in (first, again)
        ]
        assert kinds[0] == kinds[1]
        if path == "/samplings":
            assert (again["model"], again["prompt_set"]) == (trained, first["prompt_set"])
        else:
            assert again["spec"]["models"] == [trained, base]
            assert len(again["spec"]["prompt_sets"]) == 1 and again["spec"]["prompt_sets"][0] != "mine"


def test_an_evaluation_measures_lists_and_own_prompts_by_themselves(installation: Installation) -> None:
    installation.client.post("/prompt-sets", json={"name": "trained", "prompts": PROMPTS[:2]})
    body = {"models": ["tiny"], "prompt_sets": ["trained"], "prompts": PROMPTS[2:], "scorers": ["brightness"]}
    job = installation.done("/evaluations", body | {"samples_per_prompt": 2, "sampling": {"num_steps": 4}})
    assert (job["state"], job["error"]) == ("succeeded", None)
    counts = {split: result["models"][0]["count"] for split, result in job["result"]["splits"].items()}
    assert counts == {"trained": 4, "prompts": 2}
    installation.client.post("/prompt-sets", json={"name": "prompts", "prompts": PROMPTS[:1]})
    response = installation.client.post("/evaluations", json=body | {"prompt_sets": ["prompts"]}).json()
    assert response["errors"][0]["pointer"] == "/prompt_sets"
    alone = {name: value for name, value in body.items() if name != "prompts"} | {"prompt_sets": ["prompts"]}
    assert installation.client.post("/evaluations?dry_run=true", json=alone).status_code == 200


def test_thresholds_are_as_many_as_items_and_maps_of_one_kind(installation: Installation) -> None:
    body = {"model": "tiny", "prompts": PROMPTS[:1], "sampling": {"num_steps": 4}, "scorers": ["brightness"]}
    first = installation.done("/samplings", body)
    other = installation.done("/samplings", body | {"mask_source": "resolution", "seed": 1})
    reference, base = installation.all(first["links"]["samples"])[:2]
    strange = installation.all(other["links"]["samples"])[:2]
    ask = {"reward": "brightness", "fusion": FUSION.model_dump()}
    pairs = [{"reference": reference["id"], "base": base["id"]}]
    response = installation.client.post("/fusions", json=ask | {"pairs": pairs, "thresholds": [0.1, 0.2]}).json()
    assert (response["code"], response["errors"][0]["pointer"]) == ("invalid_request", "/thresholds")
    both = [*pairs, {"reference": strange[0]["id"], "base": strange[1]["id"]}]
    response = installation.client.post("/fusions", json=ask | {"pairs": both}).json()
    assert response["errors"][0]["pointer"] == "/fusion/mask_source"


def test_a_preset_is_a_setting_of_a_fusion_too(installation: Installation) -> None:
    sampled = {"model": "tiny", "prompts": PROMPTS[:1], "sampling": {"num_steps": 4}, "mask_source": "resolution"}
    job = installation.done("/samplings", sampled | {"scorers": ["brightness"]})
    body = {"sampling": job["id"], "preset": "released_code", "fusion": {"first_step": 1}, "reward": "brightness"}
    fused = installation.done("/fusions", body)
    assert (fused["state"], fused["error"]) == ("succeeded", None)
    spec = fused["spec"]
    assert (spec["fusion"]["merge"], spec["fusion"]["mask_source"], spec["fusion"]["first_step"]) == (
        "or",
        "resolution",
        1,
    )
    assert {pair["adopted"] for pair in installation.all(fused["links"]["pairs"])} == {True}
